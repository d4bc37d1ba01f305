"""Which servers are asked? Each is a process on loopback (or behind a :class:`.Link`) that ends with its context."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.contenders import RATE
from benchmarks.links import UnavailableError
from benchmarks.processes import get_cpu_seconds, get_tree, is_listening, reset_peak_memory, wait_for

ROOT = Path(__file__).parent.parent
# What is installed comes with its bytecode, so that of a checkout is kept, too: compiling isn't what a user waits for.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
LOOPBACK = "127.0.0.1"
DELAY = 0.025
"""How long a byte is on the long wire, in seconds."""
STARTUP_TIMEOUT = 30
END_TIMEOUT = 20


class Server(ABC):
    """A server process (a context manager)."""

    def __init__(self, folder: Path, address: str = LOOPBACK, prefix: Sequence[str] = ()):
        """
        Initialize a server.

        :param folder: The folder with the files, where its log goes as well.
        :param address: Where to listen.
        :param prefix: What to start the command with.
        """
        self.folder = folder
        self.address = address
        self.prefix = prefix
        self.port = find_free_port()
        self.output = folder / f"server-{self.port}.log"

    @abstractmethod
    def get_command(self) -> list[str]:
        """The command line of the server."""

    @abstractmethod
    def get_location(self, path: Path) -> str:
        """How clients name a file."""

    def __enter__(self) -> Any:
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *self.get_command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
        try:
            wait_for(self._is_up, STARTUP_TIMEOUT, f"a server: {' '.join(self.get_command())}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: Any) -> None:
        tree = get_tree(self.process.pid)
        self.stop()
        try:
            self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            for pid in tree:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """Ask the server to end."""
        self.process.terminate()

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"a server ended: {self.output.read_text().strip()}")
        return is_listening(self.process.pid, self.port)

    @property
    def pid(self) -> int:
        """The process that all others of the server descend from."""
        return self.process.pid

    @property
    def client_options(self) -> list[str]:
        """What a client has to be told in addition."""
        return []

    def settle(self) -> None:  # noqa: B027 (there may be nothing to do)
        """Wait until what a client left behind is done (by default there's nothing)."""

    def get_cpu_seconds(self) -> float:
        """The processor time that the server has used so far."""
        return get_cpu_seconds(self.pid)

    def reset_peak_memory(self) -> None:
        """Begin anew with its peak memory."""
        reset_peak_memory(self.pid)


class PdiffcopyServer(Server):
    """``pdiffcopy --listen``."""

    def get_command(self) -> list[str]:
        """See :meth:`Server.get_command`."""
        return [sys.executable, "-m", "pdiffcopy", "--listen", f"{self.address}:{self.port}"]

    def get_location(self, path: Path) -> str:
        """See :meth:`Server.get_location`."""
        return f"{self.address}:{self.port}{path}"


class LimitedServer(PdiffcopyServer):
    """``pdiffcopy --listen`` that lets no more bytes pass in a second than :data:`.RATE`."""

    def get_command(self) -> list[str]:
        """See :meth:`Server.get_command`."""
        return [*super().get_command(), f"--bwlimit={RATE}"]


class SecureServer(PdiffcopyServer):
    """``pdiffcopy --listen`` over https, with a certificate of its own."""

    def __enter__(self) -> Any:
        if not shutil.which("openssl"):
            raise UnavailableError("openssl isn't installed: there's no certificate for https")
        self.certificate, self.key = (self.folder / f"server-{self.port}.{kind}" for kind in ("pem", "key"))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
             "-subj", "/CN=benchmark", "-addext", f"subjectAltName=IP:{self.address}",
             "-keyout", str(self.key), "-out", str(self.certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        return super().__enter__()

    def get_command(self) -> list[str]:
        """See :meth:`Server.get_command`."""
        return [*super().get_command(), f"--certfile={self.certificate}", f"--keyfile={self.key}"]

    def get_location(self, path: Path) -> str:
        """See :meth:`Server.get_location`."""
        return f"https://{super().get_location(path)}"

    @property
    def client_options(self) -> list[str]:
        """See :attr:`Server.client_options`."""
        return [f"--ca-file={self.certificate}"]


class TracedServer(PdiffcopyServer):
    """``pdiffcopy --listen`` under strace, which counts the system calls of all of its processes."""

    def __init__(self, folder: Path, summary: Path):
        """:param summary: The file that strace writes in the end."""
        super().__init__(folder, prefix=["strace", "-f", "-c", "-o", str(summary)])

    def stop(self) -> None:
        """Ask the server itself: strace, which ends with it, ignores what it's asked."""
        for pid in get_tree(self.process.pid)[1:2]:
            os.kill(pid, signal.SIGTERM)


class RsyncDaemon(Server):
    """``rsync --daemon``."""

    def get_command(self) -> list[str]:
        """See :meth:`Server.get_command`."""
        config = self.folder / f"rsyncd-{self.port}.conf"
        lines = ["use chroot = no", "reverse lookup = no", "[files]", f"path = {self.folder}", "read only = no"]
        if not os.geteuid():
            lines += [f"uid = {getpass.getuser()}", "gid = *"]
        config.write_text("\n".join(lines) + "\n")
        return ["rsync", "--daemon", "--no-detach", f"--address={self.address}", f"--port={self.port}",
                f"--config={config}"]  # fmt: skip

    def get_location(self, path: Path) -> str:
        """See :meth:`Server.get_location`."""
        return f"rsync://{self.address}:{self.port}/files/{path.relative_to(self.folder)}"

    def settle(self) -> None:
        """The daemon has a process for each connection: its time counts once it has ended."""
        wait_for(lambda: len(get_tree(self.pid)) <= 1, END_TIMEOUT, "the rsync daemon")

    @staticmethod
    def is_available() -> bool:
        """Whether rsync is installed."""
        return bool(shutil.which("rsync"))


class SlowStorage:
    """The files of a folder on storage that takes its time, see :mod:`.slowfs` (a context manager)."""

    def __init__(self, folder: Path, delay: float):
        """
        Initialize it.

        :param folder: The folder with the files.
        :param delay: How long a request takes, in seconds.
        """
        self.folder = folder
        self.delay = delay
        self.mountpoint = folder / "slow"

    def __enter__(self) -> SlowStorage:
        if not (os.access("/dev/fuse", os.W_OK) and find_spec("pyfuse3")):
            raise UnavailableError("no FUSE here (it takes /dev/fuse and the package pyfuse3)")
        self.mountpoint.mkdir()
        # On real storage, other processors do the work.
        command = ["nice", "-n", "-15", sys.executable, "-m", "benchmarks.slowfs", str(self.folder)]
        self.process = subprocess.Popen(
            [*command, str(self.mountpoint), str(self.delay)], stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT
        )
        assert self.process.stdout
        if self.process.stdout.readline() != b"mounted\n":
            self.__exit__()
            raise UnavailableError("no FUSE here (see above)")
        return self

    def __exit__(self, *exc_info: Any) -> None:
        subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=False)
        try:
            self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.mountpoint.rmdir()


class RelayServer(Server):
    """A wire to another server that delays and counts, see :mod:`.relay`."""

    def __init__(self, server: Server, delay: float = 0):
        """
        Initialize a relay.

        :param server: Where it passes connections on to.
        :param delay: How long each byte is on its way, in seconds.
        """
        super().__init__(server.folder)
        self.server = server
        self.delay = delay

    def get_command(self) -> list[str]:
        """See :meth:`Server.get_command`."""
        return [sys.executable, "-m", "benchmarks.relay", str(self.port), str(self.server.port), str(self.delay)]

    def get_location(self, path: Path) -> str:
        """See :meth:`Server.get_location`."""
        server, relay = (f"{LOOPBACK}:{port}" for port in (self.server.port, self.port))
        return self.server.get_location(path).replace(server, relay)

    @property
    def pid(self) -> int:
        """The process of the server behind it: the relay stands for a wire, which takes neither time nor memory."""
        return self.server.pid

    def settle(self) -> None:
        """See :meth:`Server.settle`."""
        self.server.settle()

    def get_counts(self) -> dict[str, int]:
        """End the relay, and get what it has counted."""
        self.__exit__()
        return json.loads(self.output.read_text())


@contextmanager
def relayed(servers: Mapping[str, Server], delay: float) -> Iterator[dict[str, Server]]:
    """Lend a wire to each of some servers, see :class:`RelayServer`."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(RelayServer(server, delay)) for kind, server in servers.items()}


def find_free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return sock.getsockname()[1]
