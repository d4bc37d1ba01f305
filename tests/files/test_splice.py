"""Bytes that travel from a socket into a file through a pipe."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from contextlib import closing

import pytest

from pdiffcopy.files import splice
from pdiffcopy.files.sockets import get_socket_options
from pdiffcopy.files.splice import PIPE_SIZE, Piped, receive
from tests.support import make_data, write_pattern

pytestmark = pytest.mark.usefixtures("no_hang", "no_descriptor_left")

BUFFER = 64 * 1024
"""What a pipe holds when nobody asks for more (pipe(7))."""


@pytest.fixture
def piped():
    """A function that puts bytes into a pipe."""
    source, sink = os.pipe()

    def piped(data: bytes) -> Piped:
        assert os.write(sink, data) == len(data)
        return Piped(source, len(data))

    yield piped
    os.close(source)
    os.close(sink)


def send_all(sock: socket.socket, data: bytes) -> threading.Thread:
    """Send bytes while somebody else receives them."""
    thread = threading.Thread(target=sock.sendall, args=(data,), daemon=True)
    thread.start()
    return thread


def send_slowly(sock: socket.socket, data: bytes, pause: float) -> threading.Thread:
    """Send bytes one by one, with a pause (in seconds) after each."""

    def send() -> None:
        for byte in data:
            sock.sendall(bytes([byte]))
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


# A chunk in a pipe {{{1


def test_piped_bytes_can_be_read(piped):
    """All of them, once: there's nothing left in the chunk, and what lies behind it in the pipe isn't touched."""
    chunk = piped(b"onetwo")[:3]
    assert (len(chunk), bytes(chunk)) == (3, b"one")
    assert (len(chunk), bytes(chunk)) == (0, b"")
    assert os.read(chunk.pipe, 100) == b"two"


@pytest.mark.parametrize("cuts", [[], [0], [4], [10], [1, 2, 9], [3, 3]], ids=str)
def test_piped_bytes_can_be_cut(piped, cuts):
    """The parts have the sizes that parts of bytes have, and in their order the bytes too."""
    data = b"0123456789"
    view, parts = piped(data), []
    for cut, previous in zip(cuts, [0, *cuts], strict=False):
        piece, view = view[: cut - previous], view[cut - previous :]
        parts.append((len(piece), bytes(piece)))
    parts.append((len(view), bytes(view)))
    expected = [data[i:j] for i, j in zip([0, *cuts], [*cuts, 10], strict=True)]
    assert parts == [(len(part), part) for part in expected]


def test_a_slice_beyond_the_end_is_cut(piped):
    """As it is with bytes."""
    chunk = piped(b"abc")
    assert (len(chunk[:100]), len(chunk[100:])) == (3, 0)


def test_bytes_that_come_in_parts_are_read_whole():
    """A read from a pipe may have less than the chunk."""
    data = make_data(3 * BUFFER)
    source, sink = os.pipe()
    with open(source, "rb"), open(sink, "wb", buffering=0) as writer:
        thread = threading.Thread(target=lambda: [writer.write(data[i : i + 1000]) for i in range(0, len(data), 1000)])
        thread.start()
        assert bytes(Piped(source, len(data))) == data
        thread.join()


def test_piped_bytes_move_into_a_file(piped, tmp_path):
    """They land at the offset, nothing around them changes, and the file's own position doesn't count."""
    before = write_pattern(tmp_path / "file", 100)
    with (tmp_path / "file").open("r+b", buffering=0) as handle:
        handle.seek(77)
        piped(b"here").move_to(handle.fileno(), 40)
        piped(b"behind").move_to(handle.fileno(), 120)
        assert handle.tell() == 77
    assert (tmp_path / "file").read_bytes() == before[:40] + b"here" + before[44:] + bytes(20) + b"behind"


def test_a_part_moves_without_the_rest(piped, tmp_path):
    """What belongs to the next part stays in the pipe."""
    chunk = piped(b"onetwo")
    first, second = chunk[:3], chunk[3:]
    with (tmp_path / "file").open("wb", buffering=0) as handle:
        first.move_to(handle.fileno(), 10)
        assert (tmp_path / "file").read_bytes() == bytes(10) + b"one"
        second.move_to(handle.fileno(), 0)
    assert (tmp_path / "file").read_bytes() == b"two" + bytes(7) + b"one"


def test_a_file_that_cannot_be_spliced_into_is_written(piped, tmp_path):
    """Linux refuses to splice into a file that is opened to be appended to: the bytes get there nevertheless."""
    data = make_data(BUFFER - 10)
    (tmp_path / "file").write_bytes(b"before")
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_APPEND)
    chunk = piped(data)
    with pytest.raises(OSError) as info:
        os.splice(chunk.pipe, fd, len(data), offset_dst=6)
    assert info.value.errno == errno.EINVAL
    chunk.move_to(fd, 6)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"before" + data


def test_a_file_that_takes_few_bytes_at_a_time_gets_them_all(piped, tmp_path, monkeypatch):
    """Neither a short splice nor, where that isn't possible, a short write loses or moves anything."""
    data = make_data(1000)
    original, pwrite = os.splice, os.pwrite
    monkeypatch.setattr(os, "splice", lambda src, dst, count, offset_dst: original(src, dst, 7, offset_dst=offset_dst))
    with (tmp_path / "file").open("wb") as handle:
        piped(data[:700]).move_to(handle.fileno(), 5)

    def refuse(*args, **kw):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "splice", refuse)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    with (tmp_path / "file").open("r+b") as handle:
        piped(data[700:]).move_to(handle.fileno(), 705)
    assert (tmp_path / "file").read_bytes() == bytes(5) + data


def test_what_the_file_refuses_is_an_error(piped, tmp_path):
    """Only that splicing isn't possible is no error."""
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as handle, pytest.raises(OSError) as info:
        piped(b"octets").move_to(handle.fileno(), 0)
    assert info.value.errno == errno.EBADF


def test_a_full_disk_is_an_error(connection, small_disk):
    """Splicing reports what writing reports."""
    near, far = connection
    data = make_data(256 * 1024)
    thread = send_all(far, data)
    with (small_disk / "file").open("wb") as handle, pytest.raises(OSError) as info:
        offset = 0
        with closing(receive(near.fileno(), len(data))) as chunks:
            for chunk in chunks:
                size = len(chunk)
                chunk.move_to(handle.fileno(), offset)
                offset += size
    assert info.value.errno == errno.ENOSPC
    near.close()
    thread.join()


# Receiving {{{1


@pytest.mark.parametrize("size", [1, 1000, BUFFER, PIPE_SIZE - 1, PIPE_SIZE, PIPE_SIZE + 1, 3 * PIPE_SIZE + 7])
def test_bytes_are_received_in_order(connection, tmp_path, size):
    """Exactly as many as were asked for, as they were sent; what comes behind them stays in the socket."""
    near, far = connection
    data = make_data(size)
    thread = send_all(far, data + b"behind")
    offset = 0
    with (tmp_path / "file").open("wb") as handle:
        for chunk in receive(near.fileno(), size):
            count = len(chunk)
            assert 0 < count <= PIPE_SIZE
            chunk.move_to(handle.fileno(), offset)
            offset += count
    thread.join()
    assert (tmp_path / "file").read_bytes() == data
    assert near.recv(100) == b"behind"


def test_nothing_to_receive_takes_nothing(connection):
    """No byte is waited for, and none is taken."""
    near, far = connection
    far.sendall(b"x")
    assert list(receive(near.fileno(), 0)) == []
    assert near.recv(10) == b"x"


def test_bytes_that_arrive_one_by_one_are_collected(connection, monkeypatch):
    """However the network cuts them: a chunk is worth the while, or the last one."""
    near, far = connection
    monkeypatch.setattr(splice, "PATIENCE", 20)
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

    thread = send_slowly(far, b"abcde", 0.01)
    assert list(map(bytes, receive(near.fileno(), 5, timeout=20))) == [b"abcde"]
    thread.join()


def test_the_kernel_counts_what_arrives(connection, monkeypatch):
    """Bytes that come one by one don't wake anybody until there are enough, and afterwards one is enough again."""
    near, far = connection
    monkeypatch.setattr(splice, "PATIENCE", 20)
    wakes = []
    originals = splice._wait_for

    def wait_for(*args):
        ready = originals(*args)
        wakes.append((args[1], ready))
        return ready

    monkeypatch.setattr(splice, "_wait_for", wait_for)

    thread = send_slowly(far, b"abc", 0.05)
    assert list(map(bytes, receive(near.fileno(), 3, timeout=20))) == [b"abc"]
    thread.join()
    assert wakes == [(3, True)]
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@pytest.mark.parametrize("patience", [0, 0.01, 0.4])
def test_a_slow_wire_is_a_sign_of_life(connection, monkeypatch, patience):
    """Less than what's waited for comes within the time: that's taken, and waiting goes on."""
    near, far = connection
    monkeypatch.setattr(splice, "PATIENCE", patience)

    thread = send_slowly(far, b"abcd", 0.3)
    chunks = list(map(bytes, receive(near.fileno(), 4, timeout=20)))
    thread.join()
    assert b"".join(chunks) == b"abcd"
    assert len(chunks) > 1


def test_a_descriptor_that_was_closed_meanwhile_is_left_alone(connection):
    """The generator ends after its connection, and doesn't close what has got the number since."""
    near, far = connection
    far.sendall(b"some")
    chunks = receive(near.fileno(), 100, timeout=0.05)
    next(chunks)
    number = near.fileno()
    near.close()
    other = os.open("/dev/null", os.O_RDONLY)
    try:
        assert other == number
        chunks.close()
        os.fstat(other)
    finally:
        os.close(other)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_chunk_is_waited_for(connection, blocking):
    """A socket that has a timeout in Python doesn't block in the system: it's waited for all the same."""
    near, far = connection
    near.settimeout(None if blocking else 20)
    timer = threading.Timer(0.2, far.sendall, [b"late"])
    timer.start()
    assert b"".join(map(bytes, receive(near.fileno(), 4, timeout=20))) == b"late"
    timer.join()


def test_a_small_pipe_will_do(connection, monkeypatch):
    """Where the system doesn't allow a larger pipe, there are more and smaller chunks."""

    def refuse(*args):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(splice.fcntl, "fcntl", refuse)
    near, far = connection
    data = make_data(PIPE_SIZE + 5 * BUFFER + 7)
    thread = send_all(far, data)
    chunks = list(map(bytes, receive(near.fileno(), len(data), timeout=20)))
    thread.join()
    assert b"".join(chunks) == data
    assert len(chunks) > 1
    assert max(map(len, chunks)) < PIPE_SIZE


def test_a_connection_that_is_closed_early_is_an_error(connection):
    """What arrived is passed on, and that the rest is missing can't be overlooked."""
    near, far = connection
    far.sendall(b"some")
    far.close()
    chunks = receive(near.fileno(), 5)
    assert bytes(next(chunks)) == b"some"
    with pytest.raises(ConnectionResetError, match="closed early"):
        next(chunks)


def test_a_connection_that_is_reset_is_an_error(connection):
    """The error is that of the system."""
    near, far = connection
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    with pytest.raises(ConnectionResetError):
        list(receive(near.fileno(), 5))


def test_silence_is_an_error(connection):
    """Each wait has an end, the first one and those in the middle."""
    near, far = connection
    with pytest.raises(TimeoutError):
        list(receive(near.fileno(), 5, timeout=0.05))
    far.sendall(b"some")
    chunks = receive(near.fileno(), 5, timeout=0.05)
    assert bytes(next(chunks)) == b"some"
    with pytest.raises(TimeoutError):
        next(chunks)


def test_urgent_bytes_are_an_error(connection):
    """They are readable, but can't be spliced: that's neither waited for nor tried for ever."""
    near, far = connection
    near.settimeout(20)
    far.sendall(b"some")
    far.send(b"!", socket.MSG_OOB)
    far.sendall(b"more")
    chunks = receive(near.fileno(), 100, timeout=0.5)
    with pytest.raises(OSError):
        for _ in range(10):
            bytes(next(chunks))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_nothing_is_paced_that_stays_here(host):
    """Whatever the system does to spare routers a burst: there are none on loopback."""
    (option,) = get_socket_options(host)
    with socket.socket() as sock:
        sock.setsockopt(*option)
        assert sock.getsockopt(*option[:2], 16).rstrip(b"\0") == b"reno"


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "db1.example", "localhost.example"])
def test_what_leaves_this_machine_is_up_to_the_system(host):
    """How to share a network is for the administrator to say."""
    assert get_socket_options(host) == []


def test_who_may_not_choose_does_without(monkeypatch):
    """An administrator may forbid it, and a connection without it is as good."""

    class Socket(socket.socket):
        def setsockopt(self, *arguments):
            raise PermissionError

    monkeypatch.setattr(splice.socket, "socket", Socket)
    assert get_socket_options("127.0.0.1") == []


def test_a_reader_that_leaves_leaves_no_pipe(connection):
    """The pipe, with whatever is still in it, goes with the generator."""
    near, far = connection
    before = set(os.listdir("/proc/self/fd"))
    thread = send_all(far, bytes(BUFFER))
    chunks = receive(near.fileno(), 2 * BUFFER)
    next(chunks)
    thread.join()
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    chunks.close()
    assert set(os.listdir("/proc/self/fd")) <= before


# Parts {{{1


def test_parts_are_cut_anywhere(piped):
    """Whatever the chunks are: each part gets its bytes."""
    parts = splice.Parts([b"ab", b"", memoryview(b"cdefg"), piped(b"hijk"), b"l"])
    assert [parts.take_bytes(size) for size in (1, 0, 5, 4, 2)] == [b"a", b"", b"bcdef", b"ghij", b"kl"]
    parts.end()


def test_parts_that_nobody_wants_are_skipped(piped):
    """But those after them are what they are."""
    parts = splice.Parts([piped(b"abcdef"), b"ghi"])
    first, second, third = parts.take(2), parts.take(3), parts.take(1)
    assert b"".join(map(bytes, third)) == b"f"
    assert list(first) == list(second) == []
    parts.take(3)
    parts.end()


@pytest.mark.parametrize("chunks", [[], [b"ab"], [b"ab", b""]])
def test_parts_that_are_too_short(chunks):
    """There are fewer bytes than somebody said."""
    with pytest.raises(splice.PartsError, match="fewer"):
        splice.Parts(chunks).take_bytes(3)


@pytest.mark.parametrize("chunks", [[b"abcd"], [b"abc", b"d"]])
def test_parts_that_are_too_long(chunks):
    """There are more bytes than somebody said."""
    parts = splice.Parts(chunks)
    assert parts.take_bytes(3) == b"abc"
    with pytest.raises(splice.PartsError, match="more"):
        parts.end()


@pytest.mark.parametrize("consumed", [0, 1, 2, 3])
@pytest.mark.parametrize("is_piped", [False, True])
def test_rest_of_a_part_whose_reader_fails_is_skipped(piped, is_piped, consumed):
    """However much of its last piece was consumed, by a slice of it: the next part is what it is."""
    parts = splice.Parts([piped(b"abcdef") if is_piped else b"abcdef", b"gh", memoryview(b"ijk")])
    bytes(next(parts.take(3))[:consumed])
    assert parts.take_bytes(2) == b"de"
    bytes(next(parts.take(4))[:consumed])  # it goes on in the chunks after that one
    assert parts.take_bytes(1) == b"j"
    bytes(next(parts.take(1))[:consumed])
    parts.end()


def test_rest_of_a_part_that_a_disk_did_not_take_is_skipped(connection, small_disk):
    """A splice that was done in part, and the slices that nobody has come to, are no riddle."""
    near, far = connection
    head, large, small = make_data(1000), make_data(3 * PIPE_SIZE), make_data(5000)
    thread = send_all(far, head + large + small + head)
    with closing(receive(near.fileno(), 2 * len(head) + len(large) + len(small))) as chunks:
        parts = splice.Parts(chunks)
        assert parts.take_bytes(len(head)) == head
        with (small_disk / "file").open("wb") as handle, pytest.raises(OSError) as info:
            for offset, piece in splice.spread([splice.Extent(0, len(large))], parts.take(len(large))):
                piece[:100].move_to(handle.fileno(), offset)
                piece[100:].move_to(handle.fileno(), offset + 100)
        assert info.value.errno == errno.ENOSPC
        assert parts.take_bytes(len(small)) == small
        assert parts.take_bytes(len(head)) == head
        parts.end()
    thread.join()


def test_rest_of_a_part_that_was_read_and_not_written_is_skipped(connection, tmp_path, monkeypatch):
    """Where splicing isn't possible, what was taken out of the pipe is gone when it can't be written."""
    near, far = connection
    monkeypatch.setattr(os, "splice", _refuse_files(os.splice))
    monkeypatch.setattr(os, "pwrite", _refuse_files())
    thread = send_all(far, bytes(100_000) + b"next")
    with closing(receive(near.fileno(), 100_004)) as chunks, (tmp_path / "file").open("wb") as handle:
        parts = splice.Parts(chunks)
        with pytest.raises(OSError):
            for piece in parts.take(100_000):
                piece.move_to(handle.fileno(), 0)
        assert parts.take_bytes(4) == b"next"
        parts.end()
    thread.join()


def _refuse_files(splice=None):
    def refuse(*args, **options):
        if splice and "offset_dst" not in options:  # from a socket
            return splice(*args, **options)
        raise OSError(errno.EINVAL if splice else errno.ENOSPC, "")

    return refuse
