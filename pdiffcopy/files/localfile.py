"""
How is an open file of this machine written to?

What was written is read back, and compared with what should be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pdiffcopy.blocks import MAX_OFFSET, Extent, cut
from pdiffcopy.digests import new_hasher
from pdiffcopy.exceptions import (
    DigestMismatchError,
    DiskFullError,
    FileForbiddenError,
    RangeError,
    translating,
)
from pdiffcopy.files import kernel
from pdiffcopy.files.buffers import READ_SIZE, ZEROED, borrow_buffer
from pdiffcopy.files.holes import get_grain
from pdiffcopy.files.identity import identify
from pdiffcopy.files.metadata import OWNER_ONLY
from pdiffcopy.files.names import Folder, Namespace, check_folder, make_place
from pdiffcopy.files.openfile import OpenFile
from pdiffcopy.files.pagecache import Change
from pdiffcopy.files.room import get_room
from pdiffcopy.files.splice import Chunk, Piped, spread

DEVICE_STEP = 16 * 1024 * 1024
"""How much of a device becomes zeros in one go, in bytes: it may have to write them, and that is waited for."""


class LocalFile(OpenFile):
    """A file that can be written to, see :class:`.OpenFile`."""

    def write(
        self, extents: Sequence[Extent], chunks: Iterable[Chunk], digest: str = "", run: str = "", hasher: Any = None
    ) -> None:
        """
        Write bytes into extents, and check what lies there afterwards.

        :param extents: Where the bytes belong, one extent after the other.
        :param chunks: The bytes, cut anywhere, exactly as many as the extents take.
        :param digest: The digest that the sender states (an empty string: there's nothing to check against).
        :param run: The run that has claimed the file (an empty string: none has).
        :param hasher: A hash object that makes such a digest (by default a plain one).
        :raises: :exc:`.DigestMismatchError` when the digest of the file's contents differs,
                 :exc:`.TakenOverError` when another run has claimed the file,
                 :exc:`.RangeError` when it has become too short for the run.
        """
        hasher = (hasher or new_hasher()) if digest else None
        with self.changing(extents, run) as change:
            for offset, piece in spread(extents, chunks):
                size = len(piece)
                # Not around all of it: a sender that stalls must not keep another run from claiming the file.
                with self.claims.writing(run):
                    if run:
                        self._check_room(offset + size)
                    self._write_piece(offset, piece, hasher)
                change.note(size)
        if hasher and hasher.hexdigest() != digest:
            text = "What lies in {filename} at offset {offset} isn't what was sent"
            raise DigestMismatchError(text, filename=self.filename, offset=extents[0].offset)

    @contextmanager
    def changing(self, extents: Sequence[Extent], run: str = "") -> Iterator[Change]:
        """Surround the writing of extents, see :class:`.Change`."""
        change = Change(self.fd, self.filename, extents if self.drop else ())
        try:
            with change:
                yield change
        finally:
            if change.has_failed:  # of which the kernel tells only once
                self.claims.doubt(run)

    def _write_piece(self, offset: int, piece: memoryview | Piped, hasher: Any) -> None:
        """Write bytes, and read them back chunk by chunk: each is still in the cache of this core."""
        if not hasher:
            self._write_at(offset, piece)
            return
        with borrow_buffer() as buffer:
            while size := min(len(piece), len(buffer)):
                part, piece = piece[:size], piece[size:]
                self._write_at(offset, part)
                self._fill(buffer[:size], offset)
                hasher.update(buffer[:size])
                offset += size

    def clear(self, extents: Sequence[Extent], run: str = "", keep: bool = False) -> bool:
        """
        Let extents become holes, or zeros that take room, and check what lies there afterwards.

        :param keep: Whether they keep their room on the disk (or get some).
        :returns: :data:`False` when the file system can't make holes, so that nothing (or not everything) was done.
        :raises: What :meth:`write` raises.
        """
        if keep:
            self._write_zeros(extents, run)
            return True
        for part in extents:
            if sum(part) <= self.size() and not any(self.extents(part.offset, sum(part))):
                continue
            with self.claims.writing(run):
                self._check_room(sum(part))
                if not self._make_hole(part):
                    return False
            self._check_cleared(part)
        return True

    def _write_zeros(self, extents: Sequence[Extent], run: str) -> None:
        with self.changing(extents, run) as change:
            for part in cut(extents, DEVICE_STEP if self.is_device else READ_SIZE):
                with self.claims.writing(run):
                    self._check_room(sum(part))
                    self._zero(part)
                self._check_cleared(part)
                change.note(part.size)

    def _zero(self, extent: Extent) -> None:
        with translating("write to", self.filename):
            if self.is_device and kernel.zero_device(self.fd, *extent):
                return
        for part in cut([extent], len(ZEROED)):
            self._write_at(part.offset, ZEROED[: part.size])

    def _make_hole(self, extent: Extent) -> bool:
        if self.is_device:
            return False
        offset, end = extent.offset, sum(extent)
        with translating("make a hole in", self.filename):
            if end == self.size():  # with the rest of the last block, which would stay otherwise
                end = min(-(-end // get_grain(self.fd)) * get_grain(self.fd), MAX_OFFSET)
            return kernel.punch_hole(self.fd, offset, end - offset)

    def _check_cleared(self, extent: Extent) -> None:
        """Read what isn't in a hole, which is little where there are holes now."""
        for part in self.extents(extent.offset, sum(extent)):
            for chunk in self.chunks([part]):
                if chunk != ZEROED[: len(chunk)]:
                    text = "What lies in {filename} at offset {offset} should be zeros, and isn't"
                    raise DigestMismatchError(text, filename=self.filename, offset=part.offset)

    def _check_room(self, end: int) -> None:
        """A run makes room first. To write behind the end would make a hole of what somebody has cut off meanwhile."""
        if end > self.size():
            text = "Can't write to {filename} up to offset {offset}: somebody has cut it meanwhile"
            raise RangeError(text, filename=self.filename, offset=end)

    def _write_at(self, offset: int, piece: memoryview | Piped) -> None:
        with translating("write to", self.filename):
            if isinstance(piece, Piped):
                piece.move_to(self.fd, offset)
                return
            while len(piece):
                count = os.pwrite(self.fd, piece, offset)
                piece, offset = piece[count:], offset + count

    def resize(self, size: int, in_advance: bool = False) -> None:
        """
        Grow or cut the file. A device stays as it is, and has to be large enough.

        :param in_advance: Whether it takes all of its room at once.
        """
        if not self.is_device:
            with translating("resize", self.filename):
                if in_advance and size:
                    kernel.allocate(self.fd, size)
                os.ftruncate(self.fd, size)
        elif size > self.size():
            text = "Can't resize {filename} to {size} bytes: it is a block device and smaller than that"
            raise FileForbiddenError(text, filename=self.filename, size=size)


def _open_place(filename: str, namespace: Namespace) -> Folder:
    """Open the folder that a file is going to be in."""
    name = os.path.dirname(filename) or "."
    try:
        return Folder(name, namespace)
    except FileNotFoundError:
        make_place(filename, namespace)
        return Folder(name, namespace)


def create_alone(filename: str, namespace: Namespace, mode: int, size: int) -> LocalFile:
    """
    Create a file that doesn't exist, and the folders that lead to it.

    :param mode: Whom it is for, at most (permission bits; the umask takes away some).
    :param size: How many bytes it's going to have.
    :raises: :exc:`.FileError` when it exists, or when that isn't possible or makes no sense.
    """
    with translating("create", filename), _open_place(filename, namespace) as folder:
        check_folder(folder.fd, filename)
        room = get_room(folder.fd)
        if room is not None and size > room:
            text = "{filename} takes {size} bytes, and its file system has {room} left"
            raise DiskFullError(text, filename=filename, size=size, room=room)
        # The run that creates it is going to write to it, whether the source may be written to or not.
        fd = folder.open(filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode | OWNER_ONLY)
        try:
            file_id = identify(os.fstat(fd))
        finally:
            os.close(fd)
        return LocalFile(filename, True, folder, file_id)
