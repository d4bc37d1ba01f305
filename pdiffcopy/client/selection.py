"""
Which files are to become equal to which?

Everything that can be wrong with the names of many files is found here, before the first of them is touched. What is a
file on one side and a folder (or anything else) on the other is refused. Of a folder only files are chosen: links,
FIFOs, sockets and devices are left out and counted, and nothing is followed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.client.places import find_kind, join
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import MAX_DEPTH, Entry, Kind
from pdiffcopy.exceptions import FileMissingError, ProgramError, UsageError
from pdiffcopy.replica import Replica

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What is chosen."""

    includes: bool
    glob: str
    """A pattern for names below the folder. ``*`` stands for any characters, slashes too."""


class Chosen(NamedTuple):
    """A file or a folder that was chosen."""

    size: int
    name: str
    is_new: bool = False
    """Whether the target doesn't have it yet."""


class Selection:
    """What was chosen, and what wasn't."""

    def __init__(self, sources: Sequence[Address], target: Address, is_tree: bool):
        """
        Initialize a selection in which there is nothing.

        :param sources: Files, or one folder.
        :param target: The folder for them.
        :param is_tree: Whether there is one folder.
        """
        self.target, self.is_tree = _strip(target), is_tree
        self.root = _strip(sources[0])
        self.sources = {} if is_tree else {os.path.basename(source.filename): source for source in sources}
        self.files: list[Chosen] = []
        self.folders: list[Chosen] = []
        """The folder and those below it, each before what is in it."""
        self.unreadable: list[str] = []
        """What the source has, and doesn't let anybody look at."""
        self.skipped: Counter[str] = Counter()
        """How many things of which kind were left out, and how many files were excluded."""

    def skip(self, name: str, why: str) -> None:
        """Leave something out."""
        self.skipped[why] += 1
        logger.log(logging.INFO - 1, "Left out: %s (%s)", name, why)

    @property
    def size(self) -> int:
        """How many bytes the files have together."""
        return sum(file.size for file in self.files)

    def locate(self, name: str) -> tuple[Address, Address]:
        """Tell where a file is, and where it belongs. Below two folders nothing is followed."""
        if not self.is_tree:
            return self.sources[name], join(self.target, name)
        if not name:
            return self.root, self.target
        ours, theirs = (root._replace(within=root.filename) for root in (self.root, self.target))
        return join(ours, name), join(theirs, name)


def _strip(folder: Address) -> Address:
    return folder._replace(filename=folder.filename.rstrip("/") or "/")


# Several files {{{1


def select_files(sources: Sequence[Address], target: Address, servers: Servers) -> Selection:
    """
    Choose several files. They go into one folder, which is created where it's missing.

    :raises: :exc:`.UsageError` for folders, for two files of one name, and for what is no file in the target.
    """
    for source in sources:
        if source.filename.endswith("/"):
            raise UsageError("{label} is a folder: add -r", label=str(source))
    selection = Selection(sources, target, is_tree=False)
    if len(selection.sources) < len(sources):
        names = Counter(os.path.basename(source.filename) for source in sources)
        text = "Two of the sources are called {name}, and there can be only one of them in {target}"
        raise UsageError(text, name=names.most_common(1)[0][0], target=str(target))
    _check_target(servers.open(selection.target), selection)
    for name, source in selection.sources.items():
        selection.files.append(Chosen(_find_size(servers.open(source)), name))
    return selection


def _check_target(target: Replica, selection: Selection) -> None:
    entries = target.entries(1)
    try:
        folder = next(entries)
    except FileMissingError:
        return  # an old server says no when their turn comes
    if folder.kind not in (Kind.FOLDER, Kind.MISSING):
        raise UsageError("{label} is no folder, and there are several sources", label=target.label)
    for entry in entries:
        if entry.name in selection.sources and entry.kind is Kind.FOLDER:
            raise UsageError("{name} is a folder in {label}", name=entry.name, label=target.label)


def _find_size(source: Replica) -> int:
    try:
        return source.info()[0].size
    except ProgramError:
        return 0  # it fails when its turn comes


# A folder {{{1


def select_tree(source: Address, target: Address, rules: Sequence[Rule], servers: Servers) -> Selection:
    """
    Choose the files below a folder.

    :raises: :exc:`.UsageError` when a server is too old to list a folder, and for what is a file on one side only.
    """
    selection = Selection([source], target, is_tree=True)
    replicas = servers.open(selection.root), servers.open(selection.target)
    for replica in replicas:
        find_kind(replica, "-r")
    ours, theirs = (replica.entries(MAX_DEPTH) for replica in replicas)
    for entry, there in match(ours, theirs):
        if not entry.name:
            _check_folders(entry.kind, there, replicas)
            selection.folders.append(Chosen(0, "", there is Kind.MISSING))
            continue
        _choose(entry, there, rules, selection)
    return selection


def _check_folders(ours: Kind, theirs: Kind, replicas: tuple[Replica, Replica]) -> None:
    source, target = (replica.label for replica in replicas)
    if ours is Kind.MISSING:
        raise FileMissingError("The source {label} doesn't exist", label=source)
    for label, kind in ((source, ours), (target, theirs)):
        if kind not in (Kind.FOLDER, Kind.MISSING):
            raise UsageError("{label} is a {kind}, and -r takes folders", label=label, kind=kind.value)


def match(ours: Iterator[Entry], theirs: Iterator[Entry]) -> Iterator[tuple[Entry, Kind]]:
    """Tell of each entry of one listing what the other one has under that name. Both are in the same order."""
    other = next(theirs, None)
    for entry in ours:
        while other and other.place < entry.place:
            other = next(theirs, None)
        yield entry, other.kind if other and other.place == entry.place else Kind.MISSING


def _choose(entry: Entry, there: Kind, rules: Sequence[Rule], selection: Selection) -> None:
    if entry.kind not in (Kind.FILE, Kind.FOLDER, Kind.UNREADABLE):
        selection.skip(entry.name, entry.kind.value)
    elif not _is_included(entry.name, rules):
        if entry.kind is Kind.FILE:
            selection.skip(entry.name, "excluded")
    elif entry.kind is Kind.UNREADABLE:
        selection.unreadable.append(entry.name)
    elif there not in (entry.kind, Kind.MISSING, Kind.UNREADABLE):
        text = "{name} is a {kind} in {source}, and a {other} in {target}: move one of them away"
        raise UsageError(
            text, name=entry.name, kind=entry.kind.value, source=str(selection.root), other=there.value,
            target=str(selection.target),
        )  # fmt: skip
    elif entry.kind is Kind.FILE:
        selection.files.append(Chosen(entry.size, entry.name, there is Kind.MISSING))
    else:
        selection.folders.append(Chosen(0, entry.name, there is Kind.MISSING))


def _is_included(name: str, rules: Sequence[Rule]) -> bool:
    return next((rule.includes for rule in rules if fnmatchcase(name, rule.glob)), True)
