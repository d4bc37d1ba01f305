"""
How does a function run in another process, and how does its outcome come back?

A child tells its outcome through a pipe, learns of the death of its parent through another one (the *lifeline*), and
ignores Control-C and SIGHUP, since its parent decides what they mean. :mod:`.mp` makes pools of such processes.

A process that runs several threads must not fork (a lock that another thread holds stays locked in the child for
ever). There, children are spawned instead, which takes longer and requires the functions to be picklable. They don't
import the main module of the program unless a function comes from there: it may not expect that, or not be a file.

A daemonic process (a worker of :class:`multiprocessing.Pool`, of Celery, of Dask) may have children here, since they
die with it.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from pdiffcopy.exceptions import MORE_PROCESSES, REMEDIES, WorkerError

_thread = threading.local()
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM}
"""What ends a program from outside. (One that arrives again does so as an alarm, see :mod:`.console`.)"""

_lifelines: dict[int, tuple[Connection, Connection]] = {}


class RemoteTraceback(Exception):  # noqa: N818 (it is the cause of an error)
    """The traceback of a child process, attached to an exception as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _get_context() -> Any:
    return multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")


_REMEDIES = {errno.EAGAIN: MORE_PROCESSES, **REMEDIES}
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


def make_queue(size: int) -> Any:
    """
    Make a queue (a :class:`multiprocessing.Queue`) that child processes started from now on can use.

    :param size: How many items have room in it.
    """
    with _explaining(_NO_SHARED_MEMORY):
        return _get_context().Queue(size)


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
def delay_signals() -> Iterator[None]:
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
            self.receiver, self._sender = multiprocessing.Pipe(duplex=False)
            self._ready, self._announcer = multiprocessing.Pipe(duplex=False)
            with delay_signals(), self._sender, self._announcer, _allowed_to_have_children():
                self.start()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 (called by multiprocessing)
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
                self.get_outcome()

    def join(self, timeout: float | None = None) -> Any:
        """
        Get the return value and wait for the child process to finish.

        :param timeout: How long to wait, in seconds (by default as long as it takes).
        :returns: The return value of the target function, or :data:`None` when the time is over.
        :raises: What the target function raised, and :exc:`.WorkerError` when the process died.
        """
        if multiprocessing.util.is_exiting():  # nobody is left to take the outcome
            self.terminate()
            return super().join(timeout)
        if not self.receiver.closed and not self.receiver.poll(timeout):
            return None
        try:
            return self.get_outcome()
        finally:
            super().join()

    def get_outcome(self) -> Any:
        """Do what :meth:`join` does, but without waiting for the process to finish."""
        if not self.receiver.closed:
            self._outcome = self._receive()
            self.receiver.close()
        success, value, text = self._outcome
        if not success:
            raise value from RemoteTraceback(text)
        return value

    def _receive(self) -> tuple[bool, Any, str]:
        try:
            outcome: tuple[bool, Any, str] = pickle.loads(self.receiver.recv_bytes())
            return outcome
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
