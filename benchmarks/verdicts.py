"""
Which ratios are promised, and which of them hold?

Each promise is a row: the work, what it's measured against, and how large the ratio of the medians may be at most.
A row that can be measured in several ways (hash methods, directions, layouts) counts by its worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.bench import DOWNLOAD, UPLOAD, Case, Results, Sample
from benchmarks.contenders import (
    BLAKE3,
    IMPORT_REQUESTS,
    LIMIT_SHA1,
    RSYNC_DELTA,
    RSYNC_WHOLE,
    SHA1,
    WHOLE,
    WHOLE_UNVERIFIED,
    XXH128,
    Contender,
)
from benchmarks.files import MISSING, PREFIX, SCATTERED
from benchmarks.groups import LINKS, LONG_RELAY, MEMORY_PERCENT, MEMORY_RATIO, PERCENTAGES, RELAY, SMALL_SIZE

Ratios = Iterator[tuple[str, "float | None"]]


@dataclass(frozen=True)
class Verdict:
    """A row of the table."""

    work: str
    against: str
    limit: float
    """How large the ratio may be at most."""
    cases: dict[str, float]
    """What was measured, by what was varied."""

    @property
    def measured(self) -> float | None:
        """The worst case, :data:`None` when nothing was measured."""
        return max(self.cases.values(), default=None)

    @property
    def text(self) -> str:
        """The verdict in a word or two."""
        if self.measured is None:
            return "not measured"
        return "holds" if self.measured <= self.limit else "MISSED"


def judge(results: Results, size: int, memory_size: int) -> list[Verdict]:
    """
    Compare what was measured with what is promised.

    :param size: The size of the large files in bytes.
    :param memory_size: The size of the smaller one of the files whose memory is compared.
    """
    ratios = _Ratios(results, size, memory_size)
    rows: list[tuple[str, str, float, Callable[[], Ratios]]] = [
        ("nothing changed, xxh128", "rsync --inplace delta", 0.55, ratios.nothing_changed),
        ("10 % scattered, xxh128", "the better of rsync delta and rsync -W", 0.50, ratios.tenth_fast),
        ("10 % scattered, sha1", "rsync delta", 0.30, ratios.tenth_default),
        ("100 %, xxh128, verified", "rsync -W", 0.85, ratios.all_changed),
        ("whole file, target missing, verified", "rsync -W", 0.85, ratios.whole),
        ("whole file, target missing, --no-verify", "rsync -W", 0.65, ratios.whole_unverified),
        # Which hash the "one more" is, is open: the strict reading is the cheap one that verification really uses.
        ("any delta, sha1, verified", "limit: hash both, copy, one more sha1", 1.30, partial(ratios.limit, "same")),
        ("any delta, sha1, verified", "limit: hash both, copy, one more xxh128", 1.30, partial(ratios.limit, "xxh128")),
        ("upload", "the same download", 1.25, ratios.upload),
        ("10 MiB, nothing changed", 'python -c "import requests"', 2.0, ratios.small),
        ("bytes on the wire, 10 %", "the changed bytes", 1.01, ratios.wire),
        # No method is promised here. What sha1 alone takes on two cores is close to what the wire takes.
        ("1 Gbit/s link, 10 % scattered, xxh128", "changed bytes / bandwidth", 1.25, partial(ratios.link, XXH128)),
        ("1 Gbit/s link, 10 % scattered, sha1", "changed bytes / bandwidth", 1.25, partial(ratios.link, SHA1)),
        ("50 ms round trip, 10 % scattered", "the same without delay", 2.0, ratios.long),
        (f"memory, {MEMORY_RATIO} times the file", "the file", 1.05, ratios.memory),
    ]
    return [
        Verdict(work, against, limit, {name: ratio for name, ratio in measure() if ratio is not None})
        for work, against, limit, measure in rows
    ]


def get_limit_seconds(results: Results, case: Case, one_more: str = "xxh128") -> float | None:
    """
    The time of a limit.

    :param case: The case of the limit.
    :param one_more: What the changed part is hashed with once more after it was moved: ``xxh128`` (what verification
                     uses, the strict reading), ``same`` (the method that the files are hashed with) or nothing.
    """

    def get_seconds(sample: Sample) -> float:
        steps = sample.details["steps"]
        if one_more == "xxh128":
            return sample.wall
        again = steps["hash"] * sample.changed / (2 * case.size) if one_more == "same" else 0
        return sample.wall - steps["verify"] + again

    return results.median(case, get_seconds)


class _Ratios:
    """One method a promise: a generator of what was varied and the ratio (or None when it wasn't measured)."""

    def __init__(self, results: Results, size: int, memory_size: int):
        self.results = results
        self.size = size
        self.memory_size = memory_size
        self.delta = Case("delta", XXH128, size)

    def compare(self, case: Case, *others: Case) -> float | None:
        """The ratio of the medians of a case and of the best of some others."""
        return _divide(self.results.median(case), _least(map(self.results.median, others)))

    def nothing_changed(self) -> Ratios:
        case = replace(self.delta, percent=0)
        yield "download", self.compare(case, replace(case, contender=RSYNC_DELTA))

    def tenth_fast(self) -> Ratios:
        rivals = [replace(self.delta, contender=contender) for contender in (RSYNC_DELTA, RSYNC_WHOLE)]
        yield "download", self.compare(self.delta, *rivals)

    def tenth_default(self) -> Ratios:
        case = replace(self.delta, contender=SHA1)
        yield "download", self.compare(case, replace(case, contender=RSYNC_DELTA))

    def all_changed(self) -> Ratios:
        for layout in (SCATTERED, PREFIX):
            case = replace(self.delta, percent=100, layout=layout)
            yield layout, self.compare(case, replace(case, contender=RSYNC_WHOLE))

    def whole(self) -> Ratios:
        case = Case("whole", WHOLE, self.size, layout=MISSING, percent=100)
        yield "download", self.compare(case, replace(case, contender=RSYNC_WHOLE))

    def whole_unverified(self) -> Ratios:
        case = Case("whole", WHOLE_UNVERIFIED, self.size, layout=MISSING, percent=100)
        yield "download", self.compare(case, replace(case, contender=RSYNC_WHOLE))

    def limit(self, one_more: str) -> Ratios:
        for percent in PERCENTAGES:
            for layout in (SCATTERED, PREFIX):
                for direction in (DOWNLOAD, UPLOAD):
                    case = replace(self.delta, contender=SHA1, percent=percent, layout=layout, direction=direction)
                    bare = replace(case, contender=LIMIT_SHA1, direction=DOWNLOAD)
                    limit = get_limit_seconds(self.results, bare, one_more)
                    yield f"{direction}, {percent} % {layout}", _divide(self.results.median(case), limit)

    def upload(self) -> Ratios:
        for case in list(self.results.samples):
            if case.group in ("delta", "whole") and case.direction == UPLOAD and case.contender.server == "pdiffcopy":
                name = f"{case.contender.name}, {case.percent:g} % {case.layout}"
                yield name, self.compare(case, replace(case, direction=DOWNLOAD))

    def small(self) -> Ratios:
        base = Case("small", IMPORT_REQUESTS, SMALL_SIZE, percent=0)
        for contender in (SHA1, XXH128, BLAKE3):
            yield contender.name, self.compare(replace(base, contender=contender), base)

    def wire(self) -> Ratios:
        for contender in (SHA1, XXH128):
            for direction in (DOWNLOAD, UPLOAD):
                case = Case("wire", contender, self.size, direction, link=RELAY)
                yield f"{contender.name}, {direction}", self.results.median(case, _get_wire_share)

    def link(self, contender: Contender) -> Ratios:
        name = "1 Gbit/s"
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("links", contender, self.size, direction, link=name)
            seconds = self.results.median(case, lambda sample: sample.changed * 8 / LINKS[name])
            yield direction, _divide(self.results.median(case), seconds)

    def long(self) -> Ratios:
        for contender in (SHA1, XXH128):
            for direction in (DOWNLOAD, UPLOAD):
                case = Case("long", contender, self.size, direction, link=LONG_RELAY)
                yield f"{contender.name}, {direction}", self.compare(case, replace(case, link=RELAY))

    def memory(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            small = Case("memory", XXH128, self.memory_size, direction, percent=MEMORY_PERCENT)
            large = replace(small, size=MEMORY_RATIO * self.memory_size)
            for side in ("client", "server"):
                peaks = [self.results.median(case, _Peak(side)) for case in (large, small)]
                yield f"{side}, {direction}", _divide(*peaks)


class _Peak:
    """The peak memory of a side, as a key of a sample."""

    def __init__(self, side: str):
        self.side = side

    def __call__(self, sample: Sample) -> float:
        return sample.client_memory if self.side == "client" else sample.server_memory


def _get_wire_share(sample: Sample) -> float:
    counts = sample.details["relay"]
    return (counts["sent"] + counts["received"]) / sample.changed


def _divide(dividend: float | None, divisor: float | None) -> float | None:
    return dividend / divisor if dividend and divisor else None


def _least(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return min(present) if present else None
