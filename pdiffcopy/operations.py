"""
What can be done with the file of a given name?

These are the primitives that the client and the server share. With :class:`.LocalFile`, which does the work, they are
the only code that opens a file to be copied.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any

from pdiffcopy.exceptions import FileForbiddenError, FileMissingError
from pdiffcopy.kernel import PSEUDO, get_file_system
from pdiffcopy.localfile import MACHINE, LocalFile, Namespace, translating
from pdiffcopy.protocol import Extent, FileInfo

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def get_file_info(filename: str) -> dict[str, Any]:
    """
    Get information about a local file.

    :param filename: An absolute filename (a string).
    :returns: A dictionary with file metadata: ``size`` (bytes), ``mtime_ns``, ``ctime_ns``, ``file_id`` and so on,
              see :class:`.FileInfo`. If the file doesn't exist an empty dictionary is returned.
    """
    return stat_file(filename).as_dict()


def get_file_size(filename: str) -> int | None:
    """
    Get the size of a local file.

    :param filename: An absolute filename (a string).
    :returns: The size of the file (an integer) or :data:`None` when the file doesn't exist.
    """
    return get_file_info(filename).get("size")


def read_block(filename: str, offset: int, size: int) -> bytes:
    """
    Read a block of data from a local file.

    :param filename: An absolute filename (a string).
    :param offset: The byte offset where reading starts (an integer).
    :param size: The number of bytes to read (an integer).
    :returns: The read data (a byte string), shorter than `size` at the end of the file.
    """
    with LocalFile(filename) as file:
        return b"".join(bytes(chunk) for chunk in file.chunks([file.clip(Extent(offset, size))]))


def write_block(filename: str, offset: int, data: bytes) -> None:
    """
    Write a block of data to a local file.

    :param filename: An absolute filename (a string).
    :param offset: The byte offset where writing starts (an integer).
    :param data: The data to write (a byte string).
    """
    with LocalFile(filename, write=True) as file:
        file.write([Extent(offset, len(data))], [data])


def resize_file(
    filename: str,
    size: int,
    namespace: Namespace = MACHINE,
    devices: bool = True,
    run: str = "",
    file_id: str = "",
) -> None:
    """
    Create or resize a local file, in preparation for synchronizing its contents.

    :param filename: An absolute filename (a string). Missing parent folders are created.
    :param size: The new size in bytes (an integer).
    :param run: The run that has claimed the file, if one has.
    :param file_id: Which file it has to be (by default any, and a new one).
    """
    if not file_id:
        _create(filename, namespace)
    with LocalFile(filename, True, namespace, devices, file_id) as file, file.writing(run):
        file.resize(size)


def claim_file(
    filename: str,
    run: str,
    create: bool = False,
    mode: int = FileInfo.mode,
    namespace: Namespace = MACHINE,
    devices: bool = True,
    file_id: str = "",
) -> tuple[bool, FileInfo]:
    """Let one run write to a file, and no earlier one any more (see :meth:`.Replica.claim`)."""
    if create:
        _create(filename, namespace, mode)
    with LocalFile(filename, True, namespace, devices, file_id) as file:
        return file.claim(run), file.info()


def release_file(
    filename: str, run: str, namespace: Namespace = MACHINE, devices: bool = True, file_id: str = ""
) -> FileInfo:
    """End a claim (see :meth:`.Replica.release`)."""
    with LocalFile(filename, True, namespace, devices, file_id) as file:
        file.release(run)
        return file.info()


def sync_file(
    filename: str, namespace: Namespace = MACHINE, devices: bool = True, run: str = "", file_id: str = ""
) -> None:
    """Flush a file, and the folder that has its name, to their disk (see :meth:`.LocalFile.sync`)."""
    with LocalFile(filename, True, namespace, devices, file_id) as file:
        file.sync(run)
    folder = os.path.dirname(filename) or "."
    with translating("flush", folder):
        fd = namespace.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def stat_file(filename: str, run: str = "") -> FileInfo:
    """Get a :class:`.FileInfo` of a local file (that it doesn't exist is no error), see :meth:`.Replica.info`."""
    try:
        with LocalFile(filename) as file:
            file.check_claim(run)
            return file.info()
    except FileMissingError:
        return FileInfo(exists=False)


def _create(filename: str, namespace: Namespace, mode: int = FileInfo.mode) -> None:
    with translating("create", filename):
        _check_place(filename, namespace)
        _make_folders(os.path.dirname(filename) or ".", namespace)
        with suppress(FileExistsError):
            # Whoever creates it is going to write to it, whether the source may be written to or not.
            mode |= stat.S_IRUSR | stat.S_IWUSR
            os.close(namespace.open(filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))


def _check_place(filename: str, namespace: Namespace) -> None:
    """
    Refuse to create what would be no file.

    A name below /dev that doesn't exist is a device that is missing: a file there would be in memory. Where the kernel
    makes up the files, a folder that is made may have a meaning.
    """
    name = filename
    while True:
        try:
            fd = namespace.open(name, os.O_PATH | os.O_CLOEXEC)
            break
        except FileNotFoundError:
            name = os.path.dirname(name.rstrip("/")) or ("/" if filename.startswith("/") else ".")
    try:
        place = os.readlink(f"/proc/self/fd/{fd}") + "/"
        is_pseudo = get_file_system(fd) in PSEUDO
    finally:
        os.close(fd)
    if is_pseudo:
        text = "Can't create {filename}: files there are a part of the kernel"
        raise FileForbiddenError(text, filename=filename)
    if name != filename and place.startswith("/dev/") and not place.startswith("/dev/shm/"):
        raise FileMissingError("Can't create {filename}: there is no such device", filename=filename)


def _make_folders(folder: str, namespace: Namespace) -> None:
    try:
        os.close(namespace.open(folder, _FOLDER))
        return
    except FileNotFoundError:
        names = folder.split("/")
    for i in range(1, len(names) + 1):
        with suppress(FileExistsError):
            namespace.make_folder("/".join(names[:i]) or "/")
