"""
Where does a connection wait, for how long, and how many may?

A request gets a thread when its head is complete, and not before: until then, and between two requests, its connection
is one of many in an event loop, where slow ones cost nothing but a place. In this process::

    the loop (one thread)                                       threads
    ---------------------                                       -------
    accept --> handshake --> head --> who is that? -- a client -----> serve the request --.
                               ^               |                                          |
                               |               `----- a stranger ---> answer 401          |
                               |                      (a few threads)                     |
                               `------- another request may follow -----------------------+
                                                                                          |
    close <-- take leave <----------------------------------------------------------------'

1. *Strangers* are those of whom no request was accepted yet. There are few places for them, and little time: from the
   first packet to the end of the first head. When all places are taken, a new connection gets that of the stranger
   that has been there for longest. So thousands of slow connections keep each other out, and nobody else: a client
   needs a few milliseconds.
2. *Clients* have shown the token (or have sent a head, where there is no token). They keep their connections for a
   while between two requests. When there are too many, the one that has idled for longest is closed.
3. While a request is being served its client is watched: data has to move at a minimum rate whenever the server waits
   for the client. Where threads are scarce, little patience is left.

It doesn't matter to any of this whether a connection is encrypted, and nothing here knows what is requested.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import queue
import resource
import selectors
import socket
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from pdiffcopy.files.kernel import count_unread
from pdiffcopy.files.sockets import count_moved, count_unconfirmed
from pdiffcopy.server import visitors
from pdiffcopy.server.visitors import Host, Stage, Visitor

_CHUNK, _ROUND, _TICK = 16 * 1024, 64, 1.0
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

logger = logging.getLogger(__name__)


class Reception:
    """The event loop of a process."""

    def __init__(self, host: Host, listeners: Iterable[socket.socket], clients: Executor, strangers: Executor):
        """
        Initialize a reception.

        :param host: Who knows what a request is.
        :param listeners: Where connections come in.
        :param clients: The threads that work for clients.
        :param strangers: The threads that say no.
        """
        self.host = host
        # A quarter is left for those that take leave, and for the files.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.places, self.connections = min(visitors.PLACES, limit // 8), min(visitors.CONNECTIONS, limit // 2)
        self.executors = {True: clients, False: strangers}
        self.selector = selectors.DefaultSelector()
        self.listeners = {listener: listener.getsockname() for listener in listeners}
        # All of them have the order in which their members came, so the first one has been there for longest.
        self.strangers: dict[Visitor, None] = {}
        self.held: dict[Visitor, None] = {}
        self.idle: dict[Visitor, None] = {}
        self.served: dict[Visitor, None] = {}
        self.leaving: dict[Visitor, None] = {}
        self._finished: queue.SimpleQueue[tuple[Visitor, bool]] = queue.SimpleQueue()
        self._bell, self._ringer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._opens = 0.0
        self._is_open = False
        self._swept = time.monotonic()
        self.selector.register(self._bell, selectors.EVENT_READ, self._answer_bell)

    def heed(self, fd: int) -> None:
        """Wake up when something arrives at a descriptor, and throw that away (:func:`signal.set_wakeup_fd`)."""
        self.selector.register(fd, selectors.EVENT_READ, lambda: os.read(fd, _CHUNK))

    def turn(self) -> None:
        """Do what there is to do, or wait for that for a moment."""
        if time.monotonic() >= self._opens:
            self._open()
        pause = min((visitor.deadline for visitor in self.held), default=math.inf) - time.monotonic()
        for key, _ in self.selector.select(min(max(pause, 0), _TICK)):
            if isinstance(key.data, Visitor):
                self._proceed(key.data)
            elif isinstance(key.data, socket.socket):
                self._accept(key.data)
            else:
                key.data()
        self._answer_held()
        if time.monotonic() >= self._swept + _TICK:
            self._sweep()

    def stop(self) -> None:
        """Let nobody else in, and close what isn't needed for a request that is being served."""
        self._close_doors()
        self.listeners.clear()
        for visitor in [*self.strangers, *self.held, *self.idle]:
            self._close(visitor)

    # Visitors come in {{{1

    def _open(self) -> None:
        self._opens = math.inf
        for listener in self.listeners:
            listener.setblocking(False)
            self.selector.register(listener, selectors.EVENT_READ, listener)
            self._is_open = True

    def _close_doors(self) -> None:
        for listener in self.listeners if self._is_open else ():
            self.selector.unregister(listener)
        self._is_open = False

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ROUND):
            if not (self._is_open and self._make_room()):
                break
            try:
                sock, client = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as e:
                if e.errno not in _NO_ROOM:
                    raise
                if not self._send_away(self.held, self.strangers, self.idle):
                    self._pause()
                break
            self._welcome(sock, client, self.listeners[listener])

    def _make_room(self) -> bool:
        """Whether there's a place for a stranger, and one for a client that it may turn out to be."""
        while len(self.strangers) + len(self.held) >= self.places:
            self._send_away(self.strangers, self.held)
        if len(self.idle) + len(self.served) < self.connections or self._send_away(self.idle):
            return True
        self._pause()
        return False

    def _pause(self) -> None:
        """All that could be sent away are being served: who comes now waits outside."""
        self._close_doors()
        self._opens = time.monotonic() + _TICK

    def _send_away(self, *kinds: dict[Visitor, None]) -> bool:
        """Close the connection that has waited for longest, of those of which there are most."""
        most: dict[Visitor, None] = max(kinds, key=len)
        visitor = next(iter(most), None)
        if visitor:
            self._close(visitor)
        return bool(visitor)

    def _welcome(self, sock: socket.socket, client: Any, server: Any) -> None:
        visitor = Visitor(sock, client, server)
        self.strangers[visitor] = None
        try:
            sock.setblocking(False)
            visitor.sock = self.host.wrap(sock)
            self.selector.register(visitor.sock, selectors.EVENT_READ, visitor)
        except OSError as e:
            logger.debug("%s left early: %s", visitor.address, e)
            self._close(visitor)
        if isinstance(visitor.sock, ssl.SSLSocket):
            visitor.stage = Stage.HANDSHAKE

    # Until there's a request {{{1

    def _proceed(self, visitor: Visitor) -> None:
        """Something arrived, or may be sent. (Nothing happens to a visitor whose stage has changed meanwhile.)"""
        try:
            if visitor.stage is Stage.HANDSHAKE:
                assert isinstance(visitor.sock, ssl.SSLSocket)
                visitor.sock.do_handshake()
                visitor.stage = Stage.HEAD
                self.selector.modify(visitor.sock, selectors.EVENT_READ, visitor)
            while visitor.stage is Stage.HEAD:
                self._read(visitor)
            if visitor.stage is Stage.LEAVING and not visitor.sock.recv(_CHUNK):
                self._close(visitor)
        except (BlockingIOError, ssl.SSLWantReadError):
            self.selector.modify(visitor.sock, selectors.EVENT_READ, visitor)
        except ssl.SSLWantWriteError:
            self.selector.modify(visitor.sock, selectors.EVENT_WRITE, visitor)
        except ssl.SSLError as e:
            self._refuse(visitor, e)
        except OSError as e:
            logger.debug("%s left early: %s", visitor.address, e)
            self._close(visitor)

    def _read(self, visitor: Visitor) -> None:
        data = visitor.sock.recv(_CHUNK)
        if not data:
            self._close(visitor)
            return
        if not visitor.head and visitor.is_client:
            visitor.deadline = time.monotonic() + visitors.HEAD_TIMEOUT
        visitor.head += data
        self._look_at_head(visitor)

    def _look_at_head(self, visitor: Visitor) -> None:
        is_complete = b"\r\n\r\n" in visitor.head or len(visitor.head) > visitors.HEAD_SIZE
        if not (is_complete or visitor.head.startswith(visitors.TLS_HANDSHAKE)):
            return
        try:
            delay = self.host.read(visitor)
        except Exception as e:
            self._refuse(visitor, e)
            return
        visitor.is_client = delay is None
        if delay:
            self._forget(visitor)
            self.held[visitor] = None
            visitor.stage, visitor.deadline = Stage.HELD, time.monotonic() + delay
        else:
            self._hand_over(visitor)

    def _answer_held(self) -> None:
        for visitor in [visitor for visitor in self.held if time.monotonic() >= visitor.deadline]:
            self._hand_over(visitor)

    def _refuse(self, visitor: Visitor, error: Exception) -> None:
        self.host.refuse(visitor, error)
        self._take_leave(visitor)

    # While there's a request {{{1

    def _hand_over(self, visitor: Visitor) -> None:
        """A thread takes care of the rest."""
        self._forget(visitor)
        self.served[visitor] = None
        visitor.stage, visitor.patience, visitor.moved = Stage.SERVED, visitors.STALL_TIMEOUT, count_moved(visitor.sock)
        with suppress(RuntimeError):  # no more threads can start: those that there are find it in their queue
            self.executors[visitor.is_client].submit(self._serve, visitor)

    def _serve(self, visitor: Visitor) -> None:
        """Called in a thread."""
        goes_on = False
        try:
            goes_on = self.host.serve(visitor)
        finally:
            self._finished.put((visitor, goes_on))
            with suppress(BlockingIOError):  # it rings already
                os.write(self._ringer, b"\0")

    def _answer_bell(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._bell, _CHUNK)
        with suppress(queue.Empty):
            while True:
                self._finish(*self._finished.get_nowait())

    def _finish(self, visitor: Visitor, goes_on: bool) -> None:
        visitor.request = None
        if not (goes_on and visitor.is_client and self.listeners):
            self._take_leave(visitor)
            return
        del self.served[visitor]  # it's on no other list, and nothing waits for it
        self.idle[visitor] = None
        visitor.stage = Stage.HEAD
        visitor.deadline = time.monotonic() + (visitors.HEAD_TIMEOUT if visitor.head else visitors.KEEPALIVE)
        visitor.sock.setblocking(False)
        self.selector.register(visitor.sock, selectors.EVENT_READ, visitor)
        # What has arrived already doesn't wake anybody up.
        if visitor.head:
            self._look_at_head(visitor)
        if isinstance(visitor.sock, ssl.SSLSocket):
            self._proceed(visitor)

    def _watch(self, visitor: Visitor, elapsed: float, limit: float) -> None:
        """Find out whether the server waits for this client, and put an end to it when that takes too long."""
        sock = visitor.sock
        try:
            is_unread = count_unconfirmed(sock) > 0
            # A thread sleeps until so much is there (SO_RCVLOWAT, usually a byte), or all that's missing.
            enough = min(self.host.count_missing(visitor), sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
            is_missing = count_unread(sock.fileno()) < enough
            moved = count_moved(sock)
        except (OSError, ValueError):
            return  # its thread has closed it
        gained, visitor.moved = moved - visitor.moved, moved
        if not (is_unread or is_missing):
            visitor.patience = visitors.STALL_TIMEOUT
            return
        visitor.patience = min(visitor.patience - elapsed + gained / visitors.MINIMUM_RATE, visitors.STALL_TIMEOUT)
        if visitor.patience <= visitors.STALL_TIMEOUT - limit:
            # The thread learns of it. A client that doesn't send gets an answer, one that doesn't read couldn't.
            logger.info("%s is too slow", visitor.address)
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR if is_unread else socket.SHUT_RD)

    # Until it's closed {{{1

    def _take_leave(self, visitor: Visitor) -> None:
        """Give a client time to read its answer: it's lost when a connection is closed with something unread."""
        self._forget(visitor)
        try:
            # What is still coming is thrown away as it is, encrypted or not.
            visitor.sock = socket.socket(fileno=visitor.sock.detach())
            visitor.sock.setblocking(False)
            visitor.sock.shutdown(socket.SHUT_WR)
            self.selector.register(visitor.sock, selectors.EVENT_READ, visitor)
        except (OSError, ValueError):
            self._close(visitor)
            return
        while len(self.leaving) >= self.places:
            self._send_away(self.leaving)
        self.leaving[visitor] = None
        visitor.stage, visitor.deadline = Stage.LEAVING, time.monotonic() + visitors.LEAVE_TIMEOUT

    def _close(self, visitor: Visitor) -> None:
        self._forget(visitor)
        with suppress(OSError):
            visitor.sock.close()
        visitor.stage = Stage.CLOSED

    def _forget(self, visitor: Visitor) -> None:
        """Take a visitor off all lists."""
        for place in (self.strangers, self.held, self.idle, self.served, self.leaving):
            place.pop(visitor, None)
        with suppress(KeyError, ValueError):
            self.selector.unregister(visitor.sock)

    def _sweep(self) -> None:
        """Look for those whose time is over."""
        now = time.monotonic()
        # After a pause of the whole process nobody is to blame for all of it.
        elapsed, self._swept = min(now - self._swept, 2 * _TICK), now
        for visitor in [*self.strangers, *self.idle, *self.leaving]:
            if now >= visitor.deadline:
                self._close(visitor)
        # The thread of a client that says nothing at all finds that out by itself, and can tell it so.
        is_crowded, stall = len(self.served) > self.host.threads, visitors.STALL_TIMEOUT
        limit = min(visitors.CROWDED_TIMEOUT, stall) if is_crowded else stall + 2 * _TICK
        for visitor in list(self.served):
            self._watch(visitor, elapsed, limit)
