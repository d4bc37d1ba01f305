"""Tests for :mod:`pdiffcopy.client.flight`: which files are on their way."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import count
from multiprocessing import Pipe

import pytest

from pdiffcopy.address import Address
from pdiffcopy.client import Client, flight
from pdiffcopy.client.flight import GROUP, IN_FLIGHT, MAX_SMALL, MOST_IN_FLIGHT, SMALL_IN_FLIGHT, Flight
from pdiffcopy.client.job import Job
from pdiffcopy.client.network import Network
from pdiffcopy.client.plan import Result
from pdiffcopy.client.servers import Servers
from pdiffcopy.exceptions import FileError, WorkerError
from pdiffcopy.localreplica import LocalReplica
from tests.support import make_data, write_pattern

LARGE = MAX_SMALL + 1


class Recorded(Job):
    """A job that does nothing but to remember what was asked of it, and by whom."""

    def __init__(self, log, number, size):
        super().__init__(Address(f"/s{number}"), Address(f"/t{number}"), None, None, size=size)
        self.log, self.number = log, number

    def begin(self):
        self.log.append(("begin", self.number))
        if self.number == 3:
            raise FileError("can't begin")
        return f"plan {self.number}"

    def end(self, result):
        self.log.append(("end", self.number))
        return f"report {self.number}, {result.bytes_moved}"


class Outcomes:
    """What others pass on: for each file that has begun a result, and how many there were."""

    def __init__(self, orders):
        self.orders, self.most, self.large = orders, 0, 0
        self.has_ended = False

    def is_ready(self, patience=0):
        return False

    def __iter__(self):
        waiting = []
        while True:
            while not self.has_ended and self.orders.poll():
                order = self.orders.recv()
                self.has_ended = order is None
                waiting += [order] if order else []
            files = [file for _, plan in waiting for file in (plan if isinstance(plan, list) else [plan])]
            self.most = max(self.most, len(files))
            if not waiting:
                assert self.has_ended
                return
            number, plan = waiting.pop(0)
            if isinstance(plan, list):
                assert len(plan) <= GROUP and sum(file.size for file in plan) <= flight.GROUP_SIZE
                yield [(file.number, FileError("no")) for file in plan]
            else:
                yield [(number, Result(bytes_moved=7))]
                yield [(number, 1)]


def watch(sizes):
    """Let files fly, and return what became of them, in which order, and how many were in the air."""
    log = []
    receiver, sender = Pipe(duplex=False)
    jobs = (Recorded(log, number, size) for number, size in zip(count(), sizes, strict=False))
    outcomes = Outcomes(receiver)
    with receiver, sender:
        flown = Flight(jobs, Servers(Network()), sender, is_alone=False)
        ended = {job.number: str(ended) for job, ended in flown.watch(outcomes)}
    return ended, log, outcomes


def test_large_files_begin_and_end():
    """Each once, and one that can't begin is no burden for the others."""
    ended, log, outcomes = watch([LARGE] * 40)
    assert ended == {number: "can't begin" if number == 3 else f"report {number}, 7" for number in range(40)}
    assert sorted(log) == sorted(
        [("begin", number) for number in range(40)] + [("end", number) for number in range(40) if number != 3]
    )
    assert IN_FLIGHT < outcomes.most <= MOST_IN_FLIGHT


def test_lost_results_are_missed():
    """Whatever may be the reason: a run that doesn't know what became of a file has failed."""
    receiver, sender = Pipe(duplex=False)

    class Silent(Outcomes):
        def __iter__(self):
            yield [(self.orders.recv()[0], Result(bytes_moved=7))]

    jobs = (Recorded([], number, LARGE) for number in (0, 1))
    with receiver, sender, pytest.raises(WorkerError, match="without a word about 2 files"):
        list(Flight(jobs, Servers(Network()), sender, is_alone=False).watch(Silent(receiver)))


def test_file_that_is_over_waits_for_others_but_not_for_long():
    """Whatever else comes in meanwhile: its source is looked at once more then, and not at the end of the run."""
    log = []
    receiver, sender = Pipe(duplex=False)

    class Slow:
        """The first file goes on and on, the others are over at once."""

        def is_ready(self, patience=0):
            time.sleep(min(patience, 0.01))
            return patience > 0.01

        def __iter__(self):
            numbers = [receiver.recv()[0] for _ in range(3)]
            yield [(number, 0) for number in numbers[1:2]]
            yield [(number, 0) for number in numbers[2:]]
            for _ in range(300):
                log.append(("batch", 0))
                yield [(numbers[0], Result(bytes_moved=7))]
            yield [(numbers[0], 300)]

    jobs = (Recorded(log, number, LARGE) for number in (0, 1, 2))
    with receiver, sender:
        list(Flight(jobs, Servers(Network()), sender, is_alone=False).watch(Slow()))
    ends = [what for what in log if what[0] == "end"]
    assert ends[-1] == ("end", 0) and sorted(ends) == [("end", 0), ("end", 1), ("end", 2)]
    assert log.index(("end", 2)) < 150
    # They went together.
    assert log.index(("end", 2)) - log.index(("end", 1)) in (-1, 1)


def test_few_files_fly_that_are_very_large():
    """Memory, new versions and room on the disk are those of a few."""
    _, _, outcomes = watch([2**40] * 20)
    assert outcomes.most == IN_FLIGHT


def test_small_files_fly_in_groups():
    """Nobody begins or ends them here."""
    ended, log, outcomes = watch([100] * 500)
    assert ended == dict.fromkeys(range(500), "no") and not log
    assert outcomes.most == SMALL_IN_FLIGHT


@pytest.mark.parametrize("kind", ["upload", "download", "local"])
def test_many_large_files_of_all_kinds(server, tmp_path, monkeypatch, kind):
    """Twice in one process, which is left without threads of ours."""
    monkeypatch.setattr(flight, "MAX_SMALL", 0)
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    for number in range(30):
        write_pattern(tmp_path / "source" / f"f{number}", 20_000 + number, number)
        if number % 3:
            write_pattern(tmp_path / "target" / f"f{number}", 20_000, number * (number % 3))
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    locations = {
        "source": server.location(source) if kind == "download" else source,
        "target": server.location(target) if kind == "upload" else target,
    }
    for _ in range(2):
        files = list(Client(**locations, recursive=True, block_size=4096).run_files())
        assert not [file.error for file in files if file.error] and len(files) == 30
        for number in range(30):
            assert (tmp_path / "target" / f"f{number}").read_bytes() == make_data(20_000 + number, number)
        assert threading.active_count() == 1


def test_interrupted_run_does_not_wait_for_its_threads(tmp_path, monkeypatch):
    """They may wait for a network that is gone."""
    monkeypatch.setattr(flight, "MAX_SMALL", 0)
    (tmp_path / "source").mkdir()
    for number in range(5):
        write_pattern(tmp_path / "source" / f"f{number}", 20_000, number)
    is_over, look = threading.Event(), LocalReplica.claim

    def hang(replica, *arguments):
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
            is_over.wait(20)
        return look(replica, *arguments)

    monkeypatch.setattr(LocalReplica, "claim", hang)
    client = Client(source=str(tmp_path / "source"), target=str(tmp_path / "target"), recursive=True)
    with pytest.raises(KeyboardInterrupt):
        list(client.run_files())
    assert not is_over.is_set()
    is_over.set()
