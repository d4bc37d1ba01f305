"""
Does everything differ?

Where two files have nothing in common, comparing them takes longer than it saves. So where much in a row has differed,
samples are compared of what comes next: a piece of each MiB, on both sides at the same time. As long as all of these
differ, all that lies between them is moved without being compared. The first one that is equal ends that, and so does
the first one of zeros, which needn't travel.
"""

from __future__ import annotations

from collections.abc import Iterator

from pdiffcopy.blocks import Block, Extent, count_blocks
from pdiffcopy.client.delta import BATCH_SIZE
from pdiffcopy.client.pieces import compare_pieces
from pdiffcopy.client.plan import Plan
from pdiffcopy.methods import get_hasher
from pdiffcopy.replica import Replica

ENOUGH = BATCH_SIZE
"""How much has to differ in a row before samples are taken, in bytes. It's twice as much whenever that was in vain."""
MOST_BATCHES = 4
"""For how many batches samples are taken at a time, at most."""
SPACING = 1024 * 1024
"""Of how many bytes there is one sample."""
_STRIDE = 37
"""By how many pieces a sample lies further on in its MiB than the one before, so that what is regular isn't missed."""


class Sampler:
    """Finds out what needn't be compared."""

    def __init__(self, plan: Plan, source: Replica, target: Replica):
        """Initialize a sampler that has seen nothing."""
        self.plan, self.source, self.target = plan, source, target
        self.batch_size = count_blocks(BATCH_SIZE, plan.block_size) * plan.block_size
        # What the target doesn't have has to be moved anyway.
        self.last = min(plan.size, plan.target_size) - self.batch_size if plan.may_sample else -1
        self.differing, self.enough = 0, ENOUGH
        # Up to where everything seems to differ, and up to where samples were taken to find that out.
        self.end = self.stop = 0

    def can_skip(self, block: Block) -> bool:
        """Take note of a block that was compared, and tell whether a batch behind it, or more, seems to differ."""
        self.differing = self.differing + block.size if block.changed and not block.fill else 0
        start = block.offset + block.size
        if self.differing < self.enough or start > self.last:
            return False
        self.differing = 0
        self._look(start)
        is_worth_it = self.end - start >= self.batch_size
        self.enough = ENOUGH if is_worth_it else 2 * self.enough
        return is_worth_it

    def skip(self, start: int) -> Iterator[Block]:
        """Yield the blocks from an offset on, uncompared, as long as all of them seem to differ."""
        size = self.plan.block_size
        while start < self.end:
            yield from (Block(offset, size, True, "") for offset in range(start, self.end, size))
            start = self.end
            if self.stop == start <= self.last:
                self._look(start)

    def _look(self, start: int) -> None:
        """Take samples from an offset on, and find the first block of which one is equal or consists of zeros."""
        self.stop = start + min((self.last - start) // self.batch_size + 1, MOST_BATCHES) * self.batch_size
        unit, starts = self.plan.piece_size, range(start, self.stop - SPACING + 1, SPACING)
        samples = [Extent(at + at // SPACING * _STRIDE * unit % SPACING, unit) for at in starts]
        pieces = compare_pieces(samples, unit, self.plan.method, self.source, self.target)
        zeros = get_hasher(self.plan.method)(bytes(unit)).hexdigest()
        found = (at for at, (_, left, right) in zip(starts, pieces, strict=True) if left in (right, zeros))
        self.end = next(found, self.stop) // self.plan.block_size * self.plan.block_size
