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
compared while the last ones are still moving. What the client process does about that is in :mod:`.flight`.

Batches overtake each other. So each has the number of its file, and behind those of a file comes how many there were:
when that and as many results have arrived, the file is done. A failure that concerns one file is a result, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import Queue, SimpleQueue

from pdiffcopy.client.delta import Batch
from pdiffcopy.client.flight import Flight, Order, Orders, Outcome, Outcomes, Small
from pdiffcopy.client.job import Ended, Job, attempt, attempt_all, concerns_one_file
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import Finder, transfer_batch
from pdiffcopy.client.plan import Options, Plan, Result
from pdiffcopy.client.progress import Reporter
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.small import SmallFiles
from pdiffcopy.exceptions import ProgramError
from pdiffcopy.mp import WorkerPool, make_queue

COMPARED_AT_A_TIME = 3
"""How many files are compared at the same time."""
THREADS = 2
"""How many threads of a worker process do something: one goes on while the other one waits for a server."""


Work = tuple[int, "Plan | list[Small]", "Batch | ProgramError | int"]
"""What a worker gets: the number of a file, its plan, and a batch, a failure, or how many of those there were; or some
small files."""

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
    jobs, own = iter(jobs), servers
    if not is_alone:
        servers = servers.sharing(options.concurrency)
        own = servers.combined()
        jobs = _look_ahead(jobs, own)
    with _starting(find, options, servers, reporter, is_alone) as (outcomes, orders):
        flight = Flight(jobs, own, orders, is_alone)
        for ended in flight.watch(outcomes):
            reporter.end_file()
            yield ended


def _look_ahead(jobs: Iterator[Job], servers: Servers) -> Iterator[Job]:
    """Look at the first file, so that all processes know what the servers can do."""
    if first := next(jobs, None):
        first.servers = servers
        attempt(first, partial(first.look, writes=True))  # what forbids it is told when it begins
        return chain([first], jobs)
    return jobs


@contextmanager
def _starting(
    find: Finder, options: Options, servers: Servers, reporter: Reporter, is_alone: bool
) -> Iterator[tuple[Outcomes, Orders]]:
    """
    Start all processes. They wait for plans.

    :returns: The outcomes to come, and who takes orders for the generator process.
    """
    count = options.workers
    orders, queue = _Orders(), make_queue(2 * count)
    pool = WorkerPool(
        concurrency=count,
        threads=1 if is_alone else THREADS,
        input_queue=queue,
        generator_fn=partial(_Comparisons, find, servers, orders.receiver, is_alone, queue.empty),
        worker_fn=_Worker(find, options, servers, reporter, is_alone),
    )
    with orders, pool, reporter:
        yield pool, orders


class _Orders:
    """
    Orders for the generator process (a context manager, within which all processes begin and end).

    A thread sends them: who gives them has to notice when a process is killed, and may not wait for it.
    """

    def __init__(self) -> None:
        self.receiver, self._sender = Pipe(duplex=False)
        # They're pickled by who gives them, who is told if that can't be. An empty one is the end.
        self._given: SimpleQueue[memoryview] = SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, daemon=True)

    def __enter__(self) -> _Orders:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.receiver.close()  # so that there's nobody left whom the thread could wait for
        self._given.put(memoryview(b""))
        if self._thread.is_alive():
            self._thread.join()
        self._sender.close()

    def send(self, order: Order) -> None:
        """Give an order. All processes run by then: where there are threads, they can't be forked."""
        if not self._thread.ident:
            self._thread.start()
        self._given.put(ForkingPickler.dumps(order))

    def _send_all(self) -> None:
        with suppress(OSError):
            while order := self._given.get():
                self._sender.send_bytes(order)


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
        self.groups: SimpleQueue[Work | None] = SimpleQueue()
        self.work: Queue[Work | BaseException | None] = Queue(1)

    def __iter__(self) -> Iterator[Work]:
        """Begin, and yield what there is to do."""
        # After a failure nobody takes what they have found, so the process can't wait for them.
        finders = (self._pass_groups, *[self._compare_all] * COMPARED_AT_A_TIME)
        for target in (self._take_orders, *finders):
            threading.Thread(target=target, daemon=True).start()
        for _ in finders:
            while item := self.work.get():
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _take_orders(self) -> None:
        # It never waits for workers: they may wait for the client, which waits until its orders are taken.
        try:
            while True:
                order = self.orders.recv()
                if isinstance(order, int):
                    self.failed.add(order)
                elif order is None:  # of those that are being compared, one may still fail
                    self.groups.put(None)
                    for _ in range(COMPARED_AT_A_TIME):
                        self.plans.put(None)
                elif isinstance(order[1], list):
                    self.groups.put((order[0], order[1], 1))
                else:
                    self.unfinished.add(order[0])
                    self.plans.put(order)
        except BaseException as e:
            self.work.put(e)

    def _pass_groups(self) -> None:
        while group := self.groups.get():
            self.work.put(group)
        self.work.put(None)

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
        self.combined = servers.combined()

    def __call__(self, item: Work) -> list[Outcome]:
        number, plan, work = item
        return self._bring(plan) if isinstance(plan, list) else [(number, self._move(plan, work))]

    def _bring(self, files: list[Small]) -> list[Outcome]:
        """Bring small files into line: those that are plain at once, the others side by side."""
        jobs = {
            file.number: Job(file.source, file.target, self.options, self.combined, size=file.size, is_new=file.is_new)
            for file in files
        }
        found = self.small.bring(list(jobs.values()))
        outcomes: list[Outcome] = [(number, report) for number, report in zip(jobs, found, strict=True) if report]
        rest = [number for number, report in zip(jobs, found, strict=True) if not report]
        if not rest:
            return outcomes
        move = self.find, self.reporter, self.judge
        actions = [(jobs[number], partial(jobs[number].carry_out, *move)) for number in rest]
        return [*outcomes, *zip(rest, attempt_all(actions), strict=True)]

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
