"""What is in a folder: below a root, while it changes, and whatever is in it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import threading
import tracemalloc
from contextlib import ExitStack, closing, contextmanager

import pytest

from pdiffcopy.entries import MAX_DEPTH, MAX_NAME, Entry, Kind, check_entries
from pdiffcopy.exceptions import FileError, FileForbiddenError, FileNameError, ReplacedError
from pdiffcopy.files import listing
from pdiffcopy.files.confinement import Root
from pdiffcopy.files.identity import identify
from pdiffcopy.files.listing import list_folder
from pdiffcopy.files.names import MACHINE
from tests.support import loop_device, mounted

pytestmark = pytest.mark.usefixtures("no_hang", "no_descriptor_left")

ODD_NAMES = [b"\xff\xfe", "é ü".encode(), b"new\nline", b"a\tb", b" ", b"...", b"%2e%2e", b"x" * 255, b"\\", b"*", b"~"]


@pytest.fixture(params=["machine", "openat2", "walk"])
def namespace(request, tmp_path):
    """What names mean: all of the machine, or what is below a root, resolved in both ways."""
    if request.param == "machine":
        yield MACHINE
        return
    root = Root("/")
    if request.param == "openat2" and root.walks:
        os.close(root.fd)
        pytest.skip("this system has no openat2")
    root.walks = request.param == "walk"
    yield root
    os.close(root.fd)


def tell(folder: os.PathLike | str, depth: int = MAX_DEPTH, namespace=MACHINE) -> dict[str, Kind]:
    """Names and kinds of a listing that is one."""
    entries = list(check_entries(list_folder(os.fspath(folder), namespace, depth), depth))
    return {entry.name: entry.kind for entry in entries}


def test_folder_is_told_level_by_level(tmp_path, namespace):
    """As many levels as were asked for, in the order of the bytes of each component."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("a.b", "a/file", "a/b/c/deep", "z"):
        (tmp_path / name).touch()
    whole = ["", "a", "a/b", "a/b/c", "a/b/c/deep", "a/file", "a.b", "empty", "z"]
    assert list(tell(tmp_path, MAX_DEPTH, namespace)) == whole
    for depth in range(5):
        expected = [name for name in whole if name == "" or name.count("/") < depth]
        assert list(tell(tmp_path, depth, namespace)) == expected


def test_kinds_sizes_and_times(tmp_path, namespace):
    """Links aren't followed, and only a file has a size."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "link to a folder").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name in ("file", "folder"):
        os.utime(tmp_path / name, ns=(0, -1_500_000_000))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        entries = {entry.name: entry for entry in list_folder(str(tmp_path), namespace)}
    assert entries["file"] == ("file", Kind.FILE, 5, -1_500_000_000, "")
    assert entries["folder"][:4] == ("folder", Kind.FOLDER, 0, -1_500_000_000)
    assert {name: entry.kind for name, entry in entries.items() if name not in ("", "file", "folder")} == {
        "link": Kind.LINK, "link to a folder": Kind.LINK, "loop": Kind.LINK, "fifo": Kind.FIFO, "socket": Kind.SOCKET,
    }  # fmt: skip
    assert not any(entry.size for entry in entries.values() if entry.kind is not Kind.FILE)


def test_things_that_several_names_lead_to_have_an_identity(tmp_path, namespace):
    """Folders, since links and mounts lead to them, and files that have more than one name."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    os.link(tmp_path / "b", tmp_path / "c")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    ids = {entry.name: entry.file_id for entry in list_folder(str(tmp_path), namespace)}
    assert ids["a"] == ids["link"] == ""
    for name in ("", "b", "c", "folder"):
        assert ids[name] == identify((tmp_path / name).stat())
    assert ids["b"] == ids["c"] and len({ids[""], ids["b"], ids["folder"]}) == 3
    assert next(list_folder(f"{tmp_path}/link", namespace)).file_id == ids["folder"]


def test_thing_itself(tmp_path, namespace):
    """A name leads to a file, a folder, something else or nothing; links in it are followed, as by any open."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "to file").symlink_to("file")
    (tmp_path / "to folder").symlink_to(".")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (
        ("file", Kind.FILE), ("to file", Kind.FILE), ("to folder", Kind.FOLDER), ("dangling", Kind.MISSING),
        ("missing", Kind.MISSING), ("file/x", Kind.MISSING), ("fifo", Kind.FIFO), ("to folder/file", Kind.FILE),
    ):  # fmt: skip
        assert tell(tmp_path / name, 0, namespace) == {"": kind}, name
        if kind is not Kind.FOLDER:
            assert tell(tmp_path / name, MAX_DEPTH, namespace) == {"": kind}, name
    assert next(list_folder(f"{tmp_path}/to file")) == ("", Kind.FILE, 5, (tmp_path / "file").stat().st_mtime_ns, "")
    assert list(tell(tmp_path / "to folder", 1, namespace)) == ["", *sorted(os.listdir(tmp_path))]
    assert tell("/dev/null", 0, namespace) == {"": Kind.DEVICE}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileForbiddenError, match="symbolic links"):
        tell(tmp_path / "loop", 0, namespace)


def test_device_is_told(tmp_path):
    """A block device may be a source, which whoever lists it has to know."""
    (tmp_path / "image").write_bytes(bytes(65536))
    with loop_device(tmp_path / "image") as name:
        assert tell(name) == {"": Kind.DEVICE}


def test_names_are_bytes(tmp_path, namespace):
    """Whatever Linux allows is told, and in the order of the bytes."""
    for name in ODD_NAMES:
        os.makedirs(os.path.join(os.fsencode(tmp_path), name, name))
    names = sorted(os.fsdecode(b"/".join(parts)) for name in ODD_NAMES for parts in ((name,), (name, name)))
    told = tell(tmp_path, MAX_DEPTH, namespace)
    assert sorted(told) == ["", *names]
    assert [os.fsencode(name).split(b"/") for name in told][1:] == sorted(os.fsencode(n).split(b"/") for n in names)


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_folder_is_read_in_parts(tmp_path, monkeypatch, most):
    """However few names are in memory at a time, all are told."""
    monkeypatch.setattr(listing, "MOST_NAMES", most)
    monkeypatch.setattr(listing, "LEAST_NAMES", 1)
    numbers = list(range(8))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        (tmp_path / str(number)).mkdir()
        for inner in numbers[: number + 1]:
            (tmp_path / str(number) / f"file{inner}").touch()
    everything = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert list(tell(tmp_path)) == ["", *everything]


def test_many_names_take_bounded_memory(tmp_path):
    """20,000 of them take as much as a few do."""
    peaks = []
    for count in (2000, 20_000):
        for number in range(count):
            (tmp_path / f"{number:0100d}").touch()
        tracemalloc.start()
        try:
            assert sum(1 for _ in list_folder(str(tmp_path))) == count + 1
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] < 4_000_000


def test_slashes_are_no_part_of_a_name(tmp_path, namespace):
    """Neither at the end, nor where there's nothing else."""
    (tmp_path / "file").touch()
    assert list(tell(f"{tmp_path}//", MAX_DEPTH, namespace)) == ["", "file"]
    assert tell("/", 1, namespace)["proc"] is Kind.OTHER


# What can't be told {{{1


@contextmanager
def being_nobody():
    """For a while, this process is a user who owns nothing."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_looked_at_is_told(tmp_path):
    """A part of a list would look like all of it otherwise. If it's what was asked about, that's an error."""
    for name, mode in (("a", 0o755), ("b", 0o000), ("c", 0o711), ("d", 0o744)):
        (tmp_path / name).mkdir(mode)
    (tmp_path / "d/file").touch()
    tmp_path.chmod(0o755)
    root = Root(str(tmp_path))  # which nobody could get to by its name
    with ExitStack() as stack:
        stack.callback(os.close, root.fd)
        stack.enter_context(being_nobody())
        assert list(tell("/", 1, root)) == ["", "a", "b", "c", "d"]
        folder, unreadable = Kind.FOLDER, Kind.UNREADABLE
        expected = {"": folder, "a": folder, "b": unreadable, "c": unreadable, "d": folder, "d/file": unreadable}
        assert tell("/", MAX_DEPTH, root) == expected
        assert tell("/d", MAX_DEPTH, root) == {"": folder, "file": unreadable}
        for name in ("b", "c"):
            with pytest.raises(FileForbiddenError, match=f"^Can't list /{name}: Permission denied$"):
                tell(f"/{name}", MAX_DEPTH, root)
            assert tell(f"/{name}", 0, root) == {"": folder}


def test_too_many_levels_are_an_error(tmp_path):
    """Who asks for all there are doesn't get less. Who asks for fewer levels gets those."""
    os.makedirs(tmp_path.joinpath(*["d"] * (MAX_DEPTH - 1)))
    assert len(tell(tmp_path)) == MAX_DEPTH
    tmp_path.joinpath(*["d"] * (MAX_DEPTH - 1), "file").touch()
    assert len(tell(tmp_path)) == MAX_DEPTH + 1
    tmp_path.joinpath(*["d"] * MAX_DEPTH).mkdir()
    with pytest.raises(FileError, match=f"more than {MAX_DEPTH} folders"):
        tell(tmp_path)
    assert len(tell(tmp_path, MAX_DEPTH - 1)) == MAX_DEPTH
    assert len(tell(tmp_path / "d")) == MAX_DEPTH + 1


def test_names_that_are_too_long_are_an_error(tmp_path):
    """Nobody could open a file of that name afterwards."""
    name = "x" * 255
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(MAX_NAME // 256 + 2):
            os.mkdir(name)
            os.chdir(name)
        assert len(tell(tmp_path, MAX_NAME // 256 + 1)) == MAX_NAME // 256 + 2
        with pytest.raises(FileNameError, match="too long"):
            tell(tmp_path)
    finally:
        os.chdir(before)
        shutil.rmtree(tmp_path / name)


def test_pinned_listing(tmp_path, namespace):
    """What is to be listed may be named by its identity, too."""
    identity = identify(os.stat(tmp_path))
    assert [entry.kind for entry in list_folder(str(tmp_path), namespace, 1, identity)] == [Kind.FOLDER]
    for name in (tmp_path.parent, tmp_path / "missing"):
        with pytest.raises(ReplacedError):
            next(list_folder(str(name), namespace, 1, identity))


def test_disk_that_can_not_be_read_is_an_error(tmp_path, monkeypatch):
    """The folder is named."""
    (tmp_path / "folder").mkdir()

    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    entries = list_folder(str(tmp_path), depth=2)
    assert [next(entries).name for _ in range(2)] == ["", "folder"]
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(FileError, match=f"^Can't list {tmp_path}/folder: Input/output error$"):
        next(entries)
    monkeypatch.undo()
    monkeypatch.setattr(listing, "get_file_system", fail)
    with pytest.raises(FileError, match=f"^Can't list {tmp_path}: Input/output error$"):
        next(list_folder(str(tmp_path), depth=2))


# Other file systems {{{1


def test_mount_points_are_entered(tmp_path):
    """As `cp -r` does."""
    with mounted(tmp_path / "mount", "tmpfs") as folder:
        (folder / "file").touch()
        assert list(tell(tmp_path)) == ["", "mount", "mount/file"]


def test_parts_of_the_kernel_are_neither_files_nor_folders(tmp_path, namespace):
    """They can't be read as files either. No list goes on there."""
    for name in ("/proc", "/proc/version", "/sys", "/proc/self/fd"):
        assert tell(name, MAX_DEPTH, namespace) == {"": Kind.OTHER}
    assert tell("/", 1, namespace)["proc"] is Kind.OTHER
    with mounted(tmp_path / "kernel", "bpf") as folder:
        (folder / "x").mkdir()
        assert tell(tmp_path, MAX_DEPTH, namespace) == {"": Kind.FOLDER, "kernel": Kind.OTHER}


# What changes meanwhile {{{1


def test_what_disappears_is_left_out(tmp_path):
    """Whether it has been told already or not, and also while the list is in it."""
    for name in ("a", "b/c", "d/e", "f"):
        (tmp_path / name).mkdir(parents=True)
    entries = list_folder(str(tmp_path), depth=MAX_DEPTH)
    assert [next(entries).name for _ in range(3)] == ["", "a", "b"]
    for name in ("a", "b", "d"):
        shutil.rmtree(tmp_path / name)
    assert [entry.name for entry in entries] == ["f"]


def test_what_is_exchanged_is_told_as_what_it_is(tmp_path, monkeypatch):
    """A folder that becomes a link before it is entered is a link, and a link that becomes a folder may be either."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    (outside / "secret").mkdir(parents=True)
    (inside / "folder" / "x").mkdir(parents=True)
    other = tmp_path / "other"
    other.symlink_to(outside)
    exchanges = iter([True, False, True])

    class Exchanging(listing._Thing):
        def _examine(self):
            super()._examine()
            if self.entry.name == "folder" and next(exchanges, False):
                (inside / "folder").rename(tmp_path / "third")
                other.rename(inside / "folder")
                (tmp_path / "third").rename(other)

    monkeypatch.setattr(listing, "_Thing", Exchanging)
    for _ in range(2):
        assert tell(inside) == {"": Kind.FOLDER, "folder": Kind.LINK}
    assert tell(inside) == {"": Kind.FOLDER, "folder": Kind.FOLDER, "folder/x": Kind.FOLDER}


def test_folder_that_is_renamed_is_listed_to_its_end(tmp_path):
    """It's the one that was entered that is told, wherever it is by then, and none that has taken its name."""
    for name in ("inside/folder/a", "inside/folder/b/c", "outside/a", "outside/b/secret"):
        (tmp_path / name).mkdir(parents=True)
    entries = list_folder(str(tmp_path / "inside"), depth=MAX_DEPTH)
    assert [next(entries).name for _ in range(3)] == ["", "folder", "folder/a"]
    (tmp_path / "inside/folder").rename(tmp_path / "moved")
    (tmp_path / "inside/folder").symlink_to("../outside")
    assert [entry.name for entry in entries] == ["folder/b", "folder/b/c"]


def test_changing_folder_is_told_in_order(tmp_path):
    """Others may create, rename and remove what they like: nothing comes twice, and what stays is told."""
    for number in range(300):
        (tmp_path / f"stays{number}").touch()
    done = threading.Event()

    def change():
        number = 0
        while not done.is_set():
            number += 1
            (tmp_path / f"a{number % 97}").touch()
            os.replace(tmp_path / f"a{number % 97}", tmp_path / f"z{number % 89}")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            told = tell(tmp_path)
            assert sum(name.startswith("stays") for name in told) == 300
    finally:
        done.set()
        thread.join()


def test_listing_that_is_not_read_to_its_end_closes_everything(tmp_path):
    """Wherever that is (the fixture looks at the descriptors)."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    for count in range(5):
        with closing(list_folder(str(tmp_path), depth=MAX_DEPTH)) as entries:
            assert [next(entries).kind for _ in range(min(count, 4))] == [Kind.FOLDER] * min(count, 4)


def test_descriptors_are_one_a_level(tmp_path):
    """And not one for each folder."""
    for number in range(50):
        (tmp_path / f"{number:02}" / "x").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    most = max(len(os.listdir("/proc/self/fd")) for _ in list_folder(str(tmp_path), depth=MAX_DEPTH))
    assert most == before + 3


def test_entry_of_a_missing_thing():
    """It has nothing but its kind."""
    assert list(list_folder("/nowhere/at/all")) == [Entry("", Kind.MISSING)]
