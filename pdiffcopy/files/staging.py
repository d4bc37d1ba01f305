"""
How does a new version of a file come to be, and take the place of the old one in one step?

It lies beside the old one, under a name that follows from that of the old one, so that the next run finds what an
earlier one has left. It begins with the contents of the old one: shared where the file system can do that, otherwise
copied. The invariants:

1. Before :meth:`NewVersion.take_place` nothing happens to the old version.
2. A new version that was begun by anybody else than us or the owner of the old one isn't trusted: it is removed.
3. A copy of the old version that wasn't finished is shorter than that, and goes on where it ends.
4. Whoever changes the old version meanwhile forbids that it is replaced.
5. Nobody can open the new version who can't open the old one (or, where there is none, the source).
6. What is found and what is changed lies in one folder, which is opened once. No link is followed there.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pdiffcopy.blocks import MAX_MODE, Extent, cut
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import (
    AbsentError,
    DiskFullError,
    FileError,
    FileForbiddenError,
    FileMissingError,
    ReplacedError,
    translating,
)
from pdiffcopy.files import kernel
from pdiffcopy.files.attributes import read_attributes, set_attributes
from pdiffcopy.files.buffers import CHUNK_SIZE
from pdiffcopy.files.identity import get_settling_time, identify
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.metadata import OWNER_ONLY, limit
from pdiffcopy.files.names import DANGLING, Folder, Namespace, make_place
from pdiffcopy.files.room import get_room

_SUFFIX = ".pdiffcopy"
_MAX_NAME = 255
"""The longest name of a file in bytes (``NAME_MAX`` in linux/limits.h)."""
_MAX_LINKS = 40
"""How many symbolic links a path may lead through (as in the kernel, path_resolution(7))."""
_STEP = 16 * 1024 * 1024
"""How much is copied at a time, in bytes."""
_LARGE = 64 * 1024 * 1024
"""From which size on it takes long until an old version is gone from the page cache (25 ms a GiB), in bytes."""
_NO_COPYING = frozenset([errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM])
"""How copy_file_range(2) is refused where it can't be used."""


def follow_links(filename: str, namespace: Namespace) -> str:
    """Find the name of what an absolute name leads to, if its last part is a symbolic link."""
    for _ in range(_MAX_LINKS if namespace.may_be_link(filename) else 1):
        folder, name = os.path.split(filename)
        try:
            with Folder(folder or "/", namespace) as opened:
                filename = os.path.join(folder, os.readlink(name, dir_fd=opened.fd))
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.ENOENT):  # it is no link, or isn't there
                return filename
            raise
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def is_new_version(filename: str) -> bool:
    """Whether a file has the name of a new version."""
    name = os.path.basename(filename)
    return name.startswith(".") and name.endswith(_SUFFIX)


def _name_beside(name: str) -> str:
    room = _MAX_NAME - len(f".{_SUFFIX}")
    whole = os.fsencode(name)
    if len(whole) > room:
        digest = f"~{compute_digest(whole)}"
        name = os.fsdecode(whole[: room - len(digest)]) + digest
    return f".{name}{_SUFFIX}"


class NewVersion:
    """The new version of a file (a context manager)."""

    def __init__(self, filename: str, namespace: Namespace, begins: bool = False, drop: bool = False):
        """
        Find its place.

        :param filename: The absolute name of the file. What a symbolic link leads to is replaced, and not the link.
        :param namespace: What the name means.
        :param begins: Whether the folders that lead to it are made where they are missing.
        :param drop: Whether what wasn't in the page cache leaves it again, see :mod:`.pagecache`.
        """
        self.drop = drop
        with translating("find", filename):
            self.old = follow_links(filename, namespace)
        folder, self.base = os.path.split(self.old)
        self.name = _name_beside(self.base)
        self.filename = os.path.join(folder, self.name)
        with translating("create" if begins else "find", self.old):
            if self.base in ("", ".", ".."):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if begins:
                if self.old != filename:
                    raise FileMissingError(DANGLING, filename=filename)
                make_place(self.old, namespace)
            self.folder = Folder(folder or "/", namespace)

    def __enter__(self) -> NewVersion:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        os.close(self.folder.fd)

    def open_old(self, file_id: str) -> LocalFile:
        """
        Open the old version, which has to be a certain file.

        :raises: :exc:`.FileForbiddenError` where it can't be replaced, or those who do that couldn't write to it.
        """
        old = LocalFile(self.old, namespace=self.folder, file_id=file_id, drop=self.drop)
        with translating("examine", self.old):
            status = os.fstat(old.fd)
            is_writable = os.access(f"/proc/self/fd/{old.fd}", os.W_OK, effective_ids=True)
            if old.is_device:
                reason = "it is a block device"
            elif _find_mount(old.fd) != _find_mount(self.folder.fd):
                reason = "it is mounted there, and only itself can be written to"
            elif kernel.is_append_only(old.fd):
                reason = "it can only be appended to (chattr -a ends that)"
            # Its owner could make it writable.
            elif not is_writable and (status.st_uid != os.geteuid() or status.st_mode & stat.S_IWUSR):
                reason = "it may not be written to"
            else:
                return old
        old.close()
        text = "Can't replace {filename} by a new version: {reason}"
        raise FileForbiddenError(text, filename=self.old, reason=reason)

    @contextmanager
    def begun(self, mode: int, old: LocalFile | None) -> Iterator[LocalFile]:
        """
        Open it, and create it first where there is none. When it's of no use in the end, it's removed.

        :param mode: Whom it's for at most while there is no old version (permission bits).
        """
        with self._open(mode, old) as new:
            try:
                yield new
            except FileError:
                if not new.size():
                    with suppress(OSError):
                        self._remove()
                raise

    def _open(self, mode: int, old: LocalFile | None) -> LocalFile:
        owners = {os.geteuid()} | ({os.fstat(old.fd).st_uid} if old else set())
        most = OWNER_ONLY | MAX_MODE & (os.fstat(old.fd).st_mode if old else mode)
        with translating("create", self.filename):
            self._remove_foreign(owners)
            made = self._create(OWNER_ONLY if old else most)
        new = LocalFile(self.filename, write=True, namespace=self.folder, drop=self.drop)
        with translating("open", self.filename):
            status = os.fstat(new.fd)
            if identify(status) == made:
                return new
            if _is_ours(status, owners):
                limit(new.fd, most)
                if not old:
                    set_attributes(new.fd, {})
                return new
        new.close()
        text = "Can't use {filename}: somebody else has exchanged it"
        raise FileForbiddenError(text, filename=self.filename)

    def _remove_foreign(self, owners: set[int]) -> None:
        with suppress(FileNotFoundError):
            if not _is_ours(os.stat(self.name, dir_fd=self.folder.fd, follow_symlinks=False), owners):
                self._remove()

    def _create(self, mode: int) -> str:
        """Create it, and identify what was created (the answer is empty when there's something already)."""
        try:
            fd = self.folder.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            return ""
        try:
            return identify(os.fstat(fd))
        finally:
            os.close(fd)

    def _remove(self) -> None:
        os.unlink(self.name, dir_fd=self.folder.fd)

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
        # A clone has what is on the disk, whatever of the old version is in memory.
        return shares and not old.claims.is_doubtful()

    def _adopt(self, old: LocalFile, new: LocalFile) -> None:
        """Take over owner, attributes and mode. Until then nobody else can open it who may not open the old version."""
        status, ours = os.fstat(old.fd), os.fstat(new.fd)
        with translating("give the owner of the old version to", self.filename):
            if (status.st_uid, status.st_gid) != (ours.st_uid, ours.st_gid):
                os.fchown(new.fd, status.st_uid, status.st_gid)
        with translating("set the attributes of", self.filename):
            set_attributes(new.fd, read_attributes(old.fd))
            # The run has to be able to open it.
            os.fchmod(new.fd, status.st_mode & MAX_MODE | OWNER_ONLY)

    def _check_room(self, old: LocalFile, new: LocalFile, takes: int) -> None:
        room = get_room(new.fd)
        missing = max(old.info().allocated, takes) - new.info().allocated
        if room is not None and missing > room:
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
        try:
            new = LocalFile(self.filename, write=True, namespace=self.folder, file_id=new_id)
        except (FileError, ReplacedError):
            if self._is_done(new_id):
                return
            raise
        with new, self._holding_old(old_id, old_ctime_ns), new.claims.ending(run), translating("replace", self.old):
            try:
                kernel.rename(self.folder.fd, self.name, self.base, replace=bool(old_id))
            except FileExistsError:
                text = "{filename} was created by somebody else while its new version was made: run again"
                raise ReplacedError(text, filename=self.old) from None

    def _is_done(self, new_id: str) -> bool:
        with suppress(FileError, ReplacedError), LocalFile(self.old, namespace=self.folder, file_id=new_id):
            return True
        return False

    @contextmanager
    def _holding_old(self, old_id: str, ctime_ns: int) -> Iterator[None]:
        """Let no run write to the old version any more, and find out whether any has."""
        if not old_id:
            yield
            return
        old = self.open_old(old_id)
        try:
            with old.claims.alone():
                if os.fstat(old.fd).st_ctime_ns != ctime_ns:
                    text = "{filename} was changed while its new version was made: run again"
                    raise ReplacedError(text, filename=self.old)
                yield
        finally:
            # Nobody has to wait until what is gone by now has left the page cache.
            close = threading.Thread(target=old.close).start if old.size() > _LARGE else old.close
            try:
                close()
            except RuntimeError:  # there are no more threads
                old.close()


def _find_mount(fd: int) -> str:
    """Which mount is an open file in (proc_pid_fdinfo(5))?"""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        return next((line for line in lines if line.startswith("mnt_id:")), "")


def _is_ours(status: os.stat_result, owners: set[int]) -> bool:
    """Whether what lies in its place can only be from us, and can be continued."""
    is_usable = stat.S_ISREG(status.st_mode) and status.st_mode & OWNER_ONLY == OWNER_ONLY
    return is_usable and status.st_nlink == 1 and status.st_uid in owners


# Copying {{{1


def _copy(old: LocalFile, new: LocalFile, run: str) -> None:
    """Copy what a new version doesn't have yet, with its holes."""
    start, stop = new.size(), old.size()
    for part in cut(old.extents(start, stop), _STEP):
        if new.is_awaited and not new.is_awaited():
            raise AbsentError("Nobody waits for {filename} any more", filename=new.filename)
        with new.changing([part], run) as change, old.reading([part]):
            with new.claims.writing(run), translating("copy", old.filename):
                _copy_part(old, new, part)
            change.note(part.size)
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
