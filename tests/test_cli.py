"""Tests for :mod:`pdiffcopy.cli`: the program as users meet it, in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

import pdiffcopy.cli
from pdiffcopy import DEFAULT_PORT, __version__
from pdiffcopy.exceptions import DependencyError, UsageError
from pdiffcopy.options import OPTIONS, SHORT
from tests.support import (
    RUN_TIMEOUT,
    children_of,
    error_lines,
    find_free_port,
    is_alive,
    make_data,
    run_pdiffcopy,
    snapshot,
    wait_for,
    write_pattern,
)

HERE = Path(__file__).parents[1]
BLOCK = 4096


@pytest.fixture
def files(tmp_path):
    """A source and an older copy of it that differs in two of its eight blocks."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 100)
    older = bytearray(data)
    older[0] ^= 1
    older[-1] ^= 1
    (tmp_path / "target").write_bytes(older)
    return tmp_path / "source", tmp_path / "target"


def assert_fails(result: subprocess.CompletedProcess, status: int) -> str:
    """The program failed with one line on stderr, which is returned, and said nothing else to the shell."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    lines = error_lines(result)
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pdiffcopy: ")
    return lines[0]


# Help, version and documentation {{{1


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_prints_the_usage(option):
    """The docstring is what users get to see."""
    result = run_pdiffcopy(option)
    assert result.returncode == 0
    assert result.stdout.strip() == pdiffcopy.cli.__doc__.strip()


def test_reference_shows_the_usage():
    """What the command-line reference shows is what ``--help`` prints."""
    lines = (HERE / "docs" / "cli.rst").read_text(encoding="utf-8").splitlines()
    block = lines[lines.index(".. usage-begin") + 1 : lines.index(".. usage-end")]
    literal = [line for line in block if not line or line.startswith(" ")]
    assert textwrap.dedent("\n".join(literal)).strip() == pdiffcopy.cli.__doc__.strip()


def test_usage_names_all_options():
    """An option that's understood is documented, and one that's documented is understood."""
    understood = set(OPTIONS) | {"--archive", "--verbose", "--quiet", "--version", "--help"}
    listed = re.findall(r"^  (-.*)$", pdiffcopy.cli.__doc__, re.MULTILINE)
    documented = set(re.findall(r"--[a-z-]+", " ".join(listed)))
    assert documented == understood
    shorts = dict(re.findall(r"(-\w), (--[a-z-]+)", " ".join(listed)))
    assert shorts == SHORT


def test_version_is_printed():
    """Nothing but the name and the version."""
    result = run_pdiffcopy("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pdiffcopy {__version__}\n", "")


# Usage errors {{{1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "two locations"),
        (["--nonsense", "a", "b"], "--nonsense"),
        (["-x", "a", "b"], "-x"),
        (["a", "b", "--block-size"], "requires argument (pdiffcopy"),
        (["a", "b", "--blocksize=5"], "is it --block-size?"),
        (["--progress", "a", "b"], "and not only 'b'"),
        (["a", "b", "-b"], "-b"),
        (["--dry-run=yes", "a", "b"], "--dry-run"),
        (["--block-size=", "a", "b"], "--block-size"),
        (["--block-size=0", "a", "b"], "block size"),
        (["--block-size=2GiB", "a", "b"], "block size"),
        (["--block-size=big", "a", "b"], "--block-size"),
        (["--block-size=4 potatoes", "a", "b"], "--block-size"),
        (["--block-size=\u0663", "a", "b"], "--block-size"),
        (["--block-size=1.5", "a", "b"], "in bytes"),
        (["--bwlimit=10Mbit", "a", "b"], "in bytes"),
        (["--concurrency=1025", "--listen=127.0.0.1:8080"], "from 1 to 1024"),
        (["--listen=http://127.0.0.1:8080"], "without a scheme"),
        (["--block-size=-5", "a", "b"], "--block-size"),
        (["--block-size=" + "9" * 5000, "a", "b"], "--block-size"),
        (["--block-size=" + "9" * 400 + ".5", "a", "b"], "--block-size"),
        (["--concurrency=0", "a", "b"], "--concurrency"),
        (["--concurrency=-1", "a", "b"], "--concurrency"),
        (["--concurrency=many", "a", "b"], "--concurrency"),
        (["--concurrency=\u0663", "a", "b"], "--concurrency"),
        (["--concurrency=100000", "a", "b"], "concurrency"),
        (["--concurrency=" + "9" * 5000, "a", "b"], "concurrency"),
        (["--benchmark=0", "a", "b"], "--benchmark"),
        (["--benchmark=x", "a", "b"], "--benchmark"),
        (["--hash-method=", "a", "b"], "--hash-method"),
        (["--hash-method=nonsense", "a", "b"], "nonsense"),
        (["--hash-method=shake_128", "a", "b"], "shake_128"),
        (["--timeout=0", "a", "b"], "--timeout"),
        (["--timeout=-1", "a", "b"], "--timeout"),
        (["--timeout=nan", "a", "b"], "--timeout"),
        (["--timeout=inf", "a", "b"], "--timeout"),
        (["--timeout=soon", "a", "b"], "--timeout"),
        (["--timeout=\u0663", "a", "b"], "--timeout"),
        (["--timeout=1_0", "a", "b"], "--timeout"),
        (["--timeout=3000000", "a", "b"], "at most"),
        (["--retries=-1", "a", "b"], "--retries"),
        (["--retries=x", "a", "b"], "--retries"),
        (["--ca-file=", "a", "b"], "--ca-file"),
        (["--token-file=/nothing", "a", "b"], "/nothing"),
        (["--listen="], "--listen"),
        (["--listen=8080", "a", "b"], "--listen"),
        (["--listen=0"], "port"),
        (["--listen=65536"], "port"),
        (["--listen=127.0.0.1:x"], "port"),
        (["--listen=::1:8080"], "brackets"),
        (["--listen=a b"], "host name"),
        (["--root=/x", "a", "b"], "--root"),
        (["--read-only", "a", "b"], "--read-only"),
        (["--devices", "a", "b"], "--devices"),
        (["--certfile=/x", "a", "b"], "--certfile"),
        (["--keyfile=/x", "a", "b"], "--keyfile"),
        (["--dry-run"], "--dry-run"),
        (["--whole-file", "--listen=8080"], "--whole-file"),
        (["--block-size=5", "--listen=8080"], "--block-size"),
        (["--no-verify", "--listen=8080"], "--no-verify"),
        (["--json", "--listen=8080"], "--json"),
        (["--fsync", "--listen=8080"], "--fsync"),
        (["--certfile=/x", "--listen=8080"], "--keyfile"),
        (["--root=/nothing", "--listen=8080"], "/nothing"),
        (["host:99999/x", "b"], "port"),
        (["http://host", "b"], "file"),
        (["http://host/a?b", "b"], "%3F"),
        (["", "b"], "empty"),
    ],
)  # fmt: skip
def test_mistake_of_a_user_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    """Whatever is wrong with a command line is said in one line that names it, and nothing is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(UsageError if "/nothing" not in message else Exception) as info:
        pdiffcopy.cli._run(arguments)
    assert message in str(info.value)
    assert "\n" not in str(info.value)
    assert info.value.exit_code == 1
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path) == ["a"]


def test_usage_error_in_a_real_process(tmp_path):
    """Exit code 1 and one line."""
    assert "two locations" in assert_fails(run_pdiffcopy("one"), 1)
    assert "--nonsense" in assert_fails(run_pdiffcopy("--nonsense"), 1)
    assert "--listen" in assert_fails(run_pdiffcopy("--listen=8080", "a", "b"), 1)


def test_options_may_stand_anywhere(files):
    """Also after the locations; what follows two dashes is a location in any case."""
    source, target = files
    assert run_pdiffcopy(source, target, "-b", "4KiB", "-q").returncode == 0
    assert target.read_bytes() == source.read_bytes()
    assert "two locations" in assert_fails(run_pdiffcopy("--", "--help"), 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4096", 4096), ("4KiB", 4096), ("4 KiB", 4096), ("4Ki", 4096), ("4k", 4000), ("4KB", 4000), ("1.5KiB", 1536)],
)
def test_block_size_takes_units(files, size, expected):
    """A number of bytes, or a number and a unit: those with an i are powers of 1024."""
    result = run_pdiffcopy("--json", "-n", "-b", size, *files)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["block_size"] == expected


# Runs {{{1


def test_all_options_of_a_run_reach_it(files, server):
    """Short and long spellings, of a delta and of a whole-file copy."""
    source, target = files
    options = ["-b4096", "-mmd5", "-c3", "--timeout=30", "--retries=1", "--fsync", "--json"]
    result = run_pdiffcopy(*options, source, server.location(target))
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["block_size"], facts["hash_method"], facts["delta_transfer"]) == (4096, "md5", True)
    assert (facts["blocks_changed"], facts["verification"]) == (2, "verified")
    result = run_pdiffcopy("--whole-file", "--no-verify", "--json", server.location(source), target)
    facts = json.loads(result.stdout)
    assert (facts["delta_transfer"], facts["verification"]) == (False, "skipped")
    assert target.read_bytes() == source.read_bytes()


def test_json_is_one_object(files, server):
    """One line on stdout, with sizes in bytes and times in seconds; the log stays on stderr."""
    source, target = files
    result = run_pdiffcopy("--json", "-b", str(BLOCK), server.location(source), target)
    facts = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert facts.pop("elapsed") > 0
    size = source.stat().st_size
    assert facts == {
        "source": f"{server.origin}{source}", "target": str(target), "outcome": "updated", "dry_run": False,
        "delta_transfer": True,
        "block_size": BLOCK, "hash_method": "blake3", "size": size, "similarity": 0.75, "verification": "verified",
        "blocks_compared": 8, "blocks_changed": 2, "bytes_compared": size, "bytes_moved": BLOCK + 100,
        "bytes_verified": BLOCK + 100, "retries": 0, "watched": True, "claimed": True, "bytes_cut": 0,
        "bytes_grown": 0, "bytes_left_alone": 0, "bytes_zeroed": 0,
    }  # fmt: skip
    assert "2 of 8 blocks differed" in result.stderr


def test_names_mean_what_the_kernel_takes_them_for(files, tmp_path):
    """A name that leads through a link and back lies beside what the link leads to."""
    source, _target = files
    for folder in ("here", "there", "there/deep"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "deep")
    (tmp_path / "here" / "file").write_bytes(b"untouched")
    for name in ("link/../file", str(tmp_path / "here" / "link" / ".." / "file")):
        result = run_pdiffcopy(source, name, cwd=tmp_path / "here")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "here" / "file").read_bytes() == b"untouched"
        assert (tmp_path / "there" / "file").read_bytes() == source.read_bytes()
        (tmp_path / "there" / "file").unlink()


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="Python 3.13.0 can't import its own modules there")
def test_working_directory_that_is_gone_only_matters_to_relative_names(files, tmp_path):
    """A backup script may well stand in a folder that was removed."""
    source, target = files
    steps = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); from pdiffcopy.cli import main; main()"
    for arguments, code in (((source, target), 0), ((source, "target"), 1)):
        command = [sys.executable, "-c", steps, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == code, result.stderr
    assert "the working directory doesn't exist any more" in error_lines(result)[0]


def test_missing_device_does_not_become_a_file(files, server):
    """Below /dev that would be a file in memory."""
    source, _ = files
    for name in ("/dev/pdiffcopy-missing", "/dev/pdiffcopy-group/missing"):
        for place in (name, f"127.0.0.1:{server.port}{name}"):
            result = run_pdiffcopy(source, place)
            assert result.returncode == 1
            assert "there is no such device" in error_lines(result)[0]
        assert not os.path.exists(name) and not os.path.exists("/dev/pdiffcopy-group")


@pytest.mark.parametrize("option", ["--dry-run", "-v"])
def test_what_is_cut_and_added_is_told(files, server, option):
    """Otherwise a source that is empty by mistake would look like nothing to do."""
    source, target = files
    data = source.read_bytes()
    would_be = "would be " if option == "--dry-run" else ""
    for older, newer, name, verb in (
        (data, data[:-2048], "bytes_cut", "cut off"),
        (data[:-2048], data, "bytes_grown", "added"),
    ):
        source.write_bytes(newer)
        target.write_bytes(older)
        result = run_pdiffcopy(option, "--json", source, server.location(target))
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)[name] == 2048
        assert f"2 KiB {would_be}{verb}" in result.stderr


@pytest.mark.parametrize("arguments", [["--nonsense"], ["a"], ["host:x", "b"], ["/missing", "/tmp/x/y"]])
def test_json_tells_of_every_failure(arguments):
    """Usage errors included: who parses stdout finds an object there."""
    result = run_pdiffcopy("--json", *arguments)
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert document["exit_code"] == 1
    assert error_lines(result) == [f"pdiffcopy: {document['error']}"]


@pytest.mark.parametrize(
    ("arguments", "is_wanted"),
    [
        (["--js", "/missing", "/tmp/x/y"], True),
        (["--json", "--", "/missing", "/tmp/x/y"], True),
        (["--", "--json", "/tmp/x/y"], False),
        (["--token-file", "--json", "/missing", "/tmp/x/y"], False),
        (["--nonsense", "--jso"], True),
        (["--nonsense", "--", "--json"], False),
        (["--block-size", "--json"], True),
    ],
)
def test_json_is_for_those_who_want_it(arguments, is_wanted):
    """What counts is what the options say, or seem to say where they make no sense."""
    result = run_pdiffcopy(*arguments)
    assert result.returncode == 1
    assert bool(result.stdout) == is_wanted
    (line,) = error_lines(result)
    assert not is_wanted or line == f"pdiffcopy: {json.loads(result.stdout)['error']}"


def test_report_that_can_not_be_written_is_an_error(files):
    """A full disk would have another program take nothing for an answer."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pdiffcopy", "--json", *map(str, files)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "Can't write to stdout: No space left on device" in line
    assert files[0].read_bytes() == files[1].read_bytes()


def test_report_that_nobody_can_read_is_an_error(files):
    """The same goes for a closed stdout."""
    command = f"exec '{sys.executable}' -m pdiffcopy --json '{files[0]}' '{files[1]}' >&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "Can't write to stdout: Bad file descriptor" in line


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nobody_elses_files(files, server, closed):
    """What is opened next would get their numbers, and a message would end up in the target."""
    source, target = files
    for options, place, code in (("-v", target, 0), ("-v", server.location(target), 0), ("--nonsense", target, 1)):
        command = f"exec '{sys.executable}' -m pdiffcopy {options} '{source}' '{place}' {closed}"
        assert subprocess.run(["sh", "-c", command], capture_output=True).returncode == code
        assert target.read_bytes() == source.read_bytes()


def test_without_json_stdout_is_empty(files):
    """What there is to say goes to stderr."""
    result = run_pdiffcopy(*files)
    assert (result.returncode, result.stdout) == (0, "")


def test_dry_run_reports_and_writes_nothing(files):
    """The similarity is there, the target is untouched."""
    before = snapshot(files[1])
    result = run_pdiffcopy("-n", "-b", str(BLOCK), *files)
    assert result.returncode == 0
    assert "2 of 8 blocks differ (75.00% similar by blake3)" in result.stderr
    assert snapshot(files[1]) == before


def test_verbosity(files):
    """By default there's a summary, ``-q`` leaves it out, ``-v`` adds to it."""
    source, target = files
    write_pattern(target, 3 * BLOCK, seed=9)
    assert "DEBUG" in run_pdiffcopy("-vvv", "-b", str(BLOCK), source, target).stderr
    assert "property" not in run_pdiffcopy("-vvv", "-n", source, target).stderr
    normal = run_pdiffcopy("-b", str(BLOCK), source, target).stderr
    assert "0 of 8 blocks differed" in normal and "DEBUG" not in normal
    for option in ("-q", "--quiet"):
        assert run_pdiffcopy(option, source, target).stderr == ""


def test_no_progress_bar_without_a_terminal(files):
    """A log file gets no bar and no escape sequences."""
    result = run_pdiffcopy("-v", "-b", "1", *files)
    assert result.returncode == 0
    assert "\r" not in result.stderr and "\x1b" not in result.stderr and "%|" not in result.stderr


def _run_on_terminal(*arguments) -> tuple[int, str]:
    """Run the program with stderr on a terminal, and no patience. Returns the exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        steps = "from pdiffcopy.client import progress; progress.DELAY = 0; from pdiffcopy.cli import main; main()"
        command = [sys.executable, "-c", steps, *map(os.fspath, arguments)]
        with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL) as process:
            os.close(theirs)
            output = b""
            try:
                while chunk := terminal.read(4096):
                    output += chunk
            except OSError:  # that's how the end of a terminal looks on Linux
                pass
            return process.wait(RUN_TIMEOUT), output.decode()


def test_progress_bar_on_a_terminal(files):
    """On a terminal there's a bar with time left and rate, which is gone in the end."""
    status, output = _run_on_terminal("-b", "512", *files)
    assert status == 0
    assert re.search(r"\rComparing: +0%\| +\|\?, +\?B/s", output)
    *_, blank, summary = output.rstrip().split("\r")
    assert "%|" not in blank + summary
    assert "2 of 57 blocks differed" in summary


# Failures {{{1


def test_missing_source_is_one_line(files, server):
    """The line names the file."""
    _source, target = files
    assert "/nothing" in assert_fails(run_pdiffcopy("/nothing", target), 1)
    line = assert_fails(run_pdiffcopy(server.location("/nothing"), target), 1)
    assert "/nothing" in line and str(server.port) in line


def test_unreachable_server_is_one_line(files):
    """The line names the server and what's wrong."""
    port = find_free_port()
    line = assert_fails(run_pdiffcopy("--retries=0", files[0], f"127.0.0.1:{port}/x"), 1)
    assert f"127.0.0.1:{port}" in line and "Connection refused (is it running, and is that its port?)" in line


def test_control_characters_are_escaped(tmp_path):
    """A name can't forge a line or move the cursor."""
    line = assert_fails(run_pdiffcopy(tmp_path / "a\n\x1b[2Jb", tmp_path / "target"), 1)
    assert r"a\n\x1b[2Jb" in line


def test_traceback_only_when_asked_for(tmp_path):
    """``-v`` shows where an error came from, unless that's the command line."""
    result = run_pdiffcopy("-avc", tmp_path / "source", tmp_path / "target")
    assert assert_fails(result, 1).startswith("pdiffcopy: --concurrency needs a whole number")
    arguments = [tmp_path / "nothing", tmp_path / "target"]
    assert "Traceback" not in run_pdiffcopy(*arguments).stderr
    result = run_pdiffcopy("-v", *arguments)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pdiffcopy: The source ")


@pytest.mark.parametrize("error", ["OSError(28, 'No space left')", "MemoryError", "ZeroDivisionError('by zero')"])
def test_what_nobody_expected_is_one_line(error):
    """There is a JSON object, and the traceback comes with -v."""
    code = f"""
        import sys, pdiffcopy.cli
        def fail(**options):
            raise {error}
        pdiffcopy.cli.run_client = fail
        pdiffcopy.cli.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "--json", "a", "b"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"pdiffcopy: {json.loads(result.stdout)['error']}\n"
    result = subprocess.run([*command, "-v"], capture_output=True, text=True)
    assert "Traceback" in result.stderr and error.partition("(")[0] in result.stderr


def _start(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "pdiffcopy", *map(os.fspath, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def _finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    stdout, stderr = process.communicate(timeout=RUN_TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def large(tmp_path):
    """A source that takes a while to copy in small blocks."""
    (tmp_path / "large").write_bytes(make_data(2**20) * 32)
    (tmp_path / "target").write_bytes(b"x")
    return tmp_path / "large", tmp_path / "target"


@pytest.fixture(scope="session")
def busy(tmp_path_factory):
    """A source and a target that are equal, which takes a while to find out."""
    names = [tmp_path_factory.mktemp("busy") / name for name in ("source", "target")]
    for name in names:
        with name.open("wb") as handle:
            for _ in range(256):
                handle.write(bytes(1024**2))
    return names


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_signal_ends_a_run(busy, options, number, status, word):
    """One line, the exit code that shells expect, no process left."""
    with _start("-m", "sha3_512", *options, *busy) as process:
        tasks = f"/proc/{process.pid}/task"
        family = wait_for(lambda: children_of(process.pid) or (options and len(os.listdir(tasks)) > 1), what="the work")
        process.send_signal(number)
        result = _finish(process)
    assert word in assert_fails(result, status)
    assert options or not any(map(is_alive, family))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place", ["finalizer", "callback"])
def test_signal_ends_a_run_wherever_it_arrives(place, number):
    """
    Python ignores exceptions in finalizers and in callbacks of weak references, but the user meant it.

    It arrives again, whatever the parent process did to alarms, but not while a child process is started.
    """
    code = """
        import os, sys, time, weakref
        from pdiffcopy import cli, processes

        def interrupt(_=None):
            os.kill(os.getpid(), int(sys.argv[2]))
            sum(range(1000))

        class Anything:
            if sys.argv[1] == "finalizer":
                __del__ = interrupt

        def run(arguments):
            anything = Anything()
            reference = weakref.ref(anything, interrupt) if sys.argv[1] == "callback" else None
            del anything
            is_disturbed = True
            try:
                with processes.delay_signals():
                    time.sleep(0.05)
                    is_disturbed = False
                time.sleep(60)
            finally:
                if is_disturbed:
                    os._exit(1)

        cli._run = run
        cli.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), place, str(number.value)]
    blocking = {"preexec_fn": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT, **blocking)
    assert_fails(result, 128 + number)


def test_terminal_that_goes_away_ends_a_run(busy):
    """Though there's nowhere left to write that to, the exit code is that of a hangup."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "pdiffcopy", "-m", "sha3_512", *map(str, busy)])
    family = wait_for(lambda: children_of(pid), what="the work")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    wait_for(lambda: not any(map(is_alive, family)), what="the end of the child processes")


def test_hangup_is_ignored_under_nohup(tmp_path, server):
    """A run that is started so that it outlives its terminal does."""
    data = write_pattern(tmp_path / "source", 4_000_000)
    write_pattern(tmp_path / "target", 4_000_000, seed=2)
    arguments = ["-b", "512", tmp_path / "source", server.location(tmp_path / "target")]
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with _start(*arguments, start_new_session=True, **ignoring) as process:
        wait_for(lambda: children_of(process.pid), what="the child processes")
        os.killpg(process.pid, signal.SIGHUP)
        result = _finish(process)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_next_run_completes_an_interrupted_one(tmp_path, server, number):
    """Whatever the state of the target, the next run makes it equal to the source."""
    data = write_pattern(tmp_path / "source", 4_000_000)
    write_pattern(tmp_path / "target", 4_000_000, seed=2)
    arguments = ["-b", "512", tmp_path / "source", server.location(tmp_path / "target")]
    with _start(*arguments, start_new_session=True) as process:
        family = wait_for(lambda: children_of(process.pid), what="the child processes")
        # A terminal sends Control-C, and its own end, to all processes of the program.
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        _finish(process)
    assert process.returncode == 128 + number
    wait_for(lambda: not any(map(is_alive, family)), what="the end of the child processes")
    assert run_pdiffcopy(*arguments).returncode == 0
    assert (tmp_path / "target").read_bytes() == data


def test_source_that_changes_is_exit_code_3(large):
    """The file may be a mixture: say so, and how to do better."""
    source, target = large
    with _start("-b", "512", source, target) as process:
        wait_for(lambda: target.stat().st_size == source.stat().st_size, what="the start of the transfer")
        os.utime(source, ns=(1, 1))
        line = assert_fails(_finish(process), 3)
    assert str(source) in line and "run again" in line


# Extras {{{1


def _run_without(module: str, *arguments) -> subprocess.CompletedProcess:
    """Run the program as if a package weren't installed."""
    code = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {module!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        from pdiffcopy.cli import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(os.fspath, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT)


@pytest.mark.parametrize("module", ["flask", "gunicorn", "werkzeug"])
def test_missing_server_extra_is_named(module):
    """Without Flask or gunicorn there's no server, and the error says what to install."""
    line = assert_fails(_run_without(module, "--listen", f"127.0.0.1:{find_free_port()}"), DependencyError.exit_code)
    assert "pdiffcopy[server]" in line and module in line


@pytest.mark.parametrize("module", ["requests", "urllib3"])
def test_missing_client_extra_is_named(module, server, files):
    """Without requests there's no way to a server, and the error says what to install."""
    source, target = files
    line = assert_fails(_run_without(module, source, server.location(target)), DependencyError.exit_code)
    assert "pdiffcopy[client]" in line and module in line


def test_client_works_without_the_server_extra(files, server):
    """Each half works on its own."""
    source, target = files
    result = _run_without("flask", source, server.location(target))
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes()


def test_imports_stay_on_their_side():
    """Neither half imports the other, and none imports what Python 3.13 dropped (or what needs it)."""

    def modules_after_importing(*modules):
        code = f"import sys, {', '.join(f'pdiffcopy.{module}' for module in modules)}; print(*sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(result.stdout.split())

    client = modules_after_importing("client", "client.benchmark", "client.progress")
    assert not client & {"flask", "gunicorn", "werkzeug", "requests", "pdiffcopy.server"}
    server = modules_after_importing("server", "server.daemon", "files.confinement")
    assert not server & {"requests", "pdiffcopy.client", "pdiffcopy.mp", "pdiffcopy.processes"}
    everything = client | server | modules_after_importing("cli", "client.http")
    assert not everything & {"pipes", "executor", "humanfriendly.testing"}


def test_short_run_imports_no_more_than_it_needs(files, server):
    """It takes as long as its imports."""
    source, target = files
    code = """
        import sys

        before = set(sys.modules)
        from pdiffcopy.cli import run_client

        run_client(source=sys.argv[1], target=sys.argv[2])
        print(*(set(sys.modules) - before))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), source, server.location(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert target.read_bytes() == source.read_bytes()
    modules = set(result.stdout.split())
    assert {"requests", "pdiffcopy.client.run"} < modules
    assert not modules & {"asyncio", "multiprocessing", "tqdm", "humanfriendly.prompts", "humanfriendly.tables"}
    others = {"client.benchmark", "client.workers", "files.confinement", "mp", "operations", "processes", "server"}
    assert not modules & {f"pdiffcopy.{name}" for name in others}


# The server {{{1


def test_server_is_started_without_arguments(monkeypatch):
    """``pdiffcopy`` alone is a server on the default port of all addresses (so nothing is really started here)."""
    started = []
    monkeypatch.setattr(
        "pdiffcopy.server.daemon.Daemon.__init__", lambda self, app, address, *rest: started.append(address)
    )
    monkeypatch.setattr("pdiffcopy.server.daemon.Daemon.run", lambda self: started.append("run"))
    pdiffcopy.cli._run([])
    assert started == [("", DEFAULT_PORT), "run"]
