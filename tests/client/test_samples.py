"""Tests for :mod:`pdiffcopy.client.samples`: what isn't compared where two files have nothing in common."""

from __future__ import annotations

import os
import random

import pytest

from pdiffcopy.address import Address
from pdiffcopy.blocks import ZEROS, Extent
from pdiffcopy.client import Client, samples
from pdiffcopy.client.delta import Sparse
from pdiffcopy.client.pieces import PIECE_SIZE
from pdiffcopy.client.pipeline import find_blocks, generate_batches
from pdiffcopy.client.plan import Plan, Target, Verification
from pdiffcopy.client.planning import Planner
from pdiffcopy.localreplica import LocalReplica
from tests.client.test_planning import MIB, make_planner
from tests.support import make_data

BLOCK, SPACING, BATCH, ENOUGH = 2 * PIECE_SIZE, 4 * PIECE_SIZE, 16 * PIECE_SIZE, 32 * PIECE_SIZE
COUNT = 100
SIZE = COUNT * BLOCK


@pytest.fixture(autouse=True)
def scale(monkeypatch):
    """Everything a little smaller: a batch has 8 blocks, a sample stands for two, and 16 are enough."""
    monkeypatch.setattr(samples, "BATCH_SIZE", BATCH)
    monkeypatch.setattr(samples, "ENOUGH", ENOUGH)
    monkeypatch.setattr(samples, "SPACING", SPACING)


class Recorder(LocalReplica):
    """Remembers what of it was read."""

    def __init__(self, filename: str):
        super().__init__(filename)
        self.samples: list[Extent] = []
        self.starts: list[int] = []

    def pinned(self, file_id, is_source=False):
        return self

    def pieces(self, extents, size, method):
        self.samples += extents
        return super().pieces(extents, size, method)

    def hashes(self, block_size, method, concurrency, start, stop, grain=0):
        self.starts.append(start)
        return super().hashes(block_size, method, concurrency, start, stop, grain)


class Sides:
    """A source and a target in a folder, which is empty at first."""

    def __init__(self, folder):
        self.source, self.target = (Recorder(str(folder / name)) for name in ("source", "target"))
        self.plan = Plan(
            source=Address(self.source.filename), target=Address(self.target.filename), size=SIZE, target_size=SIZE,
            block_size=BLOCK, method="blake3", concurrency=2, delta=True, verification=Verification.BLOCKWISE,
            piece_size=PIECE_SIZE, may_sample=True,
        )  # fmt: skip

    def open(self, address: Address) -> Recorder:
        return self.source if address == self.plan.source else self.target

    def fill(self, differing, size: int = SIZE) -> None:
        """Make the files, which differ all over in some blocks (their numbers)."""
        data = make_data(size)
        other = bytearray(data)
        for number in differing:
            other[number * BLOCK : (number + 1) * BLOCK] = make_data(BLOCK, seed=number + 2)
        for replica, contents in ((self.source, data), (self.target, other)):
            with open(replica.filename, "wb") as file:
                file.write(contents[:size])

    def find(self, **changes) -> list[int]:
        """The numbers of the blocks that count as changed, each of which has to come once, and in order."""
        plan = self.plan._replace(**changes)
        blocks = list(find_blocks(plan, self))
        expected = [(at, min(BLOCK, plan.size - at)) for at in range(0, plan.size, BLOCK)]
        assert [(block.offset, block.size) for block in blocks] == expected
        return [block.offset // BLOCK for block in blocks if block.changed]


@pytest.fixture
def sides(tmp_path) -> Sides:
    return Sides(tmp_path)


def test_what_differs_all_over_is_not_compared(sides):
    """After enough of it, only samples are read of the target: one of each so many bytes, at other places each time."""
    sides.fill(range(COUNT))
    assert sides.find() == list(range(COUNT))
    # 16 blocks are compared, 10 batches of 8 aren't, and 4 blocks are left.
    assert sides.target.starts == sides.source.starts == [0, 96 * BLOCK]
    assert sides.target.samples == sides.source.samples
    assert [at.offset // SPACING for at in sides.target.samples] == list(range(8, 48))
    assert {at.size for at in sides.target.samples} == {PIECE_SIZE}
    assert len({at.offset % SPACING for at in sides.target.samples}) == SPACING // PIECE_SIZE


def test_batches_of_it_are_verified_by_what_the_source_states(sides):
    """There is no digest of blocks that weren't compared."""
    sides.fill(range(COUNT))
    batches = list(generate_batches(sides.plan, sides, lambda: False))
    assert sum(batch.size for batch in batches) == SIZE
    assert not any(batch.digest for batch in batches)
    sides.fill(range(10))
    assert all(batch.digest for batch in generate_batches(sides.plan, sides, lambda: False))


@pytest.mark.parametrize("equal", [24, 40, 74])
def test_first_sample_that_is_equal_ends_it(sides, equal):
    """From the bytes on that it stands for, everything is compared."""
    sides.fill(range(equal))
    assert sides.find() == list(range(equal))
    assert sides.target.starts == [0, equal * BLOCK]


def test_zeros_end_it(sides):
    """They needn't travel, so they have to be found."""
    sides.fill(range(COUNT))
    with open(sides.source.filename, "r+b") as file:
        file.seek(40 * BLOCK)
        file.write(bytes(20 * BLOCK))
    plan = sides.plan._replace(sparse=Sparse.AUTO, grain=4096)
    blocks = list(find_blocks(plan, sides))
    assert [block.offset // BLOCK for block in blocks if block.fill == ZEROS] == list(range(40, 60))
    assert [start // BLOCK for start in sides.target.starts] == [0, 40]


def test_much_has_to_differ_again_after_that(sides):
    """And twice as much where nothing was gained."""
    sides.fill([*range(18), *range(20, 70), *range(72, COUNT)])
    assert sides.find() == [*range(18), *range(20, 70), *range(72, COUNT)]
    # What could be skipped first is less than a batch. So 32 blocks have to differ after that, and 16 later on.
    assert [start // BLOCK for start in sides.target.starts] == [0, 70, 96]
    taken = {sample.offset // BLOCK for sample in sides.target.samples}
    assert not taken & {*range(16), *range(48, 52), *range(84, 88)} and taken & {16, 17} and taken & {52, 53}


def test_little_that_differs_in_each_block_is_compared(sides):
    """All blocks differ, and samples of them don't: that's found out less and less often."""
    sides.fill([])
    data = bytearray(make_data(SIZE))
    for offset in range(0, SIZE, BLOCK):
        data[offset] ^= 1
    with open(sides.target.filename, "wb") as file:
        file.write(data)
    assert sides.find() == list(range(COUNT))
    assert sides.target.starts == [0]
    assert len(sides.target.samples) == (4 + 4) * BATCH // SPACING
    assert all(batch.digest for batch in generate_batches(sides.plan, sides, lambda: False))


@pytest.mark.parametrize("seed", range(40))
def test_what_differs_is_found_in_any_layout(sides, seed):
    """Nothing that differs is left out, and only what is smaller than what one sample stands for moves in vain."""
    generator = random.Random(seed)
    flags: list[bool] = []
    while len(flags) < COUNT:
        flags += [bool(generator.randrange(4))] * generator.choice([1, 2, 5, 20, 50])
    differing = {number for number, flag in enumerate(flags[:COUNT]) if flag}
    size = SIZE - generator.randrange(BLOCK)
    sides.fill(differing, size)
    found = set(sides.find(size=size, target_size=size))
    assert found >= differing
    # Of three in a row, two are what one sample stands for.
    rows = [{number, number + 1, number + 2} for number in range(COUNT - 2)]
    assert not any(row <= found for row in rows if not row & differing)


def test_nothing_is_skipped_behind_the_end_of_the_target(sides):
    """What it grows by hasn't been compared anyway."""
    sides.fill(range(COUNT))
    os.truncate(sides.target.filename, 30 * BLOCK)
    assert sides.find(target_size=30 * BLOCK) == list(range(COUNT))
    assert max(sample.offset for sample in sides.target.samples) < 24 * BLOCK
    assert sides.target.starts == [0, 24 * BLOCK]


def make_plan(planner: Planner) -> Plan:
    info = planner.target.info
    return planner.make_plan(Address("/s"), Target(Address("/t"), info, info.size))


@pytest.mark.parametrize(
    ("source", "target", "options", "expected"),
    [
        ({}, {}, {}, True),
        ({"has_holes": True}, {}, {}, False),
        ({}, {"has_holes": True}, {}, False),
        ({}, {}, {"sparse": "always"}, False),
        ({}, {}, {"block_size": MIB + 1}, False),
        ({}, {}, {"delta_transfer": False}, False),
    ],
)
def test_when_samples_are_taken(source, target, options, expected):
    """Where all of it has contents on both sides, and consists of pieces."""
    planner = make_planner(MIB, MIB)
    planner.options = planner.options._replace(**options)
    planner.source, planner.target = (
        side._replace(info=side.info._replace(grain=4096, **change))
        for side, change in ((planner.source, source), (planner.target, target))
    )
    assert make_plan(planner).may_sample is expected


def test_no_samples_are_taken_of_an_old_peer():
    """It can't tell the digests of pieces."""
    assert make_plan(make_planner(MIB, MIB, frozenset())).may_sample is False


@pytest.mark.parametrize("direction", ["upload", "download", "local"])
@pytest.mark.parametrize("atomic", [False, True])
def test_runs_leave_the_right_target(sides, tmp_path, server, direction, atomic):
    """With processes and a server, verified, and with a new version, too. What differs is told without samples."""
    count = 600
    equal = {100, 101, 300, *range(400, 420)}
    sides.fill([number for number in range(count) if number not in equal], count * BLOCK - 100)
    locations = {side: str(tmp_path / side) for side in ("source", "target")}
    if direction != "local":
        remote = "target" if direction == "upload" else "source"
        locations[remote] = server.location(locations[remote])
    client = Client(**locations, block_size=BLOCK, hash_method="blake3", atomic=atomic)
    assert client.find_changes() == [number * BLOCK for number in range(count) if number not in equal]
    report = client.run()
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    result = report.result
    assert count - len(equal) <= result.blocks_changed <= count - 20
    assert result.bytes_moved == result.bytes_verified <= result.blocks_changed * BLOCK
    assert result.blocks_compared == count
