"""Tests for :mod:`pdiffcopy.pace`: what passes in a second, with a clock of our own in place of the real one."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from functools import partial

import pytest

from pdiffcopy import pace
from pdiffcopy.exceptions import UsageError
from pdiffcopy.pace import CREDIT, LEAST_RATE, UNLIMITED, Limit, make_pace
from pdiffcopy.processes import Promise

pytestmark = pytest.mark.usefixtures("no_hang")

RATE = 1_000_000
NOW = 5000.0


class Clock:
    """Stands in for :mod:`time`: nobody waits, and each sleep is as long as it should be."""

    def __init__(self):
        self.now = NOW
        self.slept = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that nothing but a sleep moves on."""
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def take_many(limit: Limit, count: int) -> list[float]:
    """When the next bytes may pass, each time that some have passed at the same moment."""
    return [limit._move_clock(NOW, RATE // 10) for _ in range(count)]


@pytest.mark.parametrize("step", [1000, 7777, 250_000])
def test_bytes_pass_at_the_rate(clock, step):
    """Whatever the pieces are in which they pass, but for a moment at the beginning."""
    limit = Limit(RATE)
    for _ in range(10 * RATE // step):
        limit.take(step)
    assert clock.slept == pytest.approx(10 - CREDIT, abs=0.3)


def test_time_that_passes_by_itself_counts(clock):
    """Work that takes time makes the sleep shorter."""
    limit = Limit(RATE)
    limit.take(RATE)
    clock.now += 0.5 * CREDIT
    before = clock.slept
    limit.take(RATE)
    assert clock.slept - before == pytest.approx(1 - 0.5 * CREDIT)


def test_nothing_is_saved_for_later(clock):
    """After a pause the rate is what it was."""
    limit = Limit(RATE)
    limit.take(RATE)
    clock.now += 1000
    before = clock.slept
    limit.take(RATE)
    assert clock.slept - before == pytest.approx(1 - CREDIT)


@pytest.mark.parametrize("threads", [False, True], ids=["forked", "spawned"])
def test_processes_share_the_clock(threads):
    """Those that are forked and those that are spawned: each byte takes its time once."""
    limit, ended = Limit(RATE), threading.Event()
    other = threading.Thread(target=ended.wait)
    if threads:
        other.start()
    try:
        promises = [Promise(target=partial(take_many, limit, 20)) for _ in range(3)]
        found = take_many(limit, 20) + [moment for promise in promises for moment in promise.join()]
    finally:
        ended.set()
    assert sorted(found) == pytest.approx([NOW - CREDIT + 0.1 * count for count in range(1, 81)])


def test_threads_share_the_clock():
    """The lock of the process doesn't keep them apart, another one does."""
    limit, found = Limit(RATE), []
    threads = [threading.Thread(target=lambda: found.extend(take_many(limit, 50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == pytest.approx([NOW - CREDIT + 0.1 * count for count in range(1, 201)])


def hold_lock(limit: Limit, writer: int) -> None:
    fcntl.lockf(limit._clock.fileno(), fcntl.LOCK_EX)
    os.write(writer, b"held")
    signal.pause()


def test_process_that_is_killed_keeps_nobody_waiting():
    """Not even one that had the lock at that moment."""
    limit = Limit(RATE)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        hold_lock(limit, writer)
    try:
        assert os.read(reader, 4) == b"held"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert take_many(limit, 1) == pytest.approx([NOW - CREDIT + 0.1])


@pytest.mark.parametrize("rate", [LEAST_RATE, 65536, 10**7, 10**11])
def test_steps_are_short(rate):
    """At any rate many of them pass in a second, and none of them is empty."""
    step = Limit(rate).step
    assert step >= 1
    assert step / rate <= 1 / 16


def test_chunks_are_passed_on_before_the_wait(clock):
    """What has arrived is written, and then the next one waits: a chunk may be empty by then."""
    chunks, slept = [bytearray(size) for size in (RATE, 0, RATE // 2)], []
    for chunk in Limit(RATE).slow(chunks):
        slept.append(clock.slept)
        chunk.clear()
    assert [*slept, clock.slept] == pytest.approx([0, 1 - CREDIT, 1 - CREDIT, 1.5 - CREDIT])
    assert not any(chunks)


def test_without_a_limit_nothing_waits(clock):
    """There's nothing to share, either."""
    assert make_pace(0) is UNLIMITED
    UNLIMITED.take(10**15)
    chunks = [b"chunk"]
    assert UNLIMITED.slow(chunks) is chunks
    assert not clock.slept


@pytest.mark.parametrize("rate", [-1, 1, LEAST_RATE - 1])
def test_rates_that_nobody_means_are_refused(rate):
    """In words that name the smallest one."""
    with pytest.raises(UsageError, match="at least 1024 bytes a second"):
        make_pace(rate)


def test_limit_takes_its_descriptor_along():
    """When it isn't used any more."""
    before = set(os.listdir("/proc/self/fd"))
    limit = Limit(RATE)
    limit.take(1)
    del limit
    assert set(os.listdir("/proc/self/fd")) <= before
