"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.support import start_server


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
