"""Which file is an open one, and how long can another change of it go unnoticed?"""

from __future__ import annotations

import os
import stat
from functools import cache

from pdiffcopy.exceptions import FileError

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
SHORT_TICK, LONG_TICK = 20_000_000, 2_000_000_000
"""How long two changes may bear the same time, in nanoseconds: the kernel's clock takes steps of up to 10 ms, and
times without fractions belong to a file system that counts seconds (ext4 with small inodes) or pairs of them (FAT)."""


def identify(status: os.stat_result) -> str:
    """
    What no other file has on any machine until it starts anew: device, inode, and the boot that they belong to.

    Each of several nodes of a block device has an inode of its own, so there it's the number of the device that counts.
    """
    number = f"{status.st_rdev:x}" if stat.S_ISBLK(status.st_mode) else f"{status.st_dev:x}:{status.st_ino:x}"
    return f"{number}@{find_boot()}"


def share_machine(identity: str, other: str) -> bool:
    """Whether two files are known to be on one machine, by what :func:`identify` tells of them."""
    return identity.partition("@")[2] == other.partition("@")[2] != ""


@cache
def find_boot() -> str:
    """
    Find the random word that the kernel chooses when it starts (random(4)).

    :raises: :exc:`.FileError` where it's hidden. Without it other files would pass for those that they were before.
    """
    try:
        with open(_BOOT_ID, encoding="ascii") as handle:
            return handle.read().strip()
    except OSError as e:
        text = "Can't read {name}, by which files are told apart: {reason} (does ProcSubset=pid hide it?)"
        raise FileError(text, name=_BOOT_ID, reason=e.strerror) from e


def get_settling_time(mtime_ns: int, ctime_ns: int, now_ns: int) -> int:
    """
    For how long another change of a file may bear the same time as the last one, in nanoseconds.

    What a user may have set to a time to come doesn't count, nor does a clock that was set back.
    """
    is_coarse = mtime_ns % 1_000_000_000 == ctime_ns % 1_000_000_000 == 0
    tick = LONG_TICK if is_coarse else SHORT_TICK
    latest = max((t for t in (mtime_ns, ctime_ns) if t <= now_ns + tick), default=0)
    return min(tick, max(0, latest + tick - now_ns))
