"""
How is a file read from storage that takes its time?

A read from a volume elsewhere takes a millisecond, and the volume answers dozens of them in that time. So the kernel is
told what is going to be read (posix_fadvise(2)), and reads it into its cache meanwhile. What is in the cache costs
nothing but a look.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pdiffcopy.blocks import Extent, cut

WINDOW = 8 * 1024 * 1024
"""How far ahead of its reader the kernel reads, in bytes."""
_STEP = 1024 * 1024
"""How much is looked at and asked for at a time."""
_LEAST = 128 * 1024
"""What the kernel reads at once unless the administrator wants something else (``VM_READAHEAD_PAGES``, linux/mm.h)."""


class ReadAhead:
    """What is going to be read of an open file."""

    def __init__(self, fd: int, extents: Iterable[Extent]):
        """
        Initialize it.

        :param fd: The descriptor of the file.
        :param extents: What is going to be read, in this order.
        """
        self.fd = fd
        self._steps = cut(extents, _STEP)
        self._ahead = 0
        self._unit = 0

    def advance(self, done: int) -> None:
        """Let the kernel read what lies up to :data:`WINDOW` bytes ahead, when so many of them have been read."""
        while self._ahead < done + WINDOW:
            step = next(self._steps, None)
            if not step:
                return
            # What only begins in the cache was read ahead by the kernel itself.
            if not _is_cached(self.fd, sum(step) - 1):
                self._read(step)
            self._ahead += step.size

    def _read(self, step: Extent) -> None:
        self._unit = self._unit or min(_get_unit(self.fd), _STEP)
        for offset in range(step.offset, sum(step), self._unit):
            size = min(self._unit, sum(step) - offset)
            with suppress(OSError):  # it's only a hint
                os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)


def _is_cached(fd: int, offset: int) -> bool:
    """Whether a read wouldn't wait (preadv2(2)). A file system that can't tell is one that may let it wait."""
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        return True
    except OSError as e:
        return e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP)


def _get_unit(fd: int) -> int:
    """How much the kernel reads at once: it cuts off what is more (``force_page_cache_ra`` in mm/readahead.c)."""
    status = os.fstat(fd)
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for place in (f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}", f"{folder}/bdi", f"{folder}/../bdi"):
        with suppress(OSError, ValueError):
            return max(int(Path(place, "read_ahead_kb").read_text()) * 1024, _LEAST)
    return _LEAST
