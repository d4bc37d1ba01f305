"""
What is measured?

Each group is a function that takes its samples with a :class:`.Bench`. A group that can't do its work here (because a
program or a permission is missing) raises :exc:`UnavailableError`, which says why.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.bench import DOWNLOAD, LOOPBACK, UPLOAD, Bench, Case, Job
from benchmarks.contenders import (
    ATOMIC,
    DEFAULT,
    DROP,
    IMPORT_REQUESTS,
    LIMIT,
    LIMITED,
    LIMITED_MANY,
    LIMITED_ONE,
    PDIFFCOPY,
    READERS,
    RSYNC,
    RSYNC_DELTA,
    RSYNC_WHOLE,
    UNLIMITED,
    XXH128,
    Contender,
)
from benchmarks.disks import Disk
from benchmarks.files import MISSING, PAGES, SCATTERED, Pair, SparsePair, scatter
from benchmarks.links import Link, Machine, UnavailableError
from benchmarks.many import measure_many
from benchmarks.servers import (
    DELAY,
    LimitedServer,
    PdiffcopyServer,
    RelayServer,
    RsyncDaemon,
    SecureServer,
    Server,
    SlowStorage,
    TracedServer,
    relayed,
)
from benchmarks.servers import LOOPBACK as LOOPBACK_ADDRESS
from benchmarks.sparse import measure_sparse

MEBIBYTE, GIBIBYTE = 1024**2, 1024**3
PERCENTAGES = (0, 1, 10, 50, 100)
SMALL_SIZE = 10 * MEBIBYTE
LINKS = {"1 Gbit/s": 10**9, "50 Mbit/s": 5 * 10**7}
"""The bandwidths in bits per second."""
READ_DELAY = 0.001
"""How long storage elsewhere takes for a request, in seconds."""
RELAY, LONG_RELAY = "relay", "relay, 50 ms"
CUBIC, HTTPS, SLOW_STORAGE, COLD_DISK = "cubic", "https", "1 ms a read, cold", "disk, cold"
LIMITED_SERVER = "limited server"
LIMITED_SIZE = 512 * MEBIBYTE
"""How much moves at a limited rate: that takes some seconds, so that the start of a program hardly matters."""
MEMORY_PERCENT = 10
"""How much of these two files isn't holes: enough to last until all processes have all of their memory."""
MEMORY_RATIO = 16
"""How much larger the larger one of the two files is whose memory is compared."""

BOTH = (DOWNLOAD, UPLOAD)
RIVALS = (RSYNC_DELTA, RSYNC_WHOLE)


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
            "cubic": self.cubic,
            "https": self.https,
            "small": self.small,
            "cold": self.cold,
            "manners": self.manners,
            "scaling": self.scaling,
            "wire": self.wire,
            "links": self.links,
            "long": self.long,
            "memory": self.memory,
            "sparse": self.sparse,
            "atomic": self.atomic,
            "many": self.many,
        }
        self._pair: Pair | None = None

    @property
    def pair(self) -> Pair:
        """The large files (made when they're first needed)."""
        if not self._pair:
            self._pair = Pair(self.bench.folder, "large", self.bench.size)
        return self._pair

    def delta(self) -> None:
        """MiBs and pages that differ, and missing targets, in both directions, against rsync and the limit."""
        jobs = self._changes(LOOPBACK, self.servers)
        jobs += self._jobs("delta", XXH128, percent=0)
        for layout, percent in ((SCATTERED, 0), (SCATTERED, 10), (SCATTERED, 100), (PAGES, 10), (MISSING, 100)):
            jobs += self._jobs("delta", DEFAULT, layout=layout, percent=percent, direction=UPLOAD)
        for layout, percent in (*((SCATTERED, percent) for percent in PERCENTAGES), (PAGES, 10), (MISSING, 100)):
            jobs += self._jobs("delta", LIMIT, layout=layout, percent=percent, rounds=min(2, self.bench.runs))
        self.bench.run(jobs)

    def cubic(self) -> None:
        """The same downloads with another congestion control than the system has."""
        with Machine("cubic") as machine, self._serving(machine.prefix) as servers:
            self.bench.run(self._changes(CUBIC, servers, machine.prefix))

    def _changes(self, link: str, servers: dict[str, Server], prefix: Sequence[str] = ()) -> list[Job]:
        jobs = []
        for layout, percentages in ((SCATTERED, PERCENTAGES), (PAGES, PERCENTAGES[1:]), (MISSING, (100,))):
            for percent in percentages:
                for contender in (*RIVALS, DEFAULT):
                    # rsync takes long to find little in common, and varies little: one round of that has to do.
                    is_slow = contender is RSYNC_DELTA and (layout == MISSING or percent >= 50)
                    jobs += self._jobs("delta", contender, layout=layout, percent=percent, link=link,
                                       servers=servers, prefix=prefix, rounds=int(is_slow))  # fmt: skip
        return jobs

    @contextmanager
    def _serving(self, prefix: Sequence[str], address: str = LOOPBACK_ADDRESS) -> Iterator[dict[str, Server]]:
        """Servers somewhere else, of the same kinds as those on loopback."""
        kinds = {PDIFFCOPY: PdiffcopyServer, RSYNC: RsyncDaemon}
        with ExitStack() as stack:
            yield {kind: stack.enter_context(kinds[kind](self.bench.folder, address, prefix)) for kind in self.servers}

    def https(self) -> None:
        """The same work over encrypted connections and over others."""
        with SecureServer(self.bench.folder) as server:
            jobs = []
            for layout in (SCATTERED, MISSING):
                for direction in BOTH:
                    for link, servers in ((LOOPBACK, self.servers), (HTTPS, {PDIFFCOPY: server})):
                        jobs += self._jobs("https", DEFAULT, layout=layout, percent=100, direction=direction,
                                           link=link, servers=servers)  # fmt: skip
            self.bench.run(jobs)

    def small(self) -> None:
        """A small file without changes, against the start of a Python program that only imports requests."""
        pair = Pair(self.bench.folder, "small", SMALL_SIZE)
        jobs = []
        for contender in (IMPORT_REQUESTS, DEFAULT, RSYNC_DELTA):
            jobs += self._jobs("small", contender, pair=pair, percent=0, rounds=4 * self.bench.runs)
        self.bench.run(jobs)

    def cold(self) -> None:
        """Files of which nothing is in the page cache, on the disk and on storage that takes its time."""
        jobs = []
        for contender in (DEFAULT, DROP, RSYNC_DELTA, READERS):
            jobs += self._jobs("cold", contender, percent=0, link=COLD_DISK)
        self.bench.run(jobs)
        with SlowStorage(self.bench.folder, READ_DELAY) as storage:
            jobs = []
            for contender in (DEFAULT, READERS):
                jobs += self._jobs("cold", contender, pair=self.pair.seen_from(storage.mountpoint), percent=0,
                                   link=SLOW_STORAGE)  # fmt: skip
            self.bench.run(jobs)

    def manners(self) -> None:
        """Limits of the client and of the server, with one worker and with many."""
        pair = Pair(self.bench.folder, "limited", min(LIMITED_SIZE, self.bench.size))
        with LimitedServer(self.bench.folder) as server:
            jobs = []
            for direction in BOTH:
                for contender in (LIMITED, LIMITED_ONE, LIMITED_MANY):
                    jobs += self._jobs("manners", contender, pair, direction, MISSING, 100, min(2, self.bench.runs))
                jobs += self._jobs("manners", UNLIMITED, pair, direction, MISSING, 100, min(2, self.bench.runs),
                                   LIMITED_SERVER, {PDIFFCOPY: server})  # fmt: skip
            self.bench.run(jobs)
        pair.remove()

    def scaling(self) -> None:
        """The time for an eighth, a quarter, a half and all of the size, and how much work a GiB more is."""
        jobs, pairs = [], []
        for divisor in (8, 4, 2):
            pairs.append(Pair(self.bench.folder, f"part-{divisor}", self.bench.size // divisor))
        for pair in (*pairs, self.pair):
            for contender in (DEFAULT, RSYNC_DELTA):
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
        case = Case("counts", DEFAULT, pair.size, direction, percent=percent, link="relay, strace")
        with TracedServer(self.bench.folder, summaries["server"]) as server, RelayServer(server) as relay:
            sample = self.bench.measure(Job(case, pair, relay, prefix=prefix))
            sample.details["relay"] = relay.get_counts()
        sample.details["system_calls"] = {side: parse_strace(path) for side, path in summaries.items()}
        self.bench.results.add(case, sample)

    def wire(self) -> None:
        """The bytes on the wire."""
        for direction in BOTH:
            for layout, percent in ((SCATTERED, 0), (SCATTERED, 10), (PAGES, 10)):
                case = Case("wire", DEFAULT, self.pair.size, direction, layout, percent, RELAY)
                with RelayServer(self.servers[PDIFFCOPY]) as relay:
                    sample = self.bench.measure(Job(case, self.pair, relay))
                    sample.details["relay"] = relay.get_counts()
                self.bench.results.add(case, sample)

    def links(self) -> None:
        """Wires of a limited bandwidth."""
        for name, bandwidth in LINKS.items():
            with Link(bandwidth) as link, self._serving(link.server_prefix, link.server_address) as servers:
                jobs = []
                # A tenth of the file takes minutes on a slow wire, and leaves little room for anything else to matter.
                for layout in (SCATTERED, PAGES) if bandwidth >= 10**9 else (PAGES,):
                    for direction in BOTH:
                        for contender in (DEFAULT, RSYNC_DELTA):
                            jobs += self._jobs("links", contender, layout=layout, direction=direction, link=name,
                                               servers=servers, prefix=link.client_prefix,
                                               rounds=min(3, self.bench.runs))  # fmt: skip
                self.bench.run(jobs)

    def long(self) -> None:
        """A long wire, against a short one with the same relay in between."""
        jobs = []
        with ExitStack() as stack:
            for name, delay in ((RELAY, 0.0), (LONG_RELAY, DELAY)):
                servers = stack.enter_context(relayed(self.servers, delay))
                for contender in (DEFAULT, RSYNC_DELTA):
                    for direction in BOTH if contender is DEFAULT else (DOWNLOAD,):
                        jobs += self._jobs("long", contender, direction=direction, link=name, servers=servers,
                                           rounds=min(3, self.bench.runs))  # fmt: skip
            self.bench.run(jobs)

    def memory(self) -> None:
        """The peak memory for a file, and for one that is :data:`MEMORY_RATIO` times as large (mostly holes)."""
        pairs = [
            SparsePair(self.bench.folder, f"sparse-{ratio}", size, scatter(size, size * MEMORY_PERCENT // 100))
            for ratio, size in ((ratio, self.memory_size * ratio) for ratio in (1, MEMORY_RATIO))
        ]
        for _ in range(min(2, self.bench.runs)):
            for direction in BOTH:
                for pair in pairs:
                    # A server of its own each time: what an earlier client left in its memory doesn't count.
                    with PdiffcopyServer(self.bench.folder) as server:
                        case = Case("memory", DEFAULT, pair.size, direction, percent=100)
                        self.bench.run([Job(case, pair, server)])
        for pair in pairs:
            pair.remove()

    def sparse(self) -> None:
        """Files that consist of holes for the most part, or of pages with holes."""
        measure_sparse(self.bench, self.servers[PDIFFCOPY], self.memory_size)

    def atomic(self) -> None:
        """New versions of files that begin as clones, against changes in place."""
        with Disk(self.bench.folder, 4 * self.memory_size) as folder:
            pair = Pair(folder, "versions", self.memory_size)
            pair.is_renewed = True
            jobs = []
            for direction in BOTH:
                for contender in (DEFAULT, ATOMIC):
                    jobs += self._jobs("atomic", contender, pair, direction)
            self.bench.run(jobs)

    def many(self) -> None:
        """Folders with many files."""
        measure_many(self.bench, self.servers, self.memory_size)

    def _jobs(
        self, group: str, contender: Contender, pair: Pair | None = None, direction: str = DOWNLOAD,
        layout: str = SCATTERED, percent: float = 10, rounds: int = 0, link: str = LOOPBACK,
        servers: dict[str, Server] | None = None, prefix: Sequence[str] = (),
    ) -> list[Job]:  # fmt: skip
        """A job in a list, or an empty list when there's no server for the contender."""
        pair = pair or self.pair
        servers = self.servers if servers is None else servers
        if contender.server and contender.server not in servers:
            return []
        case = Case(group, contender, pair.size, direction, layout, percent, link)
        is_cold = link in (SLOW_STORAGE, COLD_DISK)
        return [Job(case, pair, servers.get(contender.server), rounds or self.bench.runs, prefix, is_cold)]


def parse_strace(path: Path) -> dict[str, int]:
    """The numbers of system calls by their names, from what ``strace -c`` has written."""
    counts = {}
    for line in path.read_text().splitlines():
        # Share, seconds, microseconds a call, calls, errors (may be missing), name.
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
            counts[fields[-1]] = int(fields[3])
    return counts
