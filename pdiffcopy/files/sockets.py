"""How is a socket told to send fast, waited for, and read where its bytes are encrypted?"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import ssl
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pdiffcopy.files.splice import Chunk, receive
from pdiffcopy.pace import SLOW_RATE, UNLIMITED, Pace
from pdiffcopy.security import is_loopback

DECRYPTED_SIZE = 1024 * 1024
"""How many bytes that arrive encrypted are passed on at a time: as many as a pipe brings of others (see splice.py)."""
LEAST_BUFFER = 4096
"""The smallest buffer for what arrives, in bytes."""
_SOL_TLS, _TLS_TX, _CRYPTO_INFO_SIZE = 282, 1, 4
"""How to ask what the kernel encrypts with (linux/socket.h and linux/tls.h)."""


def get_socket_options(host: str, rate: int = 0) -> list[tuple[int, int, bytes | int]]:
    """
    How to let connections that don't leave this machine send as fast as the other end takes it, and others slowly.

    Where the congestion control of the system is BBR, a timer is set for every few packets, to spare routers a
    burst. There are none here, and the timers take longer than the packets. A socket is told before it's connected.

    Where what arrives is taken slowly, it isn't to fill a large buffer at once: the other end would see nothing move
    until half of it is empty.

    :param host: Where they lead to (or where a server listens), as an operator or the operating system spells it.
    :param rate: How many bytes a second are going to be taken (0: as many as arrive).
    :returns: A list of arguments for :meth:`~socket.socket.setsockopt`.
    """
    options: list[tuple[int, int, bytes | int]] = []
    if 0 < rate < SLOW_RATE:
        options.append((socket.SOL_SOCKET, socket.SO_RCVBUF, max(rate // 4, LEAST_BUFFER)))
    # Every system has Reno, and lets everybody choose it, unless the administrator sees that differently (tcp(7)).
    option = (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    if is_loopback(host):
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(*option)
            options.append(option)
    return options


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


def receive_rest(
    sock: socket.socket, ahead: bytes, size: int, timeout: float | None, pace: Pace = UNLIMITED
) -> Iterator[Chunk]:
    """
    Receive bytes through a connection, encrypted or not.

    :param ahead: What somebody else has received of them.
    :param size: How many bytes there are, with those.
    :param timeout: How long to wait for some of them, in seconds (an encrypted socket knows that by itself).
    :param pace: How fast they may pass.
    :returns: A generator of chunks, each of which is valid until the next one is asked for.
    :raises: :exc:`OSError` when the connection ends early or nothing arrives for too long.
    """
    if isinstance(sock, ssl.SSLSocket):
        yield from pace.slow(_decrypt(sock, ahead, size, min(DECRYPTED_SIZE, pace.step)))
    else:
        yield from pace.slow([ahead])
        yield from pace.slow(receive(sock.fileno(), size - len(ahead), timeout, pace.step))


def _decrypt(sock: ssl.SSLSocket, ahead: bytes, size: int, step: int) -> Iterator[memoryview]:
    with memoryview(mmap.mmap(-1, DECRYPTED_SIZE)) as buffer:  # it begins at a page, see buffers.py
        while size:
            # No chunk but the last one is smaller: those that aren't pages of the file take much longer to write.
            enough = min(size, step)
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


def count_unconfirmed(sock: socket.socket) -> int:
    """How many bytes a socket holds of which the other end hasn't said that they have arrived."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def count_moved(sock: socket.socket) -> int:
    """How many bytes have arrived at either end of a connection (tcp(7): the kernel counts them)."""
    with suppress(OSError, struct.error):
        # Behind these 120 bytes struct tcp_info has two numbers of 64 bits, tcpi_bytes_acked and tcpi_bytes_received.
        return sum(struct.unpack_from("QQ", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))
    return 0


def wait_for_room(sock: socket.socket) -> None:
    """
    Wait until a socket that took nothing takes something.

    :raises: :exc:`TimeoutError` when nothing has arrived at the other end for as long as the socket waits.
    """
    # A socket without a timeout waits by itself, so that was too long already (SO_SNDTIMEO, socket(7)).
    if sock.gettimeout() is None:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    _await(sock, select.POLLOUT)


def wait_for_answer(sock: socket.socket) -> None:
    """
    Wait for an answer as long as the other end goes on taking what was sent: it may be slow on purpose.

    :raises: What :func:`wait_for_room` raises.
    """
    if count_unconfirmed(sock):
        _await(sock, select.POLLIN)


def _await(sock: socket.socket, event: int) -> None:
    """Wait for an event. The time begins anew as long as something arrives at the other end."""
    poll, moved = select.poll(), count_moved(sock)
    poll.register(sock, event)
    while not poll.poll((sock.gettimeout() or 0) * 1000):
        before, moved = moved, count_moved(sock)
        if moved == before:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def send_all(sock: socket.socket, data: bytes | memoryview) -> None:
    """
    Send bytes, however long that takes as long as some of them arrive at the other end.

    :raises: :exc:`OSError` when the connection ends, or when nothing has arrived for as long as the socket waits.
    """
    view = memoryview(data)
    while len(view):
        moved = count_moved(sock)
        try:
            view = view[sock.send(view) :]
        except TimeoutError:
            if count_moved(sock) == moved:
                raise
