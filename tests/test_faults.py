"""Nothing lost: whatever fails, exit code 0 means that the target equals the source."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdiffcopy.address import parse_location
from pdiffcopy.client import Network
from pdiffcopy.client.servers import Servers
from tests.hostile import HostileProcess
from tests.relay import RelayProcess
from tests.support import (
    MANY_BLOCKS,
    RUN_TIMEOUT,
    STALL,
    Server,
    can_connect,
    children_of,
    error_lines,
    ext4,
    find_free_port,
    is_alive,
    make_data,
    mounted,
    run_pdiffcopy,
    wait_for,
    write_pattern,
)

BLOCK = 65536
SIZE = 16 * BLOCK
MEBIBYTE = 1024 * 1024
DIRECTIONS = ("upload", "download")
RUN_VARIABLE = "PDIFFCOPY_TEST_RUN"

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace isn't installed")

# Scaffolding {{{1


class Pair:
    """A source and a target that differs from it in a few places and at the end, one of them behind a server."""

    def __init__(self, folder: Path, direction: str, port: int):
        self.direction = direction
        self.port = port
        self.source, self.target = folder / "source", folder / "target"
        self.source.write_bytes(make_data(SIZE))
        old = bytearray(make_data(SIZE)[: -BLOCK - 7])
        for block in (1, 5, 6, 11):
            old[block * BLOCK : block * BLOCK + 5] = b"older"
        self.target.write_bytes(old)

    @property
    def locations(self) -> list[str]:
        """The arguments of the command line."""
        prefix = f"127.0.0.1:{self.port}"
        source, target = str(self.source), str(self.target)
        return [source, prefix + target] if self.direction == "upload" else [prefix + source, target]

    def via(self, port: int) -> Pair:
        """The same pair, by way of another port."""
        self.port = port
        return self

    def enlarge(self) -> Pair:
        """The same pair with 4 MiB, all of which differs: what fails is repeated in halves."""
        self.source.write_bytes(make_data(4 * MEBIBYTE + 10))
        self.target.write_bytes(bytes(4 * MEBIBYTE))
        return self

    def is_equal(self) -> bool:
        return self.source.read_bytes() == self.target.read_bytes()

    def run(self, *options: str) -> subprocess.CompletedProcess:
        """Bring the target into line, and see to it that no process is left behind."""
        return run_client(*options, *self.locations)

    def start(self, *options: str) -> subprocess.Popen:
        """Start a run that something is going to happen to."""
        command = [sys.executable, "-m", "pdiffcopy", "-b", str(BLOCK), "-c", "2", *options, *self.locations]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def check_completion(self, port: int, *options: str) -> None:
        """What a failed run promises: the next one completes the target."""
        result = self.via(port).run(*options)
        assert result.returncode == 0, result.stderr
        assert self.is_equal()


def run_client(*arguments: str) -> subprocess.CompletedProcess:
    """Run a client with small blocks. A failure has to be one line, and no process may be left behind."""
    run = uuid.uuid4().hex
    result = run_pdiffcopy("-b", str(BLOCK), "-c", "2", *arguments, env={RUN_VARIABLE: run})
    wait_for(lambda: not processes_with(run), what="the end of all processes of the client")
    check_error(result.returncode, result.stderr)
    return result


def check_error(returncode: int, stderr: str) -> str:
    """Success says nothing but log messages, a failure says one line of its own, which is returned."""
    lines = error_lines(subprocess.CompletedProcess([], returncode, "", stderr))
    assert len(lines) == (1 if returncode else 0), stderr
    assert all(line.startswith("pdiffcopy: ") for line in lines), stderr
    return "".join(lines)


def processes_with(run: str) -> list[int]:
    """The processes that inherited an environment variable."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{RUN_VARIABLE}={run}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@contextmanager
def interrupted(pair: Pair, port: int, *options: str):
    """A run that is held in the middle of the data that it moves. What's in the ``with`` block happens then."""
    place = "request POST+/blocks middle hold" if pair.direction == "upload" else "response GET+/blocks middle hold"
    with RelayProcess(port, place) as relay:
        process = pair.via(relay.port).start(*options)
        try:
            relay.wait_for_hit()
            yield process
            relay.release()
            process.stdout_text, process.stderr_text = process.communicate(timeout=RUN_TIMEOUT)  # type: ignore[attr-defined]
        finally:
            process.kill()
            process.wait()


# Transient faults {{{1

SIDES_AND_PLACES = [("request", "0"), ("request", "30"), ("response", "0"), ("response", "30")] + [
    ("response", place) for place in ("first", "middle", "last")
]
METHODS = ["sha1", "xxh128"]
"""Those that are verified by a digest of what is sent, and by the digests that were compared."""
BODY_PLACES = ("first", "middle", "last")


@pytest.mark.parametrize("action", ["reset", "close"])
@pytest.mark.parametrize("side, place", SIDES_AND_PLACES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_broken_connections_are_survived(server, tmp_path, direction, side, place, action):
    """A connection that ends at any byte of a request or response, once at each endpoint, costs a retry."""
    pair = Pair(tmp_path, direction, server.port)
    # The last byte of a hash stream only says that it's over, when the client has left already.
    endpoints = ["GET+/info", *(["GET+/hashes"] if place != "last" else [])]
    endpoints += ["POST+/resize", "POST+/blocks"] if direction == "upload" else ["GET+/blocks"]
    with RelayProcess(server.port, *(f"{side} {endpoint} {place} {action}" for endpoint in endpoints)) as relay:
        result = pair.via(relay.port).run()
        hits = relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert len(hits) == len(endpoints)
    assert result.stderr.count("trying again") >= len(endpoints)


@pytest.mark.parametrize("action", ["reset", "corrupt"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_networks_that_fail_with_much_get_it_done_with_little(server, tmp_path, direction, method, action):
    """What breaks off, or arrives wrong, is repeated in halves, until they are small enough for this network."""
    pair = Pair(tmp_path, direction, server.port).enlarge()
    message = "request POST+/blocks" if direction == "upload" else "response GET+/blocks"
    with RelayProcess(server.port, f"{message} {3 * MEBIBYTE // 2} {action} 100") as relay:
        result = pair.via(relay.port).run("--retries", "2", "-m", method)
        hits = relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    # The whole and its halves: quarters get through.
    assert len(hits) == 3


@pytest.mark.parametrize("place", [20, 60, 100, 140, 180])
def test_broken_heads_are_survived(server, tmp_path, place):
    """An answer that ends in the middle of its headers costs a retry, and is told in one line."""
    pair = Pair(tmp_path, "download", server.port)
    with RelayProcess(
        server.port, *(f"response {name} {place} close" for name in ("GET+/info", "GET+/blocks"))
    ) as relay:
        result = pair.via(relay.port).run()
        assert len(relay.stop()) == 2
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert result.stderr.count("trying again") >= 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("action", ["reset", "close", "stall", "corrupt"])
@pytest.mark.parametrize("place", BODY_PLACES)
def test_broken_uploads_are_repeated(server, tmp_path, place, action, method):
    """Data that breaks off, stands still or arrives wrong on its way to the server is sent again."""
    pair = Pair(tmp_path, "upload", server.port)
    with RelayProcess(server.port, f"request POST+/blocks {place} {action}") as relay:
        result = pair.via(relay.port).run("--timeout", "1", "-m", method)
        assert relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert "1 retry" in result.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", BODY_PLACES)
def test_corrupt_downloads_are_repeated(server, tmp_path, place, method):
    """A byte that arrives wrong from the server is noticed and fetched again."""
    pair = Pair(tmp_path, "download", server.port)
    with RelayProcess(server.port, f"response GET+/blocks {place} corrupt") as relay:
        result = pair.via(relay.port).run("-m", method)
        assert relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert "1 retry" in result.stderr


@pytest.mark.parametrize("fault", [
    "request GET+/info 0 stall",
    "response GET+/info middle stall",
    "response GET+/hashes 0 stall",
    "response GET+/hashes middle stall",
    "response {blocks} 0 stall",
    "response {blocks} last stall",
])  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_stalls_are_survived(server, tmp_path, direction, fault):
    """A peer that falls silent is given up after --timeout, and asked again."""
    pair = Pair(tmp_path, direction, server.port)
    fault = fault.format(blocks="GET+/blocks" if direction == "download" else "POST+/blocks")
    with RelayProcess(server.port, fault) as relay:
        result = pair.via(relay.port).run("--timeout", "0.7")
        assert relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert "no sign of life" in result.stderr


@pytest.mark.parametrize("status", [502, 503, 504, 0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gateway_errors_are_survived(server, tmp_path, direction, status):
    """A gateway that answers in the server's place (0: with garbage) for one request is asked again."""
    pair = Pair(tmp_path, direction, server.port)
    endpoints = ("GET+/info", "GET+/hashes", "POST+/blocks" if direction == "upload" else "GET+/blocks")
    with RelayProcess(server.port, *(f"request {endpoint} 0 answer={status}" for endpoint in endpoints)) as relay:
        result = pair.via(relay.port).run()
        hits = relay.stop()
    assert result.returncode == 0, result.stderr
    assert pair.is_equal()
    assert len(hits) == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_internal_errors_end_the_run(server, tmp_path, direction):
    """A server that says 500 has a problem that repetition won't solve; the next run completes the target."""
    pair = Pair(tmp_path, direction, server.port)
    endpoint = "POST+/blocks" if direction == "upload" else "GET+/blocks"
    with RelayProcess(server.port, f"request {endpoint} 0 answer=500") as relay:
        result = pair.via(relay.port).run()
        assert relay.stop()
    assert result.returncode == 1
    pair.check_completion(server.port)


DAMAGE = [
    "request GET+/info 1 corrupt",
    "request GET+/info @filename=%2 corrupt",
    "request GET+/hashes @block_size= corrupt",
    "request GET+/hashes @method=sha corrupt",
    "request {blocks} @filename=%2 corrupt",
    "request {blocks} @extents= corrupt",
    "request {blocks} @%3A corrupt",
    "request {blocks} @HTTP/1. corrupt",
    "response GET+/info 9 corrupt",
    "response GET+/info @Content-Length:~ corrupt",
    "response GET+/info middle corrupt",
    "response GET+/hashes first corrupt",
    "response GET+/hashes middle corrupt",
    "response GET+/hashes middle duplicate=60",
    "response GET+/hashes middle drop=60",
    "response {blocks} 9 corrupt",
    "response {blocks} @Content-Length:~ corrupt",
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_never_passes_for_success(server, tmp_path, direction, fault):
    """Whichever byte of the conversation is wrong, once: the target is right, or the run fails in one line."""
    pair = Pair(tmp_path, direction, server.port)
    fault = fault.format(blocks="GET+/blocks" if direction == "download" else "POST+/blocks")
    before = pair.source.read_bytes()
    with RelayProcess(server.port, fault) as relay:
        result = pair.via(relay.port).run("--timeout", "1", "--retries", "2")
        relay.stop()
    assert pair.source.read_bytes() == before
    assert result.returncode or pair.is_equal(), result.stderr
    pair.check_completion(server.port)


UPLOAD_DAMAGE = [
    "request POST+/resize @size= corrupt",
    "request POST+/blocks @Content-Length:~ corrupt",
    "request POST+/blocks @Pdiffcopy-Digest:~ corrupt",
    "request POST+/blocks middle duplicate=60",
    "request POST+/blocks middle drop=60",
]
DOWNLOAD_DAMAGE = [
    "response GET+/blocks @Pdiffcopy-Digest:~ corrupt",
    "response GET+/blocks middle duplicate=60",
    "response GET+/blocks middle drop=60",
]


@pytest.mark.parametrize("direction, fault", [
    *(("upload", fault) for fault in UPLOAD_DAMAGE), *(("download", fault) for fault in DOWNLOAD_DAMAGE)
])  # fmt: skip
def test_damaged_data_never_passes_for_success(server, tmp_path, direction, fault):
    """The same for what only one direction has: the data, its digest, and what it is announced with."""
    test_damage_never_passes_for_success(server, tmp_path, direction, fault)


# The server goes and comes back {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_server_restart_is_survived(launch, tmp_path, direction):
    """A server that is killed in mid-run, and is back on its port seconds later, costs retries but not the run."""
    server = launch()
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, "--timeout", "1") as process:
        kill_server(server)
        # The client has met the closed door, more than once, before the server is back.
        lines = []
        while sum("trying again" in line for line in lines) < 4:
            lines.append(process.stderr.readline())
            assert process.poll() is None, lines
        launch(port=server.port)
    assert process.returncode == 0, process.stderr_text
    assert pair.is_equal()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_server_that_stays_away_ends_the_run(launch, tmp_path, direction):
    """Retries come to an end: one line says that nobody answers, and a later run completes the target."""
    server = launch()
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, "--timeout", "0.5", "--retries", "2") as process:
        kill_server(server)
        wait_for(lambda: process.poll() is not None, what="the end of the client")
    assert process.returncode == 1
    assert f"127.0.0.1:{pair.port}" in check_error(1, process.stderr_text)
    pair.check_completion(launch().port)


def kill_server(server: Server) -> None:
    """Kill all processes of a server at once, as a power cut does."""
    others = children_of(server.process.pid)
    assert others
    for pid in [server.process.pid, *others]:
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    wait_for(lambda: not can_connect(server.port), what="the end of the server's port")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_server_processes_end_with_the_first_of_them(launch, tmp_path, direction):
    """When the first process of a server is killed, the others end by themselves, also in the middle of a request."""
    server = launch()
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, "--retries", "0") as process:
        others = children_of(server.process.pid)
        assert others
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not any(map(is_alive, others)), what="the end of the server's processes")
        process.kill()
    pair.check_completion(launch(port=server.port).port)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_server_workers_are_replaced(launch, tmp_path, direction):
    """A server process that dies (out of memory, kill -9) costs a retry: another one takes its place."""
    server = launch("-c", "2")
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, "--timeout", "2") as process:
        workers = children_of(server.process.pid)
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(set(children_of(server.process.pid)) - set(workers)) == 2, what="new processes")
    assert process.returncode == 0, process.stderr_text
    assert pair.is_equal()


# The client is killed {{{1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_client_leaves_no_process_and_a_target_to_complete(server, tmp_path, direction):
    """Kill -9 of the client ends its children too, and the next run gives the right file."""
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, *MANY_BLOCKS) as process:
        children = children_of(process.pid)
        assert children
        process.kill()
        wait_for(lambda: not any(map(is_alive, children)), what="the end of the client's children")
    assert process.returncode == -signal.SIGKILL
    pair.check_completion(server.port)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_children_fail_the_run(server, tmp_path, direction, victim):
    """Kill -9 of the generator or a worker ends the run with one line, and the next run gives the right file."""
    pair = Pair(tmp_path, direction, server.port)
    # While the hashes are held none of the children can be done.
    with RelayProcess(server.port, "response GET+/hashes middle hold") as relay:
        process = pair.via(relay.port).start(*MANY_BLOCKS)
        relay.wait_for_hit()
        children = wait_for(lambda: len(found := sorted(children_of(process.pid))) == 3 and found, what="children")
        os.kill(children[victim], signal.SIGKILL)
        _, stderr = process.communicate(timeout=RUN_TIMEOUT)
    assert process.returncode == 1
    assert "ended unexpectedly (killed by signal 9)" in check_error(1, stderr)
    assert not any(map(is_alive, children))
    pair.check_completion(server.port)


@pytest.mark.parametrize("options", [(), MANY_BLOCKS], ids=["one process", "many"])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_interruption_leaves_a_target_to_complete(server, tmp_path, direction, number, status, options):
    """SIGTERM, Control-C and SIGHUP end the run with their exit code and without a process left, wherever it is."""
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port, *options) as process:
        children = children_of(process.pid)
        assert bool(children) == bool(options)
        process.send_signal(number)
        wait_for(lambda: process.poll() is not None, what="the end of the client")
        assert not any(map(is_alive, children))
    assert process.returncode == status
    check_error(status, process.stderr_text)
    pair.check_completion(server.port)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killing_at_random_moments_never_spoils_the_target(server, tmp_path, direction, seed):
    """The client dies again and again at some point of its run; the run that isn't killed gives the right file."""
    from tests.torture import kill_and_rerun

    pair = Pair(tmp_path, direction, server.port)
    kill_and_rerun(pair, seed)
    assert pair.is_equal()


# Lasting faults {{{1


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.parametrize("options", [[], ["-W"], ["--no-verify"]])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_full_disk_is_named(server, tmp_path, direction, options):
    """A disk that fills up, on either side, ends the run with the words of the system; with more room it completes."""
    with mounted(tmp_path / "small", "tmpfs", "size=512k") as folder:
        pair = Pair(tmp_path, direction, server.port)
        pair.target.unlink()
        pair.target = folder / "target"
        # It isn't known beforehand how many zeros are going to be holes.
        result = pair.run(*options, "--sparse=always")
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert str(pair.target) in result.stderr
        remount(folder, "size=4m")
        pair.check_completion(server.port, *options)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_read_only_mount_is_named(server, tmp_path, direction, missing):
    """A target on a read-only file system ends the run with the words of the system."""
    with mounted(tmp_path / "mount", "tmpfs", "size=4m") as folder:
        pair = Pair(tmp_path, direction, server.port)
        if not missing:
            shutil.copy(pair.target, folder / "target")
        pair.target = folder / "target"
        remount(folder, "ro")
        result = pair.run()
        assert result.returncode == 1
        assert "Read-only file system" in result.stderr
        remount(folder, "rw")
        pair.check_completion(server.port)


def rewrite(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(3 * BLOCK)
        handle.write(b"rewritten")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(make_data(path.stat().st_size, seed=99))
    other.rename(path)


CHANGES = {
    "truncated": lambda path: os.truncate(path, 3 * BLOCK),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, SIZE + 2 * BLOCK),
    "rewritten": rewrite,
    "removed": Path.unlink,
    "replaced": replace,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_changing_source_is_noticed(server, tmp_path, direction, change):
    """A source that changes while it is copied never yields a silent mixture."""
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port) as process:
        CHANGES[change](pair.source)
    assert process.returncode == 3, process.stderr_text
    assert "changed while it was copied" in check_error(3, process.stderr_text)
    if change != "removed":
        pair.check_completion(server.port)


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"rewritten"}))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_changing_target_is_noticed(server, tmp_path, direction, change):
    """A target that is removed, replaced or resized meanwhile isn't reported as a success."""
    pair = Pair(tmp_path, direction, server.port)
    with interrupted(pair, server.port) as process:
        CHANGES[change](pair.target)
    check_error(process.returncode, process.stderr_text)
    assert process.returncode == 1, process.stderr_text
    pair.check_completion(server.port)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_clients_at_one_target(server, tmp_path, direction):
    """Two runs have one target and one source: the later one wins, the other one ends well or says why it doesn't."""
    pair = Pair(tmp_path, direction, server.port)
    with RelayProcess(server.port, "response GET+/hashes middle hold") as relay:
        process = pair.via(relay.port).start()
        relay.wait_for_hit()
        result = pair.via(server.port).run("-b", "10000")
        relay.release()
        _, stderr = process.communicate(timeout=RUN_TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert process.returncode in (0, 1)
    check_error(process.returncode, stderr)
    assert pair.is_equal()


@pytest.fixture
def bad_disk(tmp_path):
    """A file system with a file of 4 MiB, the end of which can't be read."""
    with ext4(tmp_path / "image", tmp_path / "disk", "-O", "^has_journal", size=32 * MEBIBYTE) as disk:
        (disk / "file").write_bytes(make_data(4 * MEBIBYTE))
        os.sync()
        with (disk / "file").open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            place = fcntl.ioctl(handle.fileno(), 1, struct.pack("i", 800))  # FIBMAP (linux/fs.h): a block of the disk
        os.truncate(tmp_path / "image", struct.unpack("i", place)[0] * os.statvfs(disk).f_bsize)
        yield disk / "file"


@pytest.mark.parametrize("options", [(), ("-W",), ("-W", "--no-verify"), ("-m", "xxh128")], ids=" ".join)
def test_disk_that_can_not_be_read_is_named(server, tmp_path, bad_disk, options):
    """Not after many retries, and not as an internal error, whenever the server finds out."""
    target = tmp_path / "target"
    target.write_bytes(bytes(4 * MEBIBYTE))
    for source in (f"127.0.0.1:{server.port}{bad_disk}", str(bad_disk)):
        result = run_client(*options, source, str(target))
        assert result.returncode == 1
        assert "Input/output error" in error_lines(result)[0], result.stderr


# Waiting has an end {{{1


@pytest.mark.parametrize("behaviour", ["all-silence", "hashes-stall"])
@pytest.mark.parametrize("role", ["source", "target"])
def test_stalled_peer_ends_in_an_error(tmp_path, behaviour, role):
    """--timeout bounds every wait: a peer that says nothing is an error, not a hang."""
    local = tmp_path / "local"
    local.write_bytes(bytes(65536))
    with HostileProcess(behaviour) as peer:
        locations = [peer.location, str(local)] if role == "source" else [str(local), peer.location]
        result = run_client("-b", "4096", "--timeout", "0.3", "--retries", "1", *locations)
    assert result.returncode == 1
    assert "no sign of life for 0.3 seconds" in error_lines(result)[0]


def test_slow_work_is_no_silence(launch, tmp_path):
    """A server that hashes a large block longer than --timeout tells meanwhile that it is at it."""
    server = launch(setup="import pdiffcopy.hashing; pdiffcopy.hashing.HEARTBEAT = 0.05")
    for name in ("source", "target"):
        with (tmp_path / name).open("wb") as handle:
            handle.truncate(256 * MEBIBYTE)
    options = "-b", "256MiB", "-m", "sha3_512", "--timeout", "1", "--retries", "0"
    result = run_client(*options, server.location(tmp_path / "source"), str(tmp_path / "target"))
    assert result.returncode == 0, result.stderr


def test_slow_list_is_no_silence(launch, tmp_path):
    """Nor is one of a folder that takes longer than --timeout to be read."""
    slow = "look = listing._Thing.look; listing._Thing.look = lambda *words: time.sleep(1.5) or look(*words)"
    beat = "import pdiffcopy.hashing; pdiffcopy.hashing.HEARTBEAT = 0.05"
    server = launch(setup=f"{beat}; import time; from pdiffcopy.files import listing; {slow}")
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with Servers(Network(timeout=1, retries=0)) as servers:
        entries = servers.open(parse_location(server.location(tmp_path))).entries(1)
        assert [entry.name for entry in entries] == ["", "a", "b"]


def test_list_survives_broken_connections(server, tmp_path):
    """Wherever they break: each entry is told once, and none is left out."""
    for number in range(3000):
        (tmp_path / f"{number:04}-{'x' * 100}").touch()
    places = ((5000, "reset"), (100_000, "corrupt"), (200_000, "close"), (300_000, "drop=7"))
    faults = [f"response GET+/list {place} {action} 1 {skip}" for skip, (place, action) in enumerate(places)]
    with RelayProcess(server.port, *faults) as relay:
        with Servers(Network(timeout=5, retries=3)) as servers:
            replica = servers.open(parse_location(f"127.0.0.1:{relay.port}{tmp_path}"))
            names = [entry.name for entry in replica.entries(1)]
        assert len(relay.stop()) == len(faults)
    assert names == ["", *sorted(os.listdir(tmp_path))]


@pytest.mark.parametrize("options", [("-W",), (), ("-m", "xxh128")], ids=" ".join)
def test_source_that_pauses_for_longer_than_the_target_waits(server, impatient, tmp_path, options):
    """The target's server gives up on the client, which isn't to blame, and tries again."""
    data = write_pattern(tmp_path / "source", 3 * MEBIBYTE)
    write_pattern(tmp_path / "target", 3 * MEBIBYTE, seed=2)
    with RelayProcess(server.port, f"response GET+/blocks middle delay={4 * STALL}") as relay:
        source = f"127.0.0.1:{relay.port}{tmp_path / 'source'}"
        result = run_client(*options, source, impatient.location(tmp_path / "target"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "target").read_bytes() == data
    assert "trying again" in result.stderr


# To the disk {{{1


@needs_strace
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fsync_flushes_the_target(tmp_path, direction, new):
    """--fsync flushes the file on whichever side it is, and the folder that has its name."""
    flushed = trace_flushes(tmp_path, direction, new, "--fsync")
    assert str(tmp_path / "target") in flushed
    assert str(tmp_path) in flushed or not new


@needs_strace
def test_nothing_is_flushed_unless_wanted(tmp_path):
    """Without --fsync the disk decides when it writes."""
    assert not trace_flushes(tmp_path, "download", False)


def trace_flushes(folder: Path, direction: str, new: bool, *options: str) -> set[str]:
    """Run with strace on the side of the target: what was flushed?"""
    trace = folder / "trace"
    strace = ["strace", "-f", "-y", "-q", "-e", "trace=fsync,fdatasync,syncfs,sync", "-o", str(trace)]
    port = find_free_port()
    listen = [sys.executable, "-m", "pdiffcopy", "-l", f"127.0.0.1:{port}"]
    log = folder / "server.log"
    with log.open("wb") as handle:
        process = subprocess.Popen([*(strace if direction == "upload" else []), *listen], stdout=handle, stderr=handle)
    try:
        wait_for(lambda: can_connect(port), what="the server")
        pair = Pair(folder, direction, port)
        if new:
            pair.target.unlink()
        command = [sys.executable, "-m", "pdiffcopy", "-b", str(BLOCK), *options, *pair.locations]
        subprocess.run([*(strace if direction == "download" else []), *command], check=True, capture_output=True)
        assert pair.is_equal()
    finally:
        for pid in [*children_of(process.pid)][:1] if direction == "upload" else [process.pid]:
            os.kill(pid, signal.SIGTERM)  # strace ends with what it traces
        process.wait(RUN_TIMEOUT)
    flushed = re.findall(r"f(?:data)?sync\(\d+<([^>]*)>\) *= 0", trace.read_text())
    return set(flushed)
