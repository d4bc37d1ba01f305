"""How is a JSON object printed that has a member for each of many files?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from pdiffcopy.console import printing


class Spool:
    """A JSON object with a list of any length, which waits on the disk (a context manager)."""

    def __init__(self, is_wanted: bool):
        """:param is_wanted: Whether there's anything to do."""
        self.file = tempfile.TemporaryFile("w+", encoding="ascii") if is_wanted else None  # noqa: SIM115

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self.file:
            self.file.close()

    def add(self, get_item: Callable[[], dict[str, Any]]) -> None:
        """Add an item to the list."""
        if self.file:
            self.file.write(f"{json.dumps(get_item())}\n")

    def print(self, document: dict[str, Any]) -> None:
        """Print the object, with the list as its member ``files``."""
        if not self.file:
            return
        self.file.seek(0)
        with printing():
            sys.stdout.write(json.dumps(document)[:-1] + ', "files": [')
            for number, line in enumerate(self.file):
                sys.stdout.write(", " * (number > 0) + line.rstrip("\n"))
            sys.stdout.write("]}\n")
            sys.stdout.flush()
