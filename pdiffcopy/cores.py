"""
How many cores may this process use?

A container, a systemd unit or a job of a batch system often gets a part of the machine: by affinity (it runs on these
cores only) or by a quota of a control group (it gets so much time of them, on whichever cores). As many threads as
the machine has cores would then get in each other's way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIPS = Path("/proc/self/cgroup")


def count_cores() -> int:
    """
    Count the cores that this process may use.

    :returns: The number of cores (at least one): those that affinity allows, or as many as the quotas of the control
              groups are worth, rounded up, if these are fewer.
    """
    # Python 3.13 counts what affinity allows, unless $PYTHON_CPU_COUNT or -X cpu_count says something else.
    count = getattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)))() or 1
    return max(1, min([count, *_read_quotas(_MEMBERSHIPS, _CGROUPS)]))


def _read_quotas(memberships: Path, root: Path) -> Iterator[int]:
    """The quotas of all control groups that a process is in, each as a number of cores."""
    with suppress(OSError, ValueError):
        for line in memberships.read_text("utf-8", "replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _walk(root, path, _read_version_2)
            elif "cpu" in controllers.split(","):
                for name in {"cpu", controllers}:
                    yield from _walk(root / name, path, _read_version_1)


def _walk(root: Path, path: str, read: Callable[[Path], tuple[int, int]]) -> Iterator[int]:
    """A group can't use more than the one that it's part of. (In a container the path may be one of the host.)"""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts) + 1):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = read(root.joinpath(*parts[:length]))
            if quota > 0:
                yield math.ceil(quota / period)


def _read_version_1(folder: Path) -> tuple[int, int]:
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())


def _read_version_2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)  # without a quota it's the word "max"
