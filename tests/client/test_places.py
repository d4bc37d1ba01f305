"""What the name of a target stands for."""

from __future__ import annotations

import os

import pytest

from tests.support import error_lines, run_pdiffcopy


@pytest.fixture(params=["local", "upload"])
def place_of(request):
    """A function that makes the location of a target."""
    if request.param == "local":
        return str
    server = request.getfixturevalue("server")
    return lambda name: f"127.0.0.1:{server.port}{name}"  # with all its dots


@pytest.fixture
def folder(tmp_path):
    """Where a folder is, and a file next to it, which is the source."""
    (tmp_path / "source").write_bytes(b"data")
    (tmp_path / "there" / "inner").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "place", "options"),
    [
        ("new/.", "new", []),
        ("new/.", "new", ["--atomic"]),
        ("new/.", "new", ["-n"]),
        ("new/sub/.", "new/sub", []),
        ("new/./", "new", []),
        ("there/.", "there", []),
        ("there/inner/..", "there", []),
        ("there/../new/.", "new", []),
    ],
)
def test_dots_at_the_end_stand_for_a_folder(folder, place_of, target, place, options):
    """As a slash does, whether it's there or not."""
    result = run_pdiffcopy(*options, folder / "source", place_of(f"{folder}/{target}"))
    assert result.returncode == 0, result.stderr
    if "-n" in options:
        assert sorted(os.listdir(folder)) == ["source", "there"]
    else:
        assert (folder / place / "source").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        *((target, []) for target in ("new/..", "new/../", "new/sub/..", "new/../other", "there/new/../other")),
        ("new/../other", ["--atomic"]),
        ("new/../other", ["-r"]),
    ],
)
def test_what_is_missing_has_nothing_above_it(folder, place_of, target, options):
    """One line says so, and no folder is left behind."""
    source = folder / "there" / "inner" if "-r" in options else folder / "source"
    result = run_pdiffcopy(*options, source, place_of(f"{folder}/{target}"))
    assert result.returncode == 1
    (line,) = error_lines(result)
    assert ".. is behind a folder that doesn't exist" in line
    assert sorted(os.listdir(folder)) == ["source", "there"] and os.listdir(folder / "there") == ["inner"]
