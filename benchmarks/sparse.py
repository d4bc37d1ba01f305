"""
What do holes cost?

Files of which little is anything else are compared with dense ones of the same contents, in time, memory, bytes and
room. They lie on a disk of their own, since most file systems don't allow files of 16 TiB.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import DOWNLOAD, LOOPBACK, UPLOAD, Bench, Case, Job
from benchmarks.contenders import DEFAULT
from benchmarks.disks import Disk
from benchmarks.files import MISSING, PAGES, SCATTERED, SparsePair, leave_holes, scatter
from benchmarks.servers import PdiffcopyServer, RelayServer, Server

TIME, MEMORY, BYTES = 4096, 16384, 20
"""How many times as large as its contents the file is: 1 TiB, 16 TiB and 100 GiB with 256 MiB, 1 GiB and 5 GiB."""
TIME_PART, BYTES_FACTOR = 4, 5
"""The contents are a part of the size that was asked for, or several times as much."""
WORK = ((MISSING, 100), (SCATTERED, 0))
"""The target is missing, or has the same contents."""
RELAY, COLD, TABLE = "relay, sparse", "disk, cold", "compressed"


def measure_sparse(bench: Bench, server: Server, unit: int) -> None:
    """
    Take the samples.

    :param unit: What all sizes follow from: 1 GiB, unless it has to be quick.
    """
    with Disk(bench.folder, (2 * BYTES_FACTOR + 2) * unit) as folder:
        _measure_time(bench, server, folder, unit // TIME_PART)
        _measure_memory(bench, folder, unit)
        _measure_bytes(bench, server, folder, BYTES_FACTOR * unit)
        _measure_pages(bench, server, folder, unit // TIME_PART)


def get_case(size: int, direction: str, layout: str, link: str = LOOPBACK) -> Case:
    """What is asked: about a target that is missing, or one that has the same contents."""
    return Case("sparse", DEFAULT, size, direction, layout, dict(WORK)[layout], link)


def _measure_time(bench: Bench, server: Server, folder: Path, total: int) -> None:
    pairs = [SparsePair(folder, f"time-{ratio}", total * ratio, scatter(total * ratio, total)) for ratio in (1, TIME)]
    for layout, _ in WORK:
        cases = [(get_case(pair.size, direction, layout), pair) for pair in pairs for direction in (DOWNLOAD, UPLOAD)]
        bench.run([Job(case, pair, server, rounds=bench.runs) for case, pair in cases])
    for pair in pairs:
        pair.remove()


def _measure_memory(bench: Bench, folder: Path, total: int) -> None:
    for ratio in (1, MEMORY):
        pair = SparsePair(folder, f"memory-{ratio}", total * ratio, scatter(total * ratio, total))
        for _ in range(min(2, bench.runs)):
            for layout, _ in WORK:
                for direction in (DOWNLOAD, UPLOAD):
                    # A server of its own each time: what an earlier client left in its memory doesn't count.
                    with PdiffcopyServer(bench.folder) as server:
                        bench.run([Job(get_case(pair.size, direction, layout), pair, server)])
        pair.remove()


def _measure_bytes(bench: Bench, server: Server, folder: Path, total: int) -> None:
    """What moves is counted on the wire, and what is read by the system: from the disk, if nothing is in memory."""
    pair = SparsePair(folder, "bytes", total * BYTES, scatter(total * BYTES, total))
    for direction in (DOWNLOAD, UPLOAD):
        with RelayServer(server) as relay:
            case = get_case(pair.size, direction, MISSING, RELAY)
            sample = bench.measure(Job(case, pair, relay))
            sample.details["relay"] = relay.get_counts()
        sample.details["room"] = pair.get_room()
        bench.results.add(case, sample)
        bench.run([Job(get_case(pair.size, direction, SCATTERED, COLD), pair, server, is_cold=True)])
    pair.remove()


def _measure_pages(bench: Bench, server: Server, folder: Path, size: int) -> None:
    """Pages with holes at their ends: all of them, and a tenth."""
    pair = SparsePair(folder, "pages", size, leave_holes(size))
    for layout, percent in ((MISSING, 100), (PAGES, 10)):
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("sparse", DEFAULT, size, direction, layout, percent, TABLE)
            sample = bench.measure(Job(case, pair, server))
            sample.details["room"] = pair.get_room()
            bench.results.add(case, sample)
    pair.remove()
