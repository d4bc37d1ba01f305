"""
How are connections to a server opened, kept and used again?

By requests, of which some habits are taken away. It looks for proxies and credentials in the environment, keeps
cookies, and reads what comes with a redirect, however much that is; and http.client below it skips ``100 Continue``
(RFC 9110, section 15.2.1) for as long as a server sends it, and takes the end of a connection for the end of a head.
What it learns is to send a file without reading it.
"""

from __future__ import annotations

import socket
from http.client import HTTPException, HTTPResponse
from http.cookiejar import DefaultCookiePolicy
from typing import Any, BinaryIO

from requests import Response, Session
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.ssl_ import create_urllib3_context

from pdiffcopy import __version__
from pdiffcopy.files.sockets import allow_kernel_encryption, get_socket_options, wait_for_answer
from pdiffcopy.files.stored import Sendable
from pdiffcopy.security import check_authority

_MAX_LINES = 256
"""How many lines the head of a response may have, interim responses included."""


def open_session(host: str, token: str = "", ca_file: str = "") -> Session:
    """
    Make a session, which keeps its connections alive and belongs to one process.

    :param host: The host that it's going to connect to.
    :param token: The shared secret that the server asks for (empty for none).
    :param ca_file: The certificate authority to trust for https (empty for those that requests trusts).
    :raises: :exc:`.FileError` when `ca_file` can't be used.
    """
    session = _Session()
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": f"pdiffcopy/{__version__}"})
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    if ca_file:
        check_authority(ca_file)
        session.verify = ca_file
    adapter = _Adapter(host)
    for scheme in _POOLS:
        session.mount(f"{scheme}://", adapter)
    return session


class _Session(Session):
    def get_redirect_target(self, resp: Response) -> None:
        """Nothing is followed. Where there's a target, a session reads (and unpacks) all of the body in any case."""


class _Head:
    """The head of a response, or several of them: there may be interim ones."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.close = file.close
        self.lines = 0

    def readline(self, limit: int) -> bytes:
        line = self.file.readline(limit)
        if self.lines and not line.endswith(b"\n") and len(line) < limit:
            raise HTTPException("the server's answer broke off")
        self.lines += 1
        if self.lines > _MAX_LINES:
            raise HTTPException("the head of the server's answer doesn't end")
        return line


class _Response(HTTPResponse):
    fp: Any

    def begin(self) -> None:
        self.fp = head = _Head(self.fp)
        try:
            super().begin()
        finally:
            if self.fp is head:  # it's None when the connection was closed
                self.fp = head.file


class _SendsFiles:
    sock: socket.socket

    def send(self, data: Any) -> None:
        if isinstance(data, Sendable):
            data.send(self.sock)
            wait_for_answer(self.sock)
        else:
            super().send(data)  # type: ignore[misc]


class _Connection(_SendsFiles, HTTPConnection):
    response_class = _Response


class _SecureConnection(_SendsFiles, HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        self.ssl_context = self.ssl_context or allow_kernel_encryption(create_urllib3_context())
        super().connect()


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}


class _Adapter(HTTPAdapter):
    def __init__(self, host: str):
        self.host = host
        self.socket_options = [*HTTPConnection.default_socket_options, *get_socket_options(host)]
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, socket_options=self.socket_options, **options)
        self.poolmanager.pool_classes_by_scheme = _make_zoned_pools(self.host) if "%" in self.host else _POOLS


def _make_zoned_pools(host: str) -> dict[str, Any]:
    """
    The same connections to a host whose IPv6 address has a zone.

    It isn't part of the URL, where libraries disagree about its spelling, nor of what the server gets to see.
    """
    zone = {"_dns_host": property(lambda _: host, lambda *_: None)}

    def make_pool(pool: type, connection: type) -> type:
        return type("_ZonedPool", (pool,), {"ConnectionCls": type("_ZonedConnection", (connection,), zone)})

    return {"http": make_pool(_Pool, _Connection), "https": make_pool(_SecurePool, _SecureConnection)}
