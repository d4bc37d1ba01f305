"""What can be done with a local file, and what is refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.exceptions import (
    DigestMismatchError,
    DiskFullError,
    FileError,
    FileForbiddenError,
    FileMissingError,
    FileNameError,
)
from pdiffcopy.localfile import CHUNK_SIZE, LocalFile, spread
from pdiffcopy.operations import (
    get_file_info,
    get_file_size,
    read_block,
    resize_file,
    stat_file,
    sync_file,
    write_block,
)
from pdiffcopy.protocol import Extent
from tests.support import make_data, snapshot, write_pattern


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever is ended."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("The test hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def no_descriptor_left():
    """No operation leaves a file open, whether it succeeds or not."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


# The documented functions {{{1


def test_info_of_a_file(tmp_path):
    """Size, time and identity, as the file system knows them."""
    write_pattern(tmp_path / "file", 1234)
    status = os.stat(tmp_path / "file")
    info = get_file_info(str(tmp_path / "file"))
    assert (info["size"], info["mtime_ns"], info["resizable"]) == (1234, status.st_mtime_ns, True)
    assert get_file_size(str(tmp_path / "file")) == 1234


def test_identity_tells_files_apart(tmp_path):
    """A file that replaces another one of the same name is another one; a changed file is the same one."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = stat_file(str(path)).file_id
    path.write_bytes(b"other")
    assert stat_file(str(path)).file_id == first
    (tmp_path / "new").write_bytes(b"one")
    os.replace(tmp_path / "new", path)
    assert stat_file(str(path)).file_id != first


def test_info_of_a_missing_file(tmp_path):
    """A file that isn't there (or whose folder isn't one) has no information, and that's no error."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ["missing", "missing/file", "file/file", "dangling"]:
        assert get_file_info(str(tmp_path / name)) == {}
        assert get_file_size(str(tmp_path / name)) is None
        assert not stat_file(str(tmp_path / name)).exists


@pytest.mark.parametrize("offset", [0, 37, 99, 100, 500])
@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000])
def test_read_block(tmp_path, offset, size):
    """Octets up to the end of the file, none behind it."""
    data = write_pattern(tmp_path / "file", 100)
    assert read_block(str(tmp_path / "file"), offset, size) == data[offset : offset + size]


@pytest.mark.parametrize("size", [CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 7])
def test_blocks_larger_than_a_chunk(tmp_path, size):
    """What isn't read or written in one piece arrives whole."""
    data = write_pattern(tmp_path / "source", size)
    (tmp_path / "target").touch()
    write_block(str(tmp_path / "target"), 5, read_block(str(tmp_path / "source"), 0, size))
    assert (tmp_path / "target").read_bytes() == bytes(5) + data


def test_write_block_changes_nothing_else(tmp_path):
    """The octets before and behind the block stay, nothing is cut."""
    data = write_pattern(tmp_path / "file", 100)
    write_block(str(tmp_path / "file"), 40, b"x" * 20)
    assert (tmp_path / "file").read_bytes() == data[:40] + b"x" * 20 + data[60:]
    write_block(str(tmp_path / "file"), 0, b"")
    write_block(str(tmp_path / "file"), 95, b"y" * 20)
    assert (tmp_path / "file").read_bytes() == data[:40] + b"x" * 20 + data[60:95] + b"y" * 20


def test_write_block_creates_nothing(tmp_path):
    """A file has to be there before it's written to."""
    with pytest.raises(FileMissingError, match="file"):
        write_block(str(tmp_path / "file"), 0, b"x")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("before", [0, 1, 99, 100, 101, 1000])
def test_resize_grows_and_cuts(tmp_path, before):
    """What was there stays as far as it fits, what is new is zero."""
    data = write_pattern(tmp_path / "file", before)
    resize_file(str(tmp_path / "file"), 100)
    assert (tmp_path / "file").read_bytes() == (data + bytes(100))[:100]


def test_resize_creates_the_file_and_its_folders(tmp_path, monkeypatch):
    """Missing parent folders are created, with the permissions that the umask grants."""
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o027)
    try:
        for name in ["file", "a/b/c/file", str(tmp_path / "x//y/./file")]:
            resize_file(name, 7)
            assert Path(name).read_bytes() == bytes(7)
    finally:
        os.umask(umask)
    assert (tmp_path / "a/b/c/file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o750


def test_resize_follows_links_to_files_only(tmp_path):
    """The file behind a link is resized; a link to nothing is an error and creates nothing."""
    write_pattern(tmp_path / "file", 10)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    resize_file(str(tmp_path / "link"), 5)
    assert (tmp_path / "file").stat().st_size == 5
    with pytest.raises(FileMissingError, match="dangling"):
        resize_file(str(tmp_path / "dangling"), 5)
    assert not (tmp_path / "nowhere").exists()


def test_sync_file(tmp_path, monkeypatch):
    """The file and the folder that has its name are flushed."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    path = tmp_path / "file"
    path.touch()
    sync_file(str(path))
    assert flushed == [str(path), str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    sync_file("file")
    assert flushed[2:] == flushed[:2]


def test_sync_of_a_missing_file(tmp_path):
    """There is nothing to flush."""
    with pytest.raises(FileMissingError):
        sync_file(str(tmp_path / "file"))


# Errors {{{1


@pytest.fixture(params=["folder", "fifo", "zero", "socket", "tty"])
def no_file(request, tmp_path, monkeypatch):
    """The name of something that isn't a regular file."""
    path = tmp_path / "thing"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path.name)
    else:
        path = Path({"zero": "/dev/zero", "tty": "/dev/ptmx"}[request.param])
    return str(path)


@pytest.mark.parametrize(
    "action",
    [
        get_file_info,
        get_file_size,
        lambda name: read_block(name, 0, 10),
        lambda name: write_block(name, 0, b"x"),
        lambda name: resize_file(name, 10),
        sync_file,
    ],
    ids=["info", "size", "read", "write", "resize", "sync"],
)
def test_other_things_than_files_are_refused(no_file, action):
    """A folder, a FIFO, a device without end: all are refused at once and by name."""
    with pytest.raises(FileForbiddenError, match="neither a regular file nor a block device") as info:
        action(no_file)
    assert info.value.filename == no_file


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "b"])
def test_impossible_names(tmp_path, name):
    """A name that is too long is the fault of whoever asks."""
    with pytest.raises(FileNameError, match="File name too long"):
        read_block(str(tmp_path / name), 0, 1)
    with pytest.raises(FileNameError, match="File name too long"):
        resize_file(str(tmp_path / name), 1)


def test_looping_links_are_refused(tmp_path):
    """A link to itself leads nowhere."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileForbiddenError, match="symbolic links"):
        read_block(str(tmp_path / "loop"), 0, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_permissions_are_respected(tmp_path):
    """What the system refuses says so."""
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o400)
    with pytest.raises(FileForbiddenError, match="Permission denied"):
        write_block(str(path), 0, b"x")
    path.chmod(0)
    with pytest.raises(FileForbiddenError, match="Permission denied"):
        read_block(str(path), 0, 1)


@pytest.mark.parametrize("name", ["new\nline", "\x1b[2J", "tab\there", "\udcff", "\u202eoverride", "{x}", "%s"])
def test_names_are_escaped_in_messages(tmp_path, name):
    """A name can't forge a line of a log or move a cursor, but the error still knows it."""
    path = str(tmp_path / name)
    with pytest.raises(FileMissingError) as info:
        read_block(path, 0, 1)
    assert str(info.value).isprintable()
    assert str(info.value).startswith(f"Can't open {tmp_path}/") and "No such file" in str(info.value)
    assert info.value.filename == path
    if name.isprintable():
        assert name in str(info.value)


@pytest.mark.parametrize("name", ["new\nline", " spaces ", "\udcff\udc80", "é", "%", "{}"])
def test_all_names_work(tmp_path, name):
    """Every name that Linux allows can be used."""
    path = str(tmp_path / name)
    resize_file(path, 3)
    write_block(path, 1, b"x")
    assert read_block(path, 0, 9) == b"\0x\0"


# LocalFile {{{1


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


# Real disks {{{1


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=20", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_reported(small_disk):
    """When there's no room, the error says so, and names the file."""
    path = small_disk / "file"
    resize_file(str(path), 1024 * 1024)
    with pytest.raises(DiskFullError, match="Can't write to .*file: No space left on device"):
        write_block(str(path), 0, make_data(256 * 1024))


def test_full_disk_can_be_reported_when_a_file_is_created(small_disk):
    """The same goes for a file that can't even be made."""
    with pytest.raises(DiskFullError, match="No space left on device"):
        for number in range(20):
            resize_file(str(small_disk / str(number)), 0)


def test_read_only_disk_is_reported(small_disk):
    """What can't be written to says why."""
    write_pattern(small_disk / "file", 10)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(FileForbiddenError, match="Read-only file system"):
        write_block(str(small_disk / "file"), 0, b"x")
    with pytest.raises(FileForbiddenError, match="Read-only file system"):
        resize_file(str(small_disk / "new"), 1)


@pytest.fixture
def device(tmp_path):
    """A block device of 64 KiB."""
    image = tmp_path / "image"
    write_pattern(image, 64 * 1024)
    command = ["losetup", "--find", "--show", str(image)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there are no loop devices here")
    if result.returncode:
        pytest.skip(f"a block device can't be made here: {result.stderr.strip()}")
    yield result.stdout.strip()
    subprocess.run(["losetup", "--detach", result.stdout.strip()], check=True)


def test_block_devices_are_files_of_fixed_size(device):
    """A device can be read and written, and resized to nothing but what it already has room for."""
    info = stat_file(device)
    assert (info.size, info.resizable, info.mtime_ns) == (64 * 1024, False, 0)
    assert read_block(device, 1000, 99999) == make_data(64 * 1024)[1000:]
    write_block(device, 1000, b"here")
    sync_file(device)
    assert read_block(device, 999, 6)[1:5] == b"here"
    resize_file(device, 1024)
    assert get_file_size(device) == 64 * 1024
    with pytest.raises(FileForbiddenError, match="block device and smaller"):
        resize_file(device, 64 * 1024 + 1)


def test_block_devices_can_be_refused(device):
    """A server serves them only when it was told to."""
    with pytest.raises(FileForbiddenError, match="--devices"):
        LocalFile(device, devices=False)
    with pytest.raises(FileForbiddenError, match="--devices"):
        resize_file(device, 10, devices=False)
