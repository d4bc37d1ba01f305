"""
How are the paths that clients name kept inside one directory?

The kernel resolves a path in one step (openat2), so there's no moment between a check and the use of what was
checked. Where it can't (before Linux 5.6, or forbidden by a sandbox), the path is walked one component at a time with
descriptors that nobody can exchange.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from pdiffcopy.exceptions import FileError
from pdiffcopy.files.names import Namespace, reopen

_SYS_OPENAT2 = 437
"""The number of the system call on all architectures (linux/include/uapi/asm-generic/unistd.h)."""
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
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
        self.walks = not self._has_openat2()

    def _has_openat2(self) -> bool:
        try:
            os.close(self._openat2(".", _FOLDER, 0))
            return True
        except OSError as e:
            if e.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                return False
            raise

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """See :meth:`.Namespace.open`."""
        if "\0" in filename:
            raise ValueError("embedded null byte")  # where the system call would end the name
        return (self._walk if self.walks else self._openat2)(filename, flags, mode)

    def make_folder(self, filename: str) -> None:
        """See :meth:`.Namespace.make_folder`."""
        folder, name = os.path.split(filename.rstrip("/"))
        parent = self.open(folder or "/", _FOLDER)
        try:
            os.mkdir(name or ".", 0o777, dir_fd=parent)
        finally:
            os.close(parent)

    def _openat2(self, filename: str, flags: int, mode: int) -> int:
        how = _OpenHow(flags, mode if flags & os.O_CREAT else 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        path = ctypes.c_char_p(os.fsencode(filename))
        for _ in range(_RETRIES):
            fd: int = _libc.syscall(_SYS_OPENAT2, self.fd, path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
            if fd >= 0:
                return fd
            # EAGAIN: something was renamed meanwhile, and the kernel can't be sure that ".." stayed inside.
            if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                break
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), filename)

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


def _split(path: str) -> list[str]:
    """The components of a path, the last one first. A slash at the end says that it's a folder, as a dot does."""
    return [name for name in reversed(path.split("/") + ["."] * path.endswith("/")) if name]
