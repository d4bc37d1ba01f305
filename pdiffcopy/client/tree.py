"""
Which files of a folder are to become equal to which?

Both folders are listed at the same time, in the same order. Only files are chosen: links, FIFOs, sockets and devices
are left out and counted, and nothing is followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, NoReturn

from pdiffcopy.address import Address
from pdiffcopy.client.places import find_kind
from pdiffcopy.client.selection import Chosen, Selection
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import MAX_DEPTH, Entry, Kind
from pdiffcopy.exceptions import FileMissingError, UsageError


class Rule(NamedTuple):
    """What is chosen."""

    includes: bool
    glob: str
    """A pattern for names below the folder. ``*`` stands for any characters, slashes too."""


def select_tree(source: Address, target: Address, rules: Sequence[Rule], servers: Servers) -> Selection:
    """
    Choose the files below a folder.

    :raises: :exc:`.UsageError` when a server is too old to list a folder, for what is a file on one side only, and when
             one of the folders lies in the other one.
    """
    selection = Selection([source], target, is_tree=True)
    replicas = servers.open(selection.root), servers.open(selection.target)
    for replica in replicas:
        find_kind(replica, "-r")
    ours, theirs = (replica.entries(MAX_DEPTH) for replica in replicas)
    roots = next(ours), next(theirs)
    _check_roots(*roots, selection)
    selection.folders.append(Chosen(0, "", roots[1].kind is Kind.MISSING))
    chooser = _Chooser(rules, selection)
    for entry, there in match(_outside(roots[1], ours, selection), _outside(roots[0], theirs, selection)):
        chooser.look_at(entry, there)
    selection.check()
    return selection


def _check_roots(ours: Entry, theirs: Entry, selection: Selection) -> None:
    source, target = str(selection.root), str(selection.target)
    if ours.kind is Kind.MISSING:
        raise FileMissingError("The source {label} doesn't exist", label=source)
    for label, entry in ((source, ours), (target, theirs)):
        if entry.kind not in (Kind.FOLDER, Kind.MISSING):
            raise UsageError("{label} is a {kind}, and -r takes folders", label=label, kind=entry.kind.value)
    if ours.file_id == theirs.file_id != "":
        raise UsageError("The source and the target are the same folder: {label}", label=source)
    if theirs.kind is Kind.MISSING and _leads_into(selection.target, selection.root):
        _refuse_nesting(selection)


def _leads_into(inner: Address, outer: Address) -> bool:
    """Whether a name seems to lead into a folder."""
    resolve = os.path.realpath if inner.is_near else os.path.normpath
    folder = resolve(outer.filename).rstrip("/")
    return inner.origin == outer.origin and resolve(inner.filename).startswith(f"{folder}/")


def _outside(other: Entry, entries: Iterator[Entry], selection: Selection) -> Iterator[Entry]:
    """Pass on what lies in a folder, as long as it isn't the other one: a run must not read what it writes."""
    for entry in entries:
        if entry.file_id == other.file_id != "":
            _refuse_nesting(selection)
        yield entry


def _refuse_nesting(selection: Selection) -> NoReturn:
    text = "One of {source} and {target} lies in the other one: name folders that don't"
    raise UsageError(text, source=str(selection.root), target=str(selection.target))


def match(ours: Iterator[Entry], theirs: Iterator[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Tell of each entry of one listing what the other one has under that name. Both are in the same order."""
    other = next(theirs, None)
    for entry in ours:
        while other and other.place < entry.place:
            other = next(theirs, None)
        yield entry, other if other and other.place == entry.place else Entry(entry.name, Kind.MISSING)
    for _ in theirs:
        pass  # all of it is looked at by those who made the listing


class _Chooser:
    """Chooses files and folders, which come in the order of a listing."""

    def __init__(self, rules: Sequence[Rule], selection: Selection):
        self.rules, self.selection = rules, selection
        self.pending: list[tuple[Entry, Entry]] = []
        """The excluded folders in which the current entry lies: they are needed if anything in them is chosen."""

    def look_at(self, entry: Entry, there: Entry) -> None:
        """Choose what is an entry of the source, or don't."""
        self._leave(entry.place)
        if entry.kind not in (Kind.FILE, Kind.FOLDER, Kind.UNREADABLE):
            self.selection.skip(entry.name, entry.kind.value)
        elif self._is_included(entry.name):
            for ancestor in self.pending:
                self._choose(*ancestor)
            self.pending.clear()
            self._choose(entry, there)
        elif entry.kind is Kind.FILE:
            self.selection.skip(entry.name, "excluded")
        elif entry.kind is Kind.FOLDER:
            self.pending.append((entry, there))

    def _leave(self, place: tuple[bytes, ...]) -> None:
        """Leave the folders in which the next entry doesn't lie."""
        while self.pending and (folder := self.pending[-1][0].place) != place[: len(folder)]:
            self.pending.pop()

    def _is_included(self, name: str) -> bool:
        return next((rule.includes for rule in self.rules if fnmatchcase(name, rule.glob)), True)

    def _choose(self, entry: Entry, there: Entry) -> None:
        selection = self.selection
        if entry.kind is Kind.UNREADABLE:
            selection.unreadable.append(entry.name)
            return
        if there.kind not in (entry.kind, Kind.MISSING, Kind.UNREADABLE):
            text = "{name} is a {kind} in {source}, and a {other} in {target}: move one of them away"
            raise UsageError(
                text, name=entry.name, kind=entry.kind.value, source=str(selection.root), other=there.kind.value,
                target=str(selection.target),
            )  # fmt: skip
        chosen = Chosen(entry.size, entry.name, there.kind is Kind.MISSING)
        if entry.kind is Kind.FILE:
            selection.choose(chosen, entry.file_id, there.file_id)
        else:
            selection.folders.append(chosen)
