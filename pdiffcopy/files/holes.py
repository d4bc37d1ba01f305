"""
Where has a file nothing?

A *hole* is a part of a file that takes no room on the disk, and reads as zeros (lseek(2), ``SEEK_HOLE``). A file system
keeps track of blocks, its *grain*: what is smaller than one of them is no hole. Devices have none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from pdiffcopy.blocks import Extent


def find_holes(fd: int, start: int, stop: int, grain: int = 1) -> Iterator[Extent]:
    """
    Find the holes in a part of a file.

    :param fd: The descriptor of the file.
    :param start: Where the part begins (in bytes, a multiple of the grain).
    :param stop: Where it ends: at a multiple of the grain, or at the end of the file.
    :param grain: Holes begin and end at multiples of it (but at the end of the file): smaller ones aren't told.
    """
    position = start
    while position < stop:
        try:
            begin = os.lseek(fd, position, os.SEEK_HOLE)
        except OSError as e:
            if e.errno in (errno.ENXIO, errno.EINVAL):  # it was cut meanwhile, or can't have any
                return
            raise
        if begin >= stop:
            return
        try:
            position = min(os.lseek(fd, begin, os.SEEK_DATA), stop)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            position = stop
        begin, end = -(-begin // grain) * grain, position if position == stop else position // grain * grain
        if begin < end:
            yield Extent(begin, end - begin)


def get_grain(fd: int) -> int:
    """The size of the blocks of the file system that a file is in, in bytes."""
    return max(os.fstatvfs(fd).f_bsize, 1)
