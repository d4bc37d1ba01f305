"""
What does a server answer, and how is that spelled?

File information, flags and problems: this is the way back of the wire contract, written once, as :mod:`.protocol` has
the way there. (:mod:`.streams` has the answers that take long.) There is no I/O here. What a server says is checked
before it is believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from pdiffcopy.blocks import (
    MAX_ID,
    MAX_MODE,
    MAX_OFFSET,
    MAX_TIME,
    SET_ID_BITS,
    Extent,
    FileInfo,
    Metadata,
    align,
)
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import ProtocolError
from pdiffcopy.features import FEATURES
from pdiffcopy.words import FILE_ID

PROBLEM_TYPE = "application/problem+json"
VERIFIED = "verified"
"""The member of the answer to ``POST /blocks`` that is true when what lies in the target was compared with a digest."""
CLAIMED = "claimed"
"""The member of the answer to ``POST /claim`` that is false when the file system can't hold a claim (and to
``POST /release``, where it's always false)."""

MAX_SETTLING = 2000
"""How long a client may have to wait until a change shows in the time of a file, in milliseconds."""
MAX_DETAIL = 400
"""How many characters of a problem's detail are passed on."""

MAX_HOLES = 8192
"""How many holes a server looks at for an answer at most."""
CLEARED = "cleared"
"""The member of the answer to ``POST /zeros`` that is false where a file can't have holes."""


class PeerInfo(NamedTuple):
    """What the other side can do (the defaults describe version 1.0.1)."""

    version: str = "1.0"
    features: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    """The hash methods it has (empty when it doesn't tell)."""
    writable: bool = True
    sets_id: bool = True
    """Whether it sets set-id bits."""
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


# File information {{{1

_BOUNDS = {
    **dict.fromkeys(("size", "mode", "grain", "allocated"), (0, MAX_OFFSET)),
    **dict.fromkeys(("mtime_ns", "ctime_ns"), (-MAX_TIME, MAX_TIME)),
    "settles_ms": (0, MAX_SETTLING),
}
"""The numbers that tell of a file, and how large they are at least and at most."""


def encode_info(info: FileInfo, peer: PeerInfo) -> dict[str, Any]:
    """Make the members of the answer to ``/info`` (the problem for a missing file has only the last of them)."""
    document = info.as_dict()
    document["server"] = {
        "version": peer.version,
        "features": sorted(peer.features),
        "methods": sorted(peer.methods),
        "writable": peer.writable,
        "sets_id": peer.sets_id,
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
        raise ProtocolError("the server's answer is not that of a pdiffcopy server")
    room = server.get("room")
    peer = PeerInfo(
        version=str(server.get("version", "1.0"))[:40],
        features=FEATURES.intersection(_strings(server.get("features"))),
        methods=frozenset(_strings(server.get("methods"))),
        writable=server.get("writable", True) is True,
        sets_id=server.get("sets_id", True) is True,
        room=room if type(room) is int and room >= 0 else None,
    )
    if not exists:
        return FileInfo(False), peer
    numbers = {name: document.get(name, FileInfo._field_defaults.get(name)) for name in _BOUNDS}
    numbers["size"] = document.get("size")
    for name, (least, most) in _BOUNDS.items():
        if type(value := numbers[name]) is not int or not least <= value <= most:
            raise ProtocolError("The server states an impossible {name}: {value}", name=name, value=repr(value)[:80])
    numbers["mode"] &= MAX_MODE
    resizable = document.get("resizable", True) is True
    file_id = document.get("file_id", "")
    if not isinstance(file_id, str) or not (file_id == "" or FILE_ID.pattern.fullmatch(file_id)):
        raise ProtocolError("The server states an impossible identity: {value}", value=repr(file_id)[:80])
    has_holes = document.get("has_holes", False) is True
    return FileInfo(True, file_id=file_id, resizable=resizable, has_holes=has_holes, **numbers), peer


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)][:1000] if isinstance(value, list) else []


def encode_holes(holes: Iterable[Extent], stop: int, grain: int = 1) -> dict[str, Any]:
    """
    Make the members of the answer to ``/holes``: which holes there are, and how far the server has looked.

    :param holes: All holes, however small. It looks at some of them: to find more of them would take too long.
    :param stop: Where it stops looking in any case.
    :param grain: The size of the smallest hole that is told.
    """
    found = list(islice(holes, MAX_HOLES))
    told = [list(part) for hole in found if (part := align(hole, grain, stop))]
    return {"holes": told, "stop": sum(found[-1]) if len(found) == MAX_HOLES else stop}


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
        found = Metadata(**{name: document[name] for name in Metadata._fields})
        bounds = (found.mode, MAX_MODE | SET_ID_BITS), (found.uid, MAX_ID), (found.gid, MAX_ID)
        is_possible = all(type(number) is int and 0 <= number <= most for number, most in bounds)
        has_names = all(re.fullmatch(r"[^\0:/]{0,256}", name) for name in (found.owner, found.group))
        os.fsencode(found.owner + found.group)  # a ValueError for what no name can be
        if is_possible and has_names and type(found.mtime_ns) is int and abs(found.mtime_ns) <= MAX_TIME:
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


def decode_problem(text: bytes) -> str:
    """What an answer that reports an error says, in one line (also when it isn't ours)."""
    try:
        detail = json.loads(text)["detail"]
        if isinstance(detail, str):
            return detail[:MAX_DETAIL]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return ""
