"""Which folders are compared? They are full of files of one size."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import BLOCK_SIZE, CORES, MISSING, Pair, make_junk, use_memory


class TreePair(Pair):
    """Two folders, the source and its target, with files of the same names."""

    def __init__(self, folder: Path, name: str, count: int, file_size: int):
        """
        Make the files.

        :param folder: Where to put the folders.
        :param name: What their names begin with.
        :param count: How many files there are.
        :param file_size: How many bytes each of them has (whole MiBs).
        """
        self.count, self.file_size = count, file_size
        self.size = count * file_size
        self.source, self.target = folder / f"{name}-source", folder / f"{name}-target"
        self._junk = make_junk(self.size)
        self.source.mkdir()
        generator = random.Random(self.size)
        for path in self._list(self.source):
            with path.open("wb") as file:
                for _ in range(0, file_size, BLOCK_SIZE):
                    file.write(generator.randbytes(BLOCK_SIZE))
        os.sync()

    def _list(self, folder: Path) -> Iterator[Path]:
        return (folder / f"file-{number:06}" for number in range(self.count))

    def prepare(self, layout: str, percent: float) -> int:
        """See :meth:`Pair.prepare`. The blocks are those of one file that has all of the contents."""
        extents = self.choose(layout, percent)
        if layout == MISSING:
            if self.target.exists():
                shutil.rmtree(self.target)
            os.sync()
        else:
            if not self.target.exists():
                shutil.copytree(self.source, self.target)
            for offset, size in extents:
                number, start = divmod(offset, self.file_size)
                with (self.target / f"file-{number:06}").open("r+b", buffering=0) as file:
                    file.seek(start)
                    file.write(self._get_junk(offset, size))
            os.sync()
        self.warm()
        if layout == MISSING:
            use_memory(self.target.with_suffix(".scratch"), self.size)
        return sum(size for _, size in extents)

    def warm(self) -> None:
        """See :meth:`Pair.warm`."""
        with ThreadPoolExecutor(CORES) as executor:
            for folder in filter(Path.exists, (self.source, self.target)):
                list(executor.map(Path.read_bytes, self._list(folder)))

    def remove(self) -> None:
        """Remove the folders."""
        for folder in filter(Path.exists, (self.source, self.target)):
            shutil.rmtree(folder)

    def is_equal(self) -> bool:
        """Whether the target has the same files as the source, and nothing else."""
        if sorted(os.listdir(self.source)) != sorted(os.listdir(self.target)):
            return False
        pairs = zip(self._list(self.source), self._list(self.target), strict=True)
        return all(source.read_bytes() == target.read_bytes() for source, target in pairs)
