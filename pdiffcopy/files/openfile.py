"""
What is an open file of this machine, and how is it read?

A file is a regular file or a block device. Anything else (a folder, a FIFO, a terminal, a socket) is refused before
it is opened, so that opening it can't block or have side effects. What was looked at is what is opened (``O_PATH``).
Whatever the operating system refuses is a :exc:`.FileError` that names the file.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from pdiffcopy.blocks import MAX_MODE, Extent, FileInfo, cut, intersect, subtract
from pdiffcopy.digests import new_hasher
from pdiffcopy.exceptions import (
    AbsentError,
    FileError,
    FileForbiddenError,
    RangeError,
    ReplacedError,
    translating,
)
from pdiffcopy.files import kernel, pagecache
from pdiffcopy.files.buffers import READ_SIZE, ZEROED, borrow_buffer
from pdiffcopy.files.claims import Claims
from pdiffcopy.files.holes import find_extents, find_holes, get_grain, hides_holes
from pdiffcopy.files.identity import get_settling_time, identify
from pdiffcopy.files.names import MACHINE, Namespace, reopen
from pdiffcopy.files.readahead import ReadAhead
from pdiffcopy.files.sockets import send_all, wait_for_room

TOO_SHORT = "Can't read {filename} up to offset {offset}: the file has become shorter, or never was that long"

F = TypeVar("F", bound="OpenFile")


class OpenFile:
    """An open regular file or block device (a context manager)."""

    fd = -1
    claims: Claims
    is_awaited: Callable[[], bool] | None = None
    """Tells whether somebody still waits for what is read (:data:`None`: somebody does)."""

    def __init__(
        self,
        filename: str,
        write: bool = False,
        namespace: Namespace = MACHINE,
        file_id: str = "",
        flush: bool = False,
        drop: bool = False,
    ):
        """
        Open a file.

        :param filename: The name of the file.
        :param write: Whether it's going to be written to (it can be read in any case).
        :param namespace: What the name means, and whether a block device will do.
        :param file_id: Which file it has to be (see :class:`.FileInfo`, by default any).
        :param flush: Whether dirty pages are written back before they are read (see :func:`.kernel.write_back`).
        :param drop: Whether what wasn't in the page cache leaves it again (see :class:`.Visit`).
        :raises: :exc:`.ReplacedError` when it's another file, :exc:`.FileError` when the operating system refuses.
        """
        self.filename = filename
        self.flush = flush
        self.drop = drop
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY
        with translating("open", filename):
            path = namespace.open(filename, os.O_PATH | os.O_CLOEXEC)
            try:
                status = os.fstat(path)
                self._check_type(status, path, namespace.devices)
                # Before it's opened for writing, since an overlay makes another inode of it then.
                if file_id and file_id != identify(status):
                    raise ReplacedError("{filename} was replaced by another file, run again", filename=filename)
                self.fd = reopen(path, flags)
            finally:
                os.close(path)
        self.claims = Claims(self.fd, filename, self.is_device)
        if drop:
            pagecache.prepare(self.fd, filename, self.size())

    def _check_type(self, status: os.stat_result, fd: int, devices: bool) -> None:
        self.is_device = stat.S_ISBLK(status.st_mode)
        if self.is_device and not devices:
            reason = "it is a block device (--devices allows those)"
        elif stat.S_ISDIR(status.st_mode):
            reason = "it is a folder, which is neither a regular file nor a block device"
        elif not self.is_device and not stat.S_ISREG(status.st_mode):
            reason = "it is neither a regular file nor a block device"
        elif not self.is_device and kernel.get_file_system(fd) in kernel.PSEUDO:
            reason = "it is no file, but a part of the kernel that looks like one"
        else:
            return
        raise FileForbiddenError("Can't open {filename}: {reason}", filename=self.filename, reason=reason)

    def __del__(self) -> None:
        with suppress(FileError):
            self.close()

    def __enter__(self: F) -> F:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            # The number is free whatever close(2) says, and may be somebody else's file by the next time.
            fd, self.fd = self.fd, -1
            self.claims.fd = -1
            with translating("close", self.filename):
                os.close(fd)

    def info(self) -> FileInfo:
        """Size and identity of the file."""
        with translating("examine", self.filename):
            status = os.fstat(self.fd)
        if self.is_device:  # its contents change without a trace in its node: there is no time to compare
            mode = status.st_mode & MAX_MODE
            size = self.size()
            return FileInfo(True, size, file_id=identify(status), resizable=False, mode=mode, allocated=size)
        times = status.st_mtime_ns, status.st_ctime_ns
        has_holes = any(find_holes(self.fd, 0, status.st_size))
        settles_ms = -(-get_settling_time(*times, time.time_ns()) // 1_000_000)
        return FileInfo(
            True,
            status.st_size,
            *times,
            identify(status),
            mode=status.st_mode & MAX_MODE,
            grain=get_grain(self.fd) if has_holes or not hides_holes(self.fd, status.st_size) else 0,
            has_holes=has_holes,
            allocated=min(status.st_blocks * 512, status.st_size),
            settles_ms=settles_ms,
        )

    def size(self) -> int:
        """The size of the file in bytes."""
        with translating("examine", self.filename):
            return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else os.fstat(self.fd).st_size

    def clip(self, extent: Extent) -> Extent:
        """The part of an extent that lies within the file."""
        return Extent(extent.offset, max(0, min(extent.size, self.size() - extent.offset)))

    def holes(self, start: int, stop: int, grain: int = 1) -> Iterator[Extent]:
        """Find the holes in a part of the file, see :func:`.find_holes`. Behind its end there are none."""
        with translating("find the holes of", self.filename):
            if not self.is_device:
                yield from find_holes(self.fd, start, min(stop, self.size()), grain)

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """Find what isn't in a hole, in a part of the file."""
        with translating("find the holes of", self.filename):
            yield from [Extent(start, stop - start)] if self.is_device else find_extents(self.fd, start, stop)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a buffer from an offset. Returns how many bytes there were (fewer only at the end of the file)."""
        if offset < 0:  # to the kernel -1 is where the file was read last
            raise RangeError("An offset can't be negative: {offset}", offset=offset)
        try:
            done = count = os.preadv(self.fd, (view,), offset)
            while count and done < len(view):
                count = os.preadv(self.fd, (view[done:],), offset + done)
                done += count
        except OSError as e:
            raise FileError.from_os_error(e, "read", self.filename) from e
        return done

    @contextmanager
    def reading(self, extents: Sequence[Extent]) -> Iterator[None]:
        """Do what has to be done before extents are read and afterwards, however often they are read in between."""
        if self.flush and not self.is_device:  # a device tells no time
            with translating("write back the changed pages of", self.filename):
                for extent in extents:
                    kernel.write_back(self.fd, *extent)
        with pagecache.Visit(self.fd, self.filename, extents if self.drop else ()):
            yield

    def chunks(
        self, extents: Sequence[Extent], step: int = READ_SIZE, holes: Sequence[Extent] = ()
    ) -> Iterator[memoryview]:
        """
        Read extents.

        :param step: How large a chunk is, if that's less than :data:`.READ_SIZE`.
        :param holes: What is known to lie in holes, in ascending order: it isn't read.
        :returns: A generator of memory views, each of which is valid until the next one is asked for.
        :raises: :exc:`.FileError` when the file ends before an extent does, :exc:`.AbsentError` when nobody waits any
                 more (see :attr:`is_awaited`).
        """
        ahead, done = ReadAhead(self.fd, subtract(extents, holes) if holes else extents), 0
        step = min(step, READ_SIZE)
        with borrow_buffer() as buffer:
            # Between two chunks the other threads may wait for the interpreter lock, so little is done there.
            for offset, size in cut(extents, step):
                if self.is_awaited and not self.is_awaited():
                    raise AbsentError("Nobody waits for {filename} any more", filename=self.filename)
                ahead.advance(done)
                view = buffer[:size]
                if holes:
                    done += self._fill_around(view, offset, holes)
                else:
                    self._fill(view, offset)
                    done += size
                yield view

    def _fill_around(self, view: memoryview, offset: int, holes: Sequence[Extent]) -> int:
        """Fill a buffer from an offset, and tell how many bytes of it were read: in holes there are zeros."""
        chunk, count = Extent(offset, len(view)), 0
        for start, size in intersect(chunk, holes):
            view[start - offset : start - offset + size] = ZEROED[:size]
        for start, size in subtract([chunk], holes):
            self._fill(view[start - offset : start - offset + size], start)
            count += size
        return count

    def _fill(self, view: memoryview, offset: int) -> None:
        if self.read_into(view, offset) < len(view):
            raise self._too_short(offset + len(view))

    def send(self, sock: socket.socket, extents: Sequence[Extent], step: int = sys.maxsize) -> Iterator[int]:
        """
        Send extents, without a detour through this program where the file system can do that.

        :param step: How many bytes to send at a time, at most.
        :returns: A generator that sends a part of them at each step, and yields the size of that.
        :raises: :exc:`.FileError` when the file ends before that, :exc:`OSError` when the connection does, or when it
                 takes nothing for as long as its timeout allows.
        """
        ahead, done = ReadAhead(self.fd, extents), 0
        for extent in extents:
            ahead.advance(done)
            for size in self._send_extent(sock, extent, step):
                yield size
                done += size
                ahead.advance(done)

    def _send_extent(self, sock: socket.socket, extent: Extent, step: int) -> Iterator[int]:
        offset, size = extent
        while size:
            try:
                count = os.sendfile(sock.fileno(), self.fd, offset, min(size, step))
            except BlockingIOError:
                wait_for_room(sock)
                continue
            except (ConnectionError, TimeoutError):
                raise
            except OSError:  # if that's the fault of the file, this tells more
                for chunk in self.chunks([Extent(offset, size)], step):
                    send_all(sock, chunk)
                    yield len(chunk)
                return
            if not count:
                raise self._too_short(offset + size)
            yield count
            offset, size = offset + count, size - count

    def _too_short(self, size: int) -> FileError:
        return FileError(TOO_SHORT, filename=self.filename, offset=size)

    def digest(self, extents: Sequence[Extent]) -> str:
        """Compute the XXH128 digest of the bytes of some extents."""
        hasher = new_hasher()
        for chunk in self.chunks(extents):
            hasher.update(chunk)
        return hasher.hexdigest()
