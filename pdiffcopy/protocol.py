"""
What does a client ask a server for, and how is that spelled?

A request is a value: an object of one of the classes in :data:`REQUESTS`, with a field for each word on the wire. The
client encodes it, the server decodes it, and neither knows the words. What comes in is checked here, completely, so
that the code behind it can rely on ranges and types. (:mod:`.answers` has the way back.) There is no I/O here, and
neither Flask nor requests.

The requests that version 1.0.1 knows are frozen (see docs/design.rst). What was added since is optional. Some of it a
server of that version ignores:

``file_id=``
    Which file the name has to lead to (see :class:`.FileInfo`). Otherwise the answer is 412, and nothing was touched.
``flush=1``
    Dirty pages are written back before ``/hashes`` and ``GET /blocks`` read them (see :func:`.kernel.write_back`).
``nonce=``
    A word that no other request has, so that no cache has an answer to it.

The rest a client uses only when the server lists it as a *feature* in its answer to ``/info``:

:data:`FEATURE_ANSWER`
    Each answer to a request with the header :data:`REQUEST_HEADER` says in :data:`ANSWER_HEADER` to which request it
    belongs (:func:`.sign_answer`), and documents state their digest in :data:`DIGEST_HEADER`.
:data:`FEATURE_BLOCKWISE`
    ``POST /blocks`` with ``block_size=`` (and ``method=``) states a blockwise digest: that of its blocks' digests
    (:mod:`.digests`).
:data:`FEATURE_CLAIM`
    ``POST /claim?filename=&run=`` makes a run, named by a random word, the only one that may write to a file until
    the next claim or ``POST /release?filename=&run=``. Both answer with what ``/info`` says of the file, and with
    :data:`.CLAIMED`. With ``create=1`` the claim creates a missing file (and missing parent folders), for those whom
    ``mode=`` allows it (permission bits, a decimal number). ``GET /info``,
    ``POST /blocks``, ``POST /resize`` and ``POST /sync`` with a ``run=`` that has lost its claim answer 423. Without it
    they work as ever.
:data:`FEATURE_DIGEST`
    ``GET /blocks`` with ``digest=1`` states the digest of the bytes in the header :data:`DIGEST_HEADER` (and with
    ``data=0`` nothing else). On
    ``POST /blocks`` the client may state it; the server compares with what lies in the target after the write
    and answers 409 if that differs. The digest is XXH128 (https://github.com/Cyan4973/xxHash), 32 hexadecimal digits.
:data:`FEATURE_EXTENTS`
    ``/blocks`` takes ``extents=OFFSET:SIZE,OFFSET:SIZE,...`` instead of offset and size: the body carries the bytes
    of all of them, one after the other.
:data:`FEATURE_RESUME`
    ``/hashes`` takes ``offset=`` (a multiple of the block size) and begins there, and its lines come in order. With
    ``checks=1`` the digest of the lines follows after each few of them (:func:`.format_checked`), empty lines keep the
    connection alive, and the last line is :data:`.DONE` or a problem.
:data:`FEATURE_SYNC`
    ``POST /sync?filename=`` flushes the file to its disk. While that takes time, empty lines keep the connection
    alive; the last line is :data:`.DONE` or a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlencode

from pdiffcopy import BLOCK_SIZE
from pdiffcopy.blocks import MAX_MODE, Extent, FileInfo, total_size
from pdiffcopy.digests import METHOD
from pdiffcopy.exceptions import LengthRequiredError, RequestError
from pdiffcopy.words import (
    DIGEST,
    FILE_ID,
    MAX_BLOCK_SIZE,
    MAX_CONCURRENCY,
    RUN,
    Extents,
    Filename,
    Flag,
    Integer,
    Text,
    check_extents,
    digest_query,
    parse_query,
    word,
)

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
ANSWER_HEADER = "Pdiffcopy-Answer"
"""Says to which request an answer belongs (:func:`.sign_answer`): one that was kept or repeated isn't believed."""

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

R = TypeVar("R", bound="Request")


class Headers(Protocol):
    """The headers of a request, whatever holds them."""

    def get(self, name: str, default: str, /) -> str:
        """The value of a header."""


# The requests {{{1


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Request:
    """What a client asks for. The fields are the words on the wire."""

    verb: ClassVar[str]
    endpoint: ClassVar[str]
    action: ClassVar[str]
    """The method of :class:`.Replica` that does what is asked for."""
    writes: ClassVar[bool] = False

    filename: str = word(Filename())
    file_id: str = word(FILE_ID, "")

    # What dataclass would generate for each of the classes takes some milliseconds at each start.

    def __repr__(self) -> str:
        """Name what is asked for."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        """Compare the words."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """Hash the words."""
        return hash((type(self), *vars(self).values()))

    def encode(self, nonce: str = "") -> tuple[str, dict[str, str]]:
        """
        Spell a request.

        :param nonce: A word that no other request has.
        :returns: A tuple of the query string and the headers.
        """
        words: list[tuple[str, Any]] = []
        headers = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default or item.metadata["is_frozen"]:
                text = item.metadata["kind"].write(value)
                if header := item.metadata["header"]:
                    headers[header] = text
                else:
                    words.append((item.name, text))
        query = urlencode([*words, ("nonce", nonce)] if nonce else words)
        return query, {REQUEST_HEADER: digest_query(query), **headers}

    @classmethod
    def decode(cls: type[R], query: bytes, headers: Headers) -> R:
        """
        Read a request.

        :param query: The query string as it came over the wire.
        :raises: :exc:`.RequestError` (or a subclass of :exc:`.ProgramError` that is as specific) for what isn't one.
        """
        given = parse_query(query)
        values = {}
        for item in fields(cls):
            header = item.metadata["header"]
            text = (headers.get(header, "") or None) if header else given.get(item.name)
            if text is not None:
                values[item.name] = item.metadata["kind"].read(item.name, text)
            elif item.default is MISSING:
                raise RequestError("The parameter {name} is missing", name=item.name)
        return cls(**values)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class InfoRequest(Request):
    """Size and identity of a file, and what the server can do."""

    verb, endpoint, action = "GET", "info", "info"

    run: str = word(RUN, "")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class HashesRequest(Request):
    """The digests of the blocks of a file."""

    verb, endpoint, action = "GET", "hashes", "hashes"

    block_size: int = word(Integer(1, MAX_BLOCK_SIZE), BLOCK_SIZE, is_frozen=True)
    method: str = word(Text())
    concurrency: int = word(Integer(1, MAX_CONCURRENCY), 1, is_frozen=True)
    offset: int = word(Integer(), 0)
    checks: bool = word(Flag(), False)
    flush: bool = word(Flag(), False)

    def __post_init__(self) -> None:
        """Refuse what makes no sense together."""
        if self.offset % self.block_size:
            raise RequestError("The offset {start} isn't a multiple of the block size", start=self.offset)

    def starting_at(self, offset: int) -> HashesRequest:
        """Return the same request for a part of the file, with checks (feature `resume`)."""
        return replace(self, offset=offset, checks=True)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ReadRequest(Request):
    """The bytes of some extents, their digest, or both."""

    verb, endpoint, action = "GET", "blocks", "read"

    offset: int | None = word(Integer(), None)
    size: int | None = word(Integer(0, MAX_BLOCK_SIZE), None)
    extents: tuple[Extent, ...] = word(Extents(), ())
    """All of them have to lie within the file. (Of what offset and size say, only that part is meant.)"""
    digest: bool = word(Flag(), False)
    data: bool = word(Flag(), True)
    flush: bool = word(Flag(), False)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> ReadRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        if len(extents) == 1:
            return cls(offset=extents[0].offset, size=extents[0].size, **words)
        return cls(extents=tuple(extents), **words)

    def __post_init__(self) -> None:
        """Refuse a request that doesn't say what to read."""
        for name in () if self.extents else ("size", "offset"):
            if getattr(self, name) is None:
                raise RequestError("The parameter {name} is missing", name=name)

    def get_extents(self) -> tuple[Extent, ...]:
        """Return what to read."""
        return self.extents or (Extent(self.offset or 0, self.size or 0),)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class WriteRequest(Request):
    """Bytes for some extents: those are the body."""

    verb, endpoint, action, writes = "POST", "blocks", "write", True

    offset: int | None = word(Integer(), None)
    extents: tuple[Extent, ...] = word(Extents(), ())
    block_size: int = word(Integer(1, MAX_BLOCK_SIZE), 0)
    """The size of the blocks of a blockwise digest (0 when it is a plain one)."""
    method: str = word(Text(), METHOD)
    """The hash method of these blocks."""
    run: str = word(RUN, "")
    digest: str = word(DIGEST, "", header=DIGEST_HEADER)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> WriteRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        return cls(offset=extents[0].offset, **words) if len(extents) == 1 else cls(extents=tuple(extents), **words)

    def __post_init__(self) -> None:
        """Refuse a request that doesn't say where to write."""
        if self.offset is None and not self.extents:
            raise RequestError("The parameter {name} is missing", name="offset")

    def get_extents(self, length: int | None) -> tuple[Extent, ...]:
        """
        Return where to write.

        :param length: How many bytes the body has (:data:`None` when it doesn't say so).
        :raises: :exc:`.LengthRequiredError`, :exc:`.TooLargeError`, :exc:`.RequestError` for a body that doesn't fit.
        """
        if length is None:
            raise LengthRequiredError("The body needs a Content-Length")
        extents = self.extents or (Extent(self.offset or 0, length),)
        check_extents(extents)
        if length != total_size(extents):
            raise RequestError("The body has {length} bytes, the extents have a different size", length=length)
        return extents


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ResizeRequest(Request):
    """A new size for a file, which is created where it is missing."""

    verb, endpoint, action, writes = "POST", "resize", "resize", True

    size: int = word(Integer())
    run: str = word(RUN, "")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ClaimRequest(Request):
    """The right to write to a file, for one run."""

    verb, endpoint, action, writes = "POST", "claim", "claim", True

    run: str = word(RUN)
    create: bool = word(Flag(), False)
    mode: int = word(Integer(0, MAX_MODE), FileInfo.mode)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ReleaseRequest(Request):
    """The end of a claim."""

    verb, endpoint, action, writes = "POST", "release", "release", True

    run: str = word(RUN)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SyncRequest(Request):
    """A flush of a file to its disk."""

    verb, endpoint, action, writes = "POST", "sync", "sync", True

    run: str = word(RUN, "")


REQUESTS: tuple[type[Request], ...] = (
    InfoRequest,
    HashesRequest,
    ReadRequest,
    WriteRequest,
    ResizeRequest,
    ClaimRequest,
    ReleaseRequest,
    SyncRequest,
)
"""All there are: what a server answers."""
