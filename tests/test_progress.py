"""Progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import select
import struct
import termios
import threading
from contextlib import contextmanager, redirect_stderr

import pytest

from pdiffcopy.progress import Bar, Reporter, make_reporter


@contextmanager
def terminal():
    """A terminal as stderr (not a fixture: pytest replaces stderr afterwards). Its value is a function that reads."""
    controller, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    os.set_blocking(controller, False)
    stream = open(follower, "w", encoding="utf-8")

    def read():
        stream.flush()
        parts = []
        # The kernel passes on what was written in its own time.
        while select.select([controller], [], [], 0.3)[0]:
            parts.append(os.read(controller, 65536))
        return b"".join(parts).decode()

    with stream, redirect_stderr(stream):
        yield read
    os.close(controller)


@pytest.fixture(autouse=True)
def talkative(caplog):
    """The level of messages that a command line without -q has."""
    caplog.set_level(logging.INFO)


def test_quiet_run_draws_nothing(caplog):
    """Who asks for less than messages gets no bar either."""
    caplog.set_level(logging.WARNING)
    with terminal():
        assert type(make_reporter(1000, "copying")) is Reporter


def test_bar_shows_what_was_compared_and_moved():
    """The label, the bytes compared of all, and the bytes moved; and it's wiped away at the end."""
    threads = threading.active_count()
    with terminal() as read:
        with make_reporter(10 * 1024 * 1024, "copying") as reporter:
            assert isinstance(reporter, Bar)
            reporter.advance(5 * 1024 * 1024, 1024 * 1024)
            reporter.bar.refresh()
            drawn = read()
            assert "copying: " in drawn and "50%" in drawn
            assert "5.00M/10.0M" in drawn and "1.00MB moved" in drawn and "B/s" in drawn
            reporter.advance(5 * 1024 * 1024, 2 * 1024 * 1024)
            reporter.bar.refresh()
            drawn = read()
            assert "100%" in drawn and "3.00MB moved" in drawn
            assert threading.active_count() == threads  # processes may be forked meanwhile
        assert read().endswith("\r")


def test_bar_of_an_empty_file():
    """Nothing to compare is no problem."""
    with terminal() as read:
        with make_reporter(0, "copying") as reporter:
            reporter.advance(0, 0)
        assert "copying" in read()


def test_bar_is_finished_by_an_error():
    """The line is free for the message when something goes wrong."""
    with terminal() as read:
        with pytest.raises(KeyError), make_reporter(10, "copying"):
            raise KeyError
        assert read().endswith("\r")


def test_nothing_is_drawn_elsewhere():
    """Without a terminal nothing is written."""
    stream = io.StringIO()
    with redirect_stderr(stream), make_reporter(100, "copying") as reporter:
        assert type(reporter) is Reporter
        reporter.advance(50, 50)
    assert stream.getvalue() == ""
