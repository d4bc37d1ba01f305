"""Tests for :mod:`pdiffcopy.client.planning`: what follows from what is known at the first look."""

from __future__ import annotations

import pytest

from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import Block, FileInfo, count_blocks
from pdiffcopy.client.delta import FIRST_WINDOW, make_batches
from pdiffcopy.client.plan import Options
from pdiffcopy.client.planning import Planner, Side
from pdiffcopy.extents import MAX_EXTENTS
from pdiffcopy.features import FEATURES
from pdiffcopy.localreplica import LocalReplica

KIB, MIB = 1024, 1024**2


def make_planner(size: int, block_size: int, features: frozenset[str] = FEATURES) -> Planner:
    """A planner for a file of a size, and a target of the same size."""
    options = Options(
        block_size=block_size, concurrency=2, delta_transfer=True, dry_run=False, fsync=False, hash_method="sha1",
        verify=True, sparse="auto", atomic=False, perms=False, times=False, owner=False, group=False,
        bwlimit=0, drop_cache=False,
    )  # fmt: skip
    source, target = (
        Side(LocalReplica(name), FileInfo(True, size, file_id=name), PeerInfo(features=features))
        for name in ("/s", "/t")
    )
    return Planner(source, target, options, is_given=False)


@pytest.mark.parametrize(
    ("size", "block_size", "features", "expected"),
    [
        (0, MIB, FEATURES, True),
        (1, MIB, FEATURES, True),
        (10 * MIB, MIB, FEATURES, True),
        (FIRST_WINDOW - 1, MIB, FEATURES, True),
        (FIRST_WINDOW, MIB, FEATURES, False),
        (1000 * MIB, 1000 * MIB, FEATURES, False),
        (MAX_EXTENTS * KIB, KIB, FEATURES, True),
        (MAX_EXTENTS * KIB + 1, KIB, FEATURES, False),
        (MIB, MIB, frozenset(), True),
        (MIB + 1, MIB, frozenset(), False),
    ],
)
def test_what_makes_one_batch_is_known_beforehand(size, block_size, features, expected):
    """However the changes are scattered, and though somebody waits for them."""
    planner = make_planner(size, block_size, features)
    assert planner.makes_one_batch is expected
    if expected:
        offsets = range(0, size, block_size)
        blocks = [Block(at, min(block_size, size - at), at // block_size % 2 == 0, "") for at in offsets]
        assert len(blocks) == count_blocks(size, block_size)
        batches = list(make_batches(blocks, planner.max_extents, is_awaited=lambda: True))
        assert len(batches) == min(len(blocks), 1)
