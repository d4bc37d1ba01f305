"""
Which pieces of the changed blocks have to move?

Changes of real files are often pages, not blocks of 1 MiB. So a worker compares the blocks of its batch once more, in
pieces of 16 KiB, on both sides at the same time, and moves only those that differ. The digests of these pieces verify
what was moved, as those of whole blocks do otherwise.

To look closely is worth it where little of a block differs, and where moving takes longer than hashing. A worker judges
that by what it has measured: it looks at a few blocks first, and where that doesn't pay it looks again less and less
often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pdiffcopy.blocks import Extent, count_blocks, cut, join, subtract, total_size
from pdiffcopy.client.delta import Batch
from pdiffcopy.client.plan import Plan
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.extents import split
from pdiffcopy.protocol import MAX_PIECES
from pdiffcopy.replica import Replica

PIECE_SIZE = 16 * 1024
"""How many bytes a piece has (more where a request couldn't carry the digests of all of them)."""
SAMPLE = 4
"""How many blocks are looked at first."""
MOST_SKIPPED = 8
"""How many batches move as they are, at most, before it is tried again."""
SMALLEST_MOVE = 1024 * 1024
"""How many bytes have to move in one go to tell how long a byte takes."""


class Judge:
    """Decides whether to look closely, by what one worker has measured."""

    def __init__(self) -> None:
        """Initialize a judge that has seen nothing."""
        self.moving = self.looking = math.nan
        """How long a byte takes, in seconds (not a number: that isn't known yet)."""
        self.share = 1.0
        """The part of what was looked at that differed."""
        self.skipped = self.skip = 0

    @property
    def is_worth_it(self) -> bool:
        """Whether to look at everything is likely to save time."""
        # To find out how long moving takes may take very long itself, so it's worth it as long as that isn't known.
        return self.share < 0.5 and not self.looking > (1 - self.share) * self.moving

    def choose(self, count: int) -> int:
        """Decide at how many blocks of a batch to look."""
        if self.is_worth_it:
            return count
        if self.skipped < self.skip:
            self.skipped += 1
            return 0
        self.skipped = 0
        return min(count, SAMPLE)

    def note_look(self, size: int, differing: int, seconds: float) -> None:
        """Take note of what a look at so many bytes has found."""
        self.share = differing / size
        self.looking = _average(self.looking, seconds / size)
        self.skip = 0 if self.is_worth_it else min(max(1, 2 * self.skip), MOST_SKIPPED)

    def note_move(self, size: int, seconds: float) -> None:
        """Take note of how long it took to move so many bytes."""
        if size >= SMALLEST_MOVE:
            self.moving = _average(self.moving, seconds / size)


def _average(before: float, now: float) -> float:
    return now if math.isnan(before) else (before + now) / 2


def look_closely(plan: Plan, batch: Batch, source: Replica, target: Replica, judge: Judge) -> list[Batch]:
    """
    Find out which pieces of a batch differ.

    :returns: What is to be moved in place of the batch (possibly itself).
    """
    unit = _choose_unit(plan, batch)
    extents = list(subtract(batch.extents, batch.whole))
    blocks = list(cut(extents, plan.block_size))
    # What wasn't compared seems to differ all over, and so it is without digests.
    count = judge.choose(len(blocks)) if unit and batch.digest else 0
    if not count:
        return [batch]
    if count < len(blocks):
        _look(plan, blocks[:: len(blocks) // count][:count], unit, source, target, judge)
        if not judge.is_worth_it:
            return [batch]
    pieces = _look(plan, extents, unit, source, target, judge)
    whole = [Batch(part) for part in split(batch.whole, plan.url_room)]
    # If none differs any more, somebody is writing to one side: the batch moves as it was found.
    return [*_make_batches(pieces, unit, plan.url_room), *whole] or [batch]


def _choose_unit(plan: Plan, batch: Batch) -> int:
    unit = plan.piece_size
    while unit and batch.size > unit * MAX_PIECES:
        unit *= 2
    return unit if unit and plan.block_size % unit == 0 else 0


def _look(
    plan: Plan, extents: Sequence[Extent], unit: int, source: Replica, target: Replica, judge: Judge
) -> list[tuple[Extent, str]]:
    """Compare some extents piece by piece: those that differ, and their digests in the source."""
    started = time.monotonic()
    pieces = compare_pieces(extents, unit, plan.method, source, target)
    differing = [(piece, left) for piece, left, right in pieces if left != right]
    size = total_size([piece for piece, _ in differing])
    judge.note_look(total_size(extents), size, time.monotonic() - started)
    return differing


def compare_pieces(
    extents: Sequence[Extent], unit: int, method: str, source: Replica, target: Replica
) -> Iterator[tuple[Extent, str, str]]:
    """Tell the pieces of some extents, with the digests that both sides have of each (at the same time)."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(target.pieces, extents, unit, method)
        ours = source.pieces(extents, unit, method)
        theirs = future.result()
    return zip(cut(extents, unit), ours, theirs, strict=True)


def _make_batches(pieces: Sequence[tuple[Extent, str]], unit: int, room: int) -> Iterator[Batch]:
    """Join neighbors, and put as many extents together as a request has room for."""
    extents: list[Extent] = []
    for extent, _ in pieces:
        join(extents, extent)
    digests = (digest for _, digest in pieces)
    for part in split(extents, room):
        count = sum(count_blocks(size, unit) for _, size in part)
        yield Batch(part, digest=digest_blockwise(islice(digests, count)), unit=unit)
