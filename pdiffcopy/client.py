"""Parallel, differential file copy client: which steps does a run take?"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import algorithms_guaranteed
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from property_manager import PropertyManager, mutable_property, set_property

from pdiffcopy import BLOCK_SIZE, DEFAULT_CONCURRENCY
from pdiffcopy.delta import Batch, Block, block_length, make_batches
from pdiffcopy.exceptions import (
    FileError,
    FileMissingError,
    ForbiddenError,
    ProgramError,
    SourceChangedError,
    UsageError,
)
from pdiffcopy.hashing import get_hasher
from pdiffcopy.locations import Location, Network, Replica, open_replica
from pdiffcopy.mp import WorkerPool
from pdiffcopy.pipeline import Plan, Result, find_blocks, generate_batches, open_target, transfer_batch
from pdiffcopy.progress import Reporter, make_reporter
from pdiffcopy.protocol import (
    FEATURE_BLOCKWISE,
    FEATURE_DIGEST,
    FEATURE_EXTENTS,
    FEATURE_SYNC,
    MAX_BLOCK_SIZE,
    MAX_CONCURRENCY,
    MAX_EXTENTS,
    FileInfo,
    PeerInfo,
)
from pdiffcopy.report import Report

if TYPE_CHECKING:
    from pdiffcopy.benchmark import Measurement

logger = logging.getLogger(__name__)


class Client(PropertyManager):
    """
    Python API for the client side of the pdiffcopy program.

    For example ``Client(source="/data/table.ibd", target="db2:8080/data/table.ibd").synchronize()``.
    """

    @mutable_property
    def benchmark(self) -> int:
        """How many times the benchmark should be run (an integer, defaults to 0)."""
        return 0

    @mutable_property
    def block_size(self) -> int:
        """The block size used by the client (in bytes, defaults to :data:`.BLOCK_SIZE`)."""
        return BLOCK_SIZE

    @mutable_property
    def concurrency(self) -> int:
        """The number of parallel processes that the client is allowed to start."""
        return DEFAULT_CONCURRENCY

    @mutable_property
    def delta_transfer(self) -> bool:
        """Whether delta transfer is enabled (a boolean, defaults to :data:`True`)."""
        return True

    @mutable_property
    def dry_run(self) -> bool:
        """:data:`True` if the client isn't allowed to make changes (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def fsync(self) -> bool:
        """Whether the target is flushed to its disk before success is reported (defaults to :data:`False`)."""
        return False

    @mutable_property
    def hash_method(self) -> str:
        """The block hash method (a string, defaults to 'sha1')."""
        return "sha1"

    @mutable_property
    def network(self) -> Network:
        """How to talk to servers (a :class:`.Network` object)."""
        return Network()

    @mutable_property
    def verify(self) -> bool:
        """Whether to check what was transferred as it lies in the target (defaults to :data:`True`)."""
        return True

    @mutable_property
    def source(self) -> Any:
        """The :class:`.Location` from which data is read (the text of one may be assigned)."""

    @source.setter
    def source(self, value: Location | str) -> None:
        """Accept a location or the text of one."""
        set_property(self, "source", _as_location(value))

    @mutable_property
    def target(self) -> Any:
        """The :class:`.Location` to which data is written (the text of one may be assigned)."""

    @target.setter
    def target(self, value: Location | str) -> None:
        """Accept a location or the text of one."""
        set_property(self, "target", _as_location(value))

    def synchronize(self) -> None:
        """Synchronize from source to target (possibly more than once, see :attr:`benchmark`)."""
        if self.benchmark > 0:
            self.run_benchmark()
        else:
            self.synchronize_once()

    def synchronize_once(self) -> int:
        """
        Synchronize from source to target.

        :returns: The number of blocks that differed (an integer).
        """
        return self.run().result.blocks_changed

    def run(self) -> Report:
        """
        Synchronize from source to target, and tell what was done.

        :raises: :exc:`.SourceChangedError` when the source isn't what it was at the start,
                 :exc:`.VerificationError` when something keeps arriving wrong, other kinds of :exc:`.ProgramError`.
        """
        started = time.monotonic()
        source, target, plan = self._prepare()
        if self.dry_run:
            with self._watching_source(source, plan):
                result, claimed = self._scan(plan), False
        else:
            result, claimed, target = self._update(source, target, plan, generate_batches)
        report = Report(
            plan,
            result,
            self.dry_run,
            self.verify,
            time.monotonic() - started,
            watched=source.tells_time,
            claimed=claimed,
            cut=max(0, target.size - source.size) if target.resizable else 0,
            grown=max(0, source.size - target.size) if target.exists else 0,
        )
        logger.log(logging.WARNING if report.reservations else logging.INFO, "%s", report)
        return report

    def find_changes(self) -> list[int]:
        """
        Helper for :func:`synchronize()` to compute the similarity index.

        :returns: A list of integers with the offsets of the blocks that differ. Nothing is written.
        """
        source, target, plan = self._prepare()
        plan = replace(plan, target_size=min(plan.size, target.size))
        with self._watching_source(source, plan):
            return [block.offset for block in find_blocks(plan) if block.changed]

    def compute_transfer_size(self, offsets: Iterable[int]) -> int:
        """
        Figure out how much data we're going to transfer.

        :param offsets: A list of integers with the offsets of the blocks to be synchronized.
        :returns: The amount of data to be transferred in bytes (an integer): the last block may be a short one.
        """
        size = self.source.file_size
        return sum(block_length(offset, size, self.block_size) for offset in offsets)

    def transfer_changes(self, offsets: Iterable[int]) -> None:
        """
        Helper for :func:`synchronize()` to transfer the differences.

        :param offsets: A list of integers with the byte offsets of the blocks to copy from source to target.
        """
        source, target, plan = self._prepare()
        # There are no block hashes here that could stand in for the digests which an old server doesn't state.
        plan = replace(plan, verify=plan.verify and not plan.by_hashes, by_hashes=False, blockwise=False)
        self._update(source, target, plan, partial(_batches_of, sorted(set(offsets))))

    def mutate_target(self, percentage: float) -> None:
        """Invalidate a percentage of the data in the target file."""
        from pdiffcopy.benchmark import mutate_target

        mutate_target(self, percentage)

    def run_benchmark(self) -> list[Measurement]:
        """
        Benchmark the effectiveness of the delta transfer implementation.

        :returns: What was measured: a list of :class:`.Measurement` objects.
        """
        from pdiffcopy.benchmark import run_benchmark

        return run_benchmark(self)

    # The steps of a run {{{1

    def _prepare(self) -> tuple[FileInfo, FileInfo, Plan]:
        """Look at both sides, and refuse what can't work before anything is touched."""
        self._check_options()
        (source, source_peer), (target, target_peer) = self._inspect()
        if not source.exists:
            raise FileMissingError("The source {label} doesn't exist", label=self.source.label)
        if self.source.address == self.target.address or source.file_id == target.file_id != "":
            raise UsageError("The source and the target are the same file: {label}", label=self.source.label)
        self._check_peer(self.source, source_peer)
        self._check_peer(self.target, target_peer)
        if not (self.dry_run or target_peer.writable):
            raise ForbiddenError("The server of {label} is read-only", label=self.target.label)
        if self.fsync and FEATURE_SYNC not in target_peer.features:
            raise UsageError("The server of {label} is too old for --fsync", label=self.target.label)
        # From then on each change of the source shows in its time. It comes before anything of it is read.
        time.sleep(source.settles_ms / 1000)
        return source, target, self._make_plan(source, target, source_peer, target_peer)

    def _check_options(self) -> None:
        if not (self.source and self.target):
            raise UsageError("A client needs a source and a target")
        for location in (self.source, self.target):
            if location.filename.endswith("/"):
                raise UsageError("{label} names a folder: add the name of the file", label=location.label)
        if not 0 < self.block_size <= MAX_BLOCK_SIZE:
            raise UsageError("The block size has to be from 1 byte to {limit} bytes", limit=MAX_BLOCK_SIZE)
        if not 0 < self.concurrency <= MAX_CONCURRENCY:
            raise UsageError("The concurrency has to be from 1 to {limit}", limit=MAX_CONCURRENCY)
        get_hasher(self.hash_method)

    def _check_peer(self, location: Location, peer: PeerInfo) -> None:
        # An old server doesn't tell its methods: it surely has those that come with every Python.
        if location.hostname and self.hash_method not in (peer.methods or algorithms_guaranteed):
            text = "The server of {label} has no hash method {method}"
            raise UsageError(text, label=location.label, method=self.hash_method)

    def _inspect(self) -> list[tuple[FileInfo, PeerInfo]]:
        """Ask both sides for size and identity, at the same time where that saves a round trip."""
        replicas = [open_replica(location.address, self.network) for location in (self.source, self.target)]
        if not (self.source.hostname and self.target.hostname):
            return [replica.info() for replica in replicas]
        with ThreadPoolExecutor(2) as executor:
            return list(executor.map(lambda replica: replica.info(), replicas))

    def _make_plan(self, source: FileInfo, target: FileInfo, source_peer: PeerInfo, target_peer: PeerInfo) -> Plan:
        verify = self.verify and FEATURE_DIGEST in target_peer.features
        by_hashes = verify and FEATURE_DIGEST not in source_peer.features
        delta = self.delta_transfer and target.size > 0
        # Who compares by XXH128 has all that it takes. Other methods cost more than to read the changes once more.
        free = delta and self.hash_method == "xxh128" and FEATURE_BLOCKWISE in target_peer.features
        many_extents = FEATURE_EXTENTS in source_peer.features & target_peer.features
        return Plan(
            source=self.source.address,
            target=self.target.address,
            source_id=source.file_id,
            target_id=target.file_id,
            network=self.network,
            size=source.size,
            # A target that is shorter is going to be grown first.
            target_size=min(source.size, target.size) if self.dry_run else source.size,
            block_size=self.block_size,
            method=self.hash_method,
            concurrency=self.concurrency,
            delta=delta,
            verify=verify,
            by_hashes=by_hashes,
            blockwise=verify and free and not by_hashes,
            max_extents=MAX_EXTENTS if many_extents else 1,
            run=os.urandom(8).hex(),
        )

    def _scan(self, plan: Plan) -> Result:
        """A dry run: compare, but move nothing."""
        with make_reporter(plan.size, plan.activity) as reporter:
            return _sum(_compare_batch(batch, reporter) for batch in generate_batches(plan, lambda: True))

    def _update(
        self, source: FileInfo, target: FileInfo, plan: Plan, find: Callable[..., Iterable[Batch]]
    ) -> tuple[Result, bool, FileInfo]:
        """
        Bring the target into line: grow it, change it, cut it, and look whether all is as it should be.

        :returns: What was done, whether the target was claimed, and what it was then (or before it was created).
        """
        before = target
        with self._watching_source(source, plan):
            with self._pool(plan, find) as (pool, start):
                # From here on no other run may mix its data with ours: one that begins later ends this one. An earlier
                # one may have resized the target until now.
                claimed, target = open_target(plan).claim(plan.run, not target.exists, source.mode)
                plan = replace(plan, target_id=target.file_id, run=plan.run if claimed else "")
                replica = open_target(plan)
                if target.size < source.size or not target.exists:
                    replica.resize(source.size, plan.run)
                start(plan)
                result = _sum(pool)
            if target.size > source.size and target.resizable:
                replica.resize(source.size, plan.run)
            if self.fsync:
                replica.sync(plan.run)
            # This proves that nobody else has been there since the claim. To end the claim couldn't: that may be
            # repeated, and then there is none, whoever has ended it.
            self._check_target(source, target, replica.info(plan.run)[0])
        if claimed:
            self._release(replica, plan)
        return result, claimed, target if before.exists else before

    @contextmanager
    def _pool(
        self, plan: Plan, find: Callable[..., Iterable[Batch]]
    ) -> Iterator[tuple[Iterable[Result], Callable[[Plan], None]]]:
        """
        Start all processes. They wait for a plan, so that what they lack is known before the target is touched.

        :returns: The results to come, and a function that lets the work begin.
        """
        receiver, sender = Pipe(duplex=False)
        reporter = make_reporter(plan.size, plan.activity)
        work = partial(_transfer_item, reporter)
        pool = WorkerPool(concurrency=self.concurrency, generator_fn=partial(_generate_items, find), worker_fn=work)
        pool.generator_fn = partial(_generate_items, find, receiver, pool.input_queue.empty)
        with receiver, sender, pool, reporter:
            yield pool, sender.send

    def _release(self, replica: Replica, plan: Plan) -> None:
        """End a claim. One that stays behind does no harm, so the run is a success whatever becomes of that."""
        try:
            replica.release(plan.run)
        except ProgramError as e:
            logger.warning("The claim on %s stays behind: %s", self.target.label, e)

    @contextmanager
    def _watching_source(self, before: FileInfo, plan: Plan) -> Iterator[None]:
        """A source that has changed forbids success, and explains any failure."""
        try:
            yield
        except SourceChangedError:
            raise
        except ProgramError as e:
            try:
                after = open_replica(plan.source, replace(self.network, retries=0)).info()[0]
            except ProgramError:
                after = before  # can't tell, so it's the first failure that counts
            if change := before.describe_change(after):
                raise SourceChangedError.of(self.source.label, change) from e
            raise
        if change := before.describe_change(open_replica(plan.source, self.network).info()[0]):
            raise SourceChangedError.of(self.source.label, change)

    def _check_target(self, source: FileInfo, before: FileInfo, after: FileInfo) -> None:
        """Somebody may have removed, replaced or resized the file that we wrote to."""
        sizes_match = after.size == source.size if after.resizable else after.size >= source.size
        if not (after.exists and after.file_id == before.file_id and sizes_match):
            text = "The target {label} was replaced, resized or removed while it was written to: run again"
            raise FileError(text, label=self.target.label)


def get_hashes_fn(location: Location, **options: Any) -> dict[int, str]:
    """
    Adapter for multiprocessing: get all hashes of a location at once.

    :param options: See :meth:`.Location.get_hashes`.
    :returns: A dictionary of offsets and hashes.
    """
    return dict(location.get_hashes(**options))


def transfer_block_fn(offset: int, source: Location, target: Location, block_size: int) -> int:
    """
    Adapter for multiprocessing: transfer one block.

    :returns: The offset, so that a caller knows which block is done.
    """
    target.write_block(offset, source.read_block(offset, block_size))
    return offset


def _batches_of(offsets: list[int], plan: Plan, is_awaited: Callable[[], bool]) -> Iterator[Batch]:
    blocks = (Block(o, block_length(o, plan.size, plan.block_size), changed=True, digest="") for o in offsets)
    return make_batches(blocks, plan.max_extents, is_awaited=is_awaited)


def _generate_items(
    find: Callable[..., Iterable[Batch]], plans: Connection, is_awaited: Callable[[], bool]
) -> Iterator[tuple[Plan, Batch]]:
    plan = plans.recv()
    for batch in find(plan, is_awaited=is_awaited):
        yield plan, batch


def _transfer_item(reporter: Reporter, item: tuple[Plan, Batch]) -> Result:
    return transfer_batch(*item, reporter)


def _compare_batch(batch: Batch, reporter: Reporter) -> Result:
    reporter.advance(batch.bytes_compared, 0)
    return Result.of_comparison(batch)


def _sum(results: Iterable[Result]) -> Result:
    total = Result()
    for result in results:
        total += result
    return total


def _as_location(value: Location | str) -> Location:
    return value if isinstance(value, Location) else Location(expression=os.fspath(value))
