"""Places and time: slow connections keep each other out, and nobody else."""

from __future__ import annotations

import os
import re
import resource
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from urllib.parse import quote

import pytest
import requests

from pdiffcopy.server.reception import Reception
from tests.server.test_daemon import is_open
from tests.support import children_of, exchange, run_pdiffcopy, serve_https, wait_for, write_pattern

TOKEN = "correct-horse-battery-staple"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
TIMEOUT = 20
CROWD = 1500
"""More than a process has threads."""
HELLO = b"\x16\x03\x01"
HEAD = b"GET /info?filename=/x HTTP/1.1\r\nHost: localhost\r\n"
HASTY = "from pdiffcopy.server import visitors as r; r.STALL_TIMEOUT = r.HEAD_TIMEOUT = r.KEEPALIVE = 1"
PATIENT = "from pdiffcopy.server import visitors as r; r.HEAD_TIMEOUT = 60"
"""Those who wait for others have no more than a third of that."""


@pytest.fixture(autouse=True)
def many_descriptors():
    """Room for some thousand connections in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def path(tmp_path):
    """A file with known contents."""
    write_pattern(tmp_path / "file", 100_000)
    return tmp_path / "file"


@pytest.fixture(params=["http", "https"])
def serve(request, launch, authority):
    """A function that starts a server, and what a client has to know about it, with and without encryption."""

    def serve(*options: str, **keywords):
        if request.param == "http":
            return launch(*options, **keywords)
        files = "--certfile", str(authority / "server.pem"), "--keyfile", str(authority / "server.key")
        return launch(*files, *options, scheme="https", **keywords)

    return serve


@pytest.fixture
def ask(authority):
    """A function that sends a request as a client does."""
    with requests.Session() as session:
        session.trust_env, session.verify = False, str(authority / "ca.pem")

        def ask(server, path, **headers) -> int:
            url = f"{server.origin}/info"
            return session.get(url, params={"filename": path}, headers=headers, timeout=TIMEOUT).status_code

        ask.session = session
        yield ask


def connect(server, opening: bytes = b"", buffer: int = 0) -> socket.socket:
    """Connect, encrypted if the server wants that, and say something."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(TIMEOUT)
    sock.connect(("127.0.0.1", server.port))
    if server.scheme == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = context.wrap_socket(sock)
    sock.sendall(opening)
    return sock


def receive(sock: socket.socket) -> bytes:
    """Read one answer."""
    answer = b""
    while True:
        chunk = sock.recv(65536)
        assert chunk, answer
        answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        if (match := re.search(rb"(?i)content-length: (\d+)", head)) and len(body) == int(match[1]):
            return answer


def crowd(stack: ExitStack, server, opening: bytes, count: int = CROWD) -> None:
    """Many connections that say something (that isn't encrypted) and nothing after that."""
    for _ in range(count):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT))
        with suppress(ConnectionError):
            sock.sendall(opening)


@pytest.mark.parametrize("token", ["", TOKEN], ids=["open", "token"])
@pytest.mark.parametrize("opening", [b"", HELLO, HEAD], ids=["nothing", "handshake", "head"])
def test_crowd_keeps_no_client_out(serve, ask, path, tmp_path, opening, token):
    """Connections on which nothing more happens cost a place each, of those that strangers have among them."""
    server = serve("-c", "1", setup=PATIENT, env={"PDIFFCOPY_TOKEN": token} if token else {})
    headers = AUTHORIZED if token else {}
    assert ask(server, path, **headers) == 200
    with ExitStack() as stack:
        crowd(stack, server, opening)
        for _ in range(5):
            assert ask(server, path, **headers) == 200
            with requests.Session() as session:
                session.trust_env, session.verify = False, ask.session.verify
                assert session.get(f"{server.origin}/nothing", headers=headers, timeout=TIMEOUT).status_code == 404
        options = [] if server.scheme == "http" else ["--ca-file", ask.session.verify]
        location = f"{server.origin}{quote(str(path))}"
        result = run_pdiffcopy(*options, location, tmp_path / "copy", env={"PDIFFCOPY_TOKEN": token} if token else {})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_client_keeps_its_connection_in_a_crowd(launch, ask, path):
    """A client that has shown the token once isn't sent away in favor of strangers."""
    server = launch("-c", "1", env={"PDIFFCOPY_TOKEN": TOKEN})
    with connect(server) as client, ExitStack() as stack:
        for _ in range(3):
            client.sendall(HEAD + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert receive(client).startswith(b"HTTP/1.1 404 ")
            crowd(stack, server, HEAD, 600)


def drip(sock: socket.socket, piece: bytes) -> bytes:
    """Send a little now and then until the server has had enough of it, and return what it says."""
    answer = b""
    sock.settimeout(0.3)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            sock.sendall(piece)
        except OSError:
            pass  # there may still be an answer
        try:
            chunk = sock.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return answer
        if not chunk:
            return answer
        answer += chunk
    raise AssertionError("the server is very patient")


def test_handshake_has_a_deadline(launch, authority):
    """However often a byte of it arrives."""
    server = serve_https(launch, authority, setup=HASTY)
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(HELLO + b"\x40\x00\x01")
        drip(sock, b"\0")


def test_silence_has_a_deadline(launch, authority):
    """The server gives up on a connection that says nothing at all, too."""
    for server in (launch(setup=HASTY), serve_https(launch, authority, setup=HASTY)):
        exchange(server.port, b"")


def test_head_has_a_deadline(serve):
    """However often a byte of it arrives, on a new connection and on one that was used before."""
    server = serve(setup=HASTY)
    with connect(server, HEAD) as sock:
        assert drip(sock, b"X") == b""
    with connect(server, HEAD + b"\r\n") as sock:
        assert receive(sock).startswith(b"HTTP/1.1 404 ")
        assert drip(sock, b"X") == b""


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["nothing", "a byte"])
def test_body_has_to_make_progress(serve, path, piece):
    """A client that sends its body too slowly is given up; one that sends nothing gets to know that."""
    server = serve("-c", "1", setup=HASTY)
    (worker,) = wait_for(lambda: children_of(server.process.pid), what="a worker")
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1\r\nHost: localhost\r\n"
    with connect(server, f"{line}Content-Length: 50000\r\n\r\n".encode()) as sock:
        answer = drip(sock, piece)
    assert answer.startswith(b"HTTP/1.1 408 ") or piece
    wait_for(lambda: not is_open(worker, path), what="the server to close the file")


def test_slow_body_that_makes_progress_arrives(serve, path):
    """A network may be slow, and it may pause."""
    server = serve(setup="from pdiffcopy.server import visitors; visitors.STALL_TIMEOUT = 3")
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1\r\nHost: localhost\r\n"
    with connect(server, f"{line}Content-Length: 5000\r\n\r\n".encode()) as sock:
        for _ in range(10):
            sock.sendall(bytes(500))
            time.sleep(0.4)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert path.read_bytes()[:5000] == bytes(5000)


def test_response_has_to_make_progress(serve, tmp_path):
    """A client that takes a byte now and then doesn't occupy a thread and a file for as long as it likes."""
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(64 * 1024 * 1024)
    server = serve("-c", "1", setup=HASTY)
    (worker,) = wait_for(lambda: children_of(server.process.pid), what="a worker")
    name = quote(str(tmp_path / "large"))
    head = f"GET /blocks?filename={name}&offset=0&size={64 * 1024 * 1024} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server, head.encode(), buffer=4096) as sock:
        wait_for(lambda: is_open(worker, tmp_path / "large"), what="the server to open the file")
        deadline = time.monotonic() + TIMEOUT
        while is_open(worker, tmp_path / "large"):
            assert time.monotonic() < deadline, "the server is very patient"
            with suppress(OSError):
                sock.recv(1)
            time.sleep(0.1)


def test_idle_connections_end(serve, path):
    """A client that doesn't ask again frees its place."""
    server = serve(setup=HASTY)
    started = time.monotonic()
    with connect(server, HEAD + b"\r\n") as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
        while sock.recv(65536):
            pass
        assert time.monotonic() - started >= 0.9


def test_slow_bodies_have_to_make_room(launch, ask, path):
    """On an open server, where anybody may occupy a thread, patience ends early when others wait for one."""
    setup = "from pdiffcopy.server import daemon, visitors; daemon.THREADS = 4; visitors.CROWDED_TIMEOUT = 1"
    server = launch("-c", "1", setup=setup)
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1\r\nHost: localhost\r\n"
    with ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(connect(server, f"{line}Content-Length: 50000\r\n\r\nsome".encode()))
        assert ask(server, path) == 200


def test_refused_strangers_need_no_thread_of_a_client(launch, ask, path):
    """A body that nobody wants isn't waited for: who sends one without the token is answered and dismissed."""
    server = launch(
        "-c", "1", setup="from pdiffcopy.server import daemon; daemon.THREADS = 1", env={"PDIFFCOPY_TOKEN": TOKEN}
    )
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1\r\nHost: localhost\r\n"
    with ExitStack() as stack:
        strangers = [
            stack.enter_context(connect(server, f"{line}Content-Length: 50000\r\n\r\nsome".encode())) for _ in range(20)
        ]
        assert ask(server, path, **AUTHORIZED) == 200
        for sock in strangers:
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 401 ") and b"Connection: close" in answer


def test_requests_may_follow_each_other_at_once(serve, path):
    """What arrives together with a request, or while it's being answered, is the next one."""
    server = serve("-c", "1")
    request = f"GET /info?filename={quote(str(path))} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with connect(server, request * 9 + last) as sock:
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    assert answer.count(b"HTTP/1.1 200 OK") == 10


def test_head_may_arrive_in_pieces(serve):
    """Wherever it's cut. (The kernel holds a byte back until the one before is confirmed, which takes its time.)"""
    server = serve("-c", "1", setup=PATIENT)
    with connect(server) as sock:
        for byte in HEAD + b"\r\n":
            sock.sendall(bytes([byte]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")


def test_endless_head_is_refused(serve):
    """Nobody's memory is filled with it."""
    server = serve("-c", "1")
    with connect(server, HEAD) as sock:
        with suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"X: " + b"x" * 1000 + b"\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_server_without_descriptors_goes_on(launch, ask, path):
    """When no connection can be accepted any more, those that wait for longest make room."""
    limit = "import resource; r = (150, 150); resource.setrlimit(resource.RLIMIT_NOFILE, r)"
    server = launch("-c", "1", setup=limit)
    (worker,) = wait_for(lambda: children_of(server.process.pid), what="a worker")
    with ExitStack() as stack:
        crowd(stack, server, HEAD, 300)
        assert ask(server, path) == 200
    assert children_of(server.process.pid) == [worker]
    assert os.listdir(f"/proc/{worker}/fd")


class ClosingHost:
    """One whose threads close a connection, and take their time to say so."""

    threads = 1

    def __init__(self):
        self.is_closed, self.may_end = threading.Event(), threading.Event()

    def wrap(self, sock):
        return sock

    def read(self, visitor):
        visitor.head = b""

    def count_missing(self, visitor):
        return 0

    def serve(self, visitor):
        visitor.sock.close()
        self.is_closed.set()
        return self.may_end.wait(TIMEOUT) and False


def test_connection_that_its_thread_closed_ends_alone():
    """It's on the list of the served for another moment, and nobody may stumble over it."""
    host = ClosingHost()
    with ThreadPoolExecutor(1) as executor, socket.create_server(("127.0.0.1", 0)) as listener:
        desk = Reception(host, [listener], executor, executor)
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(HEAD + b"\r\n")
            while not host.is_closed.is_set():
                desk.turn()
            end = time.monotonic() + 2.5  # the desk looks after them each second
            while time.monotonic() < end:
                desk.turn()
            assert len(desk.served) == 1
            host.may_end.set()
            while desk.served:
                desk.turn()
        desk.stop()
