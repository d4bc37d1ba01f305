r"""
How does a run move what differs?

The goal: read each byte as few times as possible, keep all cores, disks and the network busy at the same time, and
never report success for bytes that aren't there.

::

    generator process                             worker processes                       client process
    -----------------                             ----------------                       --------------
    1. digests of the source, as they come \
                                             3. batches --> 4. read the extents
    2. digests of the target, as they come /        of the source, write them to
                                                       the target, compare digests --> 5. results: count, report

All of it happens at the same time. The queues between the steps are bounded, so whatever is slowest slows the others
down, and memory doesn't grow with the file. A changed block is still in the page cache when step 4 reads it again.
(Where there can't be more than one batch, the client process takes these steps alone, one after the other.)

What may not be assumed: batches finish in any order, and after a failure any part of the target may be old or new.
What may: a batch is written completely or its failure ends the run, and doing it twice does no harm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import chain, islice

from pdiffcopy.blocks import (
    Block,
    BlockDigest,
    Extent,
    Hole,
    block_length,
    count_blocks,
    cut,
    halve,
    intersect,
    subtract,
    total_size,
)
from pdiffcopy.client.delta import BATCH_SIZE, Batch, Comparison, Item, Sparse, make_batches
from pdiffcopy.client.pieces import Judge, look_closely
from pdiffcopy.client.plan import Plan, Result, Verification
from pdiffcopy.client.progress import Reporter, Tally
from pdiffcopy.client.retry import Patience
from pdiffcopy.client.samples import Sampler
from pdiffcopy.client.servers import Replicas
from pdiffcopy.digests import compute_digest, digest_blockwise
from pdiffcopy.exceptions import DigestMismatchError, SourceChangedError, TransientError, VerificationError
from pdiffcopy.extents import fit, split
from pdiffcopy.files.stored import counted
from pdiffcopy.methods import get_hasher
from pdiffcopy.replica import Reading, Replica

SMALLEST_BATCH = 1024 * 1024
"""How many bytes are transferred as a whole, however often that fails."""
ASK_AFTER = 2
"""After how many failures in a row the source is asked whether it can read what it sends."""
VERIFY_ATTEMPTS = 3
"""How often that is done before a difference is believed to be there to stay."""

logger = logging.getLogger(__name__)

Finder = Callable[[Plan, Replicas, Callable[[], bool]], Iterable[Batch]]
"""Finds out what there is to transfer, like :func:`generate_batches`. It has to be picklable."""


def open_source(plan: Plan, replicas: Replicas) -> Replica:
    """Get the source, as the file that it was at the first look."""
    return replicas.open(plan.source).pinned(plan.source_id, is_source=True)


def open_target(plan: Plan, replicas: Replicas) -> Replica:
    """Get the target, as the file that was claimed."""
    return replicas.open(plan.target).pinned(plan.target_id)


def open_baseline(plan: Plan, replicas: Replicas) -> Replica:
    """Get what the source is compared with: the target, or what has the same contents."""
    if not plan.baseline:
        return open_target(plan, replicas)
    return replicas.open(plan.baseline).pinned(plan.baseline_id)


# Comparing {{{1


def find_blocks(plan: Plan, replicas: Replicas) -> Iterator[Block]:
    """Find out which blocks differ: a generator of all blocks of the source, some of them in runs."""
    source, target = open_source(plan, replicas), open_baseline(plan, replicas)
    sampler, position = Sampler(plan, source, target), 0
    while position < plan.size:
        with closing(_compare(plan, source, target, position)) as compared:
            for block in compared:
                yield block
                position += block.size
                if sampler.can_skip(block):
                    break
        for block in sampler.skip(position):
            yield block
            position += block.size


def _compare(plan: Plan, source: Replica, target: Replica, start: int) -> Generator[Block, None, None]:
    """Compare source and target from one block on."""
    comparison = Comparison(plan.size, plan.block_size, plan.sparse, get_hasher(plan.method), plan.grain or 1)
    ours = _digests(plan, source, start, plan.size) if plan.needs_hashes else _find_runs(plan, source)
    theirs = _describe_target(plan, target, start)
    with closing(ours), closing(theirs):
        # The threads that hash a target nearby begin now, and not when the server of the source has answered.
        first = list(islice(theirs, int(target.is_near)))
        yield from comparison.compare(ours, chain(first, theirs), start)
        next(theirs, None)  # lets it come to its end


def _digests(plan: Plan, replica: Replica, start: int, stop: int) -> Generator[Item, None, None]:
    if start < stop:  # there may be no file yet
        for stripe in replica.hashes(plan.block_size, plan.method, plan.concurrency, start, stop, plan.grain):
            yield from stripe


def _find_runs(plan: Plan, source: Replica) -> Generator[Item, None, None]:
    """Tell holes of a source that isn't hashed, and its other blocks without a digest."""
    holes = source.holes(0, plan.size, plan.block_size) if plan.has_holes else iter(())
    position = 0
    for hole in chain(holes, [Extent(plan.size, 0)]):
        for offset in range(position, hole.offset, plan.block_size):
            yield BlockDigest(offset, "")
        if hole.size:
            yield Hole(*hole)
        position = sum(hole)


def _describe_target(plan: Plan, replica: Replica, start: int) -> Generator[Item, None, None]:
    """Tell what is known of the target. A new one is one hole, and so is what one that is too short grows by."""
    position = 0
    if plan.delta:
        yield from _digests(plan, replica, start, plan.target_size)
        position = count_blocks(plan.target_size, plan.block_size) * plan.block_size
    if (plan.delta or plan.is_new) and plan.sparse is not Sparse.IGNORED and position < plan.size:
        yield Hole(position, plan.size - position)


def generate_batches(plan: Plan, replicas: Replicas, is_awaited: Callable[[], bool]) -> Iterator[Batch]:
    """
    Find out what there is to transfer (this is what the generator process does).

    :param is_awaited: Whether workers have nothing to do, see :func:`.make_batches`.
    """
    keep_digests = plan.verification is Verification.BY_HASHES
    return make_batches(find_blocks(plan, replicas), plan.max_extents, keep_digests, is_awaited)


# Moving {{{1


def transfer_batch(
    plan: Plan, batch: Batch, replicas: Replicas, retries: int, reporter: Reporter, judge: Judge
) -> Result:
    """
    Bring the extents of a batch into line (this is what a worker process does).

    :param retries: How often something may fail in a row.
    :param reporter: Is told of the bytes as they pass.
    :param judge: Decides whether to compare the blocks in pieces first.
    :raises: :exc:`.VerificationError` when the target keeps differing from what the source sends.
    """
    source, target, patience = open_source(plan, replicas), open_target(plan, replicas), Patience(retries)
    zeroed = _fill(plan, batch.holes, batch.zeros, target)
    parts = look_closely(plan, batch, source, target, judge) if batch.extents else []
    differing = sum(part.size for part in parts)
    if plan.has_holes and plan.sparse is not Sparse.NEVER:
        parts = [kept for part in parts for kept in _keep_holes(plan, part, source, target)]
    size = sum(part.size for part in parts)
    tally = Tally(size, batch.bytes_compared, reporter)
    started = time.monotonic()
    mismatches = sum(_Transfer(plan, part, source, target, patience, tally).run() for part in parts)
    judge.note_move(size, time.monotonic() - started)
    tally.finish()
    return Result.of_comparison(batch)._replace(
        bytes_moved=size,
        bytes_verified=size if plan.verification is not Verification.NONE else 0,
        bytes_zeroed=zeroed + differing - size,
        retries=patience.total + mismatches,
    )


def _fill(plan: Plan, holes: Sequence[Extent], zeros: Sequence[Extent], target: Replica) -> int:
    """Make holes and zeros, and tell how many bytes they have."""
    is_done = not holes or target.clear(_extend(plan, holes), plan.run)
    # Where the file system has no holes, they become zeros.
    for part in cut(zeros if is_done else (*zeros, *holes), BATCH_SIZE):
        target.clear([part], plan.run, keep=True)
    return total_size((*holes, *zeros))


def _extend(plan: Plan, holes: Sequence[Extent]) -> Sequence[Extent]:
    """Let a hole at the end of the source take a whole block: what lies behind that end is going to be cut off."""
    *others, last = holes
    if not plan.surplus or sum(last) < plan.size:
        return holes
    return [*others, Extent(last.offset, last.size + min(-plan.size % plan.grain, plan.surplus))]


def _keep_holes(plan: Plan, batch: Batch, source: Replica, target: Replica) -> Iterator[Batch]:
    """Leave out of a batch what lies in holes of the source that are smaller than a block, and make those holes."""
    start, stop = batch.extents[0].offset, sum(batch.extents[-1])
    holes = [part for hole in source.holes(start, stop, plan.grain) for part in intersect(hole, batch.extents)]
    if not holes:
        yield batch
        return
    _fill(plan, holes, (), target)
    yield from map(Batch, split(list(subtract(batch.extents, holes)), plan.url_room))


class _Transfer:
    """
    A batch on its way.

    What fails is repeated in halves, each with attempts of its own, so that something gets done where no connection
    lasts for long, and where one byte in many arrives wrong.
    """

    def __init__(self, plan: Plan, batch: Batch, source: Replica, target: Replica, patience: Patience, tally: Tally):
        self.plan, self.batch, self.patience, self.tally = plan, batch, patience, tally
        self.source, self.target = source, target
        # Where holes were left out, the digests that were compared don't tell of the rest.
        is_known = batch.digest or plan.verification is not Verification.BLOCKWISE
        self.verification = plan.verification if is_known else Verification.STATED
        self.mismatches = 0

    def run(self) -> int:
        """Transfer the batch, and tell how many times a difference was found afterwards."""
        is_divisible, most = self.verification is not Verification.BY_HASHES, self.plan.largest_move
        is_too_much = self.batch.size > most or not fit(self.batch.extents, self.plan.url_room)
        while (is_divisible and is_too_much) or not self._attempt():
            # The digests that were compared don't tell of halves: from now on the source reads what it sends.
            if self.verification is Verification.BLOCKWISE:
                self.verification = Verification.STATED
            if is_divisible and (is_too_much or self.batch.size > SMALLEST_BATCH):
                return self.mismatches + sum(half.run() for half in self._halve())
        return self.mismatches

    def _halve(self) -> Iterator[_Transfer]:
        for extents in halve(self.batch.extents):
            half = _Transfer(self.plan, Batch(extents), self.source, self.target, self.patience, self.tally)
            half.verification = self.verification
            yield half

    def _attempt(self) -> bool:
        """Move the bytes once, and tell whether they have arrived."""
        stated = ""
        try:
            states_digest = self.verification is Verification.STATED
            with self.source.read(self.batch.extents, states_digest) as reading:
                stated = reading.digest
                self._write(reading._replace(chunks=counted(reading.chunks, self.tally.count)))
            self.patience.succeeded()
            return True
        except TransientError as e:
            self.patience.failed(e)
            if self.patience.failures == ASK_AFTER and self.plan.source_id and not states_digest:
                # A server that can't read its disk can only end the connection when it has begun to answer.
                with suppress(TransientError):
                    self.source.digest(self.batch.extents)
        except DigestMismatchError as e:
            self._count_mismatch(e, stated)
        return False

    def _write(self, reading: Reading) -> None:
        logger.debug("Transferring %i bytes in %i extents ..", self.batch.size, len(self.batch.extents))
        if self.verification is Verification.BY_HASHES:
            reading = check_hashes(self.plan, self.batch, reading)
        elif self.verification is Verification.BLOCKWISE:
            reading = reading._replace(
                digest=self.batch.digest,
                block_size=self.batch.unit or self.plan.block_size,
                method=self.plan.method,
            )
        self.target.write(self.batch.extents, reading, self.plan.run)

    def _count_mismatch(self, error: DigestMismatchError, stated: str) -> None:
        """
        Find out whose fault it is that the bytes arrived wrong, and give up after a few times.

        :param stated: The digest that the source stated with them (empty when the digests of the blocks were compared).
        """
        self.mismatches += 1
        is_last = self.mismatches == VERIFY_ATTEMPTS
        if self.verification is not Verification.BY_HASHES or is_last:  # an old server would hash all of the file
            self._check_source(stated)
        if is_last:
            text = "{target}: the data at offset {offset} couldn't be verified, it arrived wrong {attempts} times"
            offset = self.batch.extents[0].offset
            raise VerificationError(text, target=self.target.label, offset=offset, attempts=self.mismatches) from error
        logger.warning("%s (trying again)", error)

    def _check_source(self, stated: str) -> None:
        """
        Let the source state once more what it stated of a batch that didn't arrive like that.

        :raises: :exc:`.SourceChangedError` when it states something else now.
        """
        if stated:
            is_same = self.patience.persist(partial(self.source.digest, self.batch.extents)) == stated
        else:
            is_same = self.batch.digest == digest_blockwise(self._digest_again())
        if not is_same:
            raise SourceChangedError.of(self.source.label, "contents")

    def _digest_again(self) -> Iterator[str]:
        """Yield the digests of the blocks (or pieces) of the batch, as the source has them now."""
        if self.batch.unit:
            yield from self.source.pieces(self.batch.extents, self.batch.unit, self.plan.method)
            return
        start, stop = self.batch.extents[0].offset, sum(self.batch.extents[-1])
        remaining = list(reversed(self.batch.extents))
        plan = self.plan._replace(grain=0)
        with closing(_digests(plan, self.source, start, stop)) as items:
            for offset, digest in (item for item in items if isinstance(item, BlockDigest)):
                if offset >= sum(remaining[-1]):
                    remaining.pop()
                if offset >= remaining[-1].offset:
                    yield digest


def check_hashes(plan: Plan, batch: Batch, reading: Reading) -> Reading:
    """Compare what an old server sent with its block hashes, and state a digest in its place."""
    data = memoryview(b"".join(bytes(chunk) for chunk in reading.chunks))
    position = 0
    for offset, digest in batch.digests:
        block = data[position : position + block_length(offset, plan.size, plan.block_size)]
        hasher = get_hasher(plan.method)()
        hasher.update(block)
        if hasher.hexdigest() != digest:
            text = "{source}: the block at offset {offset} isn't what its digest says"
            raise DigestMismatchError(text, source=str(plan.source), offset=offset)
        position += len(block)
    return Reading([data], compute_digest(data))
