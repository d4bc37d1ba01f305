"""Tests for :mod:`pdiffcopy.client`: whole runs, driven from Python, against real files and a real server."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote_plus

import pytest

from pdiffcopy.client import Client, Location, Network, get_hashes_fn, transfer_block_fn
from pdiffcopy.client.job import Job
from pdiffcopy.client.pieces import PIECE_SIZE
from pdiffcopy.client.plan import Options, Verification
from pdiffcopy.exceptions import (
    FileError,
    FileForbiddenError,
    FileMissingError,
    ForbiddenError,
    ReplacedError,
    SourceChangedError,
    TransientError,
    UsageError,
)
from pdiffcopy.files.localfile import LocalFile
from tests.relay import RelayProcess
from tests.support import RUN_TIMEOUT, find_free_port, make_data, run_pdiffcopy, snapshot, write_pattern

BLOCK = 4096

SIZES = {
    "empty": 0,
    "one octet": 1,
    "block-1": BLOCK - 1,
    "block": BLOCK,
    "block+1": BLOCK + 1,
    "blocks": 5 * BLOCK,
    "blocks and a bit": 7 * BLOCK + 123,
}


def _older_copy(data: bytes) -> bytes:
    """The same bytes, but for a few that are scattered all over (none when there are none)."""
    copy = bytearray(data)
    for position in {0, len(data) // 2, len(data) - 1} if data else ():
        copy[position] ^= 0xFF
    return bytes(copy)


TARGETS = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "shorter": lambda data: _older_copy(data)[: len(data) // 2],
    "shorter by one octet": lambda data: data[:-1],
    "longer by one octet": lambda data: data + b"x",
    "longer by less than a block": lambda data: _older_copy(data) + make_data(BLOCK // 3, 7),
    "longer by several blocks": lambda data: data + make_data(3 * BLOCK + 5, 7),
    "equal": lambda data: data,
    "different": _older_copy,
    "unrelated": lambda data: make_data(len(data), 99),
}


def find_different(source: bytes, target: bytes | None, block_size: int) -> list[int]:
    """The offsets of the blocks of the source that aren't in the target, up to the size of the source."""
    target = (target or b"")[: len(source)]
    offsets = range(0, len(source), block_size)
    return [o for o in offsets if source[o : o + block_size] != target[o : o + block_size]]


def count_different(source: bytes, target: bytes | None, block_size: int) -> int:
    """How many blocks a run moves: a target that is shorter is grown (by zeros) before it's compared."""
    return len(find_different(source, target and target.ljust(len(source), b"\0"), block_size))


@pytest.fixture(params=["download", "upload"])
def direction(request):
    return request.param


def place(server, direction, source, target) -> dict:
    """The locations of two files, one of them behind the server."""
    if direction == "download":
        return {"source": server.location(source), "target": str(target)}
    if direction == "upload":
        return {"source": str(source), "target": server.location(target)}
    if direction == "local":
        return {"source": str(source), "target": str(target)}
    return {"source": server.location(source), "target": server.location(target)}


# Sizes, states, names {{{1


@pytest.mark.parametrize("block_size", [BLOCK, 1000, 64 * 1024], ids=["even", "divides nothing", "larger than all"])
@pytest.mark.parametrize("state", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_target_becomes_equal_to_source(server, tmp_path, direction, size, state, block_size):
    """Whatever the target was, it's the source afterwards, and the blocks that differed were counted."""
    data = write_pattern(tmp_path / "source", SIZES[size])
    before, target = TARGETS[state](data), tmp_path / "target"
    if before is not None:
        target.write_bytes(before)
    client = Client(**place(server, direction, tmp_path / "source", target), block_size=block_size)
    assert client.synchronize_once() == count_different(data, before, block_size)
    assert target.read_bytes() == data
    assert (tmp_path / "source").read_bytes() == data


def test_block_size_of_one_byte_works(server, tmp_path, direction):
    """The smallest block size there is."""
    data = write_pattern(tmp_path / "source", 300)
    (tmp_path / "target").write_bytes(_older_copy(data))
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=1)
    assert client.synchronize_once() == 3
    assert (tmp_path / "target").read_bytes() == data


def test_scattered_changes_take_several_batches(server, tmp_path, direction):
    """More extents than one request carries still end up in the right places."""
    data = write_pattern(tmp_path / "source", 1000 * 256)
    older = bytearray(data)
    older[::512] = bytes(255 - byte for byte in data[::512])
    (tmp_path / "target").write_bytes(older)
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=256)
    assert client.synchronize_once() == 500
    assert (tmp_path / "target").read_bytes() == data


def make_long_name(folder: Path, length: int) -> Path:
    """A file whose name takes so many characters of a URL."""
    below, rest = divmod(length - len(quote_plus(bytes(folder))) - 20, 3 * 201)
    path = folder.joinpath(*[os.fsdecode(b"\xff" * 200)] * below, os.fsdecode(b"\xff" * (rest // 3)))
    path.mkdir(parents=True)
    return path / "file"


@pytest.mark.parametrize("is_hole", [False, True], ids=["data", "holes"])
@pytest.mark.parametrize("block_size", [BLOCK, 8 * PIECE_SIZE], ids=["blocks", "pieces"])
def test_name_may_leave_little_room_in_a_url(server, tmp_path, direction, block_size, is_hole):
    """There is never more in a request than it can carry, whatever differs."""
    source, target = (make_long_name(tmp_path / side, 7500) for side in ("source", "target"))
    data = write_pattern(target, 400 * block_size)
    with source.open("wb") as file:
        for offset in range(0, len(data), block_size):
            differs = offset % (2 * block_size) == 0 or block_size > BLOCK
            if differs and is_hole:
                file.seek(BLOCK, os.SEEK_CUR)
            elif differs:
                file.write(bytes(BLOCK))
            file.write(data[file.tell() : offset + block_size])
    client = Client(**place(server, direction, source, target), block_size=block_size, hash_method="blake3")
    assert client.synchronize_once() == (400 if block_size > BLOCK else 200)
    assert target.read_bytes() == source.read_bytes()


def test_halves_of_what_fits_into_a_url_may_take_more_of_it(server, tmp_path, direction, monkeypatch):
    """What is so few that it isn't packed any more, for example."""
    monkeypatch.setattr(Options, "largest_move", 3 * 2**20)
    source, target = (make_long_name(tmp_path / side, 7000) for side in ("source", "target"))
    data = bytearray(write_pattern(target, 80 * 8 * PIECE_SIZE - 5))
    for offset in range(0, len(data), 8 * PIECE_SIZE):
        for piece in (1, 3, 7):
            data[offset + piece * PIECE_SIZE] ^= 1
    source.write_bytes(data)
    places = place(server, direction, source, target)
    assert Client(**places, block_size=8 * PIECE_SIZE, hash_method="blake3").synchronize_once() == 80
    assert target.read_bytes() == data


def test_name_that_leaves_no_room_is_refused_beforehand(server, tmp_path, direction):
    """Nothing has been touched by then."""
    source, target = (make_long_name(tmp_path / side, 7660) for side in ("source", "target"))
    write_pattern(source, 4 * BLOCK)
    client = Client(**place(server, direction, source, target), block_size=BLOCK)
    with pytest.raises(FileForbiddenError, match="leaves no room in a URL"):
        client.synchronize()
    assert not target.exists()


NAMES = {
    "space": "a b",
    "percent": "50%",
    "percent-encoded": "a%20b%2Fc",
    "question mark": "what?size=1",
    "number sign": "a#b",
    "ampersand": "a&filename=b",
    "plus": "a+b",
    "equals": "a=b",
    "semicolon": "a;b",
    "quotes": "a'b\"c",
    "backslash": "a\\b",
    "colon": "x:8080",
    "newline": "a\nb",
    "carriage return": "a\rb",
    "not ASCII": "größe-日本",
    "not UTF-8": os.fsdecode(b"\xff\xfe caf\xe9"),
    "leading dash": "-n",
    "dots": "...",
    "braces": "{filename}s %(x)s %s",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_survive_the_wire(server, tmp_path, direction, name):
    """Any name that a file can have is a name that can be copied from and to."""
    source, target = tmp_path / name, tmp_path / "folder" / name
    data = write_pattern(source, 3 * BLOCK + 1)
    client = Client(**place(server, direction, source, target), block_size=BLOCK)
    assert client.synchronize_once() == 4
    assert target.read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == sorted([name, "folder"])
    assert os.listdir(tmp_path / "folder") == [name]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_survive_percent_encoding(server, tmp_path, name):
    """The URL that a location states of itself leads to the same file."""
    data = write_pattern(tmp_path / name, BLOCK)
    location = Location(expression=server.location(tmp_path / name))
    again = Location(expression=location.expression)
    assert again.expression.startswith(f"{server.origin}/")
    assert again.filename == str(tmp_path / name)
    assert again.read_block(0, BLOCK) == data


def test_command_line_takes_odd_names(server, tmp_path, direction):
    """Names go through a real command line as they are, the non-UTF-8 ones included."""
    name = os.fsdecode(b"a b%&+#?\n\xff")
    data = write_pattern(tmp_path / name, 3 * BLOCK + 1)
    locations = place(server, direction, tmp_path / name, tmp_path / "new" / name)
    result = run_pdiffcopy("-b", str(BLOCK), locations["source"], locations["target"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new" / name).read_bytes() == data


# Other combinations of source and target {{{1


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("state", TARGETS)
def test_both_sides_of_the_same_kind(server, tmp_path, kind, state):
    """Local to local and remote to remote work like the rest."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    before, target = TARGETS[state](data), tmp_path / "target"
    if before is not None:
        target.write_bytes(before)
    client = Client(**place(server, kind, tmp_path / "source", target), block_size=BLOCK)
    assert client.synchronize_once() == count_different(data, before, BLOCK)
    assert target.read_bytes() == data


def test_between_two_servers(server, launch, tmp_path):
    """Source and target may be behind different servers."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    (tmp_path / "target").write_bytes(_older_copy(data))
    source, target = server.location(tmp_path / "source"), launch().location(tmp_path / "target")
    assert Client(source=source, target=target, block_size=BLOCK).synchronize_once() == 3
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("method", ["sha1", "md5", "sha256", "sha3_256", "blake2b", "xxh128", "blake3"])
def test_hash_methods_find_the_differences(server, tmp_path, direction, method):
    """Both sides compute the same digests, whatever the method."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    (tmp_path / "target").write_bytes(_older_copy(data))
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    assert Client(**locations, block_size=BLOCK, hash_method=method).synchronize_once() == 3
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("kind", ["download", "upload", "local", "remote"])
@pytest.mark.parametrize("options", [{}, {"delta_transfer": False}, {"verify": False}], ids=["delta", "whole", "trust"])
def test_missing_parent_folders_are_made(server, tmp_path, kind, options):
    """A new target gets the folders that it needs."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK + 1)
    target = tmp_path / "one" / "two" / "target"
    Client(**place(server, kind, tmp_path / "source", target), block_size=BLOCK, **options).synchronize()
    assert target.read_bytes() == data


def test_missing_target_leaves_configuration_alone(server, tmp_path, direction):
    """The whole file is copied this once: what the user configured stays as it was, also for the next run."""
    write_pattern(tmp_path / "source", 3 * BLOCK)
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK)
    assert not client.run().plan.delta
    assert client.delta_transfer is True
    again = client.run()
    assert again.plan.delta and again.result.blocks_changed == 0


def test_whole_file_moves_everything(server, tmp_path, direction):
    """Without delta transfer, blocks that are equal are moved too."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK + 1)
    write_pattern(tmp_path / "target", 3 * BLOCK + 1)
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    report = Client(**locations, block_size=BLOCK, delta_transfer=False).run()
    assert report.result.bytes_moved == len(data) == report.result.bytes_verified
    assert report.as_dict()["delta_transfer"] is False
    assert (tmp_path / "target").read_bytes() == data


def test_report_counts_what_was_done(server, tmp_path, direction):
    """Blocks, bytes, similarity and verification are as they were."""
    data = write_pattern(tmp_path / "source", 9 * BLOCK + 100)
    older = bytearray(data)
    older[0] ^= 1
    older[-1] ^= 1
    (tmp_path / "target").write_bytes(older)
    report = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK).run()
    facts = report.as_dict()
    assert (facts["blocks_compared"], facts["blocks_changed"]) == (10, 2)
    assert (facts["bytes_compared"], facts["bytes_moved"]) == (len(data), BLOCK + 100)
    assert (facts["verification"], facts["bytes_verified"], facts["retries"]) == ("verified", BLOCK + 100, 0)
    assert facts["similarity"] == 0.8
    assert "2 of 10 blocks differed (80.00% similar by sha1)" in str(report)


def test_verification_can_be_skipped(server, tmp_path, direction):
    """The target is right without verification too, and the report doesn't claim otherwise."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK)
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    report = Client(**locations, verify=False).run()
    assert (report.verification, report.result.bytes_verified) == ("skipped", 0)
    assert (tmp_path / "target").read_bytes() == data


def test_unchanged_blocks_are_not_written(server, tmp_path, direction):
    """Equal files stay as they are, down to the modification time of the target."""
    write_pattern(tmp_path / "source", 3 * BLOCK + 1)
    write_pattern(tmp_path / "target", 3 * BLOCK + 1)
    before = snapshot(tmp_path / "target")
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK)
    assert client.synchronize_once() == 0
    assert snapshot(tmp_path / "target") == before


def test_holes_are_read_as_zeros(server, tmp_path, direction):
    """A sparse source is a file like any other."""
    with (tmp_path / "source").open("wb") as handle:
        handle.truncate(50 * BLOCK)
        handle.seek(20 * BLOCK)
        handle.write(b"data")
    write_pattern(tmp_path / "target", 50 * BLOCK)
    Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK).synchronize()
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("concurrency", [1, 2, 7])
def test_concurrency_does_not_change_the_outcome(server, tmp_path, direction, concurrency):
    """Any number of processes does the same work."""
    data = write_pattern(tmp_path / "source", 200 * BLOCK + 1)
    (tmp_path / "target").write_bytes(_older_copy(data))
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    assert Client(**locations, block_size=BLOCK, concurrency=concurrency).synchronize_once() == 3
    assert (tmp_path / "target").read_bytes() == data


def test_fsync_is_available_on_both_sides(server, tmp_path, direction):
    """A new file and its folder are flushed wherever they are."""
    data = write_pattern(tmp_path / "source", BLOCK)
    Client(**place(server, direction, tmp_path / "source", tmp_path / "new" / "target"), fsync=True).synchronize()
    assert (tmp_path / "new" / "target").read_bytes() == data


# Dry runs and the single steps {{{1


@pytest.mark.parametrize("kind", ["download", "upload", "local", "remote"])
@pytest.mark.parametrize("state", TARGETS)
def test_dry_run_touches_nothing(server, tmp_path, kind, state):
    """A dry run finds the same differences, and leaves contents, sizes, times and folders alone."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    before, target = TARGETS[state](data), tmp_path / "folder" / "target"
    if before is not None:
        target.parent.mkdir()
        target.write_bytes(before)
    untouched = snapshot(target), snapshot(tmp_path / "source")
    listing = sorted(os.listdir(tmp_path))
    report = Client(**place(server, kind, tmp_path / "source", target), block_size=BLOCK, dry_run=True).run()
    assert report.result.blocks_changed == len(find_different(data, before, BLOCK))
    assert (report.result.bytes_moved, report.verification) == (0, "skipped")
    assert (snapshot(target), snapshot(tmp_path / "source")) == untouched
    assert sorted(os.listdir(tmp_path)) == listing


@pytest.mark.parametrize("state", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_find_changes_lists_the_offsets_of_the_blocks_that_differ(server, tmp_path, direction, size, state):
    """The offsets are exactly those of the differing blocks, in order, and nothing is written."""
    data = write_pattern(tmp_path / "source", SIZES[size])
    before, target = TARGETS[state](data), tmp_path / "target"
    if before is not None:
        target.write_bytes(before)
    untouched = snapshot(target)
    client = Client(**place(server, direction, tmp_path / "source", target), block_size=BLOCK)
    assert client.find_changes() == find_different(data, before, BLOCK)
    assert snapshot(target) == untouched


@pytest.mark.parametrize(
    ("size", "offsets", "expected"),
    [
        (0, [], 0),
        (1, [0], 1),
        (BLOCK, [0], BLOCK),
        (BLOCK + 1, [BLOCK], 1),
        (BLOCK + 1, [0, BLOCK], BLOCK + 1),
        (3 * BLOCK, [0, 2 * BLOCK], 2 * BLOCK),
        (3 * BLOCK - 7, [2 * BLOCK], BLOCK - 7),
    ],
)
def test_transfer_size_counts_a_short_last_block(server, tmp_path, direction, size, offsets, expected):
    """The last block counts with the bytes that it has."""
    write_pattern(tmp_path / "source", size)
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK)
    assert client.compute_transfer_size(offsets) == expected


def test_transfer_changes_moves_only_the_given_blocks(server, tmp_path, direction):
    """Exactly the blocks that were asked for are copied, in whatever order they come."""
    data = write_pattern(tmp_path / "source", 4 * BLOCK + 10)
    old = write_pattern(tmp_path / "target", 4 * BLOCK + 10, seed=2)
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK)
    client.transfer_changes([4 * BLOCK, BLOCK, BLOCK])
    expected = old[:BLOCK] + data[BLOCK : 2 * BLOCK] + old[2 * BLOCK : 4 * BLOCK] + data[4 * BLOCK :]
    assert (tmp_path / "target").read_bytes() == expected


def test_steps_put_together_make_a_run(server, tmp_path, direction):
    """The two halves of a run do together what a run does."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    (tmp_path / "target").write_bytes(_older_copy(data) + b"tail")
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK)
    client.transfer_changes(client.find_changes())
    assert (tmp_path / "target").read_bytes() == data


def test_hashes_of_a_location_as_a_dictionary(server, tmp_path):
    """The adapter returns all hashes by offset."""
    data = write_pattern(tmp_path / "file", 2 * BLOCK + 1)
    expected = {o: hashlib.md5(data[o : o + BLOCK]).hexdigest() for o in range(0, len(data), BLOCK)}
    for expression in (str(tmp_path / "file"), server.location(tmp_path / "file")):
        location = Location(expression=expression)
        assert get_hashes_fn(location, block_size=BLOCK, method="md5", concurrency=2) == expected


def test_transfer_of_one_block(server, tmp_path, direction):
    """The adapter copies one block, a short last one too, and nothing else."""
    data = write_pattern(tmp_path / "source", 2 * BLOCK + 9)
    old = write_pattern(tmp_path / "target", 2 * BLOCK + 9, seed=2)
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    source, target = Location(expression=locations["source"]), Location(expression=locations["target"])
    assert transfer_block_fn(2 * BLOCK, source, target, BLOCK) == 2 * BLOCK
    assert (tmp_path / "target").read_bytes() == old[: 2 * BLOCK] + data[2 * BLOCK :]


def test_locations_may_be_assigned_as_objects_or_as_text(tmp_path):
    """Both spellings mean the same, and pathnames work like their text."""
    location = Location(expression=str(tmp_path / "x"))
    assert Client(source=location, target=tmp_path / "y").source is location
    assert Client(source=tmp_path / "x", target=location).source.filename == str(tmp_path / "x")


def test_changes_are_found_though_the_target_is_read_only(launch, tmp_path):
    """To compare takes no right to write; to write does."""
    server = launch("--read-only")
    write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 3 * BLOCK, seed=2)
    client = Client(source=str(tmp_path / "source"), target=server.location(tmp_path / "target"), block_size=BLOCK)
    assert client.find_changes() == [0, BLOCK, 2 * BLOCK]
    with pytest.raises(ForbiddenError, match="read-only"):
        client.transfer_changes([0])


def test_nothing_is_transferred_in_a_dry_run(server, tmp_path, direction):
    """The halves of a run heed what the whole does."""
    write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 2 * BLOCK, seed=2)
    before = snapshot(tmp_path / "target")
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    Client(**locations, block_size=BLOCK, dry_run=True).transfer_changes([0, BLOCK])
    assert snapshot(tmp_path / "target") == before


@pytest.mark.parametrize("method", ["SHA1", "Sha1", "SHA-1", "XXH128"])
def test_hash_methods_may_be_spelled_as_python_allows(server, tmp_path, direction, method):
    """What works for local files works for remote ones, and the report has the name that both sides know."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 3 * BLOCK, seed=2)
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    report = Client(**locations, block_size=BLOCK, hash_method=method).run()
    assert (tmp_path / "target").read_bytes() == data
    assert report.as_dict()["hash_method"] in ("sha1", "xxh128")


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("", "blake3"),
        ("import sys; sys.modules['blake3'] = None", "sha1"),
    ],
    ids=["both have blake3", "one lacks it"],
)
def test_hash_method_is_the_best_that_both_sides_have(launch, tmp_path, direction, setup, expected):
    """Where a user leaves that to the program."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 3 * BLOCK, seed=2)
    locations = place(launch(setup=setup), direction, tmp_path / "source", tmp_path / "target")
    report = Client(**locations, block_size=BLOCK, hash_method="auto").run()
    assert (tmp_path / "target").read_bytes() == data
    assert report.as_dict()["hash_method"] == expected
    assert f"by {expected})" in str(report)


@pytest.mark.parametrize("method", ["xxh128", "blake3"])
def test_source_is_not_read_again_for_its_digest(server, tmp_path, direction, method, monkeypatch):
    """The digests that were compared are enough to verify, and the workers send what they send without reading it."""
    data = write_pattern(tmp_path / "source", 5 * BLOCK)
    write_pattern(tmp_path / "target", 5 * BLOCK, seed=2)
    monkeypatch.setattr(LocalFile, "digest", None)
    locations = place(server, direction, tmp_path / "source", tmp_path / "target")
    report = Client(**locations, block_size=BLOCK, hash_method=method).run()
    assert (tmp_path / "target").read_bytes() == data
    assert report.plan.verification is Verification.BLOCKWISE
    assert report.result.bytes_verified == 5 * BLOCK


# What is refused before anything is touched {{{1


def test_missing_source_leaves_the_target_alone(server, tmp_path, direction):
    """Without a source there's nothing to do, least of all to the target."""
    write_pattern(tmp_path / "target", 100)
    before = snapshot(tmp_path / "target")
    client = Client(**place(server, direction, tmp_path / "nothing", tmp_path / "target"))
    with pytest.raises(FileMissingError, match="nothing"):
        client.synchronize()
    assert snapshot(tmp_path / "target") == before


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["same name", "symbolic link", "hard link"])
def test_copying_a_file_onto_itself_is_refused(tmp_path, link):
    """One file under two names is one file."""
    data = write_pattern(tmp_path / "file", 100)
    other = tmp_path / "file"
    if link:
        other = tmp_path / "other"
        link(tmp_path / "file", other)
    with pytest.raises(UsageError, match="same file"):
        Client(source=str(tmp_path / "file"), target=str(other), delta_transfer=False).synchronize()
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST"])
def test_copying_a_remote_file_onto_itself_is_refused(launch_old, tmp_path, name):
    """Even where the server can't tell which file a name leads to."""
    data = write_pattern(tmp_path / "file", 100)
    peer = launch_old()
    location = f"{name}:{peer.port}{tmp_path / 'file'}"
    with pytest.raises(UsageError, match="same file"):
        Client(source=location, target=f"localhost:{peer.port}{tmp_path / 'file'}", delta_transfer=False).synchronize()
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block size"),
        ({"block_size": -1}, "block size"),
        ({"block_size": 2**40}, "block size"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 10**6}, "concurrency"),
        ({"hash_method": "nonsense"}, "nonsense"),
        ({"hash_method": "shake_128"}, "shake_128"),
        ({"hash_method": ""}, "hash method"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_touched(server, tmp_path, direction, options, message):
    """What can't work is an error that says what's wrong, and the target isn't even made."""
    write_pattern(tmp_path / "source", 100)
    client = Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), **options)
    with pytest.raises(UsageError, match=message):
        client.synchronize()
    assert not (tmp_path / "target").exists()


def test_both_locations_are_needed(tmp_path):
    """Half a job isn't one."""
    with pytest.raises(UsageError, match="source and a target"):
        Client(source=str(tmp_path / "x")).synchronize()
    with pytest.raises(UsageError, match="source and a target"):
        Client(target=str(tmp_path / "x")).synchronize()


def test_folders_are_no_files(server, tmp_path, direction):
    """A folder is no source, unless that's wanted, and a target in which a file gets its place."""
    (tmp_path / "folder").mkdir()
    write_pattern(tmp_path / "file", 100)
    with pytest.raises(UsageError, match="folder is a folder: add -r"):
        Client(**place(server, direction, tmp_path / "folder", tmp_path / "file")).synchronize()
    Client(**place(server, direction, tmp_path / "file", tmp_path / "folder")).synchronize()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "file").read_bytes() == make_data(100)


def test_read_only_server_takes_no_uploads_but_dry_runs(launch, tmp_path):
    """The client knows beforehand, so a run ends before anything is compared; a dry run is no write."""
    read_only = launch("--read-only")
    write_pattern(tmp_path / "source", 100)
    write_pattern(tmp_path / "target", 100, seed=2)
    before = snapshot(tmp_path / "target")
    locations = place(read_only, "upload", tmp_path / "source", tmp_path / "target")
    with pytest.raises(ForbiddenError, match="read-only"):
        Client(**locations).synchronize()
    assert Client(**locations, dry_run=True).synchronize_once() == 1
    assert snapshot(tmp_path / "target") == before
    assert Client(**place(read_only, "download", tmp_path / "source", tmp_path / "copy")).synchronize_once() == 1


def test_unreachable_server_is_an_error_that_names_it(tmp_path):
    """Nobody listens there: the run fails after its retries."""
    write_pattern(tmp_path / "source", 100)
    port = find_free_port()
    client = Client(source=str(tmp_path / "source"), target=f"127.0.0.1:{port}/x", network=Network(retries=0))
    with pytest.raises(TransientError, match=f"127.0.0.1:{port}.*Connection refused"):
        client.synchronize()


# Things that happen during a run {{{1


@pytest.fixture
def after_the_first_look(monkeypatch):
    """A function that makes something happen between the moment when a run has looked at the files and the transfer."""

    def prepare(happen):
        original = Job.look

        def look(self, writes):
            original(self, writes)
            happen()

        monkeypatch.setattr(Job, "look", look)

    return prepare


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten", "is replaced", "is removed"])
def test_source_that_changes_during_the_run_is_never_a_success(
    server, tmp_path, direction, change, after_the_first_look
):
    """The copy may be a mixture of two states: that's an error of its own kind."""
    source = tmp_path / "source"
    write_pattern(source, 4 * BLOCK)
    write_pattern(tmp_path / "target", 4 * BLOCK, seed=2)

    def happen():
        if change == "grows":
            with source.open("ab") as handle:
                handle.write(b"more")
        elif change == "shrinks":
            os.truncate(source, BLOCK)
        elif change == "is rewritten":
            write_pattern(source, 4 * BLOCK, seed=3)
        elif change == "is replaced":
            write_pattern(tmp_path / "new", 4 * BLOCK)
            os.replace(tmp_path / "new", source)
        else:
            source.unlink()

    client = Client(**place(server, direction, source, tmp_path / "target"), block_size=BLOCK)
    after_the_first_look(happen)
    with pytest.raises(SourceChangedError, match="changed while it was copied"):
        client.synchronize()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(0o600, 0o600), (0o640, 0o640), (0o444, 0o644), (0o777, 0o755), (0o400, 0o600), (0o4755, 0o755)],
)
def test_new_target_is_for_no_more_people_than_the_source(launch, tmp_path, direction, mode, expected):
    """A secret stays one, whatever the umask is; a target that exists keeps its own mode."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_pattern(source, 4 * BLOCK)
    source.chmod(mode)
    umask = os.umask(0o022)
    try:
        server = launch()
        for wanted in (expected, 0o604):
            Client(**place(server, direction, source, target), block_size=BLOCK).run()
            assert stat.S_IMODE(target.stat().st_mode) == wanted
            target.chmod(0o604)
    finally:
        os.umask(umask)


@pytest.mark.parametrize("change", ["is removed", "is replaced", "grows"])
def test_target_that_changes_before_it_is_claimed_ends_up_right(
    server, tmp_path, direction, change, after_the_first_look
):
    """Another file isn't touched. Otherwise what counts is what was claimed, not what it was when the run began."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_pattern(source, 4 * BLOCK)
    write_pattern(target, 4 * BLOCK)
    replacement = write_pattern(tmp_path / "new", 4 * BLOCK, seed=9)

    def happen():
        if change == "is removed":
            target.unlink()
        elif change == "is replaced":
            os.replace(tmp_path / "new", target)
        else:
            write_pattern(target, 5 * BLOCK)

    client = Client(**place(server, direction, source, target), block_size=BLOCK)
    after_the_first_look(happen)
    if change != "grows":
        with pytest.raises(FileError if change == "is removed" else ReplacedError):
            client.synchronize()
        assert change == "is removed" or target.read_bytes() == replacement
    else:
        client.synchronize()
        assert target.read_bytes() == source.read_bytes()


# Two runs at one target {{{1

MOMENTS = {
    "it has claimed the target": ("upload", "response POST+/claim 0 hold"),
    "it makes room": ("upload", "request POST+/resize 0 hold"),
    "it compares (upload)": ("upload", "response GET+/hashes middle hold"),
    "it compares (download)": ("download", "response GET+/hashes middle hold"),
    "it writes (upload)": ("upload", "request POST+/blocks middle hold"),
    "it writes (download)": ("download", "response GET+/blocks middle hold"),
    "it has written": ("upload", "response POST+/blocks 0 hold"),
    "it looks for its claim": ("upload", "request GET+/info 0 hold 1 1"),
    "it ends its claim": ("upload", "request POST+/release 0 hold"),
}


def start_run(server, direction, source, target):
    """Start a command line with small blocks."""
    places = place(server, direction, source, target)
    command = [sys.executable, "-m", "pdiffcopy", "-b", str(BLOCK), "-c", "2", places["source"], places["target"]]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("size", [150_000, 300_000, 450_000], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("moment, fault", MOMENTS.values(), ids=MOMENTS)
def test_later_run_wins(server, tmp_path, moment, fault, size):
    """While a run is at some point, another one with another source comes and goes: that source is the target."""
    target = tmp_path / "target"
    write_pattern(tmp_path / "earlier", 300_000, seed=1)
    later = write_pattern(tmp_path / "later", size, seed=2)
    # So that there is something to be made room for, and something to be cut.
    write_pattern(target, 200_000 if "resize" in fault else 320_000, seed=3)
    with RelayProcess(server.port, fault) as relay:
        process = start_run(replace(server, port=relay.port), moment, tmp_path / "earlier", target)
        relay.wait_for_hit()
        result = run_pdiffcopy("-b", str(BLOCK), "-c", "2", *place(server, moment, tmp_path / "later", target).values())
        relay.release()
        _, stderr = process.communicate(timeout=RUN_TIMEOUT)
    assert result.returncode == 0, result.stderr
    if "release" in fault:
        # It was proven before the other run came that nobody had been there: that's as if this one had ended before.
        assert process.returncode == 0, stderr
    else:
        assert process.returncode == 1, stderr
        # A target that has become shorter may be noticed first.
        assert re.search("another run has taken it over|become shorter|resized", stderr.splitlines()[-1])
    assert target.read_bytes() == later
    assert os.listxattr(target) == []


@pytest.mark.parametrize("delay", [0, 0.1, 0.3])
@pytest.mark.parametrize("directions", [("upload", "upload"), ("download", "download"), ("upload", "download")])
def test_two_runs_never_mix_their_data(server, tmp_path, directions, delay):
    """Whenever two runs meet: one of them succeeds at least, and the target is the source of one that did."""
    target = tmp_path / "target"
    write_pattern(target, 3_000_000, seed=3)
    sources = [write_pattern(tmp_path / str(seed), 3_000_000, seed) for seed in (1, 2)]
    first = start_run(server, directions[0], tmp_path / "1", target)
    time.sleep(delay)  # whatever the two are doing then: the promise is the same
    runs = [first, start_run(server, directions[1], tmp_path / "2", target)]
    errors = [run.communicate(timeout=RUN_TIMEOUT)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) in ([0, 0], [0, 1]), errors
    assert target.read_bytes() in [source for source, code in zip(sources, codes, strict=True) if code == 0], codes
    assert os.listxattr(target) == []


def test_success_leaves_no_claim(server, tmp_path, direction):
    """Whatever is left of a run that was killed: nothing of it, or of this one, stays when all is done."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 3 * BLOCK, seed=2)
    with LocalFile(str(tmp_path / "target"), write=True) as file:
        file.claims.take("dead")
    Client(**place(server, direction, tmp_path / "source", tmp_path / "target"), block_size=BLOCK).synchronize()
    assert (tmp_path / "target").read_bytes() == data
    assert os.listxattr(tmp_path / "target") == []


@pytest.mark.parametrize("missing", [False, True])
def test_target_that_cannot_be_claimed_is_written_to(server, tmp_path, direction, bare_disk, missing):
    """A file system without extended attributes is one to copy to nevertheless."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK + 1)
    if not missing:
        write_pattern(bare_disk / "target", 4 * BLOCK, seed=2)
    Client(**place(server, direction, tmp_path / "source", bare_disk / "target"), block_size=BLOCK).synchronize()
    assert (bare_disk / "target").read_bytes() == data
