"""
Which steps does it take to bring one file into line?

1. Look at both sides, and refuse what can't work. Nothing has been touched yet.
2. Claim the target, grow it, and make the plan.
3. (Others compare, and move what differs: :mod:`.run`.)
4. Cut the target, flush it if that is wanted, and look whether both sides are what they should be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from pdiffcopy.address import Address
from pdiffcopy.blocks import FileInfo, Metadata
from pdiffcopy.client.exchange import OR_OTHER
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import Finder, find_blocks, open_target, transfer_batch
from pdiffcopy.client.plan import Options, Plan, Result, Target
from pdiffcopy.client.planning import Planner, Side
from pdiffcopy.client.progress import Reporter
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.taking import Atomic, InPlace, Taking
from pdiffcopy.exceptions import (
    AuthenticationError,
    DependencyError,
    DiskFullError,
    FileError,
    FileMissingError,
    ProgramError,
    ReadOnlyError,
    SourceChangedError,
    TransientError,
    UnsupportedError,
    UsageError,
    WorkerError,
)
from pdiffcopy.features import FEATURE_MANY
from pdiffcopy.replica import Replica

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Job:
    """One file: what is to become equal to what."""

    def __init__(
        self,
        source: Address,
        target: Address,
        options: Options,
        servers: Servers,
        is_given: bool = False,
        size: int | None = None,
        is_new: bool = False,
    ):
        """
        Initialize a job.

        :param source: What is read.
        :param target: What is written to.
        :param options: What the user wants.
        :param servers: Where the replicas come from.
        :param is_given: Whether the blocks to transfer are given.
        :param size: How many bytes there seem to be, if that's known.
        :param is_new: Whether the target seems to be missing.
        """
        self.size, self.is_new = size, is_new
        self.source_address, self.target_address = source, target
        self.options, self.servers, self.is_given = options, servers, is_given
        self.started = time.monotonic()
        self.was_looked_at = False

    # Before anything is touched {{{1

    def look(self, writes: bool) -> None:
        """Look at both sides, and refuse what can't work."""
        self.started = time.monotonic()
        for address in (self.source_address, self.target_address):
            if address.filename.endswith("/"):
                raise UsageError("{label} names a folder: add the name of the file, or -r", label=str(address))
        self.source, self.target = self._inspect()
        source, target = self.source, self.target
        if not source.info.exists:
            if self.source_address.within:  # it was there when its folder was listed
                raise SourceChangedError.of(source.replica.label, "identity")
            text = "The source {label} doesn't exist" + ("" if source.peer.features else OR_OTHER)
            raise FileMissingError(text, label=source.replica.label)
        if self.source_address.is_same(self.target_address) or source.info.file_id == target.info.file_id != "":
            raise UsageError("The source and the target are the same file: {label}", label=source.replica.label)
        if not (writes or target.info.exists or target.peer.features):
            logger.warning("The target %s doesn't exist%s", target.replica.label, OR_OTHER)
        self.planner = Planner(source, target, self.options, self.is_given)
        self.planner.check(writes)
        self.taking = self._choose_taking()
        self.metadata = Metadata()
        if writes and self.options.wants_metadata:
            self.metadata = self.options.select(source.replica.pinned(source.info.file_id, is_source=True).metadata())
            self.planner.check_mode(self.metadata.mode)
            if self.metadata.names_owner and not target.info.exists:
                with suppress(FileMissingError):  # an old server tells when there is a file
                    target.replica.set_metadata(self.metadata, in_advance=True)
        # From then on each change of the source shows in its time. It comes before anything of it is read.
        if source.info.settles_ms:
            time.sleep(source.info.settles_ms / 1000)
        self.was_looked_at = True

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

    def plan_comparison(self) -> Plan:
        """Make a plan that touches nothing."""
        info = self.target.info
        target = Target(self.target_address, info, min(self.source.info.size, info.size))
        # Whoever moves nothing wants to know what differs, so all of it is compared.
        return self.planner.make_plan(self.source_address, target)._replace(may_sample=False)

    # Doing it {{{1

    def begin(self) -> Plan:
        """Claim the target, and let it be as long as the source. (If nobody has looked at it yet, that comes first.)"""
        if not self.was_looked_at:
            self.look(writes=True)
        size, wants_metadata = self.source.info.size, self.options.wants_metadata
        self.claim = target = self.taking.take(self.source.info)
        self.plan = plan = self.planner.make_plan(self.source_address, target)
        self.replica = open_target(plan, self.servers)
        if wants_metadata:
            self.replica.set_metadata(self.metadata, plan.run, in_advance=True)
        if target.info.size < size or not target.info.exists:
            self.replica.resize(size, plan.run, plan.fills_new_file)
        return plan

    def end(self, result: Result) -> Report:
        """Do what comes after the contents, and look whether all is as it should be."""
        target, size = self.claim, self.source.info.size
        if target.info.size > size and target.info.resizable:
            self.replica.resize(size, target.run)
        metadata = self.taking.complete(self.metadata)
        self._complete(metadata)
        # This proves that nobody else has been there since the claim. To end the claim couldn't: that may be repeated,
        # and then there is none, whoever has ended it.
        self._check_target(target.info, self.replica.info(target.run)[0])
        self.check_source()
        self.taking.let_go(target, self.replica)
        if metadata != metadata.with_access():
            # Whoever isn't root could neither have flushed it nor have ended its claim after that.
            written = self.servers.open(self.target_address).pinned(target.info.file_id)
            written.set_metadata(Metadata(mode=metadata.mode))
        is_known = self.target.info.exists and not self.options.atomic
        return self.report(self.plan, result, target.info if is_known else self.target.info)

    def _complete(self, metadata: Metadata) -> None:
        """Let the target have its metadata, and flush it if that's wanted."""
        flushes, run = self.options.fsync or self.taking.needs_flush, self.claim.run
        if flushes:
            self.replica.sync(run)
        if metadata != Metadata():
            # After the flush that takes long: a new version that is somebody else's by then couldn't be continued.
            self.replica.set_metadata(metadata.with_access(), run)
            if flushes:
                self.replica.sync(run)

    def report(self, plan: Plan, result: Result, before: FileInfo) -> Report:
        """
        Tell what was done.

        :param before: What the target was.
        """
        source = self.source.info
        return Report(
            self.target_address,
            plan,
            result,
            self.options.dry_run,
            self.options.verify,
            time.monotonic() - self.started,
            watched=source.tells_time,
            created=not before.exists,
            claimed=bool(plan.run),
            cut=max(0, before.size - source.size) if before.resizable else 0,
            grown=max(0, source.size - before.size) if before.exists else 0,
            left_alone=0 if before.resizable else before.size - source.size,
        )

    def compare(self) -> list[int]:
        """Find the offsets of the blocks that differ. Nothing is written, whatever the options say."""
        self.look(writes=False)
        plan = self.plan_comparison()
        with self.explaining():
            offsets = [
                offset
                for block in find_blocks(plan, self.servers)
                if block.changed
                for offset in range(block.offset, block.offset + block.size, plan.block_size)
            ]
            self.check_source()
            return offsets

    def carry_out(self, find: Finder, reporter: Reporter, judge: Judge) -> Report:
        """Do all of it in this process, one batch after the other."""
        plan, total = self.begin(), Result()
        for batch in find(plan, self.servers, lambda: False):
            total += transfer_batch(plan, batch, self.servers, self.servers.network.retries, reporter, judge)
        return self.end(total)

    def scan(self, find: Finder, reporter: Reporter) -> Report:
        """Compare, but move nothing (a dry run)."""
        if not self.was_looked_at:
            self.look(writes=False)
        plan, total = self.plan_comparison(), Result()
        for batch in find(plan, self.servers, lambda: True):
            reporter.advance(batch.bytes_compared, 0)
            total += Result.of_comparison(batch)
        self.check_source()
        return self.report(plan, total, self.target.info)

    # Looking again {{{1

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Tell why something failed, if that is because the source has changed."""
        try:
            yield
        except ProgramError as e:
            if (better := self.explain(e)) is e:
                raise
            raise better from e

    def explain(self, error: ProgramError) -> ProgramError:
        """A source that has changed explains any failure."""
        if isinstance(error, SourceChangedError) or not self.was_looked_at:
            return error
        before, label = self.source.info, self.source.replica.label
        with Servers(self.servers.network._replace(retries=0)) as impatient:
            try:
                after = impatient.open(self.source_address).info()[0]
            except ProgramError:
                after = before  # can't tell, so it's the first failure that counts
        change = before.describe_change(after)
        return SourceChangedError.of(label, change) if change else error

    def check_source(self) -> None:
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


Ended = tuple[Job, "Report | ProgramError"]
"""What has become of a file."""
_FATAL = (
    AuthenticationError, DependencyError, DiskFullError, ReadOnlyError, TransientError, UnsupportedError, WorkerError,
)  # fmt: skip
"""What ends a run of many files at once, since it would be the same for all of them."""


def concerns_one_file(error: ProgramError) -> bool:
    """Whether other files may fare better."""
    return not isinstance(error, _FATAL)


def attempt_all(actions: Sequence[tuple[Job, Callable[[], T]]], is_alone: bool = False) -> Sequence[T | ProgramError]:
    """Do something for some jobs, side by side, see :func:`attempt`."""
    if len(actions) < 2 or not _can_share(actions[0][0]):
        return [attempt(job, action, is_alone) for job, action in actions]
    executor = ThreadPoolExecutor(len(actions))
    try:
        with actions[0][0].servers.used_by(len(actions)):
            outcomes = list(executor.map(lambda pair: attempt(*pair), actions))
    except BaseException:
        executor.shutdown(wait=False)  # whoever interrupts a run doesn't wait for what its threads wait for
        raise
    executor.shutdown()
    return outcomes


def _can_share(job: Job) -> bool:
    """Whether what several jobs ask a server for goes there together. An old server is asked one thing at a time."""
    from pdiffcopy.client.sides import group_files

    try:
        sides = [group_files([job.servers.open(address)]) for address in (job.source_address, job.target_address)]
        return all(FEATURE_MANY in side.peer.features for side in sides)
    except ProgramError:  # that's for the job to tell
        return False


def attempt(job: Job, action: Callable[[], T], is_alone: bool = False) -> T | ProgramError:
    """Do something for a job. A failure that concerns no other file is returned, unless there is no other file."""
    try:
        return action()
    except ProgramError as e:
        if is_alone or not concerns_one_file(e):
            raise
        return job.explain(e)
