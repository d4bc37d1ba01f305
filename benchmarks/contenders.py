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

    def get_command(self, source: str, target: str) -> list[str]:
        """The command line that makes the target equal to the source."""
        if self is IMPORT_REQUESTS:
            return list(self.arguments)
        return [*self.arguments, source, target]

    def get_input(self, extents: list[tuple[int, int]]) -> bytes:
        """What it reads from its standard input: a limit learns from there what differs."""
        if self.hash is None:
            return b""
        return json.dumps({"hash": self.hash, "extents": extents, "verify": "xxh128"}).encode()


def _pdiffcopy(name: str, *options: str) -> Contender:
    return Contender(f"pdiffcopy {name}", (sys.executable, "-m", "pdiffcopy", *options), PDIFFCOPY)


def _rsync(name: str, *options: str) -> Contender:
    # Files of the same size and time must be compared as well.
    return Contender(f"rsync {name}", ("rsync", "--inplace", "--ignore-times", *options), RSYNC)


def _limit(name: str, method: str) -> Contender:
    return Contender(f"limit {name}", (sys.executable, "-m", "benchmarks.limits"), NOBODY, method)


SHA1, XXH128, BLAKE3 = (_pdiffcopy(method, "-m", method) for method in ("sha1", "xxh128", "blake3"))
WHOLE, WHOLE_UNVERIFIED = _pdiffcopy("-W", "-W"), _pdiffcopy("-W --no-verify", "-W", "--no-verify")
RSYNC_DELTA, RSYNC_WHOLE = _rsync("delta", "--no-whole-file"), _rsync("-W", "--whole-file")
LIMIT_SHA1, LIMIT_XXH128, LIMIT_BLAKE3 = (_limit(method, method) for method in ("sha1", "xxh128", "blake3"))
LIMIT_COPY = _limit("copy", "")
IMPORT_REQUESTS = Contender("import requests", (sys.executable, "-c", "import requests"))

LIMITS = {SHA1: LIMIT_SHA1, XXH128: LIMIT_XXH128, BLAKE3: LIMIT_BLAKE3, WHOLE: LIMIT_COPY, WHOLE_UNVERIFIED: LIMIT_COPY}
"""The limit of each contender that has one."""
