"""
How are several requests and their answers spelled as one?

That is worth it where many files are small, so that an exchange takes longer than what is done in it. Either way a
*head* comes first, in a frame that tells its length and its digest, and then all contents, one after the other. The
head tells of each request its verb, its endpoint, its query string and the size of its contents; of each answer its
status, its document, and the size and the digest of its contents. There is no I/O here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import DamagedError, ProtocolError, RequestError
from pdiffcopy.protocol import (
    ClaimRequest,
    ClearRequest,
    HashesRequest,
    HolesRequest,
    InfoRequest,
    MakeFolderRequest,
    MetadataRequest,
    PiecesRequest,
    ReleaseRequest,
    ResizeRequest,
    SetMetadataRequest,
)
from pdiffcopy.request import Request
from pdiffcopy.wholes import MAX_WHOLE, CreateRequest, FetchRequest, SummaryRequest
from pdiffcopy.words import Filename, check_digest, word

MAX_PARTS = 64
"""How many requests there may be in one."""
MAX_HEAD = 1024 * 1024
"""How long a head may be, in bytes."""
MAX_PART = 64 * 1024
"""How long the document of an answer may be, in bytes: what is longer has to be asked for by a request of its own."""

COMBINABLE: tuple[type[Request], ...] = (
    InfoRequest,
    HashesRequest,
    HolesRequest,
    PiecesRequest,
    ClearRequest,
    ResizeRequest,
    ClaimRequest,
    ReleaseRequest,
    MakeFolderRequest,
    MetadataRequest,
    SetMetadataRequest,
)
"""What may be one of several: what is done soon, and has a short answer."""
WHOLES: tuple[type[Request], ...] = (SummaryRequest, FetchRequest, CreateRequest)
"""What comes only as one of several."""
_KINDS = {(kind.verb, kind.endpoint): kind for kind in (*COMBINABLE, *WHOLES)}

_FRAME = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{32})\n")
_FRAME_SIZE = 42


def encode_frame(head: bytes) -> bytes:
    """Put a head into a frame."""
    return b"%08x %b\n%b" % (len(head), compute_digest(head).encode("ascii"), head)


def decode_frame(take: Callable[[int], bytes]) -> bytes:
    """
    Read a head.

    :param take: Returns so many of the bytes to come.
    :raises: :exc:`.DamagedError` when it isn't what was sent.
    """
    frame = _FRAME.fullmatch(take(_FRAME_SIZE))
    if frame and int(frame[1], 16) <= MAX_HEAD:
        head = take(int(frame[1], 16))
        if compute_digest(head).encode("ascii") == frame[2]:
            return head
    raise DamagedError("What was sent as several things was damaged on its way")


class ManyRequest(Request):
    """Several requests at a time: they are the body."""

    verb, endpoint, action = "POST", "many", "many"

    filename: str = word(Filename(), "/")


class PartRequest(NamedTuple):
    """One request of several."""

    verb: str
    endpoint: str
    query: bytes
    size: int
    """How many bytes of contents belong to it."""

    @property
    def kind(self) -> type[Request]:
        """
        What it is.

        :raises: :exc:`.RequestError` when that can't be one of several.
        """
        kind = _KINDS.get((self.verb, self.endpoint))
        if not kind:
            raise RequestError("{verb} {endpoint} can't be one of several", verb=self.verb, endpoint=self.endpoint)
        return kind


def encode_requests(requests: Sequence[Request], sizes: Sequence[int]) -> bytes:
    """
    Make a head.

    :param sizes: How many bytes of contents each of them has.
    """
    parts = zip(requests, sizes, strict=True)
    return json.dumps([[part.verb, part.endpoint, part.encode_query(), size] for part, size in parts]).encode("ascii")


def decode_requests(head: bytes) -> list[PartRequest]:
    """
    Read a head.

    :raises: :exc:`.RequestError` when it isn't one.
    """
    try:
        parts = [
            PartRequest(verb, endpoint, query.encode("ascii"), size) for verb, endpoint, query, size in _load(head)
        ]
    except ValueError as e:
        raise RequestError("What was sent as several requests isn't that") from e
    if not 0 < len(parts) <= MAX_PARTS:
        raise RequestError("There have to be from 1 to {most} requests in one", most=MAX_PARTS)
    if not all(0 <= part.size <= MAX_WHOLE for part in parts):
        raise RequestError("One request of several has {most} bytes of contents at most", most=MAX_WHOLE)
    return parts


class PartAnswer(NamedTuple):
    """One answer of several."""

    status: int
    document: bytes
    size: int = 0
    """How many bytes of contents belong to it."""
    digest: str = ""
    """The digest of those, if the server states one."""


def encode_answers(answers: Sequence[PartAnswer]) -> bytes:
    """Make a head."""
    return f"[{', '.join(map(_spell, answers))}]".encode("ascii")


def count_bytes(answer: PartAnswer) -> int:
    """How many bytes of a head one answer takes."""
    return len(_spell(answer)) + len(", ")


def _spell(answer: PartAnswer) -> str:
    return json.dumps([answer.status, answer.document.decode("latin-1"), answer.size, answer.digest])


def decode_answers(head: bytes, count: int) -> list[PartAnswer]:
    """
    Read a head.

    :param count: How many answers there have to be.
    :raises: :exc:`.ProtocolError` when they aren't that many, or no answers.
    """
    try:
        answers = [
            PartAnswer(status, document.encode("latin-1"), size, digest and check_digest(digest))
            for status, document, size, digest in json.loads(head)
        ]
    except (ValueError, TypeError, AttributeError, RecursionError, RequestError):
        answers = []
    sizes = [size for answer in answers for size in (answer.status, answer.size)]
    if len(answers) != count or not all(type(size) is int and 0 <= size <= MAX_WHOLE for size in sizes):
        raise ProtocolError("The server's answers to several requests aren't those")
    return answers


def _load(head: bytes) -> list[tuple[str, str, str, int]]:
    """Read lists of three strings and a number. Anything else is a :exc:`ValueError`."""
    try:
        rows = json.loads(head)
        if all([*map(type, row)] == [str, str, str, int] for row in rows):
            return [tuple(row) for row in rows]
    except (TypeError, RecursionError):
        pass
    raise ValueError("not that")
