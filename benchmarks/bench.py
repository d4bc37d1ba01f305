"""
How is a case measured?

A *case* is a question ("how long does this contender take for that work?"), a *sample* one answer to it. For a sample

1. the target is damaged (outside of the measurement), and both files are brought into the page cache,
2. one process is measured from its start to its exit, together with what the server does for it,
3. the target is compared with the source: a contender that leaves another file isn't worth measuring.

The samples of a group are taken in rounds, each of which asks every question once: so what else happens on the machine
meanwhile hits all contenders alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.files import SCATTERED, Pair
from benchmarks.processes import Sampler, Usage, get_bytes_read
from benchmarks.servers import END_TIMEOUT, ENVIRONMENT, ROOT, Server

DOWNLOAD, UPLOAD = "download", "upload"
LOOPBACK = "loopback"
RUN_TIMEOUT = 900
"""How long a process may take before it's killed, in seconds."""
SAMPLING_INTERVAL = 0.05


class ContenderError(Exception):
    """Raised when a contender fails, or leaves a target that differs."""


@dataclass(frozen=True)
class Case:
    """What is asked."""

    group: str
    contender: Contender
    size: int
    """The size of the source in bytes."""
    direction: str = DOWNLOAD
    layout: str = SCATTERED
    percent: float = 10
    """How much of the target differs."""
    link: str = LOOPBACK

    @property
    def work(self) -> str:
        """The work in a few words."""
        damage = self.layout if self.layout == "missing" else f"{self.percent:g} % {self.layout}"
        return f"{self.direction}, {damage}" + (f", {self.link}" if self.link != LOOPBACK else "")


@dataclass
class Sample:
    """One answer: times in seconds, sizes in bytes."""

    wall: float
    client: Usage
    server: Usage
    changed: int
    """How many bytes of the target differed."""
    details: dict[str, Any] = field(default_factory=dict)
    """What only some contenders and groups tell: the steps of a limit, what a relay or strace has counted."""


@dataclass(frozen=True)
class Job:
    """What it takes to measure a case."""

    case: Case
    pair: Pair
    server: Server | None = None
    rounds: int = 1
    prefix: Sequence[str] = ()
    """What to start the command of the client with."""
    is_cold: bool = False
    """Whether the files are taken out of the page cache first."""


class Results:
    """All samples of all cases."""

    def __init__(self) -> None:
        self.samples: dict[Case, list[Sample]] = {}

    def add(self, case: Case, sample: Sample) -> None:
        """Remember a sample."""
        self.samples.setdefault(case, []).append(sample)

    def median(self, case: Case, key: Callable[[Sample], float] = lambda sample: sample.wall) -> float | None:
        """The median of something (by default of the time) over the samples of a case, :data:`None` without any."""
        samples = self.samples.get(case)
        return statistics.median(map(key, samples)) if samples else None

    def largest(self, case: Case, key: Callable[[Sample], float]) -> float | None:
        """The largest of something over the samples of a case, :data:`None` without any."""
        return max(map(key, self.samples.get(case, ())), default=None)

    def as_list(self) -> list[dict[str, Any]]:
        """All cases with all of their samples, as JSON likes it."""
        cases = []
        for case, samples in self.samples.items():
            entry = {**vars(case), "contender": case.contender.name}
            rows = [_flatten(sample) for sample in samples]
            entry["medians"] = {name: _round(statistics.median(row[name] for row in rows)) for name in rows[0]}
            entry["samples"] = [
                {**{name: _round(value) for name, value in row.items()}, "changed": s.changed, "details": s.details}
                for row, s in zip(rows, samples, strict=True)
            ]
            cases.append(entry)
        return cases


class Bench:
    """Takes samples."""

    def __init__(self, folder: Path, size: int, runs: int):
        """
        Initialize a bench.

        :param folder: An empty folder for the files.
        :param size: The size of the files in bytes, where a group doesn't need another one.
        :param runs: How many rounds there are, where a group doesn't need fewer.
        """
        self.folder = folder
        self.size = size
        self.runs = runs
        self.results = Results()
        self.output = folder / "output.txt"

    def run(self, jobs: Sequence[Job]) -> None:
        """Take the samples of a group, in rounds."""
        for number in range(max(job.rounds for job in jobs)):
            for job in jobs:
                if number < job.rounds:
                    self.results.add(job.case, self.measure(job))

    def measure(self, job: Job) -> Sample:
        """Take one sample (it isn't added to the results)."""
        case, pair = job.case, job.pair
        changed = pair.prepare(case.layout, case.percent)
        if job.is_cold:
            pair.cool()
        source, target = str(pair.source), str(pair.target)
        if job.server and case.direction == DOWNLOAD:
            source = job.server.get_location(pair.source)
        elif job.server:
            target = job.server.get_location(pair.target)
        command = [*job.prefix, *case.contender.get_command(source, target)]
        command += job.server.client_options if job.server else []
        given = case.contender.get_input(pair.choose(case.layout, case.percent))
        sample = self._run(command, given, job.server)
        sample.changed = changed
        if case.contender.hash is not None:
            sample.details["steps"] = json.loads(self.output.read_text())
        if case.contender.tells_report:
            sample.details["report"] = json.loads(self.output.read_text().splitlines()[-1])
        if not (pair.is_equal() or case.contender.leaves_target):
            raise ContenderError(f"{case.contender.name} left a target that differs from the source ({case.work})")
        _say(f"{case.group:8} {case.contender.name:27} {case.work:42} {sample.wall:8.3f} s")
        return sample

    def _run(self, command: list[str], given: bytes, server: Server | None) -> Sample:
        """Measure one process."""
        if server:
            server.settle()
            server.reset_peak_memory()
        cpu_before = server.get_cpu_seconds() if server else 0
        read_before = get_bytes_read(server.pid) if server else (0, 0)
        sampler = Sampler({"client": [], "server": [server.pid] if server else []}, SAMPLING_INTERVAL)
        with self.output.open("wb") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT
            )
            sampler.roots["client"].append(process.pid)
            with _ending(process), sampler:
                assert process.stdin
                with suppress(BrokenPipeError):  # it has ended already, and its exit code and output tell why
                    process.stdin.write(given)
                    process.stdin.close()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                wall = time.perf_counter() - started
                client_read = get_bytes_read(process.pid)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise ContenderError(f"{' '.join(command)} failed: {self.output.read_text(errors='replace').strip()}")
        sampler.look("server")
        if server:
            server.settle()
        server_cpu = (server.get_cpu_seconds() if server else 0) - cpu_before
        read_after = get_bytes_read(server.pid) if server else (0, 0)
        # Not usage.ru_maxrss, which includes what we occupied when we started the process.
        switches = usage.ru_nvcsw, usage.ru_nivcsw
        client = Usage(usage.ru_utime + usage.ru_stime, sampler.get_peak("client"), *switches, *client_read)
        server_read = (after - before for before, after in zip(read_before, read_after, strict=True))
        others = Usage(server_cpu, sampler.get_peak("server"), *sampler.get_switches("server"), *server_read)
        return Sample(wall, client, others, changed=0)


class _ending:
    """Make sure that a process ends: after :data:`RUN_TIMEOUT`, and when we are interrupted."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        self.timer = threading.Timer(RUN_TIMEOUT, process.kill)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *exc_info: object) -> None:
        self.timer.cancel()
        if self.process.returncode is None:
            self.process.terminate()
            try:
                self.process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _flatten(sample: Sample) -> dict[str, float]:
    """The numbers of a sample by a name for each."""
    sides = {"client": sample.client, "server": sample.server}
    numbers = {f"{side}_{name}": value for side, usage in sides.items() for name, value in usage._asdict().items()}
    return {"wall": sample.wall, **numbers}


def _round(value: float) -> float:
    """Cut off the digits that mean nothing (a tenth of a millisecond is noise)."""
    return round(value, 4) if isinstance(value, float) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
