"""Digests of bytes, and digests of the digests of their blocks."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.digests import BlockwiseHasher, digest_blockwise
from tests.support import make_data


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(data=st.binary(max_size=100), block_size=st.integers(1, 40), chunk_size=st.integers(1, 50))
def test_chunks_may_be_cut_anywhere(data, block_size, chunk_size):
    """However the bytes arrive, their digest is that of the digests of their blocks."""
    hasher = BlockwiseHasher(block_size)
    for chunk in cut(data, chunk_size):
        hasher.update(memoryview(chunk))
    assert hasher.hexdigest() == digest_blockwise(map(xxhash.xxh3_128_hexdigest, cut(data, block_size)))


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25])
def test_every_byte_counts(size):
    """A flipped byte anywhere, one more and one less: each gives another digest."""
    data = make_data(size)
    variants = [data, data + b"\0", *(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(size))]
    digests = set()
    for variant in variants:
        hasher = BlockwiseHasher(10)
        hasher.update(memoryview(variant))
        digests.add(hasher.hexdigest())
    assert len(digests) == len(variants)


def test_the_order_of_the_blocks_counts():
    """Two blocks that changed places aren't what they were."""
    one, two = xxhash.xxh3_128_hexdigest(b"one"), xxhash.xxh3_128_hexdigest(b"two")
    assert digest_blockwise([one, two]) != digest_blockwise([two, one])
