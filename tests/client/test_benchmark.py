"""Tests for :mod:`pdiffcopy.client.benchmark`: a real client, a real server and, where there is one, a real rsync."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess

import pytest

from pdiffcopy.client import Client
from pdiffcopy.client.benchmark import PERMISSION_VARIABLE, RSYNC_VARIABLES, Measurement, format_table, mutate_target
from pdiffcopy.exceptions import BenchmarkAbortedError, FileMissingError, ProgramError, UsageError
from tests.support import (
    can_connect,
    error_lines,
    find_free_port,
    make_data,
    run_pdiffcopy,
    snapshot,
    wait_for,
    write_pattern,
)

BLOCK = 4096
SIZE = 100 * BLOCK + 10
ALLOWED = {PERMISSION_VARIABLE: "allowed"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing that was configured outside of the tests counts."""
    for name in (PERMISSION_VARIABLE, *RSYNC_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    """A source and a target that equals it."""
    write_pattern(tmp_path / "source", SIZE)
    write_pattern(tmp_path / "target", SIZE)
    return tmp_path / "source", tmp_path / "target"


@pytest.fixture
def rsync_daemon(tmp_path):
    """An rsync daemon whose module ``data`` stands for the folder of the files. Gives the environment variables."""
    if not shutil.which("rsync"):
        pytest.skip("rsync isn't installed")
    port = find_free_port()
    config = tmp_path / "rsyncd.conf"
    # Otherwise a daemon that root starts becomes a user who may not look into our folder.
    user = "uid = root\ngid = root\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"use chroot = no\npid file = {tmp_path}/rsyncd.pid\nlog file = {tmp_path}/rsyncd.log\n"
        f"{user}[data]\npath = {tmp_path}\nread only = yes\n"
    )
    command = ["rsync", "--daemon", "--no-detach", f"--port={port}", "--address=127.0.0.1", f"--config={config}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: can_connect(port) or process.poll() is not None, what="the rsync daemon")
            assert process.poll() is None
            yield dict(zip(RSYNC_VARIABLES, (f"127.0.0.1:{port}", "data", str(tmp_path)), strict=True))
        finally:
            process.terminate()


def differing_blocks(one: bytes, two: bytes) -> list[int]:
    """The indexes of the blocks that differ."""
    return [o // BLOCK for o in range(0, len(one), BLOCK) if one[o : o + BLOCK] != two[o : o + BLOCK]]


# The damage {{{1


@pytest.mark.parametrize(("percentage", "expected"), [(0, 0), (1, 1), (10, 10), (50, 50), (100, 101), (1000, 101)])
def test_mutation_damages_as_many_blocks_as_it_should(files, percentage, expected):
    """A percentage of the blocks, all of their bytes, and never the size of the file."""
    source, target = files
    client = Client(source=source, target=target, block_size=BLOCK)
    before = make_data(SIZE)
    changed = mutate_target(client.target.replica, BLOCK, percentage)
    after = target.read_bytes()
    assert len(after) == SIZE
    assert len(differing_blocks(before, after)) == expected
    assert changed == sum(a != b for a, b in zip(before, after, strict=True))
    assert source.read_bytes() == before


def test_mutation_touches_blocks_all_over_the_file(files):
    """Not only its head: a tenth of the blocks lies in each part of the file, and not side by side."""
    source, target = files
    Client(source=source, target=target, block_size=BLOCK).mutate_target(10)
    damaged = differing_blocks(source.read_bytes(), target.read_bytes())
    assert min(damaged) < 30 and max(damaged) > 70
    assert any(30 <= index <= 70 for index in damaged)
    assert sum(b - a == 1 for a, b in itertools.pairwise(damaged)) < len(damaged) // 2


def test_mutation_is_repeatable_and_undoes_itself(files):
    """So that both programs repair the same damage."""
    source, target = files
    client = Client(source=source, target=target, block_size=BLOCK)
    client.mutate_target(30)
    damaged = target.read_bytes()
    client.synchronize()
    client.mutate_target(30)
    assert target.read_bytes() == damaged
    client.mutate_target(30)
    assert target.read_bytes() == source.read_bytes()


def test_mutation_needs_a_local_file(files, server):
    """Nothing is damaged elsewhere."""
    source, target = files
    before = snapshot(target)
    with pytest.raises(UsageError, match="local file"):
        Client(source=source, target=server.location(target)).mutate_target(10)
    with pytest.raises(FileMissingError):
        Client(source=source, target=target.parent / "nothing").mutate_target(10)
    assert snapshot(target) == before


# The benchmark {{{1


def test_benchmark_measures_and_restores(files, server, monkeypatch, capsys):
    """As many lines as measurements, each with a larger delta, and a target that's as it should be."""
    monkeypatch.setenv(PERMISSION_VARIABLE, "allowed")
    source, target = files
    client = Client(source=server.location(source), target=target, block_size=BLOCK, benchmark=4)
    measurements = client.run_benchmark()
    assert [m.percentage for m in measurements] == [25, 50, 75, 100]
    assert [m.moved for m in measurements] == [m.changed for m in measurements]
    assert measurements[-1].changed == SIZE
    assert all(m.runtime > 0 and m.rsync_runtime is None for m in measurements)
    assert target.read_bytes() == source.read_bytes()
    table = capsys.readouterr().out
    assert "Delta size" in table and "Data transferred" in table and "Runtime of pdiffcopy" in table
    assert "rsync" not in table
    for percentage in ("25%", "50%", "75%", "100%"):
        assert percentage in table


def test_synchronize_runs_the_benchmark(files, monkeypatch, capsys):
    """The property decides what the method does."""
    monkeypatch.setenv(PERMISSION_VARIABLE, "allowed")
    source, target = files
    Client(source=source, target=target, block_size=BLOCK, benchmark=1).synchronize()
    assert "100%" in capsys.readouterr().out


def test_benchmark_brings_the_target_into_line_first(files, monkeypatch, capsys):
    """What is measured is the damage, not what differed before; a missing target is made."""
    monkeypatch.setenv(PERMISSION_VARIABLE, "allowed")
    source, target = files
    target.unlink()
    (measurement,) = Client(source=source, target=target, block_size=BLOCK, benchmark=1).run_benchmark()
    assert measurement.moved == measurement.changed == SIZE
    assert target.read_bytes() == source.read_bytes()


def test_benchmark_on_the_command_line(files, server):
    """The table is on stdout."""
    source, target = files
    result = run_pdiffcopy("--benchmark=2", "-b", str(BLOCK), server.location(source), target, env=ALLOWED)
    assert result.returncode == 0, result.stderr
    assert "50%" in result.stdout and "100%" in result.stdout
    assert target.read_bytes() == source.read_bytes()


def test_benchmark_as_json(files):
    """The numbers of the table for a program, as the only thing on stdout."""
    result = run_pdiffcopy("--benchmark=2", "--json", "-b", str(BLOCK), *files, env=ALLOWED)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert "Delta size" in result.stderr
    assert [m["percentage"] for m in document["measurements"]] == [50, 100]
    assert set(document["measurements"][0]) == {"percentage", "changed", "moved", "runtime", "rsync_runtime"}


@pytest.mark.parametrize("answer", ["n\n", "no\n", "\n", ""])
def test_refusal_leaves_the_file_alone(files, answer):
    """Without permission (no answer is none) nothing happens."""
    before = snapshot(files[1])
    result = run_pdiffcopy("-B1", *files, input=answer)
    assert result.returncode == BenchmarkAbortedError.exit_code == 1
    assert "pdiffcopy: The benchmark was aborted: nothing was changed" in error_lines(result)
    assert "Traceback" not in result.stderr
    assert snapshot(files[1]) == before


@pytest.mark.parametrize("value", ["", "yes", "ALLOWED", "1"])
def test_only_the_documented_word_is_permission(files, value):
    """Half a word doesn't damage a file."""
    before = snapshot(files[1])
    result = run_pdiffcopy("-B1", *files, input="", env={PERMISSION_VARIABLE: value})
    assert result.returncode == 1
    assert snapshot(files[1]) == before


def test_permission_can_be_given(files):
    """An operator who says yes gets the table."""
    result = run_pdiffcopy("-B1", "-b", str(BLOCK), *files, input="yes\n")
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stdout


def test_benchmark_needs_a_local_target(files, server):
    """It's said before anybody is asked, or anything is damaged."""
    before = snapshot(files[1])
    result = run_pdiffcopy("-B1", files[0], server.location(files[1]), env=ALLOWED)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "has to be a local file" in line
    assert snapshot(files[1]) == before


def test_dry_run_damages_nothing(files):
    """It couldn't repair that. The damage alone is refused as well."""
    before = snapshot(files[1])
    result = run_pdiffcopy("-n", "-B2", *files, env=ALLOWED)
    (line,) = error_lines(result)
    assert result.returncode == 1 and "leave out --dry-run" in line
    with pytest.raises(UsageError, match="--dry-run"):
        Client(source=files[0], target=files[1], dry_run=True).mutate_target(50)
    assert snapshot(files[1]) == before


def test_target_may_be_a_folder(files, tmp_path):
    """What is damaged and repaired is the file in there."""
    (tmp_path / "folder").mkdir()
    result = run_pdiffcopy("-B1", "--json", "-b", str(BLOCK), files[0], tmp_path / "folder", env=ALLOWED)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["measurements"][0]["moved"] == SIZE
    assert (tmp_path / "folder" / "source").read_bytes() == files[0].read_bytes()


def test_interrupted_benchmark_says_that_the_damage_is_there(files, monkeypatch, caplog):
    """A failure in the middle is a failure, and a warning names the file."""
    monkeypatch.setenv(PERMISSION_VARIABLE, "allowed")
    source, target = files

    class Failing(Client):
        def run(self):
            if target.read_bytes() != source.read_bytes():
                raise ProgramError("no")
            return super().run()

    with pytest.raises(ProgramError, match="no"):
        Failing(source=source, target=target, block_size=BLOCK, benchmark=1).run_benchmark()
    assert f"{target} is still damaged" in caplog.text


# Beside rsync {{{1


def test_rsync_is_measured_too(files, server, rsync_daemon):
    """With the three variables there's one more column, and rsync repairs the same damage."""
    source, target = files
    env = {**ALLOWED, **rsync_daemon}
    result = run_pdiffcopy("--benchmark=2", "-b", str(BLOCK), server.location(source), target, env=env)
    assert result.returncode == 0, result.stderr
    assert "Runtime of rsync" in result.stdout
    assert target.read_bytes() == source.read_bytes()


def test_rsync_undoes_the_damage(files, rsync_daemon, monkeypatch):
    """It works on the file itself, in place, also when source and target were modified in the same second."""
    for name, value in {**ALLOWED, **rsync_daemon}.items():
        monkeypatch.setenv(name, value)
    source, target = files
    inode = target.stat().st_ino
    os.utime(source)
    measurements = Client(source=source, target=target, block_size=BLOCK, benchmark=2).run_benchmark()
    assert all(m.rsync_runtime > 0 for m in measurements)
    assert measurements[-1].moved == SIZE
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino == inode


@pytest.mark.parametrize("missing", RSYNC_VARIABLES)
def test_half_an_rsync_configuration_is_an_error(files, missing):
    """Before anything is damaged, and it names what's needed."""
    before = snapshot(files[1])
    values = zip(RSYNC_VARIABLES, ("127.0.0.1:1", "data", str(files[0].parent)), strict=True)
    env = {**ALLOWED, **dict(values), missing: ""}
    result = run_pdiffcopy("-B1", *files, env=env)
    assert result.returncode == UsageError.exit_code
    (line,) = error_lines(result)
    assert missing in line
    assert snapshot(files[1]) == before


def test_source_outside_of_the_rsync_module_is_an_error(files):
    """There's no name that rsync could fetch it by."""
    before = snapshot(files[1])
    env = {**ALLOWED, **dict(zip(RSYNC_VARIABLES, ("127.0.0.1:1", "data", "/nothing"), strict=True))}
    result = run_pdiffcopy("-B1", *files, env=env)
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "isn't below the root" in line
    assert snapshot(files[1]) == before


def test_failure_of_rsync_is_an_error(files):
    """A table with numbers of something that failed would be worse than none."""
    if not shutil.which("rsync"):
        pytest.skip("rsync isn't installed")
    port = find_free_port()
    env = {**ALLOWED, **dict(zip(RSYNC_VARIABLES, (f"127.0.0.1:{port}", "data", str(files[0].parent)), strict=True))}
    result = run_pdiffcopy("-B1", *files, env=env)
    assert result.returncode == 1
    assert error_lines(result)[-1].startswith("pdiffcopy: rsync failed with exit code")
    assert result.stdout == ""


def test_missing_rsync_is_an_error(files, tmp_path):
    """It's named, though it's the operator's system that lacks it."""
    env = {**ALLOWED, **dict(zip(RSYNC_VARIABLES, ("127.0.0.1:1", "data", str(files[0].parent)), strict=True))}
    result = run_pdiffcopy("-B1", *files, env={**env, "PATH": str(tmp_path)})
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert "Can't run rsync" in line


def test_table_has_a_column_for_rsync_only_when_it_ran():
    """Nothing is shown that wasn't measured."""
    with_rsync = format_table([Measurement(10, 1024, 2048, 1.5, 61.25)])
    without = format_table([Measurement(10, 1024, 2048, 1.5, None)])
    for text in ("10%", "1 KiB", "2 KiB", "1.5 seconds"):
        assert text in with_rsync and text in without
    assert "1 minute and 1.25 seconds" in with_rsync and "Runtime of rsync" in with_rsync
    assert "rsync" not in without
