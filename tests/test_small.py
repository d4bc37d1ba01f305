"""Small files, which are done some at a time: that changes nothing but how long it takes."""

from __future__ import annotations

import fcntl
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from pdiffcopy.address import Address
from pdiffcopy.client import Client
from pdiffcopy.client.job import Job
from pdiffcopy.client.progress import Reporter
from pdiffcopy.client.sides import _Near
from pdiffcopy.client.small import SmallFiles
from pdiffcopy.exceptions import TransientError
from pdiffcopy.files.claims import RUN_ATTRIBUTE, Claims
from pdiffcopy.files.metadata import write_metadata
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.wholes import MAX_BLOCKS, MAX_WHOLE
from tests.relay import RelayProcess
from tests.support import make_data, run_pdiffcopy, write_pattern

DIRECTIONS = ("local", "upload", "download")
SIZE = 150_000
NAMES = ("a", "b", "c")


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


class Folders:
    """A source and a target with small files, one of which may be behind a server."""

    def __init__(self, folder: Path, port: int, direction: str):
        self.source, self.target = folder / "source", folder / "target"
        self.port, self.direction = port, direction
        self.source.mkdir()
        self.target.mkdir()
        for seed, name in enumerate(NAMES):
            write_pattern(self.source / name, SIZE, seed)

    @property
    def locations(self) -> list[str]:
        """The two of them, as a user names them."""
        far = f"127.0.0.1:{self.port}"
        source = f"{far}{self.source}" if self.direction == "download" else str(self.source)
        return [source, f"{far}{self.target}" if self.direction == "upload" else str(self.target)]

    def copy(self, *names: str) -> None:
        """Let the target have files already."""
        for name in names:
            (self.target / name).write_bytes((self.source / name).read_bytes())

    def bring(self, **options) -> dict[str, str | None]:
        """Do it at once, in this process, and tell what became of each file (None: nothing)."""
        source, target = self.locations
        client = Client(source=source, target=target, **options)
        with client._make_servers() as servers:
            wanted = client._get_options().checked()
            places = [(client.source.address, name) for name in NAMES]
            jobs = [
                Job(_within(place, name), _within(client.target.address, name), wanted, servers, size=SIZE)
                for place, name in places
            ]
            reports = SmallFiles(wanted, servers, Reporter()).bring(jobs)
        return {name: report and report.outcome for name, report in zip(NAMES, reports, strict=True)}

    def is_equal(self) -> bool:
        """Whether the target has all that the source has."""
        return all((self.target / name).read_bytes() == (self.source / name).read_bytes() for name in NAMES)

    def run(self, *options: str):
        """Run the program."""
        return run_pdiffcopy("-r", "--json", *options, *self.locations)


def _within(folder: Address, name: str) -> Address:
    return folder._replace(filename=f"{folder.filename}/{name}", within=folder.filename)


@pytest.fixture
def folders(tmp_path, server, direction):
    return Folders(tmp_path, server.port, direction)


# What is plain {{{1


@pytest.mark.parametrize("options", [{}, {"hash_method": "sha1", "block_size": 4096}, {"verify": False}], ids=str)
def test_plain_files_are_done_at_once(folders, options):
    """What is missing is created, what is equal is left alone."""
    folders.copy("b")
    before = (folders.target / "b").stat().st_ctime_ns
    assert folders.bring(**options) == {"a": "created", "b": "equal", "c": "created"}
    assert folders.is_equal()
    assert (folders.target / "b").stat().st_ctime_ns == before
    assert folders.bring(**options) == dict.fromkeys(NAMES, "equal")
    assert RUN_ATTRIBUTE not in os.listxattr(folders.target / "a")


def test_equal_files_are_found_at_once_in_a_dry_run(folders):
    """What's missing or differs is left, and nothing is touched."""
    folders.copy("a", "b")
    (folders.target / "a").write_bytes(b"different")
    before = read_folder(folders.target)
    assert folders.bring(dry_run=True, perms=True) == {"a": None, "b": "equal", "c": None}
    assert read_folder(folders.target) == before


def read_folder(folder: Path) -> dict[str, tuple]:
    """What files are like."""
    return {path.name: (path.read_bytes(), path.stat().st_ctime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("before", ["missing", "equal"])
@pytest.mark.parametrize("options", [(), ("-m", "sha1", "-b", "4096"), ("-W",), ("--no-verify",), ("-np",)], ids=str)
def test_report_is_that_of_a_file_alone(folders, before, options):
    """Number by number."""
    alone = []
    for name in NAMES:
        if before == "equal":
            folders.copy(name)
        source, target = (f"{location}/{name}" for location in folders.locations)
        result = run_pdiffcopy("--json", *options, source, target)
        alone.append(json.loads(result.stdout))
        if before == "missing":
            (folders.target / name).unlink(missing_ok=True)
    together = json.loads(folders.run(*options).stdout)["files"]
    for report in (*alone, *together):
        del report["elapsed"]
    assert sorted(together, key=lambda report: report["source"]) == alone


def test_empty_files(folders):
    """There's nothing to hash, and nothing to send."""
    for name in NAMES:
        (folders.source / name).write_bytes(b"")
    assert folders.bring() == dict.fromkeys(NAMES, "created")
    assert folders.bring() == dict.fromkeys(NAMES, "equal")


def test_new_files_are_for_nobody_else(folders):
    """The mode of the source, under the umask."""
    for name, mode in zip(NAMES, (0o600, 0o640, 0o444), strict=True):
        (folders.source / name).chmod(mode)
    folders.bring()
    assert [(folders.target / name).stat().st_mode & 0o777 for name in NAMES] == [0o600, 0o640, 0o644]


def test_metadata_counts(folders):
    """Files whose metadata differ aren't equal, and new ones get those of the source."""
    folders.copy("a", "b")
    for name in NAMES:
        os.utime(folders.source / name, ns=(1, 10**18 + 1))
        (folders.source / name).chmod(0o751)
    os.utime(folders.target / "a", ns=(1, 10**18 + 1))
    (folders.target / "a").chmod(0o751)
    options = {"times": True, "perms": True, "owner": True, "group": True}
    assert folders.bring(**options) == {"a": "equal", "b": None, "c": "created"}
    status = (folders.target / "c").stat()
    assert (status.st_mtime_ns, status.st_mode & 0o777) == (10**18 + 1, 0o751)
    assert folders.run("-a").returncode == 0
    assert folders.bring(**options) == dict.fromkeys(NAMES, "equal")


@pytest.mark.parametrize("claimed", [True, False])
def test_metadata_come_before_anybody_else_can(tmp_path, monkeypatch, claimed):
    """Another run that claims a new file finds it as it's going to be, and its own metadata stay."""
    folders, seen = Folders(tmp_path, 0, "local"), []

    def watch(fd, filename, metadata):
        with open(filename, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(metadata.mtime_ns)
        write_metadata(fd, filename, metadata)

    monkeypatch.setattr("pdiffcopy.localreplica.write_metadata", watch)
    if not claimed:
        monkeypatch.setattr(Claims, "_set_claim", lambda claims, name: False)
    os.utime(folders.source / "b", ns=(1, 10**18))
    assert folders.bring(times=True, perms=True) == dict.fromkeys(NAMES, "created")
    assert 10**18 in seen and len(seen) == 3
    assert (folders.target / "b").stat().st_mtime_ns == 10**18
    assert not any(RUN_ATTRIBUTE in os.listxattr(folders.target / name) for name in NAMES)


# What isn't {{{1


@pytest.mark.parametrize(
    "fault", ["contents", "size", "hole", "hole in a new one", "claimed", "gone", "folder", "link", "too large"]
)
def test_what_is_not_plain_is_left(folders, fault):
    """Nobody has touched it, and the others are done. The program does it afterwards, or says what's wrong."""
    folders.copy("a", "b")
    source, target = folders.source / "b", folders.target / "b"
    is_possible = fault not in ("gone", "folder", "link")
    if fault == "contents":
        target.write_bytes(make_data(SIZE, 9))
    elif fault == "size":
        target.write_bytes(make_data(SIZE - 1, 9))
    elif fault.startswith("hole"):
        data = bytes(65536) + source.read_bytes()[65536:]
        target.write_bytes(data)
        source.write_bytes(b"")
        with source.open("r+b") as file:
            file.seek(65536)
            file.write(data[65536:])
        if fault.endswith("new one"):
            target.unlink()
    elif fault == "claimed":
        os.setxattr(target, RUN_ATTRIBUTE, b"abc")
    elif fault == "too large":
        write_pattern(source, MAX_WHOLE + 1)
        target.unlink()
    else:
        target.unlink()
        if fault == "folder":
            target.mkdir()
        elif fault == "link":
            target.symlink_to("elsewhere")
        else:
            source.unlink()
    before = os.listdir(folders.target), target.is_file() and target.read_bytes()
    assert folders.bring() == {"a": "equal", "b": None, "c": "created"}
    after = [name for name in os.listdir(folders.target) if name != "c"]
    assert (sorted(after), target.is_file() and target.read_bytes()) == (sorted(before[0]), before[1])
    if is_possible:
        assert folders.run().returncode == 0
        assert folders.is_equal()
        assert target.stat().st_blocks == source.stat().st_blocks
    else:
        assert not (folders.target / "elsewhere").exists()


@pytest.mark.parametrize("option", ["atomic", "fsync", "drop_cache", "bwlimit", "sparse"])
def test_some_options_take_more(folders, option):
    """Those files are done one by one."""
    value = {"bwlimit": 10**9, "sparse": "always"}.get(option, True)
    client = Client(source=folders.locations[0], target=folders.locations[1], **{option: value})
    assert not SmallFiles(client._get_options(), client._make_servers(), Reporter()).suits
    options = {"bwlimit": ["--bwlimit=1000000000"], "sparse": ["--sparse=always"]}
    result = folders.run(*options.get(option, [f"--{option.replace('_', '-')}"]))
    assert result.returncode == 0, result.stderr
    assert folders.is_equal()


def test_one_file_by_two_names_is_refused(folders):
    """As alone."""
    folders.copy("a", "c")
    (folders.target / "b").hardlink_to(folders.source / "b")
    assert folders.bring() == {"a": "equal", "b": None, "c": "equal"}
    result = folders.run()
    assert result.returncode == 1 and "are the same file" in result.stderr


def test_source_that_changes_meanwhile_is_done_again(tmp_path, monkeypatch):
    """A target that may be a mixture is no success."""
    folders = Folders(tmp_path, 0, "local")
    create = LocalReplica.create

    def create_and_change(replica, *arguments):
        result = create(replica, *arguments)
        if replica.filename.endswith("/b"):
            (folders.source / "b").write_bytes(make_data(SIZE, 9))
        return result

    monkeypatch.setattr(LocalReplica, "create", create_and_change)
    assert folders.bring() == {"a": "created", "b": None, "c": "created"}
    assert folders.run().returncode == 0
    assert folders.is_equal()


def test_source_that_changes_while_it_is_hashed_is_not_equal(tmp_path, monkeypatch):
    """Nor is a target."""
    folders = Folders(tmp_path, 0, "local")
    folders.copy(*NAMES)
    look = LocalReplica._look

    def look_and_touch(replica, file):
        info = look(replica, file)
        if replica.filename.endswith("/b"):
            os.utime(replica.filename, ns=(1, 1))
        return info

    monkeypatch.setattr(LocalReplica, "_look", look_and_touch)
    assert folders.bring() == {"a": "equal", "b": None, "c": "equal"}


def test_source_that_changes_before_its_metadata_are_read_is_not_equal(tmp_path, monkeypatch):
    """Contents and metadata that it never had together are no success."""
    folders = Folders(tmp_path, 0, "local")
    folders.copy(*NAMES)
    (folders.source / "new").write_bytes(make_data(SIZE, 9))
    for path in (*folders.source.iterdir(), *folders.target.iterdir()):
        path.chmod(0o640)
    read = LocalReplica.metadata

    def replace_and_read(replica):
        if replica.filename == str(folders.source / "b"):
            (folders.source / "new").replace(folders.source / "b")
        return read(replica)

    monkeypatch.setattr(LocalReplica, "metadata", replace_and_read)
    assert folders.bring(perms=True) == {"a": "equal", "b": None, "c": "equal"}


@pytest.mark.parametrize("options", [(), ("--fsync", "-p"), ("--sparse=always",)], ids=str)
def test_both_sides_may_be_behind_one_server(server, tmp_path, options):
    """Whoever reads doesn't keep others from writing, which the readers wait for."""
    folders = Folders(tmp_path, server.port, "local")
    for seed in range(40):
        write_pattern(folders.source / str(seed), 30_000, seed)
        write_pattern(folders.target / str(seed), 30_000, seed + 50)
    locations = [server.location(folder) for folder in (folders.source, folders.target)]
    result = run_pdiffcopy("-r", "--json", *options, *locations)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["updated"] == 40
    assert [(folders.target / str(seed)).read_bytes() for seed in range(40)] == [
        (folders.source / str(seed)).read_bytes() for seed in range(40)
    ]


@pytest.mark.parametrize("block_size", ["128", "16KiB"])
def test_small_blocks(folders, block_size):
    """The digests of some may be too many for one answer of several."""
    folders.copy("a", "b")
    for name in "ab":
        with (folders.target / name).open("r+b") as file:
            file.write(b"?")
    result = folders.run("-b", block_size)
    assert result.returncode == 0, result.stderr
    assert folders.is_equal()
    assert json.loads(result.stdout)["updated"] == 2


def test_summary_takes_little_memory(tmp_path):
    """However many blocks somebody asks for."""
    write_pattern(tmp_path / "file", 65536)
    replica = LocalReplica(str(tmp_path / "file"))
    tracemalloc.start()
    try:
        summary = replica.summarize(65536 // MAX_BLOCKS, "sha512", 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert summary.digest and peak < 3 * 1024 * 1024


def test_sources_from_different_places_are_done_one_by_one(server, launch, tmp_path):
    """What has several origins has several ways."""
    folders = Folders(tmp_path, server.port, "download")
    other = launch()
    sources = [f"127.0.0.1:{port}{folders.source}/{name}" for port, name in ((server.port, "a"), (other.port, "b"))]
    result = run_pdiffcopy("--json", *sources, folders.source / "c", f"{folders.target}/")
    assert result.returncode == 0, result.stderr
    assert folders.is_equal() and json.loads(result.stdout)["created"] == 3


# On a bad network {{{1


@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("side", ["request", "response"])
@pytest.mark.parametrize("direction", ["upload", "download"])
def test_folders_survive_a_lost_connection(server, tmp_path, direction, side, skip):
    """Before the files, between them, and after them: each exchange may have to be repeated."""
    with RelayProcess(server.port, f"{side} POST+/many 0 reset 1 {skip}") as relay:
        folders = Folders(tmp_path, relay.port, direction)
        (folders.source / "deep" / "er").mkdir(parents=True)
        write_pattern(folders.source / "deep" / "er" / "file", SIZE, 7)
        (folders.source / "c").chmod(0o400)
        result = folders.run("-a")
        relay.stop()
    assert result.returncode == 0, result.stderr
    assert folders.is_equal()
    assert (folders.target / "deep" / "er" / "file").read_bytes() == make_data(SIZE, 7)


def test_new_file_of_which_nothing_is_known_is_looked_at(tmp_path, monkeypatch):
    """It may be complete, and one that its owner can't write to."""
    folders, lost = Folders(tmp_path, 0, "local"), []
    create = _Near.create

    def create_and_lose(files, *arguments):
        found = create(files, *arguments)
        lost.append(found)
        raise TransientError("lost")

    monkeypatch.setattr(_Near, "create", create_and_lose)
    assert folders.bring(perms=True) == dict.fromkeys(NAMES, "equal")
    assert len(lost) == 1 and folders.is_equal()


@pytest.mark.parametrize("direction", ["upload", "download"])
@pytest.mark.parametrize(
    "fault",
    [
        f"{side} POST+/many {place} {action}"
        for side in ("request", "response")
        for place in ("0", "first", "middle", "last")
        for action in ("reset", "corrupt")
        if (place, action) != ("0", "corrupt")
    ],
)
@pytest.mark.parametrize("skip", [0, 1])
def test_broken_exchanges_are_made_up_for(server, tmp_path, direction, fault, skip):
    """Whatever breaks, and wherever: in the end all files are equal, and nothing claims them."""
    with RelayProcess(server.port, f"{fault} 1 {skip}") as relay:
        folders = Folders(tmp_path, relay.port, direction)
        folders.copy("a")
        result = folders.run()
        assert relay.stop()
    assert result.returncode == 0, result.stderr
    assert folders.is_equal()
    assert not any(RUN_ATTRIBUTE in os.listxattr(folders.target / name) for name in NAMES)
