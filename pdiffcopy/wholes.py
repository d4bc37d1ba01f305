"""
How does a small file travel as a whole?

Where files are small, to ask takes longer than what is done. So all that is wanted of a file is asked for at once, and
of many files in one exchange: these requests come only as some of several (:mod:`.bundles`). What they can't do is
done step by step, as for a large file.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pdiffcopy.answers import decode_info
from pdiffcopy.blocks import DEFAULT_MODE, MAX_MODE, FileInfo
from pdiffcopy.exceptions import ProtocolError, RequestError
from pdiffcopy.protocol import WithMetadata
from pdiffcopy.request import Request
from pdiffcopy.words import DIGEST, MAX_BLOCK_SIZE, RUN, Flag, Integer, Text, word

MAX_WHOLE = 4 * 1024 * 1024
"""How large a file may be, in bytes."""
MAX_BLOCKS = 8192
"""How many blocks it may have to be hashed as a whole."""


class SummaryRequest(Request):
    """Size and identity of a file, and one digest of all that the digests of its blocks tell."""

    verb, endpoint, action = "GET", "summary", "summarize"

    block_size: int = word(Integer(1, MAX_BLOCK_SIZE))
    method: str = word(Text())
    grain: int = word(Integer(1, MAX_BLOCK_SIZE))
    flush: bool = word(Flag(), False)

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.grain > self.block_size:
            raise RequestError("The grain of holes can't be larger than a block")


class FetchRequest(Request):
    """Size, identity and contents of a file."""

    verb, endpoint, action = "GET", "whole", "fetch"

    digest: bool = word(Flag(), False)
    flush: bool = word(Flag(), False)


class CreateRequest(WithMetadata):
    """A new file, what is to be in it, and the metadata that it gets after that."""

    verb, endpoint, action, writes = "POST", "whole", "create", True

    run: str = word(RUN)
    new_mode: int = word(Integer(0, MAX_MODE), DEFAULT_MODE)
    in_advance: bool = word(Flag(), False)
    digest: str = word(DIGEST, "")


class FileSummary(NamedTuple):
    """What is to be known of a file whose contents may be equal to those of another one."""

    info: FileInfo
    digest: str = ""
    """Stands for what is in its blocks, and for where they have holes (empty: it was changed meanwhile)."""
    claim: str | None = None
    """The run that has claimed it (empty: none has; :data:`None`: it can't be claimed)."""


def encode_summary(summary: FileSummary) -> dict[str, Any]:
    """Make the members of the answer to a :class:`SummaryRequest`."""
    return {"digest": summary.digest, "claim": summary.claim, **summary.info.as_dict()}


def decode_summary(text: bytes) -> FileSummary:
    """
    Read that answer.

    :raises: :exc:`.ProtocolError` when it isn't one.
    """
    info, _ = decode_info(text, exists=True)
    document = json.loads(text)
    digest, claim = document.get("digest"), document.get("claim")
    if isinstance(digest, str) and isinstance(claim, str | None):
        return FileSummary(info, digest, claim)
    raise ProtocolError("The server's summary of a file isn't one")
