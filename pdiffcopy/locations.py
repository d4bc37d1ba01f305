"""
Where is a file, and what can be done with it there?

A :class:`Location` is what users configure. Behind it stands a :class:`Replica`: one of the two copies of the file.
There are two kinds with the same methods, :class:`LocalReplica` here and ``RemoteReplica`` in :mod:`.remote`, which is
imported (and requests with it) only when a location turns out to be remote. Who uses a replica need not know its kind.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from property_manager import PropertyManager, cached_property, mutable_property

from pdiffcopy import BLOCK_SIZE, DEFAULT_CONCURRENCY, DEFAULT_RETRIES, DEFAULT_TIMEOUT
from pdiffcopy.address import Address, parse_location
from pdiffcopy.exceptions import (
    DependencyError,
    FileMissingError,
    ProgramError,
    ReplacedError,
    SourceChangedError,
    UsageError,
    printable,
)
from pdiffcopy.hashing import get_methods, hash_stripes
from pdiffcopy.localfile import LocalFile, Stored
from pdiffcopy.operations import claim_file, get_file_info, read_block, release_file, resize_file, stat_file, sync_file
from pdiffcopy.protocol import FEATURES, Extent, FileInfo, PeerInfo
from pdiffcopy.splice import Chunk


@dataclass(frozen=True)
class Network:
    """How to talk to servers."""

    timeout: float = DEFAULT_TIMEOUT
    """How long to wait for a sign of life, in seconds."""
    retries: int = DEFAULT_RETRIES
    """How often in a row a request may fail before the run does."""
    token: str = field(default="", repr=False)
    """The shared secret that the servers ask for (empty for none)."""
    ca_file: str = ""
    """The certificate authority to trust for https (empty for those that requests trusts)."""


@dataclass(frozen=True)
class Reading:
    """Octets on their way."""

    chunks: Iterable[Chunk]
    """The octets, each chunk valid until the next one is asked for."""
    digest: str = ""
    """The XXH128 digest that the sender states (empty when it states none)."""
    block_size: int = 0
    """The size of the blocks in bytes if that's a blockwise digest (see :mod:`.digests`), otherwise 0."""


class Replica(ABC):
    """
    One copy of the file. No method leaves anything open, but for the time that its generator is in use.

    A name may lead to another file at any moment, so all methods but :meth:`info` raise :exc:`.ReplacedError` when it
    doesn't lead to the file that the replica is *pinned* to.
    """

    file_id = ""
    """Which file the name has to lead to (empty: any)."""
    is_source = False
    """Whether dirty pages are written back before they are read, so that a later change through a mapping shows."""

    def pinned(self, file_id: str, is_source: bool = False) -> Replica:
        """The same replica, but it has to be a certain file from now on."""
        replica = copy(self)
        replica.file_id = file_id
        replica.is_source = is_source
        return replica

    def describe_replacement(self, error: ReplacedError, label: str) -> ProgramError:
        """What it means that the name leads to another file: the source has changed, or the target is gone."""
        return SourceChangedError.of(label, "identity") if self.is_source else error

    @abstractmethod
    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """
        Size and identity of the file, and what its side can do.

        :param run: The run that has claimed the file, if one has.
        :raises: :exc:`.TakenOverError` when somebody else has claimed it since, even if that has ended.
        """

    @abstractmethod
    def hashes(self, size: int, block_size: int, method: str, concurrency: int, start: int = 0) -> Iterator[str]:
        """The digests of the blocks of the first `size` bytes (from `start` on), in order, as they become known."""

    @abstractmethod
    def read(self, extents: Sequence[Extent], state_digest: bool) -> AbstractContextManager[Reading]:
        """Read extents: exactly the octets that were asked for, or an exception."""

    @abstractmethod
    def digest(self, extents: Sequence[Extent]) -> str:
        """Read extents only to state their digest, as :meth:`read` does."""

    @abstractmethod
    def write(self, extents: Sequence[Extent], reading: Reading, run: str = "") -> None:
        """
        Write extents, and compare what lies there afterwards with the digest of the reading, if it states one.

        :param run: The run that has claimed the file, if one has.
        :raises: :exc:`.DigestMismatchError` when that differs, :exc:`.TakenOverError` when the claim is lost.
        """

    @abstractmethod
    def resize(self, size: int, run: str = "") -> None:
        """Create the file (with its parent folders), grow or cut it."""

    @abstractmethod
    def claim(self, run: str, create: bool = False, mode: int = FileInfo.mode) -> tuple[bool, FileInfo]:
        """
        Let a run write to the file, and no earlier one any more.

        :param create: Whether to create a missing file (an old server can't do that here).
        :param mode: Whom a new file is for, at most (permission bits; the umask takes away some).
        :returns: Whether that's possible here, and what the file is from then on.
        """

    @abstractmethod
    def release(self, run: str) -> None:
        """End a claim. That it was lost or ended before is no error (:meth:`info` tells)."""

    @abstractmethod
    def sync(self, run: str = "") -> None:
        """
        Flush the file to its disk.

        :raises: :exc:`.ProgramError` also when it isn't known how that ended: an error of the disk is told only once.
        """


class LocalReplica(Replica):
    """A file of this machine."""

    def __init__(self, filename: str):
        """:param filename: The name of the file."""
        self.filename = filename

    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """See :meth:`Replica.info`."""
        return stat_file(self.filename, run), PeerInfo(features=FEATURES, methods=get_methods())

    def hashes(self, size: int, block_size: int, method: str, concurrency: int, start: int = 0) -> Iterator[str]:
        """See :meth:`Replica.hashes`."""
        with self._open() as file, ThreadPoolExecutor(concurrency) as executor:
            for stripe in hash_stripes(file, start, size, block_size, method, executor, concurrency):
                for _, digest in stripe:
                    yield digest

    @contextmanager
    def read(self, extents: Sequence[Extent], state_digest: bool) -> Iterator[Reading]:
        """See :meth:`Replica.read`."""
        with self._open() as file:
            yield Reading(Stored(file, extents), file.digest(extents) if state_digest else "")

    def digest(self, extents: Sequence[Extent]) -> str:
        """See :meth:`Replica.digest`."""
        with self._open() as file:
            return file.digest(extents)

    def write(self, extents: Sequence[Extent], reading: Reading, run: str = "") -> None:
        """See :meth:`Replica.write`."""
        with self._open(write=True) as file:
            file.write(extents, reading.chunks, reading.digest, run, reading.block_size)

    def resize(self, size: int, run: str = "") -> None:
        """See :meth:`Replica.resize`."""
        resize_file(self.filename, size, run=run, file_id=self.file_id)

    def claim(self, run: str, create: bool = False, mode: int = FileInfo.mode) -> tuple[bool, FileInfo]:
        """See :meth:`Replica.claim`."""
        return claim_file(self.filename, run, create, mode, file_id=self.file_id)

    def release(self, run: str) -> None:
        """See :meth:`Replica.release`."""
        release_file(self.filename, run, file_id=self.file_id)

    def sync(self, run: str = "") -> None:
        """See :meth:`Replica.sync`."""
        sync_file(self.filename, run=run, file_id=self.file_id)

    def _open(self, write: bool = False) -> LocalFile:
        try:
            return LocalFile(self.filename, write, file_id=self.file_id, flush=self.is_source)
        except ReplacedError as e:
            raise self.describe_replacement(e, self.filename) from e


@lru_cache(maxsize=16)
def open_replica(address: Address, network: Network) -> Replica:
    """
    Get the replica at an address, the same one each time, so that connections are used again.

    :raises: :exc:`.DependencyError` when it is remote and the requirements of the client aren't installed.
    """
    if not address.hostname:
        return LocalReplica(make_absolute(address.filename))
    try:
        from pdiffcopy.remote import RemoteReplica
    except ImportError as e:
        text = "A client requirement is missing ({error}): install pdiffcopy[client] from its checkout (README.rst)"
        raise DependencyError(text, error=e) from e
    return RemoteReplica(address, network)


def make_absolute(filename: str) -> str:
    """
    The absolute spelling of a local name.

    Nothing is taken away: ``link/../file`` lies beside what the link leads to, and only the kernel knows where that is.
    """
    if filename.startswith("/"):
        return filename
    try:
        return os.path.join(os.getcwd(), filename.removeprefix("./"))
    except OSError as e:
        text = "Can't find {filename}: the working directory doesn't exist any more ({reason})"
        raise UsageError(text, filename=filename, reason=e.strerror) from e


class Location(PropertyManager):
    """A local or remote file to be copied."""

    @mutable_property
    def expression(self) -> str:
        """The location expression (a string), see :func:`.parse_location`."""
        return str(self.address)

    @expression.setter
    def expression(self, value: str) -> None:
        """Split a location expression into :attr:`scheme`, :attr:`hostname`, :attr:`port_number`, :attr:`filename`."""
        address = parse_location(value)
        self.filename = address.filename if address.hostname else make_absolute(address.filename)
        self.hostname = address.hostname or None
        self.port_number = address.port if address.hostname else None
        self.scheme = address.scheme

    @mutable_property
    def filename(self) -> str | None:
        """The absolute pathname of the file to copy (a string)."""

    @mutable_property
    def hostname(self) -> str | None:
        """The host name of a pdiffcopy server (a string or :data:`None`)."""

    @mutable_property
    def port_number(self) -> int | None:
        """The port number of a pdiffcopy server (a number or :data:`None`)."""

    @mutable_property
    def scheme(self) -> str:
        """How the server is spoken to (``http`` or ``https``)."""
        return "http"

    @mutable_property
    def network(self) -> Network:
        """Timeout, retries and credentials (a :class:`Network` object)."""
        return Network()

    @property
    def address(self) -> Address:
        """What identifies the file (an :class:`.Address`)."""
        if not self.filename:
            raise UsageError("A location needs an expression or a filename")
        if not self.hostname:
            return Address(self.filename)
        defaults = Address(self.filename)
        return Address(self.filename, self.hostname, self.port_number or defaults.port, self.scheme)

    @property
    def replica(self) -> Replica:
        """What does the work (a :class:`Replica`)."""
        return open_replica(self.address, self.network)

    @property
    def label(self) -> str:
        """A human friendly label for the location (a string)."""
        return printable(str(self.address))

    @cached_property(repr=False)
    def file_info(self) -> dict[str, Any]:
        """A dictionary with file metadata (empty when the file doesn't exist)."""
        if not self.hostname:
            return get_file_info(self.address.filename)
        return self.replica.info()[0].as_dict()

    @cached_property(repr=False)
    def exists(self) -> bool:
        """:data:`True` if the file exists, :data:`False` otherwise."""
        return bool(self.file_info)

    @cached_property(repr=False)
    def file_size(self) -> int:
        """The size of the file in bytes (an integer)."""
        if not self.exists:
            raise FileMissingError("The file {label} doesn't exist", label=self.label)
        return self.file_info["size"]

    def get_hashes(self, **options: Any) -> Iterator[tuple[int, str]]:
        """
        Get the hashes of the blocks in a file.

        :param options: ``block_size``, ``method`` and ``concurrency``, see :func:`.compute_hashes`.
        :returns: A generator of tuples with two values each:

                  1. A byte offset into the file (an integer).
                  2. The hash of the block starting at that offset (a string).
        """
        block_size = options.get("block_size", BLOCK_SIZE)
        size = self.replica.info()[0].size if self.exists else self.file_size
        digests = self.replica.hashes(
            size, block_size, options.get("method", "sha1"), options.get("concurrency", DEFAULT_CONCURRENCY)
        )
        return ((index * block_size, digest) for index, digest in enumerate(digests))

    def get_url(self, endpoint: str, **params: Any) -> str:
        """
        Get the server URL for the given endpoint.

        :param endpoint: The name of a server side endpoint (a string).
        :param params: Any query string parameters.
        """
        if not self.hostname:
            raise UsageError("{label} is a local file: it has no URL", label=self.label)
        return self.address.url(endpoint, **params)

    def read_block(self, offset: int, size: int) -> bytes:
        """
        Read a block of data from :attr:`filename`.

        :param offset: The byte offset where reading starts (an integer).
        :param size: The number of bytes to read (an integer).
        :returns: A byte string (shorter than `size` at the end of the file).
        """
        if not self.hostname:
            return read_block(self.address.filename, offset, size)
        size = max(0, min(size, self.replica.info()[0].size - offset))
        with self.replica.read([Extent(offset, size)] if size else [], state_digest=False) as reading:
            return b"".join(bytes(chunk) for chunk in reading.chunks)

    def write_block(self, offset: int, data: bytes) -> None:
        """
        Write a block of data to :attr:`filename`.

        :param offset: The byte offset where writing starts (an integer).
        :param data: The byte string to write to the file.
        """
        if data:
            self.replica.write([Extent(offset, len(data))], Reading([data]))

    def resize(self, size: int) -> None:
        """
        Adjust the size of :attr:`filename` to the given size.

        :param size: The new file size in bytes (an integer).
        """
        self.replica.resize(size)
