"""Many files in one run: several sources, and folders."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest

from pdiffcopy.address import Address
from pdiffcopy.client import Client, Network, many
from pdiffcopy.client.flight import MAX_SMALL
from pdiffcopy.client.servers import Servers
from pdiffcopy.client.summary import FileReport, Summary
from pdiffcopy.client.tree import Rule, select_tree
from pdiffcopy.exceptions import FileForbiddenError, FilesFailedError, ProgramError, SourceChangedError, UsageError
from tests.relay import RelayProcess
from tests.support import UNPRIVILEGED, error_lines, find_free_port, make_data, run_pdiffcopy, write_pattern

DIRECTIONS = ("local", "upload", "download")
SIZE = 100_000


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


@pytest.fixture
def place(server, direction):
    """A function that makes locations of sources and a target (which may end in a slash)."""
    return partial(locate, server, direction)


def locate(server, direction: str, *paths: Path | str) -> list[str]:
    """Make locations of sources and a target."""
    *sources, target = map(str, paths)
    if direction == "download":
        sources = [f"127.0.0.1:{server.port}{source}" for source in sources]
    return [*sources, f"127.0.0.1:{server.port}{target}" if direction == "upload" else target]


def make_tree(folder: Path, **files: int) -> Path:
    """Make files by their names (two underscores are a slash) and the seeds of their contents."""
    folder.mkdir(exist_ok=True)
    for name, seed in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_data(SIZE + seed, seed))
    return folder


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """The contents of all files by their names (folders have none)."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def run(*arguments) -> dict:
    """Run the program, and return its JSON object."""
    result = run_pdiffcopy("--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Several files {{{1


@pytest.mark.parametrize("before", ["missing", "there"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_several_sources_go_into_a_folder(tmp_path, place, before, slash):
    """Each under its own name. The folder is created where it's missing."""
    sources = make_tree(tmp_path / "sources", a=1, b__c=2, d=3)
    target = tmp_path / "x" / "target"
    if before == "there":
        target.mkdir(parents=True)
        (target / "a").write_bytes(make_data(SIZE + 1, 1))
        (target / "c").write_bytes(make_data(SIZE, 9))
        (target / "other").write_bytes(b"left alone")
    report = run(*place(sources / "a", sources / "b/c", sources / "d", f"{target}{slash}"))
    names = {"a": sources / "a", "c": sources / "b/c", "d": sources / "d"}
    assert {name: (target / name).read_bytes() for name in names} == {n: path.read_bytes() for n, path in names.items()}
    expected = (1, 1, 1) if before == "there" else (0, 0, 3)
    assert (report["equal"], report["updated"], report["created"]) == expected
    assert len(os.listdir(target)) == 3 + (before == "there")
    assert report["bytes_moved"] == sum(file["bytes_moved"] for file in report["files"])
    assert sorted(Path(file["target"]).name for file in report["files"]) == ["a", "c", "d"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_one_source_goes_into_a_folder_that_is_there(tmp_path, place, slash):
    """As with cp, and the report is that of one file."""
    data = write_pattern(tmp_path / "file", SIZE)
    (tmp_path / "folder").mkdir()
    report = run(*place(tmp_path / "file", f"{tmp_path}/folder{slash}"))
    assert (tmp_path / "folder" / "file").read_bytes() == data
    assert report["target"].endswith("/folder/file") and report["outcome"] == "created"


def test_slash_makes_a_folder(tmp_path, place):
    """Of a target that is missing."""
    data = write_pattern(tmp_path / "file", SIZE)
    run(*place(tmp_path / "file", f"{tmp_path}/a/b/"))
    assert (tmp_path / "a" / "b" / "file").read_bytes() == data


@pytest.mark.parametrize(
    "fault", ["same name", "folder", "several folders", "folder with a slash", "target is a file", "folder there"]
)
def test_what_can_not_be_is_refused_before_anything_is_touched(tmp_path, place, fault):
    """In one line that names it."""
    sources = make_tree(tmp_path / "sources", a=1, b=2, c__a=3)
    target = make_tree(tmp_path / "target")
    names, expected = [sources / "a", sources / "b"], ""
    if fault == "same name":
        names, expected = [sources / "a", sources / "c/a"], "called a"
    elif fault == "folder":
        names, expected = [sources / "c"], "add -r"
    elif fault == "several folders":
        names, expected = [sources / "a", sources / "c"], "in a run of its own, with -r"
    elif fault == "folder with a slash":
        names, expected = [sources / "a", f"{sources}/c/"], "in a run of its own, with -r"
    elif fault == "target is a file":
        target, expected = target / "file", "is no folder"
        target.write_bytes(b"precious")
    else:
        (target / "b").mkdir()
        expected = "b is a folder in"
    before = read_tree(tmp_path)
    result = run_pdiffcopy(*place(*names, target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and expected in line
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("option", ["-r", "-a"])
def test_several_sources_with_an_option_for_folders(tmp_path, place, option):
    """Files are files. Of several folders nobody would know what becomes of which."""
    sources = make_tree(tmp_path / "sources", a=1, b=2, c__a=3, d__b=4)
    os.utime(sources / "b", ns=(5, 5))
    run(option, *place(sources / "a", sources / "b", tmp_path / "files"))
    assert read_tree(tmp_path / "files") == {name: (sources / name).read_bytes() for name in "ab"}
    assert ((tmp_path / "files/b").stat().st_mtime_ns == 5) is (option == "-a")
    result = run_pdiffcopy(option, *place(sources / "c", sources / "d", tmp_path / "folders"))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "in a run of its own, with -r" in line
    assert not (tmp_path / "folders").exists()


@pytest.mark.parametrize("options", [(), ("-r",), ("-a",)])
def test_rules_without_a_folder_are_refused(tmp_path, options):
    """They would be of no use, and whoever gives them expects that they are."""
    sources = make_tree(tmp_path / "sources", a=1, b=2)
    for names in (["a"], ["a", "b"]):
        paths = [sources / name for name in names]
        result = run_pdiffcopy(*options, "--exclude=a", *paths, tmp_path / "target")
        (line,) = error_lines(result)
        assert result.returncode == 1 and "--exclude choose among the files of a folder" in line
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["a", "b"])
def test_link_to_another_target_is_refused_with_new_versions_too(tmp_path, place, name):
    """It goes on leading to that one, which would become equal to two sources, one after the other."""
    source, target = make_tree(tmp_path / "source", a=1, b=2), make_tree(tmp_path / "target", **{name: 1})
    (target / "ab".replace(name, "")).symlink_to(name)
    before = read_tree(tmp_path)
    result = run_pdiffcopy("--atomic", *place(source / "a", source / "b", target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "are one in" in line
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
@pytest.mark.parametrize("options", [(), ("-r",)])
def test_two_targets_that_are_one_file_are_refused(tmp_path, place, kind, options):
    """It couldn't be equal to both sources. (Links in folders are no files anyway.)"""
    source, target = make_tree(tmp_path / "source", a=1, b=2), make_tree(tmp_path / "target", a=1)
    if kind == "hard link":
        os.link(target / "a", target / "b")
    else:
        (target / "b").symlink_to("a")
    before = read_tree(tmp_path)
    names = [source] if options else [source / "a", source / "b"]
    result = run_pdiffcopy(*options, *place(*names, target))
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert ("a are one in" if kind == "hard link" or not options else "b is a file in") in line
    assert read_tree(tmp_path) == before


def test_two_names_of_one_file_on_both_sides_are_done_once(tmp_path, place):
    """The one that's left out is equal, too."""
    source, target = make_tree(tmp_path / "source", a=1), make_tree(tmp_path / "target", a=2)
    for folder in (source, target):
        os.link(folder / "a", folder / "b")
    for options, names in ((("-r",), [source]), ((), [source / "a", source / "b"])):
        report = run(*options, *place(*names, target))
        assert (len(report["files"]), report["skipped"]) == (1, {"hard link": 1})
        assert read_tree(target) == read_tree(source)
        (target / "a").write_bytes(b"different once more")


def test_two_names_of_one_file_get_a_new_version_each(tmp_path, place):
    """A dry run says so, too."""
    source, target = make_tree(tmp_path / "source", a=1), make_tree(tmp_path / "target", a=2)
    for folder in (source, target):
        os.link(folder / "a", folder / "b")
    for options in (["-n"], []):
        report = run("-r", "--atomic", *options, *place(source, target))
        assert (report["updated"], report["skipped"]) == (2, {})
    assert read_tree(target) == read_tree(source)


@pytest.mark.parametrize("options", [(), ("-r",)])
def test_target_that_is_another_source_is_refused(tmp_path, options):
    """Otherwise a source would be overwritten."""
    source, target = make_tree(tmp_path / "source", a=1, b=2), make_tree(tmp_path / "target")
    os.link(source / "a", target / "b")
    before = read_tree(tmp_path)
    names = [source] if options else [source / "a", source / "b"]
    result = run_pdiffcopy(*options, *names, target)
    (line,) = error_lines(result)
    assert result.returncode == 1 and f"The target {target}/b is the source {source}/a" in line
    assert read_tree(tmp_path) == before


def test_source_that_leads_to_another_target_is_refused(tmp_path):
    """By a symbolic link, which is followed where it's named."""
    sources, target = make_tree(tmp_path / "sources", a=1), make_tree(tmp_path / "target", a=2, b=3)
    (sources / "b").symlink_to(target / "a")
    before = read_tree(tmp_path)
    result = run_pdiffcopy(sources / "a", sources / "b", target)
    (line,) = error_lines(result)
    assert result.returncode == 1 and f"The target {target}/a is the source {sources}/b" in line
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("place_of", ["into itself", "new, into itself", "out of itself", "itself", "by a link"])
def test_folders_that_lie_in_each_other_are_refused(server, tmp_path, place_of):
    """On whatever way they're reached: a run would read what it writes."""
    outer = make_tree(tmp_path / "outer", a=1, inner__b=2, inner__inner__c=3)
    (tmp_path / "link").symlink_to("outer/inner")
    source, target = {
        "into itself": (outer, outer / "inner"),
        "new, into itself": (outer, outer / "inner/new"),
        "out of itself": (outer / "inner", outer),
        "itself": (outer, outer),
        "by a link": (outer, tmp_path / "link"),
    }[place_of]
    before = read_tree(tmp_path)
    remote = [f"127.0.0.1:{server.port}{path}" for path in (source, target)]
    for locations in ((source, target), remote, (remote[0], target)):
        result = run_pdiffcopy("-r", *locations)
        (line,) = error_lines(result)
        assert result.returncode == 1
        assert any(text in line for text in ("is the source", "lies in", "are the same folder"))
        assert read_tree(tmp_path) == before


@pytest.mark.parametrize(
    "way", ["server of the folder", "another name of a server", "bind mount", "link behind a server"]
)
def test_new_folder_in_the_source_is_refused_on_any_way(launch, tmp_path, way):
    """The first run could do it, and the next one would copy the copy."""
    source = make_tree(tmp_path / "source", a=1, inner__b=2)
    (tmp_path / "link").symlink_to("source/inner")
    (tmp_path / "mounted").mkdir()
    server = launch(*(("--root", str(source)) if way == "server of the folder" else ()))
    with bound(source, tmp_path / "mounted") if way == "bind mount" else nullcontext():
        locations = {
            "server of the folder": (source, server.location("/inner/new/x")),
            "another name of a server": (server.location(source), f"localhost:{server.port}{source}/new"),
            "bind mount": (source, tmp_path / "mounted/inner/new"),
            "link behind a server": (server.location(source), server.location(f"{tmp_path}/link/new")),
        }[way]
        before = read_tree(source)
        result = run_pdiffcopy("-r", *locations)
        (line,) = error_lines(result)
        assert result.returncode == 1 and "lies in" in line
        assert read_tree(source) == before


@pytest.mark.parametrize("direction", ["local", "upload"])
def test_owners_that_can_not_be_are_refused_once(launch, tmp_path, direction):
    """For the first new thing, which stands for all of them, and before anything is touched."""
    source = make_tree(tmp_path / "source", a=1, x__b=2, x__y__c=3)
    for path in (source, *source.rglob("*")):
        os.chown(path, 1234, 5678)
    server = launch(prefix=UNPRIVILEGED if direction == "upload" else ())
    target = server.location(tmp_path / "target") if direction == "upload" else tmp_path / "target"
    result = run_pdiffcopy("-a", source, target, prefix=UNPRIVILEGED if direction == "local" else ())
    (line,) = error_lines(result)
    assert result.returncode == 1 and "only root can" in line
    assert not (tmp_path / "target").exists()


def test_file_that_vanishes_after_it_was_listed_has_changed(tmp_path, place, monkeypatch):
    """As one that vanishes while it is copied: to run again helps."""
    source = make_tree(tmp_path / "source", a=1, b=2)
    make_folders = many.make_folders

    def make_and_remove(*arguments):
        yield from make_folders(*arguments)
        (source / "a").unlink()

    monkeypatch.setattr(many, "make_folders", make_and_remove)
    location, target = place(source, tmp_path / "target")
    files = {Path(file.source.filename).name: file for file in
             Client(source=location, target=target, recursive=True).run_files()}  # fmt: skip
    assert (files["a"].error.exit_code, files["b"].error) == (SourceChangedError.exit_code, None)
    assert "identity" in str(files["a"].error)


def test_folder_within_the_other_one_is_fine_if_it_is_not_read(tmp_path):
    """Nobody reads what is written then."""
    outer = make_tree(tmp_path / "outer", a=1, inner__b=2)
    for target in ("backup", "backup", "new"):
        rules = ["--exclude=backup*", "--exclude=new*"]
        assert run("-r", *rules, outer, outer / target)["failed"] == 0
        assert sorted(read_tree(outer / target)) == ["a", "inner", "inner/b"]
    assert run("-r", outer / "inner", outer)["created"] == 1
    assert (outer / "b").read_bytes() == (outer / "inner/b").read_bytes()


def test_folder_that_is_mounted_twice_is_refused(tmp_path):
    """Under two names in the target, or in the target and in the source."""
    source = make_tree(tmp_path / "source", x__f=1, y__f=2)
    target = make_tree(tmp_path / "target", x__f=3, y__g=4)
    for origin in (target / "x", source / "x"):
        with bound(origin, target / "y"):
            before = read_tree(tmp_path)
            result = run_pdiffcopy("-r", source, target)
            (line,) = error_lines(result)
            assert result.returncode == 1 and ("are one in" in line or "is the source" in line)
            assert read_tree(tmp_path) == before


@contextmanager
def bound(folder: Path, name: Path):
    """Let a name lead to another folder as well."""
    if subprocess.run(["mount", "--bind", folder, name], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", name], check=True)


@pytest.mark.parametrize("options", [(), ("-r",)])
def test_new_versions_of_linked_files_are_files_of_their_own(tmp_path, place, options):
    """Each takes the place of one name, so all of them are made, one after the other."""
    source, target = make_tree(tmp_path / "source", a=1, b=2, c=3), make_tree(tmp_path / "target", a=9)
    os.link(source / "c", source / "d")
    for name in "bcd":
        os.link(target / "a", target / name)
    names = [source] if options else [source / name for name in "abcd"]
    assert run("-n", "--atomic", *options, *place(*names, target))["updated"] == 4
    assert run("--atomic", *options, *place(*names, target))["updated"] == 4
    assert read_tree(target) == read_tree(source)


def test_names_that_are_no_links_any_more_are_files_of_their_own(tmp_path, monkeypatch):
    """Where the first one was exchanged after it was found, its twin isn't equal yet."""
    from pdiffcopy.client import many

    source, target = make_tree(tmp_path / "source", a=1), make_tree(tmp_path / "target", a=2)
    for folder in (source, target):
        os.link(folder / "a", folder / "b")
    make_folders = many.make_folders

    def exchange(selection, servers):
        yield from make_folders(selection, servers)
        (source / "new").write_bytes(b"new")
        (source / "new").rename(source / "a")

    monkeypatch.setattr(many, "make_folders", exchange)
    summary = Summary()
    files = {
        file.source.filename: file
        for file in Client(source=str(source), target=str(target), recursive=True).run_files(summary)
    }
    assert "are one in" in str(files[f"{source}/b"].error)
    assert (target / "a").read_bytes() == b"new" and not summary.skipped


def test_target_that_is_a_link_to_nothing_is_refused(tmp_path, place):
    """It would lead to what another source becomes."""
    sources, target = make_tree(tmp_path / "sources", a=1, b=2), make_tree(tmp_path / "target")
    (target / "a").symlink_to("b")
    result = run_pdiffcopy(*place(sources / "a", sources / "b", target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "a is a link that leads to nothing" in line
    assert os.listdir(target) == ["a"]


def test_source_behind_a_server_of_this_machine_is_a_file_of_it(server, tmp_path):
    """Under whatever address the server is reached."""
    sources, target = make_tree(tmp_path / "sources", a=1), make_tree(tmp_path / "target", a=2)
    (sources / "b").symlink_to(target / "a")
    before = read_tree(tmp_path)
    for host in ("127.0.0.1", "localhost"):
        remote = [f"{host}:{server.port}{sources}/{name}" for name in "ab"]
        for place in (str(target), f"127.0.0.1:{server.port}{target}"):
            (line,) = error_lines(run_pdiffcopy(*remote, place))
            assert "is the source" in line
            assert read_tree(tmp_path) == before


def test_failure_costs_one_file(tmp_path, place):
    """It is named, the rest goes on, and the exit code tells."""
    sources = make_tree(tmp_path / "sources", a=1, b=2, c=3)
    result = run_pdiffcopy(
        "--json", *place(sources / "a", sources / "gone", sources / "b", sources / "c", tmp_path / "t")
    )
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert (report["created"], report["failed"]) == (3, 1)
    (failed,) = (file for file in report["files"] if "error" in file)
    assert failed["source"].endswith("/gone") and "doesn't exist" in failed["error"] and failed["exit_code"] == 1
    assert "gone doesn't exist" in result.stderr and error_lines(result)[-1].startswith("pdiffcopy: 1 file failed")
    assert sorted(os.listdir(tmp_path / "t")) == ["a", "b", "c"]


def test_each_file_is_as_if_it_were_alone(tmp_path, place):
    """New versions, metadata, holes."""
    sources = make_tree(tmp_path / "sources", a=1, b=2)
    with (sources / "holes").open("wb") as file:
        file.truncate(10**7)
    for name in ("a", "b", "holes"):
        os.utime(sources / name, ns=(10**18, 10**18 + 7))
        (sources / name).chmod(0o640)
    target = make_tree(tmp_path / "target", a=5)
    inode = (target / "a").stat().st_ino
    report = run("--atomic", "-pt", *place(sources / "a", sources / "b", sources / "holes", target))
    assert read_tree(target) == read_tree(sources)
    assert all(path.stat().st_mtime_ns == 10**18 + 7 for path in target.iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in target.iterdir())
    assert (target / "a").stat().st_ino != inode and (target / "holes").stat().st_blocks * 512 < 10**6
    assert all(file["verification"] == "verified" for file in report["files"])


def test_source_that_changes_concerns_one_file(tmp_path, monkeypatch):
    """The others are done, and the exit code is that of the failure."""
    sources = make_tree(tmp_path / "sources", a=1, b=2)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_bytes(b"something else, so that it isn't done at once")
    client = Client(sources=[str(sources / "a"), str(sources / "b")], target=str(tmp_path / "target"))
    summary = Summary()
    from pdiffcopy.client.job import Job

    begin = Job.begin

    def begin_and_change(job):
        plan = begin(job)
        if job.source_address.filename.endswith("/a"):
            os.utime(job.source_address.filename, ns=(1, 1))
        return plan

    monkeypatch.setattr(Job, "begin", begin_and_change)
    files = {Path(file.source.filename).name: file for file in client.run_files(summary)}
    assert isinstance(files["a"].error, SourceChangedError)
    assert files["b"].report.outcome == "created"
    with pytest.raises(FilesFailedError) as info:
        summary.check()
    assert info.value.exit_code == 3


@pytest.mark.parametrize(("codes", "expected"), [([3], 3), ([4, 4], 4), ([3, 4], 1), ([1], 1)])
def test_exit_code_is_that_of_the_failures_if_they_agree(codes, expected):
    """Otherwise it's 1."""
    summary = Summary()
    for code in codes:
        error = ProgramError("it failed")
        error.exit_code = code
        summary.add(FileReport(Address("/a"), Address("/b"), error=error))
    with pytest.raises(FilesFailedError, match=f"{len(codes)} file") as info:
        summary.check()
    assert info.value.exit_code == expected


def test_what_ends_everything_does(server, launch, tmp_path):
    """It would be the same for all files, so it's told once."""
    sources = make_tree(tmp_path / "sources", a=1, b=2, c=3)
    names = [sources / "a", sources / "b", sources / "c"]
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    closed = launch("--token-file", str(tmp_path / "token"))
    for port, reason in ((closed.port, "token"), (find_free_port(), "refused")):
        result = run_pdiffcopy("--retries=0", *names, f"127.0.0.1:{port}{tmp_path}/target/")
        assert result.returncode == 1
        assert reason in error_lines(result)[-1], result.stderr
        assert len(error_lines(result)) == 1


# Folders {{{1


@pytest.fixture
def tree(tmp_path):
    """A folder with all sorts of things."""
    tree = make_tree(tmp_path / "tree", a=1, db__b=2, db__sub__c=3, **{"z\n%": 4})
    (tree / "empty" / "inner").mkdir(parents=True)
    (tree / os.fsdecode(b"\xff")).write_bytes(b"no UTF-8")
    return tree


def add_oddities(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tree / "link").symlink_to("../outside/secret")
    (tree / "links").symlink_to("../outside")
    os.mkfifo(tree / "db" / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "socket"))


def test_folder_is_brought_into_line(tmp_path, place, tree):
    """By relative name. What only the target has is left alone, what is no file is left out and counted."""
    expected = read_tree(tree)
    add_oddities(tree, tmp_path)
    target = make_tree(tmp_path / "target", a=1, db__b=7, db__other=8)
    report = run("-r", *place(tree, target))
    expected["db/other"] = make_data(SIZE + 8, 8)
    assert read_tree(target) == expected
    assert not any(path.is_symlink() or path.is_fifo() for path in target.rglob("*"))
    assert report["skipped"] == {"link": 2, "fifo": 1, "socket": 1}
    assert (report["equal"], report["updated"], report["created"]) == (1, 1, 3)
    again = run("-r", *place(f"{tree}/", f"{target}/"))
    assert (again["equal"], again["created"], again["bytes_moved"]) == (5, 0, 0)


def test_skipped_things_are_named_for_those_who_ask(tmp_path, place, tree):
    """And files that are done."""
    add_oddities(tree, tmp_path)
    quiet, verbose = (run_pdiffcopy(*options, "-r", *place(tree, tmp_path / "t")) for options in ((), ("-v",)))
    assert "links" not in quiet.stderr and "4 skipped" in quiet.stderr
    assert "Left out: links (link)" in verbose.stderr and "db/fifo (fifo)" in verbose.stderr
    assert "db/b: " in verbose.stderr


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["--exclude=db/*"], {"a", "z\n%", os.fsdecode(b"\xff")}),
        (["--include=*/c", "--exclude=db/*"], {"a", "z\n%", os.fsdecode(b"\xff"), "db/sub/c"}),
        (["--exclude=db/*", "--include=*/c"], {"a", "z\n%", os.fsdecode(b"\xff")}),
        (["--include=a", "--include", "*b", "--exclude=*"], {"a", "db/b"}),
    ],
)
def test_first_rule_that_fits_decides(tmp_path, place, tree, rules, expected):
    """On names below the folder, in the order of the command line."""
    report = run("-r", *rules, *place(tree, tmp_path / "target"))
    files = {name for name, data in read_tree(tmp_path / "target").items() if data is not None}
    assert files == expected
    assert report["skipped"].get("excluded", 0) == 5 - len(expected)


@pytest.mark.parametrize("conflict", ["folder there", "file there", "link there", "fifo there", "target is a file"])
def test_conflicts_are_refused_before_anything_is_touched(tmp_path, place, tree, conflict):
    """What is a file on one side and something else on the other."""
    target = make_tree(tmp_path / "target", db__b=7)
    if conflict == "folder there":
        (target / "a").mkdir()
    elif conflict == "file there":
        (target / "db" / "sub").write_bytes(b"precious")
    elif conflict == "link there":
        (target / "a").symlink_to("db/b")
    elif conflict == "fifo there":
        os.mkfifo(target / "a")
    else:
        target = target / "db" / "b"
    before = read_tree(tmp_path / "target")
    result = run_pdiffcopy("-r", *place(tree, target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and (" is a " in line)
    assert read_tree(tmp_path / "target") == before


def test_archive_keeps_metadata(tmp_path, place, tree):
    """-a is -r -p -t -o -g."""
    os.chown(tree / "db/b", 1234, 5678)
    (tree / "db/b").chmod(0o604)
    os.utime(tree / "db/b", ns=(5, 5))
    run("-a", *place(tree, tmp_path / "target"))
    status = (tmp_path / "target/db/b").stat()
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (1234, 5678, 5)
    assert stat.S_IMODE(status.st_mode) == 0o604


def test_archive_keeps_the_metadata_of_folders(tmp_path, place, tree):
    """Of those that are new and of those that are there, also when something is put into them: files come first."""
    folders = [tree, *(path for path in sorted(tree.rglob("*")) if path.is_dir() and not path.is_symlink())]
    for number, folder in enumerate(folders):
        folder.chmod(0o750 + number % 2)
    for number, folder in enumerate(reversed(folders)):
        os.utime(folder, ns=(1, 10**18 + number))
    target = tmp_path / "target"
    (target / folders[-1].relative_to(tree)).mkdir(parents=True)
    (target / folders[-1].relative_to(tree)).chmod(0o2700)
    run("-a", *place(tree, target))
    for folder in folders:
        before, after = folder.stat(), (target / folder.relative_to(tree)).stat()
        assert (after.st_mode & 0o777, after.st_mtime_ns) == (before.st_mode & 0o777, before.st_mtime_ns)
    assert (target / folders[-1].relative_to(tree)).stat().st_mode & 0o7000 == 0o2000
    # Nobody writes to what is as it should be.
    changed = [(target / folder.relative_to(tree)).stat().st_ctime_ns for folder in folders]
    assert run("-a", *place(tree, target))["failed"] == 0
    assert changed == [(target / folder.relative_to(tree)).stat().st_ctime_ns for folder in folders]


def test_new_folders_are_for_nobody_else(tmp_path, place):
    """The mode of the source, under the umask, but whoever makes one can write to it. What is there stays as it is."""
    source = make_tree(tmp_path / "source", a__b__f=1, c__g=2, d__h=3)
    modes = {"a": 0o750, "a/b": 0o500, "c": 0o777, "d": 0o700}
    for name, mode in modes.items():
        (source / name).chmod(mode)
    target = tmp_path / "target"
    (target / "d").mkdir(parents=True, mode=0o755)
    run("-r", *place(source, target))
    found = {name: (target / name).stat().st_mode & 0o777 for name in modes}
    assert found == {"a": 0o750, "a/b": 0o700, "c": 0o755, "d": 0o755}


@pytest.mark.parametrize(("rule", "excluded"), [("--exclude=db", False), ("--exclude=db*", True)])
def test_user_learns_that_a_folder_was_excluded_alone(tmp_path, place, tree, rule, excluded):
    """That's not what others mean by it, and what is in it may be nobody's business."""
    result = run_pdiffcopy("-r", rule, *place(tree, tmp_path / "target"))
    assert result.returncode == 0
    assert ("--exclude=db excludes the folder db, but not what is in it" in result.stderr) is not excluded
    assert (tmp_path / "target/db").exists() is not excluded


@pytest.mark.parametrize(
    "rule", ["--exclude=db/", "--exclude=/db", "--include=/db/*", "--exclude=./db", "--exclude=a//b"]
)
def test_rule_that_fits_nothing_is_refused(tmp_path, place, tree, rule):
    """What should have stayed where it was would be copied."""
    result = run_pdiffcopy("-r", rule, *place(tree, tmp_path / "target"))
    (line,) = error_lines(result)
    assert result.returncode == 1 and f"{rule} fits no name below the folder" in line
    assert not (tmp_path / "target").exists()


def test_user_learns_which_rules_have_decided_nothing(tmp_path, place, tree):
    """A typing error would have files copied that were to stay out."""
    rules = ["--exclude=nothing", "--include=db*", "--exclude=db/*"]
    result = run_pdiffcopy("-n", "-r", *rules, *place(tree, tmp_path / "target"))
    lines = [line for line in result.stderr.splitlines() if "was left for" in line]
    assert [rule in line for rule, line in zip(("--exclude=nothing", "--exclude=db/*"), lines, strict=True)] == [
        True
    ] * 2


def test_excluded_folder_of_chosen_files_is_chosen_once(tmp_path):
    """However many of them lie in it."""
    source = make_tree(tmp_path / "source", x__y__a=1, x__y__b=2, x__c=3)
    servers = Servers(Network())
    rules = [Rule(False, "x"), Rule(False, "x/y")]
    selection = select_tree(Address(str(source)), Address(f"{tmp_path}/target"), rules, servers)
    assert sorted(folder.name for folder in selection.folders) == ["", "x", "x/y"]
    assert sorted(file.name for file in selection.files) == ["x/c", "x/y/a", "x/y/b"]


@pytest.mark.parametrize("rules", [("--include=*.img", "--exclude=*"), ("--exclude=secret", "--exclude=secret/sub")])
def test_excluded_folders_of_chosen_files_are_like_those_of_the_source(tmp_path, place, rules):
    """They're needed, so they're for nobody else, and -a keeps what belongs to them. Others aren't made."""
    source = make_tree(tmp_path / "source", secret__sub__a=1, z=2)
    (source / "secret/sub/a").rename(source / "secret/sub/a.img")
    (source / "secret").chmod(0o700)
    os.utime(source / "secret", ns=(5, 5))
    (source / "secret/empty").mkdir()
    os.utime(source / "secret", ns=(5, 5))
    for option in ("-r", "-a"):
        target = tmp_path / option
        run(option, *rules, "--exclude=z", "--exclude=*empty", *place(source, target))
        assert sorted(read_tree(target)) == ["secret", "secret/sub", "secret/sub/a.img"]
        assert stat.S_IMODE((target / "secret").stat().st_mode) == 0o700
        assert ((target / "secret").stat().st_mtime_ns == 5) is (option == "-a")


def test_excluded_folder_that_is_a_file_there_is_refused(tmp_path, place):
    """If a file in it is chosen. Nothing is touched before."""
    source, target = make_tree(tmp_path / "source", d__x=1, z=2), make_tree(tmp_path / "target", d=3)
    before = read_tree(target)
    result = run_pdiffcopy("-r", "--include=*[xz]", "--exclude=*", *place(source, target))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "d is a folder in" in line and read_tree(target) == before
    assert run("-r", "--include=z", "--exclude=*", *place(source, target))["created"] == 1


def test_empty_folder_makes_a_folder(tmp_path, place):
    """Also the one that is named."""
    (tmp_path / "source" / "empty").mkdir(parents=True)
    run("-r", *place(tmp_path / "source", tmp_path / "x" / "target"))
    assert os.listdir(tmp_path / "x" / "target") == ["empty"]


def test_folder_that_can_not_get_its_metadata_is_a_failure(tmp_path, monkeypatch):
    """The files are done all the same."""
    source = make_tree(tmp_path / "source", a__f=1)
    for folder in (source / "a", source):
        folder.chmod(0o500)  # which new ones don't have until all is in them
    monkeypatch.setattr("pdiffcopy.localreplica.write_folder_metadata", _refuse)
    client = Client(source=str(source), target=str(tmp_path / "target"), recursive=True, perms=True)
    summary = Summary()
    files = list(client.run_files(summary))
    assert [(Path(file.target.filename).name, file.outcome) for file in files] == [
        ("f", "created"), ("a", "failed"), ("target", "failed"),
    ]  # fmt: skip
    assert summary.exit_codes == {1}


def _refuse(fd: int, filename: str, metadata: object) -> None:
    raise FileForbiddenError("Can't set the mode of {filename}", filename=filename)


def test_root_of_a_server_is_a_folder(launch, tmp_path, tree):
    """For a folder, and for a file that goes into it. A name has to be given where a file is meant."""
    (tmp_path / "root").mkdir()
    server = launch("--root", tmp_path / "root")
    for location in (f"127.0.0.1:{server.port}/", f"{server.origin}/"):
        assert run_pdiffcopy("-r", tree, location).returncode == 0
        assert run_pdiffcopy("-r", location, tmp_path / "back").returncode == 0
        assert read_tree(tmp_path / "back") == read_tree(tmp_path / "root") == read_tree(tree)
        (tmp_path / "file").write_bytes(b"abc")
        assert run_pdiffcopy(tmp_path / "file", location).returncode == 0
        assert (tmp_path / "root" / "file").read_bytes() == b"abc"
        (tmp_path / "root" / "file").unlink()
        result = run_pdiffcopy(location, tmp_path / "other")
        assert result.returncode == 1 and "names a folder: add the name of the file" in result.stderr


def test_archive_takes_a_file_too(tmp_path, place, tree):
    """Who is used to that option means one file as often as a folder."""
    os.utime(tree / "a", ns=(5, 5))
    run("-a", *place(tree / "a", tmp_path / "new"))
    assert (tmp_path / "new").stat().st_mtime_ns == 5


def test_dry_run_of_a_folder_touches_nothing(tmp_path, place, tree):
    """It tells what would be done."""
    target = make_tree(tmp_path / "target", a=1, db__b=7)
    before = read_tree(target)
    report = run("-n", "-r", *place(tree, target))
    assert "1 equal, 1 updated, 3 created. This was a dry run" in run_pdiffcopy("-nr", *place(tree, target)).stderr
    assert read_tree(target) == before
    assert (report["equal"], report["updated"], report["created"]) == (1, 1, 3)


@pytest.mark.parametrize("options", [("-n",), ("--fsync",)], ids=str)
@pytest.mark.parametrize("direction", ["upload", "download"])
def test_files_share_round_trips(launch, tmp_path, direction, options):
    """A long wire would make each of them expensive."""
    count = 40
    source, target = tmp_path / "source", tmp_path / "target"
    make_tree(source, **{f"f{number}": number for number in range(count)})
    make_tree(target, **{f"f{number}": number + (number == 7) for number in range(count)})
    server = launch("--access-log=-", "-c", "1")
    places = [str(source), server.location(target)] if direction == "upload" else [server.location(source), str(target)]
    report = run("-r", *options, *places)
    assert (report["equal"], report["updated"]) == (count - 1, 1)
    asked = count_requests(server)
    assert asked["info"] + asked["summary"] >= count
    assert 0 < asked["many"] < sum(asked.values()) / 3


def count_requests(server) -> Counter[str]:
    """Count what a server was asked for. The requests that make up one are told, too."""
    lines = server.log.read_text().splitlines()
    return Counter(match[1] for line in lines if (match := re.search("endpoint=/([a-z]+)", line)))


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_no_process_asks_what_is_known(launch, tmp_path, direction):
    """A file is looked at when it begins and when it ends, and a target is listed once."""
    for folder in (tmp_path / "source", tmp_path / "target"):
        folder.mkdir()
        for name in "abc":
            (folder / name).touch()
            os.truncate(folder / name, MAX_SMALL + 1)
    server = launch("--access-log=-")
    places = locate(server, direction, tmp_path / "source", tmp_path / "target")
    assert run("-r", *places)["equal"] == 3
    asked = count_requests(server)
    assert asked["info"] == 6
    assert direction == "download" or asked["list"] == 1


def test_orders_do_not_wait_for_workers(server, tmp_path):
    """However many there are, and however long their names: those who carry them out wait for who gives them."""
    folder = tmp_path / "source" / ("long-folder-name-" * 12)
    folder.mkdir(parents=True)
    for number in range(220):
        with (folder / f"{number}-{'long' * 40}").open("wb") as file:
            file.write(b"x%d" % number)
            file.truncate(17 * 2**20 + number)
    report = run("-r", tmp_path / "source", tmp_path / "target")
    assert report["created"] == 220
    name = f"{folder.name}/7-{'long' * 40}"
    assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


@pytest.mark.parametrize("endpoint", ["hashes", "info"])
def test_server_that_has_told_a_list_is_worth_waiting_for(server, tmp_path, endpoint):
    """Whichever process asks next, and whatever it asks."""
    make_tree(tmp_path / "source", a=1, b=2)
    make_tree(tmp_path / "target", a=3, b=2)
    for path in (tmp_path / "source" / "a", tmp_path / "target" / "a"):
        os.truncate(path, 33 * 2**20)
    with RelayProcess(server.port, f"request GET+/{endpoint} 0 reset 4") as relay:
        report = run("-r", "-m", "xxh128", f"127.0.0.1:{relay.port}{tmp_path}/source", tmp_path / "target")
        assert relay.stop()
    assert (report["equal"], report["updated"]) == (1, 1)


@pytest.mark.parametrize("name", ["gone", "gone/"])
def test_missing_folder(tmp_path, place, name):
    """In one line."""
    result = run_pdiffcopy("-r", *place(f"{tmp_path}/{name}", tmp_path / "target"))
    (line,) = error_lines(result)
    assert result.returncode == 1 and "gone doesn't exist" in line
    assert not (tmp_path / "target").exists()


def test_links_that_appear_meanwhile_are_not_followed(tmp_path, monkeypatch, tree):
    """A folder that is exchanged for a link after it was listed leads nowhere."""
    from pdiffcopy.client import many

    target = make_tree(tmp_path / "target", db__b=7)
    (tmp_path / "outside").mkdir()
    make_folders = many.make_folders

    def exchange(selection, servers):
        yield from make_folders(selection, servers)
        os.rename(target / "db", tmp_path / "moved")
        (target / "db").symlink_to("../outside")

    monkeypatch.setattr(many, "make_folders", exchange)
    client = Client(source=str(tree), target=str(target), recursive=True)
    files = {str(file.source).removeprefix(f"{tree}/"): file for file in client.run_files()}
    assert files["db/b"].error and files["db/sub/c"].error
    assert files["a"].report
    assert os.listdir(tmp_path / "outside") == []


def test_folder_of_the_source_that_may_not_be_read_is_a_failure(launch, tmp_path, direction):
    """Like lost+found where a file system begins. The rest goes on, and who doesn't want it leaves it out."""
    source, target = make_tree(tmp_path / "source", a=1, closed__b=2, db__c=3), tmp_path / "target"
    locations = locate(launch(prefix=UNPRIVILEGED), direction, source, target)
    (source / "closed").chmod(0)
    result = run_pdiffcopy("--json", "-r", *locations, prefix=UNPRIVILEGED)
    report = json.loads(result.stdout)
    (error,) = [file["error"] for file in report["files"] if "error" in file]
    assert error.endswith(f"{locations[0]}/closed: Permission denied (--exclude leaves it out)")
    assert (result.returncode, report["created"], report["failed"]) == (1, 2, 1)
    assert sorted(read_tree(target)) == ["a", "db", "db/c"]
    for rules in (["--exclude=closed"], ["--exclude=closed/*", "--include=*"], ["--exclude=x", "--exclude=*d"]):
        result = run_pdiffcopy("-r", *rules, *locations, prefix=UNPRIVILEGED)
        assert result.returncode == 0 and "2 files: 2 equal, 1 skipped." in result.stderr
    # Whether there is anything in it that fits isn't known.
    result = run_pdiffcopy("-r", "--include=*.img", "--exclude=*", *locations, prefix=UNPRIVILEGED)
    assert result.returncode == 1 and "closed: Permission denied" in result.stderr


def test_folder_of_the_target_that_may_not_be_read_costs_what_belongs_there(launch, tmp_path, direction):
    """What is in it isn't known, so nobody can tell what would be written to. If nothing belongs there, that's fine."""
    source = make_tree(tmp_path / "source", a=1, closed__b=2, closed__sub__c=3, db__d=4)
    target = make_tree(tmp_path / "target", closed__e=5)
    locations = locate(launch(prefix=UNPRIVILEGED), direction, source, target)
    (target / "closed").chmod(0)
    result = run_pdiffcopy("--json", "-r", *locations, prefix=UNPRIVILEGED)
    files = json.loads(result.stdout)["files"]
    (error,) = [file["error"] for file in files if "error" in file]
    assert result.returncode == 1 and "/target/closed: Permission denied" in error
    assert [file["outcome"] for file in files if "error" not in file] == ["created", "created"]
    assert os.listdir(target / "closed") == ["e"]
    result = run_pdiffcopy("-r", "--exclude=closed/*", *locations, prefix=UNPRIVILEGED)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("target", ["there", "missing"])
def test_server_that_is_read_only_is_told_once(launch, tmp_path, tree, target):
    """However many files there are."""
    (tmp_path / "there").mkdir()
    location = f"127.0.0.1:{launch('--read-only').port}{tmp_path}/{target}"
    for arguments in (("-r", tree, location), (tree / "a", tree / "db/b", location)):
        result = run_pdiffcopy(*arguments)
        assert result.returncode == 1
        (line,) = [line for line in result.stderr.splitlines() if "read-only" in line]
        assert line.startswith(f"pdiffcopy: The server of http://{location}") and line.endswith(" is read-only")
    assert os.listdir(tmp_path / "there") == []


def test_old_servers_take_files_and_no_folders(launch_old, tmp_path, tree):
    """What needs a listing is refused in one line."""
    peer = launch_old()
    where = f"127.0.0.1:{peer.port}{tmp_path}/target"
    report = run(tree / "a", tree / "db/b", f"{where}/")
    assert report["created"] == 2 and (tmp_path / "target/b").read_bytes() == (tree / "db/b").read_bytes()
    for places in ((tree, where), (f"127.0.0.1:{peer.port}{tree}", tmp_path / "new")):
        result = run_pdiffcopy("-r", *places)
        (line,) = error_lines(result)
        assert result.returncode == 1 and "too old for -r" in line


def test_what_a_server_can_not_do_is_told_once(launch_old, tmp_path, tree):
    """However many files there are."""
    where = f"127.0.0.1:{launch_old().port}{tmp_path}/target/"
    for option, expected in (("--fsync", "too old for --fsync"), ("-mxxh128", "has no hash method xxh128")):
        result = run_pdiffcopy(option, tree / "a", tree / "db/b", where)
        (line,) = [line for line in result.stderr.splitlines() if expected in line]
        assert result.returncode == 1 and line in error_lines(result)


# How it is told {{{1


def test_progress_as_json(tmp_path, place):
    """A line a second on stderr, and one at the end."""
    sources = make_tree(tmp_path / "sources", a=1, b=2)
    result = run_pdiffcopy("-q", "--progress=json", *place(sources / "a", sources / "b", tmp_path / "t"))
    assert result.returncode == 0
    last = json.loads(result.stderr.splitlines()[-1])
    total = 2 * SIZE + 3
    assert (last["bytes"], last["bytes_total"], last["bytes_moved"]) == (total, total, total)
    assert (last["files"], last["files_total"], last["time_left"]) == (2, 2, 0)
    assert last["rate"] > 0 and last["elapsed"] > 0


def test_progress_of_one_file_as_json(tmp_path, place):
    """It has the same members."""
    write_pattern(tmp_path / "a", SIZE)
    for options in (["-n"], []):
        result = run_pdiffcopy("-q", "--progress=json", *options, *place(tmp_path / "a", tmp_path / "b"))
        last = json.loads(result.stderr.splitlines()[-1])
        assert (last["bytes"], last["files"], last["files_total"]) == (SIZE, 1, 1)
    (line,) = error_lines(run_pdiffcopy("--progress=no", tmp_path / "a", tmp_path / "b"))
    assert "--progress takes json" in line


def test_python_gets_a_report_for_each_file(server, tmp_path, tree):
    """As a generator, while it goes on."""
    summary = Summary()
    client = Client(
        source=str(tree), target=server.location(tmp_path / "target"), recursive=True, rules=[(False, "db/*")]
    )
    reports = [file.report.as_dict() for file in client.run_files(summary)]
    assert len(reports) == 3 and all(report["outcome"] == "created" for report in reports)
    assert summary.outcomes["created"] == 3 and summary.skipped == {"excluded": 2}
    assert "3 files: 3 created, 2 skipped" in str(summary)
    assert client.source.filename == str(tree)


def test_benchmark_takes_one_file(tmp_path, tree):
    """It damages its target."""
    for arguments in (("-r", tree, tmp_path / "t"), (tree / "a", tree / "db/b", tmp_path / "t")):
        (line,) = error_lines(run_pdiffcopy("--benchmark=1", *arguments))
        assert "--benchmark" in line


def test_clients_need_something(tmp_path):
    """At least one source and a target."""
    with pytest.raises(UsageError):
        list(Client(target=str(tmp_path)).run_files())
