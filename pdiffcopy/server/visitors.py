"""
What is known about a connection, and how long may it take?

A *visitor* is a connection to the server. :mod:`.reception` decides where visitors wait; a *host* knows what they ask
for.
"""

from __future__ import annotations

import socket
import time
from enum import Enum
from typing import Any, Protocol

PLACES = 512
"""For how many strangers a process has room (fewer if it may have less than 4096 descriptors)."""
CONNECTIONS = 4096
"""For how many clients a process has room (fewer if it may have less than 8192 descriptors)."""
HEAD_TIMEOUT = 10
"""How long the head of a request may take, in seconds. For a stranger that includes the handshake."""
KEEPALIVE = 75
"""How long an idle connection of a client stays open, in seconds."""
LEAVE_TIMEOUT = 2
"""How long to wait for a client to close its end of a connection that comes to an end, in seconds."""
STALL_TIMEOUT = 30
"""How long a client may keep a request waiting, in seconds."""
CROWDED_TIMEOUT = 3
"""The same when other requests wait for a thread."""
MINIMUM_RATE = 256
"""How many bytes a second are progress."""
TLS_HANDSHAKE = b"\x16\x03"
"""How a connection begins that is meant to be encrypted (RFC 8446, section 5.1), and what no request begins with."""
HEAD_SIZE = 64 * 1024
"""How long the head of a request may be, in bytes."""


class Stage(Enum):
    """What happens to a connection."""

    HANDSHAKE = "handshake"
    HEAD = "head"
    HELD = "held"
    """The answer takes time on purpose."""
    SERVED = "served"
    LEAVING = "leaving"
    CLOSED = "closed"


class Visitor:
    """A connection, and what is known about it. Gunicorn looks at some of the attributes, too."""

    def __init__(self, sock: socket.socket, client: Any, server: Any):
        """
        Initialize a visitor.

        :param sock: The socket.
        :param client: The address of the client.
        :param server: The address that the client has connected to.
        """
        self.sock, self.client, self.server = sock, client, server
        self.stage = Stage.HEAD
        self.deadline = time.monotonic() + HEAD_TIMEOUT
        self.is_client = False
        self.head = b""
        self.request: Any = None
        self.patience: float = STALL_TIMEOUT
        self.moved = 0

    @property
    def address(self) -> str:
        """Where it comes from, without the port."""
        return self.client[0] if isinstance(self.client, tuple) else ""


class Host(Protocol):
    """Who knows what a request is. All but :meth:`serve` is done in no time."""

    threads: int
    """How many requests of clients are served at the same time."""

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Begin to encrypt a connection, without the handshake, or return it as it is."""

    def read(self, visitor: Visitor) -> float | None:
        """
        Make the attribute :attr:`~Visitor.request` of the attribute :attr:`~Visitor.head`, which is emptied.

        :returns: :data:`None` if that's the request of a client, otherwise how long the answer takes, in seconds.
        :raises: Any exception if it isn't a request.
        """

    def refuse(self, visitor: Visitor, error: Exception) -> None:
        """Answer what isn't a request."""

    def serve(self, visitor: Visitor) -> bool:
        """
        Answer a request, in a thread.

        :returns: Whether another one may follow, the beginning of which is the attribute :attr:`~Visitor.head` then.
        """

    def count_missing(self, visitor: Visitor) -> int:
        """How many bytes of the body of the request haven't been read yet."""
