"""
Which files are to become equal to which?

Everything that can be wrong with the names of many files is found here and in :mod:`.tree`, before the first of them is
touched. What is a file on one side and a folder (or anything else) on the other is refused, and so is a file that would
be written to twice, or while it is read, since it has another name.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.client.places import find_kind, join
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import Entry, Kind
from pdiffcopy.exceptions import FileMissingError, ProgramError, UsageError
from pdiffcopy.replica import Replica

logger = logging.getLogger(__name__)


_FOLDER = "{label} is a folder, and there are several sources: bring it into line by itself, with -r"


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
        self._read: dict[str, str] = {}
        self._written: dict[str, tuple[str, str]] = {}

    def skip(self, name: str, why: str) -> None:
        """Leave something out."""
        self.skipped[why] += 1
        logger.log(logging.INFO - 1, "Left out: %s (%s)", name, why)

    def choose(self, file: Chosen, source_id: str, target_id: str) -> None:
        """
        Choose a file, unless another name of it is chosen on both sides.

        :param source_id: Which file it is, if it may have other names (see :class:`.FileInfo`).
        :param target_id: Which file that of the target is.
        :raises: :exc:`.UsageError` when the target has one file where the source has two.
        """
        if target_id:
            other, other_id = self._written.setdefault(target_id, (file.name, source_id))
            if other != file.name:
                if source_id and source_id == other_id:
                    self.skip(file.name, "hard link")
                    return
                text = "{name} and {other} are one file in {target}, and two in the source: remove one of them there"
                raise UsageError(text, name=file.name, other=other, target=str(self.target))
        if source_id:
            self._read.setdefault(source_id, file.name)
        self.files.append(file)

    def check(self) -> None:
        """
        Refuse a file that would be written to as one, and read as another.

        :raises: :exc:`.UsageError` for the first one.
        """
        for target_id, (name, source_id) in self._written.items():
            if target_id in self._read and target_id != source_id:
                text = "{name} in {target} is the source of {other}: remove it there"
                raise UsageError(text, name=name, target=str(self.target), other=self._read[target_id])

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


def select_files(sources: Sequence[Address], target: Address, servers: Servers) -> Selection:
    """
    Choose several files. They go into one folder, which is created where it's missing.

    :raises: :exc:`.UsageError` for folders, for two files of one name, and for what is no file in the target.
    """
    for source in sources:
        if source.filename.endswith("/"):
            raise UsageError(_FOLDER, label=str(source))
    selection = Selection(sources, target, is_tree=False)
    if len(selection.sources) < len(sources):
        names = Counter(os.path.basename(source.filename) for source in sources)
        text = "Two of the sources are called {name}, and there can be only one of them in {target}"
        raise UsageError(text, name=names.most_common(1)[0][0], target=str(target))
    there = {entry.name: entry for entry in _list_target(servers.open(selection.target), selection)}
    found = {name: _look(source, servers) for name, source in selection.sources.items()}
    # Elsewhere no name leads to a source, and where no file has several names, they're all different.
    is_one_machine = any(source.origin == target.origin for source in sources)
    may_coincide = is_one_machine or any(entry.kind is Kind.LINK or entry.file_id for entry in there.values())
    for name, (size, source_id) in found.items():
        target_id = _look(join(selection.target, name), servers)[1] if may_coincide and name in there else ""
        selection.choose(Chosen(size, name), source_id, target_id)
    selection.check()
    return selection


def _list_target(target: Replica, selection: Selection) -> Iterator[Entry]:
    """Tell what is called like the sources in the target."""
    entries = target.entries(1)
    try:
        folder = next(entries)
    except FileMissingError:
        return  # an old server says no when their turn comes
    if folder.kind not in (Kind.FOLDER, Kind.MISSING):
        raise UsageError("{label} is no folder, and there are several sources", label=target.label)
    for entry in entries:
        if entry.name in selection.sources:
            if entry.kind is Kind.FOLDER:
                raise UsageError("{name} is a folder in {label}", name=entry.name, label=target.label)
            yield entry


def _look(address: Address, servers: Servers) -> tuple[int, str]:
    """Tell the size of a file, and which one it is. What can't be looked at fails when its turn comes."""
    replica = servers.open(address)
    try:
        info = replica.info()[0]
        return info.size, info.file_id
    except ProgramError:
        if find_kind(replica) is Kind.FOLDER:
            raise UsageError(_FOLDER, label=str(address)) from None
        return 0, ""
