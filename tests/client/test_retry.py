"""Patience with a network that fails."""

from __future__ import annotations

import logging
import time

import pytest

from pdiffcopy.client.retry import FIRST_DELAY, LONGEST_DELAY, Patience
from pdiffcopy.exceptions import ProtocolError, TransientError


@pytest.fixture
def delays(monkeypatch):
    """What would have been slept, in seconds."""
    delays = []
    monkeypatch.setattr(time, "sleep", delays.append)
    return delays


def fail(*failures):
    """A function that raises each of these errors once, and works then."""
    pending = list(failures)

    def action():
        if pending:
            raise pending.pop(0)
        return "done"

    return action


def test_success_needs_no_patience(delays):
    """What works at once isn't delayed."""
    patience = Patience(3)
    assert patience.persist(fail()) == "done"
    assert (patience.total, delays) == (0, [])


def test_failures_are_forgiven(delays, caplog):
    """An action is repeated until it works, and each failure is logged with its cause."""
    patience = Patience(3)
    with caplog.at_level(logging.WARNING):
        assert patience.persist(fail(TransientError("no route"), TransientError("reset"))) == "done"
    assert patience.total == len(delays) == 2
    assert "no route" in caplog.messages[0] and "reset" in caplog.messages[1]


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_patience_ends(delays, retries):
    """After as many repetitions as allowed, the last error is raised."""
    errors = [TransientError(str(number)) for number in range(10)]
    patience = Patience(retries)
    with pytest.raises(TransientError) as info:
        patience.persist(fail(*errors))
    assert info.value is errors[retries]
    assert patience.total == len(delays) == retries


def test_success_renews_patience(delays):
    """Only failures in a row count, for the end as well as for the delay."""
    patience = Patience(1)
    for _ in range(5):
        patience.failed(TransientError("again"))
        patience.succeeded()
    assert patience.total == 5
    assert max(delays) <= FIRST_DELAY * 1.5
    patience.failed(TransientError("again"))
    with pytest.raises(TransientError):
        patience.failed(TransientError("again"))


def test_delays_grow_up_to_a_limit(delays):
    """Each delay is twice the one before, spread by half, and never longer than the longest."""
    patience = Patience(30)
    for _ in range(30):
        patience.failed(TransientError("again"))
    for number, delay in enumerate(delays):
        expected = min(FIRST_DELAY * 2**number, LONGEST_DELAY)
        assert expected * 0.5 <= delay <= expected * 1.5
    assert len(set(delays[10:])) > 1  # clients don't come back in step


def test_patience_may_be_endless(delays):
    """However often something fails, the next delay can be computed."""
    patience = Patience(5000)
    for _ in range(2000):
        patience.failed(TransientError("again"))
    assert delays[-1] <= LONGEST_DELAY * 1.5


def test_other_errors_are_not_repeated(delays):
    """What won't go away by waiting is raised at once."""
    with pytest.raises(ProtocolError):
        Patience(5).persist(fail(ProtocolError("nonsense")))
    assert delays == []
