"""What do processes use up? Read from ``/proc`` (see proc(5)), because servers don't end when a run does."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

TICK = 1 / os.sysconf("SC_CLK_TCK")


def get_tree(pid: int) -> list[int]:
    """A process and all its descendants that are there at the moment."""
    tree = [pid] if _read_stat(pid) else []
    for ancestor in tree:
        # Not by reading the parents of all processes: with hundreds of them that would disturb what is measured.
        try:
            for thread in os.listdir(f"/proc/{ancestor}/task"):
                tree += map(int, Path(f"/proc/{ancestor}/task/{thread}/children").read_text().split())
        except OSError:
            pass
    return tree


def get_cpu_seconds(pid: int) -> float:
    """The processor time, user and system, of a process, its descendants, and those of them that have ended."""
    total = 0.0
    for member in get_tree(pid):
        if fields := _read_stat(member):
            total += sum(map(int, fields[11:15])) * TICK
    return total


def get_bytes_read(pid: int) -> tuple[int, int]:
    """
    How many bytes a process and its descendants have read, those that have ended included.

    :returns: Those that they have asked the system for (from connections only by way of ``read``), and those that came
              from a disk.
    """
    read = fetched = 0
    for member in get_tree(pid):
        with contextlib.suppress(OSError):
            numbers = dict(line.split(": ") for line in Path(f"/proc/{member}/io").read_text().splitlines())
            read += int(numbers["rchar"])
            fetched += int(numbers["read_bytes"])
    return read, fetched


def get_peak_memory(pid: int) -> int:
    """The largest resident size that a process has had, in bytes (0 when it's gone)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def reset_peak_memory(pid: int) -> None:
    """Begin anew with the peak memory of a process and its descendants."""
    for member in get_tree(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{member}/clear_refs").write_text("5")


def is_listening(pid: int, port: int) -> bool:
    """Whether somebody listens on a TCP port in the network that a process lives in (nothing is connected to)."""
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False


def wait_for(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} seconds for {what}")
        time.sleep(0.01)


class Usage(NamedTuple):
    """What one side has used up."""

    cpu: float
    """Seconds, user and system."""
    memory: int
    """The peak, in bytes."""
    wakeups: int
    """How often a thread waited for something, and was woken up."""
    preemptions: int
    """How often a thread had to give up its core to another one."""
    read: int
    """How many bytes were read, as :func:`get_bytes_read` counts them..."""
    fetched: int
    """... and how many of them came from a disk."""


class Sampler:
    """
    Watches several trees of processes, and remembers the peak of each process that it has seen (a context manager).

    The peak of a tree is the sum of the peaks of its processes. That's more than it ever occupies, since they share
    pages and don't peak together, but for the comparison it's the same for all.
    """

    def __init__(self, roots: dict[str, list[int]], interval: float):
        """
        Initialize a sampler.

        :param roots: The roots of the trees, by a name for each group of them.
        :param interval: How often to look, in seconds. A process is missed if it lives shorter than that, and what it
                         does after the last look.
        """
        self.roots = roots
        self.interval = interval
        self.peaks: dict[str, dict[int, int]] = {name: {} for name in roots}
        self.before = {name: _count_switches(pids) for name, pids in roots.items()}
        self.switches: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in roots}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def get_peak(self, name: str) -> int:
        """The peak memory of a group of trees, in bytes."""
        return sum(self.peaks[name].values())

    def get_switches(self, name: str) -> tuple[int, int]:
        """How often the threads of a group of trees were woken up, and how often they were preempted."""
        gained = [
            tuple(now - before for now, before in zip(counts, self.before[name].get(pid, (0, 0)), strict=True))
            for pid, counts in self.switches[name].items()
        ]
        return sum(wakeups for wakeups, _ in gained), sum(preemptions for _, preemptions in gained)

    def _work(self) -> None:
        # The first look comes late enough to find the processes that a client starts at once.
        while not self._stop.wait(self.interval):
            for name in self.roots:
                self.look(name)

    def look(self, name: str) -> None:
        """Note the peaks and the switches of all processes of a group that are there."""
        for root in self.roots[name]:
            for pid in get_tree(root):
                self.peaks[name][pid] = max(get_peak_memory(pid), self.peaks[name].get(pid, 0))
        self.switches[name].update(_count_switches(self.roots[name]))


def _count_switches(roots: Iterable[int]) -> dict[int, tuple[int, int]]:
    """How often the threads of each process of some trees were woken up, and preempted, since they began."""
    counts = {}
    for pid in chain.from_iterable(map(get_tree, roots)):
        with contextlib.suppress(OSError):
            texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
            voluntary, forced = (
                sum(int(count) for text in texts for count in re.findall(rf"^{name}:\s*(\d+)", text, re.MULTILINE))
                for name in ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
            )
            counts[pid] = (voluntary, forced)
    return counts


def _read_stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name of the program: state, parent, ... (empty when it's gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
