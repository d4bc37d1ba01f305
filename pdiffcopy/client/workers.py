"""
How do processes share the work of a run?

::

    this process                 generator process              worker processes              this process
    ------------                 -----------------              ----------------              ------------
    look at a file, claim it,
    make its plan          -->   compare it, and
                                 make batches            -->    move a batch           -->    add up; look once more,
                                                                                              end the claim, report

All processes run before anything is touched, so that what this machine lacks for them is known. The next files are
compared while the last ones are still moving; there are at most :data:`IN_FLIGHT` between the first arrow and the last,
so memory doesn't grow with their number.

Batches overtake each other. So each has the number of its file, and behind those of a file comes how many there were:
when that and as many results have arrived, the file is done. A failure that concerns one file is a result, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.client.delta import Batch
from pdiffcopy.client.job import Ended, Job, attempt, concerns_one_file
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import Finder, transfer_batch
from pdiffcopy.client.plan import Options, Plan, Result
from pdiffcopy.client.progress import Reporter
from pdiffcopy.client.report import Report
from pdiffcopy.client.servers import Servers
from pdiffcopy.exceptions import ProgramError
from pdiffcopy.mp import WorkerPool, make_queue

IN_FLIGHT, SMALL_IN_FLIGHT = 6, 192
"""How many files may be on their way at the same time, and how many small ones."""
SMALL = 4 * 1024 * 1024
"""Up to which size a file is small, in bytes: a worker process does all that there is to do with it, for several at a
time, since it takes longer to ask for something than to do it."""
THREADS = 48
"""How many small files a worker process works on at the same time."""


class Small(NamedTuple):
    """A small file."""

    source: Address
    target: Address


Work = tuple[int, "Plan | Small", "Batch | ProgramError | int"]
"""What a worker gets: the number of a file, its plan, and a batch, a failure, or how many of those there were."""
Outcome = tuple[int, "Result | Report | ProgramError | int"]
"""What becomes of that."""

_room = threading.Lock()
"""Is held by the thread of a worker process that moves something large."""


def share(
    jobs: Iterable[Job], find: Finder, options: Options, servers: Servers, reporter: Reporter, is_alone: bool
) -> Iterator[Ended]:
    """
    Bring files into line.

    :param find: What one of the processes does.
    :param options: What the user wants.
    :param is_alone: Whether there is one file only, so that a failure ends all.
    :returns: A generator of what became of each file.
    """
    with _starting(find, options, servers, reporter, is_alone) as (outcomes, orders):
        for ended in _Flight(iter(jobs), orders, is_alone).watch(outcomes):
            reporter.end_file()
            yield ended


@contextmanager
def _starting(
    find: Finder, options: Options, servers: Servers, reporter: Reporter, is_alone: bool
) -> Iterator[tuple[Iterable[Outcome], Connection]]:
    """
    Start all processes. They wait for plans.

    :returns: The outcomes to come, and where orders for the generator process are sent to.
    """
    count = options.workers
    receiver, sender = Pipe(duplex=False)
    queue = make_queue(2 * count)
    pool = WorkerPool(
        concurrency=count,
        threads=1 if is_alone else THREADS,
        input_queue=queue,
        generator_fn=partial(_generate, find, servers, receiver, is_alone, queue.empty),
        worker_fn=_Worker(find, options, servers, reporter, is_alone),
    )
    with receiver, sender, pool, reporter:
        yield pool, sender


class _Flight:
    """The files of a run that are on their way."""

    def __init__(self, jobs: Iterator[Job], orders: Connection, is_alone: bool):
        """
        Initialize it.

        :param jobs: The files to come.
        :param orders: Where orders for the generator process are sent to.
        :param is_alone: Whether a failure ends the run, since there is no other file.
        """
        self.jobs, self.orders, self.is_alone = jobs, orders, is_alone
        self.running: dict[int, _Progress] = {}
        self.count = 0
        self.has_more = True

    def watch(self, outcomes: Iterable[Outcome]) -> Iterator[Ended]:
        """Begin one after the other, and yield what becomes of them."""
        yield from self._begin()
        for number, outcome in outcomes:
            progress = self.running[number]
            progress.note(outcome)
            if progress.error and progress.expected is None:
                self.orders.send(number)
            if progress.is_over:
                del self.running[number]
                yield progress.job, progress.error or progress.report or self._end(progress.job, progress.result)
                yield from self._begin()

    def _end(self, job: Job, result: Result) -> Report | ProgramError:
        return attempt(job, partial(job.end, result), self.is_alone)

    def _begin(self) -> Iterator[Ended]:
        while self.has_more and self._has_room():
            job = next(self.jobs, None)
            if not job:
                self.has_more = False
                self.orders.send(None)
                return
            plan = self._plan(job)
            if isinstance(plan, ProgramError):
                yield job, plan
                continue
            self.count += 1
            self.running[self.count] = _Progress(job, expected=1 if isinstance(plan, Small) else None)
            self.orders.send((self.count, plan))

    def _has_room(self) -> bool:
        large = sum(not is_small(progress.job) for progress in self.running.values())
        return large < IN_FLIGHT and len(self.running) < SMALL_IN_FLIGHT

    def _plan(self, job: Job) -> Plan | Small | ProgramError:
        if is_small(job):
            return Small(job.source_address, job.target_address)
        return attempt(job, job.begin, self.is_alone)


def is_small(job: Job) -> bool:
    """Whether a worker process does all that there is to do for a job."""
    return job.size is not None and job.size <= SMALL


class _Progress:
    """What is known of a file that is on its way."""

    def __init__(self, job: Job, expected: int | None):
        self.job = job
        self.result = Result()
        self.seen = 0
        self.expected = expected
        self.error: ProgramError | None = None
        self.report: Report | None = None

    def note(self, outcome: Result | Report | ProgramError | int) -> None:
        """Take note of what became of a batch or of a small file, or of how many there were."""
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


class _Orders:
    """What the generator process is told: plans, the numbers of files that have failed, and that there is no more."""

    def __init__(self, receiver: Connection):
        self.receiver = receiver
        self.plans: deque[tuple[int, Plan | Small] | None] = deque()
        self.failed: set[int] = set()

    def __iter__(self) -> Iterator[tuple[int, Plan | Small]]:
        while True:
            while not self.plans:
                self._take()
            if not (item := self.plans.popleft()):
                return
            yield item
            self.failed.discard(item[0])

    def has_failed(self, number: int) -> bool:
        """Whether there's nothing more to do for a file."""
        while self.receiver.poll():
            self._take()
        return number in self.failed

    def _take(self) -> None:
        order = self.receiver.recv()
        if isinstance(order, int):
            self.failed.add(order)
        else:
            self.plans.append(order)


def _generate(
    find: Finder, servers: Servers, receiver: Connection, is_alone: bool, is_awaited: Callable[[], bool]
) -> Iterator[Work]:
    """Do what the generator process does."""
    orders = _Orders(receiver)
    for number, plan in orders:
        if isinstance(plan, Small):
            yield number, plan, 1
            continue
        count = 0
        try:
            for batch in find(plan, servers, is_awaited):
                if orders.has_failed(number):
                    break
                yield number, plan, batch
                count += 1
        except ProgramError as e:
            if is_alone or not concerns_one_file(e):
                raise
            yield number, plan, e
            count += 1
        yield number, plan, count


class _Worker:
    """What a worker process does."""

    def __init__(self, find: Finder, options: Options, servers: Servers, reporter: Reporter, is_alone: bool):
        self.find, self.options, self.servers, self.reporter = find, options, servers, reporter
        self.is_alone = is_alone
        self.judge = Judge()
        self.small = Servers(servers.network, servers.pace, servers.drop, combines=True)

    def __call__(self, item: Work) -> Outcome:
        number, plan, work = item
        if isinstance(plan, Small):
            job = Job(*plan, self.options, self.small)
            return number, attempt(job, partial(job.carry_out, self.find, self.reporter, self.judge))
        if not isinstance(work, Batch):
            return number, work
        try:
            with _room:
                retries = self.servers.network.retries
                return number, transfer_batch(plan, work, self.servers, retries, self.reporter, self.judge)
        except ProgramError as e:
            if self.is_alone or not concerns_one_file(e):
                raise
            return number, e
