"""
How is a JSON object printed that has a member for each of many files?

It's printed however the run ends, and tells how far that got. What ends the run while the object is being printed (the
user may not want to wait for whoever reads it) leaves a part of one, and no other object follows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from tempfile import SpooledTemporaryFile, gettempdir
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
        self.file = SpooledTemporaryFile(IN_MEMORY) if is_wanted else None  # noqa: SIM115
        self.get_document = get_document

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: Any, reason: BaseException | None, traceback: Any) -> None:
        """Print the object. What ended the run early becomes a part of it, and matters more than what comes now."""
        if not self.file:
            return
        with self.file:
            if not reason:
                self._print({})
                return
            message, status = describe_end(reason)
            with suppress(ProgramError, OSError):
                self._print({"error": message, "exit_code": status})

    def add(self, get_item: Callable[[], dict[str, Any]]) -> None:
        """Add an item to the list."""
        if self.file:
            try:
                self.file.write(f"{json.dumps(get_item())}\n".encode("ascii"))
            except OSError as e:
                text = "Can't write the list for --json to {folder}: {reason} (make room there, or set $TMPDIR)"
                raise FileError(text, folder=gettempdir(), reason=e.strerror) from e

    def _print(self, ending: dict[str, Any]) -> None:
        """Print the object, with the list as its member ``files``."""
        assert self.file
        self.file.seek(0)
        document = {**self.get_document(), **ending}
        with printing():
            sys.stdout.write(json.dumps(document)[:-1] + ', "files": [')
            whole = (line for line in self.file if line.endswith(b"\n"))  # a full disk took only a part of the last
            for number, line in enumerate(whole):
                sys.stdout.write(", " * (number > 0) + line.decode("ascii").rstrip("\n"))
            sys.stdout.write("]}\n")
