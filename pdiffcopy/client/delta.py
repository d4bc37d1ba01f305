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
from enum import Enum
from typing import Any, NamedTuple

from pdiffcopy.blocks import HOLES, ZEROS, Block, BlockDigest, Extent, Hole, find_layout, join, total_size
from pdiffcopy.digests import digest_blockwise, digest_layout
from pdiffcopy.exceptions import ProtocolError
from pdiffcopy.extents import MAX_EXTENTS

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

MAX_PARTS = 2**16
"""Into how many parts a file is cut at most that becomes zeros, of which workers write some each."""
MAX_FILLS = 512
"""How many extents of a batch become holes or zeros at most: far apart, they take ten characters each."""

BATCH_BLOCKS = 65536
"""How many changed blocks make up a batch at most: their digests may have to travel with it."""

REORDER_WINDOW = 65536
"""How many blocks a peer may be ahead of the first block that it still owes us."""
_ZEROS = bytes(65536)


class Batch(NamedTuple):
    """What one worker transfers in one go, and what was compared to find it."""

    extents: tuple[Extent, ...] = ()
    digests: tuple[BlockDigest, ...] = ()
    """The digests of the changed blocks in the source."""
    blocks_compared: int = 0
    blocks_changed: int = 0
    bytes_compared: int = 0
    digest: str = ""
    """The digest of the digests of the changed blocks (see :func:`.digest_blockwise`, empty if some aren't known)."""
    unit: int = 0
    """The size of the pieces of which that is, in bytes (0: it is of whole blocks)."""
    whole: tuple[Extent, ...] = ()
    """Those of the extents that move as a whole, see :attr:`.Block.is_whole`."""
    holes: tuple[Extent, ...] = ()
    """What is to become holes..."""
    zeros: tuple[Extent, ...] = ()
    """... and what zeros that take room."""

    @property
    def size(self) -> int:
        """How many bytes are to be moved."""
        return total_size(self.extents)


Item = BlockDigest | Hole
"""What is known of a block, or of several."""


def get_end(item: Item, block_size: int) -> int:
    """Where the next item begins, unless this one is the last."""
    return sum(item) if isinstance(item, Hole) else item.offset + block_size


def in_order(digests: Iterable[Item], start: int, stop: int, block_size: int) -> Iterator[Item]:
    """
    Put a stream of digests in order, and distrust it.

    :param digests: The blocks from `start` on, in any order.
    :param start: The offset of the first block (in bytes).
    :param stop: Where the last block ends.
    :returns: A generator of the same, from the first block to the last one.
    :raises: :exc:`.ProtocolError` when a block is missing, comes twice, lies elsewhere or far ahead, or when the
             digests differ in length.
    """
    expected, length = start, 0
    early: dict[int, Item] = {}
    for item in digests:
        offset = item.offset
        is_possible = not offset % block_size and expected <= offset < stop and offset not in early
        if isinstance(item, Hole):  # only those tell holes that keep to the order
            is_possible &= offset == expected and (
                sum(item) == stop or (sum(item) < stop and not item.size % block_size)
            )
        else:
            digest, _, _ = item.digest.partition(".")
            length = length or len(digest)
            is_possible &= len(digest) == length
        if not is_possible:
            raise ProtocolError("The hashes contain an impossible line for offset {offset}", offset=offset)
        if (offset - expected) // block_size > REORDER_WINDOW:
            raise ProtocolError("The hashes jump ahead to offset {offset}", offset=offset)
        early[offset] = item
        while expected in early:
            item = early.pop(expected)
            yield item
            expected = get_end(item, block_size)
        if expected >= stop:
            return
    if expected < stop:
        raise ProtocolError("The hashes end before offset {offset}", offset=expected)


class Sparse(Enum):
    """What becomes of the holes of the source, and of its zeros."""

    IGNORED = ""
    """Nobody looks for holes."""
    AUTO = "auto"
    """The target has holes where the source has them, and nowhere else."""
    ALWAYS = "always"
    """Zeros become holes."""
    NEVER = "never"
    """No holes are made."""
    HIDDEN = "hidden"
    """Nobody can tell where the target has holes: zeros are all that there can be."""


class Comparison:
    """Decides what becomes of the blocks of two files."""

    def __init__(self, size: int, block_size: int, sparse: Sparse, new_hasher: Callable[[], Any], grain: int = 1):
        """
        Initialize a comparison.

        :param size: The size of the source (in bytes).
        :param sparse: What becomes of holes.
        :param new_hasher: Makes hash objects like those that the digests stem from.
        :param grain: The size of the smallest hole that matters (in bytes).
        """
        self.size, self.block_size, self.sparse, self.new_hasher = size, block_size, sparse, new_hasher
        self.grain = grain
        self._zeros: dict[int, str] = {}
        # A hole of any size takes no time. Workers share zeros, which do; but to tell of many parts takes time as well.
        part = max(BATCH_SIZE, size // MAX_PARTS, block_size)
        self.most = part // block_size * block_size if sparse is Sparse.NEVER else size

    def compare(self, source: Iterable[Item], target: Iterable[Item], start: int = 0) -> Iterator[Block]:
        """
        Compare the digests of two files.

        :param source: What is known of the source, in order.
        :param target: The same of the target. It may end earlier or later.
        :param start: The offset of the first block (in bytes).
        :returns: A generator of all blocks of the source, some of them in runs.
        """
        position, theirs, their_end = start, iter(target), start
        right: Item | None = None
        for left in source:
            end = self._get_end(left)
            while position < end:
                if position >= their_end:
                    right = next(theirs, None)
                    their_end = self._get_end(right) if right else self.size
                step = min(end, their_end, position + self.most) - position
                yield self._judge(left, right, position, step)
                position += step

    def _get_end(self, item: Item) -> int:
        """Where the blocks of the source end that an item stands for: those of the target may be shorter."""
        return min(-(-get_end(item, self.block_size) // self.block_size) * self.block_size, self.size)

    def _judge(self, left: Item, right: Item | None, offset: int, size: int) -> Block:
        is_hole = isinstance(left, Hole)
        digest, layout = ("", "") if isinstance(left, Hole) else _split(left)
        if self.sparse is Sparse.IGNORED:
            return Block(offset, size, left != right, digest)
        is_auto, fill = self.sparse is Sparse.AUTO, ""
        if is_hole or (digest == self._get_zeros(size) and not (is_auto and layout)):
            makes_hole = is_hole if is_auto else self.sparse is not Sparse.NEVER
            fill = HOLES if makes_hole else ZEROS
        is_whole = False
        if right is None:
            changed = True
        elif isinstance(right, Hole):
            changed, is_whole = fill != HOLES, not fill
        else:
            their_digest, their_layout = _split(right)
            is_alike = their_digest == (self._get_zeros(size) if fill else digest)
            if self.sparse in (Sparse.NEVER, Sparse.HIDDEN):
                layout = ""
            elif fill == HOLES:
                layout = self._get_hole_layout(Extent(offset, size))
            changed = not (is_alike and (layout == their_layout or not (is_auto or fill == HOLES)))
            is_whole = not fill and their_layout != layout
        return Block(offset, size, changed, digest, fill, -(-size // self.block_size), changed and is_whole)

    def _get_hole_layout(self, block: Extent) -> str:
        """The digest of the layout of a block that is a hole, as far as its first and last bytes allow."""
        return digest_layout(find_layout(block, [block], self.block_size, self.grain))

    def _get_zeros(self, size: int) -> str:
        """The digest of a block of zeros."""
        size = min(size, self.block_size)
        if size not in self._zeros:
            hasher = self.new_hasher()
            for start in range(0, size, len(_ZEROS)):
                hasher.update(_ZEROS[: size - start])
            self._zeros[size] = hasher.hexdigest()
        return self._zeros[size]


def _split(item: BlockDigest) -> tuple[str, str]:
    """A digest, and the digest of the layout that may follow it."""
    digest, _, layout = item.digest.partition(".")
    return digest, layout


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
        self.whole: list[Extent] = []
        self.fills: dict[str, list[Extent]] = {HOLES: [], ZEROS: []}
        self.digests: list[BlockDigest] = []
        self.changed: list[str] = []
        self.size = self.blocks_compared = self.blocks_changed = self.bytes_compared = self.bytes_read = 0
        self.next_look = self.window

    def close(self) -> Batch:
        batch = Batch(
            tuple(self.extents),
            tuple(self.digests),
            self.blocks_compared,
            self.blocks_changed,
            self.bytes_compared,
            digest_blockwise(self.changed) if all(self.changed) else "",
            whole=tuple(self.whole),
            holes=tuple(self.fills[HOLES]),
            zeros=tuple(self.fills[ZEROS]),
        )
        self.window = min(self.window + self.window // 4, COMPARE_WINDOW)
        self.clear()
        return batch

    def is_due(self, is_awaited: Callable[[], bool]) -> bool:
        if self.bytes_read < self.next_look:
            return False
        self.next_look = min(self.bytes_read + LOOK_WINDOW, COMPARE_WINDOW)
        return self.bytes_read >= COMPARE_WINDOW or is_awaited()

    def has_room(self, block: Block) -> bool:
        room = self.fills[block.fill] if block.fill else self.extents
        if not room:
            return True
        if self.size + block.size > self.max_size or len(self.changed) == BATCH_BLOCKS:
            return block.fill == HOLES and len(room) < MAX_FILLS
        most = MAX_FILLS if block.fill else self.max_extents
        return len(room) < most or sum(room[-1]) == block.offset

    def add(self, block: Block) -> None:
        self.blocks_compared += block.blocks
        self.bytes_compared += block.size
        if block.blocks == 1:  # a run lies in a hole, and takes no time
            self.bytes_read += block.size
        if not block.changed:
            return
        self.blocks_changed += block.blocks
        extent = Extent(block.offset, block.size)
        join(self.fills[block.fill] if block.fill else self.extents, extent)
        if block.fill != HOLES:  # to make one takes no time, however large it is
            self.size += block.size
        if block.fill:
            return
        if block.is_whole:
            join(self.whole, extent)
        self.changed.append(block.digest)
        if self.keep_digests:
            self.digests.append(BlockDigest(block.offset, block.digest))
