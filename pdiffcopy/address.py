"""
How is it spelled where a file is, and where a server listens?

A local file is spelled by its pathname, a remote one as ``host:port/path`` (literally) or as a URL (percent-encoded).
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from pdiffcopy import DEFAULT_PORT
from pdiffcopy.exceptions import LocationError, UsageError


class Address(NamedTuple):
    """Where a file is: the hostname of a local file is empty."""

    filename: str
    hostname: str = ""
    port: int = DEFAULT_PORT
    scheme: str = "http"
    within: str = ""
    """A folder that the file lies in, and that no link below may lead out of (empty: links are followed)."""

    def __str__(self) -> str:
        """The expression that :func:`parse_location` makes this address of."""
        if self.is_near:
            return self.filename
        return f"{self.origin}{quote(os.fsencode(self.filename))}"

    @property
    def origin(self) -> str:
        """Scheme, host and port, as a URL starts with them (empty for a local file)."""
        if self.is_near:
            return ""
        return f"{self.scheme}://{join_host_port(self.hostname.replace('%', '%25'), self.port)}"

    @property
    def is_near(self) -> bool:
        """Whether the file is on this machine."""
        return not self.hostname

    @property
    def base(self) -> str:
        """Return what the URLs of requests start with."""
        # The zone of an IPv6 address means something to this machine only: the connection knows it.
        return f"{self.scheme}://{join_host_port(self.hostname.partition('%')[0], self.port)}"

    def is_same(self, other: Address) -> bool:
        """Whether another address is that of the same file, as far as their spelling tells."""
        return (self.origin.lower(), self.filename) == (other.origin.lower(), other.filename)


_SHORT_FORM = re.compile(r"(?P<host>\[[^/\[\]]*\]|[^/:\[\]]+):(?P<port>[^/:]*)(?P<filename>/.*)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_HALF_SCHEME = re.compile(r"https?:/", re.IGNORECASE)
_BRACKETS = "{value} isn't valid: write an IPv6 address in brackets, like [::1]:8080"
_HOST = re.compile(r"[A-Za-z0-9._-]+|(?P<v6>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)(%[A-Za-z0-9._-]+)?")
_BAD_CODE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def parse_location(expression: str) -> Address:
    """
    Find out where a file is.

    :param expression: ``http://host:port/path`` or ``https://...`` (percent-encoded), ``host:port/path``,
                       ``host:/path``, ``[v6]:port/path`` (literal), or the pathname of a local file. One with a colon
                       before its first slash begins with ``./``, so that it can't be meant for something remote.
    :raises: :exc:`.LocationError` when it looks like something remote but can't be.
    """
    if not expression or "\0" in expression:
        raise LocationError("A location can't be empty or contain NUL bytes: {value}", value=repr(expression))
    if scheme := _SCHEME.match(expression):
        if scheme[0].lower() not in ("http", "https"):
            text = "{value}: there is no scheme {scheme}, use http or https (or ./{value} for a local file)"
            raise LocationError(text, value=expression, scheme=scheme[0])
        return _parse_url(expression)
    if _HALF_SCHEME.match(expression):
        raise LocationError("{value} isn't valid: a URL has two slashes behind the colon", value=expression)
    match = _SHORT_FORM.fullmatch(expression)
    if match and (match["port"] == "" or match["port"].isdecimal()):
        host, port = match["host"].strip("[]"), match["port"] or DEFAULT_PORT
        filename = _check_filename(match["filename"], expression)
        return Address(filename, _check_host(host, expression), _check_port(port, expression))
    if ":" in expression.partition("/")[0]:
        raise LocationError(
            "{value} could be a local file or a remote one: write host:/path or host:port/path (with the whole path, "
            "and an IPv6 address in brackets) for a file behind a server, ./{value} for a local file",
            value=expression,
        )
    return Address(expression)


def _parse_url(expression: str) -> Address:
    try:
        parts = urlsplit(expression.replace(" ", "%20"))
        host, port = parts.hostname or "", parts.port
    except ValueError as e:
        place = expression.partition("//")[2].partition("/")[0]
        if place.count(":") > 1 and "[" not in place:
            raise LocationError(_BRACKETS, value=expression) from None
        if not place.endswith("]"):
            _check_port(place.rpartition(":")[2], expression)
        raise LocationError("{value} isn't a valid URL: {reason}", value=expression, reason=e) from None
    if any(character.isspace() for character in expression.replace(" ", "")):
        raise LocationError("{value} isn't a valid URL: write %0A for a newline, and so on", value=expression)
    if parts.query or parts.fragment or expression.endswith(("?", "#")):
        raise LocationError(
            "{value} has a query or a fragment: in a name, write %3F for ? and %23 for #", value=expression
        )
    if "@" in parts.netloc:
        raise LocationError("A URL can't carry a password or a user name: use --token-file")
    if _BAD_CODE.search(parts.path):
        raise LocationError("{value} isn't a valid URL: in a name, write %25 for %", value=expression)
    filename = _check_filename(os.fsdecode(unquote_to_bytes(os.fsencode(parts.path))), expression)
    port = DEFAULT_PORT if port is None else _check_port(port, expression)
    # The percent sign before the zone of an IPv6 address is encoded in a URL (RFC 6874), though not everybody does it.
    return Address(filename, _check_host(host.replace("%25", "%", 1), expression), port, parts.scheme)


def _check_filename(filename: str, expression: str) -> str:
    if not filename:
        raise LocationError("{value} names a server but no file: add the path of the file", value=expression)
    if "\0" in filename:
        raise LocationError("{value} isn't valid: no file has a NUL byte in its name", value=expression)
    return filename


def _check_host(host: str, expression: str) -> str:
    match = _HOST.fullmatch(host)
    try:
        host.encode("idna")  # as a lookup does it: no part may be empty or longer than 63 characters
        if match and (not match["v6"] or IPv6Address(match["v6"])):
            return host
    except ValueError:
        pass
    if "@" in host:
        text = "{value}: a location has no user, write {rest} (the server runs as the user that started it)"
        raise LocationError(text, value=expression, rest=expression[host.rindex("@") + 1 :])
    if not host:
        raise LocationError("{value} isn't valid: it names no host", value=expression)
    raise LocationError("{value} isn't a valid location: {host} can't be a host name", value=expression, host=host)


def _check_port(port: int | str, expression: str) -> int:
    if not _PORT.fullmatch(str(port)) or int(port) >= 2**16:
        raise LocationError("{value} isn't valid: a port is a number from 1 to 65535", value=expression)
    return int(port)


def parse_listen(expression: str) -> tuple[str, int]:
    """
    Parse the argument of ``--listen``: PORT, HOST, HOST:PORT or [v6]:PORT.

    :returns: A tuple of the host (empty means all addresses of IPv4) and the port.
    """
    if expression.isdecimal():
        return "", _check_port(expression, expression)
    if "/" in expression:
        raise UsageError("{value} isn't valid: write HOST:PORT, without a scheme or a path", value=expression)
    host, separator, port = expression.rpartition(":")
    if not separator or expression.endswith("]"):
        host, port = expression, str(DEFAULT_PORT)
    elif ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(_BRACKETS, value=expression)
    if host or not separator:
        host = _check_host(host[1:].removesuffix("]") if host.startswith("[") else host, expression)
    return host, _check_port(port, expression)


def join_host_port(host: str, port: int) -> str:
    """Spell a host and a port as URLs do."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
