"""
Which ratios are promised, and which of them hold?

Each promise is a row: the work, what it's measured against, and how large the ratio of the medians may be at most.
A row that can be measured in several ways (directions, layouts) counts by its worst case. All work is done with no
option but the locations, unless the row names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import many, sparse
from benchmarks.bench import DOWNLOAD, LOOPBACK, UPLOAD, Case, Results, Sample
from benchmarks.contenders import (
    ATOMIC,
    DEFAULT,
    IMPORT_REQUESTS,
    RATE,
    READERS,
    RSYNC_DELTA,
    RSYNC_WHOLE,
    XXH128,
    Contender,
)
from benchmarks.files import MISSING, PAGE_SIZE, PAGES, SCATTERED
from benchmarks.groups import (
    COLD_DISK,
    CUBIC,
    HTTPS,
    LINKS,
    LONG_RELAY,
    MEMORY_RATIO,
    RELAY,
    RIVALS,
    SLOW_STORAGE,
    SMALL_SIZE,
)

PIECE_SIZE = 16 * 1024
"""What has to move for a page that has changed, in bytes."""

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
    nothing, tenth, everything = (partial(ratios.delta, percent) for percent in (0, 10, 100))
    missing = partial(ratios.delta, 100, layout=MISSING, rivals=[RSYNC_WHOLE])
    small, large = many.count_bytes(memory_size)
    new, equal = (partial(ratios.files, many.SMALL_WORK[i : i + 2], small) for i in (0, 2))
    changed = partial(ratios.files, many.LARGE_WORK, large)
    far = partial(ratios.files, many.FAR_WORK, many.count_far_bytes(memory_size))
    rows: list[tuple[str, str, float, Callable[[], Ratios]]] = [
        ("nothing changed", "the better rsync", 0.70, nothing),
        ("nothing changed, cubic", "the better rsync", 0.70, partial(nothing, link=CUBIC)),
        ("nothing changed, -m xxh128", "the better rsync", 0.45, partial(nothing, contender=XXH128)),
        ("10 % scattered MiBs", "the better rsync", 0.60, tenth),
        ("10 % scattered MiBs, cubic", "the better rsync", 0.75, partial(tenth, link=CUBIC)),
        ("100 %, verified", "rsync -W", 0.80, partial(everything, rivals=[RSYNC_WHOLE])),
        ("100 %, verified, cubic", "rsync -W", 1.05, partial(everything, rivals=[RSYNC_WHOLE], link=CUBIC)),
        ("missing target, verified", "rsync -W", 0.65, missing),
        ("missing target, verified, cubic", "rsync -W", 0.65, partial(missing, link=CUBIC)),
        ("a page in each tenth MiB, bytes on the wire", "the pages, as 16 KiB each", 1.5, ratios.page_wire),
        ("a page in each tenth MiB", "rsync delta", 0.25, partial(ratios.delta, 10, PAGES, rivals=[RSYNC_DELTA])),
        ("a page in each tenth MiB, 1 Gbit/s", "rsync delta", 0.4, partial(ratios.page_link, "1 Gbit/s")),
        ("a page in each tenth MiB, 50 Mbit/s", "rsync delta", 0.9, partial(ratios.page_link, "50 Mbit/s")),
        ("https, 100 % and missing", "the same over http", 2.0, ratios.https),
        ("cold, 1 ms a read, nothing changed", "32 readers of 1 MiB", 1.3, partial(ratios.cold, SLOW_STORAGE, READERS)),
        ("cold on the disk, nothing changed", "rsync delta", 0.5, partial(ratios.cold, COLD_DISK, RSYNC_DELTA)),
        ("10 MiB, nothing changed", 'python -c "import requests"', 1.3, ratios.small),
        ("--bwlimit, missing target", "the limit (or the reverse)", 1.05, ratios.bwlimit),
        ("upload", "the same download", 1.25, ratios.upload),
        ("bytes on the wire, 10 %", "the changed bytes", 1.01, ratios.wire),
        ("1 Gbit/s link, 10 % scattered MiBs", "changed bytes / bandwidth", 1.25, ratios.link),
        ("50 ms round trip, 10 % scattered MiBs", "the same without delay", 2.0, ratios.long),
        (f"memory, {MEMORY_RATIO} times the file", "the file", 1.05, ratios.memory),
        ("1 TiB with 256 MiB of data, missing and equal", "256 MiB without holes", 3.0, ratios.sparse_time),
        ("16 TiB with 1 GiB of data, memory", "1 GiB without holes", 1.1, ratios.sparse_memory),
        ("100 GiB with 5 GiB of data, bytes moved, and read a side", "the data", 1.02, ratios.sparse_bytes),
        ("100 GiB with 5 GiB of data, room", "the source", 1.01, ratios.sparse_room),
        ("compressed pages, whole and delta, room", "the source", 1.02, ratios.page_room),
        ("--atomic with clones, 10 % scattered MiBs", "in place", 1.15, ratios.atomic),
        (f"{many.SMALL_COUNT} files of 1 MiB, new", "rsync -r", 1.3, new),
        (f"{many.SMALL_COUNT} files of 1 MiB, equal", "rsync -r -I", 1.5, equal),
        (f"{many.LARGE_COUNT} files of 64 MiB, 10 %", "rsync -r -I --no-whole-file", 0.35, changed),
        (f"{many.LARGE_COUNT} files of 64 MiB, 10 %", "one file of that size", 1.15, ratios.single_file),
        (f"{many.FAR_COUNT} files of 6 MiB, 10 %, 50 ms", "rsync -r -I --no-whole-file", 4.0, far),
        (f"memory, {many.MANY:,} names and {many.FEW}", "100 MiB more", 1.0, ratios.names),
    ]
    return [
        Verdict(work, against, limit, {name: ratio for name, ratio in measure() if ratio is not None})
        for work, against, limit, measure in rows
    ]


class _Ratios:
    """One method a promise: a generator of what was varied and the ratio (or None when it wasn't measured)."""

    def __init__(self, results: Results, size: int, memory_size: int):
        self.results = results
        self.size = size
        self.memory_size = memory_size

    def compare(self, case: Case, *others: Case) -> float | None:
        """The ratio of the medians of a case and of the best of some others."""
        return _divide(self.results.median(case), _least(map(self.results.median, others)))

    def delta(
        self, percent: float, layout: str = SCATTERED, contender: Contender = DEFAULT,
        rivals: Iterable[Contender] = RIVALS, link: str = LOOPBACK,
    ) -> Ratios:  # fmt: skip
        case = Case("delta", contender, self.size, layout=layout, percent=percent, link=link)
        yield "download", self.compare(case, *(replace(case, contender=rival) for rival in rivals))

    def page_wire(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("wire", DEFAULT, self.size, direction, PAGES, 10, RELAY)
            share = self.results.median(case, _get_wire_share)
            yield direction, _divide(share, PIECE_SIZE / PAGE_SIZE)

    def page_link(self, name: str) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("links", DEFAULT, self.size, direction, PAGES, link=name)
            yield direction, self.compare(case, replace(case, contender=RSYNC_DELTA))

    def https(self) -> Ratios:
        for layout in (SCATTERED, MISSING):
            for direction in (DOWNLOAD, UPLOAD):
                case = Case("https", DEFAULT, self.size, direction, layout, 100, HTTPS)
                yield f"{direction}, {layout}", self.compare(case, replace(case, link=LOOPBACK))

    def cold(self, link: str, rival: Contender) -> Ratios:
        case = Case("cold", DEFAULT, self.size, percent=0, link=link)
        yield "download", self.compare(case, replace(case, contender=rival))

    def upload(self) -> Ratios:
        for case in list(self.results.samples):
            if case.group == "delta" and case.direction == UPLOAD and case.contender is DEFAULT:
                yield f"{case.percent:g} % {case.layout}", self.compare(case, replace(case, direction=DOWNLOAD))

    def small(self) -> Ratios:
        case = Case("small", DEFAULT, SMALL_SIZE, percent=0)
        yield "download", self.compare(case, replace(case, contender=IMPORT_REQUESTS))

    def bwlimit(self) -> Ratios:
        for case in list(self.results.samples):
            if case.group == "manners":
                # Not how long the program takes to start.
                seconds = self.results.median(case, lambda sample: sample.details["report"]["elapsed"])
                ratio = _divide(seconds, case.size / RATE)
                # Too fast is as bad as too slow.
                yield f"{case.contender.name}, {case.work}", ratio and max(ratio, 1 / ratio)

    def wire(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("wire", DEFAULT, self.size, direction, link=RELAY)
            yield direction, self.results.median(case, _get_wire_share)

    def link(self) -> Ratios:
        name = "1 Gbit/s"
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("links", DEFAULT, self.size, direction, link=name)
            seconds = self.results.median(case, lambda sample: sample.changed * 8 / LINKS[name])
            yield direction, _divide(self.results.median(case), seconds)

    def long(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("long", DEFAULT, self.size, direction, link=LONG_RELAY)
            yield direction, self.compare(case, replace(case, link=RELAY))

    def memory(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            small = Case("memory", DEFAULT, self.memory_size, direction, percent=100)
            yield from self._compare_peaks(replace(small, size=MEMORY_RATIO * self.memory_size), small)

    def _compare_peaks(self, large: Case, small: Case) -> Ratios:
        for side in ("client", "server"):
            peaks = [self.results.median(case, partial(_get_peak, side)) for case in (large, small)]
            yield f"{side}, {large.work}", _divide(*peaks)

    def sparse_time(self) -> Ratios:
        total = self.memory_size // sparse.TIME_PART
        for dense in self._get_sparse_cases(total):
            yield dense.work, self.compare(replace(dense, size=total * sparse.TIME), dense)

    def sparse_memory(self) -> Ratios:
        for dense in self._get_sparse_cases(self.memory_size):
            yield from self._compare_peaks(replace(dense, size=self.memory_size * sparse.MEMORY), dense)

    def sparse_bytes(self) -> Ratios:
        total = self.memory_size * sparse.BYTES_FACTOR
        for direction in (DOWNLOAD, UPLOAD):
            case = sparse.get_case(total * sparse.BYTES, direction, MISSING, sparse.RELAY)
            yield f"moved, {case.work}", self.results.median(case, _get_wire_share)
            case = sparse.get_case(total * sparse.BYTES, direction, SCATTERED, sparse.COLD)
            for side in ("client", "server"):
                yield f"asked for by the {side}, {case.work}", self._get_share(case, side, "read", total)
                yield f"read from its disk by the {side}, {case.work}", self._get_share(case, side, "fetched", total)

    def _get_share(self, case: Case, side: str, name: str, total: int) -> float | None:
        return _divide(self.results.median(case, lambda sample: getattr(getattr(sample, side), name)), total)

    def sparse_room(self) -> Ratios:
        size = self.memory_size * sparse.BYTES_FACTOR * sparse.BYTES
        for direction in (DOWNLOAD, UPLOAD):
            case = sparse.get_case(size, direction, MISSING, sparse.RELAY)
            yield case.work, self.results.median(case, _get_room)

    def page_room(self) -> Ratios:
        for case in list(self.results.samples):
            if case.link == sparse.TABLE:
                yield case.work, self.results.median(case, _get_room)

    def atomic(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            case = Case("atomic", ATOMIC, self.memory_size, direction)
            yield direction, self.compare(case, replace(case, contender=DEFAULT))

    def files(self, works: Sequence[many.Work], size: int) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            ours, theirs = (many.get_case(work, size, direction) for work in works)
            yield direction, self.compare(ours, theirs)

    def single_file(self) -> Ratios:
        _, size = many.count_bytes(self.memory_size)
        for direction in (DOWNLOAD, UPLOAD):
            ours = many.get_case(many.LARGE_WORK[0], size, direction)
            yield direction, self.compare(ours, many.get_single_case(self.memory_size, direction))

    def names(self) -> Ratios:
        for direction in (DOWNLOAD, UPLOAD):
            few, more = (many.get_names_case(count, direction) for count in many.count_names(self.memory_size))
            for side in ("client", "server"):
                peaks = [self.results.largest(case, partial(_get_peak, side)) for case in (few, more)]
                if peaks[0] is not None and peaks[1] is not None:
                    yield f"{side}, {direction}", max(peaks[1] - peaks[0], 0) / (100 * 1024**2)

    def _get_sparse_cases(self, size: int) -> Iterator[Case]:
        for layout, _ in sparse.WORK:
            for direction in (DOWNLOAD, UPLOAD):
                yield sparse.get_case(size, direction, layout)


def _get_peak(side: str, sample: Sample) -> float:
    """The peak memory of a side, as a key of a sample."""
    return sample.client.memory if side == "client" else sample.server.memory


def _get_room(sample: Sample) -> float:
    return sample.details["room"]


def _get_wire_share(sample: Sample) -> float:
    counts = sample.details["relay"]
    return (counts["sent"] + counts["received"]) / sample.changed


def _divide(dividend: float | None, divisor: float | None) -> float | None:
    return dividend / divisor if dividend and divisor else None


def _least(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return min(present) if present else None
