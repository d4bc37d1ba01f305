"""
Which replica is at an address?

A file of this machine, or one behind a server: :data:`SCHEMES` says which kind of server an address needs, and
:class:`Servers` keeps those that are in use, one for each origin, so that all files behind it share its connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

from pdiffcopy.address import Address
from pdiffcopy.client.exchange import Server
from pdiffcopy.client.network import Network
from pdiffcopy.client.remote import RemoteReplica
from pdiffcopy.exceptions import DependencyError, UsageError
from pdiffcopy.files.names import MACHINE, Namespace, make_absolute
from pdiffcopy.hashing import Hashers
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.pace import UNLIMITED, Pace
from pdiffcopy.replica import Replica


def _open_http(address: Address, network: Network, pace: Pace) -> Server:
    try:
        from pdiffcopy.client.http import HttpServer
    except ImportError as e:
        raise DependencyError.of("client", e) from e
    return HttpServer(address, network, pace)


SCHEMES: dict[str, Callable[[Address, Network, Pace], Server]] = {"http": _open_http, "https": _open_http}
"""How to reach a server, for each scheme of an address."""


def _contain(folder: str) -> Namespace:
    from pdiffcopy.files.confinement import Within

    return Within(MACHINE, folder)


def _combine(server: Server, has_company: Callable[[], bool]) -> Server:
    from pdiffcopy.client.combining import CombiningServer

    return CombiningServer(server, has_company)


class Replicas(Protocol):
    """Where replicas come from."""

    def open(self, address: Address) -> Replica:
        """Get the replica at an address."""


class Servers:
    """
    The servers of a run, or of a location: a context manager that closes their connections.

    A process that is forked or spawned with such an object opens connections of its own, but knows what the servers can
    do if they have been asked already.
    """

    def __init__(
        self,
        network: Network,
        pace: Pace = UNLIMITED,
        drop: bool = False,
        base: Servers | None = None,
        threads: int = 0,
    ):
        """
        Initialize a collection in which there are none.

        :param network: How to talk to them.
        :param pace: How fast the contents of all sources together may come.
        :param drop: Whether what wasn't in a page cache leaves it again.
        :param base: Where they come from, if many threads ask them for many small things.
        :param threads: How many threads hash all files of this machine (0: each file has threads of its own).
        """
        self.network, self.pace, self.drop, self.base, self.threads = network, pace, drop, base, threads
        self._servers: dict[str, Server] = {}
        self._users = 0

    def __enter__(self) -> Servers:
        """Nothing to open yet."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections. They are opened again when they are needed."""
        for server in self._servers.values():
            server.close()

    def combined(self, threads: int = 1) -> Servers:
        """
        The same servers for many threads that ask for many small things.

        :param threads: How many other threads hash what lies on this machine, for all of them.
        """
        return Servers(self.network, self.pace, self.drop, self, threads)

    def sharing(self, threads: int) -> Servers:
        """The same servers, and threads that hash all files of this machine (of each process that uses them)."""
        servers = Servers(self.network, self.pace, self.drop, self.base, threads)
        servers._servers = self._servers
        return servers

    @contextmanager
    def used_by(self, threads: int) -> Iterator[None]:
        """Expect that so many threads use them. (It's a hint, and needs no lock.)"""
        self._users += threads
        try:
            yield
        finally:
            self._users -= threads

    @cached_property
    def hashers(self) -> Hashers | None:
        """The threads that hash files of this machine, if they're the same for all of them."""
        # Made only now, since what goes to a process that is spawned can have no locks.
        return Hashers(self.threads) if self.threads else None

    def open(self, address: Address) -> Replica:
        """
        Get the replica at an address (nothing is contacted or opened yet).

        :raises: :exc:`.DependencyError` when it is remote and the requirements of the client aren't installed.
        """
        replica = self._open(address)
        replica.drop = self.drop
        return replica

    def _open(self, address: Address) -> Replica:
        if address.is_near:
            namespace = _contain(address.within) if address.within else MACHINE
            replica = LocalReplica(make_absolute(address.filename), namespace, self.hashers)
            replica.pace = self.pace
            return replica
        return RemoteReplica(self._reach(address), address.filename, address.within)

    def _reach(self, address: Address) -> Server:
        if address.origin not in self._servers:
            if address.scheme not in SCHEMES:
                raise UsageError("There is no way to reach {address}", address=str(address))
            if self.base:
                server = _combine(self.base._reach(address), lambda: self._users > 1)
            else:
                server = SCHEMES[address.scheme](address, self.network, self.pace)
            self._servers.setdefault(address.origin, server)  # another thread may have been faster
        return self._servers[address.origin]
