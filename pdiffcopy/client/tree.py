"""
Which files of a folder are to become equal to which?

Both folders are listed at the same time, in the same order. Only files are chosen: links, FIFOs, sockets and devices
are left out and counted, and nothing is followed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.client.places import take_first
from pdiffcopy.client.selection import Chosen, Selection
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import MAX_DEPTH, Entry, Kind
from pdiffcopy.exceptions import FileMissingError, UsageError
from pdiffcopy.files.names import make_absolute

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What is chosen."""

    includes: bool
    glob: str
    """A pattern for names below the folder. ``*`` stands for any characters, slashes too."""

    def __str__(self) -> str:
        """As the user spells it."""
        return f"--{'include' if self.includes else 'exclude'}={self.glob}"


def select_tree(
    source: Address, target: Address, rules: Sequence[Rule], servers: Servers, replaces: bool = False
) -> Selection:
    """
    Choose the files below a folder.

    :param replaces: Whether new files take the place of those in the target.
    :raises: :exc:`.UsageError` for a rule that fits nothing, when a server is too old to list a folder, for what is a
             file on one side only, and for what would be read as one thing and written to as another.
    """
    for rule in rules:
        if {"", ".", ".."} & set(rule.glob.split("/")):
            text = "{rule} fits no name below the folder: those are like a or a/b ('a/*' is all that's in a)"
            raise UsageError(text, rule=rule)
    selection = Selection([source], target, True, replaces)
    source_replica, target_replica = servers.open(selection.root), servers.open(selection.target)
    ours, theirs = source_replica.entries(MAX_DEPTH), target_replica.entries(MAX_DEPTH)
    root, other_root = take_first(ours, source_replica.label, "-r"), take_first(theirs, target_replica.label, "-r")
    _check_roots(root, other_root, selection)
    chooser = _Chooser(rules, selection)
    chooser.folders[root.file_id] = ""
    chooser.choose(root, other_root)
    for entry, there in match(ours, theirs):
        chooser.look_at(entry, there)
    if other_root.kind is Kind.MISSING:
        chooser.check_new(selection.target, servers)
    selection.check()
    for rule in chooser.idle:
        logger.info("No name in %s was left for %s", source_replica.label, rule)
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


def match(ours: Iterator[Entry], theirs: Iterator[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Tell of each entry of one listing what the other one has under that name. Both are in the same order."""
    other = next(theirs, None)
    for entry in ours:
        while other and other.place < entry.place:
            other = next(theirs, None)
        yield entry, other if other and other.place == entry.place else Entry(entry.name, Kind.MISSING)


class _Chooser:
    """Chooses files and folders, which come in the order of a listing."""

    def __init__(self, rules: Sequence[Rule], selection: Selection):
        self.rules, self.selection = rules, selection
        self.idle = list(rules)
        """The rules that haven't decided anything yet."""
        self.pending: list[tuple[Entry, Entry]] = []
        """The excluded folders in which the current entry lies: they are needed if anything in them is chosen."""
        self.folders: dict[str, str] = {}
        """The names of all folders of the source, by what they are, whether they're chosen or not."""
        self.has_warned = False
        self.closed = Entry("", Kind.MISSING)
        """The last folder of the target that may not be read: nothing in it is chosen."""

    def look_at(self, entry: Entry, there: Entry) -> None:
        """Choose what is an entry of the source, or don't."""
        while self.pending and not _lies_in(entry, self.pending[-1][0]):
            self.pending.pop()
        if entry.kind is Kind.FOLDER and entry.file_id:
            self.folders[entry.file_id] = entry.name
        if entry.kind is Kind.UNREADABLE:
            self._judge_unreadable(entry.name)
        elif entry.kind not in (Kind.FILE, Kind.FOLDER):
            self.selection.skip(entry.name, entry.kind.value)
        elif self._is_included(entry.name):
            self._choose_pending(entry.name)
            self.choose(entry, there)
        elif entry.kind is Kind.FILE:
            self.selection.skip(entry.name, "excluded")
        else:
            self.pending.append((entry, there))

    def _choose_pending(self, name: str) -> None:
        """Choose the excluded folders in which something chosen lies."""
        if self.pending and not self.has_warned and not self._find_rule(name):
            self.has_warned = True
            folder, rule = self.pending[0][0].name, self._find_rule(self.pending[0][0].name)
            text = "%s excludes the folder %s, but not what is in it: add --exclude='%s/*' to leave that out"
            logger.warning(text, rule, folder, folder)
        for ancestor in self.pending:
            self.choose(*ancestor)
        self.pending.clear()

    def _find_rule(self, name: str) -> Rule | None:
        found = next((rule for rule in self.rules if fnmatchcase(name, rule.glob)), None)
        if found in self.idle:
            self.idle.remove(found)
        return found

    def _is_included(self, name: str) -> bool:
        rule = self._find_rule(name)
        return not rule or rule.includes

    def _judge_unreadable(self, name: str) -> None:
        """Leave out a folder that the user doesn't want. What might be chosen in any other one can't be known."""
        for rule in self.rules:
            if rule.includes:
                break
            if fnmatchcase(name, rule.glob) or fnmatchcase(f"{name}/", rule.glob):
                self.selection.skip(name, Kind.UNREADABLE.value)
                return
        self.selection.fail(name, self.selection.locate(name)[0])

    def choose(self, entry: Entry, there: Entry) -> None:
        """Choose a file or a folder."""
        selection = self.selection
        if self.closed.name and _lies_in(entry, self.closed):
            selection.fail(self.closed.name, selection.locate(self.closed.name)[1])
            return
        if there.kind is Kind.UNREADABLE:
            self.closed = there
        elif there.kind not in (entry.kind, Kind.MISSING):
            text = "{name} is a {kind} in {source}, and a {other} in {target}: move one of them away"
            raise UsageError(
                text, name=entry.name, kind=entry.kind.value, source=str(selection.root), other=there.kind.value,
                target=str(selection.target),
            )  # fmt: skip
        choose = selection.choose if entry.kind is Kind.FILE else selection.choose_folder
        choose(Chosen(entry.size, entry.name, there.kind is Kind.MISSING), entry.file_id, there.file_id)

    def check_new(self, target: Address, servers: Servers) -> None:
        """Refuse a new folder in the source that the next run would copy into itself."""
        names: list[str] = []
        filename = make_absolute(target.filename) if target.is_near else target.filename
        kind, place = Kind.MISSING, target._replace(filename=filename)
        while kind is Kind.MISSING and place.filename != "/":
            folder, name = os.path.split(place.filename.rstrip("/"))
            names.insert(0, name)
            place = place._replace(filename=folder or "/")
            entry = take_first(servers.open(place).entries(0), str(place))
            kind = entry.kind
        within = self.folders.get(entry.file_id) if entry.file_id else None
        if within is not None and self._is_included("/".join([within, *names] if within else names)):
            text = "{target} lies in {source}: choose another place, or exclude it"
            raise UsageError(text, target=str(target), source=str(self.selection.root))


def _lies_in(entry: Entry, folder: Entry) -> bool:
    place = folder.place
    return entry.place[: len(place)] == place
