"""How is a socket told to send fast, waited for, and read where its bytes are encrypted?"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pdiffcopy.files.splice import Chunk, receive
from pdiffcopy.security import is_loopback

DECRYPTED_SIZE = 1024 * 1024
"""How many bytes that arrive encrypted are passed on at a time: as many as a pipe brings of others (see splice.py)."""
_SOL_TLS, _TLS_TX, _CRYPTO_INFO_SIZE = 282, 1, 4
"""How to ask what the kernel encrypts with (linux/socket.h and linux/tls.h)."""


def get_socket_options(host: str) -> list[tuple[int, int, bytes]]:
    """
    How to let connections that don't leave this machine send as fast as the other end takes it.

    Where the congestion control of the system is BBR, a timer is set for every few packets, to spare routers a
    burst. There are none here, and the timers take longer than the packets. A socket is told before it's connected.

    :param host: Where they lead to (or where a server listens), as an operator or the operating system spells it.
    :returns: A list of arguments for :meth:`~socket.socket.setsockopt` (empty for other hosts).
    """
    # Every system has Reno, and lets everybody choose it, unless the administrator sees that differently (tcp(7)).
    option = (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    if is_loopback(host):
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(*option)
            return [option]
    return []


def allow_kernel_encryption(context: ssl.SSLContext) -> ssl.SSLContext:
    """Let the kernel encrypt, where both OpenSSL and the kernel can do that (Python 3.12, CONFIG_TLS)."""
    context.options |= getattr(ssl, "OP_ENABLE_KTLS", 0)
    return context


def takes_plaintext(sock: socket.socket) -> bool:
    """Whether bytes may be written to the descriptor of a socket as they are: nobody encrypts them, or the kernel."""
    if not isinstance(sock, ssl.SSLSocket):
        return True
    try:
        return bool(sock.getsockopt(_SOL_TLS, _TLS_TX, _CRYPTO_INFO_SIZE))
    except OSError:  # the usual answer of a connection that knows nothing of it
        return False


@contextmanager
def full_packets(sock: socket.socket) -> Iterator[None]:
    """
    Let a socket send no packet that isn't full until the end of the block (TCP_CORK, tcp(7)).

    Each record is written by a call of its own, and took a packet of its own on connections that don't wait for more.
    """

    def cork(wanted: bool) -> None:
        with suppress(OSError):  # it isn't a TCP socket, or was closed meanwhile
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, wanted)

    cork(True)
    try:
        yield
    finally:
        cork(False)


def receive_rest(sock: socket.socket, ahead: bytes, size: int, timeout: float | None) -> Iterator[Chunk]:
    """
    Receive bytes through a connection, encrypted or not.

    :param ahead: What somebody else has received of them.
    :param size: How many bytes there are, with those.
    :param timeout: How long to wait for some of them, in seconds (an encrypted socket knows that by itself).
    :returns: A generator of chunks, each of which is valid until the next one is asked for.
    :raises: :exc:`OSError` when the connection ends early or nothing arrives for too long.
    """
    if isinstance(sock, ssl.SSLSocket):
        yield from _decrypt(sock, ahead, size)
    else:
        yield ahead
        yield from receive(sock.fileno(), size - len(ahead), timeout)


def _decrypt(sock: ssl.SSLSocket, ahead: bytes, size: int) -> Iterator[memoryview]:
    with memoryview(mmap.mmap(-1, DECRYPTED_SIZE)) as buffer:  # it begins at a page, see buffers.py
        while size:
            # No chunk but the last one is smaller: those that aren't pages of the file take much longer to write.
            enough = min(size, DECRYPTED_SIZE)
            held = min(len(ahead), enough)
            buffer[:held], ahead = ahead[:held], ahead[held:]
            try:
                while held < enough:  # a call brings what one record holds, 16 KiB at most
                    count: Any = sock.read(enough - held, buffer[held:enough])
                    if not count:
                        raise ConnectionResetError(errno.ECONNRESET, "The connection was closed early")
                    held += count
            except OSError:
                if not held:  # what has arrived is handed over before the error comes again
                    raise
            yield buffer[:held]
            size -= held


def wait_for_room(sock: socket.socket) -> None:
    """
    Wait until a socket that took nothing takes something.

    :raises: :exc:`TimeoutError` when that's too long.
    """
    timeout = sock.gettimeout()
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    # A socket without a timeout waits by itself, so that was too long already (SO_SNDTIMEO, socket(7)).
    if timeout is None or not poll.poll(timeout * 1000):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
