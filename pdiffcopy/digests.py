"""
What do two sides state about bytes, to find out whether they are the same?

An XXH128 digest (https://github.com/Cyan4973/xxHash), most significant digit first, as 32 hexadecimal digits: either of
the bytes themselves, or *blockwise*, of the digests of their blocks, by whichever method. A side that has just compared
these blocks knows the blockwise digest without reading anything again.

XXH128 is chosen here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import xxhash

__all__ = ["METHOD", "BlockwiseHasher", "compute_digest", "digest_blockwise", "digest_layout", "new_hasher"]

METHOD = "xxh128"
"""The name of the hash method that compares blocks by the same digests."""

new_hasher = xxhash.xxh3_128
"""Makes objects with the methods ``update()``, ``hexdigest()`` and ``reset()``."""
compute_digest = xxhash.xxh3_128_hexdigest
"""Computes the digest of a buffer."""


class BlockwiseHasher:
    """Digests bytes by way of the digests of their blocks."""

    def __init__(self, block_size: int, new_block: Callable[[], Any] = new_hasher):
        """
        Initialize a hash object.

        :param block_size: How many bytes a block has (the last one may be shorter).
        :param new_block: Makes hash objects for the blocks.
        """
        self.block_size = self.room = block_size
        self.new_block = new_block
        self.block, self.digests = new_block(), new_hasher()

    def update(self, chunk: memoryview) -> None:
        """Go on with some bytes, cut anywhere."""
        while len(chunk):
            piece, chunk = chunk[: self.room], chunk[self.room :]
            self.block.update(piece)
            self.room -= len(piece)
            if not self.room:
                self._end_block()

    def hexdigest(self) -> str:
        """Return what :func:`digest_blockwise` makes of the digests of the blocks. This ends the last block."""
        if self.room < self.block_size:
            self._end_block()
        return self.digests.hexdigest()

    def _end_block(self) -> None:
        self.digests.update(self.block.hexdigest().encode("ascii"))
        self.block = self.new_block()
        self.room = self.block_size


def digest_layout(layout: str) -> str:
    """Compute the digest of where a block has holes (see :func:`.find_layout`), empty when it has none."""
    return compute_digest(layout.encode("ascii")) if layout else ""


def digest_blockwise(digests: Iterable[str]) -> str:
    """Compute the digest of the hexadecimal digests of some blocks, in the order of the blocks."""
    return compute_digest("".join(digests).encode("ascii"))
