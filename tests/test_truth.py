"""
Can exit code 0 lie?

Each test plays a sequence that once ended with success and a target that differs from the source (docs/design.rst has
the list): the run has to notice, or to end right.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from pdiffcopy.client import Client
from pdiffcopy.client import job as client_job
from pdiffcopy.exceptions import FileError, ReplacedError, SourceChangedError, TakenOverError
from pdiffcopy.files import kernel
from pdiffcopy.files.claims import RUN_ATTRIBUTE
from pdiffcopy.files.identity import LONG_TICK, SHORT_TICK, get_settling_time
from pdiffcopy.files.localfile import LocalFile
from tests.relay import RelayProcess
from tests.support import (
    RUN_TIMEOUT,
    Server,
    can_connect,
    error_lines,
    ext4,
    find_free_port,
    make_data,
    mounted,
    run_pdiffcopy,
    start_server_of_boot,
    wait_for,
    write_pattern,
)

BLOCK = 4096
SIZE = 64 * BLOCK
DIRECTIONS = ("upload", "download")
FIRST_LOOK = "response GET+/info 0 hold"


class Run:
    """A run between two local names, one of them behind a relay that holds it at certain moments."""

    def __init__(self, server: Server, direction: str, source: Path, target: Path, *moments: str):
        self.relay = RelayProcess(server.port, *moments)
        there = source if direction == "download" else target
        places = [self.relay.location(path) if path is there else str(path) for path in (source, target)]
        self.command = [sys.executable, "-m", "pdiffcopy", "-b", str(BLOCK), "-c", "1", "--json", *places]

    def __enter__(self) -> Run:
        self.relay.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.relay.__exit__()

    def start(self, *options: str) -> Run:
        self.process = subprocess.Popen([*self.command, *options], stdout=-1, stderr=-1, text=True)
        return self

    def finish(self) -> subprocess.CompletedProcess:
        stdout, stderr = self.process.communicate(timeout=RUN_TIMEOUT)
        return subprocess.CompletedProcess([], self.process.returncode, stdout, stderr)


def make_pair(folder: Path, changed: int = 40) -> tuple[Path, Path]:
    """A source, and a target that differs in one block."""
    data = bytearray(write_pattern(folder / "source", SIZE))
    data[changed * BLOCK] ^= 1
    (folder / "target").write_bytes(data)
    return folder / "source", folder / "target"


def settle(*paths: Path) -> None:
    """Wait until another change of these files would bear another time."""
    wait_for(lambda: not any(map(get_settling, paths)), what="the next tick")


def get_settling(path: Path) -> int:
    status = path.stat()
    return get_settling_time(status.st_mtime_ns, status.st_ctime_ns, time.time_ns())


@contextmanager
def elsewhere(link: Path, path: Path):
    """Let a link lead elsewhere for a while."""
    original = os.readlink(link)
    for target in (path, original):
        (link.parent / "new").symlink_to(target)
        os.replace(link.parent / "new", link)
        if target is path:
            yield


# A name isn't a file {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_source_whose_name_leads_elsewhere_for_a_while_has_changed(server, tmp_path, direction):
    """A link that is flipped and flipped back: the first and the last look see the same file."""
    source, target = make_pair(tmp_path)
    write_pattern(tmp_path / "other", SIZE, seed=5)
    link = tmp_path / "link"
    link.symlink_to(source)
    last_look = "response GET+/info 0 hold 1 1" if direction == "download" else "request POST+/release 0 hold"
    with Run(server, direction, link, target, FIRST_LOOK, last_look) as run:
        run.start()
        run.relay.wait_for_hit()
        with elsewhere(link, tmp_path / "other"):
            run.relay.release()
            with suppress(subprocess.TimeoutExpired):  # it would go on until it is held again
                run.process.wait(5)
        run.relay.release()
        result = run.finish()
    assert result.returncode == 3, result.stderr
    assert "changed while it was copied (its identity)" in error_lines(result)[0]


@pytest.mark.parametrize("whole", [False, True])
def test_local_source_whose_name_leads_elsewhere_has_changed(tmp_path, monkeypatch, whole):
    """From local to local, too: in the generator process and in the workers."""
    source, target = make_pair(tmp_path)
    write_pattern(tmp_path / "other", SIZE, seed=5)
    link = tmp_path / "link"
    link.symlink_to(source)

    original = client_job.Job.look

    def look(self, writes):
        original(self, writes)
        stack.enter_context(elsewhere(link, tmp_path / "other"))

    monkeypatch.setattr(client_job.Job, "look", look)
    before = target.read_bytes()
    with ExitStack() as stack, pytest.raises(SourceChangedError, match="its identity"):
        Client(source=str(link), target=str(target), block_size=BLOCK, delta_transfer=not whole).run()
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("direction", "moment"),
    [("upload", FIRST_LOOK), ("upload", "response POST+/claim 0 hold"), ("download", "response GET+/blocks 0 hold")],
    ids=["upload before the claim", "upload", "download"],
)
def test_target_whose_name_leads_elsewhere_is_not_written_to(server, tmp_path, direction, moment):
    """The other file isn't touched, and the run fails."""
    source, target = make_pair(tmp_path)
    other = tmp_path / "other"
    untouched = write_pattern(other, SIZE, seed=5)
    link = tmp_path / "link"
    link.symlink_to(target)
    with Run(server, direction, source, link, moment) as run:
        run.start()
        run.relay.wait_for_hit()
        with elsewhere(link, other):
            run.relay.release()
            result = run.finish()
    assert result.returncode == 1, result.stderr
    assert "replaced" in error_lines(result)[0]
    assert other.read_bytes() == untouched
    assert os.listxattr(other) == []


def test_file_that_is_not_the_one_is_not_opened(tmp_path):
    """Neither for reading nor for writing, and an exchanged file is another file, whatever its name."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with LocalFile(str(tmp_path / "a")) as file:
        file_id = file.info().file_id
    os.rename(tmp_path / "a", tmp_path / "c")
    os.rename(tmp_path / "b", tmp_path / "a")
    for write in (False, True):
        with pytest.raises(ReplacedError, match="replaced"):
            LocalFile(str(tmp_path / "a"), write, file_id=file_id)
        LocalFile(str(tmp_path / "c"), write, file_id=file_id).close()


# A time isn't a proof {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_time_that_was_set_back_is_noticed(server, tmp_path, direction):
    """As touch -r, cp -p and restore tools do: the time of the inode can't be set."""
    source, target = make_pair(tmp_path)
    settle(source)
    times = source.stat()
    with Run(server, direction, source, target, get_transfer(direction)) as run:
        run.start()
        run.relay.wait_for_hit()
        overwrite(source, 3)
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        run.relay.release()
        result = run.finish()
    assert result.returncode == 3, result.stderr
    assert "(its time)" in error_lines(result)[0]


def get_transfer(direction: str) -> str:
    """When all was compared, and the first block is about to be moved."""
    return "request POST+/blocks 0 hold" if direction == "upload" else "response GET+/blocks 0 hold"


def overwrite(path: Path, block: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(block * BLOCK)
        handle.write(b"newer")


def test_change_within_the_tick_of_a_coarse_clock_is_noticed(server, tmp_path):
    """With small inodes ext4 counts seconds: what was written just before the run has to be a second old."""
    with ext4(tmp_path / "image", tmp_path / "disk", "-I", "128") as disk:
        source, target = make_pair(disk)
        with Run(server, "upload", source, target, get_transfer("upload")) as run:
            time.sleep(1.02 - time.time() % 1)  # the clock that files are stamped by lags behind
            overwrite(source, 3)
            overwrite(target, 3)
            run.start()
            run.relay.wait_for_hit()
            overwrite(source, 5)
            run.relay.release()
            result = run.finish()
    assert result.returncode == 3, result.stderr


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("mtime", "ctime", "now", "expected"),
    [
        (5 * SECOND, 5 * SECOND, 5 * SECOND, LONG_TICK),
        (5 * SECOND, 5 * SECOND, 6 * SECOND, SECOND),
        (5 * SECOND, 5 * SECOND, 7 * SECOND, 0),
        (5 * SECOND, 5 * SECOND, 4 * SECOND, LONG_TICK),  # the clock of a file server may be ahead a little
        (5 * SECOND, 5 * SECOND, 2 * SECOND, 0),
        (5 * SECOND, 5 * SECOND + 1, 5 * SECOND + 1, SHORT_TICK),
        (5 * SECOND, 5 * SECOND + 1, 6 * SECOND, 0),
        (99 * SECOND + 1, 5 * SECOND + 1, 6 * SECOND, 0),
        (-5 * SECOND, 5 * SECOND, 6 * SECOND, SECOND),
    ],
)
def test_time_to_wait_depends_on_the_clock_of_the_file(mtime, ctime, now, expected):
    """Two seconds at most, and only after a change just now."""
    assert get_settling_time(mtime, ctime, now) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_writer_through_a_mapping_is_noticed(server, tmp_path, direction):
    """Pages that are dirty already move no time when they are written to again, unless they were written back."""
    source, target = make_pair(tmp_path)
    with source.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as view:
        if kernel.get_file_system(handle.fileno()) == 0x01021994:
            pytest.skip("tmpfs never writes back")
        for page in range(0, SIZE, mmap.PAGESIZE):
            view[page : page + 1] = view[page : page + 1]
        settle(source)
        with Run(server, direction, source, target, get_transfer(direction)) as run:
            run.start()
            run.relay.wait_for_hit()
            view[3 * BLOCK : 3 * BLOCK + 5] = b"newer"
            run.relay.release()
            result = run.finish()
    assert result.returncode == 3, result.stderr
    assert "(its time)" in error_lines(result)[0]


def test_flush_makes_a_mapping_fault_again(tmp_path):
    """Only pages of the part that is about to be read are written back."""
    path = tmp_path / "file"
    write_pattern(path, SIZE)
    with path.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as view:
        view[:5] = b"newer"
        with LocalFile(str(path), flush=True) as file:
            if kernel.get_file_system(file.fd) == 0x01021994:
                pytest.skip("tmpfs never writes back")
            settle(path)
            before = file.info()
            with file.reading([(0, BLOCK)]):
                file.digest([(0, BLOCK)])
            view[:5] = b"again"
            assert before.describe_change(file.info()) == "time"


def test_dry_run_ends_with_a_changed_source_too(server, tmp_path):
    """What it says of the similarity would be that of a mixture."""
    source, target = make_pair(tmp_path)
    settle(source)
    before = target.read_bytes()
    with Run(server, "download", source, target, "response GET+/hashes 0 hold") as run:
        run.start("--dry-run")
        run.relay.wait_for_hit()
        overwrite(source, 3)
        run.relay.release()
        result = run.finish()
    assert result.returncode == 3, result.stderr
    assert json.loads(result.stdout)["exit_code"] == 3
    assert target.read_bytes() == before


def test_source_that_tells_no_time_is_reported(launch_old, tmp_path):
    """A server of version 1.0.1 can't say whether the file changed meanwhile, and the report says so."""
    source, target = make_pair(tmp_path)
    result = run_pdiffcopy("--json", "-b", str(BLOCK), launch_old().location(source), target)
    assert (result.returncode, json.loads(result.stdout)["watched"]) == (0, False)
    assert "NOT WATCHED" in result.stderr


# An answer isn't mine because it came {{{1


def make_scattered_pair(folder: Path) -> tuple[Path, Path]:
    """A pair for which three requests of the same size are made."""
    data = make_data(3 * 128 * 2 * BLOCK)
    (folder / "source").write_bytes(data)
    older = bytearray(data)
    for block in range(0, len(data) // BLOCK, 2):
        older[block * BLOCK] ^= 1
    (folder / "target").write_bytes(older)
    return folder / "source", folder / "target"


@pytest.mark.parametrize("method", ["sha1", "xxh128"])
def test_answer_that_comes_twice_is_not_taken_for_the_next(server, tmp_path, method):
    """All further answers of that connection would be those to earlier requests, with digests that match."""
    source, target = make_scattered_pair(tmp_path)
    with Run(server, "download", source, target, "response GET+/blocks 0 repeat") as run:
        result = run.start("-m", method).finish()
        assert len(run.relay.stop()) == 1
    assert result.returncode == 0, result.stderr
    assert "isn't that to the request" in result.stderr
    assert target.read_bytes() == source.read_bytes()


@contextmanager
def caching_proxy(folder: Path, port: int, key: str):
    """An nginx that keeps whatever it gets, whether that is wanted or not."""
    if not shutil.which("nginx"):
        pytest.skip("nginx isn't installed")
    listen = find_free_port()
    folder.mkdir()
    (folder / "nginx.conf").write_text(f"""
        user root; daemon off; error_log {folder}/log; pid {folder}/pid;
        events {{ }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
            uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
            proxy_cache_path {folder}/cache keys_zone=all:1m;
            server {{
                listen 127.0.0.1:{listen};
                location / {{
                    proxy_pass http://127.0.0.1:{port}; proxy_cache all; proxy_cache_key {key};
                    proxy_cache_valid any 1h; proxy_ignore_headers Cache-Control Expires Vary;
                }}
            }}
        }}""")
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        wait_for(lambda: can_connect(listen), what="nginx")
        yield Server(process, listen, folder / "log")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(("key", "code"), [("$request_uri", 0), ("$uri$arg_filename", 1)], ids=["whole URL", "name"])
def test_cache_is_noticed_or_avoided(server, tmp_path, key, code):
    """What was true an hour ago would be "nothing changed"."""
    source, target = make_pair(tmp_path)
    with caching_proxy(tmp_path / "nginx", server.port, key) as proxy:
        run_pdiffcopy("-b", str(BLOCK), "--retries", "0", proxy.location(source), target)
        for seed in (7, 8):
            write_pattern(source, SIZE, seed)
            result = run_pdiffcopy("-b", str(BLOCK), "--retries", "1", proxy.location(source), target)
            assert result.returncode == code, result.stderr
            if code:
                assert "keep or repeat answers" in error_lines(result)[0]
            else:
                assert target.read_bytes() == source.read_bytes()


def test_no_answer_may_be_kept(server, tmp_path):
    """Errors included."""
    import requests

    for endpoint in ("info", "hashes", "blocks", "nothing"):
        response = requests.get(f"{server.origin}/{endpoint}", params={"filename": tmp_path / "no"}, timeout=20)
        assert (response.status_code >= 400, response.headers["Cache-Control"]) == (True, "no-store")


# Claims that are lost without a word {{{1


def test_claim_that_came_and_went_is_noticed(tmp_path):
    """That there's no claim any more doesn't mean that it was ours until the end."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with LocalFile(str(path), write=True) as file:
        assert file.claims.take("aa")
        file.claims.check("aa")
        assert file.claims.take("bb")
        file.claims.release("bb")
        with pytest.raises(TakenOverError):
            file.claims.check("aa")


def test_claim_that_has_no_room_is_an_error(tmp_path):
    """Two runs would mix their data without a word. Nothing is touched."""
    with ext4(tmp_path / "image", tmp_path / "disk") as disk:
        source, target = make_pair(disk)
        before = target.read_bytes()
        for size in (2048, 512, 64, 8, 1):
            with suppress(OSError):
                for number in range(100):
                    os.setxattr(target, f"user.{size}.{number}", bytes(size))
        result = run_pdiffcopy("-b", str(BLOCK), source, target)
        assert result.returncode == 1
        assert "Can't claim" in error_lines(result)[0] and "No space left" in error_lines(result)[0]
        assert target.read_bytes() == before


def test_target_that_can_not_be_claimed_is_reported(bare_disk, server):
    """A file system without attributes holds no claim, and the report says so."""
    source, target = make_pair(bare_disk)
    for place in (str(target), server.location(target)):
        overwrite(target, 1)
        result = run_pdiffcopy("--json", "-b", str(BLOCK), source, place)
        assert (result.returncode, json.loads(result.stdout)["claimed"]) == (0, False)
        assert "NOT CLAIMED" in result.stderr


# What was written isn't there {{{1


@contextmanager
def failing_disk(folder: Path):
    """
    A file system whose disk has no room for what hasn't been written to it yet. Yields it, and what makes room.

    It's in a file with holes on a small file system, so that a write into a hole fails when it is written back.
    """
    with mounted(folder / "below", "tmpfs", "size=20m") as below:
        options = "-O", "^has_journal", "-E", "lazy_itable_init=0", "-m", "0"
        with ext4(below / "image", folder / "disk", *options, size=64 * 2**20) as disk:
            with (disk / "target").open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, 8 * 2**20)
            os.sync()
            filler = below / "filler"
            with pytest.raises(OSError), filler.open("wb", buffering=0) as handle:
                while True:
                    handle.write(bytes(2**16))
            yield disk, filler.unlink


@pytest.mark.parametrize("direction", ["local", "upload"])
def test_next_run_after_a_failed_flush_believes_the_disk(server, tmp_path, direction):
    """The page cache shows what was to be written: compared with that, everything would be equal."""
    source = tmp_path / "source"
    data = write_pattern(source, 8 * 2**20)
    with failing_disk(tmp_path) as (disk, make_room):
        target = disk / "target"
        place = str(target) if direction == "local" else server.location(target)
        result = run_pdiffcopy("--fsync", source, place)
        assert result.returncode == 1, result.stderr
        assert "flush" in error_lines(result)[0]
        make_room()
        result = run_pdiffcopy("--json", "--fsync", source, place)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["bytes_moved"] > 0
        assert os.listxattr(target) == []
        with LocalFile(str(target)) as file:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert kernel.count_cached_pages(file.fd, 8 * 2**20) == 0
        assert target.read_bytes() == data


def test_cache_is_dropped_at_once_after_a_failed_flush(tmp_path):
    """Whether there is a claim or not, so that whoever compares next sees what the disk has."""
    with failing_disk(tmp_path) as (disk, _), LocalFile(str(disk / "target"), write=True) as file:
        file.write([(0, 8 * 2**20)], [make_data(8 * 2**20)])
        assert kernel.count_cached_pages(file.fd, 8 * 2**20) > 0
        with pytest.raises(FileError, match="flush"):
            file.claims.flush()
        assert kernel.count_cached_pages(file.fd, 8 * 2**20) == 0


def test_mark_of_a_flush_that_was_killed_is_kept_until_the_cache_is_dropped(tmp_path):
    """The next claim drops what the cache has of the file, or fails when that can't be done."""
    path = tmp_path / "file"
    write_pattern(path, SIZE)
    os.setxattr(path, RUN_ATTRIBUTE, b"aa unflushed")
    with LocalFile(str(path), write=True) as file:
        if kernel.get_file_system(file.fd) == 0x01021994:
            pytest.skip("tmpfs has no disk below it")
        with mmap.mmap(file.fd, SIZE) as view:
            assert view[0] == path.read_bytes()[0]  # what is mapped can't be dropped
            with pytest.raises(FileError, match="mapped"):
                file.claims.take("bb")
            assert os.getxattr(path, RUN_ATTRIBUTE) == b"bb unflushed"
            file.claims.check("bb")
        assert file.claims.take("cc")
        assert kernel.count_cached_pages(file.fd, SIZE) == 0
        assert os.getxattr(path, RUN_ATTRIBUTE) == b"cc"
        file.claims.flush("cc")
        assert os.getxattr(path, RUN_ATTRIBUTE) == b"cc"


def test_flush_whose_answer_is_lost_has_failed(server, tmp_path):
    """The disk tells of an error once: who asks again hears that all is well."""
    source, target = make_pair(tmp_path)
    with Run(server, "upload", source, target, "response POST+/sync 0 reset") as run:
        result = run.start("--fsync").finish()
    assert result.returncode == 1, result.stderr
    assert "isn't known whether the data has reached the disk" in error_lines(result)[0]


@pytest.fixture
def restart(tmp_path):
    """A function that starts a server on a machine that seems to have been started anew."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a name space can't be made here")
    servers = []

    def restart(boot: str, port: int) -> Server:
        servers.append(start_server_of_boot(tmp_path, boot, port))
        return servers[-1]

    yield restart
    for server in servers:
        server.stop()


@pytest.mark.parametrize(("direction", "code"), [("upload", 1), ("download", 3)])
def test_machine_that_starts_anew_ends_the_run(restart, tmp_path, direction, code):
    """What was written before may be gone: to go on from there would make holes."""
    source, target = make_scattered_pair(tmp_path)
    port = find_free_port()
    server = restart("first-boot", port)
    with Run(server, direction, source, target, get_transfer(direction)) as run:
        run.start()
        run.relay.wait_for_hit()
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not can_connect(port), what="the end of the server")
        restart("second-boot", port)
        run.relay.release()
        result = run.finish()
    assert result.returncode == code, result.stderr
    assert re.search("replaced|identity", error_lines(result)[0])


def test_same_file_behind_two_servers_is_the_same_file(server, launch, tmp_path):
    """Whatever the names are: a file isn't copied onto itself."""
    path = tmp_path / "file"
    before = write_pattern(path, SIZE)
    (tmp_path / "link").symlink_to("file")
    other = launch("--root", str(tmp_path))
    for places in (
        (server.location(path), f"127.0.0.1:{other.port}/link"),
        (str(path), server.location(tmp_path / "link")),
        (f"127.0.0.1:{other.port}/file", str(tmp_path / "link")),
    ):
        result = run_pdiffcopy("-W", *places)
        assert result.returncode == 1
        assert "the same file" in error_lines(result)[0]
    assert path.read_bytes() == before
    assert os.listxattr(path) == []
