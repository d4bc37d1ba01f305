"""Which command lines compete?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

PDIFFCOPY, RSYNC, NOBODY = "pdiffcopy", "rsync", ""


@dataclass(frozen=True)
class Contender:
    """A program with its options."""

    name: str
    arguments: tuple[str, ...]
    server: str = NOBODY
    """Whom it talks to: :data:`PDIFFCOPY`, :data:`RSYNC` or :data:`NOBODY` (it gets the names of local files)."""
    hash: str | None = None
    """The hash method of a limit, empty for one that doesn't hash. :data:`None` for all others."""
    takes_folders: bool = False
    """Whether it makes folders equal, whose names end in a slash then."""
    leaves_target: bool = False
    """Whether it does something else than to make the target equal to the source."""

    def get_command(self, source: str, target: str) -> list[str]:
        """The command line that makes the target equal to the source."""
        slash = "/" * self.takes_folders
        return [*self.arguments, source + slash, target + slash]

    @property
    def tells_report(self) -> bool:
        """Whether the last line of its output is a report in JSON."""
        return "--json" in self.arguments

    def get_input(self, extents: list[tuple[int, int]]) -> bytes:
        """What it reads from its standard input: a limit learns from there what differs."""
        if self.hash is None:
            return b""
        return json.dumps({"hash": self.hash, "extents": extents, "verify": "xxh128"}).encode()


def _pdiffcopy(name: str, *options: str) -> Contender:
    return Contender(name, (sys.executable, "-m", "pdiffcopy", *options), PDIFFCOPY)


def _rsync(name: str, *options: str) -> Contender:
    # Files of the same size and time must be compared as well.
    return Contender(f"rsync {name}", ("rsync", "--inplace", "--ignore-times", *options), RSYNC)


DEFAULT, XXH128 = _pdiffcopy("pdiffcopy"), _pdiffcopy("pdiffcopy xxh128", "-m", "xxh128")
RATE = 64 * 1024**2
"""How many bytes a second a limited client, or a limited server, lets pass."""
UNLIMITED = _pdiffcopy("pdiffcopy --json", "--json")
LIMITED, LIMITED_ONE, LIMITED_MANY = (
    _pdiffcopy(f"pdiffcopy limited{name}", "--json", f"--bwlimit={RATE}", *options)
    for name, options in (("", ()), (" -c 1", ("-c", "1")), (" -c 8", ("-c", "8")))
)
DROP = _pdiffcopy("pdiffcopy --drop-cache", "--drop-cache")
RSYNC_DELTA, RSYNC_WHOLE = _rsync("delta", "--no-whole-file"), _rsync("-W", "--whole-file")
ATOMIC = _pdiffcopy("pdiffcopy --atomic", "--atomic")
TREE = Contender("pdiffcopy -r", (sys.executable, "-m", "pdiffcopy", "-r"), PDIFFCOPY, takes_folders=True)
RSYNC_TREE, RSYNC_TREE_EQUAL, RSYNC_TREE_DELTA = (
    Contender(" ".join(("rsync", *options)), ("rsync", *options), RSYNC, takes_folders=True)
    for options in (("-r",), ("-r", "-I"), ("-r", "-I", "--no-whole-file"))
)
LIMIT = Contender("limit", (sys.executable, "-m", "benchmarks.limits"), NOBODY, "blake3")
READERS = Contender("32 readers", (sys.executable, "-m", "benchmarks.readers", "32"), leaves_target=True)
IMPORT_REQUESTS = Contender("import requests", (sys.executable, "-c", "import requests"), leaves_target=True)
