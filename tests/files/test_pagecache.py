"""Tests for :mod:`pdiffcopy.files.pagecache`: which pages of a file stay in memory, on several file systems."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from pdiffcopy.blocks import Extent
from pdiffcopy.exceptions import FileError, FileForbiddenError
from pdiffcopy.files import kernel, pagecache
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.pagecache import LAG, STEP, find_missing_pages
from tests.support import DISKS, disk_of_kind, ext4, loop_device, make_data, write_pattern

PAGE = mmap.PAGESIZE
MEBIBYTE = 1024 * 1024
SIZE = 12 * MEBIBYTE + 5


@pytest.fixture(params=DISKS)
def path(request, tmp_path):
    """A file on a real disk."""
    with disk_of_kind(request.param, tmp_path) as folder:
        (folder / "file").write_bytes(make_data(MEBIBYTE) * 12 + b"12345")
        yield folder / "file"


@pytest.fixture
def simple(tmp_path):
    """The same on one of the file systems."""
    with ext4(tmp_path / "image", tmp_path / "disk", size=DISKS["ext4"]) as folder:
        (folder / "file").write_bytes(make_data(MEBIBYTE) * 12 + b"12345")
        yield folder / "file"


def open_cold(path, drop=True) -> LocalFile:
    """Open a file of which nothing is in the page cache."""
    file = LocalFile(str(path), write=True, drop=drop)
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not count_cached(file)
    return file


def count_cached(file: LocalFile) -> int:
    return kernel.count_cached_pages(file.fd, file.size())


def heat(file: LocalFile, *pages: int) -> None:
    """Bring some pages into the cache, and no others."""
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    for page in pages:
        os.pread(file.fd, 1, page * PAGE)
    assert [page for page in pages if not kernel.find_cached_pages(file.fd, page * PAGE, PAGE)[0]] == []


def get_cached(file: LocalFile) -> list[int]:
    """The numbers of the pages that are in the cache."""
    pages = kernel.find_cached_pages(file.fd, 0, file.size())
    return [number for number, is_cached in enumerate(pages) if is_cached]


def test_missing_pages_are_found(simple):
    """In runs, also where extents begin and end within a page, and behind the end."""
    with open_cold(simple) as file:
        heat(file, 3, 4, 9)
        assert list(find_missing_pages(file.fd, [Extent(0, 12 * PAGE)])) == [
            Extent(0, 3 * PAGE), Extent(5 * PAGE, 4 * PAGE), Extent(10 * PAGE, 2 * PAGE)
        ]  # fmt: skip
        assert list(find_missing_pages(file.fd, [Extent(4 * PAGE + 1, PAGE), Extent(9 * PAGE + 1, 5)])) == [
            Extent(5 * PAGE, PAGE)
        ]
        assert list(find_missing_pages(file.fd, [Extent(12 * MEBIBYTE, 5)])) == [Extent(12 * MEBIBYTE, PAGE)]
        assert list(find_missing_pages(file.fd, [Extent(0, 0), Extent(PAGE, 0)])) == []


def test_large_extents_are_examined_part_by_part(simple, monkeypatch):
    """However large they are, a little is mapped at a time."""
    monkeypatch.setattr(pagecache, "_WINDOW", 2 * PAGE)
    with open_cold(simple) as file:
        heat(file, 3)
        missing = list(find_missing_pages(file.fd, [Extent(PAGE, 4 * PAGE)]))
        assert [sum(part) for part in missing][-1] == 5 * PAGE
        assert sum(size for _, size in missing) == 3 * PAGE


def test_what_is_read_leaves_again(path):
    """And nothing that's behind it is brought along; what was there stays."""
    with open_cold(path) as file:
        heat(file, 5, 6, 700)
        extents = [Extent(0, 5 * MEBIBYTE + 17), Extent(9 * MEBIBYTE, MEBIBYTE)]
        with file.reading(extents):
            data = b"".join(map(bytes, file.chunks(extents)))
            assert count_cached(file) > 3
        assert data == (make_data(MEBIBYTE) * 6)[: 5 * MEBIBYTE + 17] + make_data(MEBIBYTE)
        assert get_cached(file) == [5, 6, 700]


def test_what_is_read_twice_leaves_once(simple):
    """A digest comes first, and then the bytes: they're still there."""
    with open_cold(simple) as file, file.reading([Extent(0, MEBIBYTE)]):
        file.digest([Extent(0, MEBIBYTE)])
        assert count_cached(file) == MEBIBYTE // PAGE


def test_what_is_written_leaves_again(path):
    """When it has reached the disk. What was there stays, although it's new."""
    with open_cold(path) as file:
        heat(file, 5, 6, 700)
        data = make_data(11 * MEBIBYTE, 7)
        file.write([Extent(0, MEBIBYTE), Extent(MEBIBYTE + 100, 10 * MEBIBYTE)], [data[:77], data[77:]])
        assert get_cached(file) == [5, 6, 700]
    expected = data[:MEBIBYTE] + make_data(MEBIBYTE)[:100] + data[MEBIBYTE:] + make_data(MEBIBYTE)[100:] + b"12345"
    assert path.read_bytes() == expected


def test_what_is_written_leaves_early(simple, monkeypatch):
    """A little is on its way to the disk, and what has been written before that has left."""
    with open_cold(simple) as file:
        most, extents = 0, [Extent(0, 12 * MEBIBYTE)]
        with file.changing(extents) as change:
            for offset in range(0, 12 * MEBIBYTE, 100_000):
                size = min(100_000, 12 * MEBIBYTE - offset)
                os.pwrite(file.fd, bytes(size), offset)
                change.note(size)
                most = max(most, count_cached(file))
        assert LAG // PAGE <= most <= (LAG + 2 * STEP) // PAGE
        assert not count_cached(file)


def test_zeros_leave_again(simple):
    """They're written, too."""
    with open_cold(simple) as file:
        assert file.clear([Extent(PAGE, 3 * MEBIBYTE)], keep=True)
        assert not count_cached(file)
        assert file.clear([Extent(5, MEBIBYTE)])
        assert not count_cached(file)
    assert simple.read_bytes()[: 3 * MEBIBYTE] == make_data(MEBIBYTE)[:5] + bytes(3 * MEBIBYTE - 5)


def test_write_that_fails_leaves_nothing(simple):
    """As far as it got, it leaves again; the failure is what's told."""

    def break_off():
        yield make_data(3 * MEBIBYTE)
        raise ConnectionResetError(errno.ECONNRESET, "broken")

    with open_cold(simple) as file:
        with pytest.raises(ConnectionResetError):
            file.write([Extent(0, 5 * MEBIBYTE)], break_off())
        assert not count_cached(file)


@pytest.mark.parametrize("count", [1, 20])
def test_failure_of_the_disk_is_told(simple, monkeypatch, count):
    """Early or late. What didn't get there is forgotten."""

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_cold(simple) as file:
        monkeypatch.setattr(kernel, "write_back", fail)
        monkeypatch.setattr(pagecache, "LAG", MEBIBYTE)
        with pytest.raises(FileError, match="Input/output error"):
            file.write([Extent(0, count * MEBIBYTE)], [bytes(MEBIBYTE)] * count)


def test_without_the_wish_everything_stays(simple, monkeypatch):
    """And nobody looks."""
    with open_cold(simple, drop=False) as file:
        for name in ("find_cached_pages", "start_write_back", "write_back"):
            monkeypatch.setattr(kernel, name, None)
        extents = [Extent(0, MEBIBYTE)]
        with file.reading(extents):
            file.digest(extents)
        file.write([Extent(0, 3 * MEBIBYTE)], [bytes(3 * MEBIBYTE)])
        monkeypatch.undo()
        assert count_cached(file) >= 3 * MEBIBYTE // PAGE


def test_devices_keep_nothing(tmp_path):
    """They have pages like files."""
    (tmp_path / "image").write_bytes(make_data(4 * MEBIBYTE))
    with loop_device(tmp_path / "image") as name, open_cold(name) as file:
        heat(file, 5)
        with file.reading([Extent(0, MEBIBYTE)]):
            file.digest([Extent(0, MEBIBYTE)])
        file.write([Extent(0, 2 * MEBIBYTE)], [make_data(2 * MEBIBYTE, 7)])
        assert get_cached(file) == [5]


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 1])
def test_who_may_not_look_is_told_so(tmp_path, size):
    """The kernel says that all pages are there to those who neither own a file nor may write to it."""
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    (tmp_path / "file").write_bytes(bytes(size))
    with open(tmp_path / "file", "rb") as file:
        pagecache.prepare(file.fileno(), "the file", size)
        os.seteuid(65534)
        try:
            with pytest.raises(FileForbiddenError, match="the file"):
                pagecache.prepare(file.fileno(), "the file", size)
        finally:
            os.seteuid(0)


def test_largest_files_can_be_looked_at(simple):
    """Behind their end there may be no page."""
    with simple.open("r+b") as file:
        pagecache.prepare(file.fileno(), "the file", 2**63 - 1)


def test_file_that_was_cut_is_no_secret(tmp_path):
    """The kernel keeps pages together, so the first one behind the end may still be in the cache."""
    for size in (100_000, 3 * 2**20, 16 * 2**20):
        path = tmp_path / str(size)
        write_pattern(path, size)
        for rest in (size // 2 + 17, 5000):
            os.truncate(path, rest)
            with path.open("rb") as file:
                pagecache.prepare(file.fileno(), "the file", rest)
