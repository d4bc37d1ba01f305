"""
What do many files cost?

Small ones, new and equal, and large ones of which a part differs, against rsync, and against one file of their size;
some over a long wire; and the memory that names take.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import DOWNLOAD, UPLOAD, Bench, Case, Job
from benchmarks.contenders import (
    DEFAULT,
    PDIFFCOPY,
    RSYNC,
    RSYNC_TREE,
    RSYNC_TREE_DELTA,
    RSYNC_TREE_EQUAL,
    TREE,
    Contender,
)
from benchmarks.files import BLOCK_SIZE, MISSING, SCATTERED, Pair
from benchmarks.servers import DELAY, PdiffcopyServer, Server, relayed
from benchmarks.trees import TreePair

SMALL_COUNT, LARGE_COUNT, LARGE_SIZE = 1000, 24, 64 * BLOCK_SIZE
FAR_COUNT, FAR_SIZE = 60, 6 * BLOCK_SIZE
"""How many files there are behind a long wire, and how many bytes each of them has."""
FEW, MANY = 100, 100_000
"""How many names there are."""
FEW_ROUNDS = 5
"""How often few names are brought into line: it's over so soon that not each process is looked at each time."""
LARGE, FAR, NO_CONTENTS = "large files", "files, 50 ms", "empty files"
GIBIBYTE = 1024**3

BOTH = (DOWNLOAD, UPLOAD)
Work = tuple[Contender, str, float, str]
"""A contender, what differs, how much of it, and how the work is called."""
SMALL_WORK: tuple[Work, ...] = (
    (TREE, MISSING, 100, "small files"),
    (RSYNC_TREE, MISSING, 100, "small files"),
    (TREE, SCATTERED, 0, "small files"),
    (RSYNC_TREE_EQUAL, SCATTERED, 0, "small files"),
)
LARGE_WORK, FAR_WORK = (((TREE, SCATTERED, 10, name), (RSYNC_TREE_DELTA, SCATTERED, 10, name)) for name in (LARGE, FAR))


def count_bytes(unit: int) -> tuple[int, int]:
    """
    How many bytes all small files have, and all large ones.

    :param unit: What all sizes follow from: 1 GiB, unless it has to be quick.
    """
    return SMALL_COUNT * unit // GIBIBYTE * BLOCK_SIZE, LARGE_COUNT * (LARGE_SIZE * unit // GIBIBYTE)


def count_far_bytes(unit: int) -> int:
    """How many bytes all of those have that are far away (see :func:`count_bytes`)."""
    return FAR_COUNT * (FAR_SIZE * unit // GIBIBYTE)


def count_names(unit: int) -> tuple[int, int]:
    """How many names there are the first and the second time (see :func:`count_bytes`)."""
    return FEW, MANY * unit // GIBIBYTE


def get_case(work: Work, size: int, direction: str) -> Case:
    """What is asked."""
    contender, layout, percent, name = work
    return Case("many", contender, size, direction, layout, percent, name)


def get_single_case(unit: int, direction: str) -> Case:
    """The same about one file that is as large as all large ones."""
    return Case("many", DEFAULT, count_bytes(unit)[1], direction)


def get_names_case(count: int, direction: str) -> Case:
    """How much memory do so many names take?"""
    return Case("many", TREE, count, direction, percent=0, link=NO_CONTENTS)


def measure_many(bench: Bench, servers: dict[str, Server], unit: int) -> None:
    """Take the samples (see :func:`count_bytes` for the sizes)."""
    small, large = count_bytes(unit)
    pair = TreePair(bench.folder, "small-files", small // BLOCK_SIZE, BLOCK_SIZE)
    _run(bench, servers, pair, SMALL_WORK)
    pair.remove()
    pair = TreePair(bench.folder, "large-files", LARGE_COUNT, large // LARGE_COUNT)
    one = Pair(bench.folder, "one-file", large)
    singles = [Job(get_single_case(unit, way), one, servers[PDIFFCOPY], bench.runs) for way in BOTH]
    _run(bench, servers, pair, LARGE_WORK, singles)
    pair.remove()
    one.remove()
    pair = TreePair(bench.folder, "far-files", FAR_COUNT, count_far_bytes(unit) // FAR_COUNT)
    with relayed(servers, DELAY) as far:
        _run(bench, far, pair, FAR_WORK)
    pair.remove()
    _measure_names(bench, bench.folder, unit)


def _run(
    bench: Bench, servers: dict[str, Server], pair: TreePair, works: tuple[Work, ...], more: list[Job] | None = None
) -> None:
    jobs = list(more or [])
    for direction in BOTH:
        for work in works:
            server = servers.get(RSYNC if work[0].server == RSYNC else PDIFFCOPY)
            if server:
                jobs.append(Job(get_case(work, pair.size, direction), pair, server, bench.runs))
    bench.run(jobs)


def _measure_names(bench: Bench, folder: Path, unit: int) -> None:
    for count in count_names(unit):
        pair = TreePair(folder, f"names-{count}", count, 0)
        for direction in BOTH:
            # A server of its own each time: what an earlier client left in its memory doesn't count.
            with PdiffcopyServer(folder) as server:
                rounds = FEW_ROUNDS if count == FEW else 1
                bench.run([Job(get_names_case(count, direction), pair, server, rounds)])
        pair.remove()
