"""Whether a target fits is known before it's touched, and what fits is never refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest

from tests.support import error_lines, ext4, loop_device, make_data, run_pdiffcopy, snapshot

MEBIBYTE = 2**20
DIRECTIONS = ("local", "upload")


@pytest.fixture
def disk(tmp_path):
    """A small disk."""
    with ext4(tmp_path / "image", tmp_path / "disk", "-m", "0", size=64 * MEBIBYTE) as folder:
        yield folder


def get_room(folder) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def fill(path, size: int) -> None:
    """Make a file without holes."""
    data = make_data(MEBIBYTE)
    with path.open("wb") as file:
        for offset in range(0, size, MEBIBYTE):
            file.write(data[: size - offset])
        os.fsync(file.fileno())


def get_place(server, direction, path):
    return server.location(path) if direction == "upload" else path


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["target", "folder/target"])
def test_missing_target_that_does_not_fit_stays_missing(server, tmp_path, disk, direction, name):
    """One line tells how much is needed and how much there is."""
    fill(tmp_path / "source", 100 * MEBIBYTE)
    started = time.monotonic()
    result = run_pdiffcopy(tmp_path / "source", get_place(server, direction, disk / name))
    assert result.returncode == 1
    (line,) = error_lines(result)
    found = re.search(r"takes (\d+) bytes more than now, and its file system has (\d+) left", line)
    assert tuple(map(int, found.groups())) == (100 * MEBIBYTE, get_room(disk))
    assert not (disk / name).parent.joinpath("target").exists()
    assert not (disk / "folder").exists()
    assert time.monotonic() - started < 20  # it isn't found out by writing


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_target_that_does_not_fit_is_left_alone(server, tmp_path, disk, direction):
    """What it has already counts."""
    fill(tmp_path / "source", 100 * MEBIBYTE)
    fill(disk / "target", 10 * MEBIBYTE)
    before = snapshot(disk / "target")
    result = run_pdiffcopy(tmp_path / "source", get_place(server, direction, disk / "target"))
    assert result.returncode == 1
    assert f"takes {90 * MEBIBYTE} bytes more" in error_lines(result)[0]
    assert snapshot(disk / "target") == before


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_fits_is_copied(server, tmp_path, disk, direction):
    """A new file that leaves nothing, one that replaces another, and a sparse one that is larger than the disk."""
    place = get_place(server, direction, disk / "target")
    size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - MEBIBYTE  # ext4 keeps some for itself
    fill(tmp_path / "source", size)
    result = run_pdiffcopy(tmp_path / "source", place)
    assert result.returncode == 0, result.stderr
    (tmp_path / "source").write_bytes(make_data(size, 9))
    result = run_pdiffcopy(tmp_path / "source", place)
    assert result.returncode == 0, result.stderr
    assert (disk / "target").read_bytes() == make_data(size, 9)
    (disk / "target").unlink()
    with (tmp_path / "source").open("r+b") as file:
        file.truncate(MEBIBYTE)
        file.truncate(2**30)
    result = run_pdiffcopy(tmp_path / "source", place)
    assert result.returncode == 0, result.stderr
    assert (disk / "target").stat().st_size == 2**30


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_holes_that_are_not_wanted_take_room(server, tmp_path, disk, direction):
    """As zeros do."""
    with (tmp_path / "source").open("wb") as file:
        file.truncate(100 * MEBIBYTE)
    result = run_pdiffcopy("--sparse=never", tmp_path / "source", get_place(server, direction, disk / "target"))
    assert result.returncode == 1
    assert f"takes {100 * MEBIBYTE} bytes more" in error_lines(result)[0]
    assert not (disk / "target").exists()


def test_devices_take_no_room(tmp_path):
    """They have it already."""
    (tmp_path / "image").write_bytes(bytes(4 * MEBIBYTE))
    (tmp_path / "source").write_bytes(make_data(4 * MEBIBYTE))
    with loop_device(tmp_path / "image") as device:
        result = run_pdiffcopy(tmp_path / "source", device)
    assert result.returncode == 0, result.stderr


def test_dry_run_takes_no_room(tmp_path, disk):
    """It tells what a run would do."""
    fill(tmp_path / "source", 100 * MEBIBYTE)
    assert run_pdiffcopy("-n", tmp_path / "source", disk / "target").returncode == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_new_file_takes_its_room_in_one_piece(server, tmp_path, disk, direction):
    """Although several processes write to it at the same time."""
    if not shutil.which("filefrag"):
        pytest.skip("filefrag isn't installed")
    fill(tmp_path / "source", 24 * MEBIBYTE)
    result = run_pdiffcopy("-c", "4", tmp_path / "source", get_place(server, direction, disk / "target"))
    assert result.returncode == 0, result.stderr
    os.sync()
    output = subprocess.run(["filefrag", str(disk / "target")], capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"(\d+) extents? found", output)[1]) <= 6  # the disk itself is in groups of 8 MiB
    assert (disk / "target").read_bytes() == (tmp_path / "source").read_bytes()
