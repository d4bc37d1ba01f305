"""What becomes of holes and zeros: on several file systems, in both directions, over the wire and not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pdiffcopy.blocks import Extent
from pdiffcopy.client import Client, pipeline
from pdiffcopy.exceptions import DigestMismatchError
from pdiffcopy.files import kernel, openfile
from pdiffcopy.files.holes import find_holes, hides_holes
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.localreplica import LocalReplica
from tests.support import (
    DISKS,
    disk_of_kind,
    error_lines,
    ext4,
    loop_device,
    make_data,
    run_pdiffcopy,
    start_server,
)

PAGE = 4096
MEBIBYTE = 2**20
DIRECTIONS = ("local", "upload", "download")


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    """A file system that knows holes."""
    with disk_of_kind(request.param, tmp_path) as folder:
        yield folder


@pytest.fixture
def one_disk(tmp_path):
    """One of them."""
    with ext4(tmp_path / "image", tmp_path / "disk", size=DISKS["ext4"]) as folder:
        yield folder


def write(path: Path, parts: str, unit: int = MEBIBYTE) -> None:
    """Write a file by a letter for each part: a hole (-), zeros (0), or something that depends on the letter."""
    with path.open("wb", buffering=0) as file:
        # First of all: where a file grows by being written to, XFS takes more room than that.
        file.truncate(len(parts) * unit)
        for index, letter in enumerate(parts):
            if letter != "-":
                file.seek(index * unit)
                file.write(bytes(unit) if letter == "0" else make_data(unit, ord(letter)))
        os.fsync(file.fileno())


def read_holes(path: Path, unit: int = MEBIBYTE) -> str:
    """The same with a letter for each part: a hole, or not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        holes = list(find_holes(file.fileno(), 0, size))
    return "".join(
        "-" if any(hole.offset <= at and at + unit <= sum(hole) for hole in holes) else "x"
        for at in range(0, size, unit)
    )


def get_places(server, direction: str, source: Path, target: Path) -> tuple:
    """The locations of both files."""
    return (
        server.location(source) if direction == "download" else source,
        server.location(target) if direction == "upload" else target,
    )


def copy(server, direction: str, source: Path, target: Path, *options: str) -> dict:
    """Run the program, see that the contents are equal, and return the report."""
    result = run_pdiffcopy("--json", *options, *get_places(server, direction, source, target))
    assert result.returncode == 0, result.stderr
    assert subprocess.run(["cmp", str(source), str(target)]).returncode == 0
    return json.loads(result.stdout)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("before", ["", "bbbbbbbb", "00000000", "--------", "a-0b-0-a", "-a"])
def test_target_ends_as_sparse_as_the_source(server, disk, direction, before):
    """Whatever it was before, and there's nothing left to do afterwards."""
    source, target = disk / "source", disk / "target"
    write(source, "a--00b-c")
    if before:
        write(target, before)
    report = copy(server, direction, source, target)
    assert read_holes(target) == "x--xxx-x"
    assert report["bytes_moved"] <= 3 * MEBIBYTE + (2 * MEBIBYTE if not before else 0)
    again = copy(server, direction, source, target)
    assert (again["blocks_changed"], again["bytes_moved"], again["bytes_zeroed"]) == (0, 0, 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whole_files_keep_their_holes(server, disk, direction):
    """Without a comparison, too."""
    source, target = disk / "source", disk / "target"
    write(source, "a--b")
    write(target, "cccc")
    report = copy(server, direction, source, target, "-W")
    assert read_holes(target) == "x--x"
    assert report["bytes_moved"] == 2 * MEBIBYTE


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [(), ("-W",)], ids=["delta", "whole"])
@pytest.mark.parametrize("before", ["", "dddddddddddddddd", "abcdabcdabcdabcd"])
def test_holes_smaller_than_a_block(server, disk, direction, options, before):
    """As page compression leaves them, one in each page of a table."""
    source, target = disk / "source", disk / "target"
    parts = "a-b--c-d--a-b-c-" * 16
    write(source, parts, PAGE)
    if before:
        write(target, before * 16, PAGE)
    report = copy(server, direction, source, target, *options)
    assert read_holes(target, PAGE) == read_holes(source, PAGE)
    assert report["bytes_moved"] <= source.stat().st_size - parts.count("-") * PAGE
    assert copy(server, direction, source, target)["blocks_changed"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_page_that_changes_between_holes(server, one_disk, direction):
    """It's moved alone, and the holes around it stay."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-b-" * 256, PAGE)
    shutil.copyfile(source, target)
    write(target, "a-b-" * 256, PAGE)
    with source.open("r+b") as file:
        file.seek(64 * PAGE)
        file.write(make_data(PAGE, 99))
    report = copy(server, direction, source, target)
    assert report["blocks_changed"] == 1
    assert report["bytes_moved"] <= 4 * PAGE
    assert read_holes(target, PAGE) == read_holes(source, PAGE)


_CHANGED = "a" + "0" * 63
_SPARSE = "a" + "0" * 31 + "-" * 32


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("parts", "before", "options"),
    [
        (_CHANGED, "", ()),
        (_CHANGED, "b" + "-" * 63, ()),
        (_SPARSE, "b" + "0" * 63, ()),
        (_CHANGED, "b" + "-" * 63, ("--sparse=never",)),
        (_CHANGED, "b" + "-" * 63, ("--sparse=never", "--atomic")),
    ],
    ids=["growing", "holes", "zeros", "never", "never atomic"],
)
def test_zeros_and_holes_of_a_block_that_differs_elsewhere(server, one_disk, direction, parts, before, options):
    """Their digests are the same. So that something else differs is no reason to leave them as they are."""
    source, target = one_disk / "source", one_disk / "target"
    unit = 4 * PAGE
    write(source, "c" * 64 + parts * 8, unit)
    write(target, "c" * 64 + before * 8, unit)
    report = copy(server, direction, source, target, *options)
    assert read_holes(target, unit) == read_holes(source, unit)
    assert report["bytes_moved"] + report["bytes_zeroed"] <= 8 * MEBIBYTE
    assert copy(server, direction, source, target)["outcome"] == "equal"


def test_only_blocks_whose_holes_differ_move_as_a_whole(server, one_disk):
    """The others move in pieces, though all of them may travel together."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, ("a" + "0" * 63) * 8, 4 * PAGE)
    write(target, ("b" + "0" * 63) * 7 + "b" + "-" * 63, 4 * PAGE)
    report = copy(server, "upload", source, target)
    assert (report["blocks_changed"], report["bytes_moved"]) == (8, MEBIBYTE + 7 * 4 * PAGE)
    assert read_holes(target) == "x" * 8


def test_holes_smaller_than_a_block_are_told(server, one_disk):
    """As what became zeros without being moved."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a" * 32 + "-" * 32, 4 * PAGE)
    write(target, "b" * 64, 4 * PAGE)
    report = copy(server, "upload", source, target)
    assert (report["bytes_moved"], report["bytes_zeroed"]) == (MEBIBYTE // 2, MEBIBYTE // 2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("before", "options"),
    [
        *((before, ()) for before in ("missing", "", "c", "xxxxxx", "000000", "------")),
        ("xxxxxx", ("--whole-file",)),
        ("missing", ("--atomic",)),
    ],
)
def test_zeros_become_holes_when_asked_for(server, one_disk, direction, before, options):
    """All blocks of zeros, whether they took room in the source or not."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-00-b")
    if before != "missing":
        write(target, before)
    report = copy(server, direction, source, target, "--sparse=always", *options)
    assert read_holes(target) == "x----x"
    assert report["bytes_moved"] <= 2 * MEBIBYTE
    assert copy(server, direction, source, target, "--sparse=always")["blocks_changed"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("before", ["", "xxxxxx", "------"])
def test_no_holes_are_made_when_none_are_wanted(server, one_disk, direction, before):
    """Holes become zeros that take room."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-00-b")
    if before:
        write(target, before)
    report = copy(server, direction, source, target, "--sparse=never")
    assert read_holes(target) == "xxxxxx"
    assert report["bytes_moved"] <= 6 * MEBIBYTE
    assert copy(server, direction, source, target, "--sparse=never")["blocks_changed"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_terabyte_of_nothing(server, disk, direction):
    """It takes as long as what's in it."""
    source, target = disk / "source", disk / "target"
    write(source, "a")
    with source.open("r+b") as file:
        file.truncate(2**40 + 5)
        file.seek(2**39 + 12345)
        file.write(b"needle")
    report = run_sparse(server, direction, source, target)
    assert report["size"] == 2**40 + 5
    assert report["bytes_moved"] <= 2 * MEBIBYTE
    assert report["blocks_compared"] == 2**20 + 1
    assert target.stat().st_size == 2**40 + 5
    assert target.stat().st_blocks * 512 <= 2 * MEBIBYTE
    with target.open("rb") as file:
        file.seek(2**39 + 12345)
        assert file.read(6) == b"needle"
    assert run_sparse(server, direction, source, target)["blocks_changed"] == 0


def run_sparse(server, direction: str, source: Path, target: Path) -> dict:
    """As :func:`copy`, without reading all of it."""
    result = run_pdiffcopy("--json", *get_places(server, direction, source, target))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_dry_run_tells_of_holes(server, one_disk):
    """And makes none."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a--b")
    write(target, "a00b")
    result = run_pdiffcopy("--json", "-n", server.location(source), target)
    assert json.loads(result.stdout)["blocks_changed"] == 2
    assert read_holes(target) == "xxxx"


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_old_peers_get_and_send_bytes(launch_old, one_disk, direction):
    """They know nothing of holes, and what the user asks for in addition is refused."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a--b")
    write(target, "cccc")
    peer = launch_old()
    copy(peer, direction, source, target)
    result = run_pdiffcopy("--sparse=always", *get_places(peer, direction, source, target))
    assert result.returncode == 1
    assert "too old for --sparse=always" in error_lines(result)[0]


def test_choice_has_to_be_one(tmp_path):
    """The others are named."""
    (tmp_path / "source").touch()
    result = run_pdiffcopy("--sparse=perhaps", tmp_path / "source", tmp_path / "target")
    assert error_lines(result) == ["pdiffcopy: --sparse takes auto, always, never, not 'perhaps'"]


def test_devices_get_zeros(tmp_path):
    """They have no holes, so holes of the source are zeros there; what lies behind its end is left alone."""
    write(tmp_path / "source", "a--b")
    (tmp_path / "image").write_bytes(make_data(8 * MEBIBYTE, 7))
    with loop_device(tmp_path / "image") as device:
        for changed in (4, 0):
            result = run_pdiffcopy("--json", tmp_path / "source", device)
            assert result.returncode == 0, result.stderr
            assert json.loads(result.stdout)["blocks_changed"] == changed
            assert json.loads(result.stdout)["bytes_left_alone"] == 4 * MEBIBYTE
        with open(device, "rb") as file:
            assert file.read(4 * MEBIBYTE) == (tmp_path / "source").read_bytes()
            assert file.read() == make_data(8 * MEBIBYTE, 7)[4 * MEBIBYTE :]


@pytest.mark.parametrize("options", [(), ("-n",)], ids=["copy", "dry run"])
def test_devices_that_are_too_small(tmp_path, options):
    """Nothing is written to them."""
    write(tmp_path / "source", "abc")
    (tmp_path / "image").write_bytes(make_data(2 * MEBIBYTE, 7))
    with loop_device(tmp_path / "image") as device:
        result = run_pdiffcopy(*options, tmp_path / "source", device)
        assert result.returncode == 1
        assert f"{device} is a block device of {2 * MEBIBYTE} bytes" in error_lines(result)[0]
        assert Path(device).read_bytes() == make_data(2 * MEBIBYTE, 7)


def test_file_systems_without_holes_get_zeros(one_disk, monkeypatch):
    """Written as such, in parts that a request can ask for."""
    write(one_disk / "file", "abc")
    monkeypatch.setattr(kernel, "punch_hole", lambda *_: False)
    monkeypatch.setattr(pipeline, "BATCH_SIZE", MEBIBYTE)
    target = LocalReplica(str(one_disk / "file"))
    plan = type("Plan", (), {"run": "", "surplus": 0})
    assert pipeline._fill(plan, [Extent(PAGE, 2 * MEBIBYTE)], (), target) == 2 * MEBIBYTE
    data = (one_disk / "file").read_bytes()
    assert data[PAGE : PAGE + 2 * MEBIBYTE] == bytes(2 * MEBIBYTE)
    assert data[:PAGE] == make_data(MEBIBYTE, ord("a"))[:PAGE]
    assert data[PAGE + 2 * MEBIBYTE :] == make_data(MEBIBYTE, ord("c"))[PAGE:]


def test_root_and_read_only_hold_for_holes(tmp_path):
    """As for all other requests."""
    (tmp_path / "root").mkdir()
    write(tmp_path / "root" / "file", "ab")
    server = start_server(tmp_path, "--root", str(tmp_path / "root"), "--read-only")
    try:
        write(tmp_path / "source", "--")
        result = run_pdiffcopy(tmp_path / "source", f"127.0.0.1:{server.port}/file")
        assert result.returncode == 1 and "read-only" in error_lines(result)[0]
    finally:
        server.stop()
    assert read_holes(tmp_path / "root" / "file") == "xx"


# Where holes can't be had as usual {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("option", ["auto", "always"])
@pytest.mark.parametrize("surplus", [1, PAGE - 1, 2 * MEBIBYTE], ids=["a byte", "less than a page", "more"])
def test_hole_at_the_end_of_a_target_that_was_longer(server, one_disk, direction, option, surplus):
    """Its last block is a whole one, though the source ends within it: what lies behind is cut off."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-")
    write(target, "bbb")
    os.truncate(source, 2 * MEBIBYTE - 1000)
    os.truncate(target, 2 * MEBIBYTE - 1000 + surplus)
    assert copy(server, direction, source, target, f"--sparse={option}")["outcome"] == "updated"
    assert target.stat().st_blocks == source.stat().st_blocks
    again = copy(server, direction, source, target, f"--sparse={option}")
    assert (again["outcome"], again["blocks_changed"], again["bytes_zeroed"]) == ("equal", 0, 0)


def test_target_that_hides_its_holes_is_equal(one_disk, monkeypatch):
    """Where nobody can find any, zeros are all that there can be: they aren't written again and again."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a--b")
    write(target, "a00b")
    before = target.stat()
    monkeypatch.setattr(openfile, "hides_holes", lambda fd, size: os.fstat(fd).st_ino == before.st_ino)
    for options in ({}, {"sparse": "always"}, {"dry_run": True}):
        report = Client(source=source, target=target, **options).run()
        assert (report.outcome, report.result.bytes_zeroed) == ("equal", 0)
    monkeypatch.undo()
    assert target.stat().st_blocks == before.st_blocks
    assert Client(source=source, target=target, dry_run=True).run().result.blocks_changed == 2


@pytest.mark.parametrize(
    "kind, size, expected",
    [(0x65735546, 1, True), (0x65735546, 0, False), (0x6969, 1, True), (0x4D44, 0, True), (0xEF53, 1, False)],
    ids=["FUSE", "FUSE, empty", "NFS", "FAT, empty", "ext4"],
)
def test_file_systems_that_hide_holes(monkeypatch, kind, size, expected):
    """Those that may not tell where they are, and those that have none. A file that is going to grow gets some."""
    monkeypatch.setattr(kernel, "get_file_system", lambda fd: kind)
    assert hides_holes(0, size) is expected


@pytest.mark.parametrize("punches", [True, False], ids=["holes", "no holes"])
def test_differences_where_holes_are_hidden(one_disk, monkeypatch, punches):
    """What becomes a hole of the source is one where that's possible, and otherwise zeros. It grows by holes."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-0b--")
    write(target, "ac0d")
    inode = target.stat().st_ino
    monkeypatch.setattr(openfile, "hides_holes", lambda fd, size: os.fstat(fd).st_ino == inode)
    monkeypatch.setattr(openfile, "find_holes", hide_holes(inode))
    if not punches:
        monkeypatch.setattr(kernel, "punch_hole", lambda *_: False)
    for changed in (2, 0):
        report = Client(source=source, target=target).run()
        assert report.result.blocks_changed == changed
        assert target.read_bytes() == source.read_bytes()
    monkeypatch.undo()
    assert read_holes(target) == ("x-xx--" if punches else "xxxx--")


def hide_holes(inode):
    def find(fd, *arguments):
        return find_holes(fd, *arguments) if os.fstat(fd).st_ino != inode else iter(())

    return find


@pytest.mark.parametrize("before", ["aaaa", "aa-0"])
def test_blocks_at_the_end_of_a_file_have_holes_to_its_end(server, one_disk, before):
    """The last grain of a file may be a part of one, and is a hole nevertheless."""
    source, target, grain = one_disk / "source", one_disk / "target", os.statvfs(one_disk).f_bsize
    write(source, "aa--", grain)
    write(target, before, grain)
    for path in (source, target):
        os.truncate(path, 4 * grain - 100)
    assert copy(server, "local", source, target)["blocks_changed"] == 1
    assert read_holes(target, grain)[:3] == "xx-"
    assert target.stat().st_blocks == source.stat().st_blocks


def test_no_holes_are_made_where_none_are_wanted_within_blocks(server, one_disk):
    """With ``--sparse=never`` it doesn't matter where in a block the source has holes: it isn't moved for that."""
    source, target = one_disk / "source", one_disk / "target"
    write(source, "a-b-" * 64, PAGE)
    write(target, "a0b0" * 64, PAGE)
    with source.open("r+b") as file:
        file.write(make_data(PAGE, 99))
    report = copy(server, "local", source, target, "--sparse=never")
    assert report["bytes_moved"] == 4 * PAGE
    assert "-" not in read_holes(target, PAGE)


def test_zeros_that_did_not_arrive_are_noticed(one_disk, monkeypatch):
    """They're read back, too."""
    write(one_disk / "file", "ab")
    monkeypatch.setattr(LocalFile, "_zero", lambda *_: None)
    with LocalFile(str(one_disk / "file"), write=True) as file, pytest.raises(DigestMismatchError, match="zeros"):
        file.clear([Extent(0, PAGE)], keep=True)
