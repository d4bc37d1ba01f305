"""
How does a run move what differs?

The goal: read each byte as few times as possible, keep all cores, disks and the network busy at the same time, and
never report success for octets that aren't there.

::

    generator process                             worker processes                       client process
    -----------------                             ----------------                       --------------
    1. digests of the source, as they come \\\\
                                             3. batches --> 4. read the extents
    2. digests of the target, as they come /        of the source, write them to
                                                       the target, compare digests --> 5. results: count, report

All of it happens at the same time. The queues between the steps are bounded, so whatever is slowest slows the others
down, and memory doesn't grow with the file. A changed block is still in the page cache when step 4 reads it again.

What may not be assumed: batches finish in any order, and after a failure any part of the target may be old or new.
What may: a batch is written completely or its failure ends the run, and doing it twice does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import xxhash

from pdiffcopy.address import Address
from pdiffcopy.delta import Batch, Block, block_length, compare, halve, make_batches
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.exceptions import (
    DigestMismatchError,
    SourceChangedError,
    TransientError,
    VerificationError,
    printable,
)
from pdiffcopy.hashing import get_hasher
from pdiffcopy.localfile import counted
from pdiffcopy.locations import Network, Reading, Replica, open_replica
from pdiffcopy.progress import Reporter
from pdiffcopy.protocol import MAX_EXTENTS, Extent
from pdiffcopy.retry import Patience

SMALLEST_BATCH = 1024 * 1024
"""How many bytes are transferred as a whole, however often that fails."""
ASK_AFTER = 2
"""After how many failures in a row the source is asked whether it can read what it sends."""
VERIFY_ATTEMPTS = 3
"""How often that is done before a difference is believed to be there to stay."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run does (child processes get a copy)."""

    source: Address
    target: Address
    network: Network
    size: int
    """The size of the source in bytes."""
    target_size: int
    """How much of the target there is to compare, in bytes."""
    block_size: int
    method: str
    concurrency: int
    delta: bool
    """Whether the target is compared (otherwise all of the source is copied)."""
    verify: bool
    by_hashes: bool
    """Whether to verify by the block hashes of the source, because it can't state digests."""
    blockwise: bool = False
    """Whether to verify by the digests that were compared, since they are what the source would state."""
    max_extents: int = MAX_EXTENTS
    run: str = ""
    """The name under which the target is claimed (empty when it can't be)."""
    source_id: str = ""
    """Which file the source has to be (see :class:`.FileInfo`, empty when its server can't tell)."""
    target_id: str = ""
    """Which file the target has to be."""

    @property
    def states_digests(self) -> bool:
        """Whether the source reads what it sends for a digest."""
        return self.verify and not (self.by_hashes or self.blockwise)

    @property
    def activity(self) -> str:
        """What a user sees it do."""
        return "Comparing" if self.delta else "Copying"


@dataclass(frozen=True)
class Result:
    """What became of a batch."""

    blocks_compared: int = 0
    blocks_changed: int = 0
    bytes_compared: int = 0
    bytes_moved: int = 0
    bytes_verified: int = 0
    retries: int = 0

    @classmethod
    def of_comparison(cls, batch: Batch) -> Result:
        """The result of not transferring a batch."""
        return cls(batch.blocks_compared, batch.blocks_changed, batch.bytes_compared)

    def __add__(self, other: Result) -> Result:
        mine, theirs = vars(self), vars(other)
        return Result(**{name: mine[name] + theirs[name] for name in mine})


def find_blocks(plan: Plan) -> Iterator[Block]:
    """Compare source and target: a generator of all blocks of the source."""
    if not plan.delta and not plan.by_hashes:
        for offset in range(0, plan.size, plan.block_size):
            yield Block(offset, block_length(offset, plan.size, plan.block_size), True, "")
        return
    source = _digests(plan, open_source(plan), plan.size)
    target = _digests(plan, open_target(plan), plan.target_size if plan.delta else 0)
    with closing(source), closing(target):
        # The threads that hash a local target begin now, and not when the server of the source has answered.
        first = list(islice(target, 0 if plan.target.hostname else 1))
        yield from compare(source, chain(first, target), plan.size, plan.block_size)


def open_source(plan: Plan) -> Replica:
    """The source, as the file that it was at the first look."""
    return open_replica(plan.source, plan.network).pinned(plan.source_id, is_source=True)


def open_target(plan: Plan) -> Replica:
    """The target, as the file that was claimed."""
    return open_replica(plan.target, plan.network).pinned(plan.target_id)


def _digests(plan: Plan, replica: Replica, size: int, start: int = 0) -> Generator[str, None, None]:
    if size:  # there may be no file yet
        yield from replica.hashes(size, plan.block_size, plan.method, plan.concurrency, start)


def generate_batches(plan: Plan, is_awaited: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
    """What the generator process does: find out what there is to transfer (see :func:`.make_batches`)."""
    return make_batches(find_blocks(plan), plan.max_extents, plan.by_hashes, is_awaited)


class Tally:
    """
    Tells a reporter of the bytes of a batch as they pass.

    While some of them move, the same part of what was compared counts as done. What has to be repeated is done when it
    passes for the first time.
    """

    def __init__(self, batch: Batch, reporter: Reporter):
        """
        Begin to count.

        :param batch: What is going to be moved, and what was compared to find it.
        :param reporter: Who is told.
        """
        self.batch = batch
        self.reporter = reporter
        self.passed = self.compared = 0

    def count(self, size: int) -> None:
        """Some bytes have passed."""
        self.passed = min(self.passed + size, self.batch.size)
        self._tell(self.batch.bytes_compared * self.passed // self.batch.size, size)

    def finish(self) -> None:
        """All is done, whether it had to be moved or not."""
        self._tell(self.batch.bytes_compared, 0)

    def _tell(self, compared: int, moved: int) -> None:
        self.reporter.advance(compared - self.compared, moved)
        self.compared = compared


def transfer_batch(plan: Plan, batch: Batch, reporter: Reporter | None = None) -> Result:
    """
    What a worker process does: bring the extents of a batch into line.

    :param reporter: Who is told of the bytes as they pass (by default nobody).
    :raises: :exc:`.VerificationError` when the target keeps differing from what the source sends.
    """
    patience = Patience(plan.network.retries)
    tally = Tally(batch, reporter or Reporter())
    mismatches = _transfer_until_equal(plan, batch, patience, tally) if batch.extents else 0
    tally.finish()
    return replace(
        Result.of_comparison(batch),
        bytes_moved=batch.size,
        bytes_verified=batch.size if plan.verify else 0,
        retries=patience.total + mismatches,
    )


def _transfer_until_equal(plan: Plan, batch: Batch, patience: Patience, tally: Tally) -> int:
    """
    Transfer a batch, and tell how many times a difference was found afterwards.

    What fails is repeated in halves, each with attempts of its own, so that something gets done where no connection
    lasts for long, and where one byte in many arrives wrong.
    """
    mismatches = 0
    while True:
        stated = ""
        try:
            with open_source(plan).read(batch.extents, plan.states_digests) as reading:
                stated = reading.digest
                _transfer(plan, batch, replace(reading, chunks=counted(reading.chunks, tally.count)))
            patience.succeeded()
            return mismatches
        except TransientError as e:
            patience.failed(e)
            if patience.failures == ASK_AFTER and plan.source_id and not plan.states_digests:
                # A server that can't read its disk can only end the connection when it has begun to answer.
                with suppress(TransientError):
                    open_source(plan).digest(batch.extents)
        except DigestMismatchError as e:
            mismatches += 1
            if not plan.by_hashes or mismatches == VERIFY_ATTEMPTS:  # an old server would hash all of the file
                patience.persist(partial(_check_source, plan, batch, stated))
            if mismatches == VERIFY_ATTEMPTS:
                text = "{target}: the data at offset {offset} couldn't be verified, it arrived wrong {attempts} times"
                offset = batch.extents[0].offset
                raise VerificationError(text, target=str(plan.target), offset=offset, attempts=mismatches) from e
            logger.warning("%s (trying again)", e)
        # The digests that were compared don't tell of halves: from now on the source reads what it sends.
        plan = replace(plan, blockwise=False)
        if batch.size > SMALLEST_BATCH and not plan.by_hashes:
            halves = [Batch(extents) for extents in halve(batch.extents)]
            return mismatches + sum(_transfer_until_equal(plan, half, patience, tally) for half in halves)


def _transfer(plan: Plan, batch: Batch, reading: Reading) -> None:
    logger.debug("Transferring %i bytes in %i extents ..", batch.size, len(batch.extents))
    if plan.by_hashes:
        reading = _check_hashes(plan, batch, reading)
    elif plan.blockwise:
        reading = replace(reading, digest=batch.digest, block_size=plan.block_size)
    open_target(plan).write(batch.extents, reading, plan.run)


def _check_source(plan: Plan, batch: Batch, stated: str) -> None:
    """
    Let the source state once more what it stated of a batch that didn't arrive like that.

    :param stated: The digest that it stated with the data (empty when the digests of the blocks were compared).
    :raises: :exc:`.SourceChangedError` when it states something else now.
    """
    if stated:
        is_same = open_source(plan).digest(batch.extents) == stated
    else:
        is_same = batch.digest == digest_blockwise(_digest_again(plan, batch.extents))
    if not is_same:
        raise SourceChangedError.of(printable(str(plan.source)), "contents")


def _digest_again(plan: Plan, extents: Sequence[Extent]) -> Iterator[str]:
    """The digests of the blocks of some extents of the source."""
    start, stop = extents[0].offset, sum(extents[-1])
    remaining = list(reversed(extents))
    with closing(_digests(plan, open_source(plan), stop, start)) as digests:
        for offset, digest in zip(range(start, stop, plan.block_size), digests, strict=False):
            if offset >= sum(remaining[-1]):
                remaining.pop()
            if offset >= remaining[-1].offset:
                yield digest


def _check_hashes(plan: Plan, batch: Batch, reading: Reading) -> Reading:
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
    return Reading([data], xxhash.xxh3_128_hexdigest(data))
