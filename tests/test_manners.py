"""What a run does to the other programs of its hosts: the bandwidth that it takes, and what it leaves in memory."""

from __future__ import annotations

import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from pdiffcopy import pace
from pdiffcopy.blocks import Extent
from pdiffcopy.client import Client
from pdiffcopy.client.plan import Options
from pdiffcopy.exceptions import TakenOverError, UsageError
from pdiffcopy.files import claims, kernel, pagecache
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.pace import CREDIT, SLOW_RATE
from pdiffcopy.words import MAX_BLOCK_SIZE
from tests.support import (
    DISKS,
    IMPATIENCE,
    disk_of_kind,
    error_lines,
    ext4,
    loop_device,
    make_data,
    run_pdiffcopy,
    serve_https,
    snapshot,
    write_pattern,
)

PAGE = 4096
MEBIBYTE = 2**20
RATE = 512 * 1024
SIZE = 768 * 1024
DIRECTIONS = ("local", "upload", "download", "remote")


def get_places(server, direction: str, source: Path, target: Path) -> tuple:
    """The locations of the files for a run in a direction."""
    return (
        server.location(source) if direction in ("download", "remote") else source,
        server.location(target) if direction in ("upload", "remote") else target,
    )


def copy(places: tuple, *options: str) -> dict:
    """Run the program, and return the report."""
    result = run_pdiffcopy("--json", *options, *places)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Bandwidth {{{1


def get_least_time(size: int, rate: int) -> float:
    """How long so many bytes take at least, in seconds, however fast the machine is."""
    return size / rate - CREDIT


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_client_takes_no_more_than_it_may(server, tmp_path, direction, workers):
    """Over all of its workers together, wherever the bytes come from, and wherever they go."""
    data = write_pattern(tmp_path / "source", 2 * SIZE)
    places = get_places(server, direction, tmp_path / "source", tmp_path / "target")
    report = copy(places, f"--bwlimit={2 * RATE}", "-c", workers, "-b", "64KiB")
    assert report["elapsed"] >= get_least_time(2 * SIZE, 2 * RATE)
    assert (report["verification"], report["retries"]) == ("verified", 0)
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_server_gives_no_more_than_it_may(launch, tmp_path, direction):
    """Over all of its processes, to all clients together: two of them take twice as long."""
    server, found = launch("-c", "2", f"--bwlimit={RATE}"), []

    def run(name: str) -> None:
        data = write_pattern(tmp_path / name, SIZE)
        copy(get_places(server, direction, tmp_path / name, tmp_path / f"{name}-target"), "-b", "64KiB")
        found.append((tmp_path / f"{name}-target").read_bytes() == data)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= get_least_time(2 * SIZE, RATE)
    assert found == [True, True]


@pytest.mark.parametrize("direction", ["upload", "download"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_limits_hold_for_https(launch, authority, tmp_path, direction, side):
    """Where bytes take another way through both programs."""
    data = write_pattern(tmp_path / "source", SIZE)
    limit, options = f"--bwlimit={RATE}", ["--ca-file", str(authority / "ca.pem"), "-b", "64KiB"]
    server = serve_https(partial(launch, *([limit] if side == "server" else [])), authority)
    places = get_places(server, direction, tmp_path / "source", tmp_path / "target")
    places = [f"https://{place}" if isinstance(place, str) else place for place in places]
    report = copy(places, *options, *([limit] if side == "client" else []))
    assert report["elapsed"] >= get_least_time(SIZE, RATE)
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_limits_hold_with_old_peers(launch_old, tmp_path, direction):
    """They needn't know."""
    data = write_pattern(tmp_path / "source", SIZE)
    places = get_places(launch_old(), direction, tmp_path / "source", tmp_path / "target")
    report = copy(places, f"--bwlimit={RATE}", "-b", "64KiB")
    assert report["elapsed"] >= get_least_time(SIZE, RATE)
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize(
    ("direction", "options"),
    [("upload", ()), ("download", ()), ("download", ("-W",)), ("download", ("--no-verify",))],
)
def test_slow_clients_are_no_stalled_ones(launch, tmp_path, direction, options):
    """To a server that waits for a second: more than that fits into the buffers of a connection."""
    server = launch("-c", "1", setup=IMPATIENCE)
    data = write_pattern(tmp_path / "source", 300_000)
    write_pattern(tmp_path / "target", 300_000, seed=2)
    places = get_places(server, direction, tmp_path / "source", tmp_path / "target")
    report = copy(places, "--bwlimit=32KiB", "-c", "8", "--retries=0", *options)
    assert report["elapsed"] >= get_least_time(300_000, 32768)
    assert (tmp_path / "target").read_bytes() == data
    assert "too slow" not in server.log.read_text()


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_slow_servers_are_no_stalled_ones(launch, tmp_path, direction):
    """To a client that waits for a second, and that has sent long ago what the server takes."""
    server = launch("-c", "1", "--bwlimit=32KiB", setup=IMPATIENCE)
    data = write_pattern(tmp_path / "source", 200_000)
    places = get_places(server, direction, tmp_path / "source", tmp_path / "target")
    report = copy(places, "--timeout=1", "--retries=0", "-c", "1")
    assert report["elapsed"] >= get_least_time(200_000, 32768)
    assert (tmp_path / "target").read_bytes() == data
    assert "too slow" not in server.log.read_text()


def test_limit_holds_in_processes_that_are_spawned(server, tmp_path):
    """As they are where other threads run."""
    data, ended = write_pattern(tmp_path / "source", SIZE), threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        source = server.location(tmp_path / "source")
        report = Client(source=source, target=tmp_path / "target", block_size=65536, bwlimit=RATE).run()
    finally:
        ended.set()
        thread.join()
    assert report.elapsed >= get_least_time(SIZE, RATE)
    assert (tmp_path / "target").read_bytes() == data


def test_nobody_sleeps_with_a_lock(tmp_path, monkeypatch):
    """A run that waits for its turn keeps no other one from claiming its target."""
    data = write_pattern(tmp_path / "target", 100_000)

    class Clock:
        monotonic = staticmethod(lambda: 0.0)

        @staticmethod
        def sleep(seconds: float) -> None:
            with LocalFile(str(tmp_path / "target"), write=True) as other:
                assert other.claims.take("later")

    monkeypatch.setattr(pace, "time", Clock)
    monkeypatch.setattr(claims, "LOCK_TIMEOUT", 0)
    limit = pace.Limit(65536)
    with LocalFile(str(tmp_path / "target"), write=True) as file:
        assert file.claims.take("earlier")
        with pytest.raises(TakenOverError):
            file.write([Extent(0, 100_000)], limit.slow([data[:1000], data[1000:]]), run="earlier")


def test_comparing_is_not_limited(server, tmp_path):
    """Nothing moves, and digests are tiny."""
    write_pattern(tmp_path / "source", 8 * MEBIBYTE)
    write_pattern(tmp_path / "target", 8 * MEBIBYTE)
    report = copy((tmp_path / "source", server.location(tmp_path / "target")), "--bwlimit=1KiB")
    assert (report["blocks_changed"], report["bytes_moved"]) == (0, 0)


@pytest.mark.parametrize("arguments", [(), ("source", "target")], ids=["server", "client"])
@pytest.mark.parametrize("value", ["0", "1023", "-1", "x", "", "1e999"])
def test_limits_that_nobody_means_are_refused(tmp_path, arguments, value):
    """In one line, before anything is done."""
    (tmp_path / "source").write_bytes(b"x")
    result = run_pdiffcopy(f"--bwlimit={value}", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "--bwlimit" in line
    assert not (tmp_path / "target").exists()


def test_limits_from_python_are_checked(tmp_path):
    """Before anything is done, too."""
    write_pattern(tmp_path / "source", 10)
    for rate in (-5, 1023):
        with pytest.raises(UsageError, match="bandwidth"):
            Client(source=tmp_path / "source", target=tmp_path / "target", bwlimit=rate).run()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("rate", "workers", "largest"),
    [
        (0, 8, MAX_BLOCK_SIZE),
        (1024, 1, 4096),
        (100_000, 1, 25_000),
        (SLOW_RATE - 1, 1, SLOW_RATE // 4 - 1),
        (SLOW_RATE, 1, MAX_BLOCK_SIZE),
        (3 * SLOW_RATE, 3, MAX_BLOCK_SIZE),
        (10**9, 8, MAX_BLOCK_SIZE),
    ],
)
def test_slow_rates_take_few_workers_and_small_steps(rate, workers, largest):
    """So that something moves all the time on each connection."""
    words = dict.fromkeys(("delta_transfer", "dry_run", "fsync", "verify", "atomic", "perms", "times", "owner", "group",
                           "drop_cache"), False)  # fmt: skip
    options = Options(block_size=MEBIBYTE, concurrency=8, hash_method="sha1", sparse="auto", bwlimit=rate, **words)
    assert (options.workers, options.largest_move) == (workers, largest)


def test_benchmark_keeps_to_the_limit(server, tmp_path):
    """Each of its runs does."""
    write_pattern(tmp_path / "source", SIZE)
    places = (server.location(tmp_path / "source"), tmp_path / "target")
    env = {"PDIFFCOPY_BENCHMARK": "allowed"}
    result = run_pdiffcopy("--json", f"--bwlimit={RATE}", "--benchmark=1", "-b", "64KiB", *places, env=env)
    assert result.returncode == 0, result.stderr
    (measurement,) = json.loads(result.stdout.splitlines()[-1])["measurements"]
    assert measurement["runtime"] >= get_least_time(SIZE, RATE)


# What is left in memory {{{1


@pytest.fixture
def one_disk(tmp_path):
    """A real disk."""
    with ext4(tmp_path / "image", tmp_path / "disk", size=DISKS["ext4"]) as folder:
        yield folder


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    """Real disks of several kinds."""
    with disk_of_kind(request.param, tmp_path) as folder:
        yield folder


def write_cold(path: Path, size: int, changes: int = 0) -> None:
    """Write a file that differs in some blocks from the one without changes, and take it out of the page cache."""
    with path.open("wb") as file:
        for number in range(size // MEBIBYTE):
            file.write(make_data(MEBIBYTE, number + 1000 * (number < changes)))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert get_cached(path) == []


def get_cached(path: Path) -> list[int]:
    """The numbers of the pages of a file that are in the page cache."""
    with path.open("rb") as file:
        size = os.lseek(file.fileno(), 0, os.SEEK_END)
        pages = kernel.find_cached_pages(file.fileno(), 0, size)
    return [number for number, is_cached in enumerate(pages) if is_cached]


def heat(path: Path, *pages: int) -> None:
    """Bring some pages into the page cache, and no others."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for page in (*pages, *pages):  # what was read once is the first to go where memory is scarce
            os.pread(file.fileno(), 1, page * PAGE)
    assert get_cached(path) == sorted(pages)


def check_cached(path: Path, *pages: int) -> None:
    """
    See that these pages of a file are in the page cache, and no others.

    A machine that is short of memory may have taken some out, and one that is busy with a page may have kept it.
    """
    cached = set(get_cached(path))
    assert len(cached - set(pages)) <= 16
    assert len(cached & set(pages)) >= len(pages) // 2


HOT = (3, 4, 5, 300, 1000, 1001, 2047)
"""Pages that somebody else needs: in blocks that differ, and in others."""


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_page_cache_stays_as_it_was(server, disk, direction):
    """On both sides: what was there stays, and nothing else does."""
    source, target = disk / "source", disk / "target"
    write_cold(source, 8 * MEBIBYTE)
    write_cold(target, 8 * MEBIBYTE, changes=2)
    heat(source, *HOT)
    heat(target, *HOT)
    report = copy(get_places(server, direction, source, target), "--drop-cache")
    assert report["blocks_changed"] == 2
    check_cached(source, *HOT)
    check_cached(target, *HOT)
    assert source.read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    "options",
    [("-W",), ("-m", "sha1"), ("-b", "64KiB"), ("--fsync",), ("--atomic",), ("--sparse=never",), ("--bwlimit=16MiB",)],
    ids=" ".join,
)
@pytest.mark.parametrize("before", ["new", "old"])
@pytest.mark.parametrize("direction", ["local", "upload", "download"])
def test_other_ways_leave_the_page_cache_alone(server, one_disk, direction, before, options):
    """However a run goes about it."""
    source, target = one_disk / "source", one_disk / "target"
    write_cold(source, 6 * MEBIBYTE)
    with source.open("r+b") as file:
        file.truncate(7 * MEBIBYTE)  # ends with a hole
    if before == "old":
        write_cold(target, 4 * MEBIBYTE, changes=1)
    heat(source, *HOT[:-1])
    copy(get_places(server, direction, source, target), "--drop-cache", *options)
    check_cached(source, *HOT[:-1])
    check_cached(target)
    assert source.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dry_run_leaves_the_page_cache_alone(server, one_disk, direction):
    """It reads as much."""
    source, target = one_disk / "source", one_disk / "target"
    write_cold(source, 6 * MEBIBYTE)
    write_cold(target, 6 * MEBIBYTE, changes=1)
    copy(get_places(server, direction, source, target), "--drop-cache", "-n")
    check_cached(source)
    check_cached(target)


def test_page_cache_keeps_all_without_the_option(server, one_disk):
    """As ever."""
    source, target = one_disk / "source", one_disk / "target"
    write_cold(source, 6 * MEBIBYTE)
    copy((source, server.location(target)))
    assert len(get_cached(source)) > 1000 and len(get_cached(target)) > 1000


def test_without_the_option_nobody_looks(tmp_path, monkeypatch):
    """It costs nothing then."""
    for name in ("prepare", "find_missing_pages"):
        monkeypatch.setattr(pagecache, name, None if name == "prepare" else lambda fd, extents: iter(extents))
    data = write_pattern(tmp_path / "source", MEBIBYTE)
    monkeypatch.setattr(kernel, "find_cached_pages", None)
    Client(source=tmp_path / "source", target=tmp_path / "target").run()
    assert (tmp_path / "target").read_bytes() == data


def test_devices_are_left_alone_in_memory(tmp_path):
    """They have a page cache of their own, over that of what they lie on."""
    write_cold(tmp_path / "source", 4 * MEBIBYTE)
    (tmp_path / "image").write_bytes(bytes(4 * MEBIBYTE))
    with loop_device(tmp_path / "image") as device:
        os.sync()
        with open(device, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            heat(Path(device), 3)
            copy((tmp_path / "source", device), "--drop-cache")
            check_cached(Path(device), 3)
        assert Path(device).read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("direction", ["upload", "download"])
@pytest.mark.parametrize("options", [(), ("-n",)], ids=["copy", "dry run"])
def test_old_peers_are_too_old_for_it(launch_old, tmp_path, direction, options):
    """What is asked for on both sides isn't done on one of them: it's refused before anything is touched."""
    write_pattern(tmp_path / "source", 10)
    write_pattern(tmp_path / "target", 10, seed=2)
    before = snapshot(tmp_path / "target")
    places = get_places(launch_old(), direction, tmp_path / "source", tmp_path / "target")
    result = run_pdiffcopy("--drop-cache", *options, *places)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "is too old for --drop-cache" in line and "http://127.0.0.1" in line
    assert snapshot(tmp_path / "target") == before


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_server_that_can_not_see_it_says_so(launch, tmp_path, direction):
    """In one line, before anything is touched."""
    setup = "from pdiffcopy.files import kernel; kernel.find_cached_pages = lambda fd, offset, size: b'\\1'"
    write_pattern(tmp_path / "source", 10)
    write_pattern(tmp_path / "target", 10, seed=2)
    before = snapshot(tmp_path / "target")
    places = get_places(launch(setup=setup), direction, tmp_path / "source", tmp_path / "target")
    result = run_pdiffcopy("--drop-cache", *places)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "only its owner can" in line and "http://127.0.0.1" in line
    assert snapshot(tmp_path / "target") == before


def test_both_options_are_for_python_too(one_disk):
    """As properties of a client."""
    write_cold(one_disk / "source", 2 * MEBIBYTE)
    options = {"bwlimit": 100 * MEBIBYTE, "drop_cache": True}
    Client(source=one_disk / "source", target=one_disk / "target", **options).synchronize()
    check_cached(one_disk / "source")
    check_cached(one_disk / "target")
