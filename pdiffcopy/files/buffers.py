"""Where do bytes lie on their way through this program?"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_SIZE = 256 * 1024
"""How many bytes are received at a time as an object of Python."""
READ_SIZE = 1024 * 1024
"""How many bytes are read (or read back) and hashed at a time: fewer cost more (docs/performance.rst)."""

ZEROED = memoryview(bytes(READ_SIZE))
"""So many zeros."""

_IDLE_BUFFERS = 16
_idle_buffers: list[mmap.mmap] = []


@contextmanager
def borrow_buffer() -> Iterator[memoryview]:
    """
    Lend a buffer of :data:`READ_SIZE` bytes.

    It begins at a page: some processors take up to five times as long to fill a buffer that begins 16 bytes behind one,
    as those of Python's own objects do (docs/performance.rst). New memory costs a page fault for each page, so a few
    buffers are kept. They are private, so a child process gets copies of its own.
    """
    try:
        buffer = _idle_buffers.pop()
    except IndexError:
        buffer = mmap.mmap(-1, READ_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        yield memoryview(buffer)
    finally:
        if len(_idle_buffers) < _IDLE_BUFFERS:
            _idle_buffers.append(buffer)
