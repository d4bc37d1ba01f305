"""Files as large as a file system allows, and of any age: in both directions, over the wire and not."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from pdiffcopy.blocks import MAX_OFFSET
from tests.support import DISKS, disk_of_kind, error_lines, mounted, run_pdiffcopy, snapshot

PAGE = 4096
BOTH = ("upload", "download")
DATA = {0: b"begin", 2**41 + 12345: b"needle" * 1000, -3: b"end"}
"""Bytes by their offsets, some of them counted from the end."""
ALLOCATED = 4 * PAGE
"""How much room that takes: the needle lies in two pages."""


def find_largest(folder: Path) -> int:
    """The size of the largest file that a file system can have."""
    path, size = folder / "largest", 0
    path.touch()
    for step in (2**exponent for exponent in reversed(range(63))):
        with suppress(OSError):
            os.truncate(path, size + step)
            size += step
    path.unlink()
    return size


def write(path: Path, size: int, data: dict[int, bytes]) -> None:
    """Make a file of a size, which has nothing else than some data."""
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)
    with path.open("r+b", buffering=0) as file:
        for offset, text in data.items():
            os.pwrite(file.fileno(), text, offset % size)
        os.fsync(file.fileno())


def is_equal(path: Path, size: int, data: dict[int, bytes], allocated: int) -> bool:
    """Whether a file has the data, and no room for anything else."""
    os.sync()
    status = path.stat()
    with path.open("rb", buffering=0) as file:
        texts = {offset: os.pread(file.fileno(), len(text), offset % size) for offset, text in data.items()}
    return status.st_size == size and texts == data and status.st_blocks * 512 <= allocated


def copy(server, direction: str, source: Path, target: Path, *options: str) -> dict:
    """Run the program, and return the report."""
    places = (
        server.location(source) if direction in ("download", "remote") else source,
        server.location(target) if direction in ("upload", "remote") else target,
    )
    result = run_pdiffcopy("--json", *options, *places)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=[*DISKS, "tmpfs"])
def disk(request, tmp_path_factory):
    """A file system, and the size of the largest file that it can have."""
    folder = tmp_path_factory.mktemp(request.param)
    with mounted(folder, "tmpfs") if request.param == "tmpfs" else disk_of_kind(request.param, folder) as disk:
        yield disk, find_largest(disk)


@pytest.fixture
def memory(tmp_path):
    """A file system without a disk, which allows files of any size and age."""
    with mounted(tmp_path / "memory", "tmpfs", "size=64m") as folder:
        yield folder


@pytest.mark.parametrize("direction", BOTH)
def test_largest_files(server, disk, direction):
    """What is in them moves, and they take no more time, and no more room."""
    folder, size = disk
    source, target = folder / "source", folder / "target"
    write(source, size, DATA)
    target.unlink(missing_ok=True)
    report = copy(server, direction, source, target)
    assert is_equal(target, size, DATA, ALLOCATED)
    assert report["bytes_compared"] == size and report["bytes_moved"] <= ALLOCATED
    assert copy(server, direction, source, target)["blocks_changed"] == 0
    write(target, size, {0: b"BEGIN", 2**40: bytes(2**20), -1: b"?"})
    copy(server, direction, source, target)
    assert is_equal(target, size, DATA, ALLOCATED)


@pytest.mark.parametrize(
    "options", ["-W", "--atomic", "--sparse=always -b 1000003", "-b 64KiB -m sha1 -c 1", "--no-verify --fsync -b 64MiB"]
)
def test_options_of_largest_files(server, memory, options):
    """Whatever blocks are like, and however they are compared, written and checked."""
    source, target = memory / "source", memory / "target"
    write(source, MAX_OFFSET, DATA)
    write(target, MAX_OFFSET, {5: b"x", 2**62: b"y"})
    copy(server, "remote", source, target, *options.split())
    assert is_equal(target, MAX_OFFSET, {**DATA, 2**62: b"\0"}, ALLOCATED + 2 * PAGE)
    assert copy(server, "remote", source, target, "-n", *options.replace("-W", "").split())["blocks_changed"] == 0


@pytest.mark.parametrize("direction", BOTH)
def test_dry_run_of_largest_files(server, memory, direction):
    """It tells what differs, even if all of it does, and touches nothing."""
    source, target = memory / "source", memory / "target"
    write(source, MAX_OFFSET, DATA)
    write(target, MAX_OFFSET, {-1: b"?"})
    assert copy(server, direction, source, target, "-n")["blocks_changed"] == 3
    assert copy(server, direction, source, target, "-n", "--sparse=never")["blocks_changed"] == 2**43
    assert is_equal(target, MAX_OFFSET, {-1: b"?"}, PAGE)
    os.truncate(target, 5)
    assert copy(server, direction, source, target, "-n")["blocks_changed"] == 3


@pytest.mark.parametrize("direction", BOTH)
def test_largest_file_without_holes_does_not_fit(server, memory, direction):
    """That is told with both numbers before anything is touched."""
    source, target = memory / "source", memory / "target"
    write(source, MAX_OFFSET, DATA)
    places = (server.location(source), target) if direction == "download" else (source, server.location(target))
    result = run_pdiffcopy("--sparse=never", *places)
    assert result.returncode == 1 and not target.exists()
    assert f"takes {MAX_OFFSET} bytes more than now, and its file system has" in error_lines(result)[0]


def test_file_without_holes_does_not_fit_on_a_disk_that_tells_no_room(memory, tmp_path):
    """The first step finds that out: nothing is written until the disk is full."""
    write(memory / "source", 2**44, DATA)
    with disk_of_kind("btrfs", tmp_path) as disk:
        result = run_pdiffcopy("--sparse=never", memory / "source", disk / "target")
        assert result.returncode == 1 and "No space left" in error_lines(result)[0]
        assert (disk / "target").stat().st_blocks == 0


@pytest.mark.parametrize("options", [(), ("-b", "1000003")], ids=["MiBs", "odd"])
def test_ends_that_are_in_the_middle_of_a_page(server, disk, options):
    """Those of files and of blocks: what can be a hole becomes one, and nothing is left to do the next time."""
    folder, _ = disk
    source, target = folder / "source", folder / "target"
    size = 2**34 + 5000
    write(source, size, {7: b"begin", 5 * 1000003: b"x"})
    write(target, size, {2**33: bytes(2**21), -2: b"xx"})
    copy(server, "remote", source, target, *options)
    assert is_equal(target, size, {7: b"begin", 5 * 1000003: b"x", 2**33: b"\0", -2: b"\0\0"}, 4 * PAGE)
    assert copy(server, "remote", source, target, *options)["blocks_changed"] == 0


YEARS = {"1 BC": -62_135_596_801, "1969": -1, "2263": 9_250_000_000}
"""Times in seconds since 1970."""


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("year", YEARS)
def test_files_of_any_age(server, memory, direction, year):
    """Files from before 1970, and from so far in the future that the nanoseconds take more than 63 bits."""
    source, target = memory / "source", memory / "target"
    for path, text in ((source, b"new"), (target, b"old")):
        path.write_bytes(text)
        time = YEARS[year] * 10**9 + 987_654_321
        os.utime(path, ns=(time, time))
        assert path.stat().st_mtime_ns == time
    assert copy(server, direction, source, target)["watched"]
    assert snapshot(target)[0] == b"new"
