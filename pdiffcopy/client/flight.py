"""
Which files of a run are on their way?

This is what the client process does while others compare and move (:mod:`.workers`): it begins files, adds up what
becomes of them, and ends them. Both take some requests each, so all that can begin (or end) at a time do so side by
side, and what they ask a server goes there together (:mod:`.combining`): a round trip is paid for many files at once.

Small files are different: a worker process does all that there is to do for some of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from pdiffcopy.address import Address
from pdiffcopy.client.job import Ended, Job, attempt_all
from pdiffcopy.client.plan import Plan, Result
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Servers
from pdiffcopy.exceptions import ProgramError, WorkerError

MAX_SMALL = 32 * 1024 * 1024
"""How many bytes a small file has at most."""
GROUP, GROUP_SIZE = 32, 32 * 1024 * 1024
"""How many small files a worker process works on at a time, and how many bytes they have at most."""
SMALL_IN_FLIGHT = 192
"""How many files may be on their way at the same time, if they're small."""
IN_FLIGHT = 6
"""How many others may, whatever their size..."""
MOST_IN_FLIGHT, IN_FLIGHT_SIZE = 24, 1024**3
"""... and how many if they don't have more bytes than that together."""
FIRST_BEGUN = 2
"""How many of these begin at a time at first. It's twice as many each time."""
COMPANY, PATIENCE = 4, 0.1
"""How many files that are over end together, and how long the first of them waits for the others, in seconds."""


class Small(NamedTuple):
    """A small file."""

    number: int
    source: Address
    target: Address
    size: int
    is_new: bool


Outcome = tuple[int, "Result | Report | ProgramError | int"]
"""The number of a file, and what became of a batch or of a small file, or how many of those there were."""


Order = tuple[int, Plan | list[Small]] | int | None
"""A file to compare or some small ones, one that has failed, or that there are no more."""


class Orders(Protocol):
    """Who takes orders."""

    def send(self, order: Order) -> None:
        """Give one. Nobody waits until it's carried out."""


class Outcomes(Protocol):
    """What other processes pass on."""

    def __iter__(self) -> Iterator[list[Outcome]]:
        """Wait for what there is."""

    def is_ready(self, patience: float = 0) -> bool:
        """Whether there is something, or will be within a number of seconds."""


class Flight:
    """The files that are on their way."""

    def __init__(self, jobs: Iterator[Job], servers: Servers, orders: Orders, is_alone: bool):
        """
        Initialize it.

        :param jobs: The files to come.
        :param servers: Where their replicas come from.
        :param orders: Takes orders for the generator process.
        :param is_alone: Whether a failure ends the run, since there is no other file.
        """
        self.jobs, self.servers, self.orders, self.is_alone = jobs, servers, orders, is_alone
        self.next: Job | None = next(jobs, None)
        self.running: dict[int, _Progress] = {}
        self.over: list[_Progress] = []
        self.count, self.most_begun = 0, FIRST_BEGUN
        self.group: list[Small] = []
        self.has_said_all = False

    def watch(self, outcomes: Outcomes) -> Iterator[Ended]:
        """Begin one after the other, and yield what becomes of them."""
        yield from self._begin()
        for found in outcomes:
            for number, outcome in found:
                self._note(number, outcome)
            if not outcomes.is_ready(self._get_patience()):
                yield from self._end()
                yield from self._begin()
        if count := len(self.running) + len(self.over):
            raise WorkerError("The processes have ended without a word about {count} files", count=count)

    def _note(self, number: int, outcome: Result | Report | ProgramError | int) -> None:
        progress = self.running[number]
        progress.note(outcome)
        if progress.error and progress.expected is None:
            self.orders.send(number)
        if progress.is_over:
            self.over.append(self.running.pop(number))

    def _get_patience(self) -> float:
        """How long files that are over wait for others. (What the batches of those bring doesn't make it longer.)"""
        has_few = self.running and 0 < len(self.over) < COMPANY
        return max(0, self.over[0].noted + PATIENCE - time.monotonic()) if has_few else 0

    def _end(self) -> Iterator[Ended]:
        over, self.over = self.over, []
        actions = [(done.job, partial(done.job.end, done.result)) for done in over if not done.outcome]
        ended = iter(attempt_all(actions, self.is_alone))
        for done in over:
            yield done.job, done.outcome or next(ended)

    def _begin(self) -> Iterator[Ended]:
        while jobs := self._choose():
            plans = attempt_all([(job, job.begin) for job in jobs], self.is_alone)
            for job, plan in zip(jobs, plans, strict=True):
                if isinstance(plan, ProgramError):
                    yield job, plan
                else:
                    self.orders.send((self._follow(job, expected=None), plan))
        self._send_group()
        if not self.next and not self.has_said_all:
            self.has_said_all = True
            self.orders.send(None)

    def _choose(self) -> list[Job]:
        """Choose those that begin now. (Small ones are put into groups.)"""
        chosen: list[Job] = []
        while self.next and len(chosen) < self.most_begun and self._has_room(self.next, chosen):
            job, self.next = self.next, next(self.jobs, None)
            if is_small(job):
                self._add(job)
            else:
                job.servers = self.servers
                chosen.append(job)
        # Not all at once at first: the sooner the first one has begun, the sooner all others have something to do.
        self.most_begun = min(2 * self.most_begun, MOST_IN_FLIGHT)
        return chosen

    def _has_room(self, job: Job, chosen: Sequence[Job]) -> bool:
        if is_small(job):
            return len(chosen) + len(self.running) < SMALL_IN_FLIGHT
        others = [*chosen, *(progress.job for progress in self.running.values())]
        sizes = [other.size or 0 for other in others if not is_small(other)]
        return len(sizes) < IN_FLIGHT or (
            len(sizes) < MOST_IN_FLIGHT and sum(sizes) + (job.size or 0) <= IN_FLIGHT_SIZE
        )

    def _follow(self, job: Job, expected: int | None) -> int:
        """Note that a file is on its way, and give it a number."""
        self.count += 1
        self.running[self.count] = _Progress(job, expected)
        return self.count

    def _add(self, job: Job) -> None:
        """Let a small file be one of the next group."""
        size = job.size or 0
        if len(self.group) == GROUP or size + sum(file.size for file in self.group) > GROUP_SIZE:
            self._send_group()
        number = self._follow(job, expected=1)
        self.group.append(Small(number, job.source_address, job.target_address, size, job.is_new))

    def _send_group(self) -> None:
        if self.group:
            self.orders.send((self.group[0].number, self.group))
        self.group = []


def is_small(job: Job) -> bool:
    """Whether a worker process does all that there is to do for a job."""
    return job.size is not None and job.size <= MAX_SMALL


class _Progress:
    """What is known of a file that is on its way."""

    def __init__(self, job: Job, expected: int | None):
        self.job = job
        self.result = Result()
        self.seen = 0
        self.noted = 0.0
        self.expected = expected
        self.error: ProgramError | None = None
        self.report: Report | None = None

    def note(self, outcome: Result | Report | ProgramError | int) -> None:
        """Take note of what became of a batch or of a small file, or of how many there were."""
        self.noted = time.monotonic()
        if isinstance(outcome, int):
            self.expected = outcome
            return
        self.seen += 1
        if isinstance(outcome, Result):
            self.result += outcome
        elif isinstance(outcome, Report):
            self.report = outcome
        else:
            self.error = self.error or self.job.explain(outcome)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is on its way any more."""
        return self.seen == self.expected

    @property
    def outcome(self) -> Report | ProgramError | None:
        """What became of it, unless it has to be ended first."""
        return self.error or self.report
