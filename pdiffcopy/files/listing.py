"""
What is in a folder of this machine?

Folders are entered through the descriptor of the folder that they lie in, and nothing is followed there: whoever
exchanges one for a link, at any moment, leads nobody out of the folder that was asked about. Mount points are entered,
what the kernel makes up isn't.

All of it is told, or the listing fails. A folder that may not be read is told as that, unless it is the one that was
asked about. What disappears meanwhile is left out, what is exchanged meanwhile is told as what it is when it's looked
at.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from heapq import nsmallest
from itertools import groupby

from pdiffcopy.entries import MAX_DEPTH, MAX_NAME, Entry, Kind
from pdiffcopy.exceptions import FileError, FileNameError, ReplacedError, translating
from pdiffcopy.files.identity import identify
from pdiffcopy.files.kernel import PSEUDO, get_file_system
from pdiffcopy.files.names import MACHINE, Namespace

MOST_NAMES, LEAST_NAMES = 2048, 64
"""How many names of a folder are in memory at a time. (It's half as many on each further level, down to a few.)"""

_LOOK = os.O_PATH | os.O_CLOEXEC
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.FOLDER,
    stat.S_IFLNK: Kind.LINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFBLK: Kind.DEVICE,
    stat.S_IFCHR: Kind.DEVICE,
}


def list_folder(
    filename: str, namespace: Namespace = MACHINE, depth: int = 1, file_id: str = ""
) -> Generator[Entry, None, None]:
    """
    Tell what a name leads to, and if that's a folder, what lies in it, in the order of :mod:`.entries`.

    Symbolic links in the name are followed, as anything that opens it would, those in the folder aren't.

    :param namespace: What the name means.
    :param depth: How many levels to tell: none but the thing itself, what lies in it, or also what lies in folders
                  there, and so on. :data:`.MAX_DEPTH` means all, and if there are more of them that's an error.
    :param file_id: What the name has to lead to (see :class:`.FileInfo`, by default anything).
    :returns: A generator. While it is in use it has a descriptor for each level.
    :raises: :exc:`.FileError` for what can't be read, :exc:`.ReplacedError` when the name leads to something else.
    """
    with _Thing(partial(namespace.open, filename), filename, "", depth > 0) as thing:
        if file_id and file_id != thing.identify():
            raise ReplacedError("{filename} was replaced by another file, run again", filename=filename)
        yield thing.entry
        yield from _list_below(thing, depth, MOST_NAMES)


def _list_below(folder: _Thing, depth: int, most: int) -> Iterator[Entry]:
    """Tell what lies in a folder (nothing lies in anything else)."""
    if folder.entry.kind is not Kind.FOLDER:
        return
    if not depth:
        if len(folder.entry.place) == MAX_DEPTH:
            text = "Can't list {filename}: more than {maximum} folders lie in each other there"
            raise FileError(text, filename=folder.path, maximum=MAX_DEPTH)
        return
    for name in folder.read_names(most):
        with folder.look(name, depth > 1) as thing:
            if thing.entry.kind is not Kind.MISSING:
                yield thing.entry
                yield from _list_below(thing, depth - 1, max(most // 2, LEAST_NAMES))


class _Thing:
    """What a name leads to, open as long as it's in use (a context manager), so that nobody can exchange it."""

    fd = -1

    def __init__(self, open_it: Callable[[int], int], path: str, name: str, enters: bool):
        """
        Open it.

        :param open_it: Opens what the name leads to at that moment, with some flags.
        :param path: What messages call it.
        :param name: What the listing calls it.
        :param enters: Whether to open it for reading if it's a folder.
        """
        self.path = path
        self.entry = Entry(name, Kind.MISSING)
        with translating("list", path):
            try:
                self._open(open_it, enters)
            except (FileNotFoundError, NotADirectoryError):
                self.entry = Entry(name, Kind.MISSING)
            except OSError as e:
                self.close()
                if not (name and isinstance(e, PermissionError)):
                    raise
                self.entry = Entry(name, Kind.UNREADABLE)

    def _open(self, open_it: Callable[[int], int], enters: bool) -> None:
        """Find out what it is, and open it accordingly. What is no folder any more by then is looked at again."""
        while True:
            self.fd = open_it(_LOOK)
            self._examine()
            if not (enters and self.entry.kind is Kind.FOLDER):
                return
            self.close()
            with suppress(NotADirectoryError):
                self.fd = open_it(_ENTER)  # by its name, so that what is mounted on demand is mounted now
                self._examine()
                return

    def _examine(self) -> None:
        status = os.fstat(self.fd)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), Kind.OTHER)
        if kind in (Kind.FILE, Kind.FOLDER) and get_file_system(self.fd) in PSEUDO:
            kind = Kind.OTHER
        size = status.st_size if kind is Kind.FILE else 0
        has_identity = kind is Kind.FOLDER or (kind is Kind.FILE and status.st_nlink > 1)
        file_id = identify(status) if has_identity else ""
        self.entry = Entry(self.entry.name, kind, size, status.st_mtime_ns, file_id)

    def identify(self) -> str:
        """Tell which file it is (empty: none)."""
        return identify(os.fstat(self.fd)) if self.fd >= 0 else ""

    def __enter__(self) -> _Thing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def read_names(self, most: int) -> Iterator[str]:
        """
        Read the names in a folder, in ascending order.

        :param most: How many are in memory at a time. The folder is read again for each so many of them.
        """
        last = b""
        while True:
            with translating("list", self.path), os.scandir(self.fd) as found:
                names = nsmallest(most, (name for entry in found if (name := os.fsencode(entry.name)) > last))
            for last, _ in groupby(names):  # a folder that changes meanwhile may have told a name twice
                yield os.fsdecode(last)
            if len(names) < most:
                return

    def look(self, name: str, enters: bool) -> _Thing:
        """Look at what has a name in a folder."""
        full = f"{self.entry.name}/{name}" if self.entry.name else name
        path = os.path.join(self.path, name)
        if len(os.fsencode(full)) > MAX_NAME:
            raise FileNameError("Can't list {filename}: its name is too long", filename=path)

        def open_it(flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=self.fd)

        return _Thing(open_it, path, full, enters)
