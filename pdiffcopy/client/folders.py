"""
What becomes of the folders in which many files are?

Those that are missing are made first, each for no more people than that of the source is for. They get their metadata
when all files are done, since each new file moves the time of its folder; set-id bits aren't among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, compress
from typing import TypeVar

from pdiffcopy.blocks import FOLDER_MODE, MAX_MODE, Metadata
from pdiffcopy.client.job import concerns_one_file
from pdiffcopy.client.plan import Options
from pdiffcopy.client.planning import check_writable
from pdiffcopy.client.retry import Patience
from pdiffcopy.client.selection import Selection
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.sides import Files, group_files
from pdiffcopy.client.summary import FileReport
from pdiffcopy.exceptions import FileMissingError, ProgramError
from pdiffcopy.replica import Replica

T = TypeVar("T")

AT_A_TIME = 32
"""How many folders are asked for in one exchange."""


def check_owner(selection: Selection, options: Options, servers: Servers) -> None:
    """
    Refuse owner and group that nothing new may get there, before there is anything new.

    What comes first stands for all of it. What else is wrong with that is for its own turn to tell.

    :raises: :exc:`.FileForbiddenError` when they can't be set.
    """
    if not (selection.is_tree and (options.owner or options.group)):
        return  # of several sources each may be somebody else's
    new = next((chosen for chosen in chain(selection.folders, selection.files) if chosen.is_new), None)
    if not new:
        return
    source, target = (servers.open(address) for address in selection.locate(new.name))
    source.is_folder = new in selection.folders
    try:
        check_writable(target.label, target.info()[1])
        metadata = options.select(source.metadata())._replace(mode=None, mtime_ns=None)
    except ProgramError as e:
        if not concerns_one_file(e):
            raise
        return
    with suppress(FileMissingError):  # a server that is too old for it
        target.set_metadata(metadata, in_advance=True)


def make_folders(selection: Selection, servers: Servers) -> Iterator[FileReport]:
    """
    Make the folders that the target doesn't have.

    :returns: A generator of those that can't be made.
    :raises: :exc:`.ProgramError` when all of them have to be in one that can't, and for what concerns all of them.
    """
    missing = [folder.name for folder in selection.folders if folder.is_new]
    for names in _cut(missing):
        sources, targets = _open(selection, servers, names)
        found = _ask(servers, partial(sources.metadata, range(len(names))))
        modes = [FOLDER_MODE if metadata is None else _get_mode(metadata) for metadata in found]
        for i, is_made in enumerate(_ask(servers, partial(targets.make_folders, modes))):
            if is_made:
                continue
            try:
                targets.replicas[i].make_folder(modes[i])  # tells why
            except ProgramError as e:
                if not concerns_one_file(e):
                    raise
                _check_writable(targets)
                if not names[i]:
                    raise
                selection.failed[names[i]] = e
                yield FileReport(*selection.locate(names[i]), error=e)


def complete_folders(selection: Selection, options: Options, servers: Servers) -> Iterator[FileReport]:
    """
    Give folders the metadata of their sources, those first that lie in others, unless they have them.

    :returns: A generator of those that can't get it.
    """
    for names in _cut([folder.name for folder in reversed(selection.folders) if folder.name not in selection.failed]):
        sources, targets = _open(selection, servers, names)
        ours, theirs = (
            [
                metadata and _without_set_id(metadata)
                for metadata in _ask(servers, partial(side.metadata, range(len(names))))
            ]
            for side in (sources, targets)
        )
        done = {i for i in range(len(names)) if options.are_alike(ours[i], theirs[i])}
        wanted = {i: options.select(metadata) for i, metadata in enumerate(ours) if metadata and i not in done}
        is_done = _ask(servers, partial(targets.set_metadata, wanted)) if wanted else []
        done.update(compress(wanted, is_done))
        for i in sorted(set(range(len(names))) - done):
            try:
                metadata = _without_set_id(sources.replicas[i].metadata())
                targets.replicas[i].set_metadata(options.select(metadata))
            except ProgramError as e:
                yield FileReport(*selection.locate(names[i]), error=e)


def _check_writable(targets: Files) -> None:
    """Refuse a server that would refuse all folders, one after the other."""
    try:
        peer = targets.peer
    except ProgramError:
        return  # where nothing may be looked at, nothing is known either
    check_writable(targets.replicas[0].label, peer)


def _ask(servers: Servers, action: Callable[[], T]) -> T:
    """Do what may be repeated until it succeeds."""
    return Patience(servers.network.retries).persist(action)


def _without_set_id(metadata: Metadata) -> Metadata:
    return metadata._replace(mode=_get_mode(metadata))


def _get_mode(metadata: Metadata) -> int:
    return (metadata.mode or 0) & MAX_MODE


def _open(selection: Selection, servers: Servers, names: Sequence[str]) -> tuple[Files, Files]:
    sides: tuple[list[Replica], list[Replica]] = [], []
    for name in names:
        for side, address in zip(sides, selection.locate(name), strict=True):
            replica = servers.open(address)
            replica.is_folder = True
            side.append(replica)
    return group_files(sides[0]), group_files(sides[1])


def _cut(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + AT_A_TIME] for start in range(0, len(names), AT_A_TIME))
