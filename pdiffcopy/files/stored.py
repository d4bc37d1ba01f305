"""How is a part of a file passed on, and counted as it passes?"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

from pdiffcopy.blocks import Extent
from pdiffcopy.files.openfile import OpenFile
from pdiffcopy.files.sockets import full_packets, send_all, takes_plaintext
from pdiffcopy.files.splice import Chunk, Piped
from pdiffcopy.pace import UNLIMITED, Pace


class Sendable(ABC):
    """Chunks like any others, which can also be sent as a whole."""

    count: Callable[[int], object] = int
    """Is called with the size of each chunk when it has been consumed (by default nobody is told)."""

    @abstractmethod
    def __iter__(self) -> Iterator[Chunk]:
        """Yield them."""

    @abstractmethod
    def send(self, sock: socket.socket) -> None:
        """Send all of them through a socket, encrypted or not, see :meth:`OpenFile.send`."""


class Stored(Sendable):
    """Bytes in an open file."""

    def __init__(self, file: OpenFile, extents: Sequence[Extent], pace: Pace = UNLIMITED):
        """
        Initialize a chunk source.

        :param file: The file, which has to stay open.
        :param extents: Where the bytes are.
        :param pace: How fast they may pass.
        """
        self.file = file
        self.extents = extents
        self.pace = pace

    def __iter__(self) -> Iterator[memoryview]:
        for chunk in self.file.chunks(self.extents, self.pace.step):
            yield chunk
            self._pass(len(chunk))

    def _pass(self, size: int) -> None:
        self.count(size)
        self.pace.take(size)

    def send(self, sock: socket.socket) -> None:
        """See :meth:`Sendable.send`."""
        with full_packets(sock):
            # What a socket holds of a file by reference can't leave the page cache before it has arrived.
            if self.file.drop or not takes_plaintext(sock):
                for chunk in self:
                    send_all(sock, chunk)
                return
            for size in self.file.send(sock, self.extents, self.pace.step):
                self._pass(size)


class Joined(Sendable):
    """Several things, one after the other."""

    def __init__(self, parts: Sequence[Iterable[Chunk]]):
        """
        Initialize a chunk source.

        :param parts: Each is a :class:`Sendable`, or other chunks.
        """
        self.parts = parts

    def __iter__(self) -> Iterator[Chunk]:
        for part in self.parts:
            yield from counted(part, self.count)

    def send(self, sock: socket.socket) -> None:
        """See :meth:`Sendable.send`."""
        with full_packets(sock):
            for part in self.parts:
                chunks = counted(part, self.count)
                if isinstance(chunks, Sendable):
                    chunks.send(sock)
                    continue
                for chunk in chunks:
                    send_all(sock, bytes(chunk) if isinstance(chunk, Piped) else chunk)


def counted(chunks: Iterable[Chunk], count: Callable[[int], object]) -> Iterable[Chunk]:
    """
    Pass chunks on, and tell how many bytes have passed.

    :param count: Is called with the size of each chunk when it has been consumed.
    """
    if isinstance(chunks, Sendable):  # which may be sent as a whole
        chunks.count = count
        return chunks
    return _counted(chunks, count)


def _counted(chunks: Iterable[Chunk], count: Callable[[int], object]) -> Iterator[Chunk]:
    for chunk in chunks:
        size = len(chunk)  # it's less when some of it has been consumed
        yield chunk
        count(size)
