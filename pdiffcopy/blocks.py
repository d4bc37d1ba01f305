"""
What are the parts of a file, and what is known about it?

Values that every other module uses: no I/O, and nothing about how they are written on the wire. All offsets and sizes
are in bytes. The offset of a block is a multiple of the block size; only the last block of a file may be shorter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

__all__ = [
    "DEFAULT_MODE",
    "FOLDER_MODE",
    "HOLES",
    "MAX_ID",
    "MAX_MODE",
    "MAX_OFFSET",
    "MAX_TIME",
    "SET_ID_BITS",
    "ZEROS",
    "Block",
    "BlockDigest",
    "Extent",
    "FileInfo",
    "Hole",
    "Metadata",
    "align",
    "block_length",
    "count_blocks",
    "cut",
    "halve",
    "intersect",
    "subtract",
    "total_size",
]

HOLES, ZEROS = "holes", "zeros"
"""How a part of a file can be nothing: with no room on the disk, and with some."""
MAX_OFFSET = 2**63 - 1
"""The largest offset that Linux knows (``off_t``)."""
MAX_MODE = 0o777
"""The permission bits of a file, without those that change the identity of a process (set-id)."""
DEFAULT_MODE, FOLDER_MODE = 0o666, 0o777
"""Those of a file of which they aren't known."""
MAX_ID = 2**32 - 2
"""The highest number of a user or a group (the one after it means that there is none)."""
MAX_TIME = (2**63 - 1) * 10**9
"""The latest time in nanoseconds since 1970 (``time_t`` counts seconds), and the earliest one without its sign."""
SET_ID_BITS = 0o7000
"""Those, and the one that goes with them (sticky)."""


class BlockDigest(NamedTuple):
    """The digest of one block: its offset and the hexadecimal digest of its bytes."""

    offset: int
    digest: str


class Extent(NamedTuple):
    """A run of neighboring bytes."""

    offset: int
    size: int


class Hole(NamedTuple):
    """A run of blocks that lie in a hole of the file."""

    offset: int
    size: int


class Block(NamedTuple):
    """A block of the source that was compared, or a run of them."""

    offset: int
    size: int
    changed: bool
    digest: str
    """The digest of the block in the source (empty when it wasn't computed)."""
    fill: str = ""
    """What it is to become without being moved: :data:`HOLES` or :data:`ZEROS` (empty: it is moved)."""
    blocks: int = 1
    """How many it stands for."""
    is_whole: bool = False
    """Whether it moves as a whole, since its holes differ: digests of its pieces don't tell of that."""


class FileInfo(NamedTuple):
    """What is known about a file (a 1.0.1 server tells the size and nothing else)."""

    exists: bool
    size: int = 0
    mtime_ns: int = 0
    """The time of the last modification in nanoseconds since 1970, or before (0 when it isn't known)."""
    ctime_ns: int = 0
    """The same for the last change of the inode, which nobody can set back (0 when it isn't known)."""
    file_id: str = ""
    """What no other file has, on any machine, until this one starts anew (empty when it isn't known)."""
    resizable: bool = True
    """False for a block device: its size is what it is."""
    mode: int = DEFAULT_MODE
    """Who may read, write and execute the file (the permission bits)."""
    grain: int = 0
    """The size of the smallest hole that it can have, in bytes (0 when it can have none, or that isn't known)."""
    has_holes: bool = False
    """Whether it has some."""
    allocated: int = 0
    """How many bytes it takes on its disk, as far as they're a part of its size."""
    settles_ms: int = 0
    """For how long another change may bear the same time as the last one, in milliseconds."""

    @property
    def tells_time(self) -> bool:
        """Whether a change of the contents shows here (it doesn't for a device, nor with a 1.0.1 server)."""
        return bool(self.ctime_ns)

    def describe_change(self, later: FileInfo) -> str:
        """Name what has changed since: ``identity``, ``size`` or ``time`` (empty when nothing has)."""
        if (self.exists, self.file_id, self.resizable) != (later.exists, later.file_id, later.resizable):
            return "identity"
        if self.size != later.size:
            return "size"
        mine, theirs = ((info.mtime_ns, info.ctime_ns, info.mode) for info in (self, later))
        return "time" if mine != theirs else ""

    def as_dict(self) -> dict[str, Any]:
        """All members but :attr:`exists` (none at all when there is no file)."""
        return {name: value for name, value in self._asdict().items() if name != "exists"} if self.exists else {}


class Metadata(NamedTuple):
    """What a file has beside its contents. What is :data:`None` is left as it is."""

    mode: int | None = None
    """The permission bits, with those of :data:`SET_ID_BITS`."""
    uid: int | None = None
    owner: str = ""
    """The name of the owner, which counts for more than the number where it's known (empty: there is none)."""
    gid: int | None = None
    group: str = ""
    mtime_ns: int | None = None
    """The time of the last modification in nanoseconds since 1970, which may be negative."""

    @property
    def names_owner(self) -> bool:
        """Whether it says whose the file is, or which group it belongs to."""
        return self.uid is not None or self.gid is not None

    def with_access(self) -> Metadata:
        """The same, but the owner may read and write."""
        return self if self.mode is None else self._replace(mode=self.mode | 0o600)


def block_length(offset: int, size: int, block_size: int) -> int:
    """Compute the length of the block at an offset, in a file of the given size."""
    return max(0, min(block_size, size - offset))


def count_blocks(size: int, block_size: int) -> int:
    """Count the blocks of a file of the given size."""
    return -(-size // block_size)


def total_size(extents: Sequence[Extent]) -> int:
    """Add up the sizes of some extents."""
    return sum(extent.size for extent in extents)


def halve(extents: Sequence[Extent]) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
    """
    Cut extents into two parts of equal size (the second one may have one byte more).

    :param extents: One extent or several, two bytes at least.
    """
    room = total_size(extents) // 2
    for index, (offset, size) in enumerate(extents):  # noqa: B007
        if size >= room:
            break
        room -= size
    rest = (Extent(offset + room, size - room),) if size > room else ()
    return (*extents[:index], Extent(offset, room)), (*rest, *extents[index + 1 :])


def intersect(extent: Extent, extents: Sequence[Extent]) -> Iterator[Extent]:
    """Yield the parts of an extent that lie in some others, which are in ascending order."""
    first = bisect_right(extents, extent.offset, key=lambda other: other.offset) - 1
    for index in range(max(first, 0), len(extents)):
        other = extents[index]
        begin, end = max(extent.offset, other.offset), min(sum(extent), sum(other))
        if begin < end:
            yield Extent(begin, end - begin)
        if sum(other) >= sum(extent):
            return


def join(extents: list[Extent], extent: Extent) -> None:
    """Append an extent to others, or let the last one of them grow by it if it's a neighbor."""
    if extents and sum(extents[-1]) == extent.offset:
        extents[-1] = Extent(extents[-1].offset, extents[-1].size + extent.size)
    else:
        extents.append(extent)


def subtract(extents: Iterable[Extent], holes: Sequence[Extent]) -> Iterator[Extent]:
    """Yield what is left of some extents without others (both in ascending order)."""
    for extent in extents:
        position = extent.offset
        for hole in intersect(extent, holes):
            if position < hole.offset:
                yield Extent(position, hole.offset - position)
            position = sum(hole)
        if position < sum(extent):
            yield Extent(position, sum(extent) - position)


def align(extent: Extent, unit: int, stop: int | None = None) -> Extent | None:
    """
    Find the part of an extent that consists of whole units.

    :param stop: Where the last unit ends, whole or not.
    :returns: That part, or :data:`None` where there's none.
    """
    begin, end = -(-extent.offset // unit) * unit, sum(extent)
    if end != stop:
        end -= end % unit
    return Extent(begin, end - begin) if begin < end else None


def find_layout(block: Extent, holes: Sequence[Extent], block_size: int, grain: int) -> str:
    """
    Spell where a block has holes, as far as they consist of whole grains.

    A grain that only begins or ends in the block doesn't count: whether that's a hole depends on its neighbor, too.

    :param holes: Those of the file, in ascending order.
    :returns: ``BEGIN:END,BEGIN:END,...`` in bytes from the beginning of the block (empty when it has none).
    """
    stop = sum(block) if block.size < block_size else None  # there the file ends
    parts = (align(part, grain, stop) for part in intersect(block, holes))
    return ",".join(f"{part.offset - block.offset}:{sum(part) - block.offset}" for part in parts if part)


def cut(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Cut extents into parts of a size (the last part of each may be shorter)."""
    for start, length in extents:
        for offset in range(start, start + length, size):
            yield Extent(offset, min(size, start + length - offset))
