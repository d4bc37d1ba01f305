"""
How are connections to a server opened, kept and used again?

By what requests has below its sessions. A session takes longer to prepare a request than to send it, looks for proxies
and credentials in the environment, keeps cookies, and reads what comes with a redirect, however much that is. What is
below that learns to send a file without reading it, and http.client loses a habit: it skips ``100 Continue`` (RFC 9110,
section 15.2.1) for as long as a server sends it, and takes the end of a connection for the end of a head.
"""

from __future__ import annotations

import socket
from http.client import HTTPException, HTTPResponse
from typing import Any, BinaryIO

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.ssl_ import create_urllib3_context

from pdiffcopy import __version__
from pdiffcopy.files.sockets import allow_kernel_encryption, get_socket_options, wait_for_answer
from pdiffcopy.files.stored import Sendable
from pdiffcopy.security import check_authority

_MAX_LINES = 256
"""How many lines the head of a response may have, interim responses included."""


class Connections:
    """Connections of one process to one server. They're kept alive."""

    def __init__(self, origin: str, host: str, token: str = "", ca_file: str = ""):
        """
        Initialize them (there are none yet).

        :param origin: Where they lead to: what a URL begins with.
        :param host: The host of that, as the user has written it.
        :param token: The shared secret that the server asks for (empty for none).
        :param ca_file: The certificate authority to trust for https (empty for those that requests trusts).
        :raises: :exc:`.FileError` when `ca_file` can't be used.
        """
        if ca_file:
            check_authority(ca_file)
        self.origin, self.authority = origin, ca_file or True
        self.headers = {
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
            "User-Agent": f"pdiffcopy/{__version__}",
        }
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.adapter = _Adapter(host)

    def close(self) -> None:
        """Close all of them."""
        self.adapter.close()

    def exchange(
        self, verb: str, target: str, headers: dict[str, str], body: Any, timeout: tuple[float, float]
    ) -> Response:
        """
        Send a request, and read the head of the response.

        :param target: The path and the query of the URL, spelled as they travel.
        :param body: Something that has a length and can be iterated over, or :data:`None`.
        :param timeout: How long a connection may take, and how long a sign of life, in seconds.
        :raises: What requests and urllib3 raise.
        """
        request = PreparedRequest()
        request.method, request.url, request.body = verb, self.origin + target, body
        request.headers = CaseInsensitiveDict({**self.headers, **headers})
        if verb != "GET":
            request.headers["Content-Length"] = str(len(body) if body else 0)
        return self.adapter.send(request, stream=True, timeout=timeout, verify=self.authority)


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
        self.pool: Any = None
        self.socket_options = [*HTTPConnection.default_socket_options, *get_socket_options(host)]
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, socket_options=self.socket_options, **options)
        self.poolmanager.pool_classes_by_scheme = _make_zoned_pools(self.host) if "%" in self.host else _POOLS

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """All requests go to one server, so its connections needn't be looked for each time."""
        self.pool = self.pool or super().get_connection_with_tls_context(*args, **options)
        return self.pool


def _make_zoned_pools(host: str) -> dict[str, Any]:
    """
    The same connections to a host whose IPv6 address has a zone.

    It isn't part of the URL, where libraries disagree about its spelling, nor of what the server gets to see.
    """
    zone = {"_dns_host": property(lambda _: host, lambda *_: None)}

    def make_pool(pool: type, connection: type) -> type:
        return type("_ZonedPool", (pool,), {"ConnectionCls": type("_ZonedConnection", (connection,), zone)})

    return {"http": make_pool(_Pool, _Connection), "https": make_pool(_SecurePool, _SecureConnection)}
