"""
How do names become files?

A :class:`Namespace` says what a name means: anything on this machine, or (:class:`.Root`) something below one folder.
It also says whether block devices may be used. Whatever is created is created here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pdiffcopy.blocks import DEFAULT_MODE, FOLDER_MODE
from pdiffcopy.exceptions import FileForbiddenError, FileMissingError, UsageError, translating
from pdiffcopy.files.kernel import PSEUDO, get_file_system
from pdiffcopy.files.room import get_room

DANGLING = "Can't create {filename}: it is a link that leads to nothing, remove it"
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Namespace:
    """All files of this machine."""

    def __init__(self, devices: bool = True):
        """
        Initialize a namespace.

        :param devices: Whether block devices may be used.
        """
        self.devices = devices

    def may_be_link(self, filename: str) -> bool:
        """Whether the last part of a name is followed if it's a symbolic link."""
        return True

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """Open a file like :func:`os.open` does."""
        return os.open(filename, flags, mode)

    def make_folder(self, filename: str, mode: int = FOLDER_MODE) -> None:
        """Make a folder like :func:`os.mkdir` does."""
        os.mkdir(filename, mode)


MACHINE = Namespace()


class Folder(Namespace):
    """The files of one folder (a context manager). It stays open, so it doesn't matter what becomes of its name."""

    def __init__(self, name: str, namespace: Namespace):
        """
        Open a folder.

        :param name: Its name.
        :param namespace: What that means.
        """
        super().__init__(namespace.devices)
        self.fd = namespace.open(name, _FOLDER)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        os.close(self.fd)

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """Open a file of the folder, of whose name only the last part counts. No link is followed."""
        return os.open(os.path.basename(filename), flags | os.O_NOFOLLOW, mode, dir_fd=self.fd)


def reopen(path: int, flags: int) -> int:
    """Open what a descriptor of ``O_PATH`` stands for, which nobody can have exchanged meanwhile."""
    try:
        return os.open(f"/proc/self/fd/{path}", flags)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists("/proc/self/fd"):
            raise OSError(errno.ENOSYS, "/proc isn't mounted here, and pdiffcopy needs it") from e
        raise


def make_absolute(filename: str) -> str:
    """
    The absolute spelling of a local name.

    Nothing is taken away: ``link/../file`` lies beside what the link leads to, and only the kernel knows where that is.
    """
    if filename.startswith("/"):
        return filename
    try:
        return os.path.join(os.getcwd(), filename.removeprefix("./"))
    except OSError as e:
        text = "Can't find {filename}: the working directory doesn't exist any more ({reason})"
        raise UsageError(text, filename=filename, reason=e.strerror) from e


@contextmanager
def opened_folder(folder: str, namespace: Namespace) -> Iterator[int]:
    """Open a folder to do something with the folder itself."""
    with translating("open", folder):
        fd = namespace.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_folder(filename: str, namespace: Namespace) -> None:
    """Flush the folder that has the name of a file to its disk."""
    folder = os.path.dirname(filename) or "."
    with opened_folder(folder, namespace) as fd, translating("flush", folder):
        os.fsync(fd)


def create_file(filename: str, namespace: Namespace, mode: int = DEFAULT_MODE) -> None:
    """
    Create a file, and the folders that lead to it, unless it exists.

    :param mode: Whom it is for, at most (permission bits; the umask takes away some).
    :raises: :exc:`.FileError` when that isn't possible, or makes no sense.
    """
    with translating("create", filename):
        make_place(filename, namespace)
        try:
            # The run that creates it is going to write to it, whether the source may be written to or not.
            mode |= stat.S_IRUSR | stat.S_IWUSR
            os.close(namespace.open(filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        except FileExistsError:
            if not _leads_somewhere(filename, namespace):
                raise FileMissingError(DANGLING, filename=filename) from None


def _leads_somewhere(filename: str, namespace: Namespace) -> bool:
    try:
        os.close(namespace.open(filename, os.O_PATH | os.O_CLOEXEC))
    except FileNotFoundError:
        os.close(namespace.open(filename, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))  # it may be gone by now
        return False
    return True


def create_folder(filename: str, namespace: Namespace, mode: int = FOLDER_MODE) -> None:
    """
    Create a folder, and the folders that lead to it, unless it exists.

    :param mode: Whom it is for, at most (permission bits; the umask takes away some).
    :raises: :exc:`.FileError` when that isn't possible, or makes no sense.
    """
    with translating("create", filename):
        _check_place(filename, namespace)
        # The run that creates it is going to create files in it, whether the source may be written to or not.
        _make_folders(filename, namespace, mode | stat.S_IRWXU)


def make_place(filename: str, namespace: Namespace) -> None:
    """Make the folders that lead to a file, unless one there makes no sense (:exc:`.FileError`)."""
    _check_place(filename, namespace)
    _make_folders(os.path.dirname(filename) or ".", namespace)


@contextmanager
def opened_nearest(filename: str, namespace: Namespace) -> Iterator[tuple[int, str]]:
    """Open what a name leads to (``O_PATH``), or the nearest folder that would have it, and tell the name of that."""
    fd, name = -1, filename
    while fd < 0:
        try:
            fd = namespace.open(name, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            name = os.path.dirname(name.rstrip("/")) or ("/" if filename.startswith("/") else ".")
    try:
        yield fd, name
    finally:
        os.close(fd)


def find_room(filename: str, namespace: Namespace) -> int | None:
    """How many bytes are left where a file is, or would be created, see :func:`.get_room`."""
    with suppress(OSError), opened_nearest(filename, namespace) as (fd, _):
        return get_room(fd)
    return None  # whoever opens the file will tell


def _check_place(filename: str, namespace: Namespace) -> None:
    """
    Refuse to create what would be no file.

    Where there's no folder, nothing lies above it: the kernel doesn't follow ``..`` there, and a folder made for that
    would stay. A name below /dev that doesn't exist is a device that is missing: a file there would be in memory. Where
    the kernel makes up the files, a folder that is made may have a meaning.
    """
    with opened_nearest(filename, namespace) as (fd, name):
        if ".." in filename.removeprefix(name).split("/"):
            text = "Can't create {filename}: .. is behind a folder that doesn't exist, write the path without it"
            raise FileMissingError(text, filename=filename)
        check_folder(fd, filename, exists=name == filename)


def check_folder(fd: int, filename: str, exists: bool = False) -> None:
    """Refuse to create what would be no file, in an open folder (or refuse what is open, if that's it)."""
    place = os.readlink(f"/proc/self/fd/{fd}") + "/"
    if get_file_system(fd) in PSEUDO:
        text = "Can't create {filename}: files there are a part of the kernel"
        raise FileForbiddenError(text, filename=filename)
    if not exists and place.startswith("/dev/") and not place.startswith("/dev/shm/"):
        raise FileMissingError("Can't create {filename}: there is no such device", filename=filename)


def _make_folders(folder: str, namespace: Namespace, mode: int = FOLDER_MODE) -> None:
    try:
        os.close(namespace.open(folder, _FOLDER))
        return
    except FileNotFoundError:
        names = folder.split("/")
    for i in range(1, len(names) + 1):
        with suppress(FileExistsError):
            namespace.make_folder("/".join(names[:i]) or "/", mode if i == len(names) else FOLDER_MODE)
