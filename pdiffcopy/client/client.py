"""How does a Python program copy files?"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from property_manager import PropertyManager, mutable_property, set_property

from pdiffcopy import BLOCK_SIZE, DEFAULT_CONCURRENCY
from pdiffcopy.blocks import block_length
from pdiffcopy.client.job import Job
from pdiffcopy.client.location import Location
from pdiffcopy.client.network import Network
from pdiffcopy.client.places import find_kind, find_place
from pdiffcopy.client.plan import Options
from pdiffcopy.client.report import Report
from pdiffcopy.client.run import Run
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import Kind
from pdiffcopy.exceptions import UsageError
from pdiffcopy.pace import make_pace

if TYPE_CHECKING:
    from pdiffcopy.client.benchmark import Measurement
    from pdiffcopy.client.summary import FileReport, Summary

logger = logging.getLogger(__name__)


class Client(PropertyManager):
    """
    Python API for the client side of the pdiffcopy program.

    For example ``Client(source="/data/table.ibd", target="db2:8080/data/table.ibd").synchronize()``.
    """

    @mutable_property
    def atomic(self) -> bool:
        """Whether a complete new version takes the place of the target in one step (defaults to :data:`False`)."""
        return False

    @mutable_property
    def benchmark(self) -> int:
        """How many times the benchmark should be run (an integer, defaults to 0)."""
        return 0

    @mutable_property
    def block_size(self) -> int:
        """The block size used by the client (in bytes, defaults to :data:`.BLOCK_SIZE`)."""
        return BLOCK_SIZE

    @mutable_property
    def bwlimit(self) -> int:
        """How many bytes of contents may move in a second (an integer, defaults to 0: as many as can)."""
        return 0

    @mutable_property
    def concurrency(self) -> int:
        """The number of parallel processes that the client is allowed to start."""
        return DEFAULT_CONCURRENCY

    @mutable_property
    def delta_transfer(self) -> bool:
        """Whether delta transfer is enabled (a boolean, defaults to :data:`True`)."""
        return True

    @mutable_property
    def drop_cache(self) -> bool:
        """Whether what wasn't in the page cache, on either side, leaves it again (defaults to :data:`False`)."""
        return False

    @mutable_property
    def dry_run(self) -> bool:
        """:data:`True` if the client isn't allowed to make changes (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def fsync(self) -> bool:
        """Whether the target is flushed to its disk before success is reported (defaults to :data:`False`)."""
        return False

    @mutable_property
    def group(self) -> bool:
        """Whether it gets the group of the source (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def hash_method(self) -> str:
        """The block hash method (a string, defaults to 'sha1'; 'auto' is 'blake3' where both sides have it)."""
        return "sha1"

    @mutable_property
    def network(self) -> Network:
        """How to talk to servers (a :class:`.Network` object). The source and the target have the same."""
        return Network()

    @network.setter
    def network(self, value: Network) -> None:
        """Pass it on to the locations, unless they have one of their own."""
        before = self.network
        set_property(self, "network", value)
        for location in (self.source, *self.sources, self.target):
            if location and location.network == before:
                location.network = value

    @mutable_property
    def owner(self) -> bool:
        """Whether it gets the owner of the source (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def perms(self) -> bool:
        """Whether the target gets the permission bits of the source (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def progress(self) -> str:
        """How progress is shown: 'json' is a line a second on stderr (defaults to a bar, if that's a terminal)."""
        return ""

    @mutable_property
    def recursive(self) -> bool:
        """Whether the source may be a folder (a boolean, defaults to :data:`False`)."""
        return False

    @mutable_property
    def rules(self) -> Sequence[tuple[bool, str]]:
        """Which files of a folder are chosen: tuples like :class:`.Rule`, the first one that fits counts."""
        return ()

    @mutable_property
    def sparse(self) -> str:
        """
        What becomes of holes (a string, defaults to 'auto').

        'auto': the target has them where the source has them, 'always': zeros become holes, 'never': none are made.
        """
        return "auto"

    @mutable_property
    def times(self) -> bool:
        """Whether it gets the modification time of the source (a boolean, defaults to :data:`False`)."""
        return False

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
        set_property(self, "source", self._adopt(value))

    @mutable_property
    def sources(self) -> Sequence[Any]:
        """Several :class:`.Location` objects from which data is read, for :meth:`run_files` (or texts of them)."""
        return [self.source] if self.source else []

    @sources.setter
    def sources(self, value: Iterable[Location | str]) -> None:
        """Accept locations or the texts of them."""
        set_property(self, "sources", [self._adopt(item) for item in value])

    @mutable_property
    def target(self) -> Any:
        """The :class:`.Location` to which data is written (the text of one may be assigned)."""

    @target.setter
    def target(self, value: Location | str) -> None:
        """Accept a location or the text of one."""
        set_property(self, "target", self._adopt(value))

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
        with self._running() as (run, job):
            report = run.synchronize(find_place(job))
        logger.log(logging.WARNING if report.reservations else logging.INFO, "%s: %s", report.target, report)
        return report

    @property
    def is_about_many(self) -> bool:
        """Whether there are several files, so that it takes :meth:`run_files`."""
        if len(self.sources) == 1 and self.recursive:
            return find_kind(self.sources[0].replica, "-r") is not Kind.FILE
        return len(self.sources) > 1

    def run_files(self, summary: Summary | None = None) -> Iterator[FileReport]:
        """
        Synchronize several sources, or those files of a folder that are chosen, to a folder: each as if it were alone.

        :param summary: Takes note of them.
        :returns: A generator that tells what was done with each file, or why it failed.
        :raises: Kinds of :exc:`.ProgramError` for what forbids all of it, or would be the same for all files.
        """
        from pdiffcopy.client.many import bring_all
        from pdiffcopy.client.selection import select_files
        from pdiffcopy.client.tree import Rule, select_tree

        with self._make_servers() as servers:
            sources = [location.address for location in self.sources]
            if not (sources and self.target):
                raise UsageError("A client needs sources and a target")
            options, target = self._get_options(), self.target.address
            if self.recursive and len(sources) == 1 and self.is_about_many:
                rules = [Rule(*rule) for rule in self.rules]
                selection = select_tree(sources[0], target, rules, servers, self.atomic)
            else:
                self._refuse_rules()
                selection = select_files(sources, target, servers, self.atomic)
            run = Run(options, servers, progress=self.progress)
            yield from bring_all(selection, run, summary)

    def find_changes(self) -> list[int]:
        """
        Helper for :func:`synchronize()` to compute the similarity index.

        :returns: A list of integers with the offsets of the blocks that differ. Nothing is written.
        """
        with self._running() as (_, job):
            return job.compare()

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
        Helper for :func:`synchronize()` to transfer the differences (none of them in a dry run).

        :param offsets: A list of integers with the byte offsets of the blocks to copy from source to target.
        """
        with self._running(list(offsets)) as (run, job):
            run.synchronize(job)

    def _refuse_rules(self) -> None:
        if self.rules:
            raise UsageError("--include and --exclude choose among the files of a folder: give one, with -r")

    @contextmanager
    def _running(self, offsets: list[int] | None = None) -> Iterator[tuple[Run, Job]]:
        if not (self.source and self.target):
            raise UsageError("A client needs a source and a target")
        self._refuse_rules()
        with self._make_servers() as servers:
            options, is_given = self._get_options(), offsets is not None
            job = Job(self.source.address, self.target.address, options, servers, is_given)
            yield Run(options, servers, offsets, self.progress), job

    def _make_servers(self) -> Servers:
        return Servers(self.network, make_pace(self.bwlimit), self.drop_cache)

    def _get_options(self) -> Options:
        return Options(
            atomic=self.atomic,
            block_size=self.block_size,
            bwlimit=self.bwlimit,
            concurrency=self.concurrency,
            delta_transfer=self.delta_transfer,
            drop_cache=self.drop_cache,
            dry_run=self.dry_run,
            fsync=self.fsync,
            group=self.group,
            hash_method=self.hash_method,
            owner=self.owner,
            perms=self.perms,
            sparse=self.sparse,
            times=self.times,
            verify=self.verify,
        ).checked()

    def _adopt(self, value: Location | str) -> Location:
        location = value if isinstance(value, Location) else Location(expression=os.fspath(value))
        if location.network == Network():
            location.network = self.network
        return location

    def mutate_target(self, percentage: float) -> None:
        """
        Invalidate a percentage of the data in the target file.

        :param percentage: A number from 0 to 100.
        :raises: :exc:`.UsageError` when the client isn't allowed to make changes (see :attr:`dry_run`).
        """
        from pdiffcopy.client.benchmark import mutate_target

        self._refuse_dry_run()
        mutate_target(self.target.replica, self.block_size, percentage)

    def run_benchmark(self) -> list[Measurement]:
        """
        Benchmark the effectiveness of the delta transfer implementation.

        :returns: What was measured: a list of :class:`.Measurement` objects.
        """
        from pdiffcopy.client.benchmark import run_benchmark

        self._refuse_dry_run()
        with self._running() as (_, job):
            is_near = self.target.replica.is_near
            target = Location(expression=str(find_place(job).target_address)) if is_near else self.target
        return run_benchmark(self.source, target, self.block_size, self.benchmark, self.run)

    def _refuse_dry_run(self) -> None:
        if self.dry_run:
            raise UsageError("A dry run changes nothing, and this damages the target: leave out --dry-run")
