"""Which extended attributes has a file? An access control list (ACL) is one of them, see acl(5)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pdiffcopy.files.claims import RUN_ATTRIBUTE

_CAPABILITIES = "security.capability"
"""What a program may do whoever runs it. As with set-id bits, that's meant for what is in the file now."""


def read_attributes(fd: int) -> dict[str, bytes]:
    """Read all attributes of an open file that it has whatever its contents are."""
    found = {}
    for name in _list_attributes(fd) - {_CAPABILITIES}:
        with _tolerating(name):
            found[name] = os.getxattr(fd, name)
    return found


def set_attributes(fd: int, wanted: Mapping[str, bytes]) -> None:
    """Let an open file have these attributes, and no others."""
    for name in _list_attributes(fd) - set(wanted):
        with _tolerating(name):
            os.removexattr(fd, name)
    for name in sorted(wanted, reverse=True):  # user.* before system.*, which may be an ACL that forbids it
        with _tolerating(name):
            os.setxattr(fd, name, wanted[name])


def _list_attributes(fd: int) -> set[str]:
    try:
        return set(os.listxattr(fd)) - {RUN_ATTRIBUTE}
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.ENOSYS):
            raise
        return set()


@contextmanager
def _tolerating(name: str) -> Iterator[None]:
    """Go on where an attribute can't be had that only the kernel or root may set: an ACL is none of them."""
    try:
        yield
    except OSError:
        if not name.startswith(("security.", "trusted.")):
            raise
