"""What a path means inside a root directory: the same for the system call of the kernel and for the walk."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import requests

from pdiffcopy.blocks import Extent
from pdiffcopy.exceptions import FileError, FileForbiddenError, FileMissingError
from pdiffcopy.files import confinement
from pdiffcopy.files.confinement import Root, Within
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.names import MACHINE, Namespace
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading

READ = os.O_RDONLY | os.O_CLOEXEC
LOOK = os.O_PATH | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

pytestmark = pytest.mark.usefixtures("no_hang")


@pytest.fixture
def tree(tmp_path):
    """A root directory, with all sorts of ways out of it, and what lies outside."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "top").write_text("top")
    (root / "a/file").write_text("a file")
    (root / "a/b/deep").write_text("deep")
    (root / "secret").write_text("inside")  # where "../secret" leads to

    links = {
        "file": "a/file", "a/up": "../top", "a/absolute": "/top", "folder": "a", "a/b/chain": "../../one", "one": "two",
        "two": "/a/b/deep", "dangling": "nowhere", "loop": "loop", "ping": "pong", "pong": "ping", "self": ".",
        "out": "../secret", "far out": "../../../../../../../../secret", "absolute out": str(tmp_path / "secret"),
        "folder out": "../outside", "absolute folder out": str(tmp_path / "outside"), "parent": "..",
        "procfs": "/proc/self/root", "slash": "/", "trailing": "a/", "dangling out": str(tmp_path / "new"),
        "dangling up": "../new",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture(params=["openat2", "walk"])
def root(request, tree):
    """The root directory, resolved in both ways."""
    before = set(os.listdir("/proc/self/fd"))
    root = Root(str(tree))
    if request.param == "openat2" and root.walks:
        os.close(root.fd)
        pytest.skip("this system has no openat2")
    root.walks = request.param == "walk"
    yield root
    os.close(root.fd)
    # Whatever happened: no descriptor is left open.
    assert set(os.listdir("/proc/self/fd")) <= before


def read(root, filename):
    with LocalFile(filename, namespace=root) as file:
        return os.read(file.fd, 100).decode()


def test_folder_with_a_longer_name_is_another_one(tmp_path):
    """What lies in it isn't looked for in the folder whose name its own begins with."""
    for name in ("a", "ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "b" / "file").write_text("in a")
    assert read(Within(MACHINE, f"{tmp_path}/a"), f"{tmp_path}/ab/file") == "ab"
    assert read(Within(MACHINE, f"{tmp_path}/a"), f"{tmp_path}/a/b/file") == "in a"


@pytest.mark.parametrize(
    "filename, contents",
    [
        ("/top", "top"),
        ("top", "top"),
        ("//top", "top"),
        ("/./top", "top"),
        ("/a/file", "a file"),
        ("/a//./b/../file", "a file"),
        ("/a/b/deep", "deep"),
        ("/file", "a file"),
        ("/a/up", "top"),
        ("/a/absolute", "top"),
        ("/folder/file", "a file"),
        ("/folder/b/../up", "top"),
        ("/folder/../top", "top"),
        ("/a/b/chain", "deep"),
        ("/self/self/self/top", "top"),
        ("/slash/slash/a/file", "a file"),
        ("/trailing/file", "a file"),
        ("/../top", "top"),
        ("/../../../../top", "top"),
        ("/a/../../top", "top"),
        ("/../secret", "inside"),
        ("/a/../../secret", "inside"),
        ("/out", "inside"),
        ("/far out", "inside"),
        ("/parent/secret", "inside"),
        ("/parent/parent/parent/secret", "inside"),
        ("/slash/../secret", "inside"),
    ],
)
def test_paths_lead_to_files_inside(root, filename, contents):
    """A leading slash, dots and links are taken as if the directory were the root of everything."""
    assert read(root, filename) == contents


@pytest.mark.parametrize(
    "filename",
    [
        "/missing", "/missing/file", "/top/file", "/a/missing", "/dangling", "/absolute out", "/folder out/secret",
        "/absolute folder out/secret", "/../outside/secret", "/parent/outside/secret", "/folder out/../../secret/x",
        "/dangling out", "/outside/secret", "/etc/passwd", "/../../../../../../../../etc/passwd", "/proc/self/environ",
        "/procfs/secret", "/procfs/top",
    ],
)  # fmt: skip
def test_nothing_outside_exists(root, filename):
    """What isn't inside isn't there, whether it exists outside or not."""
    with pytest.raises(FileMissingError):
        read(root, filename)


@pytest.mark.parametrize("existing", ["secret", "not there"])
def test_errors_tell_nothing_of_the_outside(root, tree, existing):
    """The error for a link to something outside is the same, whether that exists or not."""
    (tree / "probe").symlink_to(tree.parent / existing)
    with pytest.raises(FileMissingError, match="^Can't open /probe: No such file or directory$"):
        read(root, "/probe")


@pytest.mark.parametrize("filename", ["/loop", "/ping", "/loop/file", "/a/../pong/x"])
def test_loops_end(root, filename):
    """Links that lead to themselves lead nowhere."""
    with pytest.raises(FileForbiddenError, match="symbolic links"):
        read(root, filename)


@pytest.mark.parametrize("length, works", [(40, True), (41, False)])
def test_chains_of_links_have_a_limit(root, tree, length, works):
    """As many links as the kernel follows are followed, and not more."""
    for number in range(1, length):
        (tree / f"chain{number}").symlink_to(f"chain{number + 1}")
    (tree / f"chain{length}").symlink_to("top")
    if works:
        assert read(root, "/chain1") == "top"
    else:
        with pytest.raises(FileForbiddenError, match="symbolic links"):
            read(root, "/chain1")


@pytest.mark.parametrize("filename", ["/", "/a", "/folder", "/fifo", "/self", "/..", "/parent"])
@pytest.mark.parametrize("write", [False, True])
def test_other_things_than_files_are_refused(root, filename, write):
    """Folders and FIFOs are refused without waiting for anybody."""
    with pytest.raises(FileForbiddenError, match="neither a regular file nor a block device"):
        LocalFile(filename, write=write, namespace=root)


@pytest.mark.parametrize("name", [b"\xff\xfe", "é ü".encode(), b"new\nline", b" ", b"...", b"%2e%2e", b"x" * 255])
def test_names_are_bytes(root, tree, name):
    """Every name that Linux allows is found and can be created."""
    name = os.fsdecode(name)
    LocalReplica(f"/{name}/{name}", root).resize(3)
    assert (tree / name / name).read_bytes() == bytes(3)
    assert read(root, f"/{name}/{name}") == "\0\0\0"


def test_nul_bytes_cut_nothing_off(root):
    """A name with a NUL byte isn't taken for what stands before it."""
    with pytest.raises(ValueError, match="null"):
        root.open("/top\0.jpg", READ)


def test_deep_paths(root, tree):
    """Many folders are no obstacle, neither to create them nor to go through them (nor back)."""
    path = "/d" * 100
    LocalReplica(f"{path}/file", root).resize(1)
    assert read(root, f"{path}/file") == "\0"
    assert read(root, path + "/.." * 100 + "/top") == "top"
    assert read(root, path + "/.." * 300 + "/secret") == "inside"


def test_renames_all_the_time_stop_nobody(tree, monkeypatch):
    """The kernel refuses to follow ``..`` then, so that is done step by step."""
    root = Root(str(tree))
    root.walks = False

    def refuse(folder, path, *arguments):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)

    monkeypatch.setattr(confinement, "_openat2", refuse)
    assert read(root, "/a/../top") == "top"
    assert read(root, "/a/../../secret") == "inside"
    with pytest.raises(FileMissingError):
        read(root, "/a/../missing")
    os.close(root.fd)


# Creating {{{1


@pytest.mark.parametrize(
    "filename, where",
    [
        ("/new", "new"),
        ("new", "new"),
        ("/a/new", "a/new"),
        ("/folder/new", "a/new"),
        ("/trailing/b/new", "a/b/new"),
        ("/x/y/z/new", "x/y/z/new"),
        ("/x//y/./new", "x/y/new"),
        ("/folder/x/new", "a/x/new"),
        ("/../../new", "new"),
        ("/../x/new", "x/new"),
        ("/parent/x/new", "x/new"),
        ("/slash/a/new", "a/new"),
    ],
)
def test_files_are_created_inside(root, tree, filename, where):
    """A file and its missing folders appear inside, whatever the path looks like."""
    outside = sorted(os.listdir(tree.parent))
    umask = os.umask(0o027)
    try:
        LocalReplica(filename, root).resize(7)
    finally:
        os.umask(umask)
    assert (tree / where).read_bytes() == bytes(7)
    assert stat.S_IMODE((tree / where).stat().st_mode) == 0o640
    assert sorted(os.listdir(tree.parent)) == outside


@pytest.mark.parametrize(
    "filename",
    ["/dangling", "/dangling out", "/dangling up", "/folder out/new", "/absolute folder out/x/new", "/dangling/x/y"],
)
def test_nothing_is_created_through_dangling_links(root, tree, filename):
    """A link to nothing is an error: nothing appears inside, and above all not outside."""
    before = sorted(str(path) for path in tree.parent.rglob("*"))
    with pytest.raises(FileMissingError):
        LocalReplica(filename, root).resize(7)
    assert sorted(str(path) for path in tree.parent.rglob("*")) == before


@pytest.mark.parametrize("filename", ["/top", "/file", "/a/absolute", "/out", "/folder/../top"])
def test_existing_files_are_resized_through_links(root, tree, filename):
    """An existing file is cut, the link to it stays."""
    LocalReplica(filename, root).resize(1)
    assert read(root, filename) == {"/file": "a", "/out": "i"}.get(filename, "t")
    assert (tree.parent / "secret").read_text() == "secret"
    assert (tree / "file").is_symlink()


@pytest.mark.parametrize("filename", ["/", "/a", "/..", "/folder", "/fifo", "/a/.."])
def test_what_is_no_file_is_not_created_over(root, tree, filename):
    """Creating where something else is changes nothing."""
    before = sorted(os.listdir(tree))
    with pytest.raises(FileForbiddenError):
        LocalReplica(filename, root).resize(1)
    assert sorted(os.listdir(tree)) == before


@pytest.mark.parametrize("filename", ["/top/new", "/top/x/new", "/file/new"])
def test_nothing_is_created_below_a_file(root, filename):
    """A file is no folder."""
    with pytest.raises(FileError, match="Can't create"):
        LocalReplica(filename, root).resize(1)


@pytest.mark.parametrize("filename", ["/top", "/a", "/", "/..", "/dangling", "/dangling out", "/loop", "/fifo"])
def test_exclusive_creation_fails_for_whatever_exists(root, filename):
    """O_EXCL means it: a link counts as existing, wherever it leads."""
    with pytest.raises(FileExistsError):
        root.open(filename, CREATE, 0o666)


def test_folders_are_made_inside(root, tree):
    """A folder is made where the path leads to, not where a link of its name does."""
    for name, where in [("/new", "new"), ("/folder/new", "a/new"), ("/../other/", "other"), ("/parent/third", "third")]:
        root.make_folder(name)
        assert (tree / where).is_dir()
        assert not (tree.parent / where).exists()


@pytest.mark.parametrize("name", ["/", "/a", "/top", "/folder", "/dangling", "/dangling out", "/..", "/a/.", "/a/b/.."])
def test_folders_are_not_made_twice(root, tree, name):
    """Whatever is there already is an error that the caller knows what to do with."""
    with pytest.raises(FileExistsError):
        root.make_folder(name)
    assert not (tree.parent / "new").exists()


def test_folders_below_nothing_are_not_made(root):
    """The parent has to be there, inside."""
    for name in ["/missing/new", "/absolute folder out/new", "/folder out/new"]:
        with pytest.raises(FileNotFoundError):
            root.make_folder(name)


# The rest {{{1


def test_opening_a_folder(root):
    """A folder can be looked at and be flushed; a file isn't taken for one."""
    for flags in (LOOK | os.O_DIRECTORY, READ | os.O_DIRECTORY):
        fd = root.open("/folder", flags)
        try:
            assert sorted(os.listdir(f"/proc/self/fd/{fd}")) == ["absolute", "b", "file", "up"]
        finally:
            os.close(fd)
        with pytest.raises(NotADirectoryError):
            root.open("/top", flags)
    LocalReplica("/folder/file", root).sync()
    LocalReplica("/top", root).sync()


@pytest.mark.parametrize("flags", [READ, LOOK, READ | os.O_DIRECTORY])
def test_descriptors_are_not_inherited(root, flags):
    """No descriptor gets into a child process."""
    fd = root.open("/a" if flags & os.O_DIRECTORY else "/a/file", flags)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_root_follows_its_directory(root, tree):
    """The directory is what was opened at the start, even if it's renamed and another one takes its name."""
    tree.rename(tree.parent / "moved")
    tree.mkdir()
    (tree / "top").write_text("impostor")
    assert read(root, "/top") == "top"


def test_both_ways_agree(root, tree):
    """All paths of up to three of these components mean the same to the kernel and to the walk."""
    other = Root(str(tree))
    if other.walks:
        os.close(other.fd)
        pytest.skip("this system has no openat2")
    names = ["a", "b", "..", ".", "", "folder", "self", "slash", "parent", "one", "out", "absolute", "chain", "loop"]
    names += ["file", "trailing", "top", "procfs", "dangling"]
    paths = [f"/{x}/{y}/{z}" for x in names for y in names for z in names]

    def resolve(namespace, path):
        try:
            fd = namespace.open(path, LOOK)
        except OSError as e:
            return type(e), e.errno
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    try:
        assert [path for path in paths if resolve(root, path) != resolve(other, path)] == []
    finally:
        os.close(other.fd)


def test_root_has_to_be_a_directory(tmp_path):
    """A root that isn't there, or isn't a directory, is an error that says so."""
    (tmp_path / "file").touch()
    with pytest.raises(FileMissingError, match="Can't open the root directory .*missing"):
        Root(str(tmp_path / "missing"))
    with pytest.raises(FileError, match="Not a directory"):
        Root(str(tmp_path / "file"))


# Within a folder {{{1


@pytest.fixture(params=["openat2", "walk"])
def within(request, tmp_path, monkeypatch):
    """A namespace that follows no link below a folder, which is named by a link itself."""
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder" / "sub" / "file").write_bytes(b"harmless")
    if request.param == "walk":
        monkeypatch.setattr(confinement, "_has_openat2", lambda folder: False)
    elif not confinement._has_openat2(os.open(tmp_path, os.O_PATH)):
        pytest.skip("there is no openat2 here")
    return Within(Namespace(), f"{tmp_path}/link")


@pytest.mark.parametrize("target", ["../outside", "/outside", "sub", ".."])
def test_no_link_is_followed_within_a_folder(within, tmp_path, target):
    """Neither in the middle of a name nor at its end, to whatever it leads."""
    folder = within.folder
    os.close(within.open(f"{folder}/sub/file", os.O_RDONLY))
    os.symlink(f"{tmp_path}{target}" if target.startswith("/") else target, tmp_path / "folder" / "trap")
    os.symlink("../outside/secret", tmp_path / "folder" / "leaf")
    for name in ("trap/secret", "trap/file", "trap/new", "leaf", "trap/../../outside/secret", "../outside/secret"):
        replica = LocalReplica(f"{folder}/{name}", within)
        for action in (
            lambda replica=replica: replica.claim("abc", create=True),
            lambda replica=replica: replica.write([Extent(0, 4)], Reading([b"evil"])),
            lambda replica=replica: replica.resize(3),
            lambda replica=replica: replica.stage("abc"),
        ):
            with pytest.raises(FileError):
                action()
    assert sorted(os.listdir(tmp_path / "outside")) == ["secret"]
    assert (tmp_path / "outside" / "secret").read_bytes() == b"secret"
    assert (tmp_path / "folder" / "sub" / "file").read_bytes() == b"harmless"


def test_link_within_a_folder_is_not_even_looked_at(within, tmp_path):
    """To open a name without reading what it leads to may open the link itself, where nobody forbids it."""
    (tmp_path / "folder" / "leaf").symlink_to("sub/file")
    with pytest.raises(OSError) as info:
        within.open(f"{within.folder}/leaf", LOOK)
    assert info.value.errno == errno.ELOOP


def test_folders_and_files_are_made_within_a_folder(within, tmp_path):
    """And the folder itself, where it's missing."""
    LocalReplica(f"{within.folder}/a/b/c", within).resize(7)
    assert (tmp_path / "folder" / "a" / "b" / "c").stat().st_size == 7
    missing = Within(Namespace(), f"{tmp_path}/new/folder/")
    LocalReplica(f"{tmp_path}/new/folder/x/y", missing).resize(5)
    assert (tmp_path / "new" / "folder" / "x" / "y").stat().st_size == 5


def test_servers_follow_no_link_within_a_folder(server, tmp_path):
    """Where a request says so. It may do without, as ever."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to("../file")
    (tmp_path / "file").write_bytes(b"contents")
    url, name = f"http://127.0.0.1:{server.port}/info", f"{tmp_path}/folder/link"
    assert requests.get(url, params={"filename": name}).status_code == 200
    assert requests.get(url, params={"filename": name, "within": f"{tmp_path}/folder"}).status_code == 403
