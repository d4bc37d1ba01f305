"""
How is a file behind a server read and written?

By requests, which a :class:`.Server` exchanges for answers. What a server says is checked before it is believed.

Every request is idempotent. Requests without a body to speak of are repeated here; a transfer is repeated by
:mod:`.pipeline`, since the bytes have to come from the other replica again. A stream of hashes that breaks off goes on
where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote_plus

from pdiffcopy import answers
from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import (
    DEFAULT_MODE,
    FOLDER_MODE,
    BlockDigest,
    Extent,
    FileInfo,
    Hole,
    Metadata,
    count_blocks,
    total_size,
)
from pdiffcopy.client.delta import get_end, in_order
from pdiffcopy.client.exchange import Answer, Server, make_foreign_error
from pdiffcopy.entries import Entry, check_entries, skip_to
from pdiffcopy.exceptions import FileMissingError, ProtocolError, RemoteError, ReplacedError, TransientError
from pdiffcopy.extents import count_certain, split
from pdiffcopy.features import FEATURE_ANSWER, FEATURE_CLAIM, FEATURE_RESUME, FEATURE_SPARSE
from pdiffcopy.protocol import (
    ClaimRequest,
    ClearRequest,
    CommitRequest,
    HashesRequest,
    HolesRequest,
    InfoRequest,
    ListRequest,
    MakeFolderRequest,
    MetadataRequest,
    PiecesRequest,
    ReadRequest,
    ReleaseRequest,
    ResizeRequest,
    SetMetadataRequest,
    StageRequest,
    SyncRequest,
    WriteRequest,
)
from pdiffcopy.replica import Reading, Replica, Staged
from pdiffcopy.request import R, Request
from pdiffcopy.streams import DONE, decode_report, parse_checked, parse_entry, parse_hash, parse_hashes
from pdiffcopy.words import MAX_LINE

T = TypeVar("T")
OTHER_WORDS = 512
"""How many characters of the first line the words of a request take at most that are neither names nor extents."""


class RemoteReplica(Replica):
    """A file behind a server."""

    is_near = False

    def __init__(self, server: Server, filename: str, within: str = ""):
        """
        Initialize a replica (the server isn't contacted yet).

        :param server: Where it is.
        :param filename: How it is called there.
        :param within: A folder that it lies in, and that no link below may lead out of (empty: links are followed).
        """
        self.server = server
        self.filename, self.within = filename, within
        self.label = str(server.get_address(filename))
        self._size: int | None = None

    @property
    def url_room(self) -> int:
        """See :attr:`.Replica.url_room`."""
        return MAX_LINE - OTHER_WORDS - len(quote_plus(os.fsencode(self.filename) + os.fsencode(self.within)))

    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """See :meth:`.Replica.info`."""

        def ask() -> tuple[FileInfo, PeerInfo]:
            request = InfoRequest(filename=self.filename, within=self.within, run=run, drop=self.drop)
            with self._naming(), self.server.exchange(request, expect=(200, 404)) as answer:
                info, peer = answers.decode_info(answer.read_document(), exists=answer.status == 200)
                if FEATURE_ANSWER in peer.features and not answer.is_signed:
                    raise make_foreign_error(self.label)
                return info, peer

        try:
            info, self.server.peer = self.server.get_patience().persist(ask)
        except (TransientError, RemoteError) as e:
            # Whoever expects TLS says nothing that is HTTP, or that it was a bad request.
            if getattr(e, "status", 0) in (0, 400) and (better := self.server.find_remedy(self.filename)):
                raise better from e
            raise
        self._size = info.size
        return info, self.server.peer

    @property
    def _features(self) -> frozenset[str]:
        """What the server can do (it is asked once)."""
        return (self.server.peer or self.info()[1]).features

    @property
    def _resumes(self) -> bool:
        """Whether the server can hash a part of a file."""
        return FEATURE_RESUME in self._features

    def entries(self, depth: int) -> Generator[Entry, None, None]:
        """See :meth:`.Replica.entries`."""
        request = self._make(ListRequest, depth=depth)
        with self._naming():
            yield from check_entries(self._tell_entries(request), depth)

    def _tell_entries(self, request: ListRequest) -> Iterator[Entry]:
        """Yield what the server says. A list that breaks off begins again, and goes on behind what was told."""
        patience = self.server.get_patience()
        last: Entry | None = None
        while True:
            try:
                with self._exchange(request) as answer:
                    # Nobody may have asked yet what it can do. Each server that has lists says that it's an answer.
                    if not (answer.is_signed or self.server.peer):
                        raise make_foreign_error(self.label)
                    entries = parse_checked(answer.read_lines(), parse_entry)
                    if last and not skip_to(last, entries):
                        raise ReplacedError("{url} changed while it was listed, run again", url=self.label)
                    for last in entries:
                        yield last
                        patience.succeeded()
                return
            except TransientError as e:
                patience.failed(e)

    def hashes(
        self, block_size: int, method: str, concurrency: int, start: int = 0, stop: int | None = None, grain: int = 0
    ) -> Generator[list[BlockDigest | Hole], None, None]:
        """See :meth:`.Replica.hashes`."""
        end = self._get_size() if stop is None else stop
        patience, position = self.server.get_patience(), start
        words = {"concurrency": concurrency, "flush": self.flush, "drop": self.drop}
        request = self._make(HashesRequest, block_size=block_size, method=method, **words)
        if grain:
            request = request.changed(grain=grain, checks=True)
        while position < end:
            try:
                with self._naming():
                    lines = self._hash_lines(request, position, end)
                    for item in in_order(lines, position, end, block_size):
                        yield [item]
                        position = get_end(item, block_size)
                        patience.succeeded()
                    if self._resumes or self._get_size() <= end:  # otherwise there is more to come
                        next(lines, None)  # how it ended: a connection of which nothing is left can be used again
            except TransientError as e:
                patience.failed(e)

    def _hash_lines(self, request: HashesRequest, start: int, stop: int) -> Iterator[BlockDigest | Hole]:
        resumes = self._resumes
        # An old server tells all of a file, which may be longer than what we compare.
        most = count_blocks(stop if resumes else max(stop, self._get_size()), request.block_size)
        if resumes:
            request = request.changed(offset=start, stop=stop, checks=True)
        with self._exchange(request) as answer:
            chunks = answer.read_lines()
            lines = parse_checked(chunks, parse_hash) if resumes else parse_hashes(chunks)
            for count, line in enumerate(lines):
                if line.offset >= stop and resumes:
                    return
                if isinstance(line, Hole) and not request.grain:
                    raise ProtocolError("{url}: the server sent a hole without being asked", url=self.label)
                if count >= most:
                    raise ProtocolError("{url}: the server sent more hashes than the file has blocks", url=self.label)
                if start <= line.offset < stop:
                    is_too_long = isinstance(line, Hole) and sum(line) > stop  # the file is, too
                    yield Hole(line.offset, stop - line.offset) if is_too_long else line

    def holes(self, start: int, stop: int, grain: int) -> Iterator[Extent]:
        """See :meth:`.Replica.holes`."""
        while start < stop:
            request = self._make(HolesRequest, offset=start, stop=stop, grain=grain)
            holes, start = self._ask(request, partial(answers.decode_holes, start=start, stop=stop))
            yield from holes

    def pieces(self, extents: Sequence[Extent], size: int, method: str) -> list[str]:
        """See :meth:`.Replica.pieces`."""
        digests = []
        for start in range(0, len(extents), most := count_certain(self.url_room)):
            part = tuple(extents[start : start + most])
            words = {"size": size, "method": method, "flush": self.flush, "drop": self.drop}
            request = self._make(PiecesRequest, extents=part, **words)
            document = self._ask(request, bytes)
            length, rest = divmod(len(document), sum(count_blocks(extent.size, size) for extent in part))
            if rest or not length:
                raise ProtocolError("{url}: the server's digests don't fit what was asked for", url=self.label)
            digests += [document[at : at + length].hex() for at in range(0, len(document), length)]
        return digests

    def _get_size(self) -> int:
        return self.info()[0].size if self._size is None else self._size

    @contextmanager
    def read(self, extents: Sequence[Extent], state_digest: bool = False, clip: bool = False) -> Iterator[Reading]:
        """See :meth:`.Replica.read`."""
        extents = self._clip(extents) if clip else extents
        if not extents:
            yield Reading([])
            return
        size = total_size(extents)
        request = self._make(ReadRequest.of, extents, flush=self.flush, drop=self.drop, digest=state_digest)
        with self._exchange(request) as answer:
            digest = answer.get_digest() if state_digest else ""
            yield Reading(answer.read_exactly(size), digest, size=size)

    def _clip(self, extents: Sequence[Extent]) -> list[Extent]:
        info, _ = self.info()
        if not info.exists:
            raise FileMissingError("The file {label} doesn't exist", label=self.label)
        clipped = (Extent(offset, min(size, info.size - offset)) for offset, size in extents)
        return [extent for extent in clipped if extent.size > 0]

    def digest(self, extents: Sequence[Extent]) -> str:
        """See :meth:`.Replica.digest`."""
        request = self._make(ReadRequest.of, extents, flush=self.flush, drop=self.drop, digest=True, data=False)
        with self._exchange(request) as answer:
            return answer.get_digest()

    def write(self, extents: Sequence[Extent], reading: Reading, run: str = "") -> None:
        """See :meth:`.Replica.write`."""
        stated = {"digest": reading.digest, "block_size": reading.block_size, "method": reading.method}
        request = self._make(WriteRequest.of, extents, run=run, drop=self.drop, **stated)
        body = Reading(reading.chunks, size=total_size(extents))
        with self._exchange(request, body) as answer:
            document = answer.read_document()
            if reading.digest and not answers.decode_flag(document, answers.VERIFIED):
                raise ProtocolError("{url}: the server didn't verify what it wrote", url=self.label)

    def clear(self, extents: Sequence[Extent], run: str = "", keep: bool = False) -> bool:
        """See :meth:`.Replica.clear`."""
        for part in split(extents, self.url_room):
            request = self._make(ClearRequest, packed=part, keep=keep, run=run, drop=self.drop)
            if not self._ask(request, partial(answers.decode_flag, name=answers.CLEARED)):
                return False
        return True

    def resize(self, size: int, run: str = "", in_advance: bool = False) -> None:
        """See :meth:`.Replica.resize`."""
        in_advance = in_advance and FEATURE_SPARSE in self._features
        self._ask(self._make(ResizeRequest, size=size, in_advance=in_advance, run=run), bytes)

    def claim(self, run: str, create: bool = False, mode: int = DEFAULT_MODE) -> tuple[bool, FileInfo]:
        """See :meth:`.Replica.claim`."""
        if FEATURE_CLAIM not in self._features:
            return False, self.info()[0]
        request = self._make(ClaimRequest, run=run, create=create, mode=mode if create else DEFAULT_MODE)
        with self._naming():
            document = self._ask(request, bytes)
            return answers.decode_flag(document, answers.CLAIMED), answers.decode_info(document, exists=True)[0]

    def release(self, run: str) -> FileInfo:
        """See :meth:`.Replica.release`."""
        return self._ask(self._make(ReleaseRequest, run=run), partial(answers.decode_info, exists=True))[0]

    def metadata(self) -> Metadata:
        """See :meth:`.Replica.metadata`."""
        return self._ask(self._make(MetadataRequest, folder=self.is_folder), answers.decode_metadata)

    def set_metadata(self, metadata: Metadata, run: str = "", in_advance: bool = False) -> None:
        """See :meth:`.Replica.set_metadata`."""
        words = {"in_advance": in_advance, "run": run, "folder": self.is_folder}
        self._ask(self._make(SetMetadataRequest.of, metadata, **words), bytes)

    def make_folder(self, mode: int = FOLDER_MODE) -> None:
        """See :meth:`.Replica.make_folder`."""
        self._ask(self._make(MakeFolderRequest, mode=mode), bytes)

    def stage(self, run: str, mode: int = DEFAULT_MODE, takes: int = 0) -> Staged:
        """See :meth:`.Replica.stage`."""
        # It isn't repeated: what the server still does for the first request would get in the way of the second.
        request = self._make(StageRequest, run=run, mode=mode, takes=takes, drop=self.drop)
        with self._naming():
            return Staged(*answers.decode_staged(self._await(request)))

    def commit(self, new_id: str, ctime_ns: int, run: str = "") -> FileInfo:
        """See :meth:`.Replica.commit`."""
        request = self._make(CommitRequest, new_id=new_id, ctime_ns=ctime_ns, run=run)
        return self._ask(request, partial(answers.decode_info, exists=True))[0]

    def _make(self, make: Callable[..., R], *arguments: Any, **words: Any) -> R:
        """Make a request about this file."""
        about = {"filename": self.filename, "file_id": self.file_id, "within": self.within}
        return make(*arguments, **about, **words)

    def _ask(self, request: Request, decode: Callable[[bytes], T]) -> T:
        def ask() -> T:
            with self._exchange(request) as answer:
                return decode(answer.read_document())

        return self.server.get_patience().persist(ask)

    def sync(self, run: str = "") -> None:
        """See :meth:`.Replica.sync`."""
        # It isn't repeated: an answer that got lost may have been the only one to tell of an error.
        try:
            self._await(self._make(SyncRequest, run=run))
        except TransientError as e:
            text = "{url}: it isn't known whether the data has reached the disk, run again ({reason})"
            raise RemoteError(text, url=self.label, reason=e, status=0) from e

    def _await(self, request: Request) -> bytes:
        """Exchange a request for an answer that takes long, and return the last line before the one that ends it."""
        with self._exchange(request) as answer:
            *lines, last = answer.read_document().strip().split(b"\n")
            if last.startswith(b"{"):
                raise decode_report(last)
        if last != DONE.encode("ascii"):
            raise ProtocolError("{url}: the server's answer to {what} isn't one", url=self.label, what=request.endpoint)
        return lines[-1] if lines else b""

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Say of which server an answer is that makes no sense."""
        try:
            yield
        except (ProtocolError, TransientError) as e:
            if hasattr(e, "url"):
                raise
            raise type(e)("{url}: {reason}", url=self.label, reason=e) from e

    @contextmanager
    def _exchange(self, request: Request, body: Reading | None = None) -> Iterator[Answer]:
        with self._naming(), ExitStack() as stack:
            try:
                answer = stack.enter_context(self.server.exchange(request, body))
            except ReplacedError as e:
                raise self.describe_replacement(e) from e
            yield answer
