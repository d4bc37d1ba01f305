"""Which files are compared? A source with random contents, and a target that is damaged before each run."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from benchmarks.limits import make_buffer

BLOCK_SIZE = 1024 * 1024
CORES = len(os.sched_getaffinity(0))
SCATTERED, PAGES, MISSING = "MiBs", "pages", "missing"
PAGE_SIZE = 4096
TABLE_PAGE = 16 * 1024
"""How large a page of a table is before it's compressed, in bytes."""
_JUNK_SIZE = 16 * BLOCK_SIZE


REPORTING_DELAY = 2.5
"""How long to wait until what was freed before has been reported, in seconds."""


class Pair:
    """A source and its target, of one size (in bytes)."""

    is_renewed = False
    """Whether some contenders make a new file of the target, so that what differs takes memory once more."""

    def __init__(self, folder: Path, name: str, size: int):
        """
        Make the files.

        :param folder: Where to put them.
        :param name: What their names begin with.
        """
        self.size = size
        self.source = folder / f"{name}-source.bin"
        self.target = folder / f"{name}-target.bin"
        generator = random.Random(size)
        self._junk = generator.randbytes(_JUNK_SIZE)
        with self.source.open("wb") as file:
            for offset in range(0, size, BLOCK_SIZE):
                file.write(generator.randbytes(min(BLOCK_SIZE, size - offset)))
        _sync(self.source)

    def choose(self, layout: str, percent: float) -> list[tuple[int, int]]:
        """
        Which part of the target gets damaged.

        :returns: A list of extents in the order of the file, each an offset and a size in bytes.
        """
        if layout == MISSING:
            return [(0, self.size)]
        count = -(-self.size // BLOCK_SIZE)
        chosen = round(count * percent / 100)
        generator = random.Random(count)
        blocks = sorted(generator.sample(range(count), chosen))
        if layout == PAGES:
            pages = [block * BLOCK_SIZE + generator.randrange(0, BLOCK_SIZE, PAGE_SIZE) for block in blocks]
            return [(offset, PAGE_SIZE) for offset in pages if offset + PAGE_SIZE <= self.size]
        return [(block * BLOCK_SIZE, min(BLOCK_SIZE, self.size - block * BLOCK_SIZE)) for block in blocks]

    def prepare(self, layout: str, percent: float) -> int:
        """
        Damage a target that equals the source (or take it away), and put both into the page cache.

        The target is flushed, so that the run after this isn't disturbed by what it costs to write the damage.

        :returns: How many bytes differ.
        """
        extents = self.choose(layout, percent)
        if layout == MISSING:
            self.target.unlink(missing_ok=True)
        else:
            self._restore()
            with self.target.open("r+b", buffering=0) as file:
                for offset, size in extents:
                    for position in range(offset, offset + size, BLOCK_SIZE):
                        file.seek(position)
                        length = min(BLOCK_SIZE, offset + size - position)
                        file.write(self._get_junk(position, length))
            _sync(self.target)
        self.warm()
        changed = sum(size for _, size in extents)
        if layout == MISSING or self.is_renewed:
            use_memory(self.target.with_suffix(".scratch"), changed)
        return changed

    def warm(self) -> None:
        """Read both files, so that they're in the page cache."""
        files = [path for path in (self.source, self.target) if path.exists()]
        with ThreadPoolExecutor(CORES) as executor:
            for path in files:
                list(executor.map(lambda start, path=path: _read_through(path, start), range(CORES)))

    def cool(self) -> None:
        """Take both files out of the page cache."""
        for path in (self.source, self.target):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def seen_from(self, folder: Path) -> Pair:
        """The same files by their names in another folder."""
        pair = copy(self)
        pair.source, pair.target = folder / self.source.name, folder / self.target.name
        return pair

    def remove(self) -> None:
        """Remove the files."""
        self.source.unlink()
        self.target.unlink(missing_ok=True)

    def is_equal(self) -> bool:
        """Whether the target equals the source."""
        if not self.target.exists() or self.target.stat().st_size != self.size:
            return False
        with ThreadPoolExecutor(CORES) as executor:
            return all(executor.map(self._is_equal, range(CORES)))

    def _is_equal(self, start: int) -> bool:
        both = zip(_read(self.source, start), _read(self.target, start), strict=True)
        return all(left == right for left, right in both)

    def _restore(self) -> None:
        # After a run the target equals the source. It's only missing before the first one.
        if not self.target.exists() or self.target.stat().st_size != self.size:
            shutil.copyfile(self.source, self.target)

    def _get_junk(self, offset: int, size: int) -> bytes:
        start = offset // BLOCK_SIZE * 4099 % (_JUNK_SIZE - BLOCK_SIZE)
        return self._junk[start : start + size]


class SparsePair(Pair):
    """Two files that have contents in some extents and holes elsewhere: large without taking much room."""

    def __init__(self, folder: Path, name: str, size: int, extents: list[tuple[int, int]]):
        """
        Make the files.

        :param extents: Where they have contents, an offset and a size of at most 1 MiB each.
        """
        self.size, self.extents = size, extents
        self.source = folder / f"{name}-source.bin"
        self.target = folder / f"{name}-target.bin"
        self._junk = make_junk(size)
        _write(self.source, size, ((offset, self._get_junk(offset, length)) for offset, length in extents))

    def choose(self, layout: str, percent: float) -> list[tuple[int, int]]:
        """Which of the extents get damaged."""
        count = len(self.extents) if layout == MISSING else round(len(self.extents) * percent / 100)
        return sorted(random.Random(count).sample(self.extents, count))

    def prepare(self, layout: str, percent: float) -> int:
        """See :meth:`Pair.prepare`. A new file of this kind takes too little memory to care for it."""
        extents = self.choose(layout, percent)
        if layout == MISSING:
            self.target.unlink(missing_ok=True)
        else:
            self._restore()
            # What another extent has is as good as junk.
            parts = ((offset, self._get_junk(offset + BLOCK_SIZE, length)) for offset, length in extents)
            _write(self.target, self.size, parts)
        self.warm()
        return sum(size for _, size in extents)

    def warm(self) -> None:
        """Read what isn't in a hole, so that it's in the page cache."""
        for path in (self.source, self.target):
            if path.exists():
                for extent in _find_extents(path):
                    _read_extent(path, extent)

    def is_equal(self) -> bool:
        """Whether the target equals the source. Of the rest it's known that both have a hole there."""
        if not self.target.exists() or self.target.stat().st_size != self.size:
            return False
        extents = {extent for path in (self.source, self.target) for extent in _find_extents(path)}
        return all(_read_extent(self.source, extent) == _read_extent(self.target, extent) for extent in extents)

    def get_room(self) -> float:
        """How much room the target takes, as a part of what the source takes."""
        os.sync()
        return self.target.stat().st_blocks / self.source.stat().st_blocks

    def _restore(self) -> None:
        if not self.target.exists() or self.target.stat().st_size != self.size:
            parts = ((offset, self._get_junk(offset, length)) for offset, length in self.extents)
            _write(self.target, self.size, parts)


def make_junk(seed: int) -> bytes:
    """Make what differs from any file."""
    return random.Random(seed).randbytes(_JUNK_SIZE)


def use_memory(scratch: Path, size: int) -> None:
    """
    Use the memory that something new is going to take, and free it.

    What has been free for two seconds goes back to the hypervisor of a virtual machine (Linux calls that free page
    reporting). To use it again takes up to seven times as long, which would hit one contender and spare the next.

    :param scratch: A file that is created for that.
    """
    with scratch.open("wb", buffering=0) as file:
        for _ in range(0, size, BLOCK_SIZE):
            file.write(bytes(BLOCK_SIZE))
    time.sleep(REPORTING_DELAY)
    scratch.unlink()


def scatter(size: int, total: int) -> list[tuple[int, int]]:
    """Choose MiBs of a file of some size that are so many bytes together: one at random in each part of it."""
    generator, count = random.Random(total), max(1, round(total / BLOCK_SIZE))
    distance = size // count // BLOCK_SIZE
    return [((part * distance + generator.randrange(distance)) * BLOCK_SIZE, BLOCK_SIZE) for part in range(count)]


def leave_holes(size: int) -> list[tuple[int, int]]:
    """Choose the halves of pages that a table keeps when it's compressed (as InnoDB does it): the rest are holes."""
    return [(offset, TABLE_PAGE // 2) for offset in range(0, size, TABLE_PAGE)]


def _write(path: Path, size: int, parts: Iterable[tuple[int, bytes]]) -> None:
    path.touch()
    # First of all: where a file grows by being written to, XFS takes more room than that.
    os.truncate(path, size)
    with path.open("r+b", buffering=0) as file:
        for offset, data in parts:
            os.pwrite(file.fileno(), data, offset)
    _sync(path)


def _find_extents(path: Path) -> Iterator[tuple[int, int]]:
    """Yield what isn't in a hole, in parts of at most 1 MiB: an offset and a size each."""
    with path.open("rb") as file:
        fd, offset = file.fileno(), 0
        while True:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError:  # there's nothing more
                return
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            for position in range(start // BLOCK_SIZE * BLOCK_SIZE, offset, BLOCK_SIZE):
                begin = max(position, start)
                yield begin, min(position + BLOCK_SIZE, offset) - begin


def _read_extent(path: Path, extent: tuple[int, int]) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), extent[1], extent[0])


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(path: Path, start: int) -> Iterator[bytearray]:
    """Read the part of a file that thread number `start` is responsible for (the buffer is used again)."""
    buffer = bytearray(BLOCK_SIZE)
    with path.open("rb", buffering=0) as file:
        for offset in range(start * BLOCK_SIZE, os.fstat(file.fileno()).st_size, CORES * BLOCK_SIZE):
            count = os.preadv(file.fileno(), [buffer], offset)
            yield buffer if count == len(buffer) else buffer[:count]


def _read_through(path: Path, start: int) -> None:
    buffer = make_buffer(BLOCK_SIZE)
    with path.open("rb", buffering=0) as file:
        for offset in range(start * BLOCK_SIZE, os.fstat(file.fileno()).st_size, CORES * BLOCK_SIZE):
            os.preadv(file.fileno(), [buffer], offset)
