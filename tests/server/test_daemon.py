"""How gunicorn runs the server: what isn't HTTP, who stalls, and how it begins and ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from pdiffcopy.address import Address
from pdiffcopy.client import Network
from pdiffcopy.client.servers import Servers
from pdiffcopy.server import daemon, start_server
from tests.support import (
    STALL,
    can_connect,
    children_of,
    error_lines,
    exchange,
    find_free_port,
    is_alive,
    read_links,
    run_pdiffcopy,
    serve_https,
    wait_for,
    write_pattern,
)

TIMEOUT = 20


@pytest.fixture
def path(tmp_path):
    """A file with known contents."""
    write_pattern(tmp_path / "file", 10_000)
    return tmp_path / "file"


# What isn't HTTP {{{1


def make_head(line: str = "GET /info?filename=/x HTTP/1.1", *headers: str) -> bytes:
    return "\r\n".join([line, "Host: localhost", *headers, "", ""]).encode("latin1")


MALFORMED = {
    "nonsense": (b"nonsense\r\n\r\n", 400),
    "zeros": (bytes(4) + b"\r\n\r\n", 400),
    "version": (make_head("GET /info HTTP/9.9"), 400),
    "header": (make_head("GET /info HTTP/1.1", "no colon"), 400),
    "negative length": (make_head("POST /resize HTTP/1.1", "Content-Length: -1"), 400),
    "two lengths": (make_head("POST /resize HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked"), 400),
    "long line": (make_head(f"GET /{'x' * 9000} HTTP/1.1"), 414),
    "long header": (make_head("GET /info HTTP/1.1", f"X: {'x' * 9000}"), 431),
    "many headers": (make_head("GET /info HTTP/1.1", *(f"X-{i}: x" for i in range(200))), 431),
    "coding": (make_head("POST /resize HTTP/1.1", "Transfer-Encoding: nonsense, chunked"), 501),
}


@pytest.mark.parametrize("payload, status", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_a_problem(server, payload, status):
    """What isn't HTTP is answered like all that a client does wrong, and the connection ends."""
    head, _, body = exchange(server.port, payload).partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    assert headers["content-type"] == "application/problem+json"
    assert (headers["connection"], headers["content-length"]) == ("close", str(len(body)))
    problem = json.loads(body)
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert problem["title"] and problem["detail"]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "request_head",
    ["GET", "nonsense\r\n\r\n", "GET /info HTTP/9.9\r\n\r\n", f"GET /{'x' * 9000} HTTP/1.1\r\n\r\n", "\0\0\0\0\r\n\r\n",
     "POST /resize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     "POST /resize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["cut", "nonsense", "version", "long", "zeros", "negative length", "two lengths"],
)  # fmt: skip
def test_what_is_not_http_is_refused(server, request_head):
    """Bytes that are no request get an error, or nothing, and the server goes on."""
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(request_head.encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer == b"" or re.match(rb"HTTP/1\.[01] [45]\d\d ", answer), answer
    assert requests.get(f"{server.origin}/nothing", timeout=TIMEOUT).status_code == 404


# Who stalls {{{1


@pytest.mark.parametrize(
    "payload",
    [b"GET /in", make_head()[:-2], b"POST /resize HTTP/1.1\r\nHost: localhost\r\nContent-Le"],
    ids=["line", "head", "header"],
)
def test_half_a_request_is_given_up(impatient, payload):
    """A connection on which a request doesn't go on is closed, and that's no reason for a traceback."""
    started = time.monotonic()
    exchange(impatient.port, payload)
    assert time.monotonic() - started >= STALL
    assert "Traceback" not in impatient.log.read_text()


LARGE = 64 * 1024 * 1024


@pytest.mark.parametrize("wanted", [f"offset=0&size={LARGE}", f"extents=0:{LARGE // 2},{LARGE // 2}:{LARGE // 2}"])
def test_who_does_not_read_is_given_up(impatient, tmp_path, wanted):
    """A client that asks for data and leaves them lying around doesn't occupy the server: the file is closed."""
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(LARGE)
    (worker,) = children_of(impatient.process.pid)
    with socket.create_connection(("127.0.0.1", impatient.port), TIMEOUT) as sock:
        sock.sendall(make_head(f"GET /blocks?filename={quote(str(tmp_path / 'large'))}&{wanted} HTTP/1.1"))
        assert sock.recv(17) == b"HTTP/1.1 200 OK\r\n"
        wait_for(lambda: is_open(worker, tmp_path / "large"), what="the server to open the file")
        wait_for(lambda: not is_open(worker, tmp_path / "large"), what="the server to give up")


def is_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    return str(path) in read_links(pid)


def test_stalled_clients_do_not_keep_others_waiting(impatient, path):
    """However many connections come to an end because of their clients: the next one is served, by the same process."""
    before = children_of(impatient.process.pid)
    head = make_head(f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1", "Content-Length: 100")
    with ExitStack() as stack:
        stalled = [
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port), TIMEOUT)) for _ in range(30)
        ]
        for sock in stalled:
            sock.sendall(head + b"half")
        for sock in stalled:
            assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
        # Now the server tries to skip what's missing, and takes leave of one connection after the other.
        for sock in stalled:
            while sock.recv(1000):
                pass
            assert requests.get(f"{impatient.origin}/info", {"filename": path}, timeout=5).status_code == 200
    assert children_of(impatient.process.pid) == before


def test_answer_arrives_though_the_request_goes_on(impatient, path):
    """A client that has sent more than the server wanted to read still gets to know what was wrong."""
    size = 20_000_000
    head = make_head(f"POST /blocks?filename={quote(str(path))}x&offset=0 HTTP/1.1", f"Content-Length: {size}")
    with socket.create_connection(("127.0.0.1", impatient.port), TIMEOUT) as sock:
        sock.sendall(head)
        for _ in range(size // 100_000):
            sock.sendall(bytes(100_000))
        assert sock.recv(100).startswith(b"HTTP/1.1 404 ")


# How it begins and ends {{{1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_ends_the_server_and_leaves_no_process(launch, path, number):
    """Within seconds, also with a connection that idles and with one in the middle of a request."""
    server = launch("-c", "3")
    name = quote(str(path))
    family = wait_for(lambda: len(found := children_of(server.process.pid)) == 3 and found, what="three workers")
    with socket.create_connection(("127.0.0.1", server.port)) as idle, \
            socket.create_connection(("127.0.0.1", server.port)) as busy:  # fmt: skip
        idle.sendall(f"GET /info?filename={name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert idle.recv(100).startswith(b"HTTP/1.1 200 ")
        busy.sendall(f"POST /blocks?filename={name}&offset=0 HTTP/1.1\r\nContent-Length: 9\r\n\r\n".encode())
        server.process.send_signal(number)
        server.process.wait(10)
    assert not any(map(is_alive, family))
    assert not can_connect(server.port)


@pytest.mark.parametrize("number, status", [(signal.SIGHUP, 129), (signal.SIGQUIT, 0)], ids=["SIGHUP", "SIGQUIT"])
@pytest.mark.parametrize("everybody", [False, True], ids=["first process", "all processes"])
def test_server_ends_with_its_terminal(launch, path, number, status, everybody):
    """A program in the foreground doesn't stay behind, whether the terminal tells one of its processes or all."""
    server = launch("-c", "2", start_new_session=True)
    family = wait_for(lambda: len(found := children_of(server.process.pid)) == 2 and found, what="two workers")
    (os.killpg if everybody else os.kill)(server.process.pid, number)
    assert server.process.wait(10) == status
    wait_for(lambda: not any(map(is_alive, family)), what="the end of the workers")
    assert "Traceback" not in server.log.read_text()


def test_server_outlives_its_terminal_under_nohup(launch):
    """SIGHUP that was ignored at the start stays ignored, in all processes."""
    server = launch("-c", "2", start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    family = wait_for(lambda: len(found := children_of(server.process.pid)) == 2 and found, what="two workers")
    os.killpg(server.process.pid, signal.SIGHUP)
    time.sleep(1.5)  # a worker that is missing is replaced once a second
    assert children_of(server.process.pid) == family


STRAY = (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


def test_no_signal_changes_the_workers(launch, path):
    """Gunicorn's own signals have no meaning: nothing is added, removed, restarted or stopped by them."""
    server = launch("-c", "2")
    family = wait_for(lambda: len(found := children_of(server.process.pid)) == 2 and found, what="two workers")
    for number in STRAY:
        for pid in [server.process.pid, *family]:
            os.kill(pid, number)
    for worker in family:
        os.kill(worker, signal.SIGHUP)
    time.sleep(1.5)  # gunicorn looks once a second
    assert children_of(server.process.pid) == family
    assert requests.get(f"{server.origin}/info", {"filename": path}, timeout=TIMEOUT).status_code == 200


def test_pause_of_the_server_is_no_reason_to_restart_workers(monkeypatch):
    """A process that was stopped with all others (Control-Z, a frozen container) isn't taken for hanging."""
    killed, clock = [], [100.0]
    monkeypatch.setattr(daemon.Arbiter, "murder_workers", lambda self: killed.append(clock[0]))
    monkeypatch.setattr(daemon.time, "monotonic", lambda: clock[0])
    arbiter = daemon._Arbiter.__new__(daemon._Arbiter)
    for clock[0] in (100.0, 101.0, 102.0, 900.0, 901.0):
        arbiter.murder_workers()
    assert killed == [101.0, 102.0, 901.0]


def test_heartbeat_is_in_memory(launch, tmp_path):
    """No process depends on a file in $TMPDIR, which may be full, frozen or read-only."""
    server = launch("-c", "1", env={"TMPDIR": str(tmp_path)})
    (worker,) = wait_for(lambda: children_of(server.process.pid), what="a worker")
    for pid in (server.process.pid, worker):
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [link for link in links if link.startswith(str(tmp_path))]
        assert [link for link in links if link.startswith("/memfd:heartbeat")]


def test_renewed_certificate_is_used(launch, authority, tmp_path):
    """It takes no restart, and one that is half written doesn't do any harm."""
    for name in ("pem", "key"):
        shutil.copy(authority / f"server.{name}", tmp_path / f"tls.{name}")
    server = serve_https(launch, tmp_path, "tls")

    def get_certificate() -> str:
        return ssl.get_server_certificate(("127.0.0.1", server.port), timeout=TIMEOUT)

    first = get_certificate()
    (tmp_path / "tls.pem").write_text("half a certif")
    assert get_certificate() == first
    for name in ("pem", "key"):
        shutil.copy(authority / f"stranger.{name}", tmp_path / f"tls.{name}")
    assert get_certificate() != first


def test_http_on_a_port_for_https_is_named(launch, authority):
    """A user who forgot the s gets to know it."""
    server = serve_https(launch, authority)
    answer = exchange(server.port, make_head())
    assert answer.startswith(b"HTTP/1.1 400 ") and b"https" in answer


def test_concurrency_is_the_number_of_processes(launch):
    """``-c`` sets how many processes serve."""
    server = launch("--concurrency=1")
    assert len(wait_for(lambda: children_of(server.process.pid), what="a worker")) == 1


def test_server_listens_where_it_is_told(launch):
    """An address in brackets is an IPv6 address."""
    port = find_free_port()
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("there is no IPv6 here")
    command = [sys.executable, "-m", "pdiffcopy", "--listen", f"[::1]:{port}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def connects():
        with socket.socket(socket.AF_INET6) as sock:
            return sock.connect_ex(("::1", port)) == 0

    try:
        wait_for(connects, what="the server")
        assert requests.get(f"http://[::1]:{port}/info?filename=/nothing", timeout=TIMEOUT).status_code == 404
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_port_in_use_is_one_line(server):
    """A second server on the same port says so and ends."""
    result = run_pdiffcopy("--listen", f"127.0.0.1:{server.port}")
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert f"127.0.0.1:{server.port}" in line and "in use" in line


def test_limit_of_open_files_is_raised_first(monkeypatch):
    """What the application allows to be open at the same time is a part of it."""
    steps = []

    class Daemon:
        def __init__(self, *arguments):
            steps.append("daemon")

        def run(self):
            steps.append("run")

    monkeypatch.setattr(daemon, "Daemon", Daemon)
    monkeypatch.setattr(daemon, "raise_file_limit", lambda: steps.append("limit"))
    monkeypatch.setattr("pdiffcopy.server.create_app", lambda *arguments: steps.append("application"))
    start_server("127.0.0.1:1")
    assert steps == ["limit", "application", "daemon", "run"]


def test_port_that_is_about_to_be_free_is_waited_for(monkeypatch):
    """The workers of a server of which the master was killed have it for a moment longer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(daemon.time, "sleep", lambda seconds: listener.close())
        daemon._check_address(*listener.getsockname())


@pytest.mark.skipif(not shutil.which("ss"), reason="ss (iproute2) isn't installed")
def test_connections_on_loopback_are_not_paced(launch, path):
    """Neither end sends by the clock, whatever the congestion control of the system is."""
    server = launch()
    replica = Servers(Network(retries=0)).open(Address(str(path), "127.0.0.1", server.port))
    assert replica.info()[0].size == 10_000
    here = f"sport = :{server.port} or dport = :{server.port}"
    lines = subprocess.run(["ss", "-OtinH", "state", "established", here], capture_output=True, text=True, check=True)
    ends = [line for line in lines.stdout.splitlines() if f"127.0.0.1:{server.port}" in line]
    assert len(ends) >= 2
    assert all(" reno " in end for end in ends), ends
