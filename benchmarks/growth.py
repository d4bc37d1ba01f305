"""
How does it grow? Straight lines through the medians, and counted work instead of seconds.

A line tells how long a run takes however little there's to do, how much each GiB adds, and by how much the medians
deviate from being linear.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.bench import DOWNLOAD, UPLOAD, Case, Results, Sample
from benchmarks.contenders import DEFAULT, RSYNC_DELTA

GIBIBYTE = 1024**3


@dataclass(frozen=True)
class Line:
    """A straight line through medians."""

    name: str
    start: float
    """The seconds that a run takes without any work."""
    slope: float
    """The seconds that each GiB adds."""
    deviation: float
    """The largest distance between a median and the line, as a part of the median."""


@dataclass(frozen=True)
class Work:
    """How much of something there's to do."""

    name: str
    per_gib_compared: float
    per_gib_moved: float
    """What is done in addition for each GiB that differs."""


def fit_lines(results: Results, size: int) -> list[Line]:
    """Fit the time against the size of the file, and against the size of the delta."""
    lines: list[Line] = []
    for contender in (DEFAULT, RSYNC_DELTA):
        sizes = {case.size: case for case in results.samples if case.group == "scaling" and case.contender is contender}
        lines += _fit(results, f"{contender.name}, time against size (10 %)", sizes)
        deltas = {
            round(case.size * case.percent / 100): case
            for case in results.samples
            if case == replace(Case("delta", contender, size), percent=case.percent)
        }
        lines += _fit(results, f"{contender.name}, time against delta", deltas)
    return lines


def count_work(results: Results) -> list[Work]:
    """
    Count what a GiB more causes.

    Two sizes and two deltas are subtracted from each other, so that the start and the end of a run don't count.
    """
    counters: dict[str, Callable[[Sample], float]] = {
        "exchanges (requests)": lambda sample: sample.details["relay"]["exchanges"],
        "connections": lambda sample: sample.details["relay"]["connections"],
        "system calls of the client": lambda sample: sum(sample.details["system_calls"]["client"].values()),
        "system calls of the server": lambda sample: sum(sample.details["system_calls"]["server"].values()),
    }
    sizes = sorted({case.size for case in results.samples if case.group == "counts"})
    if len(sizes) != 2:
        return []
    gibibytes = (sizes[1] - sizes[0]) / GIBIBYTE
    work = []
    for direction in (DOWNLOAD, UPLOAD):
        for name, key in counters.items():
            counts = {
                (case.size, bool(case.percent)): (key(sample), sample.changed)
                for case, (sample, *_) in results.samples.items()
                if case.group == "counts" and case.direction == direction
            }
            if len(counts) == 4:
                (same_small, _), (same_large, _) = (counts[size, False] for size in sizes)
                (some_small, moved_small), (some_large, moved_large) = (counts[size, True] for size in sizes)
                compared = same_large - same_small
                moved = (some_large - some_small - compared) / ((moved_large - moved_small) / GIBIBYTE)
                work.append(Work(f"{direction}: {name}", compared / gibibytes, moved))
    return work


def _fit(results: Results, name: str, cases: dict[int, Case]) -> Sequence[Line]:
    """A line through the medians of cases by how many bytes they stand for, if there are enough of them."""
    if len(cases) < 3:
        return []
    points = [(x / GIBIBYTE, results.median(case) or 0.0) for x, case in sorted(cases.items())]
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    return [Line(name, start, slope, max(abs(start + slope * x - y) / y for x, y in points))]
