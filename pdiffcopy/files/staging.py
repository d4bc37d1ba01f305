"""
How does a new version of a file come to be, and take the place of the old one in one step?

It lies beside the old one, under a name that follows from that of the old one, so that the next run finds what an
earlier one has left. It begins with the contents of the old one: shared where the file system can do that, otherwise
copied. The invariants:

1. Before :meth:`NewVersion.take_place` nothing happens to the old version.
2. A new version that was begun by anybody else than us or the owner of the old one isn't trusted: it is removed.
3. A copy of the old version that wasn't finished is shorter than that, and goes on where it ends.
4. Whoever changes the old version meanwhile forbids that it is replaced.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pdiffcopy.blocks import Extent, cut, subtract
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import AbsentError, DiskFullError, FileError, FileForbiddenError, ReplacedError, translating
from pdiffcopy.files import kernel
from pdiffcopy.files.buffers import CHUNK_SIZE
from pdiffcopy.files.claims import RUN_ATTRIBUTE
from pdiffcopy.files.identity import get_settling_time, identify
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.names import Namespace, create_file
from pdiffcopy.files.room import get_room

_SUFFIX = ".pdiffcopy"
_MAX_NAME = 255
"""The longest name of a file in bytes (``NAME_MAX`` in linux/limits.h)."""
_MAX_LINKS = 40
"""How many symbolic links a path may lead through (as in the kernel, path_resolution(7))."""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_STEP = 16 * 1024 * 1024
"""How much is copied at a time, in bytes."""
_WINDOW = 1024**3
"""In how large a part of a file holes are looked for at a time, in bytes."""
_NO_COPYING = frozenset([errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM])
"""How copy_file_range(2) is refused where it can't be used."""


def follow_links(filename: str, namespace: Namespace) -> str:
    """Find the name of what an absolute name leads to, if its last part is a symbolic link."""
    for _ in range(_MAX_LINKS):
        folder, name = os.path.split(filename)
        try:
            with _opened(folder, namespace) as fd:
                filename = os.path.join(folder, os.readlink(name, dir_fd=fd))
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.ENOENT):  # it is no link, or isn't there
                return filename
            raise
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


@contextmanager
def _opened(folder: str, namespace: Namespace) -> Iterator[int]:
    fd = namespace.open(folder or "/", _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


def _name_beside(name: str) -> str:
    room = _MAX_NAME - len(f".{_SUFFIX}")
    whole = os.fsencode(name)
    if len(whole) > room:
        digest = f"~{compute_digest(whole)}"
        name = os.fsdecode(whole[: room - len(digest)]) + digest
    return f".{name}{_SUFFIX}"


class NewVersion:
    """The new version of a file."""

    def __init__(self, filename: str, namespace: Namespace):
        """
        Find its place.

        :param filename: The absolute name of the file. What a symbolic link leads to is replaced, and not the link.
        :param namespace: What the name means.
        """
        self.namespace = namespace
        with translating("find", filename):
            self.old = follow_links(filename, namespace)
        self.folder, self.base = os.path.split(self.old)
        self.name = _name_beside(self.base)
        self.filename = os.path.join(self.folder, self.name)

    def open(self, mode: int, old: LocalFile | None) -> LocalFile:
        """
        Open it, and create it first where there is none.

        :param mode: Whom it's for at most while there is no old version (permission bits).
        """
        owners = {os.geteuid()} | ({os.fstat(old.fd).st_uid} if old else set())
        with translating("create", self.filename):
            self._remove_foreign(owners)
        # Nobody else reads it before it has the mode of the old version.
        create_file(self.filename, self.namespace, 0o600 if old else mode)
        new = LocalFile(self.filename, write=True, namespace=self.namespace)
        with translating("open", self.filename):
            if identify(os.fstat(new.fd)) == self._find(owners):
                return new
            new.close()
        text = "Can't use {filename}: somebody else has exchanged it"
        raise FileForbiddenError(text, filename=self.filename)

    def _find(self, owners: set[int]) -> str:
        """Identify what lies in its place, if that can only be from us (otherwise the answer is empty)."""
        with _opened(self.folder, self.namespace) as folder:
            status = os.stat(self.name, dir_fd=folder, follow_symlinks=False)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid in owners
        return identify(status) if is_ours else ""

    def _remove_foreign(self, owners: set[int]) -> None:
        with suppress(FileNotFoundError):
            if not self._find(owners):
                self.remove()

    def remove(self) -> None:
        """Remove it."""
        with _opened(self.folder, self.namespace) as folder:
            os.unlink(self.name, dir_fd=folder)

    # How it begins {{{1

    def fill(self, old: LocalFile, new: LocalFile, run: str, takes: int) -> bool:
        """
        Let it have the contents of the old version, as far as it doesn't, and all that belongs to a file.

        :param run: The run that has claimed the new version (an empty string: it couldn't).
        :param takes: How many bytes of room the run needs for it, as far as that's known.
        :returns: Whether it shares all contents with the old one.
        :raises: :exc:`.DiskFullError` when there is too little room, :exc:`.FileForbiddenError` when it can't have the
                 owner of the old version.
        """
        self._adopt(old, new)
        status = os.fstat(old.fd)
        # From now on each change of the old version shows in its time.
        time.sleep(get_settling_time(status.st_mtime_ns, status.st_ctime_ns, time.time_ns()) / 1e9)
        shares = is_short = new.size() < old.size()
        if is_short:
            with translating("clone", old.filename), new.claims.writing(run):
                shares = new.size() == 0 and kernel.clone(old.fd, new.fd)
            if not shares:
                self._check_room(old, new, takes)
                _copy(old, new, run)
            with translating("set the time of", self.filename):
                os.utime(new.fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        return shares

    def _adopt(self, old: LocalFile, new: LocalFile) -> None:
        """Take over owner, mode and attributes."""
        status, ours = os.fstat(old.fd), os.fstat(new.fd)
        with translating("give the owner of the old version to", self.filename):
            if (status.st_uid, status.st_gid) != (ours.st_uid, ours.st_gid):
                os.fchown(new.fd, status.st_uid, status.st_gid)
        with translating("set the attributes of", self.filename):
            wanted = _list_attributes(old.fd)
            for name in _list_attributes(new.fd) - wanted:
                os.removexattr(new.fd, name)
            for name in wanted:
                _copy_attribute(old.fd, new.fd, name)
            # The run has to be able to open it.
            os.fchmod(new.fd, stat.S_IMODE(status.st_mode) | stat.S_IRUSR | stat.S_IWUSR)

    def _check_room(self, old: LocalFile, new: LocalFile, takes: int) -> None:
        room = get_room(new.fd)
        missing = max(old.info().allocated, takes) - new.info().allocated
        if room is not None and missing > room:
            if not new.size():
                self.remove()
            text = "A new version of {filename} takes {missing} bytes, and its file system has {room} left"
            raise DiskFullError(text, filename=old.filename, missing=missing, room=room)

    # How it ends {{{1

    def take_place(self, new_id: str, old_id: str, old_ctime_ns: int, run: str) -> None:
        """
        Let it have the name of the old version, in one step. It has reached the disk before.

        To do that twice is no error.

        :param new_id: Which file it is (see :class:`.FileInfo`).
        :param old_id: Which file the old version is (empty: there is none).
        :param old_ctime_ns: When that was changed for the last time.
        :param run: The run that has claimed the new version (an empty string: it couldn't).
        :raises: :exc:`.ReplacedError` when there's another old version by now.
        """
        with translating("replace", self.old):
            try:
                new = LocalFile(self.filename, write=True, namespace=self.namespace, file_id=new_id)
            except FileError:
                if self._is_done(new_id):
                    return
                raise
            with new:
                with self._holding_old(old_id, old_ctime_ns), new.claims.ending(run):
                    self._rename(replace=bool(old_id))

    def _is_done(self, new_id: str) -> bool:
        with suppress(FileError, ReplacedError), LocalFile(self.old, namespace=self.namespace, file_id=new_id):
            return True
        return False

    @contextmanager
    def _holding_old(self, old_id: str, ctime_ns: int) -> Iterator[None]:
        """Let no run write to the old version any more, and find out whether any has."""
        if not old_id:
            yield
            return
        with LocalFile(self.old, namespace=self.namespace, file_id=old_id) as old, old.claims.alone():
            if os.fstat(old.fd).st_ctime_ns != ctime_ns:
                text = "{filename} was changed while its new version was made: run again"
                raise ReplacedError(text, filename=self.old)
            yield

    def _rename(self, replace: bool) -> None:
        with _opened(self.folder, self.namespace) as folder:
            kernel.rename(folder, self.name, self.base, replace)


def _list_attributes(fd: int) -> set[str]:
    try:
        return set(os.listxattr(fd)) - {RUN_ATTRIBUTE}
    except OSError:  # the file system has none
        return set()


def _copy_attribute(old: int, new: int, name: str) -> None:
    try:
        os.setxattr(new, name, os.getxattr(old, name))
    except OSError:
        # What only the kernel or root may set says nothing about who may read the file, other than an ACL.
        if not name.startswith(("security.", "trusted.")):
            raise


def _copy(old: LocalFile, new: LocalFile, run: str) -> None:
    """Copy what a new version doesn't have yet, with its holes."""
    start, stop = new.size(), old.size()
    for window in cut([Extent(start, stop - start)], _WINDOW):
        for part in cut(subtract([window], list(old.holes(window.offset, sum(window)))), _STEP):
            if new.is_awaited and not new.is_awaited():
                raise AbsentError("Nobody waits for {filename} any more", filename=new.filename)
            with new.claims.writing(run), translating("copy", old.filename):
                _copy_part(old, new, part)
    with new.claims.writing(run):
        new.resize(stop)


def _copy_part(old: LocalFile, new: LocalFile, part: Extent) -> None:
    offset, size = part
    while size:
        try:
            count = os.copy_file_range(old.fd, new.fd, size, offset, offset)
        except OSError as e:
            if e.errno not in _NO_COPYING:
                raise
            count = os.pwrite(new.fd, os.pread(old.fd, min(size, CHUNK_SIZE), offset), offset)
        if not count:
            text = "{filename} was cut while its new version was made: run again"
            raise ReplacedError(text, filename=old.filename)
        offset, size = offset + count, size - count
