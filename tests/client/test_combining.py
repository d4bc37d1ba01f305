"""Tests for :mod:`pdiffcopy.client.combining`: many threads, few requests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pdiffcopy.address import Address
from pdiffcopy.answers import PeerInfo
from pdiffcopy.bundles import PartAnswer
from pdiffcopy.client import combining
from pdiffcopy.client.combining import AT_A_TIME, CombiningServer
from pdiffcopy.exceptions import FileMissingError, TransientError
from pdiffcopy.features import FEATURES
from pdiffcopy.protocol import HashesRequest, InfoRequest


class Server:
    """Answers to names that are numbers."""

    peer = PeerInfo("2.0.0", FEATURES)

    def __init__(self):
        self.exchanges, self.alone = [], []
        self.is_open = threading.Event()
        self.is_open.set()
        self.error = None

    def get_address(self, filename):
        return Address(filename, "db", 8080, "http")

    @contextmanager
    def exchange(self, request, reading=None, expect=(200,)):
        self.alone.append(request.filename)
        yield f"alone {request.filename}"

    @contextmanager
    def exchange_many(self, server, requests, contents=()):
        """Stands in for :func:`.exchange_many`."""
        assert server is self
        self.exchanges.append(len(requests))
        self.is_open.wait(20)
        if self.error:
            raise self.error
        yield [(self.answer(request), ()) for request in requests]

    def answer(self, request):
        if isinstance(request, HashesRequest):
            return PartAnswer(413, b"")
        return PartAnswer(404 if request.filename == "13" else 200, f"told {request.filename}".encode())


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(combining, "exchange_many", server.exchange_many)
    return server


def ask(way, number):
    try:
        with way.exchange(InfoRequest(filename=str(number))) as answer:
            return answer.read_document().decode()
    except FileMissingError:
        return "missing"


def ask_meanwhile(server, way, numbers):
    """Let all ask, while the first one is on its way: what becomes of each."""
    server.is_open.clear()
    with ThreadPoolExecutor(len(numbers)) as executor:
        futures = [executor.submit(ask, way, number) for number in numbers]
        while len(way._waiting) < len(numbers) - 1:
            threading.Event().wait(0.01)
        server.is_open.set()
    return [future.exception() or future.result() for future in futures]


def test_whoever_waits_goes_with_the_next_one(server):
    """The first goes at once, all others together, and each gets its own answer."""
    way = CombiningServer(server, lambda: False)
    assert ask_meanwhile(server, way, range(20)) == [
        "missing" if number == 13 else f"told {number}" for number in range(20)
    ]
    assert server.exchanges == [1, 19]


def test_first_one_waits_where_others_are(server):
    """For a moment, so they go together."""
    way, count = CombiningServer(server), 5
    with ThreadPoolExecutor(count) as executor:
        together = threading.Barrier(count)

        def ask_with_others(number):
            together.wait(20)
            return ask(way, number)

        assert list(executor.map(ask_with_others, range(count))) == [f"told {number}" for number in range(count)]
    assert len(server.exchanges) < count


def test_requests_have_a_bound(server):
    """As many go together as one exchange can take."""
    way, count = CombiningServer(server, lambda: False), 3 * AT_A_TIME + 1
    numbers = range(100, 100 + count)
    assert ask_meanwhile(server, way, numbers) == [f"told {number}" for number in numbers]
    assert max(server.exchanges) == AT_A_TIME and sum(server.exchanges) == count


@pytest.mark.parametrize("error", [TransientError("gone"), KeyboardInterrupt()], ids=repr)
def test_failure_is_that_of_all_who_went(server, error):
    """And of nobody else: the next ones go again."""
    way = CombiningServer(server, lambda: False)
    server.error = error
    assert ask_meanwhile(server, way, range(5)) == [error] * 5
    server.error = None
    assert ask(way, 1) == "told 1"


def test_what_is_too_long_goes_alone(server):
    """The answer tells so."""
    way = CombiningServer(server)
    with way.exchange(HashesRequest(filename="7", method="sha1")) as answer:
        assert answer == "alone 7"
    assert server.exchanges == [1] and server.alone == ["7"]


def test_hashes_are_asked_for_alone_after_a_failure(server):
    """Then a server gives signs of life while its disk is slow."""
    way = CombiningServer(server)
    server.error = TransientError("timed out")
    with way.exchange(HashesRequest(filename="7", method="sha1")) as answer:
        assert answer == "alone 7"
    with pytest.raises(TransientError), way.exchange(InfoRequest(filename="8")):
        pass
    assert server.alone == ["7"]


def test_old_servers_get_one_request_at_a_time(server):
    """They'd not know what to do with several."""
    server.peer = PeerInfo("1.0.1", frozenset())
    with CombiningServer(server).exchange(InfoRequest(filename="1")) as answer:
        assert answer == "alone 1"
    assert not server.exchanges
