"""
The program starts, or says in one line what it lacks, wherever it is started.

What it lacks it misses before the target is touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from functools import partial
from pathlib import Path

import pytest

from pdiffcopy.exceptions import WorkerError
from pdiffcopy.mp import WorkerPool
from tests.support import MANY_BLOCKS, children_of, error_lines, is_alive, run_pdiffcopy, wait_for, write_pattern

RUN_TIMEOUT = 60
PROGRAM = [sys.executable, "-m", "pdiffcopy"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount something")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace isn't installed")


@pytest.fixture
def source(tmp_path):
    """A file of a few blocks, or of many."""
    write_pattern(tmp_path / "source", 3_000_000)
    return tmp_path / "source"


def assert_refused(result, target: Path) -> str:
    """Assert that a run with ``--json`` said in one line why it can't be, and did nothing. Returns the line."""
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert line == f"pdiffcopy: {json.loads(result.stdout)['error']}"
    assert not target.exists()
    return line


# What a machine may lack {{{1


@needs_root
def test_missing_shared_memory_is_one_line(source, tmp_path):
    """Semaphores live in /dev/shm."""
    script = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    inside = [*PROGRAM, *MANY_BLOCKS, "--json", source, tmp_path / "target"]
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *inside]
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    assert "/dev/shm" in assert_refused(result, tmp_path / "target")


@needs_root
@pytest.mark.parametrize("role", ["client", "server"])
def test_hidden_boot_is_one_line(source, tmp_path, role):
    """Without it a file may pass for another one, or for one that was there before the machine went down."""
    target = tmp_path / "target"
    hide = "mount -t proc -o subset=pid,hidepid=invisible proc /proc"
    prefix = ["unshare", "-m", "sh", "-c", f'{hide} && exec "$@"', "sh"]
    places = ["--json", source, target] if role == "client" else ["--listen", "127.0.0.1:1"]
    result = run_pdiffcopy(*places, prefix=prefix)
    if "mount:" in result.stderr:
        pytest.skip("this kernel can't hide it")
    assert result.returncode == 1
    assert "boot_id, by which files are told apart: No such file" in error_lines(result)[0]
    assert "ProcSubset=pid" in error_lines(result)[0]
    assert not target.exists()


def limit_files(count):
    """Allow so many open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


@pytest.mark.parametrize("options", [(), MANY_BLOCKS], ids=["one process", "many"])
@pytest.mark.parametrize("count", [8, 15, 20, 26, 27, 28, 29, 30])
def test_few_descriptors_are_enough_or_too_few_from_the_start(source, tmp_path, count, options):
    """No run ends in the middle because of them."""
    target = tmp_path / "target"
    result = run_pdiffcopy("--json", *options, source, target, preexec_fn=partial(limit_files, count))
    if result.returncode:
        assert "ulimit -n" in assert_refused(result, target)
    else:
        assert target.read_bytes() == source.read_bytes()


def test_soft_limit_of_descriptors_does_not_count(source, tmp_path):
    """It's for programs that can't deal with many. What the administrator allows is used."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 4096))
    result = run_pdiffcopy("-c", "20", *MANY_BLOCKS, source, tmp_path / "target", preexec_fn=limit)
    assert result.returncode == 0, result.stderr


@needs_strace
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_missing_processes_are_one_line(source, tmp_path, failing):
    """Whichever of them can't be started."""
    calls = "clone,clone3,fork,vfork"
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:error=EAGAIN:when={failing}+"]
    command = [*strace, *PROGRAM, *MANY_BLOCKS, "--json", source, tmp_path / "target"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    assert "ulimit -u" in assert_refused(result, tmp_path / "target")


def test_missing_threads_of_child_processes_are_missed_at_once(monkeypatch):
    """A pool is complete, or isn't there."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(WorkerError, match="can't start new thread.*ulimit -u"):
        with WorkerPool(concurrency=2, generator_fn=list, worker_fn=abs):
            raise AssertionError


# Signals {{{1


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_during_the_start_are_one_line(tmp_path, name, status):
    """Somebody changes their mind while the program is still being loaded."""
    shim = f"import os, signal; os.kill(os.getpid(), signal.{name}); raise SystemExit('not reached')"
    (tmp_path / "coloredlogs.py").write_text(f"def install(**options): {shim}")
    (tmp_path / "getopt.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\ngnu_getopt = None")
    result = run_pdiffcopy("--json", "a", "b", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == status
    assert len(error_lines(result)) == 1 and "Traceback" not in result.stderr
    assert json.loads(result.stdout)["exit_code"] == status


def test_second_interrupt_ends_it_at_once(tmp_path):
    """Also while the first one waits for something that doesn't happen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [*PROGRAM, "--json", f"127.0.0.1:{port}/a", f"127.0.0.1:{port}/b"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        connections = [listener.accept()[0] for _ in range(2)]
        with connections[0], connections[1]:
            process.send_signal(signal.SIGINT)
            # The first one waits for two threads that wait for the server.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=5)
    assert process.returncode == 130
    assert stderr == "pdiffcopy: interrupted\n"
    assert json.loads(stdout) == {"error": "interrupted", "exit_code": 130}


def test_second_interrupt_leaves_no_process(source, tmp_path):
    """The children die with their parent, whatever they are doing."""
    os.mkfifo(tmp_path / "hold")
    code = f"""
        import signal, time, pdiffcopy.cli, pdiffcopy.client.workers, pdiffcopy.mp
        pdiffcopy.client.workers.transfer_batch = lambda *arguments: open({str(tmp_path / "hold")!r}, "w")
        pdiffcopy.mp.WorkerPool.__exit__ = lambda *arguments: time.sleep(60)  # an end that hangs
        pdiffcopy.cli.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *MANY_BLOCKS, source, tmp_path / "target"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "target").exists())
    children = wait_for(lambda: children_of(process.pid))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert any(map(is_alive, children))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130 and stderr == "pdiffcopy: interrupted\n"
    wait_for(lambda: not any(map(is_alive, children)))


# Messages {{{1


def run_on_terminal(*arguments, **variables) -> tuple[int, str]:
    """Run the program with stderr on a terminal of 40 columns. Returns the exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        command = [*PROGRAM, *map(os.fspath, arguments)]
        env = {**os.environ, **variables}
        with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=env) as process:
            os.close(theirs)
            output = b""
            try:
                while chunk := terminal.read(4096):
                    output += chunk
            except OSError:  # that's how the end of a terminal looks on Linux
                pass
            return process.wait(RUN_TIMEOUT), output.decode()


ODD = [
    {"TERM": "dumb"},
    {"TERM": ""},
    {"COLUMNS": "x"},
    {"TQDM_NCOLS": "x"},
    {"TQDM_MININTERVAL": "x"},
    {"COLOREDLOGS_LOG_FORMAT": "%(x"},
    {"COLOREDLOGS_LOG_FORMAT": "%(nope)s"},
    {"COLOREDLOGS_DATE_FORMAT": "%"},
    {"COLOREDLOGS_LEVEL_STYLES": "=;"},
    {"COLOREDLOGS_LOG_LEVEL": "x"},
]


@pytest.mark.parametrize("variables", ODD, ids=str)
def test_odd_environments_do_no_harm(source, tmp_path, variables):
    """The worst that happens is that messages look plain, and that there's no bar."""
    status, output = run_on_terminal(source, tmp_path / "target", **variables)
    assert status == 0
    assert "The whole file was copied" in output and "Traceback" not in output


def test_messages_on_a_terminal_are_only_messages(source, tmp_path):
    """Somebody who sits there knows the time, the machine, and what was started."""
    _, output = run_on_terminal(source, tmp_path / "target")
    message = re.sub(r"\x1b\[[0-9;]*[mA]", "", output).split("\r")[-2 if output.endswith("\r\n") else -1]
    assert message.lstrip().startswith(f"{tmp_path}/target: The whole file was copied to a new file, ")


def test_messages_in_a_log_say_when_and_where(source, tmp_path):
    """There they are read later."""
    (line,) = run_pdiffcopy(source, tmp_path / "target").stderr.splitlines()
    date, name = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.escape(socket.gethostname())
    assert re.match(rf"{date} {name} pdiffcopy\S+\[\d+\] INFO ", line)


def test_format_that_was_asked_for_is_used(source, tmp_path):
    """On a terminal, too."""
    _, output = run_on_terminal(source, tmp_path / "target", COLOREDLOGS_LOG_FORMAT="=> %(message)s")
    assert f"=> {tmp_path}/target: The whole file" in re.sub(r"\x1b\[[0-9;]*m", "", output)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_stdout_without_room_is_one_line(option, unbuffered):
    """Its readers have to know that something is missing."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        result = subprocess.run([*PROGRAM, option], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert result.returncode == 1
    assert result.stderr.startswith("pdiffcopy: ") and len(result.stderr.splitlines()) == 1
