"""
How are paths kept inside one directory?

A :class:`Root` is where a server resolves what clients name, and :class:`Within` follows no link below a folder.

The kernel resolves a path in one step (openat2), so there's no moment between a check and the use of what was checked.
Where it can't (before Linux 5.6, or forbidden by a sandbox), the path is walked one component at a time with
descriptors that nobody can exchange.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress

from pdiffcopy.blocks import FOLDER_MODE
from pdiffcopy.exceptions import FileError
from pdiffcopy.files.names import Namespace, reopen

_SYS_OPENAT2 = 437
"""The number of the system call on all architectures (linux/include/uapi/asm-generic/unistd.h)."""
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH, _RESOLVE_IN_ROOT = 0x02, 0x04, 0x08, 0x10
"""Flags of openat2(2) (linux/include/uapi/linux/openat2.h)."""
_MAX_LINKS = 40
"""How many symbolic links a path may lead through (as in the kernel, path_resolution(7))."""
_RETRIES = 100
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """``struct open_how`` of openat2(2)."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class Root(Namespace):
    """
    A directory that no path leads out of.

    A path is resolved as if the directory were ``/``: a leading slash, ``..`` and symbolic links (absolute ones too)
    stay inside.
    """

    def __init__(self, directory: str, devices: bool = True):
        """
        Open a root.

        :param directory: The directory. It's opened here, so it may even be renamed later.
        :param devices: Whether block devices may be used.
        """
        super().__init__(devices)
        try:
            self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise FileError.from_os_error(e, "open the root directory", directory) from e
        self.walks = not _has_openat2(self.fd)

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """See :meth:`.Namespace.open`."""
        if "\0" in filename:
            raise ValueError("embedded null byte")  # where the system call would end the name
        if not self.walks:
            with suppress(BlockingIOError):  # as long as others rename or mount all the time
                return _openat2(self.fd, filename, flags, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        return self._walk(filename, flags, mode)

    def make_folder(self, filename: str, mode: int = FOLDER_MODE) -> None:
        """See :meth:`.Namespace.make_folder`."""
        _make_folder(self, filename, mode)

    def _walk(self, filename: str, flags: int, mode: int) -> int:  # noqa: C901 (it is what the kernel does)
        todo = _split(filename)
        folders = [os.dup(self.fd)]  # from the root to where the walk has come
        links = 0
        try:
            while len(todo) > 1 or (todo and not flags & os.O_CREAT):
                name = todo.pop()
                if name in (".", ".."):
                    if not stat.S_ISDIR(os.fstat(folders[-1]).st_mode):
                        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), filename)
                    if name == ".." and len(folders) > 1:
                        os.close(folders.pop())
                    continue
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folders[-1])
                folders.append(fd)
                if not stat.S_ISLNK(os.fstat(fd).st_mode):
                    continue
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), filename)
                target = os.readlink("", dir_fd=fd)
                os.close(folders.pop())
                if target.startswith("/"):
                    while len(folders) > 1:
                        os.close(folders.pop())
                todo += _split(target)
            if todo:
                return os.open(todo[0], flags | os.O_NOFOLLOW, mode, dir_fd=folders[-1])
            if flags & os.O_DIRECTORY and not stat.S_ISDIR(os.fstat(folders[-1]).st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), filename)
            if flags & os.O_PATH:
                return os.dup(folders[-1])
            return reopen(folders[-1], flags)
        finally:
            for fd in folders:
                os.close(fd)


class Within(Namespace):
    """
    A namespace in which no link is followed below a certain folder, and no ``..`` leads out of it.

    The folder itself may be named by links.
    """

    def __init__(self, outer: Namespace, folder: str):
        """
        Initialize a namespace.

        :param outer: What the name of the folder means.
        :param folder: Its absolute name.
        """
        super().__init__(outer.devices)
        self.outer, self.folder = outer, folder.rstrip("/")

    def may_be_link(self, filename: str) -> bool:
        """See :meth:`.Namespace.may_be_link`."""
        return not self._is_inside(filename)

    def _is_inside(self, filename: str) -> bool:
        return filename.startswith(self.folder + "/")

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """See :meth:`.Namespace.open`."""
        if not self._is_inside(filename):
            return self.outer.open(filename, flags, mode)
        folder = self.outer.open(self.folder or "/", _FOLDER)
        try:
            return _open_beneath(folder, filename[len(self.folder) :].lstrip("/") or ".", flags, mode)
        finally:
            os.close(folder)

    def make_folder(self, filename: str, mode: int = FOLDER_MODE) -> None:
        """See :meth:`.Namespace.make_folder`."""
        if self._is_inside(filename):
            _make_folder(self, filename, mode)
        else:
            self.outer.make_folder(filename, mode)


def contain(namespace: Namespace, folder: str) -> Namespace:
    """Let no link below a folder be followed (empty: let links be followed)."""
    return Within(namespace, folder) if folder else namespace


def _make_folder(namespace: Namespace, filename: str, mode: int) -> None:
    folder, name = os.path.split(filename.rstrip("/"))
    parent = namespace.open(folder or "/", _FOLDER)
    try:
        os.mkdir(name or ".", mode, dir_fd=parent)
    finally:
        os.close(parent)


def _open_beneath(folder: int, path: str, flags: int, mode: int) -> int:
    """Open what lies in a folder, and follow no link."""
    if "\0" in path:
        raise ValueError("embedded null byte")
    if _has_openat2(folder):
        return _openat2(folder, path, flags, mode, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)
    *parents, name = [part for part in path.split("/") if part not in ("", ".")] or ["."]
    if ".." in (*parents, name):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    fd = os.dup(folder)
    try:
        for part in parents:
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        found = os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=fd)
    finally:
        os.close(fd)
    if flags & os.O_PATH and stat.S_ISLNK(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return found


def _has_openat2(folder: int) -> bool:
    try:
        os.close(_openat2(folder, ".", _FOLDER, 0, _RESOLVE_IN_ROOT))
        return True
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            return False
        raise


def _openat2(folder: int, path: str, flags: int, mode: int, resolve: int) -> int:
    how = _OpenHow(flags, mode if flags & os.O_CREAT else 0, resolve)
    name = ctypes.c_char_p(os.fsencode(path))
    for _ in range(_RETRIES):
        fd: int = _libc.syscall(_SYS_OPENAT2, folder, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
        if fd >= 0:
            return fd
        # EAGAIN: something was renamed or mounted meanwhile, and the kernel can't be sure that ".." stayed inside.
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _split(path: str) -> list[str]:
    """The components of a path, the last one first. A slash at the end says that it's a folder, as a dot does."""
    return [name for name in reversed(path.split("/") + ["."] * path.endswith("/")) if name]
