"""The JSON object of many files: it's printed however a run ends."""

from __future__ import annotations

import fcntl
import json
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap

import pytest

from pdiffcopy.exceptions import DiskFullError, FileError
from pdiffcopy.spool import IN_MEMORY, Spool
from tests.support import RUN_TIMEOUT, error_lines, mounted, wait_for

SOME = """
    import os, sys, time
    from pdiffcopy import cli
    from pdiffcopy.client import Client
    from pdiffcopy.exceptions import DiskFullError

    run_files, number = Client.run_files, int(sys.argv.pop(1))

    def run_some(*arguments):
        ended = run_files(*arguments)
        yield next(ended)
        yield next(ended)
        if not number:
            raise DiskFullError("no room")
        os.kill(os.getpid(), number)
        time.sleep(60)

    Client.run_files = run_some
    cli.main()
"""


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143), (0, "no room", 1)],
    ids=["SIGINT", "SIGTERM", "disk full"],
)
def test_run_that_ends_early_tells_how_far_it_got(tmp_path, number, error, status):
    """The files that were done are in the list, and beside it stands what ended the run."""
    for name in "abc":
        (tmp_path / name).write_bytes(b"12345")
    command = [sys.executable, "-c", textwrap.dedent(SOME), str(int(number)), "--json"]
    command += [str(tmp_path / name) for name in ("a", "b", "c", "target/")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    document = json.loads(result.stdout)
    assert (document["error"], document["exit_code"]) == (error, status)
    assert (result.returncode, error_lines(result)) == (status, [f"pdiffcopy: {error}"])
    assert [(file["outcome"], file["bytes_moved"]) for file in document["files"]] == [("created", 5)] * 2
    assert document["created"] == 2 and document["bytes_moved"] == 10


def test_run_that_can_not_begin_prints_one_object(tmp_path):
    """With nothing in the list."""
    command = [sys.executable, "-m", "pdiffcopy", "--json", tmp_path / "a", tmp_path / "x" / "a", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    document = json.loads(result.stdout)
    assert document["files"] == [] and document["created"] == 0
    assert error_lines(result) == [f"pdiffcopy: {document['error']}"]
    assert document["exit_code"] == result.returncode == 1


@pytest.mark.parametrize("count", [0, 1, IN_MEMORY // 10], ids=["none", "one", "long"])
@pytest.mark.parametrize("is_early", [False, True], ids=["complete", "early"])
def test_list_is_complete(capsys, count, is_early):
    """Wherever it waits, and what the object has else is what's known at the end."""
    facts = {}
    error = DiskFullError("no room for {filename}", filename="ü")
    try:
        with Spool(True, lambda: facts) as spool:
            for number in range(count):
                spool.add(lambda number=number: {"name": f"é\n{number}"})
            facts["created"] = count
            if is_early:
                raise error
    except DiskFullError as e:
        assert e is error and is_early
    ending = {"error": "no room for ü", "exit_code": 1} if is_early else {}
    files = [{"name": f"é\n{number}"} for number in range(count)]
    assert json.loads(capsys.readouterr().out) == {"created": count, **ending, "files": files}


@pytest.mark.parametrize("room", [0, 1, 3 * IN_MEMORY // 2], ids=["none", "a little", "for some"])
def test_list_without_room_is_complete_nevertheless(capsys, tmp_path, monkeypatch, room):
    """Up to the file for which there was none: the message names the folder that is full."""
    with mounted(tmp_path / "full", "tmpfs", f"size={room + 4096}"):
        monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/full")
        count = 0
        with pytest.raises(FileError, match=f"write the list for --json to {tmp_path}/full: .*TMPDIR"):
            with Spool(True, lambda: {"created": count}) as spool:
                while True:
                    count += 1
                    spool.add(lambda: {"number": count})  # noqa: B023
        document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 1 and "TMPDIR" in document["error"]
    assert document["created"] == count > (room // IN_MEMORY + 1) * IN_MEMORY // 20
    assert document["files"] == [{"number": number + 1} for number in range(count)]


def test_nothing_is_printed_that_nobody_wants(capsys):
    """Nor made."""
    with Spool(False, lambda: pytest.fail("it's made")) as spool:
        spool.add(lambda: pytest.fail("it's made"))
    assert capsys.readouterr().out == ""


RUN = """
    import os, signal, sys
    from pdiffcopy import cli, console, spool

    def run(arguments):
        with spool.Spool(True, lambda: {"created": 0}) as files:
            for number in range(100_000):
                files.add(lambda: {"number": number})
            if sys.argv[1] == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            elif sys.argv[1] == "error":
                raise OSError(28, "No space left on device")

    cli._run = run
    cli.main()
"""


def start(*arguments: str) -> subprocess.Popen:
    """Start a program that has a long list to print."""
    command = [sys.executable, "-c", textwrap.dedent(RUN), *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["none", "error", "signal"])
def test_nobody_has_to_wait_until_a_list_is_read(end):
    """A signal ends the program while it prints, whatever has ended the run before."""
    with start(end) as process:
        pipe = process.stdout.fileno()
        is_full = lambda: struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0] >= 32768  # noqa: E731
        wait_for(is_full, what="the list")
        process.send_signal(signal.SIGTERM)
        assert process.wait(RUN_TIMEOUT) == 143
        assert process.stderr.read() == "pdiffcopy: terminated\n"
        assert process.stdout.read().count('"files"') == 1


@pytest.mark.parametrize(("end", "status"), [("none", 0), ("error", 1), ("signal", 130)])
def test_reader_that_leaves_hides_no_reason(end, status):
    """That the object can't be printed is worth a line only if nothing worse has happened."""
    with start(end) as process:
        process.stdout.close()
        expected = {"none": "write to stdout", "error": "No space left on device", "signal": "interrupted"}[end]
        (line,) = process.stderr.read().splitlines()
        assert expected in line
        assert process.wait(RUN_TIMEOUT) == (status or 1)
