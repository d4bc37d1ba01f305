"""What can be done with an open file, and who may write to it."""

from __future__ import annotations

import os

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.exceptions import DigestMismatchError, FileError
from pdiffcopy.localfile import CHUNK_SIZE, LocalFile, spread
from pdiffcopy.protocol import Extent
from tests.support import make_data, snapshot, write_pattern

pytestmark = pytest.mark.usefixtures("no_hang", "no_descriptor_left")


def digest_of(data):
    return xxhash.xxh3_128_hexdigest(data)


def test_write_with_the_right_digest(tmp_path):
    """Several extents, cut anywhere, land where they belong."""
    before = write_pattern(tmp_path / "file", 100)
    data = make_data(35, seed=2)
    with LocalFile(str(tmp_path / "file"), write=True) as file:
        extents = [Extent(10, 20), Extent(50, 0), Extent(80, 15)]
        file.write(extents, [data[:3], b"", memoryview(data)[3:30], data[30:]], digest_of(data))
        assert file.digest(extents) == digest_of(data)
    assert (tmp_path / "file").read_bytes() == before[:10] + data[:20] + before[30:80] + data[20:] + before[95:]


def test_write_with_a_wrong_digest(tmp_path):
    """Octets that aren't those that were sent are noticed, at the end of a long extent too."""
    data = make_data(2 * CHUNK_SIZE + 10)
    (tmp_path / "file").touch()
    with LocalFile(str(tmp_path / "file"), write=True) as file:
        with pytest.raises(DigestMismatchError, match="file at offset 7 isn't what was sent") as info:
            file.write([Extent(7, len(data))], [data[:-1], b"?"], digest_of(data))
    assert info.value.offset == 7


def test_write_compares_what_lies_in_the_file(tmp_path, monkeypatch):
    """The digest is of what can be read afterwards: a disk that loses an octet is noticed."""
    (tmp_path / "file").touch()
    original = os.pwrite

    def lossy(fd, data, offset):
        return original(fd, bytes(data[:-1]) + b"\0", offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with LocalFile(str(tmp_path / "file"), write=True) as file, pytest.raises(DigestMismatchError):
        file.write([Extent(0, 9)], [b"octets..."], digest_of(b"octets..."))


def test_short_writes_and_reads_go_on(tmp_path, monkeypatch):
    """The system may move less than it was asked to: the rest follows."""
    (tmp_path / "file").touch()
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:5]], offset))
    data = make_data(1000)
    with LocalFile(str(tmp_path / "file"), write=True) as file:
        file.write([Extent(3, 1000)], [data], digest_of(data))
        assert b"".join(map(bytes, file.chunks([Extent(0, 1003)]))) == bytes(3) + data


@pytest.mark.parametrize("extents", [[Extent(0, 11)], [Extent(0, 5), Extent(10, 1)], [Extent(100, 1)]])
def test_reading_behind_the_end_is_an_error(tmp_path, extents):
    """Where no octets are, none are made up."""
    write_pattern(tmp_path / "file", 10)
    with LocalFile(str(tmp_path / "file")) as file:
        with pytest.raises(FileError, match="file up to offset"):
            list(file.chunks(extents))
        with pytest.raises(FileError, match="file up to offset"):
            file.digest(extents)


def test_reading_a_file_that_was_cut_and_regrown_is_an_error(tmp_path, monkeypatch):
    """A file that was shorter for a moment yields no stale octets, though its size is right again."""
    write_pattern(tmp_path / "file", 10)
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: 0)
    with LocalFile(str(tmp_path / "file")) as file, pytest.raises(FileError, match="file up to offset 10"):
        list(file.chunks([Extent(0, 10)]))


def test_clip_ends_at_the_end(tmp_path):
    """The part of an extent that lies within the file, or nothing."""
    write_pattern(tmp_path / "file", 10)
    with LocalFile(str(tmp_path / "file")) as file:
        clipped = [file.clip(Extent(*extent)) for extent in [(0, 5), (5, 5), (5, 6), (10, 1), (99, 9)]]
    assert clipped == [(0, 5), (5, 5), (5, 5), (10, 0), (99, 0)]


def test_reading_does_not_write(tmp_path):
    """A file that is opened to be read can't be written to, and stays as it is."""
    path = tmp_path / "file"
    write_pattern(path, 10)
    before = snapshot(path)
    with LocalFile(str(path)) as file:
        with pytest.raises(FileError, match="Can't write to"):
            file.write([Extent(0, 1)], [b"x"])
        with pytest.raises(FileError, match="Can't resize"):
            file.resize(5)
    assert snapshot(path) == before


def test_open_files_are_closed_once(tmp_path):
    """Closing twice does no harm to the next owner of the descriptor."""
    (tmp_path / "file").touch()
    file = LocalFile(str(tmp_path / "file"))
    file.close()
    other = LocalFile(str(tmp_path / "file"))
    file.close()
    assert other.info().exists
    other.close()


# spread() {{{1


@given(
    sizes=st.lists(st.integers(0, 12), max_size=6),
    gaps=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    cuts=st.lists(st.integers(0, 80), max_size=10),
    difference=st.integers(-2, 2),
)
def test_spread_puts_each_octet_where_it_belongs(sizes, gaps, cuts, difference):
    """However extents and chunks are cut: each octet gets its place, and too many or too few are noticed."""
    extents, position = [], 0
    for size, gap in zip(sizes, gaps, strict=False):
        extents.append(Extent(position + gap, size))
        position += gap + size
    places = [n for offset, size in extents for n in range(offset, offset + size)]
    data = make_data(max(0, len(places) + difference))
    cuts = sorted(cut for cut in cuts if cut <= len(data))
    chunks = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    found = []

    def collect():
        for offset, piece in spread(extents, chunks):
            found.extend(zip(range(offset, offset + len(piece)), bytes(piece), strict=True))

    if len(data) != len(places):
        with pytest.raises(ValueError, match="octets than the extents take"):
            collect()
    else:
        collect()
        assert found == list(zip(places, data, strict=True))
    # Nothing ever lands outside.
    assert {place for place, _ in found} <= set(places)
