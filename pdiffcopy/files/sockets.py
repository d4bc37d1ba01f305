"""How is a socket told to send fast, and waited for?"""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import suppress

from pdiffcopy.security import is_loopback


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
