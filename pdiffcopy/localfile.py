"""
What can be done with an open file of this machine?

A file is a regular file or a block device. Anything else (a folder, a FIFO, a terminal, a socket) is refused before
it is opened, so that opening it can't block or have side effects, and once more afterwards, in case it was swapped.
Whatever the operating system refuses is a :exc:`.FileError` that names the file.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import Any

import xxhash

from pdiffcopy import kernel
from pdiffcopy.digests import get_verifier
from pdiffcopy.exceptions import (
    AbsentError,
    DigestMismatchError,
    FileError,
    FileForbiddenError,
    RangeError,
    ReplacedError,
    TakenOverError,
)
from pdiffcopy.protocol import MAX_MODE, Extent, FileInfo
from pdiffcopy.splice import Chunk, Piped, spread, wait_for_room

CHUNK_SIZE = 256 * 1024
"""How many bytes are read and hashed (or written) at a time: few enough to stay in the cache of a core."""

LOCK_TIMEOUT = 20.0
"""How long to wait for the writes of others to end, in seconds."""
BUSY_TIMEOUT = 0.25
"""How long to wait for a device that is in use, in seconds."""

RUN_ATTRIBUTE = "user.pdiffcopy.run"
"""The extended attribute that tells which run may write to a file (xattr(7))."""
UNFLUSHED = " unflushed"
"""What follows the run from the beginning of a flush to its success: the page cache may have what the disk doesn't."""
_NO_ATTRIBUTES = frozenset([errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
"""How a file system without extended attributes refuses them, and how all of them do for a device."""

SHORT_TICK, LONG_TICK = 20_000_000, 2_000_000_000
"""How long two changes may bear the same time, in nanoseconds: the kernel's clock takes steps of up to 10 ms, and
times without fractions belong to a file system that counts seconds (ext4 with small inodes) or pairs of them (FAT)."""

_IDLE_BUFFERS = 16
_idle_buffers: list[mmap.mmap] = []


class Namespace:
    """How names become files: this one is the machine's own, :class:`.Root` confines them to a directory."""

    def open(self, filename: str, flags: int, mode: int = 0) -> int:
        """Open a file like :func:`os.open` does."""
        return os.open(filename, flags, mode)

    def make_folder(self, filename: str) -> None:
        """Make a folder like :func:`os.mkdir` does."""
        os.mkdir(filename)


MACHINE = Namespace()


class translating(AbstractContextManager[None]):
    """Turn an :exc:`OSError` into a :exc:`.FileError` that names the file and what was tried."""

    # A class, since a generator would take longer than the system call that it surrounds.

    def __init__(self, action: str, filename: str):
        """
        Initialize a context manager.

        :param action: What is tried (a verb).
        :param filename: With which file.
        """
        self.action = action
        self.filename = filename

    def __exit__(self, exc_type: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError):
            raise FileError.from_os_error(error, self.action, self.filename) from error


def reopen(path: int, flags: int) -> int:
    """Open what a descriptor of ``O_PATH`` stands for, which nobody can have exchanged meanwhile."""
    try:
        return os.open(f"/proc/self/fd/{path}", flags)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists("/proc/self/fd"):
            raise OSError(errno.ENOSYS, "/proc isn't mounted here, and pdiffcopy needs it") from e
        raise


class LocalFile:
    """An open regular file or block device (a context manager)."""

    fd = -1
    _is_free = False
    is_awaited: Callable[[], bool] | None = None
    """Tells whether somebody still waits for what is read (:data:`None`: somebody does)."""

    def __init__(
        self,
        filename: str,
        write: bool = False,
        namespace: Namespace = MACHINE,
        devices: bool = True,
        file_id: str = "",
        flush: bool = False,
    ):
        """
        Open a file.

        :param filename: The name of the file.
        :param write: Whether it's going to be written to (it can be read in any case).
        :param namespace: What the name means.
        :param devices: Whether a block device will do.
        :param file_id: Which file it has to be (see :class:`.FileInfo`, by default any).
        :param flush: Whether dirty pages are written back before they are read (see :func:`.kernel.write_back`).
        :raises: :exc:`.ReplacedError` when it's another file, :exc:`.FileError` when the operating system refuses.
        """
        self.filename = filename
        self.devices = devices
        self.flush = flush
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY
        with translating("open", filename):
            path = namespace.open(filename, os.O_PATH | os.O_CLOEXEC)
            try:
                status = os.fstat(path)
                self._check_type(status, path)
                # Before it's opened for writing, since an overlay makes another inode of it then.
                if file_id and file_id != identify(status):
                    raise ReplacedError("{filename} was replaced by another file, run again", filename=filename)
                self.fd = reopen(path, flags)
            finally:
                os.close(path)

    def _check_type(self, status: os.stat_result, fd: int) -> None:
        self.is_device = stat.S_ISBLK(status.st_mode)
        if self.is_device and not self.devices:
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

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            # The number is free whatever close(2) says, and may be somebody else's file by the next time.
            fd, self.fd = self.fd, -1
            with translating("close", self.filename):
                os.close(fd)

    def fileno(self) -> int:
        """The descriptor."""
        return self.fd

    def info(self) -> FileInfo:
        """Size and identity of the file."""
        with translating("examine", self.filename):
            status = os.fstat(self.fd)
        if self.is_device:  # its contents change without a trace in its node: there is no time to compare
            mode = status.st_mode & MAX_MODE
            return FileInfo(True, self.size(), file_id=identify(status), resizable=False, mode=mode)
        times = status.st_mtime_ns, status.st_ctime_ns
        settles_ms = -(-get_settling_time(*times, time.time_ns()) // 1_000_000)
        return FileInfo(
            True, status.st_size, *times, identify(status), mode=status.st_mode & MAX_MODE, settles_ms=settles_ms
        )

    def size(self) -> int:
        """The size of the file in bytes."""
        with translating("examine", self.filename):
            return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else os.fstat(self.fd).st_size

    def clip(self, extent: Extent) -> Extent:
        """The part of an extent that lies within the file."""
        return Extent(extent.offset, max(0, min(extent.size, self.size() - extent.offset)))

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a buffer from an offset. Returns how many bytes there were (fewer only at the end of the file)."""
        done = 0
        with translating("read", self.filename):
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], offset + done)
                if not count:
                    break
                done += count
        return done

    def prepare(self, extents: Iterable[Extent]) -> None:
        """Write back dirty pages of extents that are about to be read, if that is wanted (a device tells no time)."""
        if self.flush and not self.is_device:
            with translating("write back the changed pages of", self.filename):
                for extent in extents:
                    kernel.write_back(self.fd, *extent)

    def chunks(self, extents: Iterable[Extent]) -> Iterator[memoryview]:
        """
        Read extents.

        :returns: A generator of memory views, each of which is valid until the next one is asked for.
        :raises: :exc:`.FileError` when the file ends before an extent does, :exc:`.AbsentError` when nobody waits any
                 more (see :attr:`is_awaited`).
        """
        with _borrowed_buffer() as buffer:
            for offset, size in extents:
                for position in range(offset, offset + size, CHUNK_SIZE):
                    if self.is_awaited and not self.is_awaited():
                        raise AbsentError("Nobody waits for {filename} any more", filename=self.filename)
                    view = buffer[: min(CHUNK_SIZE, offset + size - position)]
                    self._fill(view, position)
                    yield view

    def _fill(self, view: memoryview, offset: int) -> None:
        if self.read_into(view, offset) < len(view):
            raise self._too_short(offset + len(view))

    def send(self, sock: socket.socket, extent: Extent) -> Iterator[int]:
        """
        Send an extent, without a detour through this program where the file system can do that.

        :returns: A generator that sends a part of it at each step, and yields the size of that.
        :raises: :exc:`.FileError` when the file ends before that, :exc:`OSError` when the connection does, or when it
                 takes nothing for as long as its timeout allows.
        """
        offset, size = extent
        while size:
            try:
                count = os.sendfile(sock.fileno(), self.fd, offset, size)
            except BlockingIOError:
                wait_for_room(sock)
                continue
            except (ConnectionError, TimeoutError):
                raise
            except OSError:  # if that's the fault of the file, this tells more
                for chunk in self.chunks([Extent(offset, size)]):
                    sock.sendall(chunk)
                    yield len(chunk)
                return
            if not count:
                raise self._too_short(offset + size)
            yield count
            offset, size = offset + count, size - count

    def _too_short(self, size: int) -> FileError:
        text = "Can't read {filename} up to offset {offset}: the file has become shorter, or never was that long"
        return FileError(text, filename=self.filename, offset=size)

    def digest(self, extents: Iterable[Extent]) -> str:
        """The XXH128 digest of the octets of some extents, as 32 hexadecimal digits."""
        hasher = xxhash.xxh3_128()
        self.prepare(extents)
        for chunk in self.chunks(extents):
            hasher.update(chunk)
        return hasher.hexdigest()

    def write(
        self, extents: Sequence[Extent], chunks: Iterable[Chunk], digest: str = "", run: str = "", block_size: int = 0
    ) -> None:
        """
        Write octets into extents, and check what lies there afterwards.

        :param extents: Where the octets belong, one extent after the other.
        :param chunks: The octets, cut anywhere, exactly as many as the extents take.
        :param digest: The XXH128 digest that the sender states (an empty string: there's nothing to check against).
        :param run: The run that has claimed the file (an empty string: none has).
        :param block_size: The size of the blocks if that's a blockwise digest (see :mod:`.digests`), otherwise 0.
        :raises: :exc:`.DigestMismatchError` when the digest of the file's contents differs,
                 :exc:`.TakenOverError` when another run has claimed the file,
                 :exc:`.RangeError` when it has become too short for the run.
        """
        hasher = get_verifier(block_size) if digest else None
        for offset, piece in spread(extents, chunks):
            # Not around all of it: a sender that stalls must not keep another run from claiming the file.
            with self.writing(run):
                if run and offset + len(piece) > self.size():
                    # A run makes room first. To write here would make a hole of what somebody has cut off meanwhile.
                    text = "Can't write to {filename} up to offset {offset}: somebody has cut it meanwhile"
                    raise RangeError(text, filename=self.filename, offset=offset + len(piece))
                self._write_piece(offset, piece, hasher)
        if hasher and hasher.hexdigest() != digest:
            text = "What lies in {filename} at offset {offset} isn't what was sent"
            raise DigestMismatchError(text, filename=self.filename, offset=extents[0].offset)

    def _write_piece(self, offset: int, piece: memoryview | Piped, hasher: Any) -> None:
        """Write octets, and read them back chunk by chunk: each is still in the cache of this core."""
        if not hasher:
            self._write_at(offset, piece)
            return
        with _borrowed_buffer() as buffer:
            while size := min(len(piece), CHUNK_SIZE):
                part, piece = piece[:size], piece[size:]
                self._write_at(offset, part)
                self._fill(buffer[:size], offset)
                hasher.update(buffer[:size])
                offset += size

    def _write_at(self, offset: int, piece: memoryview | Piped) -> None:
        with translating("write to", self.filename):
            if isinstance(piece, Piped):
                piece.move_to(self.fd, offset)
                return
            while len(piece):
                count = os.pwrite(self.fd, piece, offset)
                piece, offset = piece[count:], offset + count

    def claim(self, run: str) -> bool:
        """
        Let one run write to the file, and no earlier one any more.

        The claim is an extended attribute, so it holds for whoever writes through pdiffcopy, on this machine or
        elsewhere. It waits for writes in progress, so that they are over before the new run compares anything.

        :returns: :data:`False` for a device, and where a file system has no such attributes.
        :raises: :exc:`.FileError` when the claim, or the page cache after a flush that failed, can't be had.
        """
        doubtful = self._get_claim().endswith(UNFLUSHED)
        name = run + UNFLUSHED * doubtful
        self._check_free()
        # First without the lock, which many writers of an earlier run, taking turns, would never leave alone: that ends
        # them. Then with it, since that run may have come to its end, and taken our name for its own.
        if not self._set_claim(name):
            return False
        with self._locked(fcntl.LOCK_EX):
            self._set_claim(name)
            if doubtful:
                self._forget()
                self._set_claim(run)
        return True

    def _check_free(self) -> None:
        """Refuse a device that is mounted or in use otherwise, before anything is written."""
        if not self.is_device or self._is_free:
            return
        deadline = time.monotonic() + BUSY_TIMEOUT
        while not self._try_exclusive():
            if time.monotonic() > deadline:
                text = "Can't write to {filename}: it is mounted, or another program uses it"
                raise FileForbiddenError(text, filename=self.filename)
            time.sleep(0.01)  # somebody else may just be looking
        self._is_free = True

    def _try_exclusive(self) -> bool:
        """Open a device as nobody can who has it mounted, nor two at a time (open(2), ``O_EXCL``)."""
        try:
            os.close(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            return True
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise FileError.from_os_error(e, "claim", self.filename) from e
            return False

    def _get_claim(self) -> str:
        try:
            return os.getxattr(self.fd, RUN_ATTRIBUTE).decode("ascii", "replace")
        except OSError:
            return ""

    def _set_claim(self, claim: str) -> bool:
        try:
            os.setxattr(self.fd, RUN_ATTRIBUTE, claim.encode("ascii"))
            return True
        except OSError as e:
            if e.errno in _NO_ATTRIBUTES:
                return False
            raise FileError.from_os_error(e, "claim", self.filename) from e

    def release(self, run: str) -> None:
        """End a claim. That it has been ended before, or is another run's by now, is no error."""
        with self._locked(fcntl.LOCK_EX):
            if self._claimed_by() == run:
                with suppress(OSError):
                    os.removexattr(self.fd, RUN_ATTRIBUTE)

    def check_claim(self, run: str) -> None:
        """
        Find out whether nobody has been here since a run has claimed the file.

        :param run: The run (an empty string: there's nothing to find out).
        :raises: :exc:`.TakenOverError` when a later run has, even if it has come and gone.
        """
        if run and self._claimed_by() != run:
            raise TakenOverError("Can't write to {filename}: another run has taken it over", filename=self.filename)

    def _claimed_by(self) -> str:
        return self._get_claim().removesuffix(UNFLUSHED)

    def _forget(self) -> None:
        """Let the page cache forget the file, so that it's read from the disk again."""
        with suppress(OSError):  # what can't be written stays dirty, and is found below
            kernel.write_back(self.fd, 0, 0)
        with translating("drop the cached pages of", self.filename):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            cached = kernel.count_cached_pages(self.fd, self.size())
        if cached:
            text = (
                "A flush of {filename} failed, and {cached} pages in memory can't be compared with the disk: "
                "end the programs that have it mapped, or restart the machine"
            )
            raise FileError(text, filename=self.filename, cached=cached)

    @contextmanager
    def writing(self, run: str) -> Iterator[None]:
        """
        Make sure that nobody claims the file meanwhile.

        :param run: The run that has claimed the file (an empty string: none has).
        :raises: :exc:`.TakenOverError` when a later run has.
        """
        self._check_free()
        with self._locked(fcntl.LOCK_SH):
            self.check_claim(run)
            yield

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_TIMEOUT
        with suppress(OSError):  # a network file system may not have locks
            while not self._try_lock(kind):
                if time.monotonic() > deadline:
                    raise TakenOverError("Can't write to {filename}: others keep writing to it", filename=self.filename)
                time.sleep(0.02)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _try_lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def resize(self, size: int) -> None:
        """Grow or cut the file. A device stays as it is, and has to be large enough."""
        if not self.is_device:
            with translating("resize", self.filename):
                os.ftruncate(self.fd, size)
        elif size > self.size():
            text = "Can't resize {filename} to {size} bytes: it is a block device and smaller than that"
            raise FileForbiddenError(text, filename=self.filename, size=size)

    def sync(self, run: str = "") -> None:
        """
        Flush the file to its disk.

        The kernel tells of a write that failed once, and shows what was to be written from then on. So the cache is
        dropped after a failure, and if anything ends before that, the next claim does it.

        :param run: The run that has claimed the file (an empty string: none has).
        """
        self._mark(run, UNFLUSHED)
        try:
            with translating("flush", self.filename):
                os.fsync(self.fd)
        except FileError:
            with suppress(FileError):
                self._forget()
            raise
        self._mark(run, "")

    def _mark(self, run: str, mark: str) -> None:
        if run:
            with self._locked(fcntl.LOCK_EX):
                self.check_claim(run)
                self._set_claim(run + mark)


def identify(status: os.stat_result) -> str:
    """
    What no other file has on any machine until it starts anew: device, inode, and the boot that they belong to.

    Each of several nodes of a block device has an inode of its own, so there it's the number of the device that counts.
    """
    number = f"{status.st_rdev:x}" if stat.S_ISBLK(status.st_mode) else f"{status.st_dev:x}:{status.st_ino:x}"
    return f"{number}@{_get_boot_id()}"


@cache
def _get_boot_id() -> str:
    """A random word that the kernel chooses when it starts (random(4))."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def get_settling_time(mtime_ns: int, ctime_ns: int, now_ns: int) -> int:
    """
    For how long another change of a file may bear the same time as the last one, in nanoseconds.

    What a user may have set to a time to come doesn't count, nor does a clock that was set back.
    """
    is_coarse = mtime_ns % 1_000_000_000 == ctime_ns % 1_000_000_000 == 0
    tick = LONG_TICK if is_coarse else SHORT_TICK
    latest = max((t for t in (mtime_ns, ctime_ns) if t <= now_ns + tick), default=0)
    return min(tick, max(0, latest + tick - now_ns))


class Stored:
    """Octets in an open file: chunks like any others, or sent as a whole."""

    def __init__(self, file: LocalFile, extents: Sequence[Extent]):
        """
        Initialize a chunk source.

        :param file: The file, which has to stay open.
        :param extents: Where the octets are.
        """
        self.file = file
        self.extents = extents
        self.count: Callable[[int], object] = int  # nobody is told

    def __iter__(self) -> Iterator[memoryview]:
        self.file.prepare(self.extents)
        for chunk in self.file.chunks(self.extents):
            yield chunk
            self.count(len(chunk))

    def send(self, sock: socket.socket) -> None:
        """Send all of them through a socket that isn't encrypted, see :meth:`LocalFile.send`."""
        self.file.prepare(self.extents)
        for extent in self.extents:
            for size in self.file.send(sock, extent):
                self.count(size)


def counted(chunks: Iterable[Chunk], count: Callable[[int], None]) -> Iterable[Chunk]:
    """
    Pass chunks on, and tell how many bytes have passed.

    :param count: Is called with the size of each chunk when it has been consumed.
    """
    if isinstance(chunks, Stored):  # which may be sent as a whole
        chunks.count = count
        return chunks
    return _counted(chunks, count)


def _counted(chunks: Iterable[Chunk], count: Callable[[int], None]) -> Iterator[Chunk]:
    for chunk in chunks:
        size = len(chunk)  # it's less when some of it has been consumed
        yield chunk
        count(size)


@contextmanager
def _borrowed_buffer() -> Iterator[memoryview]:
    """
    Lend a buffer of :data:`CHUNK_SIZE` bytes.

    It begins at a page: some processors take up to five times as long to fill a buffer that begins 16 bytes behind one,
    as those of Python's own objects do (docs/design.rst). New memory costs a page fault for each page, so a few buffers
    are kept. They are private, so a child process gets copies of its own.
    """
    try:
        buffer = _idle_buffers.pop()
    except IndexError:
        buffer = mmap.mmap(-1, CHUNK_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        yield memoryview(buffer)
    finally:
        if len(_idle_buffers) < _IDLE_BUFFERS:
            _idle_buffers.append(buffer)
