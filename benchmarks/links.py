"""What lies between client and server? Two network namespaces with a virtual wire of a limited bandwidth."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from typing import Any

_SUBNET = "10.213.77"
"""Seen only inside the two namespaces, so it can't collide with anything outside."""


class LinkUnavailableError(Exception):
    """Raised when this machine (or this user) can't make namespaces or limit bandwidths."""


class Link:
    """
    A wire between two network namespaces, the client's and the server's (a context manager).

    ``tc tbf`` limits both directions. The names contain our process id, so several benchmarks don't collide.
    """

    server_address = f"{_SUBNET}.1"

    def __init__(self, bandwidth: int):
        """:param bandwidth: In bits per second, what the frames of the wire take included."""
        self.bandwidth = bandwidth
        names = [f"pdiffcopy-{os.getpid()}-{side}" for side in ("server", "client")]
        self.server_prefix, self.client_prefix = (["ip", "netns", "exec", name] for name in names)
        self._names = names
        self._stack = ExitStack()

    def __enter__(self) -> Link:
        if not (shutil.which("ip") and shutil.which("tc")):
            raise LinkUnavailableError("ip and tc (iproute2) aren't installed")
        try:
            with self._stack:
                self._make()
                self._stack = self._stack.pop_all()
        except subprocess.CalledProcessError as e:
            raise LinkUnavailableError(f"{' '.join(e.cmd)}: {e.stderr.strip()}") from e
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def _make(self) -> None:
        for name in self._names:
            _run("ip", "netns", "add", name)
            self._stack.callback(_run, "ip", "netns", "delete", name)
        server, client = self._names
        # The wire is made inside the namespaces and vanishes with them: the network of the machine isn't touched.
        _run("ip", "-n", server, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", client)
        for name, address in ((server, self.server_address), (client, f"{_SUBNET}.2")):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("tc", "-n", name, "qdisc", "add", "dev", "wire", "root", "tbf", "rate", f"{self.bandwidth}bit",
                 "burst", "256kb", "latency", "50ms")  # fmt: skip


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
