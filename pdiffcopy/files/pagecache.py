"""
How does a file leave the page cache as it was found?

The page cache of a production host holds what its programs need, and what a large file pushes out of it they have to
read from the disk again. So before a part of a file is read or written, the kernel is asked which of its pages are in
the cache (mincore(2)), and afterwards the others are taken out again (posix_fadvise(2)).

The kernel reads ahead of its readers, and nobody would know what it brings along. So it is told not to do that, and
reads what :mod:`.readahead` asks for. It takes clean pages out and no others, so what was written is written back
first: while more is being written, so that the disk is busy and nobody waits for long in the end.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any

from pdiffcopy.blocks import Extent, cut, intersect
from pdiffcopy.exceptions import FileError, FileForbiddenError, translating
from pdiffcopy.files import kernel

STEP = 1024 * 1024
"""How much is written back in one go, in bytes."""
LAG = 8 * 1024 * 1024
"""How much may be on its way to the disk while more is being written, in bytes."""
_WINDOW = 1024**3
"""How much of a file is examined at a time, in bytes."""
_FAR = 1024**3
"""How far behind the end of a file nothing can be cached, in bytes. Before that there may be the rest of the pages that
Linux keeps together (a folio), of which the first is in the file: as many as make up a huge page, 512 MiB at most."""


def prepare(fd: int, filename: str, size: int) -> None:
    """
    Prepare an open file of a certain size for visits.

    :raises: :exc:`.FileForbiddenError` when the kernel doesn't tell what is in its page cache.
    """
    with translating("examine the cached pages of", filename):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        is_hidden = _is_cached(fd, end) and _is_cached(fd, end + _FAR)
    # To those who aren't to know the kernel says that all pages are there: so is one behind the end.
    if is_hidden:
        text = "--drop-cache has to see what of {filename} is in memory: only its owner can, and who may write to it"
        raise FileForbiddenError(text, filename=filename)


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return kernel.find_cached_pages(fd, offset, mmap.PAGESIZE) != b"\0"
    except OSError as e:
        if e.errno != errno.EOVERFLOW:  # no file could have such a page
            raise
        return False


def find_missing_pages(fd: int, extents: Iterable[Extent]) -> Iterator[Extent]:
    """Find the pages of extents of an open file that aren't in its page cache, in runs."""
    for offset, size in filter(itemgetter(1), extents):
        start = offset - offset % mmap.PAGESIZE
        for window in cut([Extent(start, offset + size - start)], _WINDOW):
            for run in re.finditer(rb"\0+", kernel.find_cached_pages(fd, *window)):
                yield Extent(window.offset + run.start() * mmap.PAGESIZE, len(run[0]) * mmap.PAGESIZE)


class Visit:
    """
    The time in which extents of an open file are read (a context manager).

    What wasn't in the page cache before leaves it at the end.
    """

    def __init__(self, fd: int, filename: str, extents: Sequence[Extent]):
        """
        Initialize a visit.

        :param fd: The descriptor of the file.
        :param filename: Its name, for messages.
        :param extents: What is going to be read (none: everything stays in the page cache).
        """
        self.fd = fd
        self.filename = filename
        self.extents = extents
        self.guests: list[Extent] = []
        """What wasn't there before, in ascending order."""

    def __enter__(self) -> Visit:
        with translating("examine the cached pages of", self.filename):
            self.guests = sorted(find_missing_pages(self.fd, self.extents))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._drop(self.guests)

    def _drop(self, guests: Iterable[Extent]) -> None:
        for guest in guests:
            with suppress(OSError):  # they're going to be pushed out then, as ever
                os.posix_fadvise(self.fd, *guest, os.POSIX_FADV_DONTNEED)


class Change(Visit):
    """The same for extents that are written, one after the other. What has been written leaves early."""

    has_failed = False
    """Whether the disk didn't take something."""

    def __enter__(self) -> Change:
        super().__enter__()
        self._steps = deque(cut(self.extents if self.guests else (), STEP))
        self._behind: deque[Extent] = deque()
        self._written = self._lag = 0
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._behind += self._steps  # there are some after a failure
        try:
            while self._behind:
                self._settle()
        except FileError:
            if exc_info == (None, None, None):
                raise
        finally:
            # Once more, and as a whole: the kernel keeps larger units than pages, and drops no part of one.
            self._drop(self.guests)

    def note(self, size: int) -> None:
        """Take note that so many more bytes have been written, and see to it that they get to the disk."""
        self._written += size
        while self._steps and self._written >= self._steps[0].size:
            step = self._steps.popleft()
            self._behind.append(step)
            self._written -= step.size
            self._lag += step.size
            for part in intersect(step, self.guests):
                kernel.start_write_back(self.fd, *part)
        while self._lag > LAG:
            self._settle()

    def _settle(self) -> None:
        """Wait until the step that was written first has got to the disk, and drop it."""
        step = self._behind.popleft()
        self._lag -= step.size
        guests = list(intersect(step, self.guests))
        try:
            with translating("write", self.filename):
                for guest in guests:
                    kernel.write_back(self.fd, *guest)
        except FileError:
            self.has_failed = True
            raise
        self._drop(guests)
