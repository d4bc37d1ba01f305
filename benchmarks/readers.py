"""
How fast can files be read that are on storage that takes its time?

Usage: ``python -m benchmarks.readers COUNT FILE...`` reads files with so many threads, each a MiB at a time, and does
nothing with what it has read.
"""

from __future__ import annotations

import mmap
import os
import sys
from threading import Lock, Thread

READ_SIZE = 1024 * 1024


def main() -> None:
    """The command line interface."""
    count, *names = sys.argv[1:]
    files = [os.open(name, os.O_RDONLY) for name in names]
    # From all files at once, as whoever compares them would.
    places = iter([(fd, offset) for offset in range(0, os.fstat(files[0]).st_size, READ_SIZE) for fd in files])
    lock = Lock()

    def read() -> None:
        buffer = mmap.mmap(-1, READ_SIZE)
        while True:
            with lock:
                place = next(places, None)
            if not place:
                return
            os.preadv(place[0], [buffer], place[1])

    threads = [Thread(target=read) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
