"""A target that is replaced by a complete new version in one step: here and over the wire, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdiffcopy.blocks import Extent
from pdiffcopy.client import Client
from pdiffcopy.client.remote import RemoteReplica
from pdiffcopy.exceptions import (
    FileError,
    FileForbiddenError,
    ReplacedError,
    SourceChangedError,
    TakenOverError,
    TransientError,
    UsageError,
)
from pdiffcopy.files import kernel, staging
from pdiffcopy.files.confinement import Root
from pdiffcopy.files.names import MACHINE
from pdiffcopy.files.staging import NewVersion
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading
from tests.support import (
    DISKS,
    children_of,
    disk_of_kind,
    error_lines,
    ext4,
    make_data,
    run_pdiffcopy,
    snapshot,
    write_pattern,
)

MEBIBYTE = 2**20
DIRECTIONS = ("local", "upload", "download")


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    """A file system, with clones or without."""
    with disk_of_kind(request.param, tmp_path) as folder:
        yield folder


@pytest.fixture(params=["clones", "copies"])
def kind(request, tmp_path, monkeypatch):
    """Whether a new version shares what it begins with. Where it copies, holes are kept by the program itself."""
    if request.param == "copies":
        monkeypatch.setattr(kernel, "clone", lambda source, target: False)
    with disk_of_kind("xfs", tmp_path) as folder:
        yield folder


def get_places(server, direction: str, source: Path, target: Path) -> tuple:
    return (
        server.location(source) if direction == "download" else source,
        server.location(target) if direction == "upload" else target,
    )


def copy(server, direction: str, source: Path, target: Path, *options: str) -> dict:
    """Run the program, see that the target is complete and nothing lies beside it, and return the report."""
    result = run_pdiffcopy("--json", "--atomic", *options, *get_places(server, direction, source, target))
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes()
    assert not list_new(target)
    return json.loads(result.stdout)


def list_new(target: Path) -> list[str]:
    """What a new version has left beside a target."""
    return [name for name in os.listdir(target.parent) if name.endswith(".pdiffcopy")]


def scatter(data: bytes) -> bytes:
    """The same with another byte in every fourth MiB."""
    changed = bytearray(data)
    for offset in range(0, len(data), 4 * MEBIBYTE):
        changed[offset] ^= 1
    return bytes(changed)


# What becomes of the target {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_new_version_has_what_belonged_to_the_old_one(server, disk, direction):
    """Another file with the contents of the source; owner, mode, attributes and what is equal are those of the old."""
    target = disk / "target"
    data = make_data(9 * MEBIBYTE + 5)
    (disk / "source").write_bytes(scatter(data))
    target.write_bytes(data)
    os.setxattr(target, "user.colour", b"blue")
    os.chown(target, 1234, 5678)
    target.chmod(0o640)
    before = target.stat()
    report = copy(server, direction, disk / "source", target)
    after = target.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (1234, 5678, 0o640)
    assert after.st_ino != before.st_ino and after.st_mtime_ns > before.st_mtime_ns
    assert os.listxattr(target) == ["user.colour"] and os.getxattr(target, "user.colour") == b"blue"
    assert report["target"].endswith("/target")
    assert report["blocks_changed"] == 3 and report["bytes_moved"] <= 3 * 16384
    assert (report["verification"], report["claimed"]) == ("verified", True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [0, 3 * MEBIBYTE, 9 * MEBIBYTE])
def test_new_version_has_the_size_of_the_source(server, kind, direction, size):
    """Whether the target was longer or shorter, or empty, with what it shares and without."""
    (kind / "source").write_bytes(make_data(5 * MEBIBYTE + 1))
    (kind / "target").write_bytes(make_data(9 * MEBIBYTE)[:size])
    report = copy(server, direction, kind / "source", kind / "target")
    assert report["bytes_moved"] <= 5 * MEBIBYTE + 1 - min(size, 5 * MEBIBYTE)
    assert report["bytes_cut"] == max(0, size - 5 * MEBIBYTE - 1)
    assert report["bytes_grown"] == max(0, 5 * MEBIBYTE + 1 - size)


@pytest.mark.parametrize("direction", ["local", "upload"])
def test_holes_stay_holes(server, kind, direction):
    """A copy of the old version has its holes, and the new one ends with those of the source."""
    with (kind / "source").open("wb") as source, (kind / "target").open("wb") as target:
        for file, at in ((source, 3), (target, 7)):
            file.truncate(64 * MEBIBYTE)
            file.seek(at * MEBIBYTE)
            file.write(make_data(MEBIBYTE))
    copy(server, direction, kind / "source", kind / "target")
    assert (kind / "target").stat().st_blocks * 512 <= 1.5 * MEBIBYTE


def test_nothing_differs(server, disk):
    """The time of the last modification stays, as it would without this option."""
    data = write_pattern(disk / "source", 3 * MEBIBYTE)
    (disk / "target").write_bytes(data)
    os.utime(disk / "target", ns=(10**18, 10**18 + 1))
    report = copy(server, "upload", disk / "source", disk / "target")
    assert report["bytes_moved"] == 0
    assert (disk / "target").stat().st_mtime_ns == 10**18 + 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_missing_target_appears_when_it_is_complete(server, tmp_path, direction):
    """With its folders, and for no more people than the source."""
    write_pattern(tmp_path / "source", 3 * MEBIBYTE)
    (tmp_path / "source").chmod(0o600)
    copy(server, direction, tmp_path / "source", tmp_path / "a" / "b" / "target")
    assert stat.S_IMODE((tmp_path / "a" / "b" / "target").stat().st_mode) == 0o600


def test_read_only_mode_of_the_old_version_comes_back(server, tmp_path):
    """While it's written to, its owner needs more."""
    write_pattern(tmp_path / "source", 2 * MEBIBYTE)
    write_pattern(tmp_path / "target", 2 * MEBIBYTE, seed=2)
    (tmp_path / "target").chmod(0o444)
    copy(server, "upload", tmp_path / "source", tmp_path / "target")
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o444


@pytest.mark.parametrize("length", [200, 245, 255])
def test_long_names(server, tmp_path, length):
    """The name of a new version is no longer than one may be."""
    target = tmp_path / ("ä" * (length // 2) + "x" * (length % 2))
    write_pattern(tmp_path / "source", 1000)
    write_pattern(target, 1000, seed=2)
    copy(server, "upload", tmp_path / "source", target)


@pytest.mark.parametrize("link", ["relative", "absolute", "folder"])
def test_links_stay(launch, tmp_path, link):
    """What a symbolic link leads to is replaced, below a root too."""
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    data = write_pattern(tmp_path / "source", 2 * MEBIBYTE)
    write_pattern(root / "data" / "file", 2 * MEBIBYTE, seed=2)
    name, to = {"relative": ("link", "data/file"), "absolute": ("link", "/data/file"), "folder": ("links", "/data")}[
        link
    ]
    (root / name).symlink_to(to)
    server = launch("--root", str(root))
    where = f"127.0.0.1:{server.port}/{name}" + "/file" * (link == "folder")
    result = run_pdiffcopy("--atomic", tmp_path / "source", where)
    assert result.returncode == 0, result.stderr
    assert (root / "data" / "file").read_bytes() == data
    assert os.readlink(root / name) == to
    assert sorted(os.listdir(root / "data")) == ["file"] and sorted(os.listdir(root)) == sorted(["data", name])


def test_dry_run_makes_nothing(server, tmp_path):
    """It compares with what is there."""
    write_pattern(tmp_path / "source", 2 * MEBIBYTE)
    write_pattern(tmp_path / "target", 2 * MEBIBYTE, seed=2)
    before = snapshot(tmp_path / "target")
    result = run_pdiffcopy("-n", "--json", "--atomic", tmp_path / "source", server.location(tmp_path / "target"))
    assert json.loads(result.stdout)["blocks_changed"] == 2
    assert snapshot(tmp_path / "target") == before and not list_new(tmp_path / "target")


# What goes wrong {{{1


@pytest.mark.parametrize("victim", ["client", "worker", "server"])
@pytest.mark.parametrize("direction", ["local", "upload", "download"])
def test_whatever_is_killed_the_target_is_old_or_new(server, launch, tmp_path, direction, victim):
    """And the next run finds what is left, and leaves nothing."""
    if victim == "server" and direction == "local":
        pytest.skip("there is no server")
    old, new = make_data(24 * MEBIBYTE), scatter(make_data(24 * MEBIBYTE))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(new)
    for delay in (0.15, 0.25, 0.4):
        server = launch() if victim == "server" else server
        target.write_bytes(old)
        places = get_places(server, direction, source, target)
        command = [sys.executable, "-m", "pdiffcopy", "-q", "-b", "64KiB", "--atomic", *map(str, places)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(delay)
            pid = server.process.pid if victim == "server" else process.pid
            victims = children_of(pid) if victim != "client" else [pid]
            for child in victims[:1] if victim == "worker" else victims:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        assert target.read_bytes() in (old, new)
        copy(launch() if victim == "server" else server, direction, source, target)


@pytest.mark.parametrize("direction", ["local", "upload"])
def test_next_run_goes_on(server, kind, direction):
    """What has been moved need not move again."""
    source, target = kind / "source", kind / "target"
    data = write_pattern(source, 8 * MEBIBYTE)
    write_pattern(target, 8 * MEBIBYTE, seed=2)
    replica = LocalReplica(str(target))
    replica.file_id = replica.info()[0].file_id
    staged = replica.stage("abc")
    LocalReplica(staged.filename).write([Extent(0, 6 * MEBIBYTE)], Reading([data[: 6 * MEBIBYTE]]), "abc")
    assert target.read_bytes() != data
    assert copy(server, direction, source, target)["bytes_moved"] == 2 * MEBIBYTE


def test_copy_goes_on_where_it_ends(tmp_path, monkeypatch):
    """One that was killed isn't begun anew."""
    monkeypatch.setattr(kernel, "clone", lambda source, target: False)
    data = write_pattern(tmp_path / "file", 5 * MEBIBYTE)
    os.utime(tmp_path / "file", ns=(5, 5))
    replica = LocalReplica(str(tmp_path / "file"))
    replica.file_id = replica.info()[0].file_id
    new = Path(NewVersion(str(tmp_path / "file"), MACHINE).filename)
    new.write_bytes(b"x" * MEBIBYTE + data[MEBIBYTE : 2 * MEBIBYTE])
    staged = replica.stage("abc")
    assert Path(staged.filename) == new and not staged.shares
    assert new.read_bytes() == b"x" * MEBIBYTE + data[MEBIBYTE:]
    assert new.stat().st_mtime_ns == 5


@pytest.mark.parametrize("refusal", [18, 95, 22, 38])
def test_copies_where_the_kernel_does_not(tmp_path, monkeypatch, refusal):
    """By reading and writing."""

    def refuse(*arguments):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(kernel, "clone", lambda source, target: False)
    monkeypatch.setattr(staging.os, "copy_file_range", refuse)
    data = write_pattern(tmp_path / "file", 3 * MEBIBYTE + 7)
    replica = LocalReplica(str(tmp_path / "file"))
    replica.file_id = replica.info()[0].file_id
    assert Path(replica.stage("abc").filename).read_bytes() == data


def test_later_run_ends_an_earlier_one(tmp_path):
    """Two runs never mix their data in one new version."""
    write_pattern(tmp_path / "file", MEBIBYTE)
    replica = LocalReplica(str(tmp_path / "file"))
    replica.file_id = replica.info()[0].file_id
    info = replica.info()[0]
    first, second = replica.stage("aaa"), replica.stage("bbb")
    assert first.filename == second.filename
    with pytest.raises(TakenOverError):
        LocalReplica(first.filename).write([Extent(0, 3)], Reading([b"abc"]), "aaa")
    with pytest.raises(TakenOverError):
        replica.commit(first.info.file_id, info.ctime_ns, "aaa")
    assert replica.commit(second.info.file_id, info.ctime_ns, "bbb").file_id == second.info.file_id
    assert replica.commit(second.info.file_id, info.ctime_ns, "bbb").size == MEBIBYTE  # an answer that got lost


@pytest.mark.parametrize("change", ["write", "chmod", "claim", "replace", "remove"])
def test_old_version_that_changes_is_not_replaced(tmp_path, change):
    """Whoever has changed it wanted that to stay."""
    path = tmp_path / "file"
    write_pattern(path, MEBIBYTE)
    replica = LocalReplica(str(path))
    replica.file_id = replica.info()[0].file_id
    staged = replica.stage("abc")
    info = replica.info()[0]
    time.sleep(0.02)
    if change == "write":
        with path.open("r+b") as file:
            file.write(b"precious")
    elif change == "chmod":
        path.chmod(0o600)
    elif change == "claim":
        assert LocalReplica(str(path)).claim("def")[0]
    else:
        path.unlink()
        if change == "replace":
            path.write_bytes(b"precious")
    before = snapshot(path)
    with pytest.raises((ReplacedError, FileError)):
        replica.commit(staged.info.file_id, info.ctime_ns, "abc")
    assert snapshot(path) == before


def test_source_that_changes_replaces_nothing(tmp_path, monkeypatch):
    """The new version may be a mixture."""
    write_pattern(tmp_path / "source", 2 * MEBIBYTE)
    write_pattern(tmp_path / "target", 2 * MEBIBYTE, seed=2)
    before = snapshot(tmp_path / "target")
    flush = LocalReplica.sync

    def change_and_flush(replica, run):
        os.utime(tmp_path / "source", ns=(1, 1))
        flush(replica, run)

    monkeypatch.setattr(LocalReplica, "sync", change_and_flush)
    client = Client(source=str(tmp_path / "source"), target=str(tmp_path / "target"), atomic=True)
    with pytest.raises(SourceChangedError):
        client.run()
    assert snapshot(tmp_path / "target") == before


def test_lost_answers_are_survived(server, tmp_path, monkeypatch):
    """What the server may still do for an attempt of which nothing is known is ended by the next one."""
    data = write_pattern(tmp_path / "source", 2 * MEBIBYTE)
    write_pattern(tmp_path / "target", 2 * MEBIBYTE, seed=2)
    stage, runs = RemoteReplica.stage, []

    def stage_and_lose(replica, run, *arguments):
        staged = stage(replica, run, *arguments)
        runs.append(run)
        if len(runs) < 3:
            raise TransientError("lost")
        return staged

    monkeypatch.setattr(RemoteReplica, "stage", stage_and_lose)
    target = server.location(tmp_path / "target")
    Client(source=str(tmp_path / "source"), target=target, atomic=True).run()
    assert (tmp_path / "target").read_bytes() == data
    assert len(set(runs)) == 3


@pytest.mark.parametrize("rename", ["renameat2", "link"])
def test_target_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, rename):
    """It was missing, so nobody has compared it with anything."""
    if rename == "link":
        monkeypatch.setattr(kernel, "_RENAME_NOREPLACE", 1 << 20)
    replica = LocalReplica(str(tmp_path / "file"))
    staged = replica.stage("abc")
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FileForbiddenError, match="exists"):
        replica.commit(staged.info.file_id, 0, "abc")
    assert (tmp_path / "file").read_bytes() == b"precious"
    (tmp_path / "file").unlink()
    assert replica.commit(replica.stage("def").info.file_id, 0, "def").size == 0
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("trap", ["symbolic link", "hard link", "file of another user"])
@pytest.mark.parametrize("is_confined", [False, True])
def test_what_others_have_put_there_is_not_used(tmp_path, trap, is_confined):
    """Nobody gets a file of theirs filled or, worse, one that isn't theirs."""
    folder, victim = tmp_path / "folder", tmp_path / "folder" / "victim"
    folder.mkdir()
    data = write_pattern(folder / "file", MEBIBYTE)
    victim.write_bytes(b"precious")
    new = folder / ".file.pdiffcopy"
    if trap == "symbolic link":
        new.symlink_to("victim")
    elif trap == "hard link":
        os.link(victim, new)
    else:
        new.write_bytes(b"theirs")
        os.chown(new, 4321, 4321)
    replica = LocalReplica("/file", Root(str(folder))) if is_confined else LocalReplica(str(folder / "file"))
    replica.file_id = replica.info()[0].file_id
    staged = replica.stage("abc")
    assert new.read_bytes() == data and new.stat().st_uid == os.geteuid() and not new.is_symlink()
    assert victim.read_bytes() == b"precious" and victim.stat().st_nlink == 1
    replica.commit(staged.info.file_id, replica.info()[0].ctime_ns, "abc")
    assert not new.exists() and (folder / "file").read_bytes() == data


def test_new_version_that_does_not_fit_is_not_begun(server, tmp_path):
    """Where it can't share anything: one line with both numbers."""
    with ext4(tmp_path / "image", tmp_path / "disk", "-m", "0", size=64 * MEBIBYTE) as disk:
        write_pattern(disk / "target", 40 * MEBIBYTE)
        write_pattern(tmp_path / "source", 40 * MEBIBYTE, seed=2)
        before = snapshot(disk / "target")
        for place in (disk / "target", server.location(disk / "target")):
            result = run_pdiffcopy("--atomic", tmp_path / "source", place)
            (line,) = error_lines(result)
            assert result.returncode == 1 and f"takes {40 * MEBIBYTE} bytes, and its file system has" in line
            assert snapshot(disk / "target") == before and not list_new(disk / "target")


def test_nobody_waits_for_a_copy(tmp_path, monkeypatch):
    """A server ends it when its client has left."""
    monkeypatch.setattr(kernel, "clone", lambda source, target: False)
    write_pattern(tmp_path / "file", MEBIBYTE)
    replica = LocalReplica(str(tmp_path / "file"), is_awaited=lambda: False)
    replica.file_id = replica.info()[0].file_id
    with pytest.raises(Exception, match="Nobody waits"):
        replica.stage("abc")


# What is refused {{{1


def test_devices_are_not_replaced(device, tmp_path):
    """They have no folder in which a new version could take their place."""
    write_pattern(tmp_path / "source", 1000)
    (line,) = error_lines(run_pdiffcopy("--atomic", tmp_path / "source", device))
    assert "block device" in line and "--atomic" in line
    replica = LocalReplica(device)
    replica.file_id = replica.info()[0].file_id
    with pytest.raises(FileForbiddenError, match="block device"):
        replica.stage("abc")


def test_old_servers_can_not(launch_old, tmp_path):
    """In one line, before anything is touched."""
    write_pattern(tmp_path / "source", 1000)
    result = run_pdiffcopy("--atomic", tmp_path / "source", launch_old().location(tmp_path / "target"))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "too old for --atomic" in line
    assert not (tmp_path / "target").exists()
    peer = launch_old()
    copy(peer, "download", tmp_path / "source", tmp_path / "target")


def test_given_blocks_are_refused(tmp_path):
    """What an earlier run has left would be taken for the rest."""
    write_pattern(tmp_path / "source", 1000)
    client = Client(source=str(tmp_path / "source"), target=str(tmp_path / "target"), atomic=True)
    with pytest.raises(UsageError):
        client.transfer_changes([0])
