"""
How fast can files be read that are on storage that takes its time?

Usage: ``python -m benchmarks.readers COUNT FILE...`` reads files with so many threads, each a MiB at a time, and does
nothing with what it has read.
"""

from __future__ import annotations

import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import local

READ_SIZE = 1024 * 1024


def main() -> None:
    """The command line interface."""
    count, *names = sys.argv[1:]
    files = [os.open(name, os.O_RDONLY) for name in names]
    places = [(fd, offset) for fd in files for offset in range(0, os.fstat(fd).st_size, READ_SIZE)]
    thread = local()

    def read(place: tuple[int, int]) -> None:
        if not hasattr(thread, "buffer"):
            thread.buffer = mmap.mmap(-1, READ_SIZE)
        os.preadv(place[0], [thread.buffer], place[1])

    with ThreadPoolExecutor(int(count)) as executor:
        for _ in executor.map(read, places):
            pass


if __name__ == "__main__":
    main()
