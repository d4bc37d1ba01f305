"""
How does an answer look that takes long?

It's a stream of lines: those that tell something, with a digest of them after each few; empty ones, which keep the
connection alive while there is nothing to tell; and a last one that says how it ended, since the status was sent long
before. (Only version 1.0.1 has hash lines without all that.) There is no I/O here. What a server says is checked before
it is believed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from io import BytesIO
from typing import TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pdiffcopy.answers import MAX_DETAIL, decode_problem, encode_problem
from pdiffcopy.blocks import MAX_OFFSET, BlockDigest, Hole
from pdiffcopy.digests import compute_digest
from pdiffcopy.entries import MAX_NAME, Entry, Kind
from pdiffcopy.exceptions import ProgramError, ProtocolError, ReportedError, TransientError

DONE = "done"
"""The last line of a stream of which all has gone well."""
MAX_LINE = 16 * 1024
"""The longest line of a stream in bytes: the longest name takes 12285, a digest or a problem is shorter."""
MAX_UNCHECKED = 4 * 1024 * 1024
"""How many bytes of lines may come before the digest of them (a server sends three quarters of that at most)."""
MAX_EMPTY = 65536
"""How many empty lines may come in a row (one takes seconds)."""

_HASH_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\t([0-9a-f]{2,512}(?:\.[0-9a-f]{32})?)")
_HOLE_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\thole\t([1-9][0-9]{0,18})")
_ENTRY_LINE = re.compile(
    rb"([a-z]+)\t(0|[1-9][0-9]{0,18})\t(0|-?[1-9][0-9]{0,29})\t((?:[A-Za-z0-9_.~/-]|%%[0-9A-F]{2}){0,%d})"
    rb"(?:\t([!-~]{1,80}))?" % MAX_NAME
)
_KINDS = {kind.value.encode("ascii"): kind for kind in Kind}

T = TypeVar("T")


# Lines and what they tell {{{1


def format_hashes(digests: Iterable[BlockDigest | Hole]) -> bytes:
    """Spell the digests of blocks, a line for each of them, or for a run of blocks in a hole."""
    return "".join(map(_format_hash, digests)).encode("ascii")


def _format_hash(item: BlockDigest | Hole) -> str:
    return f"{item.offset}\thole\t{item.size}\n" if isinstance(item, Hole) else f"{item.offset}\t{item.digest}\n"


def parse_hash(line: bytes) -> BlockDigest | Hole:
    """
    Read a line that :func:`format_hashes` makes.

    :raises: :exc:`.ProtocolError` when it isn't one.
    """
    match = _HASH_LINE.fullmatch(line)
    if not match:
        if hole := _HOLE_LINE.fullmatch(line):
            return Hole(int(hole[1]), int(hole[2]))
        raise ProtocolError("The server sent a malformed hash line: {line}", line=repr(line[:80]))
    return BlockDigest(int(match[1]), match[2].decode("ascii"))


def format_entries(entries: Iterable[Entry]) -> bytes:
    """Spell the entries of a listing, a line for each. The bytes of a name are percent-encoded."""
    return "".join(map(_format_entry, entries)).encode("ascii")


def _format_entry(entry: Entry) -> str:
    name = quote_from_bytes(os.fsencode(entry.name))
    identity = f"\t{entry.file_id}" if entry.file_id else ""
    return f"{entry.kind.value}\t{entry.size}\t{entry.mtime_ns}\t{name}{identity}\n"


def parse_entry(line: bytes) -> Entry:
    """
    Read a line that :func:`format_entries` makes.

    :raises: :exc:`.ProtocolError` when it isn't one. (Whether it makes sense is up to :func:`.check_entries`.)
    """
    match = _ENTRY_LINE.fullmatch(line)
    if not match or match[1] not in _KINDS or int(match[2]) > MAX_OFFSET:
        raise ProtocolError("The server sent a malformed entry of a list: {line}", line=repr(line[:80]))
    name, file_id = os.fsdecode(unquote_to_bytes(match[4])), (match[5] or b"").decode("ascii")
    return Entry(name, _KINDS[match[1]], int(match[2]), int(match[3]), file_id)


# Streams {{{1


def add_check(lines: bytes) -> bytes:
    """Put the XXH128 digest of some lines behind them, after an equals sign (an empty line if there are none)."""
    return b"%b=%b\n" % (lines, compute_digest(lines).encode("ascii")) if lines else b"\n"


def parse_checked(chunks: Iterable[bytes], parse_line: Callable[[bytes], T]) -> Iterator[T]:
    """
    Read a stream: what is yielded arrived as it was sent.

    :param chunks: The bytes as they arrive, cut anywhere.
    :param parse_line: Reads a line that tells something.
    :raises: :exc:`.TransientError` for lines that don't have the digest that follows them, :exc:`.ReportedError` for a
             problem, :exc:`.ProtocolError` for anything that isn't such a stream.
    """
    held = bytearray()
    empty = 0
    lines = split_lines(chunks)
    for line in lines:
        if line.startswith(b"="):
            if compute_digest(held).encode("ascii") != line[1:]:
                raise TransientError("What the server sent was damaged on its way")
            yield from (parse_line(told[:-1]) for told in BytesIO(held))
            held.clear()
            empty = 0
        elif line.startswith(b"{"):
            raise decode_report(line)
        elif line == DONE.encode("ascii") and not held:
            next(lines, None)  # lets the body come to its end
            return
        elif line:
            held += b"%b\n" % line
        else:
            empty += 1
        if len(held) > MAX_UNCHECKED or empty > MAX_EMPTY:
            raise ProtocolError("The server sends on and on without a check")
    raise ProtocolError("The server's answer ends early")


def parse_hashes(chunks: Iterable[bytes]) -> Iterator[BlockDigest | Hole]:
    """
    Read hash lines without checks.

    :param chunks: The bytes as they arrive, cut anywhere.
    :raises: :exc:`.ProtocolError` for anything but complete lines of a decimal offset and a hexadecimal digest.
    """
    for line in split_lines(chunks):
        yield parse_hash(line.rstrip(b"\r"))


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


# How it ended {{{1


def encode_report(error: ProgramError) -> str:
    """Spell an error as the last line of a stream."""
    detail = str(error)[:MAX_DETAIL]
    return encode_problem(error.http_status, HTTPStatus(error.http_status).phrase, detail) + "\n"


def decode_report(line: bytes) -> ReportedError:
    """Read the last line of a stream that ends with an error."""
    try:
        status = json.loads(line)["status"]
    except (ValueError, KeyError, TypeError, RecursionError):
        status = 0
    return ReportedError("{detail}", detail=decode_problem(line), status=status if type(status) is int else 0)
