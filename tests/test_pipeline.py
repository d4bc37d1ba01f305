"""Tests for :mod:`pdiffcopy.pipeline`: finding and moving what differs, without processes around it."""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import xxhash

from pdiffcopy import pipeline
from pdiffcopy.address import Address
from pdiffcopy.delta import Batch
from pdiffcopy.exceptions import (
    DigestMismatchError,
    FileError,
    ProtocolError,
    SourceChangedError,
    TransientError,
    VerificationError,
)
from pdiffcopy.locations import LocalReplica, Network, Reading
from pdiffcopy.pipeline import VERIFY_ATTEMPTS, Plan, Result, find_blocks, generate_batches, transfer_batch
from pdiffcopy.protocol import BlockDigest, Extent
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
        network=Network(retries=2),
        size=SIZE,
        target_size=SIZE,
        block_size=BLOCK,
        method="md5",
        concurrency=2,
        delta=True,
        verify=True,
        by_hashes=False,
    )


KINDS = [{}, {"by_hashes": True}, {"method": "xxh128", "blockwise": True}]
"""The kinds of verification: how a plan differs."""


class FaultyReplica(LocalReplica):
    """Raises errors, or flips an octet of what it reads, as often as it's told to."""

    def __init__(self, filename: str, errors=(), flips: int = 0):
        super().__init__(filename)
        self.errors = list(errors)
        self.flips = flips
        self.stated = []

    def pinned(self, file_id, is_source=False):
        return self

    @contextmanager
    def read(self, extents, state_digest):
        self.stated.append(state_digest)
        if self.errors:
            raise self.errors.pop(0)
        with super().read(extents, state_digest) as reading:
            yield Reading(self.flip(reading), reading.digest)

    def flip(self, reading):
        octets = bytearray(b"".join(map(bytes, reading.chunks)))
        if self.flips:
            self.flips -= 1
            octets[0] ^= 1
        yield bytes(octets)


@pytest.fixture
def source(plan, monkeypatch):
    """The source of the plan, with faults to be added."""
    replica = FaultyReplica(plan.source.filename)
    originals = pipeline.open_replica

    def open_replica(address, network):
        return replica if address == plan.source else originals(address, network)

    monkeypatch.setattr(pipeline, "open_replica", open_replica)
    # What's waited between attempts is a matter of retry, not of this.
    monkeypatch.setattr("pdiffcopy.retry.time.sleep", lambda seconds: None)
    return replica


def read(address: Address) -> bytes:
    with open(address.filename, "rb") as handle:
        return handle.read()


def test_blocks_are_compared(plan):
    """All blocks of the source come in order, and those that differ are marked."""
    blocks = list(find_blocks(plan))
    assert [(block.offset, block.size) for block in blocks] == [
        (offset, min(BLOCK, SIZE - offset)) for offset in range(0, SIZE, BLOCK)
    ]
    assert [block.offset // BLOCK for block in blocks if block.changed] == [1, 2, 5]


@pytest.mark.parametrize(
    ("remote", "order"),
    [((), ["target", "source"]), (("source",), ["target", "source"]),
     (("target",), ["source", "target"]), (("source", "target"), ["source", "target"])],
)  # fmt: skip
def test_no_server_is_waited_for_before_local_work_begins(plan, monkeypatch, remote, order):
    """A local side is asked for its first digest before a remote one is: its threads go on from there."""
    asked = []

    class Recorder(LocalReplica):
        def hashes(self, *arguments):
            asked.append(os.path.basename(self.filename))
            yield from super().hashes(*arguments)

    monkeypatch.setattr(pipeline, "open_replica", lambda address, network: Recorder(address.filename))
    for side in remote:
        plan = replace(plan, **{side: getattr(plan, side)._replace(hostname="db1")})
    assert [block.offset // BLOCK for block in find_blocks(plan) if block.changed] == [1, 2, 5]
    assert asked == order


def test_whole_file_is_not_compared(plan, tmp_path):
    """Without delta no digest is computed, so the target isn't even read."""
    (tmp_path / "target").unlink()
    blocks = list(find_blocks(replace(plan, delta=False, target_size=0)))
    assert len(blocks) == 6
    assert all(block.changed and not block.digest for block in blocks)


def test_whole_file_by_hashes_has_the_digests_of_the_source(plan, tmp_path):
    """What is going to be verified by block hashes needs them, though nothing is compared."""
    (tmp_path / "target").unlink()
    blocks = list(find_blocks(replace(plan, delta=False, by_hashes=True)))
    data = make_data(SIZE)
    assert all(block.changed for block in blocks)
    assert [b.digest for b in blocks] == [hashlib.md5(data[o : o + BLOCK]).hexdigest() for o in range(0, SIZE, BLOCK)]


def test_shorter_target_differs_where_it_ends(plan, tmp_path):
    """A dry run compares with what's there, and takes the rest for different."""
    (tmp_path / "target").write_bytes(make_data(SIZE)[: 2 * BLOCK + 500])
    blocks = list(find_blocks(replace(plan, target_size=2 * BLOCK + 500)))
    assert [block.offset // BLOCK for block in blocks if block.changed] == [2, 3, 4, 5]


def test_source_that_became_shorter_is_an_error(plan, tmp_path):
    """Its hashes can't be trusted to be those of the file that was looked at."""
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises((FileError, ProtocolError)):
        list(find_blocks(plan))


def test_neighbours_become_extents(plan):
    """Changed blocks side by side are moved as one."""
    (batch,) = generate_batches(plan)
    assert batch.extents == (Extent(BLOCK, 2 * BLOCK), Extent(5 * BLOCK, 10))
    assert (batch.blocks_compared, batch.blocks_changed, batch.bytes_compared) == (6, 3, SIZE)
    assert batch.digests == ()


def test_peer_without_extents_gets_one_at_a_time(plan):
    """A batch for an old peer has a single extent, and the digests that are needed to check it."""
    batches = list(generate_batches(replace(plan, max_extents=1, by_hashes=True)))
    assert [batch.extents for batch in batches] == [(Extent(BLOCK, 2 * BLOCK),), (Extent(5 * BLOCK, 10),)]
    assert [[digest.offset for digest in batch.digests] for batch in batches] == [[BLOCK, 2 * BLOCK], [5 * BLOCK]]
    assert sum(batch.blocks_compared for batch in batches) == 6


def test_batch_is_transferred(plan):
    """Afterwards the target equals the source, and the result tells what was done."""
    (batch,) = generate_batches(plan)
    result = transfer_batch(plan, batch)
    assert read(plan.target) == read(plan.source)
    assert result == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 0)


def test_batch_without_changes_costs_nothing(plan, tmp_path):
    """Progress is reported for it all the same."""
    (tmp_path / "target").unlink()
    batch = Batch(blocks_compared=7, bytes_compared=7 * BLOCK)
    assert transfer_batch(plan, batch) == Result(7, 0, 7 * BLOCK, 0, 0, 0)


def test_unverified_transfer_claims_nothing(plan):
    """What wasn't checked isn't counted as checked."""
    plan = replace(plan, verify=False)
    (batch,) = generate_batches(plan)
    assert transfer_batch(plan, batch).bytes_verified == 0
    assert read(plan.target) == read(plan.source)


def test_results_add_up():
    """Each number for itself."""
    assert Result(1, 2, 3, 4, 5, 6) + Result(10, 20, 30, 40, 50, 60) == Result(11, 22, 33, 44, 55, 66)


@pytest.fixture(params=[pipeline.SMALLEST_BATCH, BLOCK])
def smallest(request, monkeypatch):
    """What fails is repeated as a whole, or in halves."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_wrong_is_transferred_again(plan, source, smallest, kind):
    """A flipped octet is noticed by the digest, or by the block hashes, and doesn't end the run."""
    plan = replace(plan, **kind)
    (batch,) = generate_batches(plan)
    source.flips = VERIFY_ATTEMPTS - 1
    assert transfer_batch(plan, batch).retries == VERIFY_ATTEMPTS - 1
    assert read(plan.target) == read(plan.source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_arriving_wrong_ends_the_run(plan, source, smallest, kind):
    """After a few attempts it's an error of its own kind, which names the place."""
    plan = replace(plan, **kind)
    (batch,) = generate_batches(plan)
    source.flips = 100
    with pytest.raises(VerificationError, match=f"offset {BLOCK} .* arrived wrong {VERIFY_ATTEMPTS} times"):
        transfer_batch(plan, batch)


def test_halves_have_attempts_of_their_own(plan, source, monkeypatch):
    """That its neighbours arrived wrong doesn't count against what is repeated with them."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", BLOCK)
    (batch,) = generate_batches(plan)
    # The whole, its first half, and the first half of that as often as it may.
    source.flips = mismatches = 2 + VERIFY_ATTEMPTS - 1
    assert transfer_batch(plan, batch).retries == mismatches
    assert read(plan.target) == read(plan.source)


def test_without_verification_wrong_octets_go_unnoticed(plan, source):
    """That's what it means to skip it (and shows that the tests above test something)."""
    plan = replace(plan, verify=False)
    (batch,) = generate_batches(plan)
    source.flips = 1
    assert transfer_batch(plan, batch).retries == 0
    assert read(plan.target) != read(plan.source)


def test_blockwise_the_source_states_no_digest(plan, source):
    """Who compared by XXH128 need not have the source read a second time what it sends."""
    plan = replace(plan, method="xxh128", blockwise=True)
    (batch,) = generate_batches(plan)
    assert transfer_batch(plan, batch) == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 0)
    assert source.stated == [False]
    assert read(plan.target) == read(plan.source)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2]])
def test_source_that_contradicts_itself_has_changed(plan, source, kind):
    """What was compared isn't there any more, and that's no damage on the way."""
    plan = replace(plan, **kind)
    (batch,) = generate_batches(plan)
    with open(plan.source.filename, "r+b") as handle:
        handle.seek(BLOCK)
        handle.write(b"changed meanwhile")
    with pytest.raises(SourceChangedError, match="its contents"):
        transfer_batch(plan, batch)


def test_source_that_changes_between_its_digest_and_its_data_has_changed(plan, source, monkeypatch):
    """It states a digest, sends something else, and states another digest when it's asked again."""
    (batch,) = generate_batches(plan)
    original = source.read

    @contextmanager
    def read_and_change(extents, state_digest):
        with original(extents, state_digest) as reading:
            with open(plan.source.filename, "r+b") as handle:
                handle.seek(BLOCK)
                handle.write(os.urandom(9))
            yield reading if source.stated[1:] else replace(reading, chunks=[read(plan.source)[BLOCK : 3 * BLOCK + 10]])

    monkeypatch.setattr(source, "read", read_and_change)
    with pytest.raises(SourceChangedError, match="its contents"):
        transfer_batch(plan, batch)


def test_by_hashes_a_wrong_octet_never_reaches_the_target(plan, source):
    """The check comes before the write."""
    plan = replace(plan, by_hashes=True)
    (batch,) = generate_batches(plan)
    before = read(plan.target)
    source.flips = VERIFY_ATTEMPTS
    with pytest.raises(VerificationError):
        transfer_batch(plan, batch)
    assert read(plan.target) == before


def test_by_hashes_the_target_is_still_checked(plan, monkeypatch):
    """The client states the digest that the old source can't, so what lies in the target is compared too."""
    plan = replace(plan, by_hashes=True)
    (batch,) = generate_batches(plan)
    stated = []

    class Target(LocalReplica):
        def write(self, extents, reading, *rest):
            stated.append((reading.digest, b"".join(map(bytes, reading.chunks))))

    replicas = {plan.source: LocalReplica(plan.source.filename), plan.target: Target(plan.target.filename)}
    monkeypatch.setattr(pipeline, "open_replica", lambda address, network: replicas[address])
    transfer_batch(plan, batch)
    ((digest, octets),) = stated
    assert digest == xxhash.xxh3_128_hexdigest(octets)


@pytest.mark.parametrize("kind", [{}, {"method": "xxh128", "blockwise": True}])
def test_what_breaks_off_is_repeated_in_halves(plan, source, monkeypatch, kind):
    """Something gets done where nothing lasts for long: failures in a row are counted from the last success on."""
    monkeypatch.setattr(pipeline, "SMALLEST_BATCH", BLOCK)
    plan = replace(plan, **kind)
    (batch,) = generate_batches(plan)
    original, sizes = source.read, []

    def read_little(extents, state_digest):
        sizes.append(sum(extent.size for extent in extents))
        if sizes[-1] > BLOCK:
            raise TransientError("too much at once")
        return original(extents, state_digest)

    monkeypatch.setattr(source, "read", read_little)
    assert transfer_batch(plan, batch) == Result(6, 3, SIZE, 2 * BLOCK + 10, 2 * BLOCK + 10, 3)
    assert sizes == [2010, 1005, 502, 503, 1005, 502, 503]
    assert read(plan.target) == read(plan.source)


def test_transient_failures_are_survived(plan, source, smallest):
    """Up to as many in a row as the user allows."""
    (batch,) = generate_batches(plan)
    source.errors = [TransientError("no"), TransientError("no")]
    assert transfer_batch(plan, batch).retries == 2
    assert read(plan.target) == read(plan.source)


def test_too_many_failures_end_the_run(plan, source, smallest):
    """The last one is what the user gets to see."""
    (batch,) = generate_batches(plan)
    source.errors = [TransientError("first"), TransientError("second"), TransientError("third")]
    with pytest.raises(TransientError, match="third"):
        transfer_batch(plan, batch)


def test_lasting_failures_are_not_repeated(plan, source):
    """What isn't going to pass is raised at once."""
    (batch,) = generate_batches(plan)
    source.errors = [FileError("gone"), FileError("unexpected")]
    with pytest.raises(FileError, match="gone"):
        transfer_batch(plan, batch)


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
            pipeline._transfer(replace(plan, by_hashes=True), batch, reading)
