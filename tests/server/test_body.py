"""How bodies travel: WSGI's way, and through the socket of a real gunicorn."""

from __future__ import annotations

import errno
import json
import os
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from io import BytesIO
from urllib.parse import quote

import pytest
import xxhash
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser
from werkzeug.test import create_environ

from pdiffcopy.blocks import Extent
from pdiffcopy.exceptions import AbsentError, FileError
from pdiffcopy.extents import Extents
from pdiffcopy.files import openfile
from pdiffcopy.files.buffers import CHUNK_SIZE, READ_SIZE
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.splice import Piped
from pdiffcopy.files.stored import Stored
from pdiffcopy.server import Settings, create_app
from pdiffcopy.server.body import read_body, send_chunks
from tests.support import IMPATIENCE, STALL, make_data, serve_https, start_server, wait_for, write_pattern

pytestmark = pytest.mark.usefixtures("no_hang")

TIMEOUT = 20
LARGE = 10_000_000


def read_all(environ, length):
    return b"".join(bytes(chunk) for chunk in read_body(environ, length))


# WSGI's way {{{1


class Stream(BytesIO):
    """Hands out a few bytes at a time, as a stream may."""

    def read(self, size=-1):
        return super().read(min(size, 1000))


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_SIZE + 1])
@pytest.mark.parametrize("kind", [BytesIO, Stream])
def test_any_stream_is_read(kind, size):
    """Exactly the bytes of the body, whatever comes behind them."""
    data = make_data(size)
    environ = create_environ(method="POST", input_stream=kind(data + b"behind"))
    assert read_all(environ, size) == data
    assert environ["wsgi.input"].read(6) == b"behind"


def test_large_bodies_are_read_in_pieces():
    """A body is never in memory as a whole."""
    environ = create_environ(method="POST", input_stream=BytesIO(make_data(3 * CHUNK_SIZE + 1)))
    assert max(map(len, read_body(environ, 3 * CHUNK_SIZE + 1))) <= CHUNK_SIZE


def test_stream_that_ends_early_is_an_error():
    """What's missing isn't made up."""
    environ = create_environ(method="POST", input_stream=BytesIO(b"some"))
    with pytest.raises(AbsentError, match="ended early"):
        read_all(environ, 5)


def test_stream_that_breaks_is_an_error_of_the_client():
    """The reason is that of the system."""

    class Broken(BytesIO):
        def read(self, size=-1):
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(AbsentError, match="ended early: Connection reset by peer"):
        read_all(create_environ(method="POST", input_stream=Broken()), 5)


def test_application_works_in_any_server(tmp_path):
    """Flask's own test client knows nothing of sockets."""
    before, data = write_pattern(tmp_path / "file", 100), make_data(50, seed=2)
    client = create_app(Settings()).test_client()
    headers = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest(data)}
    query = {"filename": str(tmp_path / "file"), "extents": "10:20,60:30"}
    response = client.post("/blocks", query_string=query, data=data, headers=headers)
    assert (response.status_code, response.json) == (200, {"verified": True})
    assert (tmp_path / "file").read_bytes() == before[:10] + data[:20] + before[30:60] + data[20:] + before[90:]


# Gunicorn's objects {{{1


@pytest.fixture
def parsed(connection):
    """The two ends of a TCP connection, and gunicorn's parser at the second one."""
    client, sock = connection
    return client, sock, RequestParser(Config(), sock, sock.getpeername())


def make_request(body: bytes, target: str = "/blocks", extra: str = "") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


def get_environ(sock, request):
    return make_environ(sock) | {"wsgi.input": request.body}


@pytest.mark.parametrize("together", [0, 1, 99, 100])
def test_bytes_come_from_the_socket(parsed, together):
    """What came with the head first, the rest through a pipe; then the next request begins where this one ended."""
    client, sock, parser = parsed
    body, follower = make_data(100), make_request(b"", "/next")
    payload = make_request(body) + follower
    cut = len(payload) - len(follower) - 100 + together
    client.sendall(payload[:cut])
    request = next(parser)
    # Now the rest can't be part of what the parser has read.
    client.sendall(payload[cut:])
    chunks = [(type(chunk), bytes(chunk)) for chunk in read_body(get_environ(sock, request), 100)]
    assert b"".join(payload for _, payload in chunks) == body
    assert chunks[0] == (bytes, body[:together])
    assert {kind for kind, _ in chunks[1:]} == ({Piped} if together < 100 else set())
    assert next(parser).uri == "/next"


def test_next_request_may_arrive_with_the_body(parsed):
    """What was read ahead of the body's end belongs to the next request."""
    client, sock, parser = parsed
    client.sendall(make_request(b"body") + make_request(b"other", "/next"))
    request = next(parser)
    assert read_all(get_environ(sock, request), 4) == b"body"
    request = next(parser)
    assert (request.uri, read_all(get_environ(sock, request), 5)) == ("/next", b"other")


def test_body_that_is_not_read_is_skipped(parsed):
    """A view that gives up in the middle doesn't make the rest of the body a request."""
    client, sock, parser = parsed
    client.sendall(make_request(b"GET /evil HTTP/1.1\r\n\r\n" * 10) + make_request(b"", "/next"))
    request = next(parser)
    chunks = read_body(get_environ(sock, request), 220)
    next(chunks)
    chunks.close()
    assert next(parser).uri == "/next"


def test_body_that_was_begun_is_read_the_usual_way(parsed):
    """When gunicorn itself holds bytes of the body, it's asked for all of them."""
    client, sock, parser = parsed
    client.sendall(make_request(b"line\nrest"))
    environ = get_environ(sock, next(parser))
    assert environ["wsgi.input"].readline() == b"line\n"
    assert read_all(environ, 4) == b"rest"


def test_early_end_is_an_error_of_the_client(parsed):
    """A client that goes away is no bug."""
    client, sock, parser = parsed
    client.sendall(make_request(bytes(100))[:-50])
    request = next(parser)
    client.close()
    with pytest.raises(AbsentError, match="ended early: The connection was closed early"):
        read_all(get_environ(sock, request), 100)


# A real server {{{1


class Talk:
    """One connection to a server, used for several requests."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.reader = sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.reader.close()
        self.sock.close()

    def receive(self) -> tuple[int, dict]:
        """Read a response: its status and its JSON document."""
        status = self.reader.readline().split()
        headers = dict(line.lower().strip().split(b": ", 1) for line in iter(self.reader.readline, b"\r\n"))
        return int(status[1]), json.loads(self.reader.read(int(headers[b"content-length"])))


def talk(server) -> Talk:
    sock = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Talk(ssl._create_unverified_context().wrap_socket(sock) if server.scheme == "https" else sock)


@pytest.fixture(scope="module")
def secure_server(tmp_path_factory, authority):
    """Like the fixture ``server``, with encrypted connections."""
    server = serve_https(partial(start_server, tmp_path_factory.mktemp("secure")), authority)
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def secure_impatient(tmp_path_factory, authority):
    """Like the fixture ``impatient``, with encrypted connections."""
    launch = partial(start_server, tmp_path_factory.mktemp("secure"), "-c", "1", setup=IMPATIENCE)
    server = serve_https(launch, authority)
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(params=["server", "secure_server"])
def any_server(request):
    """A server, once for each way in which bodies travel."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["impatient", "secure_impatient"])
def any_impatient(request):
    """An impatient one."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def path(tmp_path):
    """A sparse file with room for all that is written here."""
    with (tmp_path / "file").open("wb") as handle:
        handle.truncate(LARGE)
    return tmp_path / "file"


def assert_written(path, data):
    """These bytes are at the beginning of the file, and nothing is behind them."""
    assert path.read_bytes() == data.ljust(LARGE, b"\0")


def make_write(path, data: bytes, offset: int = 0) -> bytes:
    extra = f"Pdiffcopy-Digest: {xxhash.xxh3_128_hexdigest(data)}\r\n"
    return make_request(data, f"/blocks?filename={quote(str(path))}&offset={offset}", extra)


@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
def test_body_in_one_segment_with_its_head(any_server, path, size):
    """However much of the body has come with the head."""
    data = make_data(size)
    with talk(any_server) as connection:
        connection.sock.sendall(make_write(path, data))
        assert connection.receive() == (200, {"verified": True})
    assert_written(path, data)


def test_body_in_tiny_segments(any_server, path):
    """A byte at a time is slow but right."""
    data = make_data(300)
    with talk(any_server) as connection:
        for byte in make_write(path, data):
            connection.sock.sendall(bytes([byte]))
        assert connection.receive() == (200, {"verified": True})
    assert_written(path, data)


@pytest.mark.parametrize("size", [1, 3000, 20_000, 2_000_000])
def test_requests_in_a_row_without_waiting(any_server, path, size):
    """The next request behind a body, on the same connection and sent at once, gets its own answer."""
    blocks = [make_data(size, seed) for seed in range(4)]
    payload = b"".join(make_write(path, block, i * size) for i, block in enumerate(blocks))
    payload += make_request(b"", f"/resize?filename={quote(str(path))}&size={4 * size + 1}")
    with talk(any_server) as connection:
        connection.sock.sendall(payload)
        assert [connection.receive() for _ in blocks] == [(200, {"verified": True})] * 4
        assert connection.receive() == (200, {"size": 4 * size + 1})
    assert path.read_bytes() == b"".join(blocks) + b"\0"


def test_refused_body_is_no_request(any_server, tmp_path):
    """What was meant as a body isn't taken for the next request, when its own request was refused."""
    evil = make_request(b"", f"/resize?filename={quote(str(tmp_path / 'evil'))}&size=1")
    with talk(any_server) as connection:
        connection.sock.sendall(make_write(tmp_path / "missing", evil) + make_request(b"", "/nothing"))
        assert connection.receive()[0] == 404
        assert "URL" in connection.receive()[1]["detail"]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("sent", [0, 10, 500_000])
def test_connection_that_is_closed_early(any_server, path, sent):
    """What has arrived may lie in the file and nothing else does; the client, if it still listens, gets an error."""
    data = make_data(1_000_000)
    payload = make_write(path, data)
    with talk(any_server) as connection:
        connection.sock.sendall(payload[: len(payload) - len(data) + sent])
        socket.socket.shutdown(connection.sock, socket.SHUT_WR)
        if any_server.scheme == "https":  # a cut connection can't be answered
            with pytest.raises(ssl.SSLError):
                connection.receive()
        else:
            status, problem = connection.receive()
            assert (status, problem["title"]) == (408, "Request Timeout")
            assert "ended early" in problem["detail"]
    wait_for(lambda: path.read_bytes().startswith(data[:sent]), what="what has arrived")
    assert_written(path, data[:sent])


def test_stalled_client_is_given_up(any_impatient, tmp_path):
    """It gets an error, the connection ends, and no thread waits for ever."""
    data = make_data(1_000_000)
    started = time.monotonic()
    with ExitStack() as stack:
        connections = {sent: stack.enter_context(talk(any_impatient)) for sent in (0, 10, 500_000)}
        for sent, connection in connections.items():
            (tmp_path / str(sent)).write_bytes(bytes(len(data)))
            payload = make_write(tmp_path / str(sent), data)
            connection.sock.sendall(payload[: len(payload) - len(data) + sent])
        for sent, connection in connections.items():
            status, problem = connection.receive()
            assert status == 408 and "ended early" in problem["detail"]
            assert (tmp_path / str(sent)).read_bytes() == data[:sent].ljust(len(data), b"\0")
        assert time.monotonic() - started >= STALL
        for connection in connections.values():
            assert connection.reader.read() == b""
    assert "Traceback" not in any_impatient.log.read_text()


def test_stalled_client_smuggles_nothing(any_impatient, path):
    """Where the next request begins is known, although what arrived before the silence was never written."""
    data, sent = make_data(5000), 1000
    evil = make_request(b"", f"/resize?filename={quote(str(path.with_name('evil')))}&size=1")
    # As long as what arrived after the head: that's what could be skipped by mistake.
    head = len(make_write(path, bytes(500))) - 500
    follower = make_write(path, b"x" * (sent - 10 - head) + evil)
    with talk(any_impatient) as connection:
        payload = make_write(path, data)
        connection.sock.sendall(payload[: len(payload) - len(data) + 10])
        # What comes together with the head takes another way.
        time.sleep(0.2)
        connection.sock.sendall(data[10:sent])
        assert connection.receive()[0] == 408
        with suppress(OSError):
            connection.sock.settimeout(2)
            connection.sock.sendall(data[sent:] + follower)
            connection.reader.read()
    assert not path.with_name("evil").exists()


def test_slow_client_is_not_given_up(any_impatient, path):
    """Each wait is bounded, and not the whole request, as long as it makes progress."""
    data = make_data(8000)
    payload = make_write(path, data)
    started = time.monotonic()
    with talk(any_impatient) as connection:
        connection.sock.sendall(payload[:-8000])
        for start in range(0, 8000, 1000):
            # It's the slowness that is tested.
            time.sleep(STALL / 4)
            connection.sock.sendall(data[start : start + 1000])
        assert connection.receive() == (200, {"verified": True})
    assert time.monotonic() - started > STALL


# The way out {{{1


def make_read(path, extents: list[Extent]) -> bytes:
    query = f"filename={quote(str(path))}&extents={quote(Extents().write(extents))}"
    return f"GET /blocks?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("ascii")


def take(reader, size: int) -> tuple[int, bytes]:
    """A status, and some of the body."""
    status = int(reader.readline().split()[1])
    assert f"content-length: {size}".encode() in [line.strip().lower() for line in iter(reader.readline, b"\r\n")]
    return status, reader.read(size)


@pytest.mark.parametrize("extents", [[(5, 1)], [(0, 700_000)], [(1, 2), (4, 1), (300_000, 400_000)]], ids=str)
def test_extents_are_sent(any_server, tmp_path, extents):
    """All of them, one after the other, and the connection is good for the next request."""
    data = make_data(700_000)
    extents = [Extent(*extent) for extent in extents]
    (tmp_path / "file").write_bytes(data)
    expected = b"".join(data[offset : offset + size] for offset, size in extents)
    with talk(any_server) as connection:
        for _ in range(2):
            connection.sock.sendall(make_read(tmp_path / "file", extents))
            assert take(connection.reader, len(expected)) == (200, expected)


def test_extents_are_sent_without_gunicorn(tmp_path):
    """Any WSGI server will do: it gets bytes."""
    data = make_data(READ_SIZE + 100)
    (tmp_path / "file").write_bytes(data)
    with LocalFile(str(tmp_path / "file")) as file:
        chunks = list(send_chunks({}, Stored(file, [Extent(7, READ_SIZE + 50), Extent(1, 1)])))
    assert b"".join(chunks) == data[7 : READ_SIZE + 57] + data[1:2]
    assert max(map(len, chunks)) <= READ_SIZE


def make_environ(sock: socket.socket) -> dict:
    return {"gunicorn.socket": sock, "SERVER_PROTOCOL": "HTTP/1.1"}


@pytest.mark.parametrize("reason", ["HTTP/2", "cooperative"])
def test_other_kinds_of_connections_get_bytes_from_wsgi(tmp_path, reason):
    """What isn't plain HTTP/1 on a socket that blocks isn't for us to write to."""
    (tmp_path / "file").write_bytes(b"octets")
    near, far = socket.socketpair()
    with near, far, LocalFile(str(tmp_path / "file")) as file:
        environ = make_environ(near)
        if reason == "HTTP/2":
            environ["SERVER_PROTOCOL"] = reason
        else:
            near.setblocking(False)
        assert b"".join(send_chunks(environ, Stored(file, [Extent(1, 3)]))) == b"cte"
        near.close()
        assert far.recv(10) == b""


def test_file_systems_without_sendfile(tmp_path, monkeypatch):
    """The bytes take the detour, where they have to."""

    def refuse(*args):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(openfile.os, "sendfile", refuse)
    (tmp_path / "file").write_bytes(b"some octets")
    near, far = socket.socketpair()
    with near, far, LocalFile(str(tmp_path / "file")) as file:
        assert list(send_chunks(make_environ(near), Stored(file, [Extent(5, 6), Extent(0, 4)]))) == [b""]
        near.close()
        with far.makefile("rb") as reader:
            assert reader.read() == b"octetssome"


def test_slow_receiver_is_waited_for(tmp_path, connection):
    """A socket with a timeout is one that doesn't block, and takes a file in parts."""
    near, far = connection
    near.settimeout(30)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    payload = make_data(8 * 1024 * 1024, 1)
    (tmp_path / "file").write_bytes(payload)
    extents = [Extent(5, 4_000_000), Extent(4_000_010, 1), Extent(5_000_000, 3_000_000)]
    with LocalFile(str(tmp_path / "file")) as file, ThreadPoolExecutor(1) as executor:
        future = executor.submit(Stored(file, extents).send, near)
        with far.makefile("rb") as reader:
            received = reader.read(sum(size for _, size in extents))
        future.result()
    assert received == b"".join(payload[offset : offset + size] for offset, size in extents)


def test_receiver_that_takes_nothing_is_given_up(tmp_path, connection):
    """After the timeout of the socket."""
    near, _ = connection
    near.settimeout(0.1)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    with LocalFile(str(tmp_path / "file")) as file, pytest.raises(TimeoutError):
        Stored(file, [Extent(0, 64 * 1024 * 1024)]).send(near)


def test_file_that_ends_early_is_noticed(tmp_path):
    """The rest isn't made up: an error makes gunicorn close the connection."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    near, far = socket.socketpair()
    with near, far, LocalFile(str(tmp_path / "file")) as file:
        with pytest.raises(FileError, match="shorter"):
            list(send_chunks(make_environ(near), Stored(file, [Extent(10, 10), Extent(99_990, 20)])))
        near.close()
        with far.makefile("rb") as reader:
            assert reader.read() == bytes(20)
