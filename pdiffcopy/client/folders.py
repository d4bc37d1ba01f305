"""
What becomes of the folders in which many files are?

Those that are missing are made first, each for no more people than that of the source is for. They get their metadata
when all files are done, since each new file moves the time of its folder; set-id bits aren't among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress
from typing import TypeVar

from pdiffcopy.address import Address
from pdiffcopy.blocks import FOLDER_MODE, MAX_MODE, Metadata
from pdiffcopy.client.plan import Options
from pdiffcopy.client.retry import Patience
from pdiffcopy.client.selection import Selection
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.sides import Files, group_files
from pdiffcopy.exceptions import ProgramError
from pdiffcopy.replica import Replica

T = TypeVar("T")

AT_A_TIME = 32
"""How many folders are asked for in one exchange."""


def make_folders(selection: Selection, servers: Servers) -> None:
    """
    Make the folders that the target doesn't have.

    :raises: :exc:`.ProgramError` for the first one that can't be made.
    """
    missing = [folder.name for folder in selection.folders if folder.is_new]
    for names in _cut(missing):
        sources, targets = _open(selection, servers, names)
        found = _ask(servers, partial(sources.metadata, range(len(names))))
        modes = [FOLDER_MODE if metadata is None else _get_mode(metadata) for metadata in found]
        for i, is_made in enumerate(_ask(servers, partial(targets.make_folders, modes))):
            if not is_made:
                targets.replicas[i].make_folder(modes[i])  # tells why


def complete_folders(
    selection: Selection, options: Options, servers: Servers
) -> Iterator[tuple[tuple[Address, Address], ProgramError]]:
    """
    Give folders the metadata of their sources, those first that lie in others.

    :returns: A generator of failures: the folder of the source and that of the target, and what went wrong.
    """
    for names in _cut([folder.name for folder in reversed(selection.folders)]):
        sources, targets = _open(selection, servers, names)
        found = enumerate(_ask(servers, partial(sources.metadata, range(len(names)))))
        wanted = {i: _select(options, metadata) for i, metadata in found if metadata}
        is_done = _ask(servers, partial(targets.set_metadata, wanted))
        done = set(compress(wanted, is_done))
        for i in sorted(set(range(len(names))) - done):
            try:
                metadata = _select(options, sources.replicas[i].metadata())
                targets.replicas[i].set_metadata(metadata)
            except ProgramError as e:
                yield selection.locate(names[i]), e


def _ask(servers: Servers, action: Callable[[], T]) -> T:
    """Do what may be repeated until it succeeds."""
    return Patience(servers.network.retries).persist(action)


def _select(options: Options, metadata: Metadata) -> Metadata:
    return options.select(metadata._replace(mode=_get_mode(metadata)))


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
