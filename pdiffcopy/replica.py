"""
What can be done with one copy of a file, wherever it is?

A :class:`Replica` is the interface that the client uses and the server serves: each endpoint is one of its methods.
:mod:`.localreplica` has a file of this machine; ``RemoteReplica`` (in the client's wing) is one behind a server. Code
that uses a replica need not know which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import NamedTuple

from pdiffcopy import digests
from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import DEFAULT_MODE, FOLDER_MODE, BlockDigest, Extent, FileInfo, Hole, Metadata
from pdiffcopy.entries import Entry
from pdiffcopy.exceptions import ProgramError, ReplacedError, SourceChangedError
from pdiffcopy.files.splice import Chunk
from pdiffcopy.words import MAX_LINE


class Reading(NamedTuple):
    """Bytes on their way."""

    chunks: Iterable[Chunk]
    """The bytes, each chunk valid until the next one is asked for."""
    digest: str = ""
    """The digest that the sender states (empty when it states none)."""
    block_size: int = 0
    """The size of the blocks in bytes if that is a blockwise digest (see :mod:`.digests`), otherwise 0."""
    method: str = digests.METHOD
    """The hash method of the blocks in that case."""
    size: int = 0
    """How many bytes there are, as far as somebody has to know that before they come."""


class Staged(NamedTuple):
    """A new version of a file, which lies beside it."""

    filename: str
    claimed: bool
    """Whether the run that has begun it is the only one that may write to it."""
    shares: bool
    """Whether it has the contents of the old version, which are the same bytes on the disk."""
    info: FileInfo


class Replica(ABC):
    """
    One copy of the file. No method leaves anything open, but for the time that its generator is in use.

    A name may lead to another file at any moment, so all methods but :meth:`info` raise :exc:`.ReplacedError` when it
    doesn't lead to the file that the replica is *pinned* to.
    """

    is_near: bool
    """Whether the file is on this machine, so that its bytes are had without a network."""
    filename: str
    """What its side calls it."""
    label: str
    """What messages call it."""
    file_id = ""
    """Which file the name has to lead to (empty: any)."""
    is_folder = False
    """Whether it is a folder, of which the metadata are meant."""
    is_source = False
    """Whether a replacement means that the source has changed."""
    flush = False
    """Whether dirty pages are written back before they are read, so that a later change through a mapping shows."""
    drop = False
    """Whether what wasn't in the page cache leaves it again when it has been read or written."""

    @property
    def url_room(self) -> int:
        """How many characters of a URL the extents of a request about it may take (those of a near file need none)."""
        return MAX_LINE

    def pinned(self, file_id: str, is_source: bool = False) -> Replica:
        """Return the same replica, but it has to be a certain file from now on."""
        replica = copy(self)
        replica.file_id = file_id
        replica.is_source = replica.flush = is_source
        return replica

    def describe_replacement(self, error: ReplacedError) -> ProgramError:
        """Tell what it means that the name leads to another file: the source has changed, or the target is gone."""
        return SourceChangedError.of(self.label, "identity") if self.is_source else error

    @abstractmethod
    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """
        Tell size and identity of the file, and what its side can do.

        :param run: The run that has claimed the file, if one has.
        :raises: :exc:`.TakenOverError` when another run has claimed it since, even if that has ended.
        """

    @abstractmethod
    def entries(self, depth: int) -> Generator[Entry, None, None]:
        """
        Tell what the name leads to, which need not be a file, and what lies in it if that is a folder.

        :param depth: How many levels to tell (0: only what the name leads to, :data:`.MAX_DEPTH`: all there are).
        :returns: A generator of entries, in the order of :mod:`.entries`.
        :raises: :exc:`.ProgramError` when anything can't be read, also in the middle: what was told isn't all then.
        """

    @abstractmethod
    def hashes(
        self, block_size: int, method: str, concurrency: int, start: int = 0, stop: int | None = None, grain: int = 0
    ) -> Generator[list[BlockDigest | Hole], None, None]:
        """
        Hash the blocks of a part of the file.

        :param start: Where the first block begins (a multiple of the block size).
        :param stop: Where the last one ends (:data:`None`: where the file does).
        :param grain: The size of the smallest hole that matters, a part of a block: whole blocks in a hole are told and
                      not hashed, and a digest also stands for where its block has holes (0: no hole matters).
        :returns: A generator of lists of neighboring blocks, in order, as they become known. A list is empty when the
                  next one takes long.
        """

    @abstractmethod
    def holes(self, start: int, stop: int, grain: int) -> Iterator[Extent]:
        """Find the holes in a part of the file, as far as they consist of whole grains (see :func:`.find_holes`)."""

    @abstractmethod
    def pieces(self, extents: Sequence[Extent], size: int, method: str) -> list[str]:
        """
        Digest the pieces of some extents.

        :param size: The size of a piece, a power of two. The last one of each extent may be shorter.
        :returns: Their digests in hexadecimal, in order.
        """

    @abstractmethod
    def read(
        self, extents: Sequence[Extent], state_digest: bool = False, clip: bool = False
    ) -> AbstractContextManager[Reading]:
        """
        Read extents: exactly the bytes that were asked for, or an exception.

        :param state_digest: Whether to state the digest of the bytes.
        :param clip: Whether only those are meant that lie within the file.
        """

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
    def clear(self, extents: Sequence[Extent], run: str = "", keep: bool = False) -> bool:
        """
        Make zeros of some extents, and look whether they are.

        :param keep: Whether they take room on the disk (otherwise they become holes).
        :returns: Whether that's possible here.
        """

    @abstractmethod
    def resize(self, size: int, run: str = "", in_advance: bool = False) -> None:
        """
        Create the file (with its parent folders), grow or cut it.

        :param in_advance: Whether it takes all of its room on the disk at once.
        """

    @abstractmethod
    def claim(self, run: str, create: bool = False, mode: int = DEFAULT_MODE) -> tuple[bool, FileInfo]:
        """
        Let a run write to the file, and no earlier one any more.

        :param create: Whether to create a missing file (an old server can't do that here).
        :param mode: Whom a new file is for, at most (permission bits; the umask takes away some).
        :returns: Whether that is possible here, and what the file is from then on.
        """

    @abstractmethod
    def release(self, run: str) -> FileInfo:
        """
        End a claim. That it was lost or ended before is no error (:meth:`info` tells).

        :returns: What the file is at the end.
        """

    @abstractmethod
    def metadata(self) -> Metadata:
        """Tell whose the file (or the folder) is, who may use it, and when it was changed."""

    @abstractmethod
    def set_metadata(self, metadata: Metadata, run: str = "", in_advance: bool = False) -> None:
        """
        Give the file (or the folder) other metadata.

        :param in_advance: Whether the contents are still to come: it's only found out whether all of it may be, and
                           those lose access who aren't going to have any. (The file itself may be still to come, too.)
        """

    @abstractmethod
    def make_folder(self, mode: int = FOLDER_MODE) -> None:
        """
        Create a folder of this name, and the folders that lead to it, unless it exists.

        :param mode: Whom it is for, at most (permission bits; the umask takes away some).
        """

    @abstractmethod
    def stage(self, run: str, mode: int = DEFAULT_MODE, takes: int = 0) -> Staged:
        """
        Let a new version of the file begin beside it, or go on with one that was begun, and let a run write to that.

        :param mode: Whom it is for at most, while there is no old version.
        :param takes: How many bytes of room it takes at least.
        """

    @abstractmethod
    def commit(self, new_id: str, ctime_ns: int, run: str = "") -> FileInfo:
        """
        Let the new version take the place of the old one, in one step. It has been flushed before.

        :param new_id: Which file it is.
        :param ctime_ns: When the old version was changed for the last time (it is pinned; unless it is, there is none).
        :raises: :exc:`.ReplacedError` when it has been changed since, :exc:`.TakenOverError` when another run has
                 claimed the new version.
        :returns: What the file is from then on.
        """

    @abstractmethod
    def sync(self, run: str = "") -> None:
        """
        Flush the file to its disk.

        :raises: :exc:`.ProgramError` also when it isn't known how that ended: an error of the disk is told only once.
        """
