"""
What is measured?

Each group is a function that takes its samples with a :class:`.Bench`. A group that can't do its work here (because a
program or a permission is missing) raises :exc:`UnavailableError`, which says why.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.bench import DOWNLOAD, LOOPBACK, UPLOAD, Bench, Case, Job
from benchmarks.contenders import (
    BLAKE3,
    IMPORT_REQUESTS,
    LIMIT_BLAKE3,
    LIMIT_COPY,
    LIMIT_SHA1,
    LIMIT_XXH128,
    PDIFFCOPY,
    RSYNC,
    RSYNC_DELTA,
    RSYNC_WHOLE,
    SHA1,
    WHOLE,
    WHOLE_UNVERIFIED,
    XXH128,
    Contender,
)
from benchmarks.files import MISSING, PREFIX, SCATTERED, Pair, SparsePair
from benchmarks.links import Link, LinkUnavailableError
from benchmarks.servers import PdiffcopyServer, RelayServer, RsyncDaemon, Server, TracedServer

MEBIBYTE, GIBIBYTE = 1024**2, 1024**3
PERCENTAGES = (0, 1, 10, 50, 100)
SMALL_SIZE = 10 * MEBIBYTE
LINKS = {"1 Gbit/s": 10**9, "100 Mbit/s": 10**8}
"""The bandwidths in bits per second."""
DELAY = 0.025
"""How long a byte is on the long wire, in seconds."""
RELAY, LONG_RELAY = "relay", "relay, 50 ms"
MEMORY_PERCENT = 1
MEMORY_RATIO = 16
"""How much larger the larger one of the two files is whose memory is compared."""

BOTH = (DOWNLOAD, UPLOAD)


class UnavailableError(Exception):
    """Raised when a group can't do its work on this machine."""


class Suite:
    """The groups, and what they share: the large files and the servers on loopback."""

    def __init__(self, bench: Bench, servers: dict[str, Server], memory_size: int):
        """
        Initialize a suite.

        :param bench: Who takes the samples.
        :param servers: The servers on loopback, by what a contender wants (without rsync when there's none).
        :param memory_size: The size of the smaller file whose memory is compared, in bytes.
        """
        self.bench = bench
        self.servers = servers
        self.memory_size = memory_size
        self.groups: dict[str, Callable[[], None]] = {
            "delta": self.delta,
            "whole": self.whole,
            "small": self.small,
            "scaling": self.scaling,
            "wire": self.wire,
            "links": self.links,
            "long": self.long,
            "memory": self.memory,
        }
        self._pair: Pair | None = None

    @property
    def pair(self) -> Pair:
        """The large files (made when they're first needed)."""
        if not self._pair:
            self._pair = Pair(self.bench.folder, "large", self.bench.size)
        return self._pair

    def delta(self) -> None:
        """Changes of 0 to 100 % in both layouts and directions, against rsync and the limits."""
        jobs = []
        few, some = min(2, self.bench.runs), min(3, self.bench.runs)
        for percent in PERCENTAGES:
            for contender in (RSYNC_DELTA, RSYNC_WHOLE, SHA1, XXH128, LIMIT_SHA1, LIMIT_XXH128):
                # rsync takes long to find little in common, and varies little: two rounds of that have to do.
                rounds = few if contender is RSYNC_DELTA and percent >= 50 else self.bench.runs
                jobs += self._jobs("delta", contender, percent=percent, rounds=rounds)
            for contender in (SHA1, XXH128):
                jobs += self._jobs("delta", contender, percent=percent, direction=UPLOAD, rounds=some)
            jobs += self._jobs("delta", BLAKE3, percent=percent, rounds=few)
        jobs += self._jobs("delta", LIMIT_BLAKE3, percent=0, rounds=few)
        for contender in (RSYNC_DELTA, RSYNC_WHOLE):
            jobs += self._jobs("delta", contender, direction=UPLOAD, rounds=few)
        for percent in PERCENTAGES[1:]:
            for contender in (RSYNC_DELTA, RSYNC_WHOLE, SHA1, XXH128, LIMIT_SHA1):
                jobs += self._jobs("delta", contender, layout=PREFIX, percent=percent, rounds=few)
        for contender in (SHA1, XXH128):
            jobs += self._jobs("delta", contender, layout=PREFIX, direction=UPLOAD, rounds=few)
        self.bench.run(jobs)

    def whole(self) -> None:
        """Copies of the whole file, to a target that is missing and to one that differs everywhere."""
        jobs = []
        for layout in (MISSING, SCATTERED):
            for contender in (RSYNC_WHOLE, WHOLE, WHOLE_UNVERIFIED):
                rounds = self.bench.runs if layout == MISSING else min(3, self.bench.runs)
                for direction in BOTH if contender is not RSYNC_WHOLE else (DOWNLOAD,):
                    jobs += self._jobs("whole", contender, layout=layout, percent=100, direction=direction,
                                       rounds=rounds)  # fmt: skip
        jobs += self._jobs("whole", LIMIT_COPY, layout=MISSING, percent=100)
        self.bench.run(jobs)

    def small(self) -> None:
        """A small file without changes, against the start of a Python program that only imports requests."""
        pair = Pair(self.bench.folder, "small", SMALL_SIZE)
        jobs = []
        for contender in (IMPORT_REQUESTS, SHA1, XXH128, BLAKE3, RSYNC_DELTA):
            jobs += self._jobs("small", contender, pair=pair, percent=0, rounds=4 * self.bench.runs)
        self.bench.run(jobs)

    def scaling(self) -> None:
        """The time for an eighth, a quarter, a half and all of the size, and how much work a GiB more is."""
        jobs, pairs = [], []
        for divisor in (8, 4, 2):
            pairs.append(Pair(self.bench.folder, f"part-{divisor}", self.bench.size // divisor))
        for pair in (*pairs, self.pair):
            for contender in (SHA1, XXH128, RSYNC_DELTA):
                jobs += self._jobs("scaling", contender, pair=pair, rounds=min(3, self.bench.runs))
        self.bench.run(jobs)
        if not shutil.which("strace"):
            raise UnavailableError("strace isn't installed: system calls aren't counted")
        for pair in (pairs[0], pairs[-1]):
            for direction in BOTH:
                for percent in (0, 10):
                    self._count_work(pair, direction, percent)

    def _count_work(self, pair: Pair, direction: str, percent: float) -> None:
        """Count system calls and exchanges (that is slow: nothing of the time is to be believed)."""
        summaries = {side: self.bench.folder / f"strace-{side}.txt" for side in ("client", "server")}
        prefix = ["strace", "-f", "-c", "-o", str(summaries["client"])]
        case = Case("counts", SHA1, pair.size, direction, percent=percent, link="relay, strace")
        with TracedServer(self.bench.folder, summaries["server"]) as server, RelayServer(server) as relay:
            sample = self.bench.measure(Job(case, pair, relay, prefix=prefix))
            sample.details["relay"] = relay.get_counts()
        sample.details["system_calls"] = {side: parse_strace(path) for side, path in summaries.items()}
        self.bench.results.add(case, sample)

    def wire(self) -> None:
        """The bytes on the wire."""
        for direction in BOTH:
            for percent in (0, 10):
                for contender in (SHA1, XXH128):
                    case = Case("wire", contender, self.pair.size, direction, percent=percent, link=RELAY)
                    with RelayServer(self.servers[contender.server]) as relay:
                        sample = self.bench.measure(Job(case, self.pair, relay))
                        sample.details["relay"] = relay.get_counts()
                    self.bench.results.add(case, sample)

    def links(self) -> None:
        """Wires of a limited bandwidth."""
        for name, bandwidth in LINKS.items():
            # At 100 Mbit/s a round takes minutes, and the wire leaves little room for anything else to matter.
            rounds = min(3 if bandwidth >= 10**9 else 1, self.bench.runs)
            with self._linked(bandwidth) as (link, servers):
                jobs = []
                for contender in (SHA1, XXH128, RSYNC_DELTA):
                    for direction in BOTH if contender is not RSYNC_DELTA else (DOWNLOAD,):
                        jobs += self._jobs("links", contender, direction=direction, rounds=rounds, link=name,
                                           servers=servers, prefix=link.client_prefix)  # fmt: skip
                self.bench.run(jobs)

    @contextmanager
    def _linked(self, bandwidth: int) -> Iterator[tuple[Link, dict[str, Server]]]:
        with ExitStack() as stack:
            try:
                link = stack.enter_context(Link(bandwidth))
            except LinkUnavailableError as e:
                raise UnavailableError(f"no network namespaces here ({e})") from e
            kinds = {PDIFFCOPY: PdiffcopyServer, RSYNC: RsyncDaemon}
            servers = {
                kind: stack.enter_context(kinds[kind](self.bench.folder, link.server_address, link.server_prefix))
                for kind in self.servers
            }
            yield link, servers

    def long(self) -> None:
        """A long wire, against a short one with the same relay in between."""
        jobs = []
        with ExitStack() as stack:
            for name, delay in ((RELAY, 0.0), (LONG_RELAY, DELAY)):
                servers: dict[str, Server] = {
                    kind: stack.enter_context(RelayServer(server, delay)) for kind, server in self.servers.items()
                }
                for contender in (SHA1, XXH128, RSYNC_DELTA):
                    for direction in BOTH if contender is not RSYNC_DELTA else (DOWNLOAD,):
                        jobs += self._jobs("long", contender, direction=direction, link=name, servers=servers,
                                           rounds=min(3, self.bench.runs))  # fmt: skip
            self.bench.run(jobs)

    def memory(self) -> None:
        """The peak memory for a file, and for one that is :data:`MEMORY_RATIO` times as large (mostly holes)."""
        pairs = [
            SparsePair(self.bench.folder, f"sparse-{ratio}", self.memory_size * ratio, MEMORY_PERCENT)
            for ratio in (1, MEMORY_RATIO)
        ]
        for _ in range(min(2, self.bench.runs)):
            for direction in BOTH:
                for pair in pairs:
                    # A server of its own each time: what an earlier client left in its memory doesn't count.
                    with PdiffcopyServer(self.bench.folder) as server:
                        case = Case("memory", XXH128, pair.size, direction, percent=MEMORY_PERCENT)
                        self.bench.run([Job(case, pair, server)])
        for pair in pairs:
            pair.remove()

    def _jobs(
        self, group: str, contender: Contender, pair: Pair | None = None, direction: str = DOWNLOAD,
        layout: str = SCATTERED, percent: float = 10, rounds: int = 0, link: str = LOOPBACK,
        servers: dict[str, Server] | None = None, prefix: list[str] | None = None,
    ) -> list[Job]:  # fmt: skip
        """A job in a list, or an empty list when there's no server for the contender."""
        pair = pair or self.pair
        servers = self.servers if servers is None else servers
        if contender.server and contender.server not in servers:
            return []
        case = Case(group, contender, pair.size, direction, layout, percent, link)
        return [Job(case, pair, servers.get(contender.server), rounds or self.bench.runs, prefix or ())]


def parse_strace(path: Path) -> dict[str, int]:
    """The numbers of system calls by their names, from what ``strace -c`` has written."""
    counts = {}
    for line in path.read_text().splitlines():
        # Share, seconds, microseconds a call, calls, errors (may be missing), name.
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
            counts[fields[-1]] = int(fields[3])
    return counts
