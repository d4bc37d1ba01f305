"""
Which steps does a run take?

1. Look at both sides, and refuse what can't work. Nothing has been touched yet.
2. Start all processes, so that what this machine lacks for them is known before the target is touched.
3. Claim the target, grow it, and make the plan.
4. Let the pipeline move what differs.
5. Cut the target, flush it if that is wanted, and look whether both sides are what they should be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from pdiffcopy.address import Address
from pdiffcopy.blocks import Block, FileInfo, Metadata, block_length
from pdiffcopy.client.delta import Batch, make_batches
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import find_blocks, generate_batches, open_target, transfer_batch
from pdiffcopy.client.plan import Options, Plan, Result, Target
from pdiffcopy.client.planning import Planner, Side
from pdiffcopy.client.progress import Reporter, make_reporter
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Replicas, Servers
from pdiffcopy.client.taking import Atomic, InPlace, Taking
from pdiffcopy.exceptions import (
    FileError,
    FileMissingError,
    ProgramError,
    SourceChangedError,
    UsageError,
)
from pdiffcopy.mp import WorkerPool, make_queue
from pdiffcopy.replica import Replica

logger = logging.getLogger(__name__)


Finder = Callable[[Plan, Replicas, Callable[[], bool]], Iterable[Batch]]
"""Finds out what there is to transfer, like :func:`.generate_batches`. It has to be picklable."""


class Run:
    """One run: brings a target in line with a source, or compares them."""

    def __init__(
        self, source: Address, target: Address, options: Options, servers: Servers, offsets: Sequence[int] | None = None
    ):
        """
        Initialize a run.

        :param source: What is read.
        :param target: What is written to.
        :param options: What the user wants.
        :param servers: Where the replicas come from.
        :param offsets: The offsets of the blocks to transfer (by default the run finds them).
        """
        for address in (source, target):
            if address.filename.endswith("/"):
                raise UsageError("{label} names a folder: add the name of the file", label=str(address))
        self.source_address, self.target_address = source, target
        self.options = options
        self.servers = servers
        self.is_given = offsets is not None
        self._find: Finder = generate_batches if offsets is None else partial(_batch, offsets)

    def synchronize(self) -> Report:
        """Bring the target into line (or find out what that would take, in a dry run)."""
        started = time.monotonic()
        self._look(writes=not self.options.dry_run)
        with self._watching_source():
            if self.options.dry_run:
                plan = self._plan_comparison()
                before, result = self.target.info, self._scan(plan)
                self._check_source()
            else:
                before, plan, result = self._update()
        source = self.source.info
        return Report(
            self.target_address,
            plan,
            result,
            self.options.dry_run,
            self.options.verify,
            time.monotonic() - started,
            watched=source.tells_time,
            claimed=bool(plan.run),
            cut=max(0, before.size - source.size) if before.resizable else 0,
            grown=max(0, source.size - before.size) if before.exists else 0,
            left_alone=0 if before.resizable else before.size - source.size,
        )

    def compare(self) -> list[int]:
        """Find the offsets of the blocks that differ. Nothing is written, whatever the options say."""
        self._look(writes=False)
        plan = self._plan_comparison()
        with self._watching_source():
            offsets = [
                offset
                for block in find_blocks(plan, self.servers)
                if block.changed
                for offset in range(block.offset, block.offset + block.size, plan.block_size)
            ]
            self._check_source()
            return offsets

    # Before anything is touched {{{1

    def _look(self, writes: bool) -> None:
        """Look at both sides, and refuse what can't work."""
        self.source, self.target = self._inspect()
        source, target = self.source, self.target
        if not source.info.exists:
            raise FileMissingError("The source {label} doesn't exist", label=source.replica.label)
        if self.source_address.is_same(self.target_address) or source.info.file_id == target.info.file_id != "":
            raise UsageError("The source and the target are the same file: {label}", label=source.replica.label)
        self.planner = Planner(source, target, self.options, self.is_given)
        self.planner.check(writes)
        self.taking = self._choose_taking()
        self.metadata = Metadata()
        if writes and self.options.wants_metadata:
            self.metadata = self.options.select(source.replica.pinned(source.info.file_id, is_source=True).metadata())
        # From then on each change of the source shows in its time. It comes before anything of it is read.
        time.sleep(source.info.settles_ms / 1000)

    def _inspect(self) -> list[Side]:
        """Ask both sides for size and identity, at the same time where that saves a round trip."""
        replicas = [self.servers.open(address) for address in (self.source_address, self.target_address)]
        if any(replica.is_near for replica in replicas):
            return [_look_at(replica) for replica in replicas]
        with ThreadPoolExecutor(2) as executor:
            return list(executor.map(_look_at, replicas))

    def _choose_taking(self) -> Taking:
        if not self.options.atomic:
            return InPlace(self.target_address, self.target)
        return Atomic(self.target_address, self.target, self.servers.network.retries, self.planner.takes)

    def _plan_comparison(self) -> Plan:
        info = self.target.info
        target = Target(self.target_address, info, min(self.source.info.size, info.size))
        return self.planner.make_plan(self.source_address, target)

    # Doing it {{{1

    def _scan(self, plan: Plan) -> Result:
        """Compare, but move nothing (a dry run)."""
        total = Result()
        with self._make_reporter() as reporter:
            for batch in self._find(plan, self.servers, lambda: True):
                reporter.advance(batch.bytes_compared, 0)
                total += Result.of_comparison(batch)
        return total

    def _update(self) -> tuple[FileInfo, Plan, Result]:
        """
        Grow the target, change it, cut it, and look whether all is as it should be.

        :returns: What the target was before, what was planned and done.
        """
        size = self.source.info.size
        with self._pool() as (results, start):
            target = self.taking.take(self.source.info)
            plan = self.planner.make_plan(self.source_address, target)
            replica = open_target(plan, self.servers)
            if self.options.wants_metadata:
                replica.set_metadata(self.metadata, plan.run, in_advance=True)
            if target.info.size < size or not target.info.exists:
                replica.resize(size, plan.run, plan.fills_new_file)
            start(plan)
            result = sum(results, Result())
        if target.info.size > size and target.info.resizable:
            replica.resize(size, plan.run)
        self._finish(target, replica)
        is_known = self.target.info.exists and not self.options.atomic
        return target.info if is_known else self.target.info, plan, result

    def _finish(self, target: Target, replica: Replica) -> None:
        """Do what comes after the contents, and look whether nobody else has been there."""
        if (metadata := self.taking.complete(self.metadata)) != Metadata():
            replica.set_metadata(metadata, target.run)
        if self.options.fsync or self.taking.needs_flush:
            replica.sync(target.run)
        # This proves that nobody else has been there since the claim. To end the claim couldn't: that may be repeated,
        # and then there is none, whoever has ended it.
        self._check_target(target.info, replica.info(target.run)[0])
        self._check_source()
        self.taking.let_go(target, replica)

    @contextmanager
    def _pool(self) -> Iterator[tuple[Iterable[Result], Callable[[Plan], None]]]:
        """
        Start all processes. They wait for a plan, so that what they lack is known before the target is touched.

        :returns: The results to come, and a function that lets the work begin.
        """
        count, retries = self.options.concurrency, self.servers.network.retries
        receiver, sender = Pipe(duplex=False)
        queue, reporter = make_queue(2 * count), self._make_reporter()
        pool = WorkerPool(
            concurrency=count,
            input_queue=queue,
            generator_fn=partial(_generate, self._find, self.servers, receiver, queue.empty),
            worker_fn=partial(_transfer, self.servers, retries, reporter, Judge()),
        )
        with receiver, sender, pool, reporter:
            yield pool, sender.send

    def _make_reporter(self) -> Reporter:
        return make_reporter(self.source.info.size, "Comparing" if self.planner.delta else "Copying")

    # Looking again {{{1

    @contextmanager
    def _watching_source(self) -> Iterator[None]:
        """A source that has changed explains any failure."""
        before, label = self.source.info, self.source.replica.label
        try:
            yield
        except SourceChangedError:
            raise
        except ProgramError as e:
            with Servers(replace(self.servers.network, retries=0)) as impatient:
                try:
                    after = impatient.open(self.source_address).info()[0]
                except ProgramError:
                    after = before  # can't tell, so it's the first failure that counts
            if change := before.describe_change(after):
                raise SourceChangedError.of(label, change) from e
            raise

    def _check_source(self) -> None:
        """A source that has changed forbids success: the target may be a mixture."""
        if change := self.source.info.describe_change(self.source.replica.info()[0]):
            raise SourceChangedError.of(self.source.replica.label, change)

    def _check_target(self, before: FileInfo, after: FileInfo) -> None:
        """Notice that the file that we wrote to was removed, replaced or resized."""
        size = self.source.info.size
        sizes_match = after.size == size if after.resizable else after.size >= size
        if not (after.exists and after.file_id == before.file_id and sizes_match):
            text = "The target {label} was replaced, resized or removed while it was written to: run again"
            raise FileError(text, label=self.target.replica.label)


def _look_at(replica: Replica) -> Side:
    return Side(replica, *replica.info())


def _batch(offsets: Sequence[int], plan: Plan, replicas: Replicas, is_awaited: Callable[[], bool]) -> Iterator[Batch]:
    """Make batches of blocks that were given."""
    lengths = ((offset, block_length(offset, plan.size, plan.block_size)) for offset in sorted(set(offsets)))
    blocks = (Block(offset, length, changed=True, digest="") for offset, length in lengths)
    return make_batches(blocks, plan.max_extents, is_awaited=is_awaited)


def _generate(
    find: Finder, servers: Servers, plans: Connection, is_awaited: Callable[[], bool]
) -> Iterator[tuple[Plan, Batch]]:
    """Do what the generator process does."""
    plan = plans.recv()
    for batch in find(plan, servers, is_awaited):
        yield plan, batch


def _transfer(servers: Servers, retries: int, reporter: Reporter, judge: Judge, item: tuple[Plan, Batch]) -> Result:
    """Do what a worker process does."""
    plan, batch = item
    return transfer_batch(plan, batch, servers, retries, reporter, judge)
