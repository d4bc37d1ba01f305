"""
Who may write to a file?

A *claim* is an extended attribute that names the run which may write (xattr(7)), so it holds for all that write through
pdiffcopy, on this machine or elsewhere. The invariants:

1. A run that has claimed a file is the only one that writes to it, until the next claim or its release.
2. Each piece is written under a shared lock, with the claim looked at under that lock; a claim is made under the
   exclusive one. So after a claim no earlier run writes anything more.
3. From the beginning of a flush to its success the claim is marked: the page cache may have what the disk doesn't. So
   it is after a write that failed while it was waited for.

A device can't carry a claim. It is refused when it is mounted or in use otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from pdiffcopy.exceptions import FileError, FileForbiddenError, ProgramError, TakenOverError, translating
from pdiffcopy.files import kernel

LOCK_TIMEOUT = 20.0
"""How long to wait for the writes of others to end, in seconds."""
_MEMORY = frozenset([0x01021994, 0x858458F6])
"""File systems without a disk: tmpfs and ramfs (linux/magic.h)."""
FORGET_ATTEMPTS = 5
"""How often the page cache is asked to forget a file: a page may be on its way to the disk, or an earlier error in the
way of the rest."""
BUSY_TIMEOUT = 0.25
"""How long to wait for a device that is in use, in seconds."""

RUN_ATTRIBUTE = "user.pdiffcopy.run"
"""The extended attribute that holds a claim."""
UNFLUSHED = " unflushed"
"""What follows the run while the file is being flushed, and after a flush that failed."""
_NO_ATTRIBUTES = frozenset([errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
"""How a file system without extended attributes refuses them, and how all of them do for a device."""


class Claims:
    """The claims on one open file."""

    _is_free = False

    def __init__(self, fd: int, filename: str, is_device: bool):
        """
        Initialize them.

        :param fd: The descriptor of the file, which has to stay open.
        :param filename: Its name, for messages.
        :param is_device: Whether it is a block device.
        """
        self.fd = fd
        self.filename = filename
        self.is_device = is_device

    def take(self, run: str) -> bool:
        """
        Let one run write to the file, and no earlier one any more.

        This waits for writes in progress, so that they are over before the new run compares anything.

        :returns: :data:`False` for a device, and where a file system has no such attributes.
        :raises: :exc:`.FileError` when the claim, or the page cache after a flush that failed, can't be had.
        """
        doubtful = self.is_doubtful()
        name = run + UNFLUSHED * doubtful
        self.check_free()
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

    def check_free(self) -> None:
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

    def is_doubtful(self) -> bool:
        """Whether the page cache may have what the disk doesn't: a flush failed, or was interrupted."""
        return (self.find() or "").endswith(UNFLUSHED)

    def find(self) -> str | None:
        """The run that has claimed the file (empty: none has; :data:`None`: it can't be claimed)."""
        try:
            return None if self.is_device else os.getxattr(self.fd, RUN_ATTRIBUTE).decode("ascii", "replace")
        except OSError as e:
            return None if e.errno in _NO_ATTRIBUTES else ""

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

    def check(self, run: str) -> None:
        """
        Find out whether nobody has been here since a run has claimed the file.

        :param run: The run (an empty string: there's nothing to find out).
        :raises: :exc:`.TakenOverError` when a later run has, even if it has come and gone.
        """
        if run and self._claimed_by() != run:
            raise TakenOverError("Can't write to {filename}: another run has taken it over", filename=self.filename)

    def _claimed_by(self) -> str:
        return (self.find() or "").removesuffix(UNFLUSHED)

    def _forget(self) -> None:
        """Let the page cache forget the file, so that it's read from the disk again (unless it's in memory only)."""
        if kernel.get_file_system(self.fd) in _MEMORY:
            return
        for _ in range(FORGET_ATTEMPTS):
            with suppress(OSError):  # what can't be written stays dirty, and is found below
                kernel.write_back(self.fd, 0, 0)
            with translating("drop the cached pages of", self.filename):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
                if not (cached := self._count_cached_pages()):
                    return
            time.sleep(0.02)
        text = (
            "A flush of {filename} failed, and what is in memory ({cached} pages) can't be compared with the disk: "
            "end the programs that have it mapped, or restart the machine"
        )
        raise FileError(text, filename=self.filename, cached=cached)

    def _count_cached_pages(self) -> int:
        try:
            return kernel.count_cached_pages(self.fd, os.fstat(self.fd).st_size)
        except OSError as e:
            if e.errno != errno.ENODEV:
                raise
            return 0  # what can't be mapped isn't cached (direct_io of FUSE)

    @contextmanager
    def writing(self, run: str) -> Iterator[None]:
        """
        Make sure that nobody claims the file meanwhile.

        :param run: The run that has claimed the file (an empty string: none has).
        :raises: :exc:`.TakenOverError` when a later run has.
        """
        self.check_free()
        with self._locked(fcntl.LOCK_SH):
            self.check(run)
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

    def alone(self) -> AbstractContextManager[None]:
        """Let nobody write to the file who does that under a claim."""
        return self._locked(fcntl.LOCK_EX)

    @contextmanager
    def ending(self, run: str) -> Iterator[None]:
        """
        End a claim, and let nobody make another one meanwhile.

        :raises: :exc:`.TakenOverError` when a later run has.
        """
        with self.alone():
            self.check(run)
            with suppress(OSError):
                os.removexattr(self.fd, RUN_ATTRIBUTE)
            yield

    def _try_lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def flush(self, run: str = "") -> None:
        """
        Flush the file to its disk, and remember if that failed.

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

    def doubt(self, run: str) -> None:
        """Remember that the page cache may have what the disk doesn't, so that the next claim drops it."""
        with suppress(ProgramError):
            self._mark(run, UNFLUSHED)

    def _mark(self, run: str, mark: str) -> None:
        if run:
            with self._locked(fcntl.LOCK_EX):
                self.check(run)
                self._set_claim(run + mark)
