"""Tests for :mod:`pdiffcopy.files.sockets`: how long a socket waits for an other end that is slow."""

from __future__ import annotations

import socket
import threading

import pytest

from pdiffcopy.files import sockets
from pdiffcopy.files.sockets import LEAST_BUFFER, get_socket_options, send_all, wait_for_answer, wait_for_room
from pdiffcopy.pace import SLOW_RATE

pytestmark = pytest.mark.usefixtures("no_hang")

TIMEOUT = 0.05


def fill(sock: socket.socket) -> None:
    """Send until neither end has room for more."""
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(2**20))
    except BlockingIOError:
        sock.settimeout(TIMEOUT)


@pytest.fixture
def moves(monkeypatch):
    """What seems to have arrived at the other end, each time that somebody looks: in the end nothing more."""
    numbers, looks = [0, 1, 5, 5], []

    def look(sock: socket.socket) -> int:
        looks.append(sock)
        return numbers[min(len(looks), len(numbers)) - 1]

    monkeypatch.setattr(sockets, "count_moved", look)
    return looks


@pytest.mark.parametrize("wait", [wait_for_room, wait_for_answer])
def test_time_begins_anew_when_something_arrives(connection, moves, wait):
    """And is over when nothing has arrived for as long as the timeout."""
    near, _ = connection
    fill(near)
    with pytest.raises(TimeoutError):
        wait(near)
    assert len(moves) == 4


@pytest.mark.parametrize("wait", [wait_for_room, wait_for_answer])
def test_other_end_that_takes_nothing_is_not_waited_for_any_longer(connection, wait):
    """The kernel counts what has arrived."""
    near, _ = connection
    fill(near)
    with pytest.raises(TimeoutError):
        wait(near)


def test_room_ends_the_wait(connection):
    """As soon as there's some."""
    near, far = connection
    fill(near)
    near.settimeout(20)
    thread = threading.Thread(target=lambda: [far.recv(2**20) for _ in range(64)])
    thread.start()
    wait_for_room(near)
    near.shutdown(socket.SHUT_WR)
    thread.join()


def test_answer_ends_the_wait(connection):
    """Although the other end takes nothing any more."""
    near, far = connection
    fill(near)
    near.settimeout(20)
    far.sendall(b"no")
    wait_for_answer(near)
    assert near.recv(2) == b"no"


def test_nothing_to_take_is_nothing_to_wait_for(connection):
    """All has arrived: now the reader of the answer waits."""
    near, _ = connection
    wait_for_answer(near)


def test_socket_that_waits_by_itself_has_waited_long_enough(connection):
    """Its timeout is an option of the kernel."""
    near, _ = connection
    with pytest.raises(TimeoutError):
        wait_for_room(near)


def test_sending_may_take_long(connection, moves):
    """As long as something arrives."""
    near, _ = connection
    fill(near)
    with pytest.raises(TimeoutError):
        send_all(near, bytes(2**20))
    assert len(moves) > 3


def test_everything_is_sent(connection):
    """In its order, however much of it is taken at a time."""
    near, far = connection
    data, found = bytes(range(256)) * 40_000, bytearray()

    def receive() -> None:
        while chunk := far.recv(100_000):
            found.extend(chunk)

    thread = threading.Thread(target=receive)
    thread.start()
    near.settimeout(20)
    send_all(near, memoryview(data))
    near.close()
    thread.join()
    assert found == data


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_buffers_are_small_where_bytes_are_taken_slowly(host):
    """And as the system has them otherwise, over the network and on one machine."""
    usual = get_socket_options(host)
    assert not [option for option in usual if option[:2] == (socket.SOL_SOCKET, socket.SO_RCVBUF)]
    assert get_socket_options(host, SLOW_RATE) == usual
    for rate, size in ((1024, LEAST_BUFFER), (100_000, 25_000)):
        assert get_socket_options(host, rate) == [(socket.SOL_SOCKET, socket.SO_RCVBUF, size), *usual]
