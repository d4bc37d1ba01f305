"""
Which files are to become equal to which?

Everything that can be wrong with the names of many files is found here and in :mod:`.tree`, before the first of them is
touched. What is a file on one side and a folder (or anything else) on the other is refused, and so is what would be
written to under two names, or read under one and written to under another one.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.blocks import FileInfo
from pdiffcopy.client.places import find_kind, join
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import Entry, Kind
from pdiffcopy.exceptions import FileForbiddenError, FileMissingError, ProgramError, UsageError
from pdiffcopy.files.identity import share_machine
from pdiffcopy.replica import Replica

logger = logging.getLogger(__name__)

_FOLDER = "{label} is a folder, and there are several sources: bring it into line in a run of its own, with -r"


class Chosen(NamedTuple):
    """A file or a folder that was chosen."""

    size: int
    name: str
    is_new: bool = False
    """Whether the target doesn't have it yet."""


class Selection:
    """What was chosen, and what wasn't."""

    def __init__(self, sources: Sequence[Address], target: Address, is_tree: bool, replaces: bool = False):
        """
        Initialize a selection in which there is nothing.

        :param sources: Files, or one folder.
        :param target: The folder for them.
        :param is_tree: Whether there is one folder.
        :param replaces: Whether new files take the place of those in the target.
        """
        self.target, self.is_tree, self.replaces = _strip(target), is_tree, replaces
        self.root = _strip(sources[0])
        self.sources = {} if is_tree else {os.path.basename(source.filename): source for source in sources}
        self.files: list[Chosen] = []
        self.twins: list[tuple[Chosen, str]] = []
        """Files that were the same as another one in the target, and the name of that one: their turn comes last."""
        self.folders: list[Chosen] = []
        """The folder and those below it, each before what is in it."""
        self.failed: dict[str, ProgramError] = {}
        """Folders that can't be looked at, or made."""
        self.skipped: Counter[str] = Counter()
        """How many things of which kind were left out, and how many files were excluded."""
        self._read: dict[str, str] = {}
        self._written: dict[str, tuple[str, str]] = {}
        self._linked: set[str] = set()
        """What links in the target lead to."""

    def skip(self, name: str, why: str) -> None:
        """Leave something out."""
        self.skipped[why] += 1
        logger.log(logging.INFO - 1, "Left out: %s (%s)", name, why)

    def fail(self, name: str, address: Address) -> None:
        """Remember that something can't be looked at, on one side or the other."""
        text = "Can't list {label}: Permission denied (--exclude leaves it out)"
        self.failed[name] = FileForbiddenError(text, label=str(address))

    def choose_folder(self, folder: Chosen, source_id: str, target_id: str) -> None:
        """
        Choose a folder.

        :param source_id: Which one it is (see :class:`.FileInfo`).
        :param target_id: Which one that of the target is (empty if there's none).
        :raises: :exc:`.UsageError` when the target has one folder where the source has two.
        """
        if other := self._note(folder.name, source_id, target_id):
            raise self.make_clash(folder.name, other[0])
        self.folders.append(folder)

    def choose(self, file: Chosen, source_id: str, target_id: str, is_link: bool = False) -> None:
        """
        Choose a file.

        :param source_id: Which one it is, if it may have other names (see :class:`.FileInfo`).
        :param target_id: Which one that of the target is.
        :param is_link: Whether the target only leads there.
        :raises: :exc:`.UsageError` when the target has one file where the source has two.
        """
        if is_link:
            self._linked.add(target_id)
        if not (other := self._note(file.name, source_id, target_id)):
            self.files.append(file)
        # Of two names of one file each can get a new file, but a link goes on leading to the other one.
        elif (self.replaces and target_id not in self._linked) or source_id == other[1] != "":
            self.twins.append((file, other[0]))
        else:
            raise self.make_clash(file.name, other[0])

    def _note(self, name: str, source_id: str, target_id: str) -> tuple[str, str] | None:
        """Remember what is read and written, and tell under which other name the same is written (and what that is)."""
        if source_id:
            self._read.setdefault(source_id, name)
        if not target_id:
            return None
        other = self._written.setdefault(target_id, (name, source_id))
        return other if other[0] != name else None

    def make_clash(self, name: str, other: str) -> UsageError:
        """Say that the target has one thing where the source has two."""
        text = "{name} and {other} are one in {target}, and two in the source: remove one of them there"
        return UsageError(text, name=name, other=other, target=str(self.target))

    def check(self) -> None:
        """
        Refuse what would be written to as one thing, and read as another.

        :raises: :exc:`.UsageError` for the first one.
        """
        for target_id, (name, source_id) in self._written.items():
            if target_id in self._read and target_id != source_id:
                ours, theirs = self.locate(self._read[target_id])[0], self.locate(name)[1]
                text = "The target {theirs} is the source {ours}: exclude it, or choose another target"
                raise UsageError(text, theirs=str(theirs), ours=str(ours))

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


def select_files(sources: Sequence[Address], target: Address, servers: Servers, replaces: bool = False) -> Selection:
    """
    Choose several files. They go into one folder, which is created where it's missing.

    :param replaces: Whether new files take the place of those in the target.
    :raises: :exc:`.UsageError` for folders, for two files of one name, and for what is no file in the target.
    """
    for source in sources:
        if source.filename.endswith("/"):
            raise UsageError(_FOLDER, label=str(source))
    selection = Selection(sources, target, False, replaces)
    if len(selection.sources) < len(sources):
        names = Counter(os.path.basename(source.filename) for source in sources)
        text = "Two of the sources are called {name}, and there can be only one of them in {target}"
        raise UsageError(text, name=names.most_common(1)[0][0], target=str(target))
    there = _list_target(servers.open(selection.target), selection)
    found = {name: _look(servers.open(source), _FOLDER) for name, source in selection.sources.items()}
    # Elsewhere no name leads to a source, and where no file has several names, they're all different.
    folder = there.pop("", Entry("", Kind.MISSING))
    is_one_machine = any(share_machine(info.file_id, folder.file_id) for info in found.values())
    may_coincide = is_one_machine or any(entry.kind is not Kind.FILE or entry.file_id for entry in there.values())
    for name, info in found.items():
        target_id = _identify_target(join(selection.target, name), servers) if may_coincide and name in there else ""
        is_link = name in there and there[name].kind is not Kind.FILE
        selection.choose(Chosen(info.size, name), info.file_id, target_id, is_link)
    selection.check()
    return selection


def _list_target(target: Replica, selection: Selection) -> dict[str, Entry]:
    """Tell what is called like the sources in the target, and of the target itself (under an empty name)."""
    entries = target.entries(1)
    try:
        folder = next(entries)
    except FileMissingError:
        return {}  # an old server says no when their turn comes
    if folder.kind not in (Kind.FOLDER, Kind.MISSING):
        raise UsageError("{label} is no folder, and there are several sources", label=target.label)
    there = {entry.name: entry for entry in entries if entry.name in selection.sources}
    for name, entry in there.items():
        if entry.kind is Kind.FOLDER:
            raise UsageError("{name} is a folder in {label}", name=name, label=target.label)
    return {"": folder, **there}


def _look(replica: Replica, if_folder: str) -> FileInfo:
    """Look at a file. What can't be looked at fails when its turn comes, unless it's a folder."""
    try:
        return replica.info()[0]
    except ProgramError:
        if find_kind(replica) is Kind.FOLDER:
            raise UsageError(if_folder, label=replica.label) from None
        return FileInfo(False)


def _identify_target(address: Address, servers: Servers) -> str:
    replica = servers.open(address)
    info = _look(replica, "{label} is a folder, and there are several sources")
    if not info.exists and find_kind(replica) is Kind.MISSING:
        # It would become a file as soon as another source has been copied to what it leads to.
        raise UsageError("{label} is a link that leads to nothing: remove it", label=str(address))
    return info.file_id
