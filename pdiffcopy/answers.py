"""
What does a server answer, and how is that spelled?

File information, streams of digests, flags and problems: this is the way back of the wire contract, written once, as
:mod:`.protocol` has the way there. There is no I/O here. What a server says is checked before it is believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from typing import Any

from pdiffcopy.blocks import (
    MAX_ID,
    MAX_MODE,
    MAX_OFFSET,
    SET_ID_BITS,
    BlockDigest,
    Extent,
    FileInfo,
    Hole,
    Metadata,
)
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import ProgramError, ProtocolError, ReportedError, TransientError
from pdiffcopy.features import FEATURES

PROBLEM_TYPE = "application/problem+json"
DONE = "done"
VERIFIED = "verified"
"""The member of the answer to ``POST /blocks`` that is true when what lies in the target was compared with a digest."""
CLAIMED = "claimed"
"""The member of the answer to ``POST /claim`` that is false when the file system can't hold a claim (and to
``POST /release``, where it's always false)."""

MAX_SETTLING = 2000
"""How long a client may have to wait until a change shows in the time of a file, in milliseconds."""
MAX_LINE = 4096
"""The longest line of a stream in bytes: an offset and 512 hexadecimal digits are shorter, and so is a problem."""
MAX_UNCHECKED = 65536
"""How many hash lines may come before the digest of them, and how many empty ones (one takes seconds)."""
MAX_DETAIL = 400
"""How many characters of a problem's detail are passed on."""

MAX_HOLES = 8192
"""How many holes an answer tells at most."""
CLEARED = "cleared"
"""The member of the answer to ``POST /zeros`` that is false where a file can't have holes."""

_HASH_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\t([0-9a-f]{2,512}(?:\.[0-9a-f]{32})?)")
_HOLE_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\thole\t([1-9][0-9]{0,18})")


@dataclass(frozen=True)
class PeerInfo:
    """What the other side can do (the defaults describe version 1.0.1)."""

    version: str = "1.0"
    features: frozenset[str] = field(default_factory=frozenset)
    methods: frozenset[str] = field(default_factory=frozenset)
    """The hash methods it has (empty when it doesn't tell)."""
    writable: bool = True
    room: int | None = None
    """How many bytes are left where the file is, or would be (:data:`None`: nobody knows)."""


def sign_answer(request: str, status: int, digest: str) -> str:
    """
    Make the value of :data:`.ANSWER_HEADER`, an XXH128 digest.

    :param request: The value of :data:`.REQUEST_HEADER`, which depends on the nonce.
    :param status: The HTTP status.
    :param digest: The value of :data:`.DIGEST_HEADER` (empty when there is none).
    """
    return compute_digest(f"{request} {status} {digest}".encode("utf-8", "surrogateescape"))


# Streams of digests {{{1


def format_hashes(digests: Iterable[BlockDigest | Hole]) -> bytes:
    """Spell lines of a hash stream."""
    return "".join(map(_format_line, digests)).encode("ascii")


def _format_line(item: BlockDigest | Hole) -> str:
    return f"{item.offset}\thole\t{item.size}\n" if isinstance(item, Hole) else f"{item.offset}\t{item.digest}\n"


def format_checked(digests: Iterable[BlockDigest | Hole]) -> bytes:
    """Spell lines of a hash stream, and their XXH128 digest after an equals sign (an empty line if there are none)."""
    lines = format_hashes(digests)
    return b"%b=%b\n" % (lines, compute_digest(lines).encode("ascii")) if lines else b"\n"


def parse_hashes(chunks: Iterable[bytes]) -> Iterator[BlockDigest | Hole]:
    """
    Read a hash stream.

    :param chunks: The bytes as they arrive, cut anywhere.
    :raises: :exc:`.ProtocolError` for anything but complete lines of a decimal offset and a hexadecimal digest.
    """
    for line in split_lines(chunks):
        yield _parse_hash(line.rstrip(b"\r"))


def parse_checked(chunks: Iterable[bytes]) -> Iterator[BlockDigest | Hole]:
    """
    Read a hash stream with checks: what it yields arrived as it was sent.

    :param chunks: The bytes as they arrive, cut anywhere.
    :raises: :exc:`.TransientError` for lines that don't have the digest that follows them, :exc:`.ReportedError` for a
             problem, :exc:`.ProtocolError` for anything that isn't such a stream.
    """
    held: list[bytes] = []
    empty = 0
    for line in split_lines(chunks):
        if line.startswith(b"="):
            lines = b"".join(b"%b\n" % line for line in held)
            if compute_digest(lines).encode("ascii") != line[1:]:
                raise TransientError("The server's hashes were damaged on their way")
            yield from map(_parse_hash, held)
            held.clear()
            empty = 0
        elif line.startswith(b"{"):
            raise decode_report(line)
        elif line == DONE.encode("ascii") and not held:
            return
        elif line:
            held.append(line)
        else:
            empty += 1
        if max(len(held), empty) > MAX_UNCHECKED:
            raise ProtocolError("The server sent more than {limit} lines without a check", limit=MAX_UNCHECKED)
    raise ProtocolError("The server's hashes end early")


def _parse_hash(line: bytes) -> BlockDigest | Hole:
    match = _HASH_LINE.fullmatch(line)
    if not match:
        if hole := _HOLE_LINE.fullmatch(line):
            return Hole(int(hole[1]), int(hole[2]))
        raise ProtocolError("The server sent a malformed hash line: {line}", line=repr(line[:80]))
    return BlockDigest(int(match[1]), match[2].decode("ascii"))


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """
    Cut a body into its lines.

    :raises: :exc:`.ProtocolError` for a line that is too long or has no end.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE:
            raise ProtocolError("The server sent a line of more than {limit} bytes", limit=MAX_LINE)
    if rest:
        raise ProtocolError("The server's answer ends in the middle of a line")


# File information {{{1


def encode_info(info: FileInfo, peer: PeerInfo) -> dict[str, Any]:
    """Make the members of the answer to ``/info`` (the problem for a missing file has only the last of them)."""
    document = info.as_dict()
    document["server"] = {
        "version": peer.version,
        "features": sorted(peer.features),
        "methods": sorted(peer.methods),
        "writable": peer.writable,
        "room": peer.room,
    }
    return document


def decode_info(text: bytes | str, exists: bool) -> tuple[FileInfo, PeerInfo]:
    """
    Read the answer to ``/info``.

    :raises: :exc:`.ProtocolError` when it isn't one.
    """
    try:
        document = json.loads(text)
        server = document.get("server", {}) if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        document = server = None
    if not isinstance(server, dict):
        if not exists:
            return FileInfo(False), PeerInfo()
        raise ProtocolError("The server's answer is not that of a pdiffcopy server")
    room = server.get("room")
    peer = PeerInfo(
        version=str(server.get("version", "1.0"))[:40],
        features=FEATURES.intersection(_strings(server.get("features"))),
        methods=frozenset(_strings(server.get("methods"))),
        writable=server.get("writable", True) is True,
        room=room if type(room) is int and room >= 0 else None,
    )
    if not exists:
        return FileInfo(False), peer
    times = {name: document.get(name, 0) for name in ("mtime_ns", "ctime_ns", "settles_ms")}
    size, settles_ms = document.get("size"), times["settles_ms"]
    mode = document.get("mode", FileInfo.mode)
    places = {name: document.get(name, 0) for name in ("grain", "allocated")}
    for value in (size, mode, *places.values(), *times.values()):
        if type(value) is not int or value > MAX_OFFSET:
            raise ProtocolError("The server states an impossible size or time: {value}", value=repr(value)[:80])
    if size < 0 or min(places.values()) < 0 or not 0 <= settles_ms <= MAX_SETTLING:
        raise ProtocolError("The server states an impossible size or time: {value}", value=f"{size}, {settles_ms}")
    resizable = document.get("resizable", True) is True
    file_id = str(document.get("file_id", ""))[:80]
    has_holes = document.get("has_holes", False) is True
    kind = {"file_id": file_id, "resizable": resizable, "mode": mode & MAX_MODE, "has_holes": has_holes}
    return FileInfo(True, size, **kind, **places, **times), peer


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)][:1000] if isinstance(value, list) else []


def encode_holes(holes: Iterable[Extent], stop: int) -> dict[str, Any]:
    """Make the members of the answer to ``/holes``: as many holes as it can tell, and how far it has looked."""
    told = list(islice(holes, MAX_HOLES))
    return {"holes": [list(hole) for hole in told], "stop": sum(told[-1]) if len(told) == MAX_HOLES else stop}


def decode_holes(text: bytes, start: int, stop: int) -> tuple[list[Extent], int]:
    """
    Read the answer to ``/holes``.

    :returns: The holes, in order, and how far the server has looked.
    :raises: :exc:`.ProtocolError` when it isn't one.
    """
    try:
        document = json.loads(text)
        holes, end = [Extent(*hole) for hole in document["holes"]], document["stop"]
        edges = [start, *(edge for hole in holes for edge in (hole.offset, sum(hole))), end, stop]
        if all(type(edge) is int for edge in edges) and edges == sorted(edges) and start < end:
            return holes, end
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ProtocolError("The server states impossible holes")


def decode_metadata(text: bytes) -> Metadata:
    """
    Read the answer to ``GET /metadata``.

    :raises: :exc:`.ProtocolError` when it isn't one.
    """
    try:
        document = json.loads(text)
        found = Metadata(**{name: document[name] for name in vars(Metadata())})
        bounds = (found.mode, MAX_MODE | SET_ID_BITS), (found.uid, MAX_ID), (found.gid, MAX_ID)
        is_possible = all(type(number) is int and 0 <= number <= most for number, most in bounds)
        has_names = all(re.fullmatch(r"[^\0:/]{0,256}", name) for name in (found.owner, found.group))
        if is_possible and has_names and type(found.mtime_ns) is int and abs(found.mtime_ns) < 10**30:
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ProtocolError("The server states impossible metadata")


def encode_staged(filename: str, claimed: bool, shares: bool, info: FileInfo) -> str:
    """Make the last line but one of the answer to ``POST /stage``."""
    name = os.fsencode(filename).decode("latin-1")
    return json.dumps({"filename": name, CLAIMED: claimed, "shares": shares, **info.as_dict()})


def decode_staged(text: bytes) -> tuple[str, bool, bool, FileInfo]:
    """
    Read what :func:`encode_staged` makes.

    :raises: :exc:`.ProtocolError` when that isn't it.
    """
    info, _ = decode_info(text, exists=True)
    try:
        filename = os.fsdecode(json.loads(text)["filename"].encode("latin-1"))
        if filename.startswith("/") and "\0" not in filename:
            return filename, decode_flag(text, CLAIMED), decode_flag(text, "shares"), info
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ProtocolError("The server states an impossible name")


def decode_flag(text: bytes, name: str) -> bool:
    """Whether the answer to a request says that something is so (see :data:`VERIFIED` and :data:`CLAIMED`)."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get(name) is True


# Problems {{{1


def encode_problem(status: int, title: str, detail: str, members: Mapping[str, Any] | None = None) -> str:
    """Spell an error as RFC 9457 has it."""
    return json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail, **(members or {})})


def encode_report(error: ProgramError) -> str:
    """Spell an error as the last line of a stream, which has begun with the status 200."""
    detail = str(error)[:MAX_DETAIL]
    return encode_problem(error.http_status, HTTPStatus(error.http_status).phrase, detail) + "\n"


def decode_report(line: bytes) -> ReportedError:
    """Read the last line of a stream that ends with an error."""
    try:
        status = json.loads(line)["status"]
    except (ValueError, KeyError, TypeError, RecursionError):
        status = 0
    return ReportedError("{detail}", detail=decode_problem(line), status=status if type(status) is int else 0)


def decode_problem(text: bytes) -> str:
    """What an answer that reports an error says, in one line (also when it isn't ours)."""
    try:
        detail = json.loads(text)["detail"]
        if isinstance(detail, str):
            return detail[:MAX_DETAIL]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return ""
