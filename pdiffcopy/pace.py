"""
How do bytes pass no faster than an operator wants, whatever process or thread they come from?

They all look at one clock: the moment at which everything that has passed would have passed at the rate that is wanted.
Whoever lets some more pass moves the clock on, and sleeps until then. So they take turns, and nobody keeps the others
waiting who stalls, or dies: the clock is locked for some microseconds, by a lock that ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from pdiffcopy.exceptions import UsageError

LEAST_RATE = 1024
"""The slowest rate, in bytes a second: peers take less for a stall, and who wants less has meant another unit."""
SLOW_RATE = 256 * 1024
"""Below this rate, in bytes a second, what fits into the buffers of a connection takes so long that it looks like a
stall to a peer (they have 64 KiB at first)."""
STEPS = 32
"""In how many steps the bytes of a second pass: few enough to cost nothing, and so many that each of hundreds of
connections gets its turn before its peer runs out of patience."""
CREDIT = 0.2
"""For how long nothing may have passed so that it is made up for, in seconds: sleepers wake up late."""

_CLOCK = struct.Struct("d")
_threads = threading.Lock()

C = TypeVar("C", bound=Sized)


class Pace:
    """Lets bytes pass as they come."""

    step = sys.maxsize
    """How many of them should pass at once, at most."""

    def take(self, size: int) -> None:
        """Take note of bytes that have passed, and wait until others may."""

    def slow(self, chunks: Iterable[C]) -> Iterable[C]:
        """Pass chunks on, and wait after each of them (they aren't cut here, see :attr:`step`)."""
        return chunks


UNLIMITED = Pace()


class Limit(Pace):
    """
    Lets bytes pass at a rate, over all processes that are forked from now on, or get this object when they start.

    It doesn't matter how many they are, and how many threads they have.
    """

    def __init__(self, rate: int):
        """
        Initialize a limit.

        :param rate: How many bytes may pass in a second.
        :raises: :exc:`.UsageError` when that's less than :data:`LEAST_RATE`.
        """
        from multiprocessing.connection import Connection

        if rate < LEAST_RATE:
            raise UsageError("The bandwidth has to be at least {least} bytes a second", least=LEAST_RATE)
        self._rate = rate
        self.step = rate // STEPS
        # As a connection, it gets to processes that are spawned as well.
        self._clock = Connection(os.memfd_create("pace", os.MFD_CLOEXEC))
        os.truncate(self._clock.fileno(), _CLOCK.size)

    def take(self, size: int) -> None:
        """See :meth:`Pace.take`."""
        now = time.monotonic()
        time.sleep(max(self._move_clock(now, size) - now, 0))

    def _move_clock(self, now: float, size: int) -> float:
        file = self._clock.fileno()
        with _threads:  # the other lock doesn't keep the threads of a process apart
            fcntl.lockf(file, fcntl.LOCK_EX)
            try:
                before: float = _CLOCK.unpack(os.pread(file, _CLOCK.size, 0))[0]
                after = max(before, now - CREDIT) + size / self._rate
                os.pwrite(file, _CLOCK.pack(after), 0)
            finally:
                fcntl.lockf(file, fcntl.LOCK_UN)
        return after

    def slow(self, chunks: Iterable[C]) -> Iterator[C]:
        """See :meth:`Pace.slow`."""
        for chunk in chunks:
            size = len(chunk)  # it's less when some of it has been consumed
            yield chunk
            self.take(size)


def make_pace(rate: int) -> Pace:
    """Make a limit (0 bytes a second stand for none)."""
    return Limit(rate) if rate else UNLIMITED
