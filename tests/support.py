"""What the tests share: real servers and real clients in processes of their own, and files with known contents."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

STARTUP_TIMEOUT = 20
RUN_TIMEOUT = 120
UNPRIVILEGED = ("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()
"""What a command line begins with if the modes of files are to hold for root, too."""
MANY_BLOCKS = ("-b", "4096")
"""The option with which a file of a MiB has so many blocks that a run starts processes."""
STALL = 1
IMPATIENCE = f"from pdiffcopy.server import visitors as r; r.STALL_TIMEOUT = r.HEAD_TIMEOUT = {STALL}"
"""What makes a server give up soon on clients that stall."""
"""How long the server of the fixture ``impatient`` waits for a client, in seconds."""
DISKS = {"ext4": 64 * 2**20, "xfs": 320 * 2**20, "btrfs": 128 * 2**20}
"""File systems to test with, and how large they are in bytes."""


def find_free_port() -> int:
    """
    A TCP port on loopback that nobody listens on.

    It's none of those that outgoing connections get: one of another test could take it before a server does.
    """
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in (*random.SystemRandom().sample(range(outgoing // 2, outgoing), 20), 0):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return sock.getsockname()[1]
    raise AssertionError("all ports are taken")


def wait_for(condition, timeout: float = STARTUP_TIMEOUT, what: str = "something"):
    """Wait until a function returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout} seconds for {what}")


def can_connect(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((host, port)) == 0


@dataclass
class Server:
    """A running ``pdiffcopy --listen`` on loopback."""

    process: subprocess.Popen
    port: int
    log: Path
    scheme: str = "http"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def location(self, path: os.PathLike | str) -> str:
        """The location of a file behind this server, in the short form."""
        return f"127.0.0.1:{self.port}{os.path.abspath(path)}"

    def stop(self) -> int:
        """End the server with SIGTERM and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(RUN_TIMEOUT)


def start_server(
    folder: Path,
    *options: str,
    port: int = 0,
    host: str = "127.0.0.1",
    env: dict | None = None,
    scheme: str = "http",
    setup: str = "",
    prefix: Sequence[str] = (),
    **keywords,
) -> Server:
    """
    Start a server and wait until it accepts connections, and has the processes that serve them.

    :param folder: Where its log goes.
    :param options: Options for its command line.
    :param port: The port to listen on (by default a free one).
    :param host: The address of loopback to listen on: with several of them there are several machines.
    :param setup: A statement to execute before the program begins, to change one of its constants.
    :param prefix: What its command line begins with.
    :param keywords: More arguments for :class:`subprocess.Popen`.
    """
    port = port or find_free_port()
    log = folder / f"server-{port}.log"
    program = ["-c", f"{setup}; from pdiffcopy.cli import main; main()"] if setup else ["-m", "pdiffcopy"]
    command = [*prefix, sys.executable, *program, "--listen", f"{host}:{port}", *options]
    with log.open("ab") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, env={**os.environ, **(env or {})}, **keywords)
    server = Server(process, port, log, scheme)
    count = int(options[options.index("-c") + 1]) if "-c" in options else 1
    is_complete = lambda: can_connect(port, host) and len(children_of(process.pid)) >= count  # noqa: E731
    wait_for(lambda: is_complete() or process.poll() is not None, what="the server")
    assert process.poll() is None, log.read_text()
    return server


def start_server_of_boot(folder: Path, boot: str, port: int) -> Server:
    """Start a server on a machine that seems to have been started anew. The test is skipped where that can't be."""
    identity, log = folder / boot, folder / f"{boot}.log"
    identity.write_text(f"{boot}\n")
    command = (
        f"mount --bind '{identity}' /proc/sys/kernel/random/boot_id"
        f" && exec '{sys.executable}' -m pdiffcopy --listen 127.0.0.1:{port}"
    )
    with log.open("wb") as handle:
        process = subprocess.Popen(["unshare", "-m", "sh", "-c", command], stdout=handle, stderr=handle)
    wait_for(lambda: can_connect(port) or process.poll() is not None, what="the server")
    if process.poll() is not None:
        pytest.skip(f"a name space can't be made here: {log.read_text()}")
    return Server(process, port, log)


def run_pdiffcopy(
    *arguments: os.PathLike | str, env: dict | None = None, prefix: Sequence[str] = (), **options
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run ``pdiffcopy`` in a process of its own. The result has ``returncode``, ``stdout`` and ``stderr`` (text)."""
    command = [*prefix, sys.executable, "-m", "pdiffcopy", *map(os.fspath, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_TIMEOUT, env={**os.environ, **(env or {})}, **options
    )


def error_lines(result: subprocess.CompletedProcess) -> list[str]:
    """The lines on stderr that aren't log messages."""
    return [line for line in result.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]


def make_data(size: int, seed: int = 1) -> bytes:
    """Bytes that look random and are the same each time."""
    return random.Random(seed).randbytes(size)


def children_of(pid: int) -> list[int]:
    """The process ids of all descendants of a process that are alive (zombies don't count)."""
    found = []
    for child in _children(pid):
        found += [child, *children_of(child)]
    return found


def _children(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_and_rest = path.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = name_and_rest[2].split()[:2]
        if int(parent) == pid and state != "Z":
            children.append(int(path.parent.name))
    return children


def read_links(pid: int) -> list[str]:
    """What the descriptors of a process stand for."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return links


def is_alive(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def write_pattern(path: Path, size: int, seed: int = 1) -> bytes:
    """Fill a file with known bytes, and return them."""
    data = make_data(size, seed)
    path.write_bytes(data)
    return data


def snapshot(path: Path) -> tuple:
    """What tells whether a file was touched: contents, modification time and identity (empty when it's missing)."""
    if not path.exists():
        return ()
    status = path.stat()
    return path.read_bytes(), status.st_mtime_ns, status.st_ino


def start_old_peer(folder: Path, *options: str) -> Server:
    """Start the stand-in for a server of version 1.0.1 (see :mod:`tests.old_peer`) in a process of its own."""
    port = find_free_port()
    log = folder / f"old-peer-{port}.log"
    command = [sys.executable, "-m", "tests.old_peer", str(port), *options]
    with log.open("ab") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, cwd=Path(__file__).parents[1])
    wait_for(lambda: can_connect(port) or process.poll() is not None, what="the old peer")
    assert process.poll() is None, log.read_text()
    return Server(process, port, log)


def exchange(port: int, request: bytes, timeout: float = 20) -> bytes:
    """Send bytes to a server on loopback, and return all that it answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    return answer


def serve_https(launch, authority: Path, name: str = "server", **keywords) -> Server:
    """Start a server with a certificate of the fixture ``authority``, by means of the fixture ``launch``."""
    files = "--certfile", str(authority / f"{name}.pem"), "--keyfile", str(authority / f"{name}.key")
    return launch(*files, scheme="https", **keywords)


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """Make a block device of a file. The test is skipped where that isn't possible."""
    try:
        command = ["losetup", "--find", "--show", str(image)]
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("loop devices can't be used here")
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextmanager
def ext4(image: Path, folder: Path, *options: str, size: int = 16 * 2**20) -> Iterator[Path]:
    """Make a file system in a file, unless there is one, and mount it. The test is skipped where that can't be."""
    if not image.exists():
        with image.open("wb") as handle:
            handle.truncate(size)
        if not shutil.which("mkfs.ext4"):
            pytest.skip("mkfs.ext4 isn't installed")
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, str(image)], check=True)
    with mounted(folder, "ext4", "loop", image):
        yield folder


@contextmanager
def mounted(folder: Path, kind: str, options: str = "rw", device: os.PathLike | str = "none") -> Iterator[Path]:
    """Mount a file system. The test is skipped where that isn't possible."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, os.fspath(device), str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def disk_of_kind(kind: str, folder: Path) -> Iterator[Path]:
    """Make a file system of one of the kinds in :data:`DISKS`, and mount it, or skip the test."""
    if kind == "ext4":
        with ext4(folder / "image", folder / "disk", size=DISKS[kind]) as disk:
            yield disk
        return
    if not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"mkfs.{kind} isn't installed")
    with (folder / "image").open("wb") as image:
        image.truncate(DISKS[kind])
    subprocess.run([f"mkfs.{kind}", "-q", "-f", str(folder / "image")], check=True)
    with mounted(folder / "disk", kind, "loop", folder / "image"):
        yield folder / "disk"
