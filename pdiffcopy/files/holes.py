"""
Where has a file nothing?

A *hole* is a part of a file that takes no room on the disk, and reads as zeros (lseek(2), ``SEEK_HOLE``). A file system
keeps track of blocks, its *grain*: what is smaller than one of them is no hole. Devices have none.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from pdiffcopy.blocks import MAX_OFFSET, Extent, align
from pdiffcopy.files import kernel

_HOLELESS = frozenset([0x4D44, 0x2011BAB0])
"""File systems that have no holes: FAT and exFAT (linux/magic.h)."""
_DISTANT = frozenset([0x65735546, 0x6969, 0xFF534D42, 0xFE534D42, 0x01021997])
"""File systems that may not know where the holes of a file are: those in user space, NFS, CIFS, SMB and 9P."""
_LAST = MAX_OFFSET + 1 - (mmap.PAGESIZE << 11)
"""Where the last pages begin that a file can have. What the page cache holds as one piece (at most so many bytes,
``MAX_XAS_ORDER`` in linux/pagemap.h) ends at an offset there that Linux can't express, and it takes that for a hole."""


def find_holes(fd: int, start: int, stop: int, grain: int = 1) -> Iterator[Extent]:
    """
    Find the holes in a part of a file.

    :param fd: The descriptor of the file.
    :param start: Where the part begins (in bytes).
    :param stop: Where it ends: at a multiple of the grain, or at the end of the file.
    :param grain: Holes begin and end at multiples of it (but at the end of the file): smaller ones aren't told.
    """
    position = start
    while position < stop and (begin := kernel.seek(fd, position, os.SEEK_HOLE, stop)) < stop:
        position = find_data(fd, begin, stop)
        if hole := align(Extent(begin, position - begin), grain, stop):
            yield hole


def find_data(fd: int, start: int, stop: int) -> int:
    """Find the first byte in a part of a file that isn't in a hole (the end of the part if there's none)."""
    found = kernel.seek(fd, start, os.SEEK_DATA, stop)
    for offset in range(max(start, _LAST), found if found == stop else 0, mmap.PAGESIZE):
        data = os.pread(fd, min(mmap.PAGESIZE, stop - offset), offset)
        if data != bytes(len(data)):
            return offset
    return found


def find_extents(fd: int, start: int, stop: int) -> Iterator[Extent]:
    """Find what isn't in a hole, in a part of a file."""
    while (start := find_data(fd, start, stop)) < stop:
        end = kernel.seek(fd, start, os.SEEK_HOLE, stop)
        yield Extent(start, end - start)
        start = end


def get_grain(fd: int) -> int:
    """The size of the blocks of the file system that a file is in, in bytes."""
    return max(os.fstatvfs(fd).f_bsize, 1)


def hides_holes(fd: int, size: int) -> bool:
    """
    Whether a file of a size (in bytes) in which no hole was found may have some, or can't have any.

    To count on them there would be in vain: the next run would find none.
    """
    kind = kernel.get_file_system(fd)
    return kind in _HOLELESS or (size > 0 and kind in _DISTANT)
