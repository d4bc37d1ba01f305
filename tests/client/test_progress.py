"""Progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import select
import struct
import termios
import threading
import time
from contextlib import contextmanager, redirect_stderr, suppress

import pytest

from pdiffcopy.client import progress
from pdiffcopy.client.progress import Bar, Reporter, make_reporter
from pdiffcopy.processes import make_counter

MIB = 1024 * 1024


@contextmanager
def terminal(columns=100):
    """A terminal as stderr (not a fixture: pytest replaces stderr afterwards). Its value is a function that reads."""
    controller, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    os.set_blocking(controller, False)
    stream = open(follower, "w", encoding="utf-8")

    def read():
        stream.flush()
        parts = []
        # The kernel passes on what was written in its own time, and a bar is drawn again and again.
        deadline = time.monotonic() + 0.5
        while select.select([controller], [], [], max(0, deadline - time.monotonic()))[0]:
            parts.append(os.read(controller, 65536))
        return b"".join(parts).decode()

    with stream, redirect_stderr(stream):
        yield read
    os.close(controller)


@pytest.fixture(autouse=True)
def talkative(caplog, monkeypatch):
    """The level of messages that a command line without -q has, and a bar that is drawn soon and often."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    monkeypatch.setattr(progress, "DELAY", 0)


def test_what_is_over_soon_draws_nothing(monkeypatch):
    """Nobody waits for it."""
    monkeypatch.setattr(progress, "DELAY", 60)
    with terminal() as read:
        with make_reporter(10 * MIB, 1, "copying") as reporter:
            reporter.advance(10 * MIB, 0)
        assert isinstance(reporter, Bar) and not read()


def test_quiet_run_draws_nothing(caplog):
    """Users who ask for less than messages get no bar either."""
    caplog.set_level(logging.WARNING)
    with terminal():
        assert type(make_reporter(1000, 1, "copying")) is Reporter


def test_bar_shows_what_was_compared_and_moved():
    """The label, the part that was compared, the rate, and the bytes moved; and it's wiped away at the end."""
    threads = threading.active_count()
    with terminal() as read:
        with make_reporter(10 * MIB, 1, "copying") as reporter:
            assert isinstance(reporter, Bar)
            assert "0%" in read()
            reporter.advance(5 * MIB, MIB)
            drawn = read()
            assert "copying: " in drawn and " 50%" in drawn and "1.00MB moved" in drawn and "B/s" in drawn
            reporter.advance(5 * MIB, 2 * MIB)
            drawn = read()
            assert "100%" in drawn and "3.00MB moved" in drawn
        assert threading.active_count() == threads
        assert read().endswith("\r")


def test_bar_is_redrawn_while_nothing_happens():
    """A terminal shows that the program is alive."""
    with terminal() as read, make_reporter(10 * MIB, 1, "copying"):
        read()
        assert read().count("\r") > 2


def test_bar_counts_what_child_processes_tell():
    """The bytes pass there."""
    with terminal() as read:
        reporter = make_reporter(10 * MIB, 1, "copying", make_counter=make_counter)
        child = os.fork()
        if not child:
            reporter.advance(5 * MIB, MIB)
            os._exit(0)
        os.waitpid(child, 0)
        with reporter:
            drawn = read()
        assert " 50%" in drawn and "1.00MB moved" in drawn


def test_bar_fits_a_narrow_terminal():
    """40 columns hold all of it, in a run of many hours and with the largest numbers, too."""
    with terminal(columns=40) as read, make_reporter(1023 * 2**40, 1, "Comparing") as reporter:
        read()
        reporter.advance(1000 * 2**20, 1000 * 2**40)
        lines = [re.sub(r"\x1b\[A|\n", "", line).rstrip() for line in read().split("\r")]
    assert max(map(len, lines)) <= 40
    assert re.search(r" 0%\|.*\|[0-9:]+, .*B/s, 0\.98PB moved$", lines[-1])


def test_bar_of_an_empty_file():
    """Nothing to compare is no problem."""
    with terminal() as read:
        with make_reporter(0, 1, "copying") as reporter:
            reporter.advance(0, 0)
        assert "copying" in read()


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"COLUMNS": "x"}])
def test_odd_environments_do_no_harm(monkeypatch, variables):
    """A bar that can't be drawn is left out."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with terminal(), make_reporter(10, 1, "copying") as reporter:
        reporter.advance(10, 10)


def test_terminal_that_goes_away_does_no_harm():
    """Nobody sees the bar then, and the run goes on."""
    controller, follower = os.openpty()
    stream = open(follower, "w", encoding="utf-8", buffering=1)
    with redirect_stderr(stream), make_reporter(10, 1, "copying") as reporter:
        os.close(controller)
        reporter.advance(10, 10)
    with suppress(OSError):
        stream.close()


def test_bar_is_finished_by_an_error():
    """The line is free for the message when something goes wrong."""
    with terminal() as read:
        with pytest.raises(KeyError), make_reporter(10, 1, "copying"):
            raise KeyError
        assert read().endswith("\r")


def test_nothing_is_drawn_elsewhere():
    """Without a terminal nothing is written."""
    stream = io.StringIO()
    with redirect_stderr(stream), make_reporter(100, 1, "copying") as reporter:
        assert type(reporter) is Reporter
        reporter.advance(50, 50)
    assert stream.getvalue() == ""
