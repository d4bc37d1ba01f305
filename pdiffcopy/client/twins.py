"""
What becomes of files that were the same as others in the target?

Where a file has several names on both sides, it is done under one of them, and looked at under the others when that is
over: if it's still one file on both sides, that's all. If it isn't (a new version has taken the place of one of the
names, for example), the others are files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from pdiffcopy.client.job import concerns_one_file
from pdiffcopy.client.selection import Selection
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.summary import FileReport
from pdiffcopy.exceptions import ProgramError


def part_twins(selection: Selection, servers: Servers, is_dry: bool) -> Iterator[FileReport]:
    """
    Choose those that are files of their own by now: of each file one, the others are left for the next time.

    :param is_dry: Whether the others aren't touched, so that what would be one of its own isn't yet.
    :returns: A generator of those that can't become equal, since they're one in the target only.
    """
    twins, selection.twins, selection.files = selection.twins, [], []
    seen = set()
    for file, other in twins:
        if other in seen:
            selection.twins.append((file, other))
            continue
        seen.add(other)
        are_one = [_are_one(selection, side, file.name, other, servers) for side in (0, 1)]
        if all(are_one) and not (is_dry and selection.replaces):  # a new version would part them
            selection.skip(file.name, "hard link")
        elif is_dry or not are_one[1]:
            selection.files.append(file)
        else:
            yield FileReport(*selection.locate(file.name), error=selection.make_clash(file.name, other))


def _are_one(selection: Selection, side: int, name: str, other: str, servers: Servers) -> bool:
    one, another = (_identify(selection, side, place, servers) for place in (name, other))
    return one == another != ""


def _identify(selection: Selection, side: int, name: str, servers: Servers) -> str:
    try:
        return servers.open(selection.locate(name)[side]).info()[0].file_id
    except ProgramError as e:
        if not concerns_one_file(e):
            raise
        return ""  # that's for its own job to tell
