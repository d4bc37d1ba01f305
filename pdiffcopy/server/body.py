"""
How do bytes travel between a file and the client without being copied again and again?

WSGI moves byte strings. On the way in gunicorn collects, cuts and joins them: that's four copies of each byte and half
of the time of an upload. On the way out each byte is read into a new string and sent from there. When the server is
gunicorn, and its objects look as expected, the bytes are spliced from the socket (see :mod:`.splice`), and sent by
``sendfile(2)``, or pass through one buffer where they are encrypted; otherwise WSGI's own way is taken.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pdiffcopy.exceptions import AbsentError
from pdiffcopy.files.buffers import CHUNK_SIZE
from pdiffcopy.files.sockets import receive_rest
from pdiffcopy.files.splice import Chunk
from pdiffcopy.files.stored import Sendable
from pdiffcopy.pace import UNLIMITED, Pace
from pdiffcopy.server.accesslog import SENT

WATCH_INTERVAL = 0.002
"""How long somebody who has gone away is worked for, in seconds."""


def read_body(environ: dict[str, Any], length: int, pace: Pace = UNLIMITED) -> Iterator[Chunk]:
    """
    Read a request body.

    :param environ: The WSGI environment of the request.
    :param length: How many bytes the body has.
    :param pace: How fast they may pass.
    :returns: A generator of chunks, each of which is valid until the next one is asked for.
    :raises: :exc:`.AbsentError` when the client sends less, or nothing for too long.
    """
    try:
        yield from (_receive if _is_direct(environ, length) else _read)(environ, length, pace)
    except OSError as e:
        raise AbsentError("The body ended early: {reason}", reason=e.strerror or e) from e


def send_chunks(environ: dict[str, Any], chunks: Iterable[Chunk]) -> Iterator[bytes]:
    """
    Send chunks as the body of a response.

    :param environ: The WSGI environment of the request.
    :returns: A generator of what is left to WSGI.
    :raises: :exc:`.FileError` when the file ends before an extent does. The client learns of that when gunicorn closes
             the connection.
    """
    sock = _get_socket(environ)
    if not (sock and isinstance(chunks, Sendable)):
        yield from map(bytes, chunks)
        return
    yield b""  # makes gunicorn send the head
    environ[SENT] = 0

    def count(size: int) -> None:
        environ[SENT] += size

    chunks.count = count
    chunks.send(sock)


def watch_client(environ: dict[str, Any]) -> Callable[[], bool]:
    """
    Find out whether the client of a request still waits for the answer.

    :param environ: The WSGI environment of the request.
    :returns: A function that any thread may call as often as it likes, since it looks once in :data:`WATCH_INTERVAL`
              seconds. It says yes when it can't tell.
    """
    sock = environ.get("gunicorn.socket")
    due = 0.0

    def is_awaited() -> bool:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return True
        due = now + WATCH_INTERVAL
        poll = select.poll()
        if isinstance(sock, socket.socket):
            poll.register(sock, select.POLLRDHUP)  # the end of a connection is told in any case (poll(2))
        return not poll.poll(0)

    return is_awaited


def _get_socket(environ: dict[str, Any]) -> socket.socket | None:
    """The socket of a client, if bytes can go through it as they are: not with HTTP/2 or cooperative threads."""
    sock = environ.get("gunicorn.socket")
    if not isinstance(sock, socket.socket) or environ.get("SERVER_PROTOCOL") not in ("HTTP/1.0", "HTTP/1.1"):
        return None
    # One that is encrypted waits in the ssl module, whatever its descriptor does.
    return sock if isinstance(sock, ssl.SSLSocket) or os.get_blocking(sock.fileno()) else None


def _read(environ: dict[str, Any], length: int, pace: Pace) -> Iterator[bytes]:
    while length:
        chunk = environ["wsgi.input"].read(min(length, CHUNK_SIZE, pace.step))
        if not chunk:
            raise AbsentError("The body ended early")
        length -= len(chunk)
        yield chunk
        pace.take(len(chunk))


def _is_direct(environ: dict[str, Any], length: int) -> bool:
    """Whether gunicorn's reader has nothing but what arrived together with the head, and can be told of the rest."""
    reader = getattr(environ["wsgi.input"], "reader", None)
    unreader = getattr(reader, "unreader", None)
    return (
        _get_socket(environ) is not None
        and getattr(unreader, "sock", None) is environ["gunicorn.socket"]
        and getattr(reader, "length", None) == length
        and hasattr(unreader, "buf")
        and environ["wsgi.input"].buf.tell() == 0
    )


def _receive(environ: dict[str, Any], length: int, pace: Pace) -> Iterator[Chunk]:
    reader, sock = environ["wsgi.input"].reader, environ["gunicorn.socket"]
    # What arrived together with the header.
    ahead = reader.unreader.read(min(length, len(reader.unreader.buf.getvalue())))
    for chunk in receive_rest(sock, ahead, length, _get_timeout(sock), pace):
        # Gunicorn looks at this to find out whether the next request follows.
        reader.length -= len(chunk)
        yield chunk


def _get_timeout(sock: socket.socket) -> float | None:
    """How long the socket itself waits, in seconds (see socket(7), the server configures it)."""
    seconds, microseconds = struct.unpack("ll", sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
    return seconds + microseconds / 1e6 or None
