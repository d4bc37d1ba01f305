"""
What does a client ask a server for, and how is that spelled?

A request is a value: an object of one of the classes in :data:`REQUESTS`, with a field for each word on the wire.
(:mod:`.request` has what they have in common, :mod:`.answers` and :mod:`.streams` the way back.) The requests that
version 1.0.1 knows are frozen; :mod:`.features` tells what was added since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdiffcopy import BLOCK_SIZE
from pdiffcopy.blocks import (
    DEFAULT_MODE,
    FOLDER_MODE,
    MAX_ID,
    MAX_MODE,
    MAX_OFFSET,
    SET_ID_BITS,
    Extent,
    Metadata,
    count_blocks,
    total_size,
)
from pdiffcopy.digests import METHOD
from pdiffcopy.entries import MAX_DEPTH
from pdiffcopy.exceptions import LengthRequiredError, RequestError, TooLargeError
from pdiffcopy.extents import Extents, Packed, check_extents, choose_form
from pdiffcopy.request import R, Request
from pdiffcopy.words import (
    ACCOUNT,
    DIGEST,
    DIGEST_HEADER,
    FILE_ID,
    MAX_BLOCK_SIZE,
    MAX_CONCURRENCY,
    RUN,
    Flag,
    Integer,
    Text,
    Time,
    word,
)

MIN_PIECE, MAX_PIECE, MAX_PIECES = 4096, 256 * 1024, 4096
"""How large a piece may be in bytes, and how many of them one request may ask for."""


class InfoRequest(Request):
    """Size and identity of a file, and what the server can do."""

    verb, endpoint, action = "GET", "info", "info"

    run: str = word(RUN, "")
    drop: bool = word(Flag(), False)


class HashesRequest(Request):
    """The digests of the blocks of a file."""

    verb, endpoint, action = "GET", "hashes", "hashes"

    block_size: int = word(Integer(1, MAX_BLOCK_SIZE), BLOCK_SIZE, is_frozen=True)
    method: str = word(Text())
    concurrency: int = word(Integer(1, MAX_CONCURRENCY), 1, is_frozen=True)
    offset: int = word(Integer(), 0)
    stop: int = word(Integer(), 0)
    """Where the last block ends (0: where the file does)."""
    checks: bool = word(Flag(), False)
    grain: int = word(Integer(0, MAX_BLOCK_SIZE), 0)
    """The size of the smallest hole that matters (0: none does, and a hole is hashed like anything else)."""
    flush: bool = word(Flag(), False)
    drop: bool = word(Flag(), False)

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.offset % self.block_size:
            raise RequestError("The offset {start} isn't a multiple of the block size", start=self.offset)
        if self.grain and (self.grain > self.block_size or not self.checks):
            raise RequestError("Holes are told with checks, and their grain can't be larger than a block")


class ListRequest(Request):
    """What a name leads to, and what is in it if that is a folder."""

    verb, endpoint, action = "GET", "list", "entries"

    depth: int = word(Integer(0, MAX_DEPTH), 1)


class HolesRequest(Request):
    """The holes in a part of a file."""

    verb, endpoint, action = "GET", "holes", "holes"

    offset: int = word(Integer())
    stop: int = word(Integer())
    grain: int = word(Integer(1, MAX_BLOCK_SIZE))


class PiecesRequest(Request):
    """The digests of the pieces of some extents."""

    verb, endpoint, action = "GET", "pieces", "pieces"

    extents: tuple[Extent, ...] = word(Extents())
    size: int = word(Integer(MIN_PIECE, MAX_PIECE))
    method: str = word(Text())
    flush: bool = word(Flag(), False)
    drop: bool = word(Flag(), False)

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.size & (self.size - 1):
            raise RequestError("The size of a piece has to be a power of two, not {size}", size=self.size)
        if sum(count_blocks(extent.size, self.size) for extent in self.extents) > MAX_PIECES:
            raise TooLargeError("A request may ask for {maximum} pieces at most", maximum=MAX_PIECES)


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
    drop: bool = word(Flag(), False)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> ReadRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        if len(extents) == 1:
            return cls(offset=extents[0].offset, size=extents[0].size, **words)
        return cls(**_place(extents), **words)

    def check(self) -> None:
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
    drop: bool = word(Flag(), False)
    digest: str = word(DIGEST, "", header=DIGEST_HEADER)

    @classmethod
    def of(cls, extents: Sequence[Extent], **words: Any) -> WriteRequest:
        """Make a request for one extent or several, spelled the frozen way where that is possible."""
        return cls(offset=extents[0].offset, **words) if len(extents) == 1 else cls(**_place(extents), **words)

    def check(self) -> None:
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


class ClearRequest(Request):
    """Extents that are to become zeros."""

    verb, endpoint, action, writes = "POST", "zeros", "clear", True

    packed: tuple[Extent, ...] = word(Packed(MAX_OFFSET))
    keep: bool = word(Flag(), False)
    run: str = word(RUN, "")
    drop: bool = word(Flag(), False)

    def check(self) -> None:
        """Refuse what would take too long."""
        check_extents(self.packed, MAX_BLOCK_SIZE if self.keep else MAX_OFFSET)


class ResizeRequest(Request):
    """A new size for a file, which is created where it is missing."""

    verb, endpoint, action, writes = "POST", "resize", "resize", True

    size: int = word(Integer())
    in_advance: bool = word(Flag(), False)
    run: str = word(RUN, "")


class ClaimRequest(Request):
    """The right to write to a file, for one run."""

    verb, endpoint, action, writes = "POST", "claim", "claim", True

    run: str = word(RUN)
    create: bool = word(Flag(), False)
    mode: int = word(Integer(0, MAX_MODE), DEFAULT_MODE)


class MakeFolderRequest(Request):
    """A folder, which is created where it is missing."""

    verb, endpoint, action, writes = "POST", "folder", "make_folder", True

    mode: int = word(Integer(0, MAX_MODE), FOLDER_MODE)


class ReleaseRequest(Request):
    """The end of a claim."""

    verb, endpoint, action, writes = "POST", "release", "release", True

    run: str = word(RUN)


class MetadataRequest(Request):
    """The metadata of a file, or of a folder."""

    verb, endpoint, action = "GET", "metadata", "metadata"

    folder: bool = word(Flag(), False)


class WithMetadata(Request):
    """Something that gives a file metadata."""

    mode: int | None = word(Integer(0, MAX_MODE | SET_ID_BITS), None)
    uid: int | None = word(Integer(0, MAX_ID), None)
    owner: str = word(ACCOUNT, "")
    gid: int | None = word(Integer(0, MAX_ID), None)
    group: str = word(ACCOUNT, "")
    mtime_ns: int | None = word(Time(), None)

    @classmethod
    def of(cls: type[R], metadata: Metadata, **words: Any) -> R:
        """Make a request for some metadata."""
        return cls(**metadata._asdict(), **words)

    def get_metadata(self) -> Metadata:
        """Return what is given."""
        return Metadata(**{name: getattr(self, name) for name in Metadata._fields})


class SetMetadataRequest(WithMetadata):
    """Other metadata for a file, or for a folder: those that are given."""

    verb, endpoint, action, writes = "POST", "metadata", "set_metadata", True

    in_advance: bool = word(Flag(), False)
    run: str = word(RUN, "")
    folder: bool = word(Flag(), False)

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.in_advance and self.folder:
            raise RequestError("A folder has no contents that could be still to come")


class StageRequest(Request):
    """A new version of a file, beside the old one, and the right to write to it, for one run."""

    verb, endpoint, action, writes = "POST", "stage", "stage", True

    run: str = word(RUN)
    mode: int = word(Integer(0, MAX_MODE), DEFAULT_MODE)
    takes: int = word(Integer(), 0)
    drop: bool = word(Flag(), False)


class CommitRequest(Request):
    """The end of the old version of a file: the new one takes its place."""

    verb, endpoint, action, writes = "POST", "commit", "commit", True

    new_id: str = word(FILE_ID)
    ctime_ns: int = word(Time(), 0)
    run: str = word(RUN, "")


class SyncRequest(Request):
    """A flush of a file to its disk."""

    verb, endpoint, action, writes = "POST", "sync", "sync", True

    run: str = word(RUN, "")


def _place(extents: Sequence[Extent]) -> dict[str, Any]:
    name, _ = choose_form(extents)
    return {name: tuple(extents)}


REQUESTS: tuple[type[Request], ...] = (
    InfoRequest,
    ListRequest,
    HashesRequest,
    HolesRequest,
    PiecesRequest,
    ReadRequest,
    WriteRequest,
    ClearRequest,
    ResizeRequest,
    ClaimRequest,
    MakeFolderRequest,
    ReleaseRequest,
    MetadataRequest,
    SetMetadataRequest,
    StageRequest,
    CommitRequest,
    SyncRequest,
)
"""All there are: what a server answers."""
