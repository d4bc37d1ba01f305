"""
How is it spelled where a file is, and where a server listens?

A local file is spelled by its pathname, a remote one as ``host:port/path`` (literally) or as a URL (percent-encoded).
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlencode, urlsplit

from pdiffcopy import DEFAULT_PORT
from pdiffcopy.exceptions import UsageError


class Address(NamedTuple):
    """Where a file is: the hostname of a local file is empty."""

    filename: str
    hostname: str = ""
    port: int = DEFAULT_PORT
    scheme: str = "http"

    def __str__(self) -> str:
        """The expression that :func:`parse_location` makes this address of."""
        if not self.hostname:
            return self.filename
        return f"{self.origin}{quote(os.fsencode(self.filename))}"

    @property
    def origin(self) -> str:
        """Scheme, host and port, as a URL starts with them."""
        return f"{self.scheme}://{join_host_port(self.hostname, self.port)}"

    def url(self, endpoint: str, **params: Any) -> str:
        """The URL of an endpoint for this file."""
        query = {"filename": os.fsencode(self.filename), **params}
        return f"{self.origin}/{endpoint}?{urlencode(query)}"


_SHORT_FORM = re.compile(r"(?P<host>\[[^/\[\]]*\]|[^/:\[\]]+):(?P<port>[^/:]*)(?P<filename>/.*)", re.DOTALL)
_HOST = re.compile(r"[A-Za-z0-9._-]+|(?P<v6>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)(%[A-Za-z0-9._-]+)?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def parse_location(expression: str) -> Address:
    """
    Find out where a file is.

    :param expression: ``http://host:port/path`` or ``https://...`` (percent-encoded), ``host:port/path``,
                       ``host:/path``, ``[v6]:port/path`` (literal), or the pathname of a local file.
    :raises: :exc:`.UsageError` when it looks like something remote but can't be.
    """
    if not expression or "\0" in expression:
        raise UsageError("A location can't be empty or contain NUL bytes: {value}", value=repr(expression))
    if expression.lower().startswith(("http://", "https://")):
        return _parse_url(expression)
    match = _SHORT_FORM.fullmatch(expression)
    if match and (match["port"] == "" or match["port"].isdecimal()):
        host, port = match["host"].strip("[]"), match["port"] or DEFAULT_PORT
        filename = _check_filename(match["filename"], expression)
        return Address(filename, _check_host(host, expression), _check_port(port, expression))
    return Address(expression)


def _parse_url(expression: str) -> Address:
    try:
        parts = urlsplit(expression)
        host, port = parts.hostname or "", parts.port
    except ValueError as e:
        raise UsageError("{value} isn't a valid URL: {reason}", value=expression, reason=e) from None
    if any(character.isspace() for character in expression):
        raise UsageError("{value} isn't a valid URL: write %20 for a space", value=expression)
    if parts.query or parts.fragment or expression.endswith(("?", "#")):
        raise UsageError(
            "{value} has a query or a fragment: in a name, write %3F for ? and %23 for #", value=expression
        )
    if "@" in parts.netloc:
        raise UsageError("A URL can't carry a password or a user name: use --token-file")
    filename = _check_filename(os.fsdecode(unquote_to_bytes(os.fsencode(parts.path))), expression)
    port = DEFAULT_PORT if port is None else _check_port(port, expression)
    return Address(filename, _check_host(host, expression), port, parts.scheme)


def _check_filename(filename: str, expression: str) -> str:
    if filename in ("", "/"):
        raise UsageError("{value} names a server but no file: add the path of the file", value=expression)
    if "\0" in filename:
        raise UsageError("{value} isn't valid: no file has a NUL byte in its name", value=expression)
    return filename


def _check_host(host: str, expression: str) -> str:
    match = _HOST.fullmatch(host)
    try:
        if match and (not match["v6"] or IPv6Address(match["v6"])):
            return host
    except ValueError:
        pass
    raise UsageError("{value} isn't a valid location: {host} can't be a host name", value=expression, host=host)


def _check_port(port: int | str, expression: str) -> int:
    if not _PORT.fullmatch(str(port)) or int(port) >= 2**16:
        raise UsageError("{value} isn't valid: a port is a number from 1 to 65535", value=expression)
    return int(port)


def parse_listen(expression: str) -> tuple[str, int]:
    """
    Parse the argument of ``--listen``: PORT, HOST, HOST:PORT or [v6]:PORT.

    :returns: A tuple of the host (empty means all addresses) and the port.
    """
    if expression.isdecimal():
        return "", _check_port(expression, expression)
    host, separator, port = expression.rpartition(":")
    if not separator or expression.endswith("]"):
        host, port = expression, str(DEFAULT_PORT)
    elif ":" in host and not host.startswith("["):
        raise UsageError("{value} isn't valid: write an IPv6 address in brackets, like [::1]:8080", value=expression)
    if host or not separator:
        host = _check_host(host[1:].removesuffix("]") if host.startswith("[") else host, expression)
    return host, _check_port(port, expression)


def join_host_port(host: str, port: int) -> str:
    """Spell a host and a port as URLs do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
