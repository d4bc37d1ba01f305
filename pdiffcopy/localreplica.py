"""
What can be done with one copy of a file of this machine?

The server serves such a replica, and the client uses one where a location is near.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext

from pdiffcopy import __version__
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
from pdiffcopy.digests import BlockwiseHasher
from pdiffcopy.entries import Entry
from pdiffcopy.exceptions import (
    AbsentError,
    FileForbiddenError,
    FileMissingError,
    RangeError,
    ReplacedError,
    TooLargeError,
    translating,
)
from pdiffcopy.features import FEATURES
from pdiffcopy.files import kernel
from pdiffcopy.files.identity import identify
from pdiffcopy.files.listing import list_folder
from pdiffcopy.files.localfile import LocalFile, create_alone
from pdiffcopy.files.metadata import (
    read_metadata,
    try_metadata,
    try_new_metadata,
    write_folder_metadata,
    write_metadata,
)
from pdiffcopy.files.names import (
    MACHINE,
    Namespace,
    create_file,
    create_folder,
    find_room,
    opened_folder,
    opened_nearest,
    sync_folder,
)
from pdiffcopy.files.openfile import TOO_SHORT
from pdiffcopy.files.room import get_room
from pdiffcopy.files.staging import NewVersion, is_new_version
from pdiffcopy.files.stored import Stored
from pdiffcopy.hashing import Hashers
from pdiffcopy.methods import get_hasher, get_methods
from pdiffcopy.pace import UNLIMITED
from pdiffcopy.replica import Reading, Replica, Staged
from pdiffcopy.streams import format_hashes
from pdiffcopy.wholes import MAX_BLOCKS, MAX_WHOLE, FileSummary


class LocalReplica(Replica):
    """A file of this machine."""

    is_near = True
    pace = UNLIMITED
    """How fast the bytes pass that are read from here."""

    def __init__(
        self,
        filename: str,
        namespace: Namespace = MACHINE,
        hashers: Hashers | None = None,
        is_awaited: Callable[[], bool] | None = None,
    ):
        """
        Initialize a replica (the file isn't looked at yet).

        :param filename: The name of the file.
        :param namespace: What the name means.
        :param hashers: The threads that hash it (by default it gets some of its own).
        :param is_awaited: Tells whether somebody still waits for what is read (by default somebody does).
        """
        self.filename = self.label = filename
        self.namespace = namespace
        self.hashers = hashers
        self.is_awaited = is_awaited

    def check(self) -> None:
        """Raise what any use of the file would."""
        self._open().close()

    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """See :meth:`Replica.info`."""
        try:
            with self._open() as file:
                file.claims.check(run)
                info, room = file.info(), get_room(file.fd)
        except FileMissingError:
            info, room = FileInfo(exists=False), find_room(self.filename, self.namespace)
        return info, PeerInfo(__version__, FEATURES, get_methods(), room=room)

    def entries(self, depth: int) -> Generator[Entry, None, None]:
        """See :meth:`Replica.entries`."""
        with closing(list_folder(self.filename, self.namespace, depth, self.file_id)) as entries:
            try:
                for entry in entries:
                    if self.is_awaited and not self.is_awaited():
                        raise AbsentError("Nobody waits for {filename} any more", filename=self.filename)
                    yield entry
            except ReplacedError as e:
                raise self.describe_replacement(e) from e

    def hashes(
        self, block_size: int, method: str, concurrency: int, start: int = 0, stop: int | None = None, grain: int = 0
    ) -> Generator[list[BlockDigest | Hole], None, None]:
        """See :meth:`Replica.hashes`."""
        get_hasher(method)
        file = self._open()  # now, and not when the first digest is asked for
        if stop is None:
            stop = file.size()
        else:
            self._check_range(file, [Extent(0, stop)])
        return self._hash(file, block_size, method, concurrency, start, stop, grain)

    def _hash(
        self, file: LocalFile, block_size: int, method: str, concurrency: int, start: int, stop: int, grain: int
    ) -> Generator[list[BlockDigest | Hole], None, None]:
        with file, self._get_hashers(concurrency) as hashers:
            yield from hashers.hash(file, start, stop, block_size, method, concurrency, grain)

    def holes(self, start: int, stop: int, grain: int) -> Iterator[Extent]:
        """See :meth:`Replica.holes`."""
        with self._open() as file:
            yield from file.holes(start, stop, grain)

    def pieces(self, extents: Sequence[Extent], size: int, method: str) -> list[str]:
        """See :meth:`Replica.pieces`."""
        get_hasher(method)
        with self._open() as file:
            self._check_range(file, extents)
            with self._get_hashers(1) as hashers:
                return hashers.digest(file, extents, size, method)

    def _get_hashers(self, count: int) -> AbstractContextManager[Hashers]:
        """Get the threads that this replica was given, which stay, or some of its own."""
        return nullcontext(self.hashers) if self.hashers else Hashers(count)

    def _check_range(self, file: LocalFile, extents: Sequence[Extent]) -> None:
        if (stop := max(map(sum, extents), default=0)) > file.size():
            raise RangeError(TOO_SHORT, filename=self.label, offset=stop)

    @contextmanager
    def read(self, extents: Sequence[Extent], state_digest: bool = False, clip: bool = False) -> Iterator[Reading]:
        """See :meth:`Replica.read`."""
        with self._open() as file:
            if clip:
                extents = [file.clip(extent) for extent in extents]
            else:
                self._check_range(file, extents)
            with file.reading(extents):
                digest = file.digest(extents) if state_digest else ""
                yield Reading(Stored(file, extents, self.pace), digest, size=total_size(extents))

    def digest(self, extents: Sequence[Extent]) -> str:
        """See :meth:`Replica.digest`."""
        with self._open() as file, file.reading(extents):
            return file.digest(extents)

    def write(self, extents: Sequence[Extent], reading: Reading, run: str = "") -> None:
        """See :meth:`Replica.write`."""
        blockwise = reading.block_size and BlockwiseHasher(reading.block_size, get_hasher(reading.method))
        with self._open(write=True) as file:
            file.write(extents, reading.chunks, reading.digest, run, blockwise or None)
            if is_new_version(self.filename):  # which is going to be flushed: let there be little left to do then
                start = extents[0].offset
                kernel.start_write_back(file.fd, start, sum(extents[-1]) - start)

    def clear(self, extents: Sequence[Extent], run: str = "", keep: bool = False) -> bool:
        """See :meth:`Replica.clear`."""
        with self._open(write=True) as file:
            return file.clear(extents, run, keep)

    def resize(self, size: int, run: str = "", in_advance: bool = False) -> None:
        """See :meth:`Replica.resize`."""
        if not self.file_id:
            create_file(self.filename, self.namespace)
        with self._open(write=True) as file, file.claims.writing(run):
            file.resize(size, in_advance)

    def claim(self, run: str, create: bool = False, mode: int = DEFAULT_MODE) -> tuple[bool, FileInfo]:
        """See :meth:`Replica.claim`."""
        if create:
            create_file(self.filename, self.namespace, mode)
        with self._open(write=True) as file:
            return file.claims.take(run), file.info()

    def summarize(self, block_size: int, method: str, grain: int) -> FileSummary:
        """Tell what is to be known of a small file whose contents may be equal to those of another one."""
        with self._open() as file:
            info = self._look(file)
            if count_blocks(info.size, block_size) > MAX_BLOCKS:
                raise TooLargeError("{filename} has too many blocks to be hashed as a whole", filename=self.label)
            hasher = get_hasher(method)()
            for stripe in Hashers(0).hash(file, 0, info.size, block_size, method, grain=grain):
                hasher.update(format_hashes(stripe))
            if info.describe_change(file.info()):
                return FileSummary(info)
            return FileSummary(info, hasher.hexdigest(), file.claims.find())

    @contextmanager
    def fetch(self, state_digest: bool) -> Iterator[tuple[FileInfo, Reading]]:
        """Read a small file as a whole, see :meth:`read`."""
        with self._open() as file:
            info = self._look(file)
            extents = [Extent(0, info.size)]
            with file.reading(extents):
                digest = file.digest(extents) if state_digest else ""
                yield info, Reading(Stored(file, extents, self.pace), digest, size=info.size)

    def _look(self, file: LocalFile) -> FileInfo:
        """Look at a small file before it is read, so that each change from then on shows in its time."""
        info = file.info()
        if info.size > MAX_WHOLE:
            raise TooLargeError("{filename} is too large to be read as a whole", filename=self.label)
        if self.flush:
            time.sleep(info.settles_ms / 1000)
        return info

    def create(
        self, reading: Reading, run: str, mode: int, in_advance: bool, metadata: Metadata
    ) -> tuple[bool, FileInfo]:
        """
        Create a file, and write all of its contents, see :meth:`claim`, :meth:`resize` and :meth:`write`.

        :param metadata: What it gets after that, while nobody else can claim it.
        :raises: :exc:`.FileError` when it exists, or when that isn't possible or makes no sense.
        """
        if metadata.names_owner:
            self._try_new_metadata(metadata)
        with create_alone(self.filename, self.namespace, mode, reading.size) as file:
            claimed = file.claims.take(run)
            run = run if claimed else ""
            file.resize(reading.size, in_advance)
            file.write([Extent(0, reading.size)], reading.chunks, reading.digest, run)
            with file.claims.ending(run):
                write_metadata(file.fd, self.filename, metadata)
                info = file.info()
        return claimed, info

    def release(self, run: str) -> FileInfo:
        """See :meth:`Replica.release`."""
        with self._open(write=True) as file:
            file.claims.release(run)
            return file.info()

    def metadata(self) -> Metadata:
        """See :meth:`.Replica.metadata`."""
        if self.is_folder:
            with self._open_folder() as fd:
                return read_metadata(fd, self.filename)
        with self._open() as file:
            return read_metadata(file.fd, self.filename)

    def set_metadata(self, metadata: Metadata, run: str = "", in_advance: bool = False) -> None:
        """See :meth:`.Replica.set_metadata`."""
        if self.is_folder:
            with self._open_folder() as fd:
                write_folder_metadata(fd, self.filename, metadata)
            return
        try:
            with self._open(write=True) as file, file.claims.writing(run):
                (try_metadata if in_advance else write_metadata)(file.fd, self.filename, metadata)
        except FileMissingError:
            if not in_advance or self.file_id:
                raise
            self._try_new_metadata(metadata)

    def _try_new_metadata(self, metadata: Metadata) -> None:
        with translating("create", self.filename), opened_nearest(self.filename, self.namespace) as (folder, _):
            try_new_metadata(folder, self.filename, metadata)

    def make_folder(self, mode: int = FOLDER_MODE) -> None:
        """See :meth:`.Replica.make_folder`."""
        create_folder(self.filename, self.namespace, mode)

    def stage(self, run: str, mode: int = DEFAULT_MODE, takes: int = 0) -> Staged:
        """See :meth:`.Replica.stage`."""
        with ExitStack() as stack:
            version = stack.enter_context(NewVersion(self.filename, self.namespace, not self.file_id, self.drop))
            old = stack.enter_context(version.open_old(self.file_id)) if self.file_id else None
            new = stack.enter_context(version.begun(mode, old))
            new.is_awaited = self.is_awaited
            claimed = new.claims.take(run)
            shares = version.fill(old, new, run if claimed else "", takes) if old else False
            return Staged(version.filename, claimed, shares, new.info())

    def commit(self, new_id: str, ctime_ns: int, run: str = "") -> FileInfo:
        """See :meth:`.Replica.commit`."""
        with NewVersion(self.filename, self.namespace) as version:
            version.take_place(new_id, self.file_id, ctime_ns, run)
            sync_folder(version.old, self.namespace)
        return self.pinned(new_id).info()[0]

    def sync(self, run: str = "") -> None:
        """See :meth:`Replica.sync`."""
        with self._open(write=True) as file:
            file.claims.flush(run)
        sync_folder(self.filename, self.namespace)

    @contextmanager
    def _open_folder(self) -> Iterator[int]:
        with opened_folder(self.filename, self.namespace) as fd:
            if self.file_id and self.file_id != identify(os.fstat(fd)):
                raise ReplacedError("{filename} was replaced by another folder, run again", filename=self.label)
            if kernel.get_file_system(fd) in kernel.PSEUDO:
                text = "Can't use {filename}: it is a part of the kernel that looks like a folder"
                raise FileForbiddenError(text, filename=self.label)
            yield fd

    def _open(self, write: bool = False) -> LocalFile:
        try:
            file = LocalFile(self.filename, write, self.namespace, self.file_id, self.flush, self.drop)
        except ReplacedError as e:
            raise self.describe_replacement(e) from e
        file.is_awaited = self.is_awaited
        return file
