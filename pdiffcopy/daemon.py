"""How does gunicorn run the server?"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from flask import Flask
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException, UnsupportedTransferCoding
from gunicorn.workers import base
from gunicorn.workers.gthread import ThreadWorker
from gunicorn.workers.workertmp import WorkerTmp

from pdiffcopy.address import join_host_port
from pdiffcopy.exceptions import UsageError
from pdiffcopy.protocol import PROBLEM_TYPE, encode_problem
from pdiffcopy.splice import get_socket_options

logger = logging.getLogger(__name__)

THREADS = 1024
"""How many requests a process works on at the same time. Most of them are cheap: they wait for a slow client."""
CONNECTIONS = 4096
"""How many connections a process has open at the same time."""
STALL_TIMEOUT = 30
"""After how many seconds without a sign of life a client is given up."""
KEEPALIVE = 75
"""How long an idle connection stays open, in seconds."""
LEAVE_TIMEOUT = 2
"""How long to wait for a client to close its end of a connection that comes to an end, in seconds."""
GRACE = 3
"""How long requests may go on after SIGTERM, in seconds."""


class Daemon(BaseApplication):
    """A gunicorn server with the settings that pdiffcopy needs."""

    def __init__(self, application: Flask, address: tuple[str, int], processes: int, certfile: str, keyfile: str):
        """
        Initialize a server.

        :param application: What answers the requests.
        :param address: A tuple of a host and a port.
        :param processes: How many processes share the work.
        :param certfile: The certificate to serve https with (empty for http).
        :param keyfile: The key of that certificate.
        """
        self.application = application
        host, port = address
        self.options = {
            "bind": join_host_port(host or "0.0.0.0", port),
            "certfile": certfile or None,
            "control_socket_disable": True,
            "graceful_timeout": GRACE,
            "keepalive": KEEPALIVE,
            "keyfile": keyfile or None,
            "limit_request_line": 8190,
            "logger_class": _Logger,
            "ssl_context": _make_tls_context,
            "threads": THREADS,
            "when_ready": _when_ready,
            "worker_class": _Worker,
            "worker_connections": CONNECTIONS,
            "worker_exit": _leave,
            "workers": processes,
        }
        _check_address(host or "0.0.0.0", port)
        _raise_file_limit()
        super().__init__()

    def load_config(self) -> None:
        """Called by gunicorn, older versions of which don't know all of these settings."""
        for name, value in self.options.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called by gunicorn in each process."""
        return self.application

    def run(self) -> None:
        """Serve until a signal ends that."""
        _Arbiter(self).run()


class _Arbiter(Arbiter):
    """
    The first process. It sees to it that there are always as many others as the operator wants, until it's told to end.

    It's a program in the foreground: it ends with its terminal, and there's no signal to reload or to upgrade it, or
    to change the number of processes.
    """

    SIGNALS = [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]

    def init_signals(self) -> None:
        """Called by gunicorn when it starts."""
        super().init_signals()
        _ignore_signals()
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup(1) leaves it
            signal.signal(signal.SIGHUP, self.signal)

    def handle_hup(self) -> None:
        """Called by gunicorn, which would start all processes anew."""
        self.stop()
        sys.exit(128 + signal.SIGHUP)

    def murder_workers(self) -> None:
        """Called by gunicorn every second to kill processes that hang, not those that were stopped as this one was."""
        last, self._looked = getattr(self, "_looked", 0.0), time.monotonic()
        if self._looked - last < 5:
            super().murder_workers()


def _ignore_signals() -> None:
    """No signal has a meaning that it hasn't in other programs."""
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
        signal.signal(number, signal.SIG_IGN)


class _Heartbeat(WorkerTmp):
    """By which the first process knows that another one doesn't hang: in memory, where no disk can keep it waiting."""

    def __init__(self, cfg: Any):
        self._tmp = os.fdopen(os.memfd_create("heartbeat"), "w+b", 0)


# Gunicorn has no setting for that.
base.WorkerTmp = _Heartbeat


class _Worker(ThreadWorker):
    """Answers what isn't HTTP with a problem, like all other errors, and lets no client keep the others waiting."""

    def init_signals(self) -> None:
        """Called by gunicorn when the process starts."""
        super().init_signals()
        _ignore_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the first process decides what that means

    def handle(self, conn: Any) -> Any:
        """Called by gunicorn in a thread, with a connection from which a request is coming in."""
        outcome = super().handle(conn)
        if outcome is False:
            # Gunicorn would do this too, but in the thread that all clients of the process depend on.
            _take_leave(conn.sock)
        return outcome

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Called by gunicorn when a request can't be parsed, and for bugs."""
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = HTTPStatus(_PARSE_ERRORS.get(type(exc), 400))
        self.log.warning("A malformed request from %s: %s", (addr or [""])[0], exc)
        body = encode_problem(status, status.phrase, "The request is malformed, or a part of it is too long")
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nContent-Type: {PROBLEM_TYPE}\r\n"
        with suppress(OSError):
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode("ascii"))


def _take_leave(sock: socket.socket) -> None:
    """Give a client time to read its answer: when a connection is closed with something unread, it's lost at once."""
    deadline = time.monotonic() + LEAVE_TIMEOUT
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while (remaining := deadline - time.monotonic()) > 0:
            sock.settimeout(remaining)
            if not sock.recv(65536):
                break
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


_PARSE_ERRORS = {LimitRequestLine: 414, LimitRequestHeaders: 431, UnsupportedTransferCoding: 501}


class _Logger(glogging.Logger):
    """Leaves it to the handlers of the program how messages look."""

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A client that stalls (that's what these errors mean here) is no reason to print a traceback."""
        if not isinstance(sys.exc_info()[1], (BlockingIOError, TimeoutError)):
            super().exception(msg, *args, **kwargs)

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


def _check_address(host: str, port: int) -> None:
    """Find out in time whether the address can be used (gunicorn would try for seconds, and say so each time)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as e:
        where = join_host_port(host, port)
        raise UsageError("Can't listen on {where}: {reason}", where=where, reason=e.strerror or e) from e


def _raise_file_limit() -> None:
    """A connection takes a descriptor: use as many as the administrator allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave(server: Any, worker: Any) -> None:
    """End a process whose parent was killed without waiting for the threads that wait for a stalled client."""
    if os.getpid() == worker.pid and os.getppid() != worker.ppid:
        os._exit(1)


def _when_ready(server: Any) -> None:
    """Announce the server, and prepare what connections inherit from the listening socket: each wait is bounded."""
    for listener in server.LISTENERS:
        logger.info("Serving on %s (Control-C stops the server)", listener)
        sock = listener.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALL_TIMEOUT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", STALL_TIMEOUT, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_TIMEOUT * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in get_socket_options(sock.getsockname()[0]):
            sock.setsockopt(*option)


def _make_tls_context(config: Any, make_default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = make_default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
