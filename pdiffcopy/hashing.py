"""
How are the blocks of a file hashed on many cores?

By threads: hashlib, xxhash and blake3 let go of the interpreter lock while they work on more than a few KiB, and so
does the reading of a file, so threads keep all cores busy without the cost of starting processes and of passing
digests between them, and a server that runs threads anyway must not fork (docs/design.rst has the measurements).

A task is a *stripe*, several MiB of neighboring blocks: a single block would be too little work between two
struggles for the interpreter lock. The tasks run ahead of the reader by a fixed number of stripes and their results
come in the order of the file, so memory stays flat and no core idles at the end because of a fixed split of the work.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, TimeoutError
from itertools import chain, islice
from typing import Any, TypeVar

from pdiffcopy.blocks import BlockDigest, Extent, Hole, align, find_layout
from pdiffcopy.digests import digest_layout
from pdiffcopy.exceptions import BusyError, UsageError, describe_error
from pdiffcopy.files.buffers import READ_SIZE
from pdiffcopy.files.openfile import OpenFile
from pdiffcopy.methods import get_hasher

STRIPE_SIZE = 32 * 1024 * 1024
"""How many bytes a thread hashes in one go at most (but at least one block)."""

_Found = list[BlockDigest | Hole]
"""What is known of neighboring blocks."""

STRIPE_BLOCKS = 4096
"""How many blocks a stripe has at most: a client that asks for tiny blocks can't fill the memory with digests."""
LEAST_BLOCKS = 256
"""How many it has at most where others have filled their share of the memory."""

HEARTBEAT = 5.0
"""After how many seconds somebody who waits for a slow disk gets a sign of life."""


def compute_hashes(filename: str, block_size: int, method: str, concurrency: int) -> Iterator[tuple[int, str]]:
    """
    Compute checksums of a file in blocks (parallel).

    :param filename: The name of the file (a string).
    :param block_size: The size of a block in bytes (an integer).
    :param method: The name of the hash method, see :func:`.get_hasher`.
    :param concurrency: How many threads hash at the same time (an integer).
    :returns: A generator of tuples with two values each: the byte offset of a block (an integer) and the hexadecimal
              digest of that block (a string). They come in the order of the file, as they become known.
    """
    get_hasher(method)
    with OpenFile(filename) as file, Hashers(concurrency) as hashers:
        for stripe in hashers.hash(file, 0, file.size(), block_size, method):
            yield from (item for item in stripe if isinstance(item, BlockDigest))


def hash_worker(offset: int, block_size: int, filename: str, method: str) -> tuple[int, str]:
    """
    Compute the checksum of one block.

    :returns: A tuple of the offset (an integer) and the hexadecimal digest (a string) of what the file has there,
              which is nothing behind its end.
    """
    hasher = get_hasher(method)()
    with OpenFile(filename) as file:
        for chunk in file.chunks([file.clip(Extent(offset, block_size))]):
            hasher.update(chunk)
    return offset, hasher.hexdigest()


class Budget:
    """
    How many digests may wait for their readers, in all streams together.

    A stream that gets nothing of it goes on with one small stripe at a time, so however many slow readers there are,
    they cost little memory, and none of them waits for another one.
    """

    def __init__(self, limit: float = math.inf):
        """:param limit: The number of digests (by default there's no limit)."""
        self._left = limit
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take a part of what is left, if that's enough."""
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give(self, count: int) -> None:
        """Give it back."""
        with self._lock:
            self._left += count


T = TypeVar("T")


class _Here(Executor):
    """Does what is submitted in the thread that submits it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """Do it now."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **options))
        except Exception as e:
            future.set_exception(e)
        return future


def submit(executor: Executor, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """
    Give an executor something to do.

    :raises: :exc:`.BusyError` when no more threads can be started.
    """
    try:
        return executor.submit(function, *arguments)
    except RuntimeError as e:
        raise BusyError(describe_error(e)) from e


class Hashers:
    """Threads that hash, for one reader or for many (a context manager)."""

    def __init__(self, threads: int, budget: Budget | None = None):
        """
        Initialize them. They start when there is something to do, so this may be done before a fork.

        :param threads: How many there are (0: who reads hashes, too, which is best where others do at the same time).
        :param budget: How many digests may wait for all readers together (by default as many as there are).
        """
        self.threads = threads
        self.budget = budget or Budget()
        self.executor = ThreadPoolExecutor(threads, "hash") if threads else _Here()
        self.streams: set[_Stripes] = set()

    def __enter__(self) -> Hashers:
        """Nothing to prepare."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """End the threads."""
        self.executor.shutdown()

    def hash(
        self, file: OpenFile, start: int, stop: int, block_size: int, method: str, concurrency: int = 0, grain: int = 0
    ) -> Generator[list[BlockDigest | Hole], None, None]:
        """
        Hash a part of an open file.

        :param start: Where to begin, a multiple of the block size.
        :param stop: Where the last block ends, whole or not.
        :param concurrency: How many threads to keep busy (by default all).
        :param grain: See :meth:`.Replica.hashes`.
        :returns: A generator of lists of neighboring blocks, in order. It yields an empty list when that takes longer
                  than :data:`HEARTBEAT`.
        """
        if block_size < 1:
            raise UsageError("A block has at least one byte, not {block_size}", block_size=block_size)
        stripes = _Stripes(self, file, start, stop, block_size, get_hasher(method), grain)
        most = 2 * min(concurrency or self.threads, self.threads) + 1
        self.streams.add(stripes)
        try:
            while stripes.submit(most):
                yield from _await(stripes.pending[0][0])
                self.budget.give(stripes.pending.popleft()[1])
        finally:
            self.streams.remove(stripes)
            stripes.cancel()

    def digest(self, file: OpenFile, extents: Sequence[Extent], size: int, method: str) -> list[str]:
        """Digest the pieces of some extents of an open file, see :meth:`.Replica.pieces`, in one of the threads."""
        return submit(self.executor, _digest_pieces, file, extents, size, get_hasher(method)).result()


def _digest_pieces(file: OpenFile, extents: Sequence[Extent], size: int, new_hasher: Callable[..., Any]) -> list[str]:
    with file.reading(extents):
        return [digest for chunk in file.chunks(extents) for digest in _digest_parts(chunk, size, new_hasher)]


def _digest_parts(chunk: memoryview, size: int, new_hasher: Callable[..., Any]) -> list[str]:
    return [new_hasher(chunk[cut : cut + size]).hexdigest() for cut in range(0, len(chunk), size)]


class _Stripes:
    """The stripes of one file that are being hashed."""

    def __init__(
        self,
        hashers: Hashers,
        file: OpenFile,
        start: int,
        stop: int,
        block_size: int,
        new_hasher: Callable[[], Any],
        grain: int,
    ):
        self.hashers, self.file, self.block_size, self.new_hasher = hashers, file, block_size, new_hasher
        self.grain = grain
        self.begin = self.position = start
        self.stop = stop
        self.dense = Extent(start, 0 if grain else stop - start)
        """Where no hole is that matters, as far as that's known: to look for one may take as long as to hash it all."""
        self.pending: deque[tuple[Future[_Found], int]] = deque()
        """Their results, and how much of the budget they have taken."""

    def submit(self, most: int) -> bool:
        """Submit as many as may wait (at least one), and tell whether there are any."""
        while self.position < self.stop and len(self.pending) < most:
            blocks = taken = self._count_blocks(most - 1)
            hole = self._find_hole(self.position + blocks * self.block_size)
            if hole.offset == self.position:
                self._append_hole(hole)
                continue
            if not self.hashers.budget.take(blocks):
                if self.pending:
                    break
                blocks, taken = min(blocks, LEAST_BLOCKS), 0
            end = min(self.position + blocks * self.block_size, hole.offset)
            grain = 0 if self._is_dense(end) else self.grain
            words = self.file, self.position, end, self.block_size, self.new_hasher, grain
            try:
                self.pending.append((submit(self.hashers.executor, _hash_stripe, *words), taken))
            except BusyError:
                self.hashers.budget.give(taken)
                raise
            self.position = end
        return bool(self.pending)

    def _find_hole(self, limit: int) -> Hole:
        """
        Find the next run of blocks that lie in a hole.

        :param limit: Where to stop looking: a file may have more holes than can be counted in a moment.
        :returns: The run (one of no size where the search has ended, or where the file does).
        """
        limit, data = min(limit, self.stop), self.position
        if self._is_dense(limit):
            return Hole(limit, 0)
        for hole in chain(self.file.holes(self.position, self.stop), [Extent(self.stop, 0)]):
            if hole.offset >= limit:
                self.dense = Extent(data, hole.offset - data)
                break
            if run := align(hole, self.block_size, self.stop):
                return Hole(*run)
            data = sum(hole)
        return Hole(limit, 0)

    def _is_dense(self, end: int) -> bool:
        return self.dense.offset <= self.position and end <= sum(self.dense)

    def _append_hole(self, hole: Hole) -> None:
        found: _Found = [hole]
        self.pending.append((_Here().submit(lambda: found), 0))
        self.position += hole.size

    def _count_blocks(self, share: int) -> int:
        """
        Count the blocks of the next stripe.

        Small stripes come first: a reader waits for them, and they keep several threads busy with a small file. Where
        there are several files the threads are busy anyway, and handing over each stripe takes them some time.
        """
        least = STRIPE_SIZE // 8 if len(self.hashers.streams) == 1 else STRIPE_SIZE
        size = min(STRIPE_SIZE, max(least, (self.position - self.begin) // max(share, 1)))
        return min(max(size // self.block_size, 1), STRIPE_BLOCKS)

    def cancel(self) -> None:
        """Wait for what is being hashed: the file may not be closed under the hands of a thread."""
        for future in [future for future, _ in self.pending if not future.cancel()]:
            future.exception()
        self.hashers.budget.give(sum(taken for _, taken in self.pending))


def _await(future: Future[_Found]) -> Iterator[_Found]:
    while True:
        try:
            future.exception(HEARTBEAT)  # waits for the end, however that is
            break
        except TimeoutError:
            yield []
    yield future.result()


def _hash_stripe(
    file: OpenFile, start: int, stop: int, block_size: int, new_hasher: Callable[[], Any], grain: int
) -> _Found:
    # Several small blocks are read at once, a large block in several chunks.
    run = max(READ_SIZE // block_size, 1) * block_size
    extents = [Extent(offset, min(run, stop - offset)) for offset in range(start, stop, run)]
    holes = list(file.holes(start, stop)) if grain else []
    found: _Found = []
    with file.reading([Extent(start, stop - start)]):
        chunks = file.chunks(extents, holes=holes)
        digests = chain.from_iterable(_digest_blocks(chunks, extent.size, block_size, new_hasher) for extent in extents)
        for offset, digest in zip(range(start, stop, block_size), digests, strict=True):
            if holes:
                block = Extent(offset, min(block_size, stop - offset))
                digest += _tell_layout(block, holes, block_size, grain)
            found.append(BlockDigest(offset, digest))
    return found


def _digest_blocks(
    chunks: Iterator[memoryview], size: int, block_size: int, new_hasher: Callable[..., Any]
) -> list[str]:
    """Digest the blocks of the next extent (of this size): one large block, or all that come in one chunk."""
    if block_size <= READ_SIZE:
        return _digest_parts(next(chunks), block_size, new_hasher)
    hasher = new_hasher()
    for chunk in islice(chunks, -(-size // READ_SIZE)):
        hasher.update(chunk)
    return [hasher.hexdigest()]


def _tell_layout(block: Extent, holes: Sequence[Extent], block_size: int, grain: int) -> str:
    """A dot and a digest of where a block has holes, if it has some."""
    layout = find_layout(block, holes, block_size, grain)
    return f".{digest_layout(layout)}" if layout else ""
