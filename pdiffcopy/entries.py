"""
What is in a folder, and in which order is that told?

A listing is a series of entries: first the thing that was asked about, then what lies in it. It is strictly ascending,
and a folder comes before what it contains; so nothing is told twice, and whoever reads it can check that without
remembering more than one entry. There is no I/O here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import dropwhile
from typing import NamedTuple

from pdiffcopy.exceptions import ProtocolError

MAX_DEPTH = 100
"""How many levels a listing has at most (it takes a descriptor for each). Who asks for so many wants all there are."""
MAX_NAME = 4095
"""How long the name of an entry may be, in bytes (``PATH_MAX`` in linux/limits.h, without the NUL byte)."""


class Kind(Enum):
    """What a thing in a file system is."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    FIFO = "fifo"
    SOCKET = "socket"
    DEVICE = "device"
    """A block device or a character device."""
    OTHER = "other"
    """What can be neither read nor entered: above all what the kernel makes up."""
    UNREADABLE = "unreadable"
    """What may not be looked at: a folder that may not be read, or anything in one that may not be entered."""
    MISSING = "missing"
    """Nothing. Only a listing as a whole can be about that."""


class Entry(NamedTuple):
    """One thing of those that a listing tells."""

    name: str
    """What it's called below the folder that was asked about, with slashes (empty: it is that folder)."""
    kind: Kind
    size: int = 0
    """The size of a file in bytes (0 for anything else)."""
    mtime_ns: int = 0
    """The time of its last modification in nanoseconds since 1970, which may be negative."""
    file_id: str = ""
    """Which one it is, if it's a folder, or a file with several names (see :class:`.FileInfo`, otherwise empty)."""

    @property
    def place(self) -> tuple[bytes, ...]:
        """The names of the folders that lead to it, and its own: what a listing is ordered by."""
        return tuple(os.fsencode(self.name).split(b"/")) if self.name else ()


def skip_to(wanted: Entry, entries: Iterator[Entry]) -> bool:
    """Skip the beginning of a listing up to an entry, and tell whether that is there (and still of the same kind)."""
    found = next(dropwhile(lambda entry: entry.place < wanted.place, entries), None)
    return found is not None and (found.name, found.kind) == (wanted.name, wanted.kind)


def check_entries(entries: Iterable[Entry], depth: int) -> Iterator[Entry]:
    """
    Pass on a listing that somebody else has made, as long as it is one. No name of it leads anywhere else.

    :param depth: How many levels were asked for.
    :raises: :exc:`.ProtocolError` for a name that no file can have or that leads out of the folder, for one that comes
             twice or out of order, and for one in something that isn't a folder.
    """
    before: tuple[bytes, ...] | None = None
    is_folder = False
    for entry in entries:
        place = entry.place
        if before is None:
            fault = "" if not place else "which isn't what was asked about"
        else:
            fault = _find_fault(place, before, is_folder, depth)
            if entry.kind is Kind.MISSING:
                fault = "which it says is missing"
        if fault:
            raise ProtocolError("The server lists {name}, {fault}", name=repr(entry.name[:80]), fault=fault)
        yield entry
        before, is_folder = place, entry.kind is Kind.FOLDER
    if before is None:
        raise ProtocolError("The server lists nothing, not even what was asked about")


def _find_fault(place: tuple[bytes, ...], before: tuple[bytes, ...], is_folder: bool, depth: int) -> str:
    """
    Say what is wrong with the place of an entry (empty: nothing is).

    :param before: The place of the entry before it.
    :param is_folder: Whether that one is a folder. (All that it lies in are.)
    """
    parent = place[:-1]
    if any(part in (b"", b".", b"..") or b"\0" in part for part in place):
        return "which can't be the name of anything there"
    if place <= before:
        return "which comes twice, or too late"
    if len(place) > depth:
        return "which is deeper than what was asked for"
    if parent != before[: len(parent)] or (parent == before and not is_folder):
        return "which lies in something that isn't a folder"
    return ""
