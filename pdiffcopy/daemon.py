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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Any

from flask import Flask
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.http import RequestParser
from gunicorn.http.body import LengthReader
from gunicorn.http.errors import (
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.sock import ssl_context
from gunicorn.workers import base
from gunicorn.workers.gthread import ThreadWorker
from gunicorn.workers.workertmp import WorkerTmp

from pdiffcopy import reception
from pdiffcopy.accesslog import SENT, log_access
from pdiffcopy.address import join_host_port
from pdiffcopy.admission import NOTED, Gate
from pdiffcopy.exceptions import AbsentError, UsageError
from pdiffcopy.protocol import PROBLEM_TYPE, encode_problem
from pdiffcopy.splice import get_socket_options

logger = logging.getLogger(__name__)

THREADS = 1024
"""How many requests a process works on at the same time. Most of them are cheap: they wait for a slow client."""
STRANGER_THREADS = 4
"""How many strangers are told at the same time that they can't come in."""
GRACE = 3
"""How long requests may go on after SIGTERM, in seconds."""


class Daemon(BaseApplication):
    """A gunicorn server with the settings that pdiffcopy needs."""

    def __init__(
        self, application: Flask, address: tuple[str, int], processes: int, certfile: str, keyfile: str, gate: Gate
    ):
        """
        Initialize a server.

        :param application: What answers the requests.
        :param address: A tuple of a host and a port.
        :param processes: How many processes share the work.
        :param certfile: The certificate to serve https with (empty for http).
        :param keyfile: The key of that certificate.
        :param gate: Who is a client.
        """
        self.application = application
        self.gate = gate
        host, port = address
        self.options = {
            "bind": join_host_port(host or "0.0.0.0", port),
            "certfile": certfile or None,
            "control_socket_disable": True,
            "graceful_timeout": GRACE,
            "keepalive": reception.KEEPALIVE,
            "keyfile": keyfile or None,
            "limit_request_line": 8190,
            "logger_class": _Logger,
            "ssl_context": _make_tls_context,
            "threads": THREADS,
            "when_ready": _when_ready,
            "worker_class": _Worker,
            "worker_connections": reception.CONNECTIONS,
            "worker_exit": _leave,
            "workers": processes,
        }
        _check_address(host or "0.0.0.0", port)
        _raise_file_limit()
        super().__init__()
        # All processes begin with this one: a certificate that is being replaced right then does no harm.
        self.contexts = _Contexts(self.cfg)
        if self.cfg.is_ssl:
            self.contexts.get()

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
    """
    A process that serves.

    Gunicorn's worker of this kind gives a thread to whoever connects. Here connections wait in a :class:`.Reception`
    for their requests, which are read and answered by gunicorn then.
    """

    def init_signals(self) -> None:
        """Called by gunicorn when the process starts."""
        super().init_signals()
        _ignore_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the first process decides what that means

    def load_wsgi(self) -> None:
        """Called by gunicorn when the process starts."""
        self.threads: int = self.cfg.threads
        self.wsgi = self.answer

    def run(self) -> None:
        """Called by gunicorn: the life of the process."""
        strangers = ThreadPoolExecutor(STRANGER_THREADS)
        desk = reception.Reception(self, [listener.sock for listener in self.sockets], self.tpool, strangers)
        desk.heed(self.PIPE[0])
        while self.alive and self.is_parent_alive():
            self.notify()
            desk.turn()
        desk.stop()
        deadline = time.monotonic() + GRACE
        while (desk.served or desk.leaving) and time.monotonic() < deadline:
            self.notify()
            desk.turn()
        for executor in (self.tpool, strangers):
            executor.shutdown(wait=False)

    # What the reception asks for {{{1

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Begin to encrypt a connection, if that's wanted."""
        if not self.cfg.is_ssl:
            return sock
        return self.app.contexts.get().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def read(self, visitor: reception.Visitor) -> float | None:
        """Read a request, and find out who sent it."""
        head, visitor.head = visitor.head, b""
        if head.startswith(reception.TLS_HANDSHAKE):
            raise ParseException("TLS on a port for http")
        if b"\r\n\r\n" not in head:
            raise LimitRequestHeaders("limit request headers fields size")
        parser = RequestParser(self.cfg, visitor.sock, visitor.client)
        parser.unreader.unread(head)
        visitor.request = next(parser)
        # As WSGI joins them.
        authorization = ",".join(value for name, value in visitor.request.headers if name == "AUTHORIZATION")
        gate = self.app.gate
        if gate.knows(authorization):
            return None
        return gate.guesses.note(visitor.address) if authorization else 0

    def refuse(self, visitor: reception.Visitor, error: Exception) -> None:
        """Answer what isn't a request with a problem, like all other errors."""
        send, status = visitor.sock.send, HTTPStatus(_PARSE_ERRORS.get(type(error), 400))
        detail = "The request is malformed, or a part of it is too long"
        if isinstance(error, ssl.SSLError):
            logger.info("No encrypted connection with %s: %s", visitor.address, error)
            if error.reason != "HTTP_REQUEST":
                return
            send, detail = partial(socket.socket.send, visitor.sock), "This server speaks https, not http"
        elif isinstance(error, (ParseException, BlockingIOError)):
            self.log.warning("A malformed request from %s: %s", visitor.address, error)
        else:
            logger.error("A bug, please report it:", exc_info=error)
        log_access({"REMOTE_ADDR": visitor.address}, status, 0, timedelta())
        body = encode_problem(status, status.phrase, detail)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nContent-Type: {PROBLEM_TYPE}\r\n"
        with suppress(OSError):
            send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode("ascii"))

    def serve(self, visitor: reception.Visitor) -> bool:
        """Answer a request."""
        request, sock = visitor.request, visitor.sock
        request.is_client = visitor.is_client
        # A socket that isn't encrypted knows by itself how long to wait (see _when_ready).
        sock.settimeout(reception.STALL_TIMEOUT if isinstance(sock, ssl.SSLSocket) else None)
        try:
            goes_on = self.handle_request(request, visitor)
            visitor.head = request.unreader.buf.getvalue()
            return bool(goes_on)
        except (StopIteration, NoMoreData) as e:
            logger.debug("%s left early: %s", visitor.address, e)
        except OSError as e:
            logger.info("The connection with %s broke: %s", visitor.address, e)
        except Exception as e:
            self.handle_error(request, sock, visitor.client, e)
        return False

    def count_missing(self, visitor: reception.Visitor) -> int:
        """How much of the body of a request is missing."""
        return _count_unread(visitor.request)

    def answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The application, as gunicorn calls it. The connection ends for strangers, and where a body goes on."""
        environ[NOTED] = True
        body = self.app.application(environ, start_response)
        response = start_response.__self__
        if not (response.req.is_client and _skip_body(response.req)):
            response.force_close()
        return body


def _count_unread(request: Any) -> int:
    """How much of the body of a request hasn't been read, as far as that's known."""
    reader = getattr(getattr(request, "body", None), "reader", None)
    return getattr(reader, "length", 0)


def _skip_body(request: Any) -> bool:
    """Throw away what is left of a body, if it has arrived already, and tell whether the next request follows."""
    reader = request.body.reader
    if not isinstance(reader, LengthReader):
        return False
    if reader.length <= len(request.unreader.buf.getvalue()):
        reader.read(reader.length)
    return not reader.length


class _Contexts:
    """How connections are encrypted: anew when a certificate was renewed, without ending the server for that."""

    def __init__(self, config: Any):
        self.config = config
        self.files: list[int] = []
        self.context: ssl.SSLContext | None = None

    def get(self) -> ssl.SSLContext:
        """The context for the next connection."""
        try:
            files = [os.stat(name).st_mtime_ns for name in (self.config.certfile, self.config.keyfile)]
            if not self.context or files != self.files:
                self.context, self.files = ssl_context(self.config), files
        except OSError as e:
            if not self.context:
                raise
            # Somebody is busy replacing them.
            logger.warning("Can't use the new certificate, and go on with the old one: %s", e)
        return self.context


_PARSE_ERRORS = {LimitRequestLine: 414, LimitRequestHeaders: 431, UnsupportedTransferCoding: 501}


class _Logger(glogging.Logger):
    """Leaves it to the handlers of the program how messages look."""

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A client that stalls (that's what these errors mean here) is no reason to print a traceback."""
        if not isinstance(sys.exc_info()[1], (BlockingIOError, TimeoutError, AbsentError)):
            super().exception(msg, *args, **kwargs)

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        """Called by gunicorn at the end of each request."""
        received = int(environ.get("CONTENT_LENGTH") or 0) - _count_unread(req)
        size = resp.sent + environ.get(SENT, 0) + max(received, 0)
        log_access(environ, int(str(resp.status or 500).split()[0]), size, request_time)

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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", reception.STALL_TIMEOUT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", reception.STALL_TIMEOUT, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, reception.STALL_TIMEOUT * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in get_socket_options(sock.getsockname()[0]):
            sock.setsockopt(*option)


def _make_tls_context(config: Any, make_default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = make_default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
