"""
What do a client and a server say to each other, and how is it spelled?

This is the wire contract, written once: endpoints, parameters, headers, hash lines, file information and problems. It
does no I/O and knows neither Flask nor requests. What comes in is checked here, so that the code behind it can rely
on ranges and types.

The requests that version 1.0.1 knows are frozen (see docs/design.rst). What was added since is optional, and a client
uses an addition only when the server lists it as a *feature* in its answer to ``/info``:

:data:`FEATURE_BLOCKWISE`
    ``POST /blocks`` with ``block_size=`` states a blockwise digest: that of its blocks' digests (:mod:`.digests`).
:data:`FEATURE_CLAIM`
    ``POST /claim?filename=&run=`` makes a run, named by a random word, the only one that may write to a file until
    the next claim or ``POST /release?filename=&run=``. Both answer with what ``/info`` says of the file, and with
    :data:`CLAIMED`. ``POST /blocks`` and ``POST /resize`` with a ``run=`` that has lost its claim answer 423, and so
    does the release. Without it they write as ever.
:data:`FEATURE_DIGEST`
    ``GET /blocks`` with ``digest=1`` states the digest of the octets in the header :data:`DIGEST_HEADER`. On
    ``POST /blocks`` the client may state it; the server compares with what lies in the target after the write
    and answers 409 if that differs. The digest is XXH128 (https://github.com/Cyan4973/xxHash), 32 hexadecimal digits.
:data:`FEATURE_EXTENTS`
    ``/blocks`` takes ``extents=OFFSET:SIZE,OFFSET:SIZE,...`` instead of offset and size: the body carries the octets
    of all of them, one after the other.
:data:`FEATURE_RESUME`
    ``/hashes`` takes ``offset=`` (a multiple of the block size) and begins there, and its lines come in order.
:data:`FEATURE_SYNC`
    ``POST /sync?filename=`` flushes the file to its disk. While that takes time, empty lines keep the connection
    alive; the last line is :data:`SYNC_DONE` or a problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import xxhash

from pdiffcopy import __version__
from pdiffcopy.exceptions import DamagedError, ProtocolError, RequestError, TooLargeError

INFO, HASHES, BLOCKS, RESIZE = "info", "hashes", "blocks", "resize"
CLAIM, RELEASE, SYNC = "claim", "release", "sync"

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
PROBLEM_TYPE = "application/problem+json"
SYNC_DONE = "done"
VERIFIED = "verified"
"""The member of the answer to ``POST /blocks`` that is true when what lies in the target was compared with a digest."""
CLAIMED = "claimed"
"""The member of the answer to ``POST /claim`` that is false when the file system can't hold a claim (and to
``POST /release``, where it's always false)."""

FEATURE_BLOCKWISE, FEATURE_CLAIM, FEATURE_DIGEST = "blockwise", "claim", "digest"
FEATURE_EXTENTS, FEATURE_RESUME, FEATURE_SYNC = "extents", "resume", "sync"
FEATURES = frozenset([FEATURE_BLOCKWISE, FEATURE_CLAIM, FEATURE_DIGEST, FEATURE_EXTENTS, FEATURE_RESUME, FEATURE_SYNC])

MAX_OFFSET = 2**63 - 1
"""The largest offset that Linux knows (``off_t``)."""

MAX_BLOCK_SIZE = 1024**3
"""The largest block that one request may ask for or carry, in bytes."""

MAX_EXTENTS = 128
"""How many extents fit into one request (each takes some twenty characters of its URL)."""

MAX_CONCURRENCY = 1024
MAX_LINE = 1024
"""The longest line of a hash stream in bytes: an offset and 512 hexadecimal digits are shorter."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_HASH_LINE = re.compile(rb"(0|[1-9][0-9]{0,18})\t([0-9a-f]{2,512})")
_RUN = re.compile(r"[0-9a-f]{1,64}")
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")


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
    """The time of the last modification in nanoseconds (0 when it isn't known)."""
    file_id: str = ""
    """What stays the same as long as the file isn't replaced by another one (empty when it isn't known)."""
    resizable: bool = True
    """False for a block device: its size is what it is."""

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


def parse_hashes(chunks: Iterable[bytes]) -> Iterator[BlockDigest]:
    """
    Read a hash stream.

    :param chunks: The octets as they arrive, cut anywhere.
    :raises: :exc:`.ProtocolError` for anything but complete lines of a decimal offset and a hexadecimal digest.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            match = _HASH_LINE.fullmatch(line.rstrip(b"\r"))
            if not match:
                raise ProtocolError("The server sent a malformed hash line: {line}", line=repr(line[:80]))
            yield BlockDigest(int(match[1]), match[2].decode("ascii"))
        if len(rest) > MAX_LINE:
            raise ProtocolError("The server sent a hash line of more than {limit} bytes", limit=MAX_LINE)
    if rest:
        raise ProtocolError("The server's hashes end in the middle of a line")


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
    size, mtime_ns = document.get("size"), document.get("mtime_ns", 0)
    for value in (size, mtime_ns):
        if type(value) is not int or value > MAX_OFFSET or (value is size and value < 0):
            raise ProtocolError("The server states an impossible size or time: {value}", value=repr(value)[:80])
    resizable = document.get("resizable", True) is True
    return FileInfo(True, size, mtime_ns, str(document.get("file_id", ""))[:80], resizable), peer


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


def decode_problem(text: bytes, limit: int = 400) -> str:
    """What an answer that reports an error says, in one line (also when it isn't ours)."""
    try:
        detail = json.loads(text)["detail"]
        if isinstance(detail, str):
            return detail[:limit]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return ""
