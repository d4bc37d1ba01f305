"""
What lies between client and server? A loopback device with another congestion control, or a virtual wire.

Both are made in network namespaces, so that the network of the machine isn't touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""That of the system (the one of the network namespace that this process is in)."""

_SUBNET = "10.213.77"
"""Seen only inside the two namespaces, so it can't collide with anything outside."""


class UnavailableError(Exception):
    """Raised when a group can't do its work on this machine (or as this user)."""


class _Namespaces:
    """Network namespaces (a context manager). Their names contain our process id, so benchmarks don't collide."""

    def __init__(self, *names: str):
        self.names = [f"pdiffcopy-{os.getpid()}-{name}" for name in names]
        self.prefixes = [["ip", "netns", "exec", name] for name in self.names]
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        if not (shutil.which("ip") and shutil.which("tc")):
            raise UnavailableError("ip and tc (iproute2) aren't installed")
        try:
            with self._stack:
                for name in self.names:
                    _run("ip", "netns", "add", name)
                    self._stack.callback(_run, "ip", "netns", "delete", name)
                    _run("ip", "-n", name, "link", "set", "lo", "up")
                self.prepare()
                self._stack = self._stack.pop_all()
        except subprocess.CalledProcessError as e:
            raise UnavailableError(f"no network namespaces here ({' '.join(e.cmd)}: {e.stderr.strip()})") from e
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def prepare(self) -> None:
        """Prepare what is in the namespaces."""


class Machine(_Namespaces):
    """A loopback device with a congestion control of its own."""

    def __init__(self, congestion_control: str):
        """:param congestion_control: Its name, as in ``tcp_available_congestion_control`` (tcp(7))."""
        super().__init__("machine")
        self.congestion_control = congestion_control
        (self.prefix,) = self.prefixes

    def __enter__(self) -> Any:
        before = CONGESTION_CONTROL.read_text()
        try:
            # A namespace begins with the one of the system. Later it may choose only from those that are for everybody.
            CONGESTION_CONTROL.write_text(self.congestion_control)
            return super().__enter__()
        except OSError as e:
            raise UnavailableError(f"{self.congestion_control} can't be chosen here: {e.strerror}") from e
        finally:
            CONGESTION_CONTROL.write_text(before)


class Link(_Namespaces):
    """A wire between two namespaces, the client's and the server's. ``tc tbf`` limits both directions."""

    server_address = f"{_SUBNET}.1"

    def __init__(self, bandwidth: int):
        """:param bandwidth: In bits per second, what the frames of the wire take included."""
        super().__init__("server", "client")
        self.bandwidth = bandwidth
        self.server_prefix, self.client_prefix = self.prefixes

    def prepare(self) -> None:
        """Make the wire, which vanishes with the namespaces."""
        server, client = self.names
        _run("ip", "-n", server, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", client)
        for name, address in ((server, self.server_address), (client, f"{_SUBNET}.2")):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "wire")
            _run("ip", "-n", name, "link", "set", "wire", "up")
            _run("tc", "-n", name, "qdisc", "add", "dev", "wire", "root", "tbf", "rate", f"{self.bandwidth}bit",
                 "burst", "256kb", "latency", "50ms")  # fmt: skip


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
