"""
How are functions run in other processes, without ever losing a failure or a process?

This module knows nothing of files and networks. What it promises:

1. What a child raises is raised in the parent, with the traceback of the child as its cause. A child that dies
   without a word (``kill -9``, out of memory) is a :exc:`.WorkerError`.
2. The first failure wins: it ends the iteration over a :class:`WorkerPool` at once.
3. Leaving the ``with`` block of a pool leaves no process behind, and neither does the death of the parent.
4. Nothing waits for a poll: results and the ends of processes wake the parent at once.
5. In the ``with`` block of a pool all of its processes run: what can be missing for that (descriptors, places for
   processes and threads, shared memory) was missed before, and is a :exc:`.WorkerError`.
6. A child ignores Control-C and SIGHUP (its parent decides what they mean) and dies of SIGTERM without further ado.

What runs in a pool, and at the same time::

   generator process:  for item in generator_fn(): put it into input_queue    (bounded: waits for the workers)
   worker processes:   for item in input_queue: put worker_fn(item) into output_queue     (bounded: waits for us)
   this process:       sleeps on output_queue and on the end of all of these processes

A reader may not assume any order of the results. A thread takes them out of the queue: a worker that is killed may
leave a half-written one there, for the rest of which nobody may wait who has to notice that.

:mod:`.processes` has what a single child process needs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any

from property_manager import PropertyManager, lazy_property, mutable_property, required_property

from pdiffcopy.processes import Promise, RemoteTraceback, delay_signals, make_queue

__all__ = ["Promise", "RemoteTraceback", "WorkerPool", "generator_adapter", "make_queue", "worker_adapter"]

_TERMINATION_TIMEOUT = 1.0
"""How long terminated processes have before they are killed, in seconds."""


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

    @mutable_property
    def threads(self) -> int:
        """How many items a worker process works on at the same time (an integer, defaults to 1)."""
        return 1

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

    @lazy_property(writable=True)
    def input_queue(self) -> Any:
        """The input queue (a :class:`multiprocessing.Queue` object; one that was made earlier may be assigned)."""
        return make_queue(2 * self.concurrency)

    @lazy_property
    def output_queue(self) -> Any:
        """The output queue (a :class:`multiprocessing.Queue` object)."""
        return make_queue(8 * self.concurrency)

    @lazy_property
    def generator_process(self) -> Promise:
        """A :class:`Promise` to run :attr:`generator_fn` (it starts when this property is first used)."""
        arguments = (self.concurrency * self.threads, self.generator_fn, self.input_queue, self.log_level)
        return self._start("generator", generator_adapter, arguments)

    @lazy_property
    def worker_processes(self) -> list[Promise]:
        """A list of :class:`Promise` objects to run :attr:`worker_fn` (they start when this property is first used)."""
        arguments = (self.input_queue, self.log_level, self.output_queue, self.worker_fn, self.threads)
        return [self._start(f"worker {i}", worker_adapter, arguments) for i in range(1, self.concurrency + 1)]

    @lazy_property
    def all_processes(self) -> list[Promise]:
        """A list with all :class:`Promise` objects used by the pool."""
        return [self.generator_process, *self.worker_processes]

    @lazy_property
    def _results(self) -> _Results:
        return _Results(self.output_queue, self.concurrency)

    def __iter__(self) -> Iterator[Any]:
        """Initialize the generator and worker processes and start yielding values from :attr:`output_queue`."""
        with self:
            self._results.start()
            # An outcome is looked at before its process has ended: it can't end before a large one was taken.
            running: dict[Any, Promise] = {process.sentinel: process for process in self.all_processes}
            silent: dict[Any, Promise] = {process.receiver: process for process in self.all_processes}
            while running:
                ready = wait([self._results.bell, *silent, *running], timeout=self.polling_interval)
                for receiver in silent.keys() & ready:
                    silent.pop(receiver).get_outcome()
                for sentinel in running.keys() & ready:
                    running.pop(sentinel).join()
                if self._results.bell in ready:
                    yield from self._results.take()
            yield from self._results.take_rest()

    def is_ready(self, patience: float = 0) -> bool:
        """Whether there is a result, or will be within a number of seconds."""
        return bool(wait([self._results.bell], patience))

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
        if (results := vars(self).get("_results")) and not results.has_stopped:
            results.stop()
        for name in ("input_queue", "output_queue"):
            if queue := vars(self).get(name):
                queue.cancel_join_thread()
                queue.close()

    def _start(self, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> Promise:
        with delay_signals():
            process = Promise(target=target, args=arguments, name=name, daemon=True)
            self._started.append(process)
        return process


class _Results:
    """Takes results out of a queue, in a thread of its own."""

    def __init__(self, queue: Any, most: int):
        """:param most: How many of them may wait for the reader."""
        self.queue, self.room, self.has_stopped = queue, threading.Semaphore(most), False
        # A tuple of one, or an empty one at the end (or what has ended it).
        self.found: SimpleQueue[tuple[Any, ...] | BaseException] = SimpleQueue()
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self.thread = threading.Thread(target=self._collect, name="results", daemon=True)

    def start(self) -> None:
        """Begin. All children run already: where there are threads, they can't be forked."""
        self.thread.start()

    def take(self) -> tuple[Any, ...]:
        """
        Take the next one, which is there when the bell rings: a tuple of it, or an empty one at the end.

        :raises: What forbids to take it.
        """
        envelope = self.found.get()
        if isinstance(envelope, BaseException):
            raise envelope
        if envelope:
            os.eventfd_read(self.bell)
            self.room.release()
        return envelope

    def take_rest(self) -> Iterator[Any]:
        """Take those that children have left which have ended."""
        self._close_writer()
        while envelope := self.take():
            yield from envelope

    def stop(self) -> None:
        """End the thread. When nobody can write any more, it doesn't wait for the rest of a result either."""
        self.has_stopped = True
        self.room.release()
        self._close_writer()
        if self.thread.is_alive():
            self.thread.join(_TERMINATION_TIMEOUT)
        os.close(self.bell)

    def _close_writer(self) -> None:
        self.queue._writer.close()

    def _collect(self) -> None:
        try:
            while self.room.acquire() and not self.has_stopped:
                self.found.put((self.queue.get(),))
                os.eventfd_write(self.bell, 1)
        except (EOFError, OSError):  # there's nobody left who could write any
            pass
        except BaseException as e:  # it can be pickled, but not unpickled
            self.found.put(e)
            os.eventfd_write(self.bell, 1)
        self.found.put(())


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


def worker_adapter(
    input_queue: Any, log_level: int, output_queue: Any, worker_fn: Callable[[Any], Any], threads: int = 1
) -> None:
    """Adapter function for the worker processes."""
    logging.getLogger().setLevel(log_level)

    def work() -> None:
        while envelope := input_queue.get():
            _put(output_queue, worker_fn(envelope[0]))

    if threads == 1:
        work()
        return
    # The first failure ends the process, whatever the other threads wait for.
    ends: SimpleQueue[BaseException | None] = SimpleQueue()
    for _ in range(threads):
        threading.Thread(target=_tell_end, args=(work, ends), daemon=True).start()
    for _ in range(threads):
        if error := ends.get():
            raise error


def _tell_end(work: Callable[[], None], ends: SimpleQueue[BaseException | None]) -> None:
    try:
        work()
        ends.put(None)
    except BaseException as e:
        ends.put(e)


def _put(queue: Any, value: Any) -> None:
    """Put a value into a queue, which would silently lose one that can't be pickled."""
    ForkingPickler.dumps(value)
    queue.put(value)
