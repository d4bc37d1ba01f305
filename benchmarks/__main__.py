"""
Usage: python -m benchmarks [OPTIONS]

Measure pdiffcopy next to rsync and next to the limits of this machine. Prints medians, ratios, and which of the
promised ratios hold. Everything happens on loopback and in network namespaces of its own, with files in a temporary
folder that is removed in the end (four times the size has to fit on that disk, and twice the size in memory).

Supported options:

  --size=SIZE         the size of the large files (defaults to 1.8GiB)
  --runs=COUNT        how many rounds are measured (defaults to 5; what is slow gets fewer)
  --quick             64 MiB, one round: to see whether it works, the numbers mean nothing
  --only=NAME,...     only these groups: delta, cubic, https, small, cold, manners, scaling, wire, links, long,
                      memory, sparse, atomic, many
  --directory=PATH    where to make the temporary folder
  --json=FILE         where to write all numbers
  --svg=FILE          where to draw the picture of the groups 'delta' and 'cubic'
  --help

A complete run (no --quick, no --only) writes benchmarks/results.json and docs/benchmark.svg unless told otherwise, any
other run writes only what it's told to. The exit code is 1 when a contender fails, but not when a promise is missed.
"""

from __future__ import annotations

import getopt
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from humanfriendly import InvalidSize, parse_size

from benchmarks.bench import Bench, ContenderError
from benchmarks.contenders import PDIFFCOPY, RSYNC
from benchmarks.groups import GIBIBYTE, MEBIBYTE, Suite
from benchmarks.growth import count_work, fit_lines
from benchmarks.links import CONGESTION_CONTROL, UnavailableError
from benchmarks.servers import ROOT, PdiffcopyServer, RsyncDaemon, Server
from benchmarks.svg import draw_results
from benchmarks.table import format_growth, format_results, format_verdicts
from benchmarks.verdicts import Verdict, judge
from pdiffcopy import __version__


@dataclass
class Options:
    """What the operator wants."""

    size: int = int(1.8 * GIBIBYTE)
    memory_size: int = GIBIBYTE
    runs: int = 5
    only: tuple[str, ...] = ()
    directory: str | None = None
    json: str = ""
    svg: str = ""


def main() -> None:
    """The command line interface."""
    try:
        options = parse_options(sys.argv[1:])
    except (getopt.GetoptError, InvalidSize, ValueError) as e:
        sys.exit(f"{e} (python -m benchmarks --help explains)")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminate(signum: int, frame: Any) -> NoReturn:
    # An exception, so that servers, namespaces and files go away.
    sys.exit(128 + signum)


def parse_options(arguments: list[str]) -> Options:
    """Read the command line."""
    names = ["size=", "runs=", "quick", "only=", "directory=", "json=", "svg=", "help"]
    pairs, rest = getopt.getopt(arguments, "h", names)
    if rest:
        raise ValueError(f"there is nothing to do with {rest[0]}")
    given = dict(pairs)
    if "--help" in given or "-h" in given:
        print((__doc__ or "").strip())
        sys.exit(0)
    options = Options()
    if "--quick" in given:
        options.size, options.memory_size, options.runs = 64 * MEBIBYTE, 64 * MEBIBYTE, 1
    if not given.keys() & {"--quick", "--only"}:
        options.json, options.svg = str(ROOT / "benchmarks" / "results.json"), str(ROOT / "docs" / "benchmark.svg")
    options.size = parse_size(given["--size"], binary=True) if "--size" in given else options.size
    options.runs = max(1, int(given.get("--runs", options.runs)))
    options.only = tuple(filter(None, given.get("--only", "").split(",")))
    options.directory = given.get("--directory")
    options.json, options.svg = given.get("--json", options.json), given.get("--svg", options.svg)
    return options


def run(options: Options) -> None:
    """Measure, and tell."""
    started = time.monotonic()
    notes: list[str] = []
    failures: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdiffcopy-", dir=options.directory)))
        bench = Bench(folder, options.size, options.runs)
        servers: dict[str, Server] = {PDIFFCOPY: stack.enter_context(PdiffcopyServer(folder))}
        if RsyncDaemon.is_available():
            servers[RSYNC] = stack.enter_context(RsyncDaemon(folder))
        else:
            notes.append("rsync isn't installed: there's nothing to compare with")
        suite = Suite(bench, servers, options.memory_size)
        if unknown := set(options.only) - suite.groups.keys():
            sys.exit(f"there is no group {', '.join(sorted(unknown))}: choose from {', '.join(suite.groups)}")
        for name, group in suite.groups.items():
            if name in options.only or not options.only:
                try:
                    group()
                except UnavailableError as e:
                    notes.append(f"{name}: {e}")
                except ContenderError as e:
                    failures.append(f"{name} FAILED: {e}")
    verdicts = judge(bench.results, options.size, options.memory_size)
    lines, work = fit_lines(bench.results, options.size), count_work(bench.results)
    print(format_results(bench.results), format_growth(lines, work), format_verdicts(verdicts), sep="\n\n")
    notes += [*failures, f"took {time.monotonic() - started:.0f} seconds"]
    print("", *notes, sep="\n")
    if options.json:
        growth = {"lines": [vars(line) for line in lines], "work": [vars(item) for item in work]}
        document = {**make_document(options, verdicts, notes), "growth": growth}
        Path(options.json).write_text(dump(document, bench.results.as_list()))
    if options.svg and (picture := draw_results(bench.results, options.size, CONGESTION_CONTROL.read_text().strip())):
        Path(options.svg).parent.mkdir(exist_ok=True)
        Path(options.svg).write_text(picture)
    if failures:
        sys.exit(1)


def dump(document: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """Make JSON of it with one line for each case (they're too many for one line for each number)."""
    head = json.dumps(document, indent=1).removesuffix("\n}")
    return f'{head},\n "cases": [\n' + ",\n".join(f"  {json.dumps(case)}" for case in cases) + "\n ]\n}\n"


def make_document(options: Options, verdicts: list[Verdict], notes: list[str]) -> dict[str, Any]:
    """What was measured where, and what follows from it."""
    return {
        "pdiffcopy": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "size": options.size,
        "runs": options.runs,
        "notes": notes,
        "verdicts": [
            {
                "work": verdict.work,
                "against": verdict.against,
                "at_most": verdict.limit,
                "measured": verdict.measured,
                "verdict": verdict.text,
                "cases": verdict.cases,
            }
            for verdict in verdicts
        ],
    }


def describe_machine() -> dict[str, Any]:
    """What matters for the speed of this machine, and nothing that identifies it."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "architecture": platform.machine(),
        "sha_instructions": bool(re.search(r"\b(sha_ni|sha1)\b", cpu_info)),
        "linux": ".".join(platform.release().split(".")[:2]),
        # BBR paces what is sent, also over loopback: that costs rsync time there, and pdiffcopy does without.
        "congestion_control": CONGESTION_CONTROL.read_text().strip(),
        "python": platform.python_version(),
        "rsync": get_rsync_version(),
    }


def get_rsync_version() -> str:
    """The version of rsync (empty when it isn't installed)."""
    if not RsyncDaemon.is_available():
        return ""
    output = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=True).stdout
    return output.split()[2]


if __name__ == "__main__":
    main()
