"""
How are several requests and their answers spelled as one?

That is worth it where many files are small, so that an exchange takes longer than what is done in it. A part of a
request is its verb, its endpoint and its query string, a part of the answer is its status and its document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pdiffcopy.exceptions import ProtocolError, RequestError
from pdiffcopy.protocol import (
    ClaimRequest,
    ClearRequest,
    HashesRequest,
    HolesRequest,
    InfoRequest,
    MetadataRequest,
    PiecesRequest,
    ReleaseRequest,
    ResizeRequest,
    SetMetadataRequest,
)
from pdiffcopy.request import Request

MAX_PARTS = 64
"""How many requests there may be in one."""
MAX_BUNDLE = 1024 * 1024
"""How long the body may be, in bytes."""
MAX_PART = 16 * 1024
"""How long the answer to one of them may be, in bytes."""

COMBINABLE: tuple[type[Request], ...] = (
    InfoRequest,
    HashesRequest,
    HolesRequest,
    PiecesRequest,
    ClearRequest,
    ResizeRequest,
    ClaimRequest,
    ReleaseRequest,
    MetadataRequest,
    SetMetadataRequest,
)
"""What may be one of several: what is done soon, and has a short answer."""

_PART = re.compile(r"(GET|POST) ([a-z]+)\?([!-~]*)")


def encode_requests(requests: Sequence[Request]) -> bytes:
    """Spell several requests: a line for each."""
    return "".join(f"{request.verb} {request.endpoint}?{request.encode()[0]}\n" for request in requests).encode("ascii")


def decode_requests(body: bytes) -> list[tuple[str, str, bytes]]:
    """
    Read several requests.

    :returns: A list of tuples of verb, endpoint and query string.
    :raises: :exc:`.RequestError` when they aren't such lines.
    """
    matches = [_PART.fullmatch(line) for line in body.decode("ascii", "replace").splitlines()]
    if not 0 < len(matches) <= MAX_PARTS:
        raise RequestError("There have to be from 1 to {most} requests in one", most=MAX_PARTS)
    parts = [(match[1], match[2], match[3].encode("ascii")) for match in matches if match]
    if len(parts) < len(matches):
        raise RequestError("A request of several is malformed")
    return parts


def encode_answers(answers: Sequence[tuple[int, bytes]]) -> str:
    """Spell several answers, each of which is a status and a document."""
    return json.dumps([[status, document.decode("latin-1")] for status, document in answers])


def decode_answers(text: bytes, count: int) -> list[tuple[int, bytes]]:
    """
    Read several answers.

    :param count: How many there have to be.
    :raises: :exc:`.ProtocolError` when they aren't that many, or no answers.
    """
    try:
        answers = [(status, document.encode("latin-1")) for status, document in json.loads(text)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        answers = []
    if len(answers) != count or not all(type(status) is int for status, _ in answers):
        raise ProtocolError("The server's answers to several requests aren't those")
    return answers
