"""How does a process of the server read requests and answer them?"""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn.http import RequestParser
from gunicorn.http.body import LengthReader
from gunicorn.http.errors import (
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.workers.gthread import ThreadWorker

from pdiffcopy.answers import PROBLEM_TYPE, encode_problem
from pdiffcopy.server import visitors
from pdiffcopy.server.accesslog import log_access
from pdiffcopy.server.admission import NOTED
from pdiffcopy.server.reception import Reception

logger = logging.getLogger(__name__)

STRANGER_THREADS = 4
"""How many strangers are told at the same time that they can't come in."""
GRACE = 3
"""How long requests may go on after SIGTERM, in seconds."""


def ignore_signals() -> None:
    """Leave no signal a meaning that it hasn't in other programs."""
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH):
        signal.signal(number, signal.SIG_IGN)


class Worker(ThreadWorker):
    """
    A process that serves.

    Gunicorn's worker of this kind gives a thread to whoever connects. Here connections wait in a :class:`.Reception`
    for their requests, which are read and answered by gunicorn then.
    """

    def init_signals(self) -> None:
        """Called by gunicorn when the process starts."""
        super().init_signals()
        ignore_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the first process decides what that means

    def load_wsgi(self) -> None:
        """Called by gunicorn when the process starts."""
        self.threads: int = self.cfg.threads
        self.wsgi = self.answer

    def run(self) -> None:
        """Called by gunicorn: the life of the process."""
        strangers = ThreadPoolExecutor(STRANGER_THREADS)
        desk = Reception(self, [listener.sock for listener in self.sockets], self.tpool, strangers)
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
        context: ssl.SSLContext = self.app.contexts.get()
        return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def read(self, visitor: visitors.Visitor) -> float | None:
        """Read a request, and find out who sent it."""
        head, visitor.head = visitor.head, b""
        if head.startswith(visitors.TLS_HANDSHAKE):
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

    def refuse(self, visitor: visitors.Visitor, error: Exception) -> None:
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

    def serve(self, visitor: visitors.Visitor) -> bool:
        """Answer a request."""
        request, sock = visitor.request, visitor.sock
        request.is_client = visitor.is_client
        # A socket that isn't encrypted knows by itself how long to wait (see _when_ready).
        sock.settimeout(visitors.STALL_TIMEOUT if isinstance(sock, ssl.SSLSocket) else None)
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

    def count_missing(self, visitor: visitors.Visitor) -> int:
        """How much of the body of a request is missing."""
        return count_unread(visitor.request)

    def answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The application, as gunicorn calls it. The connection ends for strangers, and where a body goes on."""
        environ[NOTED] = True
        body = self.app.application(environ, start_response)
        response = start_response.__self__
        if not (response.req.is_client and _skip_body(response.req)):
            response.force_close()
        return body


def count_unread(request: Any) -> int:
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


_PARSE_ERRORS = {LimitRequestLine: 414, LimitRequestHeaders: 431, UnsupportedTransferCoding: 501}
