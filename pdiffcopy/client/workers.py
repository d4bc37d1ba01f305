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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Queue, SimpleQueue
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
from pdiffcopy.client.small import SmallFiles
from pdiffcopy.exceptions import ProgramError
from pdiffcopy.mp import WorkerPool, make_queue
from pdiffcopy.wholes import MAX_WHOLE

IN_FLIGHT, SMALL_IN_FLIGHT = 6, 192
"""How many files may be on their way at the same time, and how many small ones."""
GROUP, GROUP_SIZE = 32, 32 * 1024 * 1024
"""How many small files a worker process works on at a time, and how many bytes they have at most."""
COMPARED_AT_A_TIME = 2
"""How many files are compared at the same time."""
THREADS = 2
"""How many threads of a worker process do something: one goes on while the other one waits for a server."""


class Small(NamedTuple):
    """A small file: a worker process does all that there is to do with it (:mod:`.small`)."""

    number: int
    source: Address
    target: Address
    is_new: bool


Work = tuple[int, "Plan | list[Small]", "Batch | ProgramError | int"]
"""What a worker gets: the number of a file, its plan, and a batch, a failure, or how many of those there were; or some
small files."""
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
) -> Iterator[tuple[Iterable[list[Outcome]], Connection]]:
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
        generator_fn=partial(_Comparisons, find, servers, receiver, is_alone, queue.empty),
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
        self.has_more, self.has_said_so = True, False
        self.group: list[Small] = []
        self.group_size = 0

    def watch(self, outcomes: Iterable[list[Outcome]]) -> Iterator[Ended]:
        """Begin one after the other, and yield what becomes of them."""
        yield from self._begin()
        for found in outcomes:
            for number, outcome in found:
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
            elif is_small(job):
                self._add(job)
            else:
                plan = attempt(job, job.begin, self.is_alone)
                if isinstance(plan, ProgramError):
                    yield job, plan
                else:
                    self.orders.send((self._note(_Progress(job, expected=None)), plan))
        self._send_group()
        if not self.has_more and not self.has_said_so:
            self.has_said_so = True
            self.orders.send(None)

    def _has_room(self) -> bool:
        large = sum(not is_small(progress.job) for progress in self.running.values())
        return large < IN_FLIGHT and len(self.running) < SMALL_IN_FLIGHT

    def _note(self, progress: _Progress) -> int:
        self.count += 1
        self.running[self.count] = progress
        return self.count

    def _add(self, job: Job) -> None:
        """Let a small file be one of the next group."""
        size = job.size or 0
        if len(self.group) == GROUP or self.group_size + size > GROUP_SIZE:
            self._send_group()
        number = self._note(_Progress(job, expected=1))
        self.group.append(Small(number, job.source_address, job.target_address, job.is_new))
        self.group_size += size

    def _send_group(self) -> None:
        if self.group:
            self.orders.send((self.group[0].number, self.group))
        self.group, self.group_size = [], 0


def is_small(job: Job) -> bool:
    """Whether a worker process does all that there is to do for a job."""
    return job.size is not None and job.size <= MAX_WHOLE


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


class _Comparisons:
    """
    What the generator process does: an iterable of work.

    It compares some files at a time, so that one goes on while another one begins or ends.
    """

    def __init__(
        self, find: Finder, servers: Servers, orders: Connection, is_alone: bool, is_idle: Callable[[], bool]
    ):  # fmt: skip
        """
        Initialize it.

        :param orders: Brings plans and small files, the numbers of files that have failed, and :data:`None` at the end.
        :param is_idle: Whether no work is left for the workers.
        """
        self.find, self.servers, self.orders, self.is_alone, self.is_idle = find, servers, orders, is_alone, is_idle
        self.unfinished: set[int] = set()
        self.failed: set[int] = set()
        self.plans: SimpleQueue[tuple[int, Plan] | None] = SimpleQueue()
        self.work: Queue[Work | BaseException | None] = Queue(1)

    def __iter__(self) -> Iterator[Work]:
        """Begin, and yield what there is to do."""
        # After a failure nobody takes what they have found, so the process can't wait for them.
        for target in (self._take_orders, *[self._compare_all] * COMPARED_AT_A_TIME):
            threading.Thread(target=target, daemon=True).start()
        for _ in range(COMPARED_AT_A_TIME):
            while item := self.work.get():
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _take_orders(self) -> None:
        try:
            while order := self.orders.recv():
                if isinstance(order, int):
                    self.failed.add(order)
                    continue
                number, plan = order
                if isinstance(plan, list):
                    self.work.put((number, plan, 1))
                else:
                    self.unfinished.add(number)
                    self.plans.put(order)
            for _ in range(COMPARED_AT_A_TIME):
                self.plans.put(None)
        except BaseException as e:
            self.work.put(e)

    def _compare_all(self) -> None:
        while order := self.plans.get():
            self._compare(*order)
        self.work.put(None)

    def _compare(self, number: int, plan: Plan) -> None:
        count = 0
        try:
            for batch in self.find(plan, self.servers, self._is_awaited):
                if number in self.failed:
                    break
                self.work.put((number, plan, batch))
                count += 1
        except ProgramError as e:
            self.work.put(e if self.is_alone or not concerns_one_file(e) else (number, plan, e))
            count += 1
        except BaseException as e:
            self.work.put(e)
        self.unfinished.discard(number)
        self.failed.discard(number)
        self.work.put((number, plan, count))

    def _is_awaited(self) -> bool:
        """Whether workers wait for what is found in this file: there's no other one that they may get something of."""
        return len(self.unfinished) == 1 and self.is_idle()


class _Worker:
    """What a worker process does."""

    def __init__(self, find: Finder, options: Options, servers: Servers, reporter: Reporter, is_alone: bool):
        self.find, self.options, self.servers, self.reporter = find, options, servers, reporter
        self.is_alone = is_alone
        self.judge = Judge()
        self.small = SmallFiles(options, servers, reporter)
        self.combining = Servers(servers.network, servers.pace, servers.drop, combines=True)

    def __call__(self, item: Work) -> list[Outcome]:
        number, plan, work = item
        return self._bring(plan) if isinstance(plan, list) else [(number, self._move(plan, work))]

    def _bring(self, files: list[Small]) -> list[Outcome]:
        """Bring small files into line: those that are plain at once, the others side by side."""
        jobs = {
            file.number: Job(file.source, file.target, self.options, self.combining, is_new=file.is_new)
            for file in files
        }
        found = self.small.bring(list(jobs.values())) if self.small.suits else [None] * len(jobs)
        outcomes: list[Outcome] = [(number, report) for number, report in zip(jobs, found, strict=True) if report]
        rest = [number for number, report in zip(jobs, found, strict=True) if not report]
        if not rest:
            return outcomes
        with ThreadPoolExecutor(len(rest)) as executor:
            return [
                *outcomes,
                *zip(rest, executor.map(self._bring_alone, [jobs[number] for number in rest]), strict=True),
            ]

    def _bring_alone(self, job: Job) -> Report | ProgramError:
        return attempt(job, partial(job.carry_out, self.find, self.reporter, self.judge))

    def _move(self, plan: Plan, work: Batch | ProgramError | int) -> Result | ProgramError | int:
        if not isinstance(work, Batch):
            return work
        try:
            with _room:
                retries = self.servers.network.retries
                return transfer_batch(plan, work, self.servers, retries, self.reporter, self.judge)
        except ProgramError as e:
            if self.is_alone or not concerns_one_file(e):
                raise
            return e
