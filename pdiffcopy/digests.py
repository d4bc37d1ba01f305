"""
What do two sides state about octets, to find out whether they are the same?

An XXH128 digest (https://github.com/Cyan4973/xxHash), most significant digit first: either of the octets, or
*blockwise*, of the XXH128 digests of their blocks. A side that has just compared these blocks knows the latter without
reading anything again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash


class BlockwiseHasher:
    """Digests octets by way of the digests of their blocks."""

    def __init__(self, block_size: int):
        """:param block_size: How many octets a block has (the last one may be shorter)."""
        self.block_size = self.room = block_size
        self.block, self.digests = xxhash.xxh3_128(), xxhash.xxh3_128()

    def update(self, chunk: memoryview) -> None:
        """Go on with some octets, cut anywhere."""
        while len(chunk):
            piece, chunk = chunk[: self.room], chunk[self.room :]
            self.block.update(piece)
            self.room -= len(piece)
            if not self.room:
                self._end_block()

    def hexdigest(self) -> str:
        """What :func:`digest_blockwise` makes of the digests of the blocks. Nothing may be added after that."""
        if self.room < self.block_size:
            self._end_block()
        return self.digests.hexdigest()

    def _end_block(self) -> None:
        self.digests.update(self.block.hexdigest().encode("ascii"))
        self.block.reset()
        self.room = self.block_size


def get_verifier(block_size: int) -> Any:
    """
    Make a hash object for what was transferred.

    :param block_size: The size of the blocks of a blockwise digest (in bytes), 0 for a digest of the octets themselves.
    """
    return BlockwiseHasher(block_size) if block_size else xxhash.xxh3_128()


def digest_blockwise(digests: Iterable[str]) -> str:
    """The XXH128 digest of the hexadecimal digests of some blocks, in the order of the blocks."""
    return xxhash.xxh3_128_hexdigest("".join(digests).encode("ascii"))
