"""Who is a client: somebody who knows the token, and no web page."""

from __future__ import annotations

import socket
import time

import pytest

from pdiffcopy.exceptions import AuthenticationError, ForbiddenError
from pdiffcopy.server import admission
from pdiffcopy.server.admission import Gate, Guesses

TOKEN = "sesame-open"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """This machine is called db2, and db2.example.org by a name server."""
    asked = []
    monkeypatch.setattr(socket, "gethostname", lambda: "DB2")
    monkeypatch.setattr(socket, "getfqdn", lambda: asked.append(1) or "db2.example.org")
    for function in (admission._get_machine_name, admission._get_full_name):
        function.cache_clear()
    yield asked
    for function in (admission._get_machine_name, admission._get_full_name):
        function.cache_clear()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8080", "192.0.2.1:80", "[::1]", "[::1]:8080", "[fe80::1%25eth0]:8080", "[fe80::1%eth0]",
     "localhost", "LocalHost:8080", "localhost.", "files.lan", "FILES.lan.:8080", "db2", "db2:8080", "db2.example.org",
     "Db2.Example.org.:1", ""],
)  # fmt: skip
def test_name_of_the_server(host):
    """Addresses, localhost, what was allowed and what the machine calls itself, in any spelling."""
    Gate(hosts=["", "files.lan"]).check({"Host": host})


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "db2.evil.example", "x",
     "files.lan.evil.example", "localhost, evil.example", "localhost@evil.example", "1", "0x7f000001", "[::1", "::1",
     ":", "[evil.example]", "127.0.0.1:80:80", "user@127.0.0.1", "*"],
)  # fmt: skip
def test_name_of_somebody_else(host):
    """A name that leads here by DNS rebinding isn't ours, and the message says how to allow it."""
    with pytest.raises(ForbiddenError, match="--allow-host"):
        Gate(hosts=["", "files.lan"]).check({"Host": host})


def test_any_name_can_be_allowed():
    """The name * is all of them."""
    Gate(hosts=["*"]).check({"Host": "evil.example"})


def test_name_server_is_not_asked_for_strangers(machine):
    """A request for a foreign name doesn't make the server ask a name server."""
    for host in ("evil.example", "127.0.0.1", "localhost"):
        Gate().is_ours(host)
    assert not machine
    assert Gate().is_ours("db2.example.org") and machine


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:8080"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "same-origin"}],
)  # fmt: skip
def test_web_page_is_not_a_client(headers):
    """What comes from a page is refused, whichever page it is: this server has none."""
    with pytest.raises(ForbiddenError, match="web page"):
        Gate().check({"Host": "localhost", **headers})


def test_person_with_a_browser_may_look():
    """An address that somebody types isn't a page's."""
    Gate().check({"Host": "localhost:8080", "Sec-Fetch-Site": "none"})


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}, Bearer x"])
def test_token_comes_first(authorization):
    """Without the token there's one answer, whatever else is wrong."""
    gate = Gate(TOKEN)
    assert not gate.knows(authorization)
    with pytest.raises(AuthenticationError):
        gate.check({"Authorization": authorization, "Host": "evil.example", "Origin": "null"})
    assert gate.knows(f"Bearer {TOKEN}")


# Guessing {{{1


@pytest.fixture
def clock(monkeypatch):
    """A clock that can be set: its only item is the time."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_guessing_gets_slower(clock):
    """A few mistakes are free. Then each wrong token takes twice as long as the one before, up to a limit."""
    guesses, delays = Guesses(), []
    for _ in range(10):
        delays.append(guesses.note("192.0.2.1"))
        clock[0] += delays[-1]
    assert delays == [0, 0, 0, 0.25, 0.5, 1, 2, 4, 5, 5]


def test_guesses_wait_for_each_other(clock):
    """To send many at once gains nothing, and nobody waits for ever."""
    guesses = Guesses()
    delays = [guesses.note("192.0.2.1") for _ in range(100)]
    assert delays == sorted(delays)
    assert delays[5] == 0.25 + 0.5 + 1
    assert delays[-1] == admission.LONGEST_WAIT


def test_others_do_not_wait(clock):
    """Each address has a count of its own; who has one IPv6 address has a whole network of them."""
    guesses = Guesses()
    for number in range(10):
        guesses.note("192.0.2.1")
        guesses.note(f"2001:db8::{number:x}")
    assert guesses.note("192.0.2.2") == guesses.note("2001:db8:1::") == 0
    assert guesses.note("2001:db8::ffff") > 0 and guesses.note("192.0.2.1") > 0


def test_guesses_are_forgotten(clock, monkeypatch):
    """An address that has stopped guessing is like any other, and the memory is bounded."""
    guesses = Guesses()
    for _ in range(10):
        guesses.note("192.0.2.1")
    clock[0] += admission.MEMORY + 1
    assert guesses.note("192.0.2.1") == 0
    monkeypatch.setattr(admission, "_MAX_ADDRESSES", 5)
    for number in range(20):
        guesses.note(f"192.0.2.{number}")
    assert len(guesses._known) <= 6


@pytest.mark.parametrize("address", ["", "nonsense", "fe80::1%eth0"])
def test_odd_addresses_are_counted(address):
    """Whatever stands there (a Unix socket has no address) is somebody."""
    guesses = Guesses()
    assert [guesses.note(address) > 0 for _ in range(5)] == [False, False, False, True, True]


def test_wrong_token_is_logged(caplog):
    """The address and the count, at the level of warnings."""
    guesses = Guesses()
    guesses.note("192.0.2.1")
    guesses.note("192.0.2.1")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "192.0.2.1" in caplog.messages[1] and "number 2" in caplog.messages[1]
