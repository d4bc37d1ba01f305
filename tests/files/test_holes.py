"""Tests for :mod:`pdiffcopy.files.holes`: where real files have nothing."""

from __future__ import annotations

import os

import pytest

from pdiffcopy.blocks import MAX_OFFSET, Extent
from pdiffcopy.files import holes, kernel
from pdiffcopy.files.holes import find_data, find_holes
from tests.support import DISKS, disk_of_kind, mounted

PAGE = 4096


@pytest.fixture(params=["tmpfs", *(kind for kind in DISKS if kind != "ext4")])
def file(request, tmp_path):
    """The largest file that Linux knows, without anything in it."""
    with mounted(tmp_path, "tmpfs") if request.param == "tmpfs" else disk_of_kind(request.param, tmp_path) as folder:
        (folder / "file").touch()
        os.truncate(folder / "file", MAX_OFFSET)
        with (folder / "file").open("r+b", buffering=0) as handle:
            yield handle.fileno()


def write(fd: int, *offsets: int) -> None:
    for offset in offsets:
        os.pwrite(fd, b"x", offset)
    os.fsync(fd)


def find(fd: int) -> list[Extent]:
    return list(find_holes(fd, 0, MAX_OFFSET))


@pytest.mark.usefixtures("no_hang")
def test_data_in_the_last_page_is_found(file):
    """The kernel's own answers aren't to be trusted there: it adds a page to an offset that can't grow any more."""
    assert find(file) == [Extent(0, MAX_OFFSET)]
    last = MAX_OFFSET + 1 - PAGE
    write(file, MAX_OFFSET - 1)
    assert find(file) == [Extent(0, last)]
    assert find_data(file, 5, MAX_OFFSET) == last
    write(file, last - PAGE, last - 3 * PAGE)
    assert find(file) == [Extent(0, last - 3 * PAGE), Extent(last - 2 * PAGE, PAGE)]
    assert list(find_holes(file, last - 3 * PAGE, last - PAGE, PAGE)) == [Extent(last - 2 * PAGE, PAGE)]
    assert list(find_holes(file, last + 1, MAX_OFFSET)) == []
    assert find_data(file, MAX_OFFSET - 1, MAX_OFFSET) == MAX_OFFSET - 1


def test_zeros_in_the_last_pages_may_count_as_a_hole(file):
    """They have the same contents."""
    write(file, MAX_OFFSET - 1)
    os.pwrite(file, b"\0", MAX_OFFSET - 1)
    assert sum(hole.size for hole in find(file)) >= MAX_OFFSET - PAGE


def test_small_holes_are_not_told_and_large_ones_are_whole_grains(file):
    """But at the end of the file, where a grain may end early."""
    write(file, 0, 3 * PAGE, 2**40 + PAGE)
    assert list(find_holes(file, 0, MAX_OFFSET, 4 * PAGE)) == [
        Extent(4 * PAGE, 2**40 - 4 * PAGE),
        Extent(2**40 + 4 * PAGE, MAX_OFFSET - 2**40 - 4 * PAGE),
    ]


def test_file_systems_without_holes(file, monkeypatch):
    """All of a file is data there, and what fails for another reason is an error."""
    monkeypatch.setattr(kernel._libc, "lseek", lambda *_: -1)
    for number, expected in ((22, ([], 5)), (6, ([], MAX_OFFSET))):
        monkeypatch.setattr(kernel.ctypes, "get_errno", lambda number=number: number)
        monkeypatch.setattr(holes, "_LAST", MAX_OFFSET)
        assert (find(file), find_data(file, 5, MAX_OFFSET)) == expected
    monkeypatch.setattr(kernel.ctypes, "get_errno", lambda: 5)
    with pytest.raises(OSError, match="Input/output error"):
        find(file)
