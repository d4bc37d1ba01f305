"""
How do small files become equal, some of them at a time?

::

    what does the target have?   -->  missing       -->  read them all, create them all, look at the sources once more
    (size, identity and a digest      there         -->  what does the source have?  -->  equal: done
    of the contents)                                                                 -->  anything else is left

Each arrow is one exchange with a server, however many files there are. All promises are those of a file that is copied
alone: the claim, the verification, the look at the source afterwards. But whatever isn't plain, a failure for example,
is left to the steps that a large file takes (:class:`.Job`), which begin anew and say what's wrong.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Sequence

from pdiffcopy.blocks import FileInfo, Metadata, count_blocks
from pdiffcopy.client.delta import Sparse
from pdiffcopy.client.job import Job
from pdiffcopy.client.plan import Options, Plan, Result, Target, make_run
from pdiffcopy.client.planning import Planner, Side
from pdiffcopy.client.progress import Reporter
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.sides import MISSING, Creation, Question, group_files
from pdiffcopy.exceptions import ProgramError
from pdiffcopy.features import FEATURE_MANY
from pdiffcopy.replica import Reading
from pdiffcopy.wholes import MAX_WHOLE, FileSummary

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""How often small files are tried together before they are tried one by one."""


class SmallFiles:
    """Brings small files into line, or compares them (an object is used by all threads of a process)."""

    def __init__(self, options: Options, servers: Servers, reporter: Reporter):
        """
        Initialize it.

        :param options: What the user wants.
        :param servers: Where the replicas come from.
        """
        self.options, self.servers, self.reporter = options, servers, reporter
        self.grain = mmap.PAGESIZE
        """The size of the smallest hole that matters: a guess, until both sides have told."""

    @property
    def suits(self) -> bool:
        """Whether the user wants nothing that takes more than that."""
        wanted = self.options
        return wanted.sparse == Sparse.AUTO.value and not (
            wanted.atomic or wanted.fsync or wanted.drop_cache or wanted.bwlimit
        )

    def bring(self, jobs: Sequence[Job]) -> list[Report | None]:
        """Bring some files into line, and report on those that are (:data:`None`: nobody has done anything)."""
        reports: dict[int, Report] = {}
        left = [job for job in jobs if self.suits and (job.size or 0) <= MAX_WHOLE]
        for _ in range(ATTEMPTS if left else 0):
            try:
                group = _Group(self, left)
                for job, report in group.carry_out() if group.can_work else ():
                    reports[id(job)] = report
                break
            except ProgramError as e:
                logger.debug("Some small files aren't in line yet: %s", e)
            # What was created may be complete, and be what its owner can't write to: that's for the next look to tell.
            left = [job for job in left if id(job) not in reports]
            for job in left:
                job.is_new = False
        return [reports.get(id(job)) for job in jobs]


class _Group:
    """Some files at a time."""

    def __init__(self, company: SmallFiles, jobs: Sequence[Job]):
        self.company, self.options, self.jobs = company, company.options, jobs
        open_all = company.servers.open
        self.sources = group_files([open_all(job.source_address).pinned("", is_source=True) for job in jobs])
        self.targets = group_files([open_all(job.target_address) for job in jobs])
        origins = {(job.source_address.origin, job.target_address.origin) for job in jobs}
        common = self.sources.peer.features & self.targets.peer.features
        self.can_work = len(origins) == 1 and FEATURE_MANY in common

    def carry_out(self) -> Iterator[tuple[Job, Report]]:
        """Yield reports on those that are in line."""
        everything = range(len(self.jobs))
        method = self._make_planner(0, MISSING, MISSING).method
        question = Question(self.options.block_size, method, min(self.company.grain, self.options.block_size))
        # What seems to be missing, and isn't, won't be created.
        likely = [i for i in everything if not self.jobs[i].is_new]
        theirs = dict(zip(likely, self.targets.summarize(likely, question), strict=True)) if likely else {}
        missing = [i for i in everything if i not in theirs or ((there := theirs[i]) and not there.info.exists)]
        if self.options.delta_transfer:
            known = {i: found for i, found in theirs.items() if found and found.digest and not found.claim}
            yield from self._compare(known, question)
        if missing and not self.options.dry_run:
            yield from self._create(missing)

    def _make_planner(self, i: int, ours: FileInfo, theirs: FileInfo) -> Planner:
        job = self.jobs[i]
        job.source = Side(self.sources.replicas[i], ours, self.sources.peer)
        job.target = Side(self.targets.replicas[i], theirs, self.targets.peer)
        return Planner(job.source, job.target, self.options, is_given=False)

    # What is there {{{1

    def _compare(self, there: dict[int, FileSummary], question: Question) -> Iterator[tuple[Job, Report]]:
        ours = zip(there, self.sources.summarize(list(there), question), strict=True)
        plans = {i: plan for i, mine in ours if mine and (plan := self._judge(i, mine, there[i], question))}
        if self.options.wants_metadata and not self.options.dry_run:
            have = [dict(zip(plans, side.metadata(list(plans)), strict=True)) for side in (self.sources, self.targets)]
            plans = {i: plan for i, plan in plans.items() if self.options.are_alike(have[0][i], have[1][i])}
            plans = {i: plans[i] for i in self._find_unchanged({i: self.jobs[i].source.info for i in plans})}
        for i, plan in plans.items():
            job, blocks = self.jobs[i], count_blocks(plan.size, plan.block_size)
            report = job.report(plan, Result(blocks, bytes_compared=plan.size), there[i].info)
            self.company.reporter.advance(plan.size, 0)
            yield job, report._replace(claimed=there[i].claim is not None and not self.options.dry_run)

    def _judge(self, i: int, ours: FileSummary, theirs: FileSummary, question: Question) -> Plan | None:
        """Make the plan of a file that is equal already."""
        planner, job = self._make_planner(i, ours.info, theirs.info), self.jobs[i]
        plan = _plan(planner, job, Target(job.target_address, theirs.info, ours.info.size))
        if plan and plan.grain != question.grain:
            self.company.grain = plan.grain
            return None
        is_one = job.source_address.is_same(job.target_address) or ours.info.file_id == theirs.info.file_id
        is_equal = ours.digest == theirs.digest != "" and ours.info.size == theirs.info.size
        return plan if is_equal and not is_one else None

    # What is missing {{{1

    def _create(self, missing: list[int]) -> Iterator[tuple[Job, Report]]:
        run = make_run()
        plans: dict[int, Plan] = {}
        with self.sources.fetch(missing, self.options.verify) as wholes:
            # They are read after the sizes and the times, so whoever changes them from now on is noticed.
            wanted, creations = self._choose_metadata(missing), {}
            for i, whole in zip(missing, wholes, strict=True):
                metadata = wanted.get(i)
                if whole and metadata and (plan := self._plan_creation(i, whole[0], run)):
                    plans[i], creations[i] = plan, Creation(*whole, plan.fills_new_file, metadata)
            claims = dict(zip(creations, self.targets.create(creations, run), strict=True))
        made = [i for i, claimed in claims.items() if claimed is not None]
        for i in self._find_unchanged({i: creations[i].info for i in made}):
            report = self._report(i, plans[i], creations[i].reading)
            yield self.jobs[i], report._replace(claimed=claims[i] is True)

    def _choose_metadata(self, which: list[int]) -> dict[int, Metadata]:
        """Choose what new files get of the metadata of their sources. Those that can't be told are missing."""
        if not self.options.wants_metadata:
            return dict.fromkeys(which, Metadata())
        found = zip(which, self.sources.metadata(which), strict=True)
        return {i: self.options.select(metadata) for i, metadata in found if metadata}

    def _find_unchanged(self, before: dict[int, FileInfo]) -> list[int]:
        """Find the sources that are what they were."""
        after = zip(before, self.sources.infos(list(before)), strict=True)
        return [i for i, info in after if info and not before[i].describe_change(info)]

    def _plan_creation(self, i: int, info: FileInfo, run: str) -> Plan | None:
        job = self.jobs[i]
        plan = _plan(self._make_planner(i, info, MISSING), job, Target(job.target_address, MISSING, info.size, run))
        return plan if plan and plan.fills_new_file else None

    def _report(self, i: int, plan: Plan, reading: Reading) -> Report:
        blocks, size = count_blocks(plan.size, plan.block_size), plan.size
        self.company.reporter.advance(size, size)
        result = Result(blocks, blocks, size, size, size if reading.digest else 0)
        return self.jobs[i].report(plan, result, MISSING)


def _plan(planner: Planner, job: Job, target: Target) -> Plan | None:
    """Make a plan for what is nothing out of the ordinary."""
    try:
        job.planner = planner
        planner.check(writes=not job.options.dry_run)
    except ProgramError:
        return None
    source = planner.source.info
    plan = planner.make_plan(job.source_address, target)
    is_plain = source.exists and source.resizable and target.info.resizable and source.size <= MAX_WHOLE
    return plan if is_plain and plan.sparse in (Sparse.AUTO, Sparse.HIDDEN) else None
