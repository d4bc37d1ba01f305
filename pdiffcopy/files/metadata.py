"""Whose is a file, who may use it, and when was it changed?"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from contextlib import suppress

from pdiffcopy.blocks import MAX_MODE, Metadata
from pdiffcopy.exceptions import FileError, FileForbiddenError, translating
from pdiffcopy.files.identity import LONG_TICK

OWNER_ONLY = 0o600
"""The mode of what only its owner can open. Whoever writes to a file needs it."""


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


def write_metadata(fd: int, filename: str, metadata: Metadata) -> None:
    """
    Give an open file other metadata. The time comes last, and the mode after the owner, which resets parts of it.

    :raises: :exc:`.FileForbiddenError` when that isn't allowed.
    """
    if metadata.mode is not None:
        with translating("set the mode of", filename):  # a new owner isn't let in for a moment
            limit(fd, metadata.mode | OWNER_ONLY)
    try:
        with translating("set owner and group of", filename):
            _set_owner(fd, metadata)
    except FileForbiddenError as e:
        text = "{reason} (only root can: leave out -o and -g, or write -r -p -t for -a)"
        raise FileForbiddenError(text, reason=e) from e
    if metadata.mode is not None:
        with translating("set the mode of", filename):
            os.fchmod(fd, metadata.mode)
    if metadata.mtime_ns is not None:
        with translating("set the time of", filename):
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, metadata.mtime_ns))
            found = os.fstat(fd).st_mtime_ns
        if abs(found - metadata.mtime_ns) >= LONG_TICK:  # the kernel takes the nearest one, and says nothing
            text = "Can't set the time of {filename}: its file system has no such time (leave out -t, or -a)"
            raise FileForbiddenError(text, filename=filename)


def write_folder_metadata(fd: int, filename: str, metadata: Metadata) -> None:
    """Give an open folder other metadata, see :func:`write_metadata`. It keeps its set-id bits, and the sticky one."""
    if metadata.mode is not None:
        kept = stat.S_IMODE(os.fstat(fd).st_mode) & ~MAX_MODE
        metadata = metadata._replace(mode=metadata.mode & MAX_MODE | kept)
    write_metadata(fd, filename, metadata)


def try_metadata(fd: int, filename: str, metadata: Metadata) -> None:
    """
    Find out whether an open file may get other metadata, as long as its contents are still to come.

    If there's a mode to come, only those keep access who have it then, too, and set-id bits go. Nothing else shows.

    :raises: :exc:`.FileForbiddenError` when it may not.
    """
    before = os.fstat(fd)
    mode = before.st_mode & MAX_MODE
    tried = metadata._replace(mode=None if metadata.mode is None else mode & (metadata.mode | OWNER_ONLY))
    try:
        write_metadata(fd, filename, tried)
    except FileError:
        if os.fstat(fd).st_mode & MAX_MODE != mode:
            os.fchmod(fd, mode)
        raise
    finally:
        with suppress(OSError):  # the group may be one that its owner isn't in
            _set_owner(fd, Metadata(uid=before.st_uid, gid=before.st_gid))
        if metadata.mtime_ns is not None:
            with suppress(OSError):
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def try_new_metadata(folder: int, filename: str, metadata: Metadata) -> None:
    """
    Find out whether a file that doesn't exist may get some metadata: one without a name does, where there can be any.

    :param folder: The open folder (``O_PATH``) in which it's going to be, or the nearest one that exists.
    :raises: :exc:`.FileForbiddenError` when it may not.
    """
    try:
        fd = os.open(f"/proc/self/fd/{folder}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, OWNER_ONLY)
    except OSError:  # whoever creates the file will tell
        return
    try:
        write_metadata(fd, filename, metadata)
    finally:
        os.close(fd)


def limit(fd: int, mode: int) -> None:
    """Take away the permission bits of an open file that aren't among some others."""
    found = stat.S_IMODE(os.fstat(fd).st_mode)
    if found & ~mode:
        os.fchmod(fd, found & mode)


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
