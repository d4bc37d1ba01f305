"""
How are functions run in other processes, without ever losing a failure or a process?

This module knows nothing of files and networks. What it promises:

1. What a child raises is raised in the parent, with the traceback of the child as its cause. A child that dies
   without a word (``kill -9``, out of memory) is a :exc:`.WorkerError`.
2. The first failure wins: it ends the iteration over a :class:`WorkerPool` at once.
3. Leaving the ``with`` block of a pool leaves no process behind, and neither does the death of the parent. A child
   learns of that through the *lifeline*: a pipe whose only writing end is the parent's.
4. Nothing is polled: the parent sleeps until a result or the end of a process wakes it.
5. In the ``with`` block of a pool all of its processes run: what can be missing for that (descriptors, places for
   processes and threads, shared memory) was missed before, and is a :exc:`.WorkerError`.
6. A child ignores Control-C and SIGHUP (its parent decides what they mean) and dies of SIGTERM without further ado.

What runs in a pool, and at the same time::

   generator process:  for item in generator_fn(): put it into input_queue    (bounded: waits for the workers)
   worker processes:   for item in input_queue: put worker_fn(item) into output_queue     (bounded: waits for us)
   this process:       sleeps on output_queue and on the end of all of these processes

A reader may not assume any order of the results, and a worker function should return small values: up to 4 KiB
(pickled) are written in one piece, so that a worker killed meanwhile leaves nothing half-written.

A process that runs several threads must not fork (a lock that another thread holds stays locked in the child for
ever). There, children are spawned instead, which takes longer and requires the functions to be picklable. They don't
import the main module of the program unless a function comes from there: it may not expect that, or not be a file.

A daemonic process (a worker of :class:`multiprocessing.Pool`, of Celery, of Dask) may have children here, since they
die with it.
"""

from __future__ import annotations

import errno
import io
import logging
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

from property_manager import PropertyManager, lazy_property, mutable_property, required_property

from pdiffcopy.exceptions import WorkerError

_TERMINATION_TIMEOUT = 1.0
"""How long terminated processes have before they are killed, in seconds."""

_thread = threading.local()
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""What ends a program from outside."""

_lifelines: dict[int, tuple[Connection, Connection]] = {}


class RemoteTraceback(Exception):
    """The traceback of a child process, attached to an exception as its cause."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def _get_context() -> Any:
    return multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")


_REMEDIES = {
    errno.EAGAIN: "more processes have to be allowed (ulimit -u, or TasksMax of a systemd unit)",
    errno.EMFILE: "more open files have to be allowed (ulimit -n)",
    errno.ENFILE: "this machine has no room for more open files",
}
_NO_SHARED_MEMORY = "shared memory is needed, see that there is a /dev/shm that this user can write to"


@contextmanager
def _explaining(missing: str = "") -> Iterator[None]:
    """Tell what this machine lacks for more processes (`missing`, if the error itself doesn't say)."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as e:  # Python has no error of its own for "can't start new thread"
        number = e.errno if isinstance(e, OSError) else errno.EAGAIN if isinstance(e, RuntimeError) else None
        reason = getattr(e, "strerror", "") or str(e) or "out of memory"
        if remedy := _REMEDIES.get(number or 0, missing):
            reason += f": {remedy}"
        raise WorkerError("Can't start child processes: {reason}", reason=reason) from e


def make_counter() -> Any:
    """A number (a :func:`multiprocessing.Value` of 64 bits) that child processes started from now on can count with."""
    with _explaining(_NO_SHARED_MEMORY):
        return _get_context().Value("Q")


def _get_lifeline() -> Connection:
    pid = os.getpid()
    if pid not in _lifelines:
        _lifelines[pid] = multiprocessing.Pipe(duplex=False)
    return _lifelines[pid][0]


def _follow(lifeline: Connection) -> None:
    """Die with the parent. Its end of the pipe, which a fork copied, is closed first."""
    for _, writer in _lifelines.values():
        writer.close()
    _lifelines.clear()

    def watch() -> None:
        wait([lifeline])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _delayed_signals() -> Iterator[None]:
    """Make signals wait: in a child until it knows what to do about them, in the parent until it knows the child."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _allowed_to_have_children() -> Iterator[None]:
    """Lift the ban on children of daemonic processes. It's there since they would outlive them, and ours don't."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


class _Finder(pickle.Pickler):
    """Pickles what isn't multiprocessing's own, which can only be pickled for a child that is being started."""

    def persistent_id(self, obj: Any) -> str | None:
        module = type(obj).__module__
        return module if module.startswith("multiprocessing") else None


def _needs_main(process: Any) -> bool:
    """Whether a child process has to know something that the main module defines."""
    buffer = io.BytesIO()
    try:
        _Finder(buffer).dump((process._target, process._args, process._kwargs))
    except Exception:  # it tells when the child is started
        return True
    return b"__main__" in buffer.getvalue()


def _get_preparation_data(name: str) -> dict[str, Any]:
    """What multiprocessing tells a child that it spawns, which may be too much, or not be there."""
    if not getattr(_thread, "without_main", False):
        return _original_preparation(name)
    sys.modules.setdefault("__main__", ModuleType("__main__"))
    data = _original_preparation(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main_")}


_original_preparation = spawn.get_preparation_data
spawn.get_preparation_data = _get_preparation_data


class Promise(multiprocessing.Process):
    """Execute a Python function in a child process and retrieve its return value."""

    def __init__(self, **options: Any):
        """
        Initialize a :class:`Promise` object.

        The initializer arguments are the same as for :class:`multiprocessing.Process`. The child process is started
        automatically.
        """
        super().__init__(**options)
        with _explaining():
            self._lifeline = _get_lifeline()
            self._receiver, self._sender = multiprocessing.Pipe(duplex=False)
            self._ready, self._announcer = multiprocessing.Pipe(duplex=False)
            with _delayed_signals(), self._sender, self._announcer, _allowed_to_have_children():
                self.start()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        context = _get_context()
        _thread.without_main = context.get_start_method() == "spawn" and not _needs_main(process_obj)
        try:
            return context.Process._Popen(process_obj)
        finally:
            _thread.without_main = False

    def run(self) -> None:
        """Run the target function in a newly spawned child process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            with self._announcer, _explaining():
                _follow(self._lifeline)
                self._announcer.send_bytes(b"")
            outcome = _pickle(True, self._target(*self._args, **self._kwargs))  # type: ignore[attr-defined]
        except BaseException as e:
            outcome = _pickle(False, e)
        self._sender.send_bytes(outcome)

    def await_start(self) -> None:
        """Wait until the child process runs. If it couldn't, the reason is raised."""
        if self._ready.closed:
            return
        with self._ready:
            try:
                self._ready.recv_bytes()
            except (EOFError, OSError):
                self._get_outcome()

    def join(self, timeout: float | None = None) -> Any:
        """
        Get the return value and wait for the child process to finish.

        :param timeout: How long to wait, in seconds (by default as long as it takes).
        :returns: The return value of the target function, or :data:`None` when the time is over.
        :raises: What the target function raised, and :exc:`.WorkerError` when the process died.
        """
        if multiprocessing.util.is_exiting():  # type: ignore[attr-defined]  # nobody is left to take the outcome
            self.terminate()
            return super().join(timeout)
        if not self._receiver.closed and not self._receiver.poll(timeout):
            return None
        try:
            return self._get_outcome()
        finally:
            super().join()

    def _get_outcome(self) -> Any:
        """Do what :meth:`join` does, but without waiting for the process to finish."""
        if not self._receiver.closed:
            self._outcome = self._receive()
            self._receiver.close()
        success, value, text = self._outcome
        if not success:
            raise value from RemoteTraceback(text)
        return value

    def _receive(self) -> tuple[bool, Any, str]:
        try:
            return pickle.loads(self._receiver.recv_bytes())
        except (EOFError, OSError):  # nothing was sent, or it ends in the middle
            super().join()
            text = "A child process ({name}) ended unexpectedly ({reason})"
            code = self.exitcode or 0
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            return False, WorkerError(text, name=self.name, reason=reason), "The process left no traceback."


def _pickle(success: bool, value: Any) -> bytes:
    """Make bytes of an outcome, also when the value itself is not made for that."""
    text = "" if success else traceback.format_exc()
    try:
        outcome = pickle.dumps((success, value, text))
        pickle.loads(outcome)  # an exception may well be picklable, but not be restorable
        return outcome
    except Exception as e:
        what = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else f"a result ({e})"
        error = WorkerError("A child process can't pass on {what}", what=what)
        return pickle.dumps((False, error, text or traceback.format_exc()))


class WorkerPool(PropertyManager):
    """
    Simple to use worker pool implementation using :mod:`multiprocessing`.

    It works like this: ``with WorkerPool(concurrency=..., generator_fn=..., worker_fn=...) as pool`` starts the
    processes, ``for result in pool`` yields what the workers return, in the order in which they finish.
    """

    def __init__(self, **kw: Any):
        """Initialize a :class:`WorkerPool` object (no process is started yet)."""
        self._started: list[Promise] = []
        super().__init__(**kw)

    @required_property
    def concurrency(self) -> int:
        """The number of worker processes allowed to run simultaneously (an integer)."""

    @required_property
    def generator_fn(self) -> Callable[[], Iterable[Any]]:
        """A user defined generator to populate :attr:`input_queue`."""

    @required_property
    def worker_fn(self) -> Callable[[Any], Any]:
        """A user defined worker function to consume :attr:`input_queue` and populate :attr:`output_queue`."""

    @mutable_property
    def log_level(self) -> int:
        """
        The logging level to configure in child processes (an integer).

        Defaults to the current log level in the parent process at the point when the worker processes are created.
        """
        return logging.getLogger().getEffectiveLevel()

    @mutable_property
    def polling_interval(self) -> float:
        """
        The longest time that the parent sleeps on :attr:`output_queue` (in seconds, defaults to 0.1).

        Results and failures don't wait for this: they wake the parent at once.
        """
        return 0.1

    @lazy_property
    def input_queue(self) -> Any:
        """The input queue (a :class:`multiprocessing.Queue` object)."""
        with _explaining(_NO_SHARED_MEMORY):
            return _get_context().Queue(2 * self.concurrency)

    @lazy_property
    def output_queue(self) -> Any:
        """The output queue (a :class:`multiprocessing.Queue` object)."""
        with _explaining(_NO_SHARED_MEMORY):
            return _get_context().Queue(8 * self.concurrency)

    @lazy_property
    def generator_process(self) -> Promise:
        """A :class:`Promise` to run :attr:`generator_fn` (it starts when this property is first used)."""
        arguments = (self.concurrency, self.generator_fn, self.input_queue, self.log_level)
        return self._start("generator", generator_adapter, arguments)

    @lazy_property
    def worker_processes(self) -> list[Promise]:
        """A list of :class:`Promise` objects to run :attr:`worker_fn` (they start when this property is first used)."""
        arguments = (self.input_queue, self.log_level, self.output_queue, self.worker_fn)
        return [self._start(f"worker {i}", worker_adapter, arguments) for i in range(1, self.concurrency + 1)]

    @lazy_property
    def all_processes(self) -> list[Promise]:
        """A list with all :class:`Promise` objects used by the pool."""
        return [self.generator_process, *self.worker_processes]

    def __iter__(self) -> Iterator[Any]:
        """Initialize the generator and worker processes and start yielding values from :attr:`output_queue`."""
        with self:
            results = self.output_queue._reader
            # An outcome is looked at before its process has ended: it can't end before a large one was taken.
            running: dict[Any, Promise] = {process.sentinel: process for process in self.all_processes}
            silent: dict[Any, Promise] = {process._receiver: process for process in self.all_processes}
            while running:
                ready = wait([results, *silent, *running], timeout=self.polling_interval)
                for receiver in silent.keys() & ready:
                    silent.pop(receiver)._get_outcome()
                for sentinel in running.keys() & ready:
                    running.pop(sentinel).join()
                if results in ready:
                    yield self.output_queue.get()
            while results.poll():
                yield self.output_queue.get()

    def __enter__(self) -> WorkerPool:
        """Start up the generator and worker processes."""
        try:
            self.output_queue  # noqa: B018 (the generator is started first, and doesn't need it)
            for process in self.all_processes:
                process.await_start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, exc_type: Any = None, exc_value: Any = None, traceback: Any = None) -> None:
        """Terminate any child processes that are still alive."""
        for process in self._started:
            process.terminate()
        deadline = time.monotonic() + _TERMINATION_TIMEOUT
        for process in self._started:
            multiprocessing.Process.join(process, max(0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                multiprocessing.Process.join(process)
        for name in ("input_queue", "output_queue"):
            if queue := vars(self).get(name):
                queue.cancel_join_thread()
                queue.close()

    def _start(self, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> Promise:
        with _delayed_signals():
            process = Promise(target=target, args=arguments, name=name, daemon=True)
            self._started.append(process)
        return process


def generator_adapter(
    concurrency: int, generator_fn: Callable[[], Iterable[Any]], input_queue: Any, log_level: int
) -> None:
    """
    Adapter function for the generator process.

    An item travels in a tuple of one, an empty tuple tells one worker that there is no more.
    """
    logging.getLogger().setLevel(log_level)
    for item in generator_fn():
        _put(input_queue, (item,))
    for _ in range(concurrency):
        input_queue.put(())


def worker_adapter(input_queue: Any, log_level: int, output_queue: Any, worker_fn: Callable[[Any], Any]) -> None:
    """Adapter function for the worker processes."""
    logging.getLogger().setLevel(log_level)
    while envelope := input_queue.get():
        _put(output_queue, worker_fn(envelope[0]))


def _put(queue: Any, value: Any) -> None:
    """Put a value into a queue, which would silently lose one that can't be pickled."""
    ForkingPickler.dumps(value)
    queue.put(value)
