"""
Who may talk to the server, and how is that kept from others?

Tokens and TLS (:mod:`.confinement` keeps paths inside a directory). Security fails closed: half a configuration, an
empty token or a file that others can read is an error, never a reason to go on without.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import ssl
import stat
from collections.abc import Iterable

from pdiffcopy.address import Address
from pdiffcopy.exceptions import FileError, UsageError, printable

TOKEN_VARIABLE = "PDIFFCOPY_TOKEN"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
"""Where systemd puts the credentials of a service, systemd.exec(5)."""

_MAX_TOKEN = 4096

logger = logging.getLogger(__name__)


def load_token(filename: str = "") -> str:
    """
    Get the shared secret.

    :param filename: The file that holds it (by default it's taken from ``$PDIFFCOPY_TOKEN``, if that is set).
    :returns: The token, or an empty string when none is configured.
    :raises: :exc:`.UsageError` when it's empty, has characters that a header can't carry, or when others can read it.
    """
    if filename:
        token, origin = _read_secret(filename).strip(), filename
    elif TOKEN_VARIABLE in os.environ:
        token, origin = os.environ[TOKEN_VARIABLE], f"${TOKEN_VARIABLE}"
    else:
        return ""
    if not token:
        raise UsageError("The token in {origin} is empty: put a long random word there", origin=origin)
    if not (token.isascii() and token.isprintable()) or " " in token or len(token) > _MAX_TOKEN:
        raise UsageError("The token in {origin} has to be one line of ASCII letters and digits", origin=origin)
    return token


def _read_secret(filename: str) -> str:
    try:
        with open(filename, encoding="ascii", errors="replace", opener=_open_at_once) as handle:
            mode = os.fstat(handle.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError("The token file {filename} isn't a regular file", filename=filename)
            exposed = mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IRGRP | stat.S_IWGRP)
            if os.path.dirname(filename) == os.environ.get(CREDENTIALS_VARIABLE):
                # Systemd grants the user of a service access by an ACL, the mask of which looks like group bits.
                exposed &= ~stat.S_IRGRP
            if exposed:
                raise UsageError("Others can read or write the token file {filename}: run chmod 600", filename=filename)
            return handle.read(_MAX_TOKEN + 1)
    except OSError as e:
        raise FileError.from_os_error(e, "read the token file", filename) from e


def _open_at_once(filename: str, flags: int) -> int:
    """Open a file, but wait for nobody who might write into a FIFO: it's about to be refused."""
    return os.open(filename, flags | os.O_NONBLOCK)


def check_token(expected: str, header: str) -> bool:
    """Compare the header ``Authorization`` with what is expected, in constant time (RFC 6750)."""
    scheme, _, token = header.partition(" ")
    given = token.strip().encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given, expected.encode("ascii")) and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether what is sent to (or received at) a host stays on this machine. An empty host means all addresses."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_certificate(certfile: str, keyfile: str) -> None:
    """Find out before the server starts whether it can serve https with these files."""
    if bool(certfile) != bool(keyfile):
        raise UsageError("--certfile and --keyfile go together: give both or none")
    if certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else e
            text = "Can't use the certificate {certfile} with the key {keyfile}: {reason} (is each a PEM file?)"
            raise UsageError(text, certfile=certfile, keyfile=keyfile, reason=reason) from e


def check_authority(filename: str) -> None:
    """Find out before the first connection, which would be tried again and again."""
    try:
        ssl.create_default_context(cafile=filename)
    except OSError as e:
        raise FileError.from_os_error(e, "use the certificate authority", filename) from e


# What operators should know {{{1


def warn_of_eavesdroppers(addresses: Iterable[Address], token: str) -> None:
    """Warn a user whose token is going to travel in clear text."""
    for address in addresses:
        if token and not address.is_near and address.scheme == "http" and not is_loopback(address.hostname):
            label = printable(str(address))
            logger.warning("The token and the data for %s can be read on their way: use https", label)


def warn_of_strangers(host: str, token: str, root: str, read_only: bool) -> None:
    """Warn an operator whose server lets everybody in."""
    if warning := describe_exposure(host, token, root, read_only):
        logger.warning("%s", warning)


def describe_exposure(host: str, token: str, root: str, read_only: bool) -> str:
    """
    Say what a server allows to strangers.

    :param host: Where it listens (empty means all addresses).
    :param token: What a client has to know (empty when there is no such thing).
    :param root: The folder that names are resolved in (empty means all of the machine).
    :returns: An empty string when nobody else can reach it, or when it asks for a token.
    """
    if token or is_loopback(host):
        return ""
    verb = "read" if read_only else "read and write"
    where = f"below {root}" if root else "of this machine that this user can"
    missing = {"--token-file": True, "--root": not root, "--read-only": not read_only}
    options = [option for option, is_missing in missing.items() if is_missing]
    last = f" and {options.pop()}" if len(options) > 1 else ""
    return (
        f"This server is open: whoever can reach it may {verb} all files {where}. "
        f"Use {', '.join(options)}{last} to close it."
    )
