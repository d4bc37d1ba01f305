"""A target that is replaced by a complete new version in one step: here and over the wire, whatever is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
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
from pdiffcopy.files.claims import RUN_ATTRIBUTE, UNFLUSHED, Claims
from pdiffcopy.files.confinement import Root
from pdiffcopy.files.localfile import LocalFile
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


def pin(path: Path) -> LocalReplica:
    """A replica that is pinned to the file that has this name now."""
    replica = LocalReplica(str(path))
    return replica.pinned(replica.info()[0].file_id)


def list_new(target: Path) -> list[str]:
    """What a new version has left beside a target."""
    return [name for name in os.listdir(target.parent) if name.endswith(".pdiffcopy")]


def scatter(data: bytes) -> bytes:
    """The same with another byte in every fourth MiB."""
    changed = bytearray(data)
    for offset in range(0, len(data), 4 * MEBIBYTE):
        changed[offset] ^= 1
    return bytes(changed)


ACL = "system.posix_acl_{}"
NOBODY = 65534


def give_acl(path: Path, kind: str = "access", owner: int = 6, group: int = 6) -> None:
    """Let one more user read and write (acl(5), linux/posix_acl_xattr.h)."""
    entries = (1, owner, -1), (2, 6, 1001), (4, 4, -1), (16, group, -1), (32, 4, -1)
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, ACL.format(kind), acl)
    except OSError:
        pytest.skip("the file system has no ACLs")


@pytest.fixture
def home():
    """A folder of a user who isn't root, which that user can get to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@contextmanager
def as_nobody():
    """Be a user who isn't root."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


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
    for delay in (0.15, 0.3):
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
    with NewVersion(str(tmp_path / "file"), MACHINE) as version:
        new = Path(version.filename)
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


@pytest.mark.parametrize("is_doubtful", [False, True])
def test_clone_of_what_may_not_be_on_the_disk(tmp_path, is_doubtful):
    """After a flush that failed, memory doesn't tell what the clone has: it's read itself."""
    with disk_of_kind("xfs", tmp_path) as disk:
        write_pattern(disk / "file", 1000)
        if is_doubtful:
            os.setxattr(disk / "file", RUN_ATTRIBUTE, b"abc" + UNFLUSHED.encode())
        staged = pin(disk / "file").stage("abc")
        assert staged.shares != is_doubtful and staged.info.size == 1000


def test_name_in_the_folder_of_the_file_is_flushed(tmp_path, monkeypatch):
    """And not in that of a link which leads to it."""
    (tmp_path / "folder").mkdir()
    write_pattern(tmp_path / "folder" / "file", 1000)
    (tmp_path / "link").symlink_to("folder/file")
    replica = pin(tmp_path / "link")
    staged, flushed = replica.stage("abc"), []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    replica.commit(staged.info.file_id, replica.info()[0].ctime_ns, "abc")
    assert flushed == [str(tmp_path / "folder")]


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
    pin(tmp_path / "file").stage("ccc")
    assert replica.commit(second.info.file_id, info.ctime_ns, "bbb").size == MEBIBYTE  # and the next run has begun


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


@pytest.mark.parametrize("rename", ["renameat2", "link", "neither"])
def test_target_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, rename):
    """It was missing, so nobody has compared it with anything."""
    if rename != "renameat2":
        monkeypatch.setattr(kernel, "_RENAME_NOREPLACE", 1 << 20)
    if rename == "neither":
        monkeypatch.setattr(os, "link", refuse_links)
    replica = LocalReplica(str(tmp_path / "file"))
    staged = replica.stage("abc")
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(ReplacedError, match="was created by somebody else"):
        replica.commit(staged.info.file_id, 0, "abc")
    assert (tmp_path / "file").read_bytes() == b"precious"
    (tmp_path / "file").unlink()
    assert replica.commit(replica.stage("def").info.file_id, 0, "def").size == 0
    assert os.listdir(tmp_path) == ["file"]


def refuse_links(*arguments, **options):
    raise PermissionError(errno.EPERM, "there are no links here")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [(), ("--atomic",)], ids=["in place", "atomic"])
def test_links_that_lead_to_nothing_are_refused(server, tmp_path, direction, options):
    """Nobody can know whether what they name is to be created."""
    write_pattern(tmp_path / "source", MEBIBYTE)
    (tmp_path / "target").symlink_to("nowhere")
    source = server.location(tmp_path / "source") if direction == "download" else tmp_path / "source"
    target = server.location(tmp_path / "target") if direction == "upload" else tmp_path / "target"
    result = run_pdiffcopy(*options, source, target)
    (line,) = error_lines(result)
    assert result.returncode == 1 and "is a link that leads to nothing" in line
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_file_that_can_only_be_appended_to_is_refused(tmp_path):
    """It couldn't be replaced, so nothing is moved. (There's a message of its own for those that can't be changed.)"""
    with ext4(tmp_path / "image", tmp_path / "disk") as disk:
        write_pattern(disk / "source", MEBIBYTE)
        write_pattern(disk / "target", MEBIBYTE, 2)
        subprocess.run(["chattr", "+a", disk / "target"], check=True)
        before = snapshot(disk / "target")
        result = run_pdiffcopy("--atomic", disk / "source", disk / "target")
        (line,) = error_lines(result)
        assert result.returncode == 1 and "it can only be appended to (chattr -a ends that)" in line
        assert snapshot(disk / "target") == before
        assert not (disk / ".target.pdiffcopy").exists()


def test_replacement_is_done_also_where_no_thread_can_start(tmp_path, monkeypatch):
    """One closes a large old version, of which nobody waits for the end."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(staging, "_LARGE", 0)
    write_pattern(tmp_path / "file", MEBIBYTE)
    replica = LocalReplica(str(tmp_path / "file"))
    replica.file_id, old = replica.info()[0].file_id, replica.info()[0]
    staged = replica.stage("abc")
    monkeypatch.setattr(staging.threading.Thread, "start", refuse)
    assert replica.commit(staged.info.file_id, old.ctime_ns, "abc").file_id == staged.info.file_id


def test_run_waits_for_writers_before_it_replaces(tmp_path, monkeypatch):
    """A write under a claim that has begun ends first, and shows in the time of the old version."""
    write_pattern(tmp_path / "file", MEBIBYTE)
    replica = LocalReplica(str(tmp_path / "file"))
    old = replica.info()[0]
    replica.file_id = old.file_id
    staged = replica.stage("abc")
    monkeypatch.setattr("pdiffcopy.files.claims.LOCK_TIMEOUT", 0.1)
    with LocalFile(str(tmp_path / "file"), write=True) as other, other.claims.writing(""):
        with pytest.raises(TakenOverError, match="others keep writing"):
            replica.commit(staged.info.file_id, old.ctime_ns, "abc")
    assert replica.commit(staged.info.file_id, replica.info()[0].ctime_ns, "abc").file_id == staged.info.file_id


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


# Who may do what {{{1


def test_new_file_is_for_no_more_people_than_the_source(tmp_path):
    """Whoever could read what an earlier run has left."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_pattern(source, MEBIBYTE)
    LocalReplica(str(target)).stage("abc", 0o644)
    source.chmod(0o600)
    copy(None, "local", source, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_nothing_stays_of_an_old_version_that_is_gone(tmp_path):
    """A new file has neither its attributes nor its ACL, although there's what was begun for it."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_pattern(source, MEBIBYTE)
    source.chmod(0o640)
    write_pattern(target, MEBIBYTE, seed=2)
    os.setxattr(target, "user.colour", b"blue")
    give_acl(target)
    pin(target).stage("abc")
    target.unlink()
    copy(None, "local", source, target)
    assert not stat.S_IMODE(target.stat().st_mode) & ~0o640 and os.listxattr(target) == []


def test_rights_of_a_program_are_not_those_of_other_contents(tmp_path):
    """Neither set-id bits nor capabilities, also when nothing was left to write (which takes them away otherwise)."""
    target = tmp_path / "target"
    write_pattern(target, 1000)
    target.chmod(0o6755)
    os.setxattr(target, "security.capability", struct.pack("<5I", 0x2000001, 1 << 13, 0, 0, 0))
    replica = pin(target)
    staged = replica.stage("abc")
    LocalReplica(staged.filename).write([Extent(0, 4)], Reading([b"evil"]), "abc")
    staged = replica.stage("def")
    replica.commit(staged.info.file_id, replica.info()[0].ctime_ns, "def")
    assert target.read_bytes()[:4] == b"evil"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755 and os.listxattr(target) == []


def test_acl_is_that_of_the_old_version(tmp_path):
    """And not the one that files in this folder get, which lets somebody in."""
    target = tmp_path / "target"
    write_pattern(target, 1000)
    target.chmod(0o640)
    give_acl(tmp_path, "default")
    new = Path(pin(target).stage("abc").filename)
    assert os.listxattr(new) == ["user.pdiffcopy.run"] and stat.S_IMODE(new.stat().st_mode) == 0o640
    give_acl(target)
    pin(target).stage("def")
    assert os.getxattr(new, ACL.format("access")) == os.getxattr(target, ACL.format("access"))
    os.removexattr(target, ACL.format("access"))
    target.chmod(0o600)
    pin(target).stage("def")
    assert os.listxattr(new) == ["user.pdiffcopy.run"] and stat.S_IMODE(new.stat().st_mode) == 0o600


def test_attributes_that_can_not_be_listed_are_not_none(tmp_path):
    """One that is lost might be an ACL."""
    with disk_of_kind("xfs", tmp_path) as disk:
        write_pattern(disk / "target", 1000)
        for number in range(300):
            os.setxattr(disk / "target", f"user.{number:0>240}", b"x")
        with pytest.raises(FileError, match="Can't set the attributes"):
            pin(disk / "target").stage("abc")
        assert not list_new(disk / "target")


def test_nobody_replaces_what_they_may_not_write_to(home):
    """Although the folder is theirs."""
    write_pattern(home / "target", 1000)
    replica = pin(home / "target")
    info = replica.info()[0]
    with as_nobody():
        _, new = LocalReplica(str(home / ".target.pdiffcopy")).claim("abc", create=True)
        with pytest.raises(FileForbiddenError, match="may not be written to"):
            replica.stage("abc")
        with pytest.raises(FileForbiddenError, match="may not be written to"):
            replica.commit(new.file_id, info.ctime_ns, "abc")
    assert (home / "target").stat().st_size == 1000


def test_nothing_stays_of_what_may_not_be_begun(home):
    """Who isn't root can write to the file of somebody else, but make no other one theirs."""
    write_pattern(home / "target", 1000)
    (home / "target").chmod(0o666)
    with as_nobody(), pytest.raises(FileForbiddenError, match="Can't give the owner"):
        pin(home / "target").stage("abc")
    assert os.listdir(home) == ["target"]


@pytest.mark.parametrize("options", ["perms", "perms fsync", "perms atomic", "atomic", "atomic acl"])
def test_read_only_files_of_who_is_not_root(home, tmp_path, options):
    """The owner may write until all is done, and nothing is left."""
    source, target = home / "source", home / "target"
    data = write_pattern(source, MEBIBYTE)
    source.chmod(0o444)
    if "perms" not in options:
        write_pattern(target, MEBIBYTE, seed=2)
        for name in "abcd":
            os.setxattr(target, f"user.{name}", b"x")
        target.chmod(0o444)
        os.chown(target, NOBODY, NOBODY)
        if "acl" in options:
            give_acl(target, owner=4, group=4)
    words = dict.fromkeys(options.removesuffix(" acl").split(), True)
    Client(source=str(source), target=str(tmp_path / "other"), **words).run()  # as root, who can import modules
    with as_nobody():
        for _ in range(2 if "atomic" in options else 1):
            Client(source=str(source), target=str(target), **words).run()
    assert target.read_bytes() == data and sorted(os.listdir(home)) == ["source", "target"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o444 and RUN_ATTRIBUTE not in os.listxattr(target)


def test_new_file_may_not_be_ours(tmp_path, monkeypatch):
    """Some file systems give all files to one user, whoever has created them."""
    monkeypatch.setattr(staging.os, "geteuid", lambda: 4321)
    replica = LocalReplica(str(tmp_path / "target"))
    assert replica.commit(replica.stage("abc").info.file_id, 0, "abc").exists


def test_what_can_not_be_gone_on_with_is_begun_anew(tmp_path):
    """Its owner couldn't open it."""
    data = write_pattern(tmp_path / "target", 1000)
    (tmp_path / ".target.pdiffcopy").write_bytes(b"other")
    (tmp_path / ".target.pdiffcopy").chmod(0o444)
    assert Path(pin(tmp_path / "target").stage("abc").filename).read_bytes() == data


@pytest.mark.parametrize("swapped", ["folder", "link"])
def test_places_that_are_swapped(tmp_path, monkeypatch, swapped):
    """What is looked at is what's replaced, and nothing gets out of a folder that others can't look into."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        write_pattern(folder / "file", 1000, seed=len(folder.name))
    (tmp_path / "link").symlink_to("ours")
    if swapped == "folder":
        replica = pin(tmp_path / "link" / "file")
        staged = replica.stage("abc")
        (theirs / ".file.pdiffcopy").write_bytes(b"half")
        take_along(monkeypatch, Claims, "ending", lambda: link_anew(tmp_path / "link", "theirs"))
        with pytest.raises(ReplacedError):  # what has the name afterwards
            replica.commit(staged.info.file_id, replica.info()[0].ctime_ns, "abc")
        assert (theirs / "file").stat().st_size == 1000 and not list_new(ours / "file")
    else:
        (tmp_path / "name").symlink_to("theirs/file")
        replica = LocalReplica(str(tmp_path / "name")).pinned(pin(ours / "file").file_id)
        take_along(monkeypatch, staging, "follow_links", lambda: link_anew(tmp_path / "name", "ours/file"))
        with pytest.raises(ReplacedError):
            replica.stage("abc")
        assert os.listdir(theirs) == ["file"]


def take_along(monkeypatch, owner, name: str, act) -> None:
    """Let something else happen when a function was called, before it goes on."""
    function = getattr(owner, name)

    def call(*arguments):
        result = function(*arguments)
        act()
        return result

    monkeypatch.setattr(owner, name, call)


def link_anew(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


# What is refused {{{1


def test_mounted_files_are_not_replaced(tmp_path):
    """As in a container: known before anything moves."""
    for seed, name in enumerate(("source", "target", "other")):
        write_pattern(tmp_path / name, 1000, seed=seed)
    if subprocess.run(["mount", "--bind", tmp_path / "other", tmp_path / "target"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (line,) = error_lines(run_pdiffcopy("--atomic", tmp_path / "source", tmp_path / "target"))
    finally:
        subprocess.run(["umount", tmp_path / "target"], check=True)
    assert "it is mounted there" in line and not list_new(tmp_path / "target")


def test_files_that_nobody_may_change_are_not_replaced(tmp_path):
    """Known before anything moves, too."""
    target = tmp_path / "target"
    write_pattern(target, 1000)
    if subprocess.run(["chattr", "+i", target], capture_output=True).returncode:
        pytest.skip("the file system has no such files")
    try:
        with pytest.raises(FileForbiddenError, match="may not be written to"):
            pin(target).stage("abc")
    finally:
        subprocess.run(["chattr", "-i", target], check=True)
    assert not list_new(target)


def test_what_is_replaced_with_is_no_source(tmp_path):
    """It would be changed itself."""
    write_pattern(tmp_path / ".target.pdiffcopy", 1000)
    write_pattern(tmp_path / "target", 2000)
    before = snapshot(tmp_path / ".target.pdiffcopy")
    (line,) = error_lines(run_pdiffcopy("--atomic", tmp_path / ".target.pdiffcopy", tmp_path / "target"))
    assert "give it another name" in line and snapshot(tmp_path / ".target.pdiffcopy") == before


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_folders_are_not_replaced(tmp_path, name):
    """However they are spelled."""
    with pytest.raises(FileForbiddenError, match="directory"):
        LocalReplica(f"{tmp_path}/{name}").stage("abc")
    assert os.listdir(tmp_path) == []


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
