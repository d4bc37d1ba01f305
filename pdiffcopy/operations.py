"""
What can be done with the local file of a given name?

These are the functions that version 1.0.1 documents. :class:`.LocalReplica` does the work.
"""

from __future__ import annotations

from typing import Any

from pdiffcopy.blocks import Extent
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading

__all__ = ["get_file_info", "get_file_size", "read_block", "resize_file", "write_block"]


def get_file_info(filename: str) -> dict[str, Any]:
    """
    Get information about a local file.

    :param filename: An absolute filename (a string).
    :returns: A dictionary with file metadata: ``size`` (bytes), ``mtime_ns``, ``ctime_ns``, ``file_id`` and so on,
              see :class:`.FileInfo`. If the file doesn't exist an empty dictionary is returned.
    """
    return LocalReplica(filename).info()[0].as_dict()


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
    with LocalReplica(filename).read([Extent(offset, size)], clip=True) as reading:
        return b"".join(map(bytes, reading.chunks))


def write_block(filename: str, offset: int, data: bytes) -> None:
    """
    Write a block of data to a local file.

    :param filename: An absolute filename (a string).
    :param offset: The byte offset where writing starts (an integer).
    :param data: The data to write (a byte string).
    """
    LocalReplica(filename).write([Extent(offset, len(data))], Reading([data]))


def resize_file(filename: str, size: int) -> None:
    """
    Create or resize a local file, in preparation for synchronizing its contents.

    :param filename: An absolute filename (a string). Missing parent folders are created.
    :param size: The new size in bytes (an integer).
    """
    LocalReplica(filename).resize(size)
