"""
What do a client and a server say to each other, and how is it spelled?

This is the wire contract, written once: endpoints, parameters, headers, hash lines, file information and problems. It
does no I/O and knows neither Flask nor requests. What comes in is checked here, so that the code behind it can rely
on ranges and types.

The requests that version 1.0.1 knows are frozen (see docs/design.rst). What was added since is optional. Some of it a
server of that version ignores:

``file_id=``
    Which file the name has to lead to (see :class:`FileInfo`). Otherwise the answer is 412, and nothing was touched.
``flush=1``
    Dirty pages are written back before ``/hashes`` and ``GET /blocks`` read them (see :func:`.kernel.write_back`).
``nonce=``
    A word that no other request has, so that no cache has an answer to it.

The rest a client uses only when the server lists it as a *feature* in its answer to ``/info``:

:data:`FEATURE_ANSWER`
    Each answer to a request with the header :data:`REQUEST_HEADER` says in :data:`ANSWER_HEADER` to which request it
    belongs (:func:`sign_answer`), and documents state their digest in :data:`DIGEST_HEADER`.
:data:`FEATURE_BLOCKWISE`
    ``POST /blocks`` with ``block_size=`` states a blockwise digest: that of its blocks' digests (:mod:`.digests`).
:data:`FEATURE_CLAIM`
    ``POST /claim?filename=&run=`` makes a run, named by a random word, the only one that may write to a file until
    the next claim or ``POST /release?filename=&run=``. Both answer with what ``/info`` says of the file, and with
    :data:`CLAIMED`. With ``create=1`` the claim creates a missing file (and missing parent folders), for those whom
    ``mode=`` allows it (permission bits, a decimal number). ``GET /info``,
    ``POST /blocks``, ``POST /resize`` and ``POST /sync`` with a ``run=`` that has lost its claim answer 423. Without it
    they work as ever.
:data:`FEATURE_DIGEST`
    ``GET /blocks`` with ``digest=1`` states the digest of the bytes in the header :data:`DIGEST_HEADER` (and with
    ``data=0`` nothing else). On
    ``POST /blocks`` the client may state it; the server compares with what lies in the target after the write
    and answers 409 if that differs. The digest is XXH128 (https://github.com/Cyan4973/xxHash), 32 hexadecimal digits.
:data:`FEATURE_EXTENTS`
    ``/blocks`` takes ``extents=OFFSET:SIZE,OFFSET:SIZE,...`` instead of offset and size: the body carries the octets
    of all of them, one after the other.
:data:`FEATURE_RESUME`
    ``/hashes`` takes ``offset=`` (a multiple of the block size) and begins there, and its lines come in order. With
    ``checks=1`` the digest of the lines follows after each few of them (:func:`format_checked`), empty lines keep the
    connection alive, and the last line is :data:`DONE` or a problem.
:data:`FEATURE_SYNC`
    ``POST /sync?filename=`` flushes the file to its disk. While that takes time, empty lines keep the connection
    alive; the last line is :data:`DONE` or a problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import xxhash

from pdiffcopy import __version__
from pdiffcopy.exceptions import (
    DamagedError,
    ProgramError,
    ProtocolError,
    ReportedError,
    RequestError,
    TooLargeError,
    TransientError,
)

INFO, HASHES, BLOCKS, RESIZE = "info", "hashes", "blocks", "resize"
CLAIM, RELEASE, SYNC = "claim", "release", "sync"

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
ANSWER_HEADER = "Pdiffcopy-Answer"
"""Says to which request an answer belongs (:func:`sign_answer`): one that was kept or repeated isn't believed."""
PROBLEM_TYPE = "application/problem+json"
DONE = "done"
VERIFIED = "verified"
"""The member of the answer to ``POST /blocks`` that is true when what lies in the target was compared with a digest."""
CLAIMED = "claimed"
"""The member of the answer to ``POST /claim`` that is false when the file system can't hold a claim (and to
``POST /release``, where it's always false)."""

FEATURE_ANSWER, FEATURE_BLOCKWISE, FEATURE_CLAIM, FEATURE_DIGEST = "answer", "blockwise", "claim", "digest"
FEATURE_EXTENTS, FEATURE_RESUME, FEATURE_SYNC = "extents", "resume", "sync"
FEATURES = frozenset(
    [
        FEATURE_ANSWER,
        FEATURE_BLOCKWISE,
        FEATURE_CLAIM,
        FEATURE_DIGEST,
        FEATURE_EXTENTS,
        FEATURE_RESUME,
        FEATURE_SYNC,
    ]
)

MAX_OFFSET = 2**63 - 1
"""The largest offset that Linux knows (``off_t``)."""

MAX_BLOCK_SIZE = 1024**3
"""The largest block that one request may ask for or carry, in bytes."""

MAX_EXTENTS = 128
"""How many extents fit into one request (each takes some twenty characters of its URL)."""

MAX_CONCURRENCY = 1024
MAX_MODE = 0o777
"""The permission bits of a file, without those that change the identity of a process (set-id)."""
MAX_SETTLING = 2000
"""How long a client may have to wait until a change shows in the time of a file, in milliseconds."""
MAX_LINE = 4096
"""The longest line of a stream in bytes: an offset and 512 hexadecimal digits are shorter, and so is a problem."""
MAX_UNCHECKED = 65536
"""How many hash lines may come before the digest of them, and how many empty ones (one takes seconds)."""

MAX_DETAIL = 400
"""How many characters of a problem's detail are passed on."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_HASH_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\t([0-9a-f]{2,512})")
_RUN = re.compile(r"[0-9a-f]{1,64}")
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")
_FILE_ID = re.compile(r"[!-~]{1,80}")


class BlockDigest(NamedTuple):
    """The digest of one block: its offset in bytes and the hexadecimal digest of its octets."""

    offset: int
    digest: str


class Extent(NamedTuple):
    """A run of neighbouring octets: offset and size in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class FileInfo:
    """What is known of a file: the answer to ``/info`` (a 1.0.1 server tells the size and nothing else)."""

    exists: bool
    size: int = 0
    """In bytes."""
    mtime_ns: int = 0
    """The time of the last modification in nanoseconds since 1970 (0 when it isn't known)."""
    ctime_ns: int = 0
    """The same for the last change of the inode, which nobody can set back (0 when it isn't known)."""
    file_id: str = ""
    """What no other file has, on any machine, until this one starts anew (empty when it isn't known)."""
    resizable: bool = True
    """False for a block device: its size is what it is."""
    mode: int = 0o666
    """Who may read, write and execute the file (the permission bits; 0666 when they aren't known)."""
    settles_ms: int = field(default=0, compare=False)
    """For how long another change may bear the same time as the last one, in milliseconds."""

    @property
    def tells_time(self) -> bool:
        """Whether a change of the contents shows here (it doesn't for a device, nor with a 1.0.1 server)."""
        return bool(self.ctime_ns)

    def describe_change(self, later: FileInfo) -> str:
        """What has changed of the file since (empty: nothing did)."""
        if (self.exists, self.file_id, self.resizable) != (later.exists, later.file_id, later.resizable):
            return "identity"
        if self.size != later.size:
            return "size"
        return "time" if self != later else ""

    def as_dict(self) -> dict[str, Any]:
        """The members of the answer to ``/info`` that are about the file (none when there's no file)."""
        return {name: value for name, value in vars(self).items() if name != "exists"} if self.exists else {}


@dataclass(frozen=True)
class PeerInfo:
    """What the other side can do (the defaults describe version 1.0.1)."""

    version: str = "1.0"
    features: frozenset[str] = field(default_factory=frozenset)
    methods: frozenset[str] = field(default_factory=frozenset)
    """The hash methods it has (empty when it doesn't tell)."""
    writable: bool = True


# Parameters {{{1


class Parameters:
    """The query string of a request. Whatever is wrong with it is a :exc:`.RequestError` (or a subclass)."""

    def __init__(self, query: bytes):
        """:param query: The query string as it came over the wire (names are octets, not always UTF-8)."""
        try:
            pairs = parse_qsl(
                query.decode("ascii"), keep_blank_values=True, errors="surrogateescape", max_num_fields=32
            )
        except ValueError:
            raise RequestError("The query string is malformed") from None
        self.values = dict(pairs)
        if len(self.values) != len(pairs):
            raise RequestError("A parameter is given twice")

    @property
    def filename(self) -> str:
        """The absolute pathname that the request is about."""
        filename = self.get("filename")
        if "\0" in filename:
            raise RequestError("The filename contains a NUL byte")
        if not filename.startswith("/"):
            raise RequestError("The filename {filename} isn't absolute: begin it with a slash", filename=repr(filename))
        return filename

    def get(self, name: str) -> str:
        """A parameter that has to be there."""
        try:
            return self.values[name]
        except KeyError:
            raise RequestError("The parameter {name} is missing", name=name) from None

    def integer(self, name: str, minimum: int = 0, maximum: int = MAX_OFFSET, default: int | None = None) -> int:
        """An integer within bounds (a parameter without default has to be there)."""
        if default is not None and name not in self.values:
            return default
        text = self.get(name)
        if not _INTEGER.fullmatch(text) or int(text) < minimum:
            raise RequestError(
                "The parameter {name} must be an integer of at least {minimum}, not {value}",
                name=name,
                minimum=minimum,
                value=repr(text[:40]),
            )
        if int(text) > maximum:
            raise TooLargeError(
                "The parameter {name} is {value}, this server's limit is {maximum}",
                name=name,
                value=text,
                maximum=maximum,
            )
        return int(text)

    @property
    def file_id(self) -> str:
        """Which file the name has to lead to (empty when the client doesn't tell)."""
        file_id = self.values.get("file_id", "")
        if "file_id" in self.values and not _FILE_ID.fullmatch(file_id):
            raise RequestError("{file_id} isn't the identity of a file", file_id=repr(file_id[:80]))
        return file_id

    def flag(self, name: str, default: int = 0) -> bool:
        """Whether an optional parameter is 1 (and not 0)."""
        return bool(self.integer(name, 0, 1, default))

    @property
    def run(self) -> str:
        """The run that the request belongs to (empty when it doesn't tell)."""
        run = self.values.get("run", "")
        if "run" in self.values and not _RUN.fullmatch(run):
            raise RequestError("The run {run} isn't a word of hexadecimal digits", run=repr(run[:80]))
        return run

    def extents(self) -> list[Extent]:
        """The parameter ``extents``, or an empty list."""
        if "extents" not in self.values:
            return []
        items = self.values["extents"].split(",")
        if len(items) > MAX_EXTENTS:
            raise TooLargeError("A request may carry {maximum} extents at most", maximum=MAX_EXTENTS)
        extents = []
        for item in items:
            offset, _, size = item.partition(":")
            if not (_INTEGER.fullmatch(offset) and _INTEGER.fullmatch(size) and int(size)):
                raise RequestError("{value} isn't an extent: write OFFSET:SIZE", value=repr(item[:80]))
            extents.append(Extent(int(offset), int(size)))
        check_extents(extents)
        return extents


def digest_query(query: str) -> str:
    """The XXH128 digest of a query string, whatever the order and the spelling of its parameters."""
    pairs = sorted(parse_qsl(query, keep_blank_values=True, encoding="latin-1", max_num_fields=32))
    return xxhash.xxh3_128_hexdigest(repr(pairs).encode("ascii", "backslashreplace"))


def check_query(query: bytes, digest: str) -> None:
    """Raise :exc:`.DamagedError` when a request isn't what its header :data:`REQUEST_HEADER` says (if it has one)."""
    try:
        damaged = bool(digest) and digest_query(query.decode("ascii")) != digest
    except ValueError:
        damaged = True
    if damaged:
        raise DamagedError("The request was damaged on its way")


def sign_answer(request: str, status: int, digest: str) -> str:
    """
    Make the value of :data:`ANSWER_HEADER`, an XXH128 digest.

    :param request: The value of :data:`REQUEST_HEADER`, which depends on the nonce.
    :param status: The HTTP status.
    :param digest: The value of :data:`DIGEST_HEADER` (empty when there is none).
    """
    return digest_text(f"{request} {status} {digest}".encode("utf-8", "surrogateescape"))


def digest_text(text: bytes) -> str:
    """The XXH128 digest of a document."""
    return xxhash.xxh3_128_hexdigest(text)


def check_extents(extents: Sequence[Extent]) -> None:
    """Refuse extents that reach beyond what a file can be, or that are together too large for a request."""
    if any(extent.offset + extent.size > MAX_OFFSET for extent in extents):
        raise TooLargeError("An extent reaches beyond {maximum}", maximum=MAX_OFFSET)
    if sum(extent.size for extent in extents) > MAX_BLOCK_SIZE:
        raise TooLargeError("A request may move {maximum} bytes at most", maximum=MAX_BLOCK_SIZE)


def format_extents(extents: Iterable[Extent]) -> str:
    """Spell extents for the parameter of that name."""
    return ",".join(f"{extent.offset}:{extent.size}" for extent in extents)


# Bodies {{{1


def format_hashes(digests: Iterable[BlockDigest]) -> bytes:
    """Spell lines of a hash stream."""
    return "".join(f"{offset}\t{digest}\n" for offset, digest in digests).encode("ascii")


def format_checked(digests: Iterable[BlockDigest]) -> bytes:
    """Spell lines of a hash stream, and their XXH128 digest after an equals sign (an empty line if there are none)."""
    lines = format_hashes(digests)
    return b"%b=%b\n" % (lines, digest_text(lines).encode("ascii")) if lines else b"\n"


def parse_hashes(chunks: Iterable[bytes]) -> Iterator[BlockDigest]:
    """
    Read a hash stream.

    :param chunks: The bytes as they arrive, cut anywhere.
    :raises: :exc:`.ProtocolError` for anything but complete lines of a decimal offset and a hexadecimal digest.
    """
    for line in split_lines(chunks):
        yield _parse_hash(line.rstrip(b"\r"))


def parse_checked(chunks: Iterable[bytes]) -> Iterator[BlockDigest]:
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
            if digest_text(lines).encode("ascii") != line[1:]:
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


def _parse_hash(line: bytes) -> BlockDigest:
    match = _HASH_LINE.fullmatch(line)
    if not match:
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


def check_digest(digest: str) -> str:
    """Refuse what can't be the value of :data:`DIGEST_HEADER`."""
    if not _DIGEST.fullmatch(digest):
        raise RequestError("{digest} isn't a digest of 32 hexadecimal digits", digest=repr(digest[:80]))
    return digest


def encode_info(info: FileInfo, methods: Iterable[str] = (), writable: bool = True) -> dict[str, Any]:
    """The members of the answer to ``/info`` (the problem for a missing file has only the last of them)."""
    document = info.as_dict()
    document["server"] = {
        "version": __version__,
        "features": sorted(FEATURES),
        "methods": sorted(methods),
        "writable": writable,
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
    peer = PeerInfo(
        version=str(server.get("version", "1.0"))[:40],
        features=FEATURES.intersection(_strings(server.get("features"))),
        methods=frozenset(_strings(server.get("methods"))),
        writable=server.get("writable", True) is True,
    )
    if not exists:
        return FileInfo(False), peer
    times = {name: document.get(name, 0) for name in ("mtime_ns", "ctime_ns", "settles_ms")}
    size, settles_ms = document.get("size"), times["settles_ms"]
    mode = document.get("mode", FileInfo.mode)
    for value in (size, mode, *times.values()):
        if type(value) is not int or value > MAX_OFFSET:
            raise ProtocolError("The server states an impossible size or time: {value}", value=repr(value)[:80])
    if size < 0 or not 0 <= settles_ms <= MAX_SETTLING:
        raise ProtocolError("The server states an impossible size or time: {value}", value=f"{size}, {settles_ms}")
    resizable = document.get("resizable", True) is True
    file_id = str(document.get("file_id", ""))[:80]
    return FileInfo(True, size, file_id=file_id, resizable=resizable, mode=mode & MAX_MODE, **times), peer


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)][:1000] if isinstance(value, list) else []


def decode_flag(text: bytes, name: str) -> bool:
    """Whether the answer to a request says that something is so (see :data:`VERIFIED` and :data:`CLAIMED`)."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get(name) is True


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
