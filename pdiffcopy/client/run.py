"""
How does a run bring one file into line, or many?

A file of which all that may differ makes up one batch takes no process but this one: the batch is found first and moved
then, so nothing could go on at the same time. Anything else is done by processes (:mod:`.workers`), which exist before
the target is touched, so that what this machine lacks for them is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice

from pdiffcopy.blocks import Block, block_length
from pdiffcopy.client.delta import Batch, make_batches
from pdiffcopy.client.job import Ended, Job, attempt_all
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import Finder, generate_batches
from pdiffcopy.client.plan import Options, Plan
from pdiffcopy.client.progress import Reporter, make_reporter
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Replicas, Servers


class Run:
    """Brings files into line."""

    def __init__(
        self, options: Options, servers: Servers, offsets: Sequence[int] | None = None, progress: str = ""
    ):  # fmt: skip
        """
        Initialize a run.

        :param options: What the user wants.
        :param servers: Where the replicas come from.
        :param offsets: The offsets of the blocks to transfer (by default the run finds them).
        :param progress: How progress is shown, see :func:`.make_reporter`.
        """
        self.progress = progress
        self.options, self.servers = options, servers
        self._find: Finder = generate_batches if offsets is None else partial(_batch, offsets)

    def synchronize(self, job: Job) -> Report:
        """Bring one file into line (or find out what that would take, in a dry run)."""
        if not job.was_looked_at:
            job.look(writes=not self.options.dry_run)
        size, label = job.source.info.size, "Comparing" if job.planner.delta else "Copying"
        with job.explaining():
            if self.options.dry_run or job.planner.makes_one_batch:
                with make_reporter(size, 1, label, self.progress) as reporter:
                    return self._do_here(job, reporter)
            ((_, outcome),) = self._share([job], (size, 1, label), is_alone=True)
        assert isinstance(outcome, Report)  # whatever else there is was raised
        return outcome

    def _do_here(self, job: Job, reporter: Reporter) -> Report:
        """Do all of it in this process."""
        if self.options.dry_run:
            report = job.scan(self._find, reporter)
        else:
            report = job.carry_out(self._find, reporter, Judge())
        reporter.end_file()
        return report

    def synchronize_all(self, jobs: Iterable[Job], size: int, count: int) -> Iterator[Ended]:
        """
        Bring files into line, each as if it were alone.

        :param size: How many bytes they have together.
        :param count: How many there are.
        :returns: A generator of what became of each of them, in the order in which that turns out.
        :raises: What would be the same for all of them.
        """
        scope = size, count, "Comparing"
        if not self.options.dry_run:
            yield from self._share(jobs, scope, is_alone=False)
            return
        with make_reporter(*scope, self.progress) as reporter:
            for ended in self._scan_all(jobs, reporter):
                reporter.end_file()
                yield ended

    def _scan_all(self, jobs: Iterable[Job], reporter: Reporter) -> Iterator[Ended]:
        """Compare all of them in this process, small ones at once or side by side."""
        from pdiffcopy.client.flight import GROUP, is_small
        from pdiffcopy.client.small import SmallFiles

        small = SmallFiles(self.options, self.servers, reporter)
        combined = self.servers.combined(self.options.concurrency)
        for are_small, some in groupby(jobs, is_small):
            while group := list(islice(some, GROUP if are_small else 1)):
                rest = []
                for job, report in zip(group, small.bring(group), strict=True):
                    if report:
                        yield job, report
                        continue
                    job.servers = combined if are_small else self.servers
                    rest.append(job)
                actions = [(job, partial(job.scan, self._find, reporter)) for job in rest]
                yield from zip(rest, attempt_all(actions), strict=True)

    def _share(self, jobs: Iterable[Job], scope: tuple[int, int, str], is_alone: bool) -> Iterator[Ended]:
        """
        Let processes do it.

        :param scope: How many bytes there are, in how many files, and what is done with them.
        """
        from pdiffcopy.client.workers import share
        from pdiffcopy.processes import make_counter

        reporter = make_reporter(*scope, self.progress, make_counter)
        return share(jobs, self._find, self.options, self.servers, reporter, is_alone)


def _batch(offsets: Sequence[int], plan: Plan, replicas: Replicas, is_awaited: Callable[[], bool]) -> Iterator[Batch]:
    """Make batches of blocks that were given."""
    lengths = ((offset, block_length(offset, plan.size, plan.block_size)) for offset in sorted(set(offsets)))
    blocks = (Block(offset, length, changed=True, digest="") for offset, length in lengths)
    return make_batches(blocks, plan.max_extents, is_awaited=is_awaited)
