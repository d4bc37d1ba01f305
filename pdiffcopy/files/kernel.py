"""Which system calls does the program need that Python doesn't have?"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import termios
from contextlib import suppress

OVERLAY = 0x794C7630
"""The type of an overlay file system (``OVERLAYFS_SUPER_MAGIC`` in linux/magic.h)."""

PSEUDO = frozenset(
    [
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x27E0EB,  # cgroup
        0x63677270,  # cgroup2
        0x64626720,  # debugfs
        0x74726163,  # tracefs
        0x73636673,  # securityfs
        0xCAFE4A11,  # bpf
        0x1CD1,  # devpts
        0x6165676C,  # pstore
        0xDE5E81E4,  # efivarfs
        0x62656570,  # configfs
        0x42494E4D,  # binfmt_misc
        0x19800202,  # mqueue (ipc/mqueue.c)
        0xF97CFF8C,  # selinux
        0x43415D53,  # smack
        0x5A3C69F0,  # apparmor
        0x65735543,  # fusectl
        0x6E736673,  # nsfs
        0x50495045,  # pipefs
        0x534F434B,  # sockfs
        0x6E667364,  # nfsd (fs/nfsd/nfsctl.c)
        0x67596969,  # rpc_pipefs (net/sunrpc/rpc_pipe.c)
        0x7655821,  # resctrl
    ]
)
"""The types of file systems whose files aren't kept anywhere: the kernel makes them up (linux/magic.h)."""

_WRITE, _WRITE_AND_WAIT = 0x2, 0x1 | 0x2 | 0x4
"""``SYNC_FILE_RANGE_WRITE``, and the same with ``_WAIT_BEFORE`` and ``_WAIT_AFTER`` (linux/fs.h)."""
_NO_FALLOCATE = frozenset([errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL])
"""How file systems refuse it that don't have it (fallocate(2))."""
_PUNCH_HOLE = 0x1 | 0x2
"""``FALLOC_FL_KEEP_SIZE | _PUNCH_HOLE`` (linux/falloc.h)."""
_ZERO_RANGE = 0x1 | 0x10
"""``FALLOC_FL_KEEP_SIZE | _ZERO_RANGE`` (linux/falloc.h)."""
_FICLONE = 0x40049409
"""``FICLONE`` (linux/fs.h)."""
_FS_IOC_GETFLAGS = 0x80006601 | struct.calcsize("l") << 16
_FS_APPEND_FL = 0x20
"""Attributes of files (linux/fs.h)."""
_NO_LINKS = frozenset([errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
"""How file systems refuse hard links that don't have them (link(2))."""
_RENAME_NOREPLACE = 0x1
"""linux/fs.h."""
_OUT_OF_ROOM = frozenset([errno.ENOSPC, errno.EDQUOT])
_WINDOW = 16 * 1024 * 1024
"""How much of a file is mapped at a time, in bytes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.lseek.argtypes, _libc.lseek.restype = (ctypes.c_int, ctypes.c_int64, ctypes.c_int), ctypes.c_int64
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_ssize_t  # MAP_FAILED is -1

_LOWEST_BITS = bytes(value & 1 for value in range(256))


def get_file_system(fd: int) -> int:
    """The type of the file system that an open file is in (``f_type`` of statfs(2), the first member)."""
    status = (ctypes.c_long * 64)()
    _check(_libc.fstatfs(fd, status))
    return status[0]


def write_back(fd: int, offset: int, size: int) -> None:
    """
    Wait until a part of a file has no dirty pages (sync_file_range(2)), which takes a moment where there are none.

    A program that has mapped such a page faults at its next write there, and that moves the time of the file.
    """
    # An overlay has no pages of its own, and doesn't pass the call on. A sandbox may not know it.
    if get_file_system(fd) == OVERLAY or not _write_range(fd, offset, size, _WRITE_AND_WAIT):
        os.fdatasync(fd)


def start_write_back(fd: int, offset: int, size: int) -> None:
    """Let a part of a file get to the disk soon, where that's possible."""
    with suppress(OSError):  # who waits for it learns of that
        _write_range(fd, offset, size, _WRITE)


def punch_hole(fd: int, offset: int, size: int) -> bool:
    """
    Let a part of a file become a hole (or zeros, where that's no whole block). The size of the file stays as it is.

    :returns: :data:`False` when the file system can't do that.
    """
    return _fallocate(fd, _PUNCH_HOLE, offset, size)


def zero_device(fd: int, offset: int, size: int) -> bool:
    """
    Let a part of a block device be zeros, as ``BLKZEROOUT`` does: they aren't sent to one that can do that itself.

    It keeps its room: nothing is discarded.

    :returns: :data:`False` when that isn't possible there: the part has to consist of sectors, for example.
    """
    try:
        return _fallocate(fd, _ZERO_RANGE, offset, size)
    except OSError as e:
        if e.errno == errno.EBUSY:
            return False
        raise


def allocate(fd: int, size: int) -> bool:
    """
    Give a file this size at least, and all of its room on the disk, in as few parts as possible.

    :returns: :data:`False` when the file system can't do that (glibc would write zeros then).
    """
    return _fallocate(fd, 0, 0, size)


def clone(source: int, target: int) -> bool:
    """
    Let an empty file share all of the contents of another one, until one of them changes (ioctl_ficlone(2)).

    :returns: :data:`False` when the file system can't do that, or not with these two.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError as e:
        if e.errno in _OUT_OF_ROOM or e.errno == errno.EIO:
            raise
        return False


def rename(folder: int, old: str, new: str, replace: bool) -> None:
    """
    Give a file another name in its folder, in one step.

    :param replace: Whether there may be a file of that name (renameat2(2); otherwise it's an :exc:`FileExistsError`).
    """
    if replace:
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)
        return
    names = os.fsencode(old), os.fsencode(new)
    try:
        _check(_libc.renameat2(folder, names[0], folder, names[1], _RENAME_NOREPLACE))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        _rename_by_link(folder, old, new)


def _rename_by_link(folder: int, old: str, new: str) -> None:
    try:
        os.link(old, new, src_dir_fd=folder, dst_dir_fd=folder)  # which never replaces anything
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
    else:
        os.unlink(old, dir_fd=folder)
        return
    # There's no such thing (FAT in user space): somebody has a moment to create a file that is replaced then.
    with suppress(FileNotFoundError):
        os.stat(new, dir_fd=folder, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def is_append_only(fd: int) -> bool:
    """Whether a file can only be appended to, as far as its file system tells (ioctl_iflags(2))."""
    try:
        flags = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l")))
    except OSError:  # it has no such flags
        return False
    return bool(struct.unpack_from("i", flags)[0] & _FS_APPEND_FL)


def count_unread(fd: int) -> int:
    """How many bytes have arrived in a pipe or at a socket that nobody has read yet (``FIONREAD``)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def _fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    try:
        _check(_libc.fallocate(fd, mode, offset, size))
        return True
    except OSError as e:
        if e.errno not in _NO_FALLOCATE:
            raise
        return False


def seek(fd: int, start: int, whence: int, stop: int) -> int:
    """
    Find a hole or data in a part of a file (lseek(2)).

    :param whence: :data:`os.SEEK_HOLE` or :data:`os.SEEK_DATA`.
    :returns: The first offset that is one (where the part ends if there's none).
    """
    # os.lseek() fails in odd ways when the result is far below zero, as it is where a sum in the kernel overflows.
    found = _libc.lseek(fd, start, whence)
    if found != -1:
        return min(found, stop) if found >= 0 else stop
    number = ctypes.get_errno()
    if number == errno.EINVAL:  # it can't have holes
        return stop if whence == os.SEEK_HOLE else start
    if number != errno.ENXIO:  # there's nothing more, or it has been cut meanwhile
        _check(found)
    return stop


def count_cached_pages(fd: int, size: int) -> int:
    """
    How many pages of a file of the given size (in bytes) are in the page cache (mincore(2)).

    Large holes aren't looked at: a file may have more pages than can be counted, and nobody reads what is a hole.
    """
    count = offset = 0
    while (offset := seek(fd, offset, os.SEEK_DATA, size)) < size:
        offset -= offset % mmap.PAGESIZE
        length = min(_WINDOW, size - offset)
        count += find_cached_pages(fd, offset, length).count(1)
        offset += length
    return count


def find_cached_pages(fd: int, offset: int, size: int) -> bytes:
    """
    Find out which pages of a part of a file are in the page cache (mincore(2)).

    :param offset: Where the part begins, a multiple of the size of a page.
    :returns: A byte for each page: 1 if it's there, and for who neither owns the file nor may write to it, otherwise 0.
    """
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    _check(address := _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset))
    try:
        _check(_libc.mincore(address, size, pages))
    finally:
        _libc.munmap(address, size)
    return pages.raw.translate(_LOWEST_BITS)


def _write_range(fd: int, offset: int, size: int, flags: int) -> bool:
    try:
        _check(_libc.sync_file_range(fd, offset, size, flags))
        return True
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return False


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
