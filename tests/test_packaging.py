"""Does the package have what it promises, as source and as distribution?"""

from __future__ import annotations

import email
import importlib
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from property_manager import PropertyManager, cached_property, lazy_property, mutable_property, required_property

import pdiffcopy
from pdiffcopy import exceptions
from pdiffcopy.client import Client, Location
from pdiffcopy.cores import count_cores
from pdiffcopy.mp import Promise, WorkerPool

HERE = Path(__file__).parents[1]

# The documented interface of version 1.0.1 {{{1

FUNCTIONS = {
    "pdiffcopy.cli.main": "()",
    "pdiffcopy.cli.run_client": "(**options)",
    "pdiffcopy.cli.run_server": "(**options)",
    "pdiffcopy.client.get_hashes_fn": "(location, **options)",
    "pdiffcopy.client.transfer_block_fn": "(offset, source, target, block_size)",
    "pdiffcopy.client.Client.compute_transfer_size": "(self, offsets)",
    "pdiffcopy.client.Client.find_changes": "(self)",
    "pdiffcopy.client.Client.mutate_target": "(self, percentage)",
    "pdiffcopy.client.Client.run_benchmark": "(self)",
    "pdiffcopy.client.Client.synchronize": "(self)",
    "pdiffcopy.client.Client.synchronize_once": "(self)",
    "pdiffcopy.client.Client.transfer_changes": "(self, offsets)",
    "pdiffcopy.client.Location.get_hashes": "(self, **options)",
    "pdiffcopy.client.Location.get_url": "(self, endpoint, **params)",
    "pdiffcopy.client.Location.read_block": "(self, offset, size)",
    "pdiffcopy.client.Location.resize": "(self, size)",
    "pdiffcopy.client.Location.write_block": "(self, offset, data)",
    "pdiffcopy.exceptions.ProgramError.__init__": "(self, text, *args, **kw)",
    "pdiffcopy.hashing.compute_hashes": "(filename, block_size, method, concurrency)",
    "pdiffcopy.hashing.hash_worker": "(offset, block_size, filename, method)",
    "pdiffcopy.mp.Promise.__init__": "(self, **options)",
    "pdiffcopy.mp.Promise.run": "(self)",
    "pdiffcopy.mp.Promise.join": "(self)",
    "pdiffcopy.mp.WorkerPool.__iter__": "(self)",
    "pdiffcopy.mp.WorkerPool.__enter__": "(self)",
    "pdiffcopy.mp.WorkerPool.__exit__": "(self, exc_type, exc_value, traceback)",
    "pdiffcopy.mp.generator_adapter": "(concurrency, generator_fn, input_queue, log_level)",
    "pdiffcopy.mp.worker_adapter": "(input_queue, log_level, output_queue, worker_fn)",
    "pdiffcopy.operations.get_file_info": "(filename)",
    "pdiffcopy.operations.get_file_size": "(filename)",
    "pdiffcopy.operations.read_block": "(filename, offset, size)",
    "pdiffcopy.operations.resize_file": "(filename, size)",
    "pdiffcopy.operations.write_block": "(filename, offset, data)",
    "pdiffcopy.server.start_server": "()",
}

PROPERTIES = {
    Client: {
        mutable_property: "benchmark block_size concurrency delta_transfer dry_run hash_method source target",
    },
    Location: {
        mutable_property: "expression filename hostname port_number",
        cached_property: "exists file_info file_size",
        property: "label",
    },
    WorkerPool: {
        required_property: "concurrency generator_fn worker_fn",
        mutable_property: "log_level polling_interval",
        lazy_property: "all_processes generator_process input_queue output_queue worker_processes",
    },
}


def _resolve(path: str):
    parts = path.split(".")
    found = importlib.import_module(".".join(parts[:2]))
    for name in parts[2:]:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", FUNCTIONS)
def test_documented_function_takes_what_it_took(path):
    """The parameters have their names and their order; those that were added since are optional."""
    function = _resolve(path)
    assert inspect.getdoc(function)
    ours = list(inspect.signature(function).parameters.values())
    theirs = [name for name in FUNCTIONS[path].strip("()").split(", ") if name]
    spelled = [{"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "") + p.name for p in ours]
    assert spelled[: len(theirs)] == theirs
    assert all(parameter.default is not inspect.Parameter.empty for parameter in ours[len(theirs) :])


@pytest.mark.parametrize(
    ("cls", "kind", "name"),
    [(cls, kind, name) for cls, kinds in PROPERTIES.items() for kind, names in kinds.items() for name in names.split()],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_documented_property_behaves_as_documented(cls, kind, name):
    """Each is there, is of the documented kind and has a docstring."""
    found = inspect.getattr_static(cls, name)
    assert isinstance(found, kind)
    assert inspect.getdoc(found)


def test_documented_constants():
    """The defaults are what they were."""
    assert pdiffcopy.BLOCK_SIZE == 1048576
    assert max(2, count_cores() // 3) == pdiffcopy.DEFAULT_CONCURRENCY
    assert pdiffcopy.DEFAULT_PORT == 8080


def test_documented_defaults():
    """A client does without any configuration what it did before."""
    client = Client()
    assert (client.benchmark, client.block_size, client.concurrency) == (0, 1048576, pdiffcopy.DEFAULT_CONCURRENCY)
    assert (client.delta_transfer, client.dry_run, client.hash_method) == (True, False, "sha1")
    location = Location(expression="/x")
    assert (location.hostname, location.port_number) == (None, None)


def test_documented_superclasses():
    """What a program may rely on when it catches, subclasses or asks."""
    for cls in (Client, Location, WorkerPool):
        assert issubclass(cls, PropertyManager)
    assert issubclass(Promise, multiprocessing.Process)
    for error in (exceptions.BenchmarkAbortedError, exceptions.DependencyError):
        assert issubclass(error, exceptions.ProgramError)
    assert importlib.import_module("pdiffcopy.server").app.name == "pdiffcopy.server"


def test_mutable_properties_return_to_their_defaults(monkeypatch):
    """Assigned and deleted again, as the documentation of the properties says."""
    client = Client(block_size=5, dry_run=True)
    assert (client.block_size, client.dry_run) == (5, True)
    del client.block_size
    client.dry_run = False
    assert (client.block_size, client.dry_run) == (1048576, False)


# The distribution {{{1


def _read_requirements(name: str) -> set[str]:
    lines = (HERE / name).read_text().splitlines()
    return {line.split(";")[0].replace(" ", "") for line in lines if line and not line.startswith(("#", "-"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist, and a wheel that was built from what the sdist contains."""
    pytest.importorskip("setuptools.build_meta")
    if int(importlib.import_module("setuptools").__version__.split(".")[0]) < 71:
        pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*_cache", ".venv", ".git", ".tox", "build", "dist", "*.egg-info", "__pycache__",
                                     ".hypothesis", "_build", "htmlcov", ".coverage*")  # fmt: skip
    shutil.copytree(HERE, folder / "tree", ignore=ignored)

    def build(hook: str, tree: Path) -> Path:
        code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder / result.stdout.splitlines()[-1]

    sdist = build("build_sdist", folder / "tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("build_wheel", unpacked)


def test_sdist_has_all_that_a_packager_needs(built):
    """Sources, tests, documentation and the files that they need."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert built[0].name == f"pdiffcopy-{pdiffcopy.__version__}.tar.gz"
    for pattern in (
        "pdiffcopy/**/*.py",
        "pdiffcopy/py.typed",
        "tests/**/*.py",
        "docs/*.rst",
        "*.txt",
        "*.rst",
        "*.toml",
        "Makefile",
    ):
        expected = {str(found.relative_to(HERE)) for found in HERE.glob(pattern)}
        assert expected and expected <= names


def test_wheel_has_the_package_and_nothing_else(built):
    """Neither tests nor benchmarks land in the site-packages of users."""
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(found.relative_to(HERE)) for found in HERE.glob("pdiffcopy/**/*.py")} | {"pdiffcopy/py.typed"}


def test_wheel_states_its_requirements(built):
    """Both sides need some, each extra adds its own."""
    with zipfile.ZipFile(built[1]) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "pdiffcopy = pdiffcopy.__main__:main" in archive.read(scripts).decode()
        assert any(re.search(r"LICENSE", name) for name in archive.namelist())
    assert fields["Version"] == pdiffcopy.__version__
    assert set(fields.get_all("Provides-Extra")) == {"client", "server"}
    stated: dict[str, set[str]] = {"": set(), "client": set(), "server": set()}
    for line in fields.get_all("Requires-Dist"):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        stated[extra[1] if extra else ""].add(requirement.replace(" ", ""))
    assert stated == {
        "": _read_requirements("requirements.txt"),
        "client": _read_requirements("requirements-client.txt"),
        "server": _read_requirements("requirements-server.txt"),
    }


def test_wheel_works_where_the_sources_are_not(built, tmp_path):
    """What is in the wheel is enough to run the program."""
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "source").write_bytes(b"data")
    # Its coverage isn't that of the sources.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environment["PYTHONPATH"] = str(tmp_path / "site")
    command = [sys.executable, "-c", "import pdiffcopy.cli; print(pdiffcopy.__file__); pdiffcopy.cli.main()"]
    result = subprocess.run(
        [*command, "source", "target"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "site"))
    assert (tmp_path / "target").read_bytes() == b"data"
