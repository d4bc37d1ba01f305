"""
How is a JSON object printed that has a member for each of many files?

It's printed however the run ends, and tells how far that got. What ends the run while the object is being printed (the
user may not want to wait for whoever reads it) leaves a part of one, and no other object follows.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from tempfile import TemporaryFile, gettempdir
from typing import Any

from pdiffcopy.console import describe_end, printing
from pdiffcopy.exceptions import FileError, ProgramError

IN_MEMORY = 1024 * 1024
"""How many bytes of the list stay in memory, so that it takes a long one for a full disk to matter."""


class Spool:
    """A JSON object with a list of any length, which waits on the disk (a context manager, which prints it)."""

    def __init__(self, is_wanted: bool, get_document: Callable[[], dict[str, Any]]):
        """
        Initialize a spool.

        :param is_wanted: Whether there's anything to do.
        :param get_document: Makes the object, without the list, when it's printed.
        """
        self.is_wanted, self.get_document = is_wanted, get_document
        self.file: io.FileIO | None = None
        """Holds the beginning of the list, when that has got long..."""
        self.size = 0
        """... in so many bytes. (What a full disk took only a part of is behind them.)"""
        self.rest = bytearray()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: Any, reason: BaseException | None, traceback: Any) -> None:
        """Print the object. What ended the run early becomes a part of it, and matters more than what comes now."""
        if not self.is_wanted:
            return
        with self.file or nullcontext():
            if not reason:
                self._print({})
                return
            message, status = describe_end(reason)
            with suppress(ProgramError, OSError):
                self._print({"error": message, "exit_code": status})

    def add(self, get_item: Callable[[], dict[str, Any]]) -> None:
        """
        Add an item to the list.

        :raises: :exc:`.FileError` where there is no room for it. Those before it are kept.
        """
        if self.is_wanted:
            self.rest += f"{json.dumps(get_item())}\n".encode("ascii")
            if len(self.rest) > IN_MEMORY:
                self._move_to_disk()

    def _move_to_disk(self) -> None:
        try:
            if not self.file:
                self.file = TemporaryFile(buffering=0)  # noqa: SIM115
            done = 0
            while done < len(self.rest):
                done += self.file.write(self.rest[done:])
        except OSError as e:
            text = "Can't write the list for --json to {folder}: {reason} (make room there, or set $TMPDIR)"
            raise FileError(text, folder=gettempdir(), reason=e.strerror) from e
        self.size += done
        self.rest.clear()

    def _read(self) -> Iterator[bytes]:
        """Yield the lines of the list."""
        if self.file:
            self.file.seek(0)
            with io.BufferedReader(self.file) as lines:
                left = self.size
                while left:
                    yield (line := lines.readline())
                    left -= len(line)
        yield from io.BytesIO(self.rest)

    def _print(self, ending: dict[str, Any]) -> None:
        """Print the object, with the list as its member ``files``."""
        document = {**self.get_document(), **ending}
        with printing():
            sys.stdout.write(json.dumps(document)[:-1] + ', "files": [')
            for number, line in enumerate(self._read()):
                sys.stdout.write(", " * (number > 0) + line.decode("ascii").rstrip("\n"))
            sys.stdout.write("]}\n")
