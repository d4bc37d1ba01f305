"""Tests for :mod:`pdiffcopy.client.pipeline`: finding and moving what differs, without processes around it."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager

import pytest
import xxhash

from pdiffcopy.address import Address
from pdiffcopy.blocks import BlockDigest, Extent
from pdiffcopy.client import pipeline
from pdiffcopy.client.delta import Batch
from pdiffcopy.client.pieces import Judge
from pdiffcopy.client.pipeline import VERIFY_ATTEMPTS, check_hashes, find_blocks, generate_batches, transfer_batch
from pdiffcopy.client.plan import Plan, Result, Verification
from pdiffcopy.client.progress import Reporter
from pdiffcopy.exceptions import (
    DigestMismatchError,
    FileError,
    RangeError,
    SourceChangedError,
    TransientError,
    VerificationError,
)
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading
from tests.support import make_data, write_pattern

BLOCK = 1000
SIZE = 5 * BLOCK + 10


@pytest.fixture
def plan(tmp_path) -> Plan:
    """A plan for two local files, the second of which differs in its blocks 1, 2 and 5."""
    older = bytearray(write_pattern(tmp_path / "source", SIZE))
    for position in (BLOCK, 3 * BLOCK - 1, SIZE - 1):
        older[position] ^= 1
    (tmp_path / "target").write_bytes(older)
    return Plan(
        source=Address(str(tmp_path / "source")),
        target=Address(str(tmp_path / "target")),
        size=SIZE,
        target_size=SIZE,
        block_size=BLOCK,
        method="md5",
        concurrency=2,
        delta=True,
        verification=Verification.STATED,
    )


BY_HASHES = {"verification": Verification.BY_HASHES}
BLOCKWISE = {"method": "xxh128", "verification": Verification.BLOCKWISE}
UNVERIFIED = {"verification": Verification.NONE}
KINDS = [{}, BY_HASHES, BLOCKWISE]
"""The kinds of verification: how a plan differs."""


class FaultyReplica(LocalReplica):
    """Raises errors, or flips a byte of what it reads, as often as it's told to."""

    def __init__(self, filename: str, errors=(), flips: int = 0):
        super().__init__(filename)
        self.errors = list(errors)
        self.flips = flips
        self.stated = []

    def pinned(self, file_id, is_source=False):
        return self

    @contextmanager
    def read(self, extents, state_digest=False, clip=False):
        self.stated.append(state_digest)
        if self.errors:
            raise self.errors.pop(0)
        with super().read(extents, state_digest) as reading:
            yield Reading(self.flip(reading), reading.digest)

    def flip(self, reading):
        payload = bytearray(b"".join(map(bytes, reading.chunks)))
        if self.flips:
            self.flips -= 1
            payload[0] ^= 1
        yield bytes(payload)


class Sides:
    """Where the replicas of the tests come from: some of them are special."""

    def __init__(self):
        self.special = {}

    def open(self, address: Address):
        return self.special.get(address) or LocalReplica(address.filename)


@pytest.fixture
def sides():
    return Sides()


@pytest.fixture
def source(plan, sides, monkeypatch):
    """The source of the plan, with faults to be added."""
    sides.special[plan.source] = FaultyReplica(plan.source.filename)
    # What's waited between attempts is a matter of retry, not of this.
    monkeypatch.setattr("pdiffcopy.client.retry.time.sleep", lambda seconds: None)
    return sides.special[plan.source]


def find(plan: Plan, sides: Sides) -> list[Batch]:
    return list(generate_batches(plan, sides, lambda: False))


def transfer(plan: Plan, batch: Batch, sides: Sides) -> Result:
    return transfer_batch(plan, batch, sides, 2, Reporter(), Judge())


def read(address: Address) -> bytes:
    with open(address.filename, "rb") as handle:
        return handle.read()


def test_blocks_are_compared(plan, sides):
    """All blocks of the source come in order, and those that differ are marked."""
    blocks = list(find_blocks(plan, sides))
    assert [(block.offset, block.size) for block in blocks] == [
        (offset, min(BLOCK, SIZE - offset)) for offset in range(0, SIZE, BLOCK)
    ]
    assert [block.offset // BLOCK for block in blocks if block.changed] == [1, 2, 5]


@pytest.mark.parametrize(
    ("remote", "order"),
    [((), ["target", "source"]), (("source",), ["target", "source"]),
     (("target",), ["source", "target"]), (("source", "target"), ["source", "target"])],
)  # fmt: skip
def test_no_server_is_waited_for_before_local_work_begins(plan, monkeypatch, remote, order, sides):
    """A local side is asked for its first digest before a remote one is: its threads go on from there."""
    asked = []

    class Recorder(LocalReplica):
        def hashes(self, *arguments):
            asked.append(os.path.basename(self.filename))
            yield from super().hashes(*arguments)

    for side in ("source", "target"):
        address = getattr(plan, side)
        sides.special[address] = Recorder(address.filename)
        sides.special[address].is_near = side not in remote
    assert [block.offset // BLOCK for block in find_blocks(plan, sides) if block.changed] == [1, 2, 5]
    assert asked == order


def test_whole_file_is_not_compared(plan, tmp_path, sides):
    """Without delta no digest is computed, so the target isn't even read."""
    (tmp_path / "target").unlink()
    blocks = list(find_blocks(plan._replace(delta=False, target_size=0), sides))
    assert len(blocks) == 6
    assert all(block.changed and not block.digest for block in blocks)


def test_whole_file_by_hashes_has_the_digests_of_the_source(plan, tmp_path, sides):
    """What is going to be verified by block hashes needs them, though nothing is compared."""
    (tmp_path / "target").unlink()
    blocks = list(find_blocks(plan._replace(delta=False, **BY_HASHES), sides))
    data = make_data(SIZE)
    assert all(block.changed for block in blocks)
    assert [b.digest for b in blocks] == [hashlib.md5(data[o : o + BLOCK]).hexdigest() for o in range(0, SIZE, BLOCK)]


def test_shorter_target_differs_where_it_ends(plan, tmp_path, sides):
    """A dry run compares with what's there, and takes the rest for different."""
    (tmp_path / "target").write_bytes(make_data(SIZE)[: 2 * BLOCK + 500])
    blocks = list(find_blocks(plan._replace(target_size=2 * BLOCK + 500), sides))
    assert [block.offset // BLOCK for block in blocks if block.changed] == [2, 3, 4, 5]


def test_source_that_became_shorter_is_an_error(plan, tmp_path, sides):
    """Its hashes can't be trusted to be those of the file that was looked at."""
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(RangeError, match="shorter"):
        list(find_blocks(plan, sides))


def test_neighbors_become_extents(plan, sides):
    """Changed blocks side by side are moved as one."""
    (batch,) = find(plan, sides)
    assert batch.extents == (Extent(BLOCK, 2 * BLOCK), Extent(5 * BLOCK, 10))
    assert (batch.blocks_compared, batch.blocks_changed, batch.bytes_compared) == (6, 3, SIZE)
    assert batch.digests == ()


def test_peer_without_extents_gets_one_at_a_time(plan, sides):
    """A batch for an old peer has a single extent, and the digests that are needed to check it."""
    batches = list(find(plan._replace(max_extents=1, **BY_HASHES), sides))
    assert [batch.extents for batch in batches] == [(Extent(BLOCK, 2 * BLOCK),), (Extent(5 * BLOCK, 10),)]
    assert [[digest.offset for digest in batch.digests] for batch in batches] == [[BLOCK, 2 * BLOCK], [5 * BLOCK]]
    assert sum(batch.blocks_compared for batch in batches) == 6


def test_batch_is_transferred(plan, sides):
    """Afterwards the target equals the source, and the result tells what was done."""
    (batch,) = find(plan, sides)
    result = transfer(plan, batch, sides)
    assert read(plan.target) == read(plan.source)
    assert result == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 0)


def test_batch_without_changes_costs_nothing(plan, tmp_path, sides):
    """Progress is reported for it all the same."""
    (tmp_path / "target").unlink()
    batch = Batch(blocks_compared=7, bytes_compared=7 * BLOCK)
    assert transfer(plan, batch, sides) == Result(7, 0, 7 * BLOCK, 0, 0, 0)


def test_unverified_transfer_claims_nothing(plan, sides):
    """What wasn't checked isn't counted as checked."""
    plan = plan._replace(**UNVERIFIED)
    (batch,) = find(plan, sides)
    assert transfer(plan, batch, sides).bytes_verified == 0
    assert read(plan.target) == read(plan.source)


def test_results_add_up():
    """Each number for itself."""
    assert Result(1, 2, 3, 4, 5, 6) + Result(10, 20, 30, 40, 50, 60) == Result(11, 22, 33, 44, 55, 66)


@pytest.fixture(params=[pipeline.SMALLEST_BATCH, BLOCK])
def smallest(request, monkeypatch):
    """What fails is repeated as a whole, or in halves."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_wrong_is_transferred_again(plan, source, smallest, kind, sides):
    """A flipped byte is noticed by the digest, or by the block hashes, and doesn't end the run."""
    plan = plan._replace(**kind)
    (batch,) = find(plan, sides)
    source.flips = VERIFY_ATTEMPTS - 1
    assert transfer(plan, batch, sides).retries == VERIFY_ATTEMPTS - 1
    assert read(plan.target) == read(plan.source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_arriving_wrong_ends_the_run(plan, source, smallest, kind, sides):
    """After a few attempts it's an error of its own kind, which names the place."""
    plan = plan._replace(**kind)
    (batch,) = find(plan, sides)
    source.flips = 100
    with pytest.raises(VerificationError, match=f"offset {BLOCK} .* arrived wrong {VERIFY_ATTEMPTS} times"):
        transfer(plan, batch, sides)


def test_halves_have_attempts_of_their_own(plan, source, monkeypatch, sides):
    """That its neighbors arrived wrong doesn't count against what is repeated with them."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", BLOCK)
    (batch,) = find(plan, sides)
    # The whole, its first half, and the first half of that as often as it may.
    source.flips = mismatches = 2 + VERIFY_ATTEMPTS - 1
    assert transfer(plan, batch, sides).retries == mismatches
    assert read(plan.target) == read(plan.source)


def test_without_verification_wrong_bytes_go_unnoticed(plan, source, sides):
    """That's what it means to skip it (and shows that the tests above test something)."""
    plan = plan._replace(**UNVERIFIED)
    (batch,) = find(plan, sides)
    source.flips = 1
    assert transfer(plan, batch, sides).retries == 0
    assert read(plan.target) != read(plan.source)


def test_blockwise_the_source_states_no_digest(plan, source, sides):
    """After a comparison by XXH128 the source need not read a second time what it sends."""
    plan = plan._replace(**BLOCKWISE)
    (batch,) = find(plan, sides)
    assert transfer(plan, batch, sides) == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 0)
    assert source.stated == [False]
    assert read(plan.target) == read(plan.source)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]])
def test_source_that_contradicts_itself_has_changed(plan, source, kind, sides):
    """What was compared isn't there any more, and that's no damage on the way."""
    plan = plan._replace(**kind)
    (batch,) = find(plan, sides)
    with open(plan.source.filename, "r+b") as handle:
        handle.seek(BLOCK)
        handle.write(b"changed meanwhile")
    with pytest.raises(SourceChangedError, match="its contents"):
        transfer(plan, batch, sides)


def test_source_that_changes_between_its_digest_and_its_data_has_changed(plan, source, monkeypatch, sides):
    """It states a digest, sends something else, and states another digest when it's asked again."""
    (batch,) = find(plan, sides)
    original = source.read

    @contextmanager
    def read_and_change(extents, state_digest):
        with original(extents, state_digest) as reading:
            with open(plan.source.filename, "r+b") as handle:
                handle.seek(BLOCK)
                handle.write(os.urandom(9))
            yield reading if source.stated[1:] else reading._replace(chunks=[read(plan.source)[BLOCK : 3 * BLOCK + 10]])

    monkeypatch.setattr(source, "read", read_and_change)
    with pytest.raises(SourceChangedError, match="its contents"):
        transfer(plan, batch, sides)


def test_by_hashes_a_wrong_byte_never_reaches_the_target(plan, source, sides):
    """The check comes before the write."""
    plan = plan._replace(**BY_HASHES)
    (batch,) = find(plan, sides)
    before = read(plan.target)
    source.flips = VERIFY_ATTEMPTS
    with pytest.raises(VerificationError):
        transfer(plan, batch, sides)
    assert read(plan.target) == before


def test_by_hashes_the_target_is_still_checked(plan, monkeypatch, sides):
    """The client states the digest that the old source can't, so what lies in the target is compared too."""
    plan = plan._replace(**BY_HASHES)
    (batch,) = find(plan, sides)
    stated = []

    class Target(LocalReplica):
        def write(self, extents, reading, *rest):
            stated.append((reading.digest, b"".join(map(bytes, reading.chunks))))

    sides.special[plan.target] = Target(plan.target.filename)
    transfer(plan, batch, sides)
    ((digest, payload),) = stated
    assert digest == xxhash.xxh3_128_hexdigest(payload)


@pytest.mark.parametrize("kind", [{}, BLOCKWISE])
def test_what_breaks_off_is_repeated_in_halves(plan, source, monkeypatch, kind, sides):
    """Something gets done where nothing lasts for long: failures in a row are counted from the last success on."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", BLOCK)
    plan = plan._replace(**kind)
    (batch,) = find(plan, sides)
    original, sizes = source.read, []

    def read_little(extents, state_digest):
        sizes.append(sum(extent.size for extent in extents))
        if sizes[-1] > BLOCK:
            raise TransientError("too much at once")
        return original(extents, state_digest)

    monkeypatch.setattr(source, "read", read_little)
    assert transfer(plan, batch, sides) == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 3)
    assert sizes == [2010, 1005, 502, 503, 1005, 502, 503]
    assert read(plan.target) == read(plan.source)


def test_transient_failures_are_survived(plan, source, smallest, sides):
    """Up to as many in a row as the user allows."""
    (batch,) = find(plan, sides)
    source.errors = [TransientError("no"), TransientError("no")]
    assert transfer(plan, batch, sides).retries == 2
    assert read(plan.target) == read(plan.source)


def test_holes_are_asked_for_as_often_as_a_replica_does_that(plan, sides, monkeypatch):
    """It has its own patience, and another one around that would multiply the attempts."""
    asked = []

    def clear(replica, extents, run="", keep=False):
        asked.append(extents)
        raise TransientError("gone")

    monkeypatch.setattr(LocalReplica, "clear", clear)
    batch = Batch(holes=(Extent(0, BLOCK),))
    with pytest.raises(TransientError, match="gone"):
        transfer_batch(plan, batch, sides, 8, Reporter(), Judge())
    assert len(asked) == 1


def test_too_many_failures_end_the_run(plan, source, smallest, sides):
    """The last one is what the user gets to see."""
    (batch,) = find(plan, sides)
    source.errors = [TransientError("first"), TransientError("second"), TransientError("third")]
    with pytest.raises(TransientError, match="third"):
        transfer(plan, batch, sides)


def test_lasting_failures_are_not_repeated(plan, source, sides):
    """What isn't going to pass is raised at once."""
    (batch,) = find(plan, sides)
    source.errors = [FileError("gone"), FileError("unexpected")]
    with pytest.raises(FileError, match="gone"):
        transfer(plan, batch, sides)


def test_wrong_block_hash_is_found_at_its_place(plan, source):
    """Of several blocks in an extent, it's the wrong one that's named."""
    batch = Batch(
        extents=(Extent(0, 2 * BLOCK),),
        digests=(
            BlockDigest(0, hashlib.md5(make_data(SIZE)[:BLOCK]).hexdigest()),
            BlockDigest(BLOCK, hashlib.md5(b"something else").hexdigest()),
        ),
    )
    with LocalReplica(plan.source.filename).read(batch.extents, False) as reading:
        with pytest.raises(DigestMismatchError, match=f"offset {BLOCK} "):
            check_hashes(plan._replace(**BY_HASHES), batch, reading)
