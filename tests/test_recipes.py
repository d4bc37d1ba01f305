"""
Does what the documentation tells users to type do what it says?

Each test takes commands out of ``docs/recipes.rst`` and runs them with the real tools. It replaces nothing but names of
hosts and users, ports and paths, and what has nothing to do with this program.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support import (
    RUN_TIMEOUT,
    can_connect,
    children_of,
    find_free_port,
    is_alive,
    make_data,
    wait_for,
    write_pattern,
)

HERE = Path(__file__).parents[1]
PAGE = 16 * 1024
LARGE = 17 * 2**20
"""The size of a file in bytes for which a run starts processes of its own."""


def take(title: str, word: str, replacements: dict[str, object]) -> str:
    """
    Take commands out of the recipes.

    :param title: The section that they are in.
    :param word: What these contain and the others of that section don't.
    :param replacements: What to replace. All of it has to be there.
    """
    text = (HERE / "docs" / "recipes.rst").read_text()
    (section,) = re.findall(rf"^{title}\n-+\n(.*?)(?=^[^\n]+\n---|\Z)", text, re.MULTILINE | re.DOTALL)
    blocks = map(textwrap.dedent, re.findall(r"::\n\n((?:  .*\n|\n)+)", section))
    (block,) = (block for block in blocks if word in block)
    for old, new in replacements.items():
        assert old in block
        block = block.replace(old, str(new))
    return block


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Where ``pdiffcopy`` is a command."""
    program = tmp_path / "bin" / "pdiffcopy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pdiffcopy "$@"\n')
    program.chmod(0o755)
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": ":".join(path)}


@pytest.fixture
def type_in(tmp_path, environment):
    """A function that runs commands, and returns what they print. They have to succeed, unless told otherwise."""

    def type_in(commands: str, expected: int = 0) -> str:
        result = subprocess.run(
            ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=RUN_TIMEOUT,
        )  # fmt: skip
        assert result.returncode == expected, result.stdout + result.stderr
        return result.stdout

    return type_in


@contextmanager
def running(log: Path, *command: str, **options) -> Iterator[subprocess.Popen]:
    """A program in the background that ends with the block, by SIGTERM."""
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stderr=handle, **{"stdout": handle, **options})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(RUN_TIMEOUT)


def read_tree(folder: Path) -> dict[str, bytes]:
    """The contents of all files by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# MySQL's data directory {{{1

MYSQL = "MySQL's data directory"
LEFT_OUT = {"auto.cnf", "db1.pid", "mysql.sock.lock", "ibtmp1", "#innodb_temp/temp_1.ibt"}


def write_table(path: Path, seed: int) -> None:
    """A table with page compression: half of each page is a hole."""
    with path.open("wb") as file:
        for page in range(100):
            file.seek(page * PAGE)
            file.write(make_data(PAGE // 2, seed + page))
        file.truncate(100 * PAGE)


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A data directory, of a mysqld that was running."""
    snapshot = tmp_path / "mnt"
    for folder in ("sakila", "new", "#innodb_redo", "#innodb_temp"):
        (snapshot / folder).mkdir(parents=True)
    write_table(snapshot / "sakila" / "film.ibd", 1)
    names = {"new/t.ibd", "ibdata1", "undo_001", "mysqld-auto.cnf", "#innodb_redo/#ib_redo7"} | LEFT_OUT
    for seed, name in enumerate(sorted(names)):
        write_pattern(snapshot / name, 100_000, seed)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(snapshot / "mysql.sock"))
    return snapshot


@pytest.fixture
def older_copy(tmp_path) -> Path:
    """A data directory of another server, which once was a copy."""
    folder = tmp_path / "mysql"
    for name in ("sakila", "#innodb_redo"):
        (folder / name).mkdir(parents=True)
    write_table(folder / "sakila" / "film.ibd", 2)
    (folder / "auto.cnf").write_bytes(b"its own")
    (folder / "#innodb_redo" / "#ib_redo3").write_bytes(b"old")
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_data_directory_of_mysql(tmp_path, launch, type_in, snapshot, older_copy):
    """It comes without what belongs to one server, and with owners and holes."""
    user = pwd.getpwnam("nobody")
    for path in (snapshot, *snapshot.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
        path.chmod(0o750 if path.is_dir() else 0o640)
        os.utime(path, ns=(10**18, 10**18))
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    data, secret = {"/var/lib/mysql": older_copy}, {"/etc/pdiffcopy/token": token}

    type_in(take(MYSQL, "rm -rf", {**data, "systemctl stop mysql": ""}))
    options = take(MYSQL, "ssh", {**data, **secret}).partition("--listen localhost:8080")[2]
    server = launch(*shlex.split(options))
    type_in(take(MYSQL, "pdiffcopy -a", {**secret, "localhost:8080": f"127.0.0.1:{server.port}", "/mnt": snapshot}))
    expected = {name: contents for name, contents in read_tree(snapshot).items() if name not in LEFT_OUT}
    assert read_tree(older_copy) == {**expected, "auto.cnf": b"its own"}
    for name in expected:
        status = (older_copy / name).stat()
        assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (user.pw_uid, user.pw_gid, 10**18)
        assert stat.S_IMODE(status.st_mode) == 0o640
    for folder in (older_copy, older_copy / "sakila", older_copy / "new"):
        assert (folder.owner(), stat.S_IMODE(folder.stat().st_mode)) == ("nobody", 0o750)
    source, target = (folder / "sakila" / "film.ibd" for folder in (snapshot, older_copy))
    assert target.stat().st_blocks <= source.stat().st_blocks


# A folder of VM images {{{1


def test_folder_of_images(tmp_path, launch, type_in):
    """Images are replaced, as sparse as they are, and nothing else is touched."""
    images, backup = tmp_path / "images", tmp_path / "srv" / "vm"
    (images / "old").mkdir(parents=True)
    backup.mkdir(parents=True)
    for seed, name in enumerate(("web.qcow2", "db.img", "old/mail.qcow2", "web.backup", "web.xml")):
        write_pattern(images / name, 1_000_000, seed)
        os.truncate(images / name, 20_000_000)
    write_pattern(backup / "web.qcow2", 2_000_000, 9)
    with (backup / "web.qcow2").open("rb") as reader:
        server = launch("--root", str(tmp_path / "srv"))
        where = {"backup:8080": f"127.0.0.1:{server.port}", "/var/lib/libvirt/images": images}
        type_in(take("A folder of VM images", "pdiffcopy -r", where))
        assert reader.read() == make_data(2_000_000, 9)
    expected = {name: (images / name).read_bytes() for name in ("web.qcow2", "db.img", "old/mail.qcow2")}
    assert read_tree(backup) == expected
    assert all((backup / name).stat().st_blocks * 512 < 3_000_000 for name in expected)


# Many machines at a time {{{1

MACHINES = "Many machines at a time"


def test_many_machines_by_gnu_parallel(tmp_path, launch, type_in):
    """Only the one that was down is tried again."""
    # Other packages have a program of that name, too.
    if not shutil.which("parallel") or "GNU" not in type_in("parallel --version || true"):
        pytest.skip("GNU parallel isn't installed")
    port, data = find_free_port(), write_pattern(tmp_path / "golden.qcow2", 2_000_000)
    machines = {f"127.0.0.{number}": tmp_path / f"machine{number}" for number in (1, 2, 3)}
    (tmp_path / "machines.txt").write_text("".join(f"{host}\n" for host in machines))
    for host, folder in machines.items():
        (folder / "vm").mkdir(parents=True)
        write_pattern(folder / "vm" / "golden.qcow2", 1_500_000)
        if host != "127.0.0.2":
            launch("--root", str(folder), host=host, port=port)

    type_in(take(MACHINES, "--joblog=push.log --tag", {":8080": f":{port}"}), expected=1)
    assert sorted(code for _, code in read_joblog(tmp_path / "push.log")) == [0, 0, 1]
    launch("--root", str(machines["127.0.0.2"]), host="127.0.0.2", port=port)
    type_in(take(MACHINES, "--resume-failed", {":8080": f":{port}"}))
    assert read_joblog(tmp_path / "push.log")[3:] == [(2, 0)]
    assert [read_tree(folder) for folder in machines.values()] == [{"vm/golden.qcow2": data}] * 3


def read_joblog(path: Path) -> list[tuple[int, int]]:
    """The numbers of the machines, and the exit codes of their runs."""
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(int(columns[0]), int(columns[6])) for columns in lines]


# A data set, by Slurm and by Dask {{{1


@pytest.fixture
def store(tmp_path, launch):
    """A server that has a data set, of which one file is missing, and a list of it."""
    (tmp_path / "srv" / "datasets" / "b").mkdir(parents=True)
    for seed, (name, size) in enumerate({"a.bin": LARGE, "b/c.bin": 1_000_000}.items()):
        write_pattern(tmp_path / "srv" / "datasets" / name, size, seed)
    (tmp_path / "files.txt").write_text("a.bin\ngone.bin\nb/c.bin\n")
    return launch("--root", str(tmp_path / "srv"))


def assert_fetched(tmp_path: Path) -> None:
    """Assert that the data set is there."""
    assert read_tree(tmp_path / "scratch") == read_tree(tmp_path / "srv" / "datasets")


SLURM = "An array of Slurm"
SLURM_CONFIGURATION = """
ClusterName=recipes
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={machine} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, environment) -> Iterator[None]:
    """A cluster of one node, which knows neither passwords nor control groups."""
    if not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd"))):
        pytest.skip("Slurm isn't installed")
    folder = tmp_path / "slurm"
    folder.mkdir()
    values = {"machine": socket.gethostname().partition(".")[0], "user": pwd.getpwuid(os.geteuid()).pw_name}
    ports = find_free_port(), find_free_port()
    (folder / "slurm.conf").write_text(SLURM_CONFIGURATION.format(folder=folder, ports=ports, **values))
    environment["SLURM_CONF"] = f"{folder}/slurm.conf"
    ask = partial(subprocess.check_output, env=environment, text=True, timeout=RUN_TIMEOUT)
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(running(folder / f"{command[0]}.log", *command, env=environment))
            for command in (("slurmctld", "-D", "-i"), ("slurmd", "-D"))
        ]
        has_ended = lambda: any(daemon.poll() is not None for daemon in daemons)  # noqa: E731
        wait_for(lambda: has_ended() or can_connect(ports[0]), what="Slurm")
        wait_for(lambda: has_ended() or "idle" in ask(["sinfo", "--noheader", "--format=%t"]), what="a node")
        if has_ended():
            pytest.skip("Slurm doesn't run here: " + "".join(log.read_text() for log in folder.glob("*.log")))
        yield
        ask(["scancel", f"--user={values['user']}"])
        wait_for(lambda: not ask(["squeue", "--noheader"]), what="the end of the jobs")


def test_array_of_slurm(tmp_path, store, slurm, type_in):
    """A file that is missing costs one task, and its state tells that."""
    where = {"store:8080": f"127.0.0.1:{store.port}", "/scratch/datasets": tmp_path / "scratch"}
    (tmp_path / "fetch.sbatch").write_text(take(SLURM, "#SBATCH", where))
    submit, look = take(SLURM, "scontrol", {}).splitlines()[:2]
    type_in(submit)

    def find_states():
        found = [re.findall(r"=(\S+)", line) for line in type_in(look).splitlines()]
        return sorted(found) if {state for _, state, _ in found} <= {"COMPLETED", "FAILED"} else None

    done, failed = ["COMPLETED", "0:0"], ["FAILED", "1:0"]
    ended = wait_for(find_states, RUN_TIMEOUT, "the array")
    logs = [path.read_text() for path in sorted(tmp_path.glob("fetch-*.log"))]
    assert ended == [["1", *done], ["2", *failed], ["3", *done]], logs
    assert "gone.bin doesn't exist" in logs[1]
    assert_fetched(tmp_path)


DASK_CLUSTER = """
import sys
from dask.distributed import LocalCluster
if __name__ == "__main__":
    options = dict(n_workers=2, threads_per_worker=1, protocol="tcp://", host="127.0.0.1", dashboard_address=None)
    with LocalCluster(processes=sys.argv[1] == "processes", **options) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(params=["processes", "threads"])
def scheduler(request, tmp_path, environment) -> Iterator[str]:
    """The address of a cluster of Dask. Its workers are daemonic processes, or threads."""
    if not importlib.util.find_spec("distributed"):
        pytest.skip("dask[distributed] isn't installed")
    (tmp_path / "cluster.py").write_text(DASK_CLUSTER)
    environment["DASK_CONFIG"] = str(tmp_path / "dask")
    command, log = (sys.executable, "cluster.py", request.param), tmp_path / "cluster.log"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(log, *command, env=environment, cwd=tmp_path, text=True, **pipes) as cluster:
        address = cluster.stdout.readline().strip()
        assert address, log.read_text()
        processes = children_of(cluster.pid)
        yield address
        cluster.communicate(timeout=RUN_TIMEOUT)
    wait_for(lambda: not any(map(is_alive, processes)), what="the end of the workers")


def test_dask(tmp_path, store, scheduler, type_in):
    """A file that is missing costs one task, and its error arrives."""
    target = tmp_path / "scratch"
    where = {"store:8080": f"127.0.0.1:{store.port}", "/scratch/datasets": target, "scheduler:8786": scheduler}
    (tmp_path / "fetch.py").write_text(take("Dask", "import", where))
    printed = type_in(f"{sys.executable} fetch.py", expected=1).splitlines()
    assert_fetched(tmp_path)
    missing, *fetched = sorted(printed, key=lambda line: not line.startswith("FAILED: "))
    assert "gone.bin doesn't exist" in missing
    assert sorted(fetched) == [
        f"{target}/a.bin: created, {LARGE} bytes moved",
        f"{target}/b/c.bin: created, 1000000 bytes moved",
    ]
