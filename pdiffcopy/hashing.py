"""
How are the blocks of a file hashed on many cores?

By threads: hashlib, xxhash and blake3 let go of the interpreter lock while they work on more than a few KiB, and so
does the reading of a file, so threads keep all cores busy without the cost of starting processes and of passing
digests between them, and a server that runs threads anyway must not fork (docs/design.rst has the measurements).

A task is a *stripe*, several MiB of neighbouring blocks: a single block would be too little work between two
struggles for the interpreter lock. The tasks run ahead of the reader by a fixed number of stripes and their results
come in the order of the file, so memory stays flat and no core idles at the end because of a fixed split of the work.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, TimeoutError
from functools import cache, lru_cache, partial
from typing import Any

import xxhash

from pdiffcopy.exceptions import UsageError
from pdiffcopy.localfile import CHUNK_SIZE, LocalFile
from pdiffcopy.protocol import BlockDigest, Extent

STRIPE_SIZE = 16 * 1024 * 1024
"""How many bytes a thread hashes in one go (at least one block)."""

STRIPE_BLOCKS = 4096
"""How many blocks a stripe has at most: who asks for tiny blocks doesn't get to fill the memory with digests."""
LEAST_BLOCKS = 256
"""How many it has at most where others have filled their share of the memory."""

HEARTBEAT = 5.0
"""After how many seconds somebody who waits for a slow disk gets a sign of life."""


def compute_hashes(filename: str, block_size: int, method: str, concurrency: int) -> Iterator[tuple[int, str]]:
    """
    Compute checksums of a file in blocks (parallel).

    :param filename: The name of the file (a string).
    :param block_size: The size of a block in bytes (an integer).
    :param method: The name of the hash method, see :func:`get_hasher`.
    :param concurrency: How many threads hash at the same time (an integer).
    :returns: A generator of tuples with two values each: the byte offset of a block (an integer) and the hexadecimal
              digest of that block (a string). They come in the order of the file, as they become known.
    """
    get_hasher(method)
    with LocalFile(filename) as file, ThreadPoolExecutor(concurrency) as executor:
        for stripe in hash_stripes(file, 0, file.size(), block_size, method, executor, concurrency):
            yield from stripe


def hash_worker(offset: int, block_size: int, filename: str, method: str) -> tuple[int, str]:
    """
    Compute the checksum of one block.

    :returns: A tuple of the offset (an integer) and the hexadecimal digest (a string) of what the file has there,
              which is nothing behind its end.
    """
    hasher = get_hasher(method)()
    with LocalFile(filename) as file:
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


def hash_stripes(
    file: LocalFile,
    start: int,
    stop: int,
    block_size: int,
    method: str,
    executor: Executor,
    concurrency: int,
    budget: Budget | None = None,
) -> Generator[list[BlockDigest], None, None]:
    """
    Hash a part of an open file.

    :param start: Where to begin, a multiple of the block size.
    :param stop: Where the last block ends, whole or not.
    :param executor: Whose threads do the work.
    :param concurrency: How many of them to keep busy.
    :param budget: How many digests may wait (by default as many as there are).
    :returns: A generator of lists of neighbouring blocks, in order. It yields an empty list when that takes longer than
              :data:`HEARTBEAT`.
    """
    if block_size < 1:
        raise UsageError("A block has at least one byte, not {block_size}", block_size=block_size)
    new_hasher, begin, budget = get_hasher(method), start, budget or Budget()
    pending: deque[tuple[Future[list[BlockDigest]], int]] = deque()
    try:
        while start < stop or pending:
            if start < stop and len(pending) <= 2 * concurrency:
                # Small stripes come first: somebody waits for them, and a small file is to keep all threads busy.
                share = min(STRIPE_SIZE, max(STRIPE_SIZE // 16, (start - begin) // (2 * concurrency)))
                blocks = taken = min(max(share // block_size, 1), STRIPE_BLOCKS)
                if not budget.take(blocks):
                    blocks, taken = min(blocks, LEAST_BLOCKS), 0
                if taken or not pending:
                    end = min(start + blocks * block_size, stop)
                    pending.append((executor.submit(_hash_stripe, file, start, end, block_size, new_hasher), taken))
                    start = end
                    continue
            yield from _await(pending[0][0])
            budget.give(pending.popleft()[1])
    finally:
        # Nobody may close the file under the hands of a thread.
        for future in [future for future, _ in pending if not future.cancel()]:
            future.exception()
        budget.give(sum(taken for _, taken in pending))


def _await(future: Future[list[BlockDigest]]) -> Iterator[list[BlockDigest]]:
    while True:
        try:
            future.exception(HEARTBEAT)  # waits for the end, however that is
            break
        except TimeoutError:
            yield []
    yield future.result()


def _hash_stripe(
    file: LocalFile, start: int, stop: int, block_size: int, new_hasher: Callable[[], Any]
) -> list[BlockDigest]:
    # Several small blocks are read at once, a large block in several chunks.
    run = max(CHUNK_SIZE // block_size, 1) * block_size
    extents = [Extent(offset, min(run, stop - offset)) for offset in range(start, stop, run)]
    digests, hasher, position = [], new_hasher(), start
    file.prepare([Extent(start, stop - start)])
    for chunk in file.chunks(extents):
        for cut in range(0, len(chunk), block_size):
            piece = chunk[cut : cut + block_size]
            hasher.update(piece)
            position += len(piece)
            if position % block_size == 0 or position == stop:
                digests.append(BlockDigest((position - 1) // block_size * block_size, hasher.hexdigest()))
                hasher = new_hasher()
    return digests


def get_hasher(method: str) -> Callable[[], Any]:
    """
    Find a hash method.

    :param method: ``xxh128``, ``blake3`` or a fixed-length method of :mod:`hashlib`.
    :returns: A function that makes objects with the methods ``update()`` and ``hexdigest()``.
    :raises: :exc:`.UsageError` when there is no such method here.
    """
    hasher = _find_hasher(method)
    if not hasher:
        methods = ", ".join(sorted(get_methods()))
        raise UsageError("There is no hash method {method} here: try one of {methods}", method=method, methods=methods)
    return hasher


@cache
def get_methods() -> frozenset[str]:
    """The names of all hash methods that work here."""
    return frozenset(filter(_find_hasher, {"xxh128", "blake3"} | hashlib.algorithms_available))


@lru_cache(maxsize=256)
def _find_hasher(method: str) -> Callable[[], Any] | None:
    if method == "xxh128":
        return xxhash.xxh3_128
    if method == "blake3":
        from blake3 import blake3

        return blake3
    try:
        # A method of variable length (SHAKE) has no digest size, and one that the policy of the system forbids fails.
        if hashlib.new(method, usedforsecurity=False).digest_size:
            return partial(hashlib.new, method, usedforsecurity=False)
    except (ValueError, TypeError):  # the latter for a NUL byte or what isn't UTF-8
        pass
    return None
