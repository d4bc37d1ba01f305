"""Tests for :mod:`pdiffcopy.client.pieces`: what moves of blocks that differ in a page or two."""

from __future__ import annotations

import os

import pytest

from pdiffcopy import extents
from pdiffcopy.address import Address
from pdiffcopy.blocks import Extent
from pdiffcopy.client import Client, pieces
from pdiffcopy.client.delta import Batch
from pdiffcopy.client.pieces import MOST_SKIPPED, PIECE_SIZE, SAMPLE, Judge, look_closely
from pdiffcopy.client.plan import Plan, Verification
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.methods import get_hasher
from tests.support import write_pattern

BLOCK = 8 * PIECE_SIZE
SIZE = 6 * BLOCK + 100
COMPARED = "of the blocks"


@pytest.fixture
def files(tmp_path):
    """A source, and a target that differs in a byte of the second piece of its block 1, and in its last byte."""
    data = bytearray(write_pattern(tmp_path / "source", SIZE))
    data[BLOCK + PIECE_SIZE] ^= 1
    data[-1] ^= 1
    (tmp_path / "target").write_bytes(data)
    return tmp_path / "source", tmp_path / "target"


@pytest.fixture
def plan(files) -> Plan:
    return Plan(
        source=Address(str(files[0])), target=Address(str(files[1])), size=SIZE, target_size=SIZE, block_size=BLOCK,
        method="blake3", concurrency=2, delta=True, verification=Verification.BLOCKWISE, piece_size=PIECE_SIZE,
    )  # fmt: skip


def look(plan: Plan, batch: Batch, judge: Judge) -> list[Batch]:
    return look_closely(plan, batch, LocalReplica(plan.source.filename), LocalReplica(plan.target.filename), judge)


def eager() -> Judge:
    """A judge that has seen that little differs, and that moving takes long."""
    judge = Judge()
    judge.share, judge.moving = 0.01, 1.0
    return judge


def test_pieces_that_differ_are_found(plan, files):
    """With the digest of theirs by which they are verified; the last one may be shorter."""
    batch = Batch((Extent(BLOCK, BLOCK), Extent(6 * BLOCK, 100)), digest=COMPARED)
    (part,) = look(plan, batch, eager())
    assert part.extents == (Extent(BLOCK + PIECE_SIZE, PIECE_SIZE), Extent(6 * BLOCK, 100))
    data = files[0].read_bytes()
    digests = [get_hasher("blake3")(data[offset : offset + size]).hexdigest() for offset, size in part.extents]
    assert (part.digest, part.unit) == (digest_blockwise(digests), PIECE_SIZE)


def test_batch_moves_as_it_is_where_nothing_differs_any_more(plan):
    """Somebody has changed one of the files since they were compared: what was found then is moved."""
    batch = Batch((Extent(3 * BLOCK, BLOCK),), digest=COMPARED)
    assert look(plan, batch, eager()) == [batch]


def test_nothing_is_looked_at_where_that_is_not_possible(plan):
    """With an old peer, and with blocks that aren't made of pieces."""
    batch = Batch((Extent(BLOCK, BLOCK),), digest=COMPARED)
    for other in (plan._replace(piece_size=0), plan._replace(block_size=BLOCK + 1)):
        assert look(other, batch, eager()) == [batch]


def test_nothing_is_looked_at_that_was_not_compared(plan):
    """It has no digest, and by its samples it differs all over."""
    batch = Batch((Extent(BLOCK, BLOCK),))
    assert look(plan, batch, eager()) == [batch]


def test_pieces_grow_with_what_is_looked_at(plan, monkeypatch):
    """A request has room for so many digests."""
    monkeypatch.setattr(pieces, "MAX_PIECES", 4)
    (part,) = look(plan, Batch((Extent(BLOCK, BLOCK),), digest=COMPARED), eager())
    assert part.extents == (Extent(BLOCK, 2 * PIECE_SIZE),) and part.unit == 2 * PIECE_SIZE


def test_many_pieces_make_several_batches(plan, files, monkeypatch):
    """As many extents as a request can carry, each with the digest of its own."""
    for name in ("MAX_EXTENTS", "MAX_PACKED"):
        monkeypatch.setattr(extents, name, 2)
    data = bytearray(files[0].read_bytes())
    for number in range(0, 8, 2):
        data[BLOCK + number * PIECE_SIZE] ^= 1
    files[1].write_bytes(data)
    parts = look(plan, Batch((Extent(BLOCK, BLOCK),), digest=COMPARED), eager())
    assert [len(part.extents) for part in parts] == [2, 2]
    assert len({part.digest for part in parts}) == 2


def test_sample_decides_when_nothing_is_known(plan, files):
    """A few blocks are looked at first. When they differ all over, all of the batch moves as it is."""
    asked = []

    class Recorder(LocalReplica):
        def pieces(self, extents, size, method):
            asked.append(sum(extent.size for extent in extents))
            return super().pieces(extents, size, method)

    batch, judge = Batch((Extent(0, 6 * BLOCK),), digest=COMPARED), Judge()
    files[1].write_bytes(os.urandom(SIZE))
    source, target = Recorder(plan.source.filename), LocalReplica(plan.target.filename)
    assert look_closely(plan, batch, source, target, judge) == [batch]
    assert asked == [SAMPLE * BLOCK]
    for _ in range(100):
        assert look_closely(plan, batch, source, target, judge) == [batch]
    assert len(asked) < 4 + 100 // MOST_SKIPPED


def test_judge_weighs_looking_against_moving():
    """What a worker has measured counts: how much differs, and how long both take."""
    judge = Judge()
    assert not judge.is_worth_it and judge.choose(99) == SAMPLE
    judge.note_look(1000, 10, 1e-7)
    judge.note_move(10, 1000)  # a small move says nothing
    assert judge.is_worth_it and judge.choose(99) == 99
    for _ in range(9):
        judge.note_move(10**9, 0.01)  # the wire is faster than hashing
    assert not judge.is_worth_it
    for _ in range(9):
        judge.note_move(10**9, 10)
    assert judge.is_worth_it
    judge.note_look(1000, 600, 1e-7)
    assert not judge.is_worth_it


@pytest.mark.parametrize("method", ["blake3", "xxh128", "sha1"])
@pytest.mark.parametrize("direction", ["upload", "download", "local"])
def test_pages_move_and_not_blocks(server, files, direction, method):
    """The result is right, verified, and the report says how little moved."""
    source, target = files
    locations = {"source": str(source), "target": str(target)}
    if direction != "local":
        side = "target" if direction == "upload" else "source"
        locations[side] = server.location(locations[side])
    report = Client(**locations, block_size=BLOCK, hash_method=method, concurrency=1).run()
    assert target.read_bytes() == source.read_bytes()
    assert report.result.blocks_changed == 2
    assert report.result.bytes_moved == report.result.bytes_verified == PIECE_SIZE + 100
    assert report.verification == "verified"


def test_old_peer_gets_whole_blocks(launch_old, files):
    """It has no pieces."""
    source, target = files
    report = Client(source=launch_old().location(source), target=target, block_size=BLOCK).run()
    assert target.read_bytes() == source.read_bytes()
    assert report.result.bytes_moved == BLOCK + 100


def test_piece_that_arrives_wrong_is_moved_again(server, files, monkeypatch):
    """What lies in the target afterwards is compared with the digests of the pieces."""
    source, target = files
    original, flips = os.pwrite, [1]

    def pwrite(fd, data, offset):
        if flips and offset == BLOCK + PIECE_SIZE:
            flips.pop()
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        return original(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    report = Client(source=str(source), target=str(target), block_size=BLOCK, hash_method="blake3", concurrency=1).run()
    assert target.read_bytes() == source.read_bytes()
    assert report.result.retries == 1
