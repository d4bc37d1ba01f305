"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.support import start_old_peer, start_server


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
