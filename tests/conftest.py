"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import trustme

from tests.support import IMPATIENCE, loop_device, mounted, start_old_peer, start_server, write_pattern


def pytest_configure():
    """What the tests start hears all signals, also where the tests themselves are to ignore some (nohup make test)."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server that serves everything, shared by all tests that don't do anything to it."""
    server = start_server(tmp_path_factory.mktemp("server"), "--devices")
    yield server
    server.stop()


@pytest.fixture
def launch(tmp_path_factory):
    """A function that starts servers with options of the test's own, which end with the test."""
    servers = []
    folder = tmp_path_factory.mktemp("servers")

    def launch(*options, **keywords):
        servers.append(start_server(folder, *options, **keywords))
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()


@pytest.fixture
def launch_old(tmp_path_factory):
    """A function that starts stand-ins for a server of version 1.0.1, which end with the test."""
    peers = []
    folder = tmp_path_factory.mktemp("old-peers")

    def launch_old(*options):
        peers.append(start_old_peer(folder, *options))
        return peers[-1]

    yield launch_old
    for peer in peers:
        peer.stop()


@pytest.fixture(scope="session")
def impatient(tmp_path_factory):
    """A server of one process that gives up on clients that stall soon."""
    server = start_server(tmp_path_factory.mktemp("impatient"), "-c", "1", setup=IMPATIENCE)
    yield server
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def no_hang():
    """What waits for ever is ended."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("The test hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def no_descriptor_left():
    """No operation leaves a file open, whether it succeeds or not."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def connection():
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near, far


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few pages."""
    with mounted(tmp_path / "disk", "tmpfs", "size=64k,nr_inodes=20") as folder:
        yield folder


@pytest.fixture
def bare_disk(tmp_path):
    """A file system without extended attributes."""
    with mounted(tmp_path / "disk", "ramfs") as folder:
        yield folder


@pytest.fixture
def device(tmp_path):
    """A block device of 64 KiB."""
    write_pattern(tmp_path / "image", 64 * 1024)
    with loop_device(tmp_path / "image") as name:
        yield name


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A certificate authority, a certificate for 127.0.0.1, and one for somebody else."""
    folder = tmp_path_factory.mktemp("certificates")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    other.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    for name, host in (("server", "127.0.0.1"), ("stranger", "example.org")):
        certificate = ca.issue_cert(host)
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(str(folder / f"{name}.pem"), append=True)
    return folder
