"""
What does a client ask a server for, and how is that spelled?

A request is a value: an object of one of the classes in :data:`REQUESTS`, with a field for each word on the wire. The
client encodes it, the server decodes it, and neither knows the words. What comes in is checked here, completely, so
that the code behind it can rely on ranges and types. (:mod:`.answers` has the way back.) There is no I/O here.

The requests that version 1.0.1 knows are frozen; :mod:`.features` tells what was added since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlencode

from pdiffcopy import BLOCK_SIZE
from pdiffcopy.blocks import MAX_MODE, MAX_OFFSET, Extent, FileInfo, count_blocks, total_size
from pdiffcopy.digests import METHOD
from pdiffcopy.exceptions import LengthRequiredError, RequestError, TooLargeError
from pdiffcopy.words import (
    DIGEST,
    FILE_ID,
    MAX_BLOCK_SIZE,
    MAX_CONCURRENCY,
    MAX_EXTENTS,
    RUN,
    Extents,
    Filename,
    Flag,
    Integer,
    Packed,
    Text,
    check_extents,
    digest_query,
    parse_query,
    word,
)

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`.digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
ANSWER_HEADER = "Pdiffcopy-Answer"
"""Says to which request an answer belongs (:func:`.sign_answer`): one that was kept or repeated isn't believed."""

MIN_PIECE, MAX_PIECE, MAX_PIECES = 4096, 256 * 1024, 4096
"""How large a piece may be in bytes, and how many of them one request may ask for."""

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
    grain: int = word(Integer(0, MAX_BLOCK_SIZE), 0)
    """The size of the smallest hole that matters (0: none does, and a hole is hashed like anything else)."""
    flush: bool = word(Flag(), False)

    def __post_init__(self) -> None:
        """Refuse what makes no sense together."""
        if self.offset % self.block_size:
            raise RequestError("The offset {start} isn't a multiple of the block size", start=self.offset)
        if self.grain and (self.block_size % self.grain or not self.checks):
            raise RequestError("Holes are told with checks, and their grain has to be a part of a block")

    def starting_at(self, offset: int) -> HashesRequest:
        """Return the same request for a part of the file, with checks (feature `resume`)."""
        return replace(self, offset=offset, checks=True)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class HolesRequest(Request):
    """The holes in a part of a file."""

    verb, endpoint, action = "GET", "holes", "holes"

    offset: int = word(Integer())
    stop: int = word(Integer())
    grain: int = word(Integer(1, MAX_BLOCK_SIZE))


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class PiecesRequest(Request):
    """The digests of the pieces of some extents."""

    verb, endpoint, action = "GET", "pieces", "pieces"

    extents: tuple[Extent, ...] = word(Extents())
    size: int = word(Integer(MIN_PIECE, MAX_PIECE))
    method: str = word(Text())
    flush: bool = word(Flag(), False)

    def __post_init__(self) -> None:
        """Refuse what makes no sense together."""
        if self.size & (self.size - 1):
            raise RequestError("The size of a piece has to be a power of two, not {size}", size=self.size)
        if sum(count_blocks(extent.size, self.size) for extent in self.extents) > MAX_PIECES:
            raise TooLargeError("A request may ask for {maximum} pieces at most", maximum=MAX_PIECES)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ReadRequest(Request):
    """The bytes of some extents, their digest, or both."""

    verb, endpoint, action = "GET", "blocks", "read"

    offset: int | None = word(Integer(), None)
    size: int | None = word(Integer(0, MAX_BLOCK_SIZE), None)
    extents: tuple[Extent, ...] = word(Extents(), ())
    """All of them have to lie within the file. (Of what offset and size say, only that part is meant.)"""
    packed: tuple[Extent, ...] = word(Packed(), ())
    """The same in a short form."""
    digest: bool = word(Flag(), False)
    data: bool = word(Flag(), True)
    flush: bool = word(Flag(), False)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> ReadRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        if len(extents) == 1:
            return cls(offset=extents[0].offset, size=extents[0].size, **words)
        return cls(**_place(extents), **words)

    def __post_init__(self) -> None:
        """Refuse a request that doesn't say what to read."""
        for name in () if self.is_exact else ("size", "offset"):
            if getattr(self, name) is None:
                raise RequestError("The parameter {name} is missing", name=name)

    @property
    def is_exact(self) -> bool:
        """Whether all that is asked for has to lie within the file."""
        return bool(self.extents or self.packed)

    def get_extents(self) -> tuple[Extent, ...]:
        """Return what to read."""
        return self.extents or self.packed or (Extent(self.offset or 0, self.size or 0),)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class WriteRequest(Request):
    """Bytes for some extents: those are the body."""

    verb, endpoint, action, writes = "POST", "blocks", "write", True

    offset: int | None = word(Integer(), None)
    extents: tuple[Extent, ...] = word(Extents(), ())
    packed: tuple[Extent, ...] = word(Packed(), ())
    block_size: int = word(Integer(1, MAX_BLOCK_SIZE), 0)
    """The size of the blocks of a blockwise digest (0 when it is a plain one)."""
    method: str = word(Text(), METHOD)
    """The hash method of these blocks."""
    run: str = word(RUN, "")
    digest: str = word(DIGEST, "", header=DIGEST_HEADER)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> WriteRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        return cls(offset=extents[0].offset, **words) if len(extents) == 1 else cls(**_place(extents), **words)

    def __post_init__(self) -> None:
        """Refuse a request that doesn't say where to write."""
        if self.offset is None and not (self.extents or self.packed):
            raise RequestError("The parameter {name} is missing", name="offset")

    def get_extents(self, length: int | None) -> tuple[Extent, ...]:
        """
        Return where to write.

        :param length: How many bytes the body has (:data:`None` when it doesn't say so).
        :raises: :exc:`.LengthRequiredError`, :exc:`.TooLargeError`, :exc:`.RequestError` for a body that doesn't fit.
        """
        if length is None:
            raise LengthRequiredError("The body needs a Content-Length")
        extents = self.extents or self.packed or (Extent(self.offset or 0, length),)
        check_extents(extents)
        if length != total_size(extents):
            raise RequestError("The body has {length} bytes, the extents have a different size", length=length)
        return extents


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ClearRequest(Request):
    """Extents that are to become zeros."""

    verb, endpoint, action, writes = "POST", "zeros", "clear", True

    packed: tuple[Extent, ...] = word(Packed(MAX_OFFSET))
    keep: bool = word(Flag(), False)
    run: str = word(RUN, "")

    def __post_init__(self) -> None:
        """Refuse what would take too long."""
        check_extents(self.packed, MAX_BLOCK_SIZE if self.keep else MAX_OFFSET)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ResizeRequest(Request):
    """A new size for a file, which is created where it is missing."""

    verb, endpoint, action, writes = "POST", "resize", "resize", True

    size: int = word(Integer())
    in_advance: bool = word(Flag(), False)
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


def _place(extents: Sequence[Extent]) -> dict[str, Any]:
    return {"extents" if len(extents) <= MAX_EXTENTS else "packed": tuple(extents)}


REQUESTS: tuple[type[Request], ...] = (
    InfoRequest,
    HashesRequest,
    HolesRequest,
    PiecesRequest,
    ReadRequest,
    WriteRequest,
    ClearRequest,
    ResizeRequest,
    ClaimRequest,
    ReleaseRequest,
    SyncRequest,
)
"""All there are: what a server answers."""
