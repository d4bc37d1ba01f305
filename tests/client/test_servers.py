"""Which replica is at an address, and who shares connections with whom."""

from __future__ import annotations

import pickle

import pytest

from pdiffcopy.address import Address
from pdiffcopy.client import Network
from pdiffcopy.client.remote import RemoteReplica
from pdiffcopy.client.servers import SCHEMES, Servers
from pdiffcopy.exceptions import UsageError
from pdiffcopy.localreplica import LocalReplica
from tests.support import write_pattern

REMOTE = Address("/x", "host")


def test_address_leads_to_a_replica():
    """Of this machine, or behind a server."""
    servers = Servers(Network())
    assert isinstance(servers.open(Address("/x")), LocalReplica)
    assert isinstance(servers.open(REMOTE), RemoteReplica)
    assert servers.open(Address("/x")).is_near and not servers.open(REMOTE).is_near


def test_files_of_one_origin_share_a_server():
    """So its connections are used again, and only for that server."""
    servers = Servers(Network())
    server = servers.open(REMOTE).server
    assert servers.open(REMOTE._replace(filename="/y")).server is server
    for other in (REMOTE._replace(port=1), REMOTE._replace(hostname="b"), REMOTE._replace(scheme="https")):
        assert servers.open(other).server is not server


def test_every_scheme_has_a_server():
    """An address that can be written can be reached."""
    servers = Servers(Network())
    for scheme in SCHEMES:
        assert servers.open(REMOTE._replace(scheme=scheme)).label == f"{scheme}://host:8080/x"
    with pytest.raises(UsageError, match="no way to reach gopher://host"):
        servers.open(REMOTE._replace(scheme="gopher"))


def test_connections_end_with_their_owner(server, tmp_path):
    """Nothing stays open behind a run."""
    write_pattern(tmp_path / "file", 10)
    address = Address(str(tmp_path / "file"), "127.0.0.1", server.port)
    with Servers(Network()) as servers:
        replica = servers.open(address)
        assert replica.info()[0].size == 10
        connections = replica.server.connections
    assert replica.server.connections is not connections
    assert replica.info()[0].size == 10
    servers.close()


def test_another_process_knows_what_we_were_told(server):
    """What the server can do; but it opens connections of its own."""
    with Servers(Network()) as servers:
        replica = servers.open(Address("/nowhere", "127.0.0.1", server.port))
        replica.info()
        copy = pickle.loads(pickle.dumps(servers)).open(Address("/nowhere", "127.0.0.1", server.port))
        assert copy.server.peer == replica.server.peer is not None
        assert copy.server.connections is not replica.server.connections
        copy.server.close()


def test_many_files_are_hashed_by_the_same_threads():
    """However many are compared at a time. Nothing else is different."""
    with Servers(Network()) as servers:
        server, sharing = servers.open(REMOTE).server, servers.sharing(2)
        hashers = {sharing.open(Address(name)).hashers for name in ("/x", "/y")}
        assert [both.threads for both in hashers] == [2]
        assert sharing.open(REMOTE).server is server
        assert servers.open(Address("/x")).hashers is None


def test_token_is_not_in_the_representation_of_a_network():
    """So it doesn't end up in a log by accident."""
    assert "secret" not in repr(Network(token="secret"))
