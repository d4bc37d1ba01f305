r"""
Which parts of the target have to change?

Two streams of digests go in, batches of work come out, as early as possible. Everything here is pure: nothing is
read, sent or written, and memory stays flat however large the file is::

    digests of the source, in any order --- in_order() ---\
                                                           compare() --- make_batches() --- Batch, Batch, ...
    digests of the target, in any order --- in_order() ---/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat

from pdiffcopy.blocks import Block, BlockDigest, Extent, block_length, total_size
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.exceptions import ProtocolError
from pdiffcopy.words import MAX_EXTENTS

BATCH_SIZE = 64 * 1024 * 1024
"""How many bytes one request moves at most: to make and to answer one takes as long as to move several MiB..."""
HELD_BATCH_SIZE = 16 * 1024 * 1024
"""... and with an old peer, which takes one extent a request, and has the bytes in memory all at once. So have we, to
compare them with the digests of their blocks."""

COMPARE_WINDOW = 256 * 1024 * 1024
"""After how many compared bytes a batch is closed, even when it isn't full (or is empty, to report progress)."""
FIRST_WINDOW = 16 * 1024 * 1024
"""After how many compared bytes the first batch is closed if somebody waits for it. Each one takes a quarter more than
the one before, so that it's found about when that one has been moved, if a slow wire and a slow hash method take
equally long."""
LOOK_WINDOW = 4 * 1024 * 1024
"""After how many more bytes we look whether somebody has begun to wait."""

BATCH_BLOCKS = 65536
"""How many changed blocks make up a batch at most: their digests may have to travel with it."""

REORDER_WINDOW = 65536
"""How many blocks a peer may be ahead of the first block that it still owes us."""


@dataclass(frozen=True)
class Batch:
    """What one worker transfers in one go, and what was compared to find it."""

    extents: tuple[Extent, ...] = ()
    digests: tuple[BlockDigest, ...] = ()
    """The digests of the changed blocks in the source."""
    blocks_compared: int = 0
    blocks_changed: int = 0
    bytes_compared: int = 0
    digest: str = ""
    """The digest of the digests of the changed blocks (see :func:`.digest_blockwise`)."""
    unit: int = 0
    """The size of the pieces of which that is, in bytes (0: it is of whole blocks)."""

    @property
    def size(self) -> int:
        """How many bytes are to be moved."""
        return total_size(self.extents)


def in_order(digests: Iterable[BlockDigest], start: int, stop: int, block_size: int) -> Iterator[str]:
    """
    Put a stream of digests in order, and distrust it.

    :param digests: The blocks from `start` on, in any order.
    :param start: The offset of the first block (in bytes).
    :param stop: Where the last block ends.
    :returns: A generator of the digests, from the first block to the last one.
    :raises: :exc:`.ProtocolError` when a block is missing, comes twice, lies elsewhere or far ahead, or when the
             digests differ in length.
    """
    expected, length = start, 0
    early: dict[int, str] = {}
    for offset, digest in digests:
        length = length or len(digest)
        if offset % block_size or not expected <= offset < stop or offset in early or len(digest) != length:
            raise ProtocolError("The hashes contain an impossible line for offset {offset}", offset=offset)
        if (offset - expected) // block_size > REORDER_WINDOW:
            raise ProtocolError("The hashes jump ahead to offset {offset}", offset=offset)
        early[offset] = digest
        while expected in early:
            yield early.pop(expected)
            expected += block_size
        if expected >= stop:
            return
    if expected < stop:
        raise ProtocolError("The hashes end before offset {offset}", offset=expected)


def compare(source: Iterable[str], target: Iterable[str], size: int, block_size: int) -> Iterator[Block]:
    """
    Compare the digests of two files.

    :param source: The digests of the blocks of the source, in order.
    :param target: The digests of the blocks of the target, in order. They may end earlier or later.
    :param size: The size of the source (in bytes).
    :returns: A generator of all blocks of the source.
    """
    for index, (left, right) in enumerate(zip(source, chain(target, repeat("")), strict=False)):
        offset = index * block_size
        yield Block(offset, block_length(offset, size, block_size), left != right, left)


def make_batches(
    blocks: Iterable[Block],
    max_extents: int = MAX_EXTENTS,
    keep_digests: bool = False,
    is_awaited: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """
    Make work of blocks: join neighbors to extents and put several extents together.

    A block isn't cut, so a batch is larger than :data:`BATCH_SIZE` when a single block is. It's smaller when somebody
    waits for it: a slow wire has something to do all the time, and a long one carries as much as it can at once.

    :param blocks: The blocks that were compared, in order.
    :param max_extents: How many extents one request can carry.
    :param keep_digests: Whether the batches carry the digests of their blocks.
    :param is_awaited: Whether nothing is left of the batches that were made before.
    """
    batch = _Accumulator(max_extents, keep_digests)
    for block in blocks:
        if block.changed and not batch.has_room(block):
            yield batch.close()
        batch.add(block)
        if batch.is_due(is_awaited):
            yield batch.close()
    if batch.blocks_compared:
        yield batch.close()


class _Accumulator:
    """A batch in the making."""

    def __init__(self, max_extents: int, keep_digests: bool):
        self.max_extents = max_extents
        self.keep_digests = keep_digests
        self.max_size = BATCH_SIZE if max_extents > 1 and not keep_digests else HELD_BATCH_SIZE
        self.window = FIRST_WINDOW
        self.clear()

    def clear(self) -> None:
        self.extents: list[Extent] = []
        self.digests: list[BlockDigest] = []
        self.changed: list[str] = []
        self.size = self.blocks_compared = self.bytes_compared = 0
        self.next_look = self.window

    def close(self) -> Batch:
        batch = Batch(
            tuple(self.extents),
            tuple(self.digests),
            self.blocks_compared,
            len(self.changed),
            self.bytes_compared,
            digest_blockwise(self.changed),
        )
        self.window = min(self.window + self.window // 4, COMPARE_WINDOW)
        self.clear()
        return batch

    def is_due(self, is_awaited: Callable[[], bool]) -> bool:
        if self.bytes_compared < self.next_look:
            return False
        self.next_look = min(self.bytes_compared + LOOK_WINDOW, COMPARE_WINDOW)
        return self.bytes_compared >= COMPARE_WINDOW or is_awaited()

    def continues(self, block: Block) -> bool:
        return bool(self.extents) and sum(self.extents[-1]) == block.offset

    def has_room(self, block: Block) -> bool:
        if not self.extents:
            return True
        if self.size + block.size > self.max_size or len(self.changed) == BATCH_BLOCKS:
            return False
        return len(self.extents) < self.max_extents or self.continues(block)

    def add(self, block: Block) -> None:
        self.blocks_compared += 1
        self.bytes_compared += block.size
        if not block.changed:
            return
        self.changed.append(block.digest)
        self.size += block.size
        if self.continues(block):
            self.extents[-1] = Extent(self.extents[-1].offset, self.extents[-1].size + block.size)
        else:
            self.extents.append(Extent(block.offset, block.size))
        if self.keep_digests:
            self.digests.append(BlockDigest(block.offset, block.digest))
