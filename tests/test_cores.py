"""Only the cores that a process may use count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pdiffcopy import cores

VERSION_1 = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of 8 cores with control groups: their memberships, and files with contents."""

    def make(memberships: str, **files: str) -> int:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        (tmp_path / "self").write_text(memberships)
        return cores.count_cores()

    monkeypatch.setattr(cores, "_MEMBERSHIPS", tmp_path / "self")
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    return make


@pytest.mark.parametrize(
    "text, count",
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("1000 100000", 1),
     ("6400000 100000", 8), ("nonsense", 8), ("", 8), ("1 0", 8)],
)  # fmt: skip
def test_quota_of_version_2(machine, text, count):
    """What a quota is worth is rounded up, and never more than there is."""
    assert machine("0::/\n", **{"cpu.max": text}) == count


@pytest.mark.parametrize("quota, count", [(-1, 8), (300000, 3), (250000, 3), (10, 1)])
@pytest.mark.parametrize(
    "folder, controllers", [("cpu", "cpu"), ("cpu,cpuacct", "cpu,cpuacct"), ("cpu", "cpu,cpuacct")]
)
def test_quota_of_version_1(machine, folder, controllers, quota, count):
    """The same where the controllers are mounted one by one."""
    files = {f"{folder}/docker/x/{name}": value for name, value in zip(VERSION_1, (quota, 100000), strict=True)}
    assert machine(f"5:{controllers}:/docker/x\n4:cpuset:/\n0::/\n", **files) == count


def test_smallest_quota_counts(machine):
    """A group gets no more than the one that it's part of."""
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}
    assert machine("0::/a/b/c\n", **files) == 3


def test_path_of_the_host_means_the_root_of_a_container(machine):
    """A container without a namespace of its own sees the name that its group has outside, and only its own files."""
    files = {f"cpu/{name}": value for name, value in zip(VERSION_1, (200000, 100000), strict=True)}
    assert machine("3:cpu:/docker/0123\n0::/../../elsewhere\n", **files) == 2


@pytest.mark.parametrize("memberships", ["", "nonsense", "0::/missing\n", "5:cpu:/missing\n"])
def test_no_quota(machine, memberships):
    """Where nothing is said, nothing is limited."""
    assert machine(memberships) == 8


def test_affinity_counts(monkeypatch):
    """A process that may run on one core has one, whatever the machine has, and whichever Python it is."""
    for name in ("process_cpu_count", "cpu_count"):
        monkeypatch.setattr(os, name, lambda: 64, raising=False)
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert cores.count_cores() == 1


HASHING = """
import os
os.cpu_count = lambda: 64
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pdiffcopy import DEFAULT_CONCURRENCY
from pdiffcopy.server import application
print(DEFAULT_CONCURRENCY, application._HASHERS.threads)
"""


def test_defaults_follow_what_may_be_used():
    """Neither the number of processes nor that of hashing threads is that of the machine."""
    result = subprocess.run([sys.executable, "-c", HASHING], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "1"]
