"""
How do bytes get from a socket into a file without a detour through this program?

``splice(2)`` moves the pages of what was received into a pipe, and from there into the page cache: one copy instead
of two, and the lock of the file is held for half as long. What lies in the pipe travels as a chunk like any other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import GEN_SUSPENDED, getgeneratorstate

from pdiffcopy.blocks import Extent
from pdiffcopy.files import kernel

PIPE_SIZE = 1024 * 1024
"""How much a pipe holds if the system allows it (pipe(7): that's what a process may ask for by default)."""

PATIENCE = 0.25
"""For how long to collect what a slow wire brings, in seconds: each chunk takes system calls."""


class Piped:
    """Some bytes at the front of a pipe: a chunk that can be spliced into a file, or read as bytes, but only once."""

    def __init__(self, pipe: int, size: int):
        """
        Initialize a chunk.

        :param pipe: The reading end of the pipe.
        :param size: How many bytes of it belong to the chunk.
        """
        self.pipe = pipe
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice) -> Piped:
        """A part of the chunk. The parts have to be consumed in their order."""
        start, stop, _ = key.indices(self.size)
        return Piped(self.pipe, stop - start)

    def __bytes__(self) -> bytes:
        parts = []
        while self.size:
            parts.append(os.read(self.pipe, self.size))
            self.size -= len(parts[-1])
        return b"".join(parts)

    def move_to(self, fd: int, offset: int) -> None:
        """Write the bytes into a file."""
        while self.size:
            try:
                count = os.splice(self.pipe, fd, self.size, offset_dst=offset)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                # Not every file system can do this.
                data = os.read(self.pipe, self.size)
                count = len(data)
                while data:
                    written = os.pwrite(fd, data, offset + count - len(data))
                    data = data[written:]
            self.size -= count
            offset += count


Chunk = bytes | memoryview | Piped
"""Bytes on their way, cut anywhere."""


def spread(extents: Sequence[Extent], chunks: Iterable[Chunk]) -> Iterator[tuple[int, memoryview | Piped]]:
    """
    Find out where bytes belong.

    :param extents: The extents to fill, one after the other.
    :param chunks: The bytes, cut anywhere.
    :returns: A generator of tuples of an offset and the bytes that belong there.
    :raises: :exc:`ValueError` when there are more bytes than the extents take, or fewer.
    """
    remaining = list(reversed(extents))
    offset = room = 0
    for chunk in chunks:
        view = chunk if isinstance(chunk, Piped) else memoryview(chunk)
        while size := len(view):
            while not room:
                if not remaining:
                    raise ValueError("more bytes than the extents take")
                offset, room = remaining.pop()
            size = min(size, room)
            piece, view = view[:size], view[size:]
            yield offset, piece
            offset, room = offset + size, room - size
    if room or any(extent.size for extent in remaining):
        raise ValueError("fewer bytes than the extents take")


class PartsError(ValueError):
    """Raised when parts don't have the sizes that they should have."""


class Parts:
    """
    Cuts chunks into parts of certain sizes.

    They are consumed one after the other. What nobody has consumed of one is skipped by the next one: all of it, or the
    rest of it when its reader has failed halfway.
    """

    def __init__(self, chunks: Iterable[Chunk]):
        """:param chunks: The bytes, cut anywhere."""
        self._chunks = iter(chunks)
        self._piece: memoryview | Piped = memoryview(b"")
        """What was passed on last, and may have been consumed in part."""
        self._rest: memoryview | Piped = memoryview(b"")
        """What of the same chunk hasn't been passed on."""
        self._last: Generator[Chunk, None, None] | None = None

    def take(self, size: int) -> Generator[Chunk, None, None]:
        """
        Return the chunks of the next part.

        :raises: :exc:`PartsError` when there are fewer bytes.
        """
        self._last = self._take(size, self._last)
        return self._last

    def take_bytes(self, size: int) -> bytes:
        """Return the next part as one string of bytes, see :meth:`take`."""
        return b"".join(map(bytes, self.take(size)))

    def end(self) -> None:
        """
        Skip what was taken and not consumed, see :meth:`take`.

        :raises: :exc:`PartsError` also when there are more bytes than were taken.
        """
        self.take_bytes(0)
        if len(self._rest) or any(map(len, self._chunks)):
            raise PartsError("more bytes than the parts have")

    def _take(self, size: int, before: Generator[Chunk, None, None] | None) -> Generator[Chunk, None, None]:
        if before and getgeneratorstate(before) == GEN_SUSPENDED:
            self._drop_piece()
        for chunk in before or ():
            bytes(chunk)
        while size:
            if not len(self._rest):
                following = next(self._chunks, None)
                if following is None:
                    raise PartsError("fewer bytes than the parts have")
                self._rest = following if isinstance(following, Piped) else memoryview(following)
                continue
            count = min(size, len(self._rest))
            self._piece, self._rest = self._rest[:count], self._rest[count:]
            yield self._piece
            size -= count

    def _drop_piece(self) -> None:
        """
        Throw away what its reader has left of a piece when it failed.

        What lies in memory needs no care. A piece in a pipe was cut by its reader, and moved in steps of which the last
        one may have been done in part, so only the pipe knows how much is left: that, and what follows in its chunk.
        """
        if isinstance(self._piece, Piped):
            left = kernel.count_unread(self._piece.pipe) - len(self._rest)
            bytes(Piped(self._piece.pipe, left))


def receive(sock: int, size: int, timeout: float | None = None, step: int = PIPE_SIZE) -> Iterator[Piped]:
    """
    Receive bytes into a pipe.

    :param sock: The descriptor of a stream socket that isn't encrypted.
    :param size: How many bytes to receive.
    :param timeout: How long to wait for some of them, in seconds (by default as long as it takes).
    :param step: How many of them a chunk has at most.
    :returns: A generator of chunks, each of which has to be consumed before the next one is asked for.
    :raises: :exc:`OSError` when the connection ends early or nothing arrives for too long.
    """
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        with suppress(OSError):  # more than the system allows: the default size will do
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        with _watching(sock) as connection:
            while size:
                held = _fill(connection, sink, min(size, step, PIPE_SIZE), timeout)
                yield Piped(source, held)
                size -= held
    finally:
        os.close(source)
        os.close(sink)


@contextmanager
def _watching(sock: int) -> Iterator[socket.socket]:
    """Lend a socket that :func:`_wait_for` can be called with, and leave it open and as it was."""
    connection = socket.socket(fileno=sock)
    try:
        yield connection
    finally:
        with suppress(OSError):  # it may have been closed meanwhile
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        connection.detach()


def _fill(connection: socket.socket, sink: int, most: int, timeout: float | None) -> int:
    """Fill a pipe until patience or its room is at an end (which depends on how the bytes were cut)."""
    held, is_waiting = 0, True
    while held < most and is_waiting:
        try:
            is_waiting = _wait_for(connection, most - held, PATIENCE)
            if not (is_waiting or _wait_for(connection, 1, 0 if held else timeout)):
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            count = os.splice(connection.fileno(), sink, most - held, flags=os.SPLICE_F_NONBLOCK)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "The connection was closed early")
        except OSError:
            # What has left the socket has to be handed over. Then there's room again, or the error comes again.
            if held:
                return held
            raise
        held += count
    return held


def _wait_for(connection: socket.socket, size: int, timeout: float | None) -> bool:
    """Sleep until so many bytes have arrived, or no more will: the kernel counts (socket(7), SO_RCVLOWAT)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout and timeout * 1000))
