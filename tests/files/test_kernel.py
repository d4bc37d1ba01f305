"""Tests for :mod:`pdiffcopy.files.kernel`: the calls that Python lacks, on real files."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from pdiffcopy.files import kernel
from tests.support import mounted, write_pattern

TMPFS = 0x01021994
SIZE = 10 * mmap.PAGESIZE + 1


@pytest.fixture
def file(tmp_path):
    """A file that is in the page cache, with dirty pages, where the file system knows such a thing."""
    write_pattern(tmp_path / "file", SIZE)
    with (tmp_path / "file").open("r+b") as handle:
        yield handle


def test_file_system_is_told(small_disk, tmp_path):
    """By the numbers of linux/magic.h."""
    with (small_disk / "file").open("wb") as handle:
        assert kernel.get_file_system(handle.fileno()) == TMPFS
    with open("/proc/self/status", "rb") as handle:
        assert kernel.get_file_system(handle.fileno()) in kernel.PSEUDO
    with pytest.raises(OSError) as info:
        kernel.get_file_system(-1)
    assert info.value.errno == errno.EBADF


def test_overlay_is_recognized_and_flushed(tmp_path):
    """It has no pages of its own, so that all of the file is flushed."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "file").write_bytes(b"x")
    folders = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with mounted(tmp_path / "merged", "overlay", folders) as merged, (merged / "file").open("r+b") as handle:
        assert kernel.get_file_system(handle.fileno()) == kernel.OVERLAY
        kernel.write_back(handle.fileno(), 0, 1)


def test_sandbox_without_the_call_gets_a_flush(file, monkeypatch):
    """What can't be done for a part is done for all of it."""
    flushed = []

    def refuse(*arguments):
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(kernel._libc, "sync_file_range", refuse)
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    kernel.write_back(file.fileno(), 0, SIZE)
    assert flushed == [file.fileno()]


def test_failure_is_an_error():
    """With the number of the operating system."""
    with pytest.raises(OSError) as info:
        kernel._write_range(-1, 0, 1, kernel._WRITE)
    assert info.value.errno == errno.EBADF


def test_cached_pages_are_counted(file):
    """All of them, the last one included, and none after they were dropped; larger files are mapped part by part."""
    assert kernel.count_cached_pages(file.fileno(), SIZE) == 11
    if kernel.get_file_system(file.fileno()) == TMPFS:
        pytest.skip("tmpfs has no disk below it")
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert kernel.count_cached_pages(file.fileno(), SIZE) == 0
    os.pread(file.fileno(), 1, SIZE - 1)
    assert 1 <= kernel.count_cached_pages(file.fileno(), SIZE) <= 11
    assert kernel.count_cached_pages(file.fileno(), 0) == 0


@pytest.mark.usefixtures("no_hang")
def test_pages_of_large_holes_are_not_counted(tmp_path):
    """A file may have more of them than can be counted."""
    with mounted(tmp_path, "tmpfs"), (tmp_path / "file").open("w+b", buffering=0) as handle:
        handle.truncate(2**62)
        for offset in (5, 2**50, 2**50 + 2**20, 2**62 - 1):
            os.pwrite(handle.fileno(), b"x", offset)
        assert kernel.count_cached_pages(handle.fileno(), 2**62) == 4


def test_pages_are_counted_part_by_part(file, monkeypatch):
    """However large a file is, a little of it is mapped at a time."""
    monkeypatch.setattr(kernel, "_WINDOW", 2 * mmap.PAGESIZE)
    assert kernel.count_cached_pages(file.fileno(), SIZE) == 11
