"""
How is the body of a request read without copying it again and again?

WSGI hands out new byte strings, and gunicorn collects, cuts and joins them on the way: that's four copies of each octet
and half of the time of an upload. When the server is gunicorn, and its objects look as expected, the octets are
spliced from the socket (see :mod:`.splice`) instead; otherwise WSGI's own way is taken.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

from pdiffcopy.exceptions import RequestError
from pdiffcopy.localfile import CHUNK_SIZE, Chunk
from pdiffcopy.splice import receive


def read_body(environ: dict[str, Any], length: int) -> Iterator[Chunk]:
    """
    Read a request body.

    :param environ: The WSGI environment of the request.
    :param length: How many octets the body has.
    :returns: A generator of chunks, each of which is valid until the next one is asked for.
    :raises: :exc:`.RequestError` when the client sends less, or nothing for too long.
    """
    try:
        yield from _receive(environ, length) if _is_direct(environ, length) else _read(environ, length)
    except OSError as e:
        raise RequestError("The body ended early: {reason}", reason=e.strerror or e) from e


def _read(environ: dict[str, Any], length: int) -> Iterator[bytes]:
    while length:
        chunk = environ["wsgi.input"].read(min(length, CHUNK_SIZE))
        if not chunk:
            raise RequestError("The body ended early")
        length -= len(chunk)
        yield chunk


def _is_direct(environ: dict[str, Any], length: int) -> bool:
    reader = getattr(environ["wsgi.input"], "reader", None)
    unreader = getattr(reader, "unreader", None)
    return (
        isinstance(environ.get("gunicorn.socket"), socket.socket)
        and not isinstance(environ["gunicorn.socket"], ssl.SSLSocket)
        and getattr(unreader, "sock", None) is environ["gunicorn.socket"]
        and getattr(reader, "length", None) == length
        and hasattr(unreader, "buf")
        and environ["wsgi.input"].buf.tell() == 0
    )


def _receive(environ: dict[str, Any], length: int) -> Iterator[Chunk]:
    reader, sock = environ["wsgi.input"].reader, environ["gunicorn.socket"]
    # What arrived together with the header.
    ahead = reader.unreader.read(min(length, len(reader.unreader.buf.getvalue())))
    reader.length -= len(ahead)
    yield ahead
    for chunk in receive(sock.fileno(), reader.length):
        # Gunicorn looks at this to find out whether the next request follows.
        reader.length -= len(chunk)
        yield chunk
