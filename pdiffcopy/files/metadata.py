"""Whose is a file, who may use it, and when was it changed?"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable

from pdiffcopy.blocks import Metadata
from pdiffcopy.exceptions import translating


def read_metadata(fd: int, filename: str) -> Metadata:
    """Read all of the metadata of an open file."""
    with translating("examine", filename):
        status = os.fstat(fd)
    return Metadata(
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        owner=_find_name(lambda: pwd.getpwuid(status.st_uid).pw_name),
        gid=status.st_gid,
        group=_find_name(lambda: grp.getgrgid(status.st_gid).gr_name),
        mtime_ns=status.st_mtime_ns,
    )


def write_metadata(fd: int, filename: str, metadata: Metadata, in_advance: bool = False) -> None:
    """
    Give an open file other metadata. The time comes last, and the mode after the owner, which resets parts of it.

    :param in_advance: Whether the contents are still to come: owner and group are set, of the rest it's only found out
                       whether it may be (nothing but ``st_ctime`` changes).
    :raises: :exc:`.FileForbiddenError` when that isn't allowed.
    """
    with translating("set the owner of", filename):
        _set_owner(fd, metadata)
    status = os.fstat(fd)
    if metadata.mode is not None:
        with translating("set the mode of", filename):
            os.fchmod(fd, stat.S_IMODE(status.st_mode) if in_advance else metadata.mode)
    if metadata.mtime_ns is not None:
        with translating("set the time of", filename):
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns if in_advance else metadata.mtime_ns))


def _set_owner(fd: int, metadata: Metadata) -> None:
    status = os.fstat(fd)
    uid = _find_number(metadata.owner, metadata.uid, lambda name: pwd.getpwnam(name).pw_uid)
    gid = _find_number(metadata.group, metadata.gid, lambda name: grp.getgrnam(name).gr_gid)
    uid, gid = (status.st_uid if uid is None else uid), (status.st_gid if gid is None else gid)
    if (uid, gid) != (status.st_uid, status.st_gid):
        os.fchown(fd, uid, gid)


def _find_name(find: Callable[[], str]) -> str:
    try:
        return find()
    except KeyError:
        return ""


def _find_number(name: str, number: int | None, find: Callable[[str], int]) -> int | None:
    """The number that a name has here, or the one that it has elsewhere."""
    try:
        return find(name) if name else number
    except KeyError:
        return number
