"""
Who is a client?

Somebody who knows the token, if the server has one, and who isn't a web page. A browser runs the programs of
strangers on the machines of administrators, and these may send requests to whatever listens there. Two things give
them away: browsers say so (``Origin``, ``Sec-Fetch-Site``), and a page whose name was made to point here (DNS
rebinding) asks for a host of that name.

This module decides, from addresses and headers. It knows no sockets, and makes nobody wait (:mod:`.reception` does).
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

from pdiffcopy.exceptions import AuthenticationError, ForbiddenError
from pdiffcopy.request import Headers
from pdiffcopy.security import check_token

NOTED = "pdiffcopy.noted"
"""The variable of a WSGI environment that says that a wrong token has been counted already."""

FREE_GUESSES = 3
"""How many wrong tokens an address may send without waiting: those are mistakes."""
FIRST_DELAY = 0.25
"""How long the answer to the next one takes, in seconds. Each further one takes twice as long."""
LONGEST_DELAY = 5.0
"""How long it takes at most, in seconds."""
LONGEST_WAIT = 20.0
"""How long somebody waits at most who sent several at once, in seconds."""
MEMORY = 600.0
"""After how many seconds without a wrong token an address is forgotten."""
_MAX_ADDRESSES = 4096

logger = logging.getLogger(__name__)


class Gate:
    """Lets clients in, and nobody else."""

    def __init__(self, token: str = "", hosts: Iterable[str] = ()):
        """
        Initialize a gate.

        :param token: What a client has to know (empty when there's no such thing).
        :param hosts: The names by which clients may call this server, besides addresses, ``localhost``, and what this
                      machine calls itself. The name ``*`` stands for all names.
        """
        self.token = token
        self.hosts = frozenset(_normalize(host) for host in hosts if host)
        self.guesses = Guesses()

    def knows(self, authorization: str) -> bool:
        """Whether somebody who sends this header (possibly an empty string) is a client."""
        return not self.token or check_token(self.token, authorization)

    def check(self, headers: Headers) -> None:
        """
        Look at a request before anything else does.

        :param headers: Its headers.
        :raises: :exc:`.AuthenticationError` without the token, :exc:`.ForbiddenError` for what comes from a web page.
        """
        if not self.knows(headers.get("Authorization", "")):
            raise AuthenticationError("This server wants a token, and none or the wrong one was given (--token-file)")
        if headers.get("Origin", "") or headers.get("Sec-Fetch-Site", "none").strip().lower() != "none":
            raise ForbiddenError("This server doesn't talk to web pages")
        host = headers.get("Host", "")
        if host and not self.is_ours(host):
            raise ForbiddenError("This server doesn't go by the name of {host} (--allow-host)", host=host)

    def is_ours(self, host: str) -> bool:
        """Whether the header ``Host`` means this server. (A request without one doesn't come from a browser.)"""
        name = _normalize(_strip_port(host))
        if name == "localhost" or name in self.hosts or "*" in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.replace("%25", "%"))
            return True
        except ValueError:
            return name in _get_own_names(name.partition(".")[0])


def _normalize(name: str) -> str:
    return name.strip().lower().removesuffix(".")


def _strip_port(host: str) -> str:
    if host.startswith("[") and (address := host[1:].partition("]"))[1]:
        return address[0]
    name, separator, port = host.rpartition(":")
    return name if separator and port.isdecimal() else host


@lru_cache(maxsize=1)
def _get_machine_name() -> str:
    return _normalize(socket.gethostname())


@lru_cache(maxsize=1)
def _get_full_name() -> str:
    return _normalize(socket.getfqdn())


def _get_own_names(label: str) -> set[str]:
    """What this machine calls itself. A name server is asked only when somebody uses a name that begins alike."""
    name = _get_machine_name()
    return {name, _get_full_name()} if label == name.partition(".")[0] else {name}


class Guesses:
    """Counts wrong tokens, and makes more and more of them take longer and longer."""

    def __init__(self) -> None:
        """Initialize a memory in which there is nobody."""
        # For each address: how many there were, when the last one came, and when it's answered.
        self._known: OrderedDict[str, tuple[int, float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, address: str) -> float:
        """
        Write down that a wrong token was sent, also in the log. (The token itself isn't known here.)

        :param address: Where it came from.
        :returns: How long the answer should take, in seconds.
        """
        now, key = time.monotonic(), _get_network(address)
        with self._lock:
            count, last, answered = self._known.pop(key, (0, now, now))
            if now - last > MEMORY:
                count, answered = 0, now
            count += 1
            if count > FREE_GUESSES:
                delay = min(FIRST_DELAY * 2 ** min(count - FREE_GUESSES - 1, 30), LONGEST_DELAY)
                # One after the other: to send many at once gains nothing.
                answered = min(max(now, answered) + delay, now + LONGEST_WAIT)
            else:
                answered = now
            self._known[key] = count, now, answered
            if len(self._known) > _MAX_ADDRESSES:
                self._known.popitem(last=False)
        logger.warning("A wrong token from %s (number %d from there)", address or "somebody", count)
        return answered - now


def _get_network(address: str) -> str:
    """Name the network of an address: somebody with one IPv6 address has 2**64 of them."""
    try:
        network = ipaddress.ip_network((address.partition("%")[0], 64 if ":" in address else 32), strict=False)
    except ValueError:
        return address
    return str(network)
