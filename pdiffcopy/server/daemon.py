"""How does gunicorn run the server?"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from datetime import timedelta
from typing import Any

from flask import Flask
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.sock import ssl_context
from gunicorn.workers import base
from gunicorn.workers.workertmp import WorkerTmp

from pdiffcopy.address import join_host_port
from pdiffcopy.exceptions import AbsentError, FileError, UsageError
from pdiffcopy.files.sockets import allow_kernel_encryption, get_socket_options
from pdiffcopy.server import visitors
from pdiffcopy.server.accesslog import SENT, log_access
from pdiffcopy.server.admission import Gate
from pdiffcopy.server.worker import GRACE, Worker, count_unread, ignore_signals
from pdiffcopy.words import MAX_LINE

logger = logging.getLogger(__name__)

THREADS = 1024
"""How many requests a process works on at the same time. Most of them are cheap: they wait for a slow client."""
_FREED_WITHIN = 2.0
"""How long an address may still be taken, in seconds: by the workers of a server of which the master was killed."""
_DISTRUST: dict[str, Any] = {"forwarded_allow_ips": "", "forwarder_headers": "", "secure_scheme_headers": {}}
"""Nothing that a client says of a proxy is believed."""


class Daemon(BaseApplication):
    """A gunicorn server with the settings that pdiffcopy needs."""

    def __init__(
        self, application: Flask, address: tuple[str, int], processes: int, certfile: str, keyfile: str, rate: int,
        gate: Gate,
    ):  # fmt: skip
        """
        Initialize a server.

        :param application: What answers the requests.
        :param address: A tuple of a host and a port.
        :param processes: How many processes share the work.
        :param certfile: The certificate to serve https with (empty for http).
        :param keyfile: The key of that certificate.
        :param rate: How many bytes of contents may pass in a second (0: any number).
        :param gate: Who is a client.
        """
        self.application, self.rate, self.gate = application, rate, gate
        host, port = address
        self.options = {
            "bind": join_host_port(host or "0.0.0.0", port),
            "certfile": certfile or None,
            "control_socket_disable": True,
            "graceful_timeout": GRACE,
            "keepalive": visitors.KEEPALIVE,
            "keyfile": keyfile or None,
            "limit_request_line": MAX_LINE,
            "logger_class": _Logger,
            "ssl_context": _make_tls_context,
            "threads": THREADS,
            "when_ready": _when_ready,
            "worker_class": Worker,
            "worker_connections": visitors.CONNECTIONS,
            "worker_exit": _leave,
            "workers": processes,
            **_DISTRUST,
        }
        _check_address(host or "0.0.0.0", port)
        super().__init__()
        self.contexts = _Contexts(self.cfg)

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

    SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

    def init_signals(self) -> None:
        """Called by gunicorn when it starts."""
        super().init_signals()
        ignore_signals()
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


class _Heartbeat(WorkerTmp):
    """By which the first process knows that another one doesn't hang: in memory, where no disk can keep it waiting."""

    def __init__(self, cfg: Any):
        self._tmp = os.fdopen(os.memfd_create("heartbeat"), "w+b", 0)


# Gunicorn has no setting for that.
base.WorkerTmp = _Heartbeat


class _Contexts:
    """How connections are encrypted: anew when a certificate was renewed, without ending the server for that."""

    def __init__(self, config: Any):
        self.config = config
        self.files: list[int] = []
        self.context: ssl.SSLContext | None = None
        # All processes begin with this one: a certificate that is being replaced right then does no harm.
        if config.is_ssl:
            self.get()

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


class _Logger(glogging.Logger):
    """Leaves it to the handlers of the program how messages look."""

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """A client that stalls (that's what these errors mean here) is no reason to print a traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, FileError):  # the file became shorter, or the disk can't be read, after the head was sent
            self.error("%s", error)
        elif not isinstance(error, (BlockingIOError, TimeoutError, AbsentError)):
            super().exception(msg, *args, **kwargs)

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        """Called by gunicorn at the end of each request."""
        received = int(environ.get("CONTENT_LENGTH") or 0) - count_unread(req)
        size = resp.sent + environ.get(SENT, 0) + max(received, 0)
        log_access(environ, int(str(resp.status or 500).split()[0]), size, request_time)

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


def _check_address(host: str, port: int) -> None:
    """Find out in time whether the address can be used (gunicorn would try for seconds, and say so each time)."""
    deadline = time.monotonic() + _FREED_WITHIN
    while True:
        try:
            wanted = socket.AF_INET6 if ":" in host else socket.AF_INET  # as gunicorn takes a name
            found = socket.getaddrinfo(host, port, wanted, socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
            return
        except OSError as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                where = join_host_port(host, port)
                raise UsageError("Can't listen on {where}: {reason}", where=where, reason=e.strerror or e) from e
        time.sleep(0.05)


def raise_file_limit() -> None:
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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", visitors.STALL_TIMEOUT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", visitors.STALL_TIMEOUT, 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, visitors.STALL_TIMEOUT * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in get_socket_options(sock.getsockname()[0], server.app.rate):
            sock.setsockopt(*option)


def _make_tls_context(config: Any, make_default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = make_default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return allow_kernel_encryption(context)
