"""Mode, owner, group and time of the source, for those who ask for them."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests

from pdiffcopy.answers import decode_metadata
from pdiffcopy.blocks import Extent, Metadata
from pdiffcopy.client import Client
from pdiffcopy.exceptions import FileForbiddenError, ForbiddenError, ProgramError, ProtocolError
from pdiffcopy.files import metadata as metadata_module
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading
from pdiffcopy.wholes import MAX_WHOLE
from tests.support import UNPRIVILEGED, error_lines, ext4, run_pdiffcopy, snapshot, write_pattern

DIRECTIONS = ("local", "upload", "download")
SECOND = 10**9
TIME = 1234567890 * SECOND + 123456789

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


@pytest.fixture
def source(tmp_path):
    """A file that isn't ours, from another time."""
    path = tmp_path / "source"
    write_pattern(path, 10000)
    os.chown(path, 1234, 5678)
    path.chmod(0o4750)
    os.utime(path, ns=(TIME, TIME))
    return path


def get_places(server, direction: str, source: Path, target: Path) -> tuple:
    return (
        server.location(source) if direction == "download" else source,
        server.location(target) if direction == "upload" else target,
    )


def look_at(path: Path) -> tuple:
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns


@pytest.mark.parametrize("before", ["missing", "other", "equal"])
@pytest.mark.parametrize("more", [(), ("--atomic",), ("--fsync",)], ids=["plain", "atomic", "fsync"])
def test_all_of_it(launch, tmp_path, source, direction, before, more):
    """The time last of all, whether anything moves or not."""
    target = tmp_path / "target"
    if before != "missing":
        write_pattern(target, 10000, seed=1 if before == "equal" else 2)
    server = launch("--allow-set-id")
    result = run_pdiffcopy("-p", "-t", "-o", "-g", *more, *get_places(server, direction, source, target))
    assert result.returncode == 0, result.stderr
    assert look_at(target) == look_at(source) == (0o4750, 1234, 5678, TIME)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("option", "index"), [("--perms", 0), ("--owner", 1), ("--group", 2), ("--times", 3)], ids=lambda value: str(value)
)
def test_one_of_it(server, tmp_path, source, direction, option, index):
    """The rest stays as it is, and so does all of it without these options."""
    target = tmp_path / "target"
    write_pattern(target, 10000)
    target.chmod(0o600)
    os.utime(target, ns=(1, 1))
    source.chmod(0o750)
    before = look_at(target)
    places = get_places(server, direction, source, target)
    assert run_pdiffcopy(*places).returncode == 0
    assert look_at(target) == before
    assert run_pdiffcopy(option, *places).returncode == 0
    expected = list(before)
    expected[index] = look_at(source)[index]
    assert list(look_at(target)) == expected


@pytest.fixture
def helpless(launch, direction):
    """What a command line begins with, and a server: whoever writes is root, but can't give files away."""
    is_local = direction != "upload"
    return UNPRIVILEGED if is_local else (), launch(prefix=() if is_local else UNPRIVILEGED)


@pytest.mark.parametrize(
    ("option", "size", "more"),
    [("-o", 1000, ()), ("-g", MAX_WHOLE + 1, ()), ("-g", 1000, ("--atomic",)), ("-o", MAX_WHOLE + 1, ("--atomic",))],
    ids=["small", "large", "small new version", "large new version"],
)
def test_owner_that_can_not_be_is_refused_before_there_is_a_file(helpless, tmp_path, direction, option, size, more):
    """There's no way to take it back."""
    prefix, server = helpless
    (tmp_path / "folder").mkdir()
    source, target = tmp_path / "folder/file", tmp_path / "target/file"
    write_pattern(source, size)  # without a hole, so that it may travel as a whole
    os.chown(source, 1234, 5678)
    for arguments in ((option, source, target), ("-r", option, source.parent, target.parent)):
        result = run_pdiffcopy(*arguments[:-2], *more, *get_places(server, direction, *arguments[-2:]), prefix=prefix)
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if "Can't set owner and group of" in line]
        assert "Operation not permitted (only root can: leave out -o and -g" in line
        assert not target.parent.exists() or list(target.parent.iterdir()) == []


@pytest.mark.parametrize("atomic", [False, True])
def test_metadata_are_flushed_too(tmp_path, source, monkeypatch, atomic):
    """They're set when the contents are on the disk, which may take long."""
    steps = []
    for name in ("sync", "set_metadata"):
        original = getattr(LocalReplica, name)

        def note(replica, *arguments, name=name, original=original, **words):
            steps.append(name + " in advance" * words.get("in_advance", False))
            return original(replica, *arguments, **words)

        monkeypatch.setattr(LocalReplica, name, note)
    Client(source=source, target=tmp_path / "target", times=True, fsync=True, atomic=atomic).run()
    assert steps[-3:] == ["sync", "set_metadata", "sync"]


@pytest.mark.parametrize("time", [-1, -(10**9) * SECOND + 5, 0, 5 * 10**9 * SECOND + 1], ids=str)
def test_times_of_other_ages(server, tmp_path, direction, time):
    """Before 1970, and after 2106."""
    source, target = tmp_path / "source", tmp_path / "target"
    write_pattern(source, 1000)
    os.utime(source, ns=(time, time))
    if source.stat().st_mtime_ns != time:
        pytest.skip("the file system has no such times")
    result = run_pdiffcopy("-t", *get_places(server, direction, source, target))
    assert result.returncode == 0, result.stderr
    assert target.stat().st_mtime_ns == time


@pytest.mark.parametrize("time", [10**28, -(10**28)])
def test_times_that_are_none(server, tmp_path, time):
    """There is no file of that age, whatever the file system."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    answer = requests.post(f"http://127.0.0.1:{server.port}/metadata", params={"filename": path, "mtime_ns": time})
    assert answer.status_code == 400 and "no time" in answer.text


@pytest.mark.parametrize("words", [{"mtime_ns": 10**28}, {"owner": "\ud800"}, {"group": "\ud800"}, {"mode": 1 << 12}])
def test_hostile_server_states_impossible_metadata(words):
    """One line says so."""
    document = {**Metadata(mode=0o600, uid=1, gid=1, mtime_ns=1)._asdict(), **words}
    with pytest.raises(ProtocolError, match="impossible metadata"):
        decode_metadata(json.dumps(document).encode())


def test_names_count_for_more_than_numbers(tmp_path, monkeypatch):
    """The same user may have another number elsewhere; who has no name there keeps the number."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    nobody, games = pwd.getpwnam("nobody"), grp.getgrnam("games")
    replica = LocalReplica(str(path))
    replica.set_metadata(Metadata(uid=1, owner="nobody", gid=1, group="games"))
    assert (path.stat().st_uid, path.stat().st_gid) == (nobody.pw_uid, games.gr_gid)
    assert (replica.metadata().owner, replica.metadata().group) == ("nobody", "games")
    replica.set_metadata(Metadata(uid=4321, owner="no-such-user", gid=8765, group="no-such-group"))
    assert (path.stat().st_uid, path.stat().st_gid) == (4321, 8765)
    assert (replica.metadata().owner, replica.metadata().group) == ("", "")


@pytest.mark.parametrize("more", [(), ("--atomic",)], ids=["plain", "atomic"])
@pytest.mark.parametrize("exists", [False, True], ids=["missing", "other"])
def test_server_sets_no_set_id_bits_unless_it_is_allowed_to(server, tmp_path, source, exists, more):
    """That is known before the target is touched."""
    target = tmp_path / "target"
    if exists:
        write_pattern(target, 10000, seed=2)
    before = snapshot(target)
    result = run_pdiffcopy("-p", *more, source, server.location(target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "--allow-set-id" in line
    assert snapshot(target) == before and sorted(os.listdir(tmp_path)) == ["source"] + exists * ["target"]
    target.touch()
    answer = requests.post(f"http://127.0.0.1:{server.port}/metadata", params={"filename": target, "mode": 0o4755})
    assert answer.status_code == 403 and not target.stat().st_mode & 0o7000


@pytest.mark.parametrize("option", ["-p", "-t", "-o"])
def test_what_may_not_be_set_is_known_in_advance(tmp_path, source, option, monkeypatch):
    """Another user could write to the target, but not give it away: nothing of its contents changes."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o777)
    target = folder / "target"
    write_pattern(target, 10000, seed=2)
    target.chmod(0o666)
    before = target.read_bytes(), look_at(target)

    def refuse(*arguments, **keywords):
        raise PermissionError(1, os.strerror(1))

    for name in ("fchmod", "fchown", "utime"):
        monkeypatch.setattr(metadata_module.os, name, refuse)
    names = {"-p": "perms", "-t": "times", "-o": "owner"}
    client = Client(source=str(source), target=str(target), **{names[option]: True})
    with pytest.raises(ProgramError, match="Can't set (owner and group|the mode|the time) of .*target"):
        client.run()
    assert (target.read_bytes(), look_at(target)) == before


def test_in_advance_nothing_shows(tmp_path):
    """All of it comes when the contents are there: what was somebody else's then couldn't be gone on with."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    before = look_at(path)
    LocalReplica(str(path)).set_metadata(Metadata(mode=0o4777, mtime_ns=5, uid=1, gid=2), in_advance=True)
    assert look_at(path) == before
    path.chmod(0o6755)
    LocalReplica(str(path)).set_metadata(Metadata(mode=0o6755), in_advance=True)
    assert look_at(path)[0] == 0o755


def test_contents_are_not_for_those_who_may_not_read_them_in_the_end(tmp_path, monkeypatch):
    """From the beginning, unless the run is refused."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    path.chmod(0o664)
    replica = LocalReplica(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(metadata_module, "_set_owner", Mock(side_effect=PermissionError(1, "Not allowed")))
        with pytest.raises(FileForbiddenError, match="Not allowed"):
            replica.set_metadata(Metadata(mode=0o640, uid=1), in_advance=True)
    assert look_at(path)[0] == 0o664
    replica.set_metadata(Metadata(mode=0o640), in_advance=True)
    assert look_at(path)[0] == 0o640


def test_next_run_goes_on_with_what_is_to_be_somebody_elses(tmp_path, source):
    """That it is given to is what comes last, after all that takes time."""
    target = tmp_path / "target"
    replica = LocalReplica(str(target))
    staged = replica.stage("abc")
    new = LocalReplica(staged.filename)
    new.set_metadata(Metadata(uid=1234, gid=5678), "abc", in_advance=True)
    new.resize(10000, "abc")
    new.write([Extent(0, 10000)], Reading([source.read_bytes()]), "abc")
    report = json.loads(run_pdiffcopy("--json", "--atomic", "-o", "-g", source, target).stdout)
    assert report["bytes_moved"] == 0 and look_at(target)[1:3] == (1234, 5678)


def test_new_owner_is_not_let_in_too_early(tmp_path, monkeypatch):
    """The group may read the file that it had, but not the one that it gets."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    path.chmod(0o660)
    modes, change = [], os.fchown

    def fchown(fd, *owner):
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        change(fd, *owner)

    monkeypatch.setattr(metadata_module.os, "fchown", fchown)
    LocalReplica(str(path)).set_metadata(Metadata(mode=0o604, gid=1))
    assert modes == [0o600] and look_at(path)[0] == 0o604


def test_claims_hold_for_metadata_too(server, tmp_path):
    """A run that has lost its claim changes nothing any more."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    for replica in (LocalReplica(str(path)), Client(source=server.location(path), target="x").source.replica):
        replica.claim("abc")
        replica.claim("def")
        with pytest.raises(ProgramError, match="another run"):
            replica.set_metadata(Metadata(mode=0o600), "abc")


def test_devices_have_none(device, tmp_path):
    """The mode of an image isn't that of a disk."""
    write_pattern(tmp_path / "file", 1000)
    for places in ((tmp_path / "file", device), (device, tmp_path / "file")):
        (line,) = error_lines(run_pdiffcopy("-p", *places))
        assert "block device" in line


def test_old_servers_do_not_know(launch_old, tmp_path):
    """In one line, before anything is touched."""
    peer = launch_old()
    write_pattern(tmp_path / "source", 1000)
    for places in (
        (tmp_path / "source", peer.location(tmp_path / "target")),
        (peer.location(tmp_path / "source"), tmp_path / "target"),
    ):
        (line,) = error_lines(run_pdiffcopy("-t", *places))
        assert "too old for -p, -t, -o and -g" in line
        assert not (tmp_path / "target").exists()


def test_read_only_servers_set_nothing(launch, tmp_path):
    """As they write nothing."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    replica = Client(source=launch("--read-only").location(path), target="x").source.replica
    assert replica.metadata().mtime_ns == path.stat().st_mtime_ns
    with pytest.raises(ForbiddenError):
        replica.set_metadata(Metadata(mode=0o600))


@pytest.mark.parametrize("direction", ["local", "upload"])
def test_time_that_a_file_system_does_not_have(server, tmp_path, direction):
    """The kernel would take the nearest one, and say nothing. (ext4 with small inodes counts 31 bits of seconds.)"""
    with ext4(tmp_path / "image", tmp_path / "disk", "-I", "128") as disk:
        (tmp_path / "source").write_bytes(b"x")
        for seconds, status in ((1_600_000_000.75, 0), (7_258_118_400, 1)):
            os.utime(tmp_path / "source", (seconds, seconds))
            target = server.location(disk / "target") if direction == "upload" else disk / "target"
            result = run_pdiffcopy("-t", tmp_path / "source", target)
            assert result.returncode == status
            assert not status or "has no such time (leave out -t" in error_lines(result)[0]
        assert (disk / "target").read_bytes() == b"x"
