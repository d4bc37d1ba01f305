"""How much room does the file system of a file have left?"""

from __future__ import annotations

import os

from pdiffcopy.files import kernel

_COMPRESSING = frozenset(
    [
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0x2FC12FC1,  # zfs
        0xCA451A4E,  # bcachefs
    ]
)
"""File systems that may need less room than a file has bytes (linux/magic.h, and the sources of the last two)."""


def get_room(fd: int) -> int | None:
    """
    How many bytes a file system has left.

    :param fd: Something in it.
    :returns: The number, or :data:`None` where it doesn't tell what fits.
    """
    try:
        status = os.fstatvfs(fd)
    except OSError:  # whoever uses the file will tell
        return None
    if not status.f_blocks or kernel.get_file_system(fd) in _COMPRESSING:
        return None
    return status.f_frsize * (status.f_bavail if os.geteuid() else status.f_bfree)
