"""What can be done with the file of a given name, and what is refused."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from pdiffcopy.exceptions import DiskFullError, FileForbiddenError, FileMissingError, FileNameError
from pdiffcopy.files.buffers import READ_SIZE
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.names import Namespace
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.operations import get_file_info, get_file_size, read_block, resize_file, write_block
from tests.support import make_data, write_pattern

pytestmark = pytest.mark.usefixtures("no_hang", "no_descriptor_left")


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
    first = LocalReplica(str(path)).info()[0].file_id
    path.write_bytes(b"other")
    assert LocalReplica(str(path)).info()[0].file_id == first
    (tmp_path / "new").write_bytes(b"one")
    os.replace(tmp_path / "new", path)
    assert LocalReplica(str(path)).info()[0].file_id != first


def test_info_of_a_missing_file(tmp_path):
    """A file that isn't there (or whose folder isn't one) has no information, and that's no error."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ["missing", "missing/file", "file/file", "dangling"]:
        assert get_file_info(str(tmp_path / name)) == {}
        assert get_file_size(str(tmp_path / name)) is None
        assert not LocalReplica(str(tmp_path / name)).info()[0].exists


@pytest.mark.parametrize("offset", [0, 37, 99, 100, 500])
@pytest.mark.parametrize("size", [0, 1, 10, 100, 1000])
def test_read_block(tmp_path, offset, size):
    """Bytes up to the end of the file, none behind it."""
    data = write_pattern(tmp_path / "file", 100)
    assert read_block(str(tmp_path / "file"), offset, size) == data[offset : offset + size]


@pytest.mark.parametrize("size", [READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 3 * READ_SIZE + 7])
def test_blocks_larger_than_a_chunk(tmp_path, size):
    """What isn't read or written in one piece arrives whole."""
    data = write_pattern(tmp_path / "source", size)
    (tmp_path / "target").touch()
    write_block(str(tmp_path / "target"), 5, read_block(str(tmp_path / "source"), 0, size))
    assert (tmp_path / "target").read_bytes() == bytes(5) + data


def test_write_block_changes_nothing_else(tmp_path):
    """The bytes before and behind the block stay, nothing is cut."""
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


def test_sync(tmp_path, monkeypatch):
    """The file and the folder that has its name are flushed."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    path = tmp_path / "file"
    path.touch()
    LocalReplica(str(path)).sync()
    assert flushed == [str(path), str(tmp_path)]
    monkeypatch.chdir(tmp_path)
    LocalReplica("file").sync()
    assert flushed[2:] == flushed[:2]


def test_sync_of_a_missing_file(tmp_path):
    """There is nothing to flush."""
    with pytest.raises(FileMissingError):
        LocalReplica(str(tmp_path / "file")).sync()


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
        lambda name: LocalReplica(name).sync(),
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


# Real disks {{{1


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


def test_block_devices_are_files_of_fixed_size(device):
    """A device can be read and written, and resized to nothing but what it already has room for."""
    info = LocalReplica(device).info()[0]
    assert (info.size, info.resizable, info.mtime_ns) == (64 * 1024, False, 0)
    assert read_block(device, 1000, 99999) == make_data(64 * 1024)[1000:]
    write_block(device, 1000, b"here")
    LocalReplica(device).sync()
    assert read_block(device, 999, 6)[1:5] == b"here"
    resize_file(device, 1024)
    assert get_file_size(device) == 64 * 1024
    with pytest.raises(FileForbiddenError, match="block device and smaller"):
        resize_file(device, 64 * 1024 + 1)


def test_block_devices_can_be_refused(device):
    """A server serves them only when it was told to."""
    with pytest.raises(FileForbiddenError, match="--devices"):
        LocalFile(device, namespace=Namespace(devices=False))
    with pytest.raises(FileForbiddenError, match="--devices"):
        LocalReplica(device, Namespace(devices=False)).resize(10)
