"""Tests for :mod:`pdiffcopy.client.location`: what users configure, on either side."""

from __future__ import annotations

import hashlib
import os

import pytest
import xxhash

from pdiffcopy.client import Client, Location, Network
from pdiffcopy.exceptions import FileMissingError, UsageError
from tests.support import write_pattern
from tests.test_replica import BLOCK, NAME


@pytest.fixture(params=["local", "remote"])
def kind(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    """Where the file is."""
    return tmp_path / "folder" / NAME


@pytest.fixture
def data(path) -> bytes:
    """The contents of the file, which is there now."""
    path.parent.mkdir()
    return write_pattern(path, 3 * BLOCK + 100)


# Location {{{1


@pytest.fixture
def location(kind, request, path) -> Location:
    """The location of the same file."""
    if kind == "local":
        return Location(expression=str(path))
    return Location(expression=request.getfixturevalue("server").location(path))


def test_location_of_a_missing_file(location, path):
    """It has no metadata and no size, and says so."""
    assert location.exists is False
    assert location.file_info == {}
    assert location.filename == str(path)
    with pytest.raises(FileMissingError):
        location.file_size  # noqa: B018
    with pytest.raises(FileMissingError):
        location.get_hashes(block_size=1, method="sha1", concurrency=1)


def test_location_of_a_file(location, data):
    """Its metadata is that of the file."""
    assert location.exists is True
    assert location.file_size == location.file_info["size"] == len(data)


def test_metadata_is_cached_until_it_is_deleted(location, path, data):
    """The properties are computed once, and again when the cache is cleared."""
    assert location.file_size == len(data)
    os.truncate(path, 5)
    assert location.file_size == len(data)
    del location.file_info, location.file_size
    assert location.file_size == 5


def test_location_reads_and_writes_blocks(location, path, data):
    """Blocks are read up to the end of the file and written anywhere."""
    assert location.read_block(BLOCK, 10) == data[BLOCK : BLOCK + 10]
    assert location.read_block(3 * BLOCK, BLOCK) == data[3 * BLOCK :]
    assert location.read_block(100 * BLOCK, BLOCK) == b""
    assert location.read_block(0, 0) == b""
    location.write_block(BLOCK, b"data")
    location.write_block(0, b"")
    assert path.read_bytes() == data[:BLOCK] + b"data" + data[BLOCK + 4 :]


def test_location_resizes(location, path, data):
    """Growing and cutting, on either side."""
    location.resize(10)
    assert path.read_bytes() == data[:10]


def test_location_hashes(location, data):
    """Offsets and digests, by default with the methods and sizes that the program has."""
    expected = [(o, hashlib.sha1(data[o : o + BLOCK]).hexdigest()) for o in range(0, len(data), BLOCK)]
    assert list(location.get_hashes(block_size=BLOCK, method="sha1", concurrency=2)) == expected
    assert list(location.get_hashes()) == [(0, hashlib.sha1(data).hexdigest())]


def test_location_hashes_stream(location, path, data):
    """The first digest is there long before the last one: a terabyte of holes would take an hour to hash."""
    os.truncate(path, 2**40)
    stream = location.get_hashes(block_size=BLOCK, method="xxh128", concurrency=1)
    assert next(stream) == (0, xxhash.xxh3_128_hexdigest(data[:BLOCK]))
    assert next(stream) == (BLOCK, xxhash.xxh3_128_hexdigest(data[BLOCK : 2 * BLOCK]))
    stream.close()


@pytest.mark.parametrize(
    ("expression", "attributes", "canonical"),
    [
        ("host:8081/a b", ("host", 8081, "/a b", "http"), "http://host:8081/a%20b"),
        ("host:/a", ("host", 8080, "/a", "http"), "http://host:8080/a"),
        ("[::1]:81/a", ("::1", 81, "/a", "http"), "http://[::1]:81/a"),
        ("http://host/a%20b", ("host", 8080, "/a b", "http"), "http://host:8080/a%20b"),
        ("https://host:1/a", ("host", 1, "/a", "https"), "https://host:1/a"),
        ("/a:1/b", (None, None, "/a:1/b", "http"), "/a:1/b"),
    ],
)
def test_expression_sets_the_parts(expression, attributes, canonical):
    """What's assigned as text is taken apart, and put together again in one canonical way."""
    location = Location(expression=expression)
    assert (location.hostname, location.port_number, location.filename, location.scheme) == attributes
    assert str(location.address) == location.label == canonical
    assert Location(expression=str(location.address)).address == location.address


def test_relative_names_become_absolute(tmp_path, monkeypatch):
    """A location stays the same when the working directory changes."""
    monkeypatch.chdir(tmp_path)
    location = Location(expression="./x:1/y")
    monkeypatch.chdir("/")
    assert (location.filename, location.hostname) == (str(tmp_path / "x:1/y"), None)


def test_parts_can_be_set_one_by_one(server, path, data):
    """The documented way without an expression; the port has a default."""
    location = Location(hostname="127.0.0.1", port_number=server.port, filename=str(path))
    assert location.file_size == len(data)
    assert Location(hostname="example.org", filename="/x").get_url("info").startswith("http://example.org:8080/info?")


def test_location_without_a_file_is_an_error():
    """There's nothing that it could be about."""
    with pytest.raises(UsageError, match="expression or a filename"):
        Location().exists  # noqa: B018


def test_url_of_an_endpoint():
    """Names and parameters are encoded so that the server gets them as they are."""
    location = Location(hostname="h", port_number=1, filename="/a b&c+%#")
    assert location.get_url("blocks", offset=5, size=7) == (
        "http://h:1/blocks?filename=%2Fa+b%26c%2B%25%23&offset=5&size=7"
    )
    with pytest.raises(UsageError, match="no URL"):
        Location(expression="/x").get_url("info")


# What a client passes on {{{1


@pytest.mark.parametrize("order", [("source", "target", "network"), ("network", "source", "target")])
def test_locations_have_the_network_of_their_client(order):
    """Whatever is set first: a token for a run is one for its locations, too."""
    network = Network(token="secret", timeout=5)
    values = {"source": "host:/x", "target": Location(expression="/y"), "network": network}
    client = Client(**{name: values[name] for name in order})
    assert client.source.network == client.target.network == network


def test_location_keeps_a_network_of_its_own():
    """Two servers may have two tokens."""
    own = Network(token="own")
    client = Client(source=Location(expression="host:/x", network=own), target="/y", network=Network(token="other"))
    assert (client.source.network, client.target.network) == (own, client.network)


def test_helpers_of_a_client_get_past_a_token(launch, tmp_path, path, data):
    """What isn't a run needs the credentials as well."""
    (tmp_path / "token").write_text("correct-horse")
    (tmp_path / "token").chmod(0o600)
    server = launch("--token-file", str(tmp_path / "token"))
    client = Client(source=server.location(path), target=tmp_path / "t", network=Network(token="correct-horse"))
    client.block_size = BLOCK
    assert client.compute_transfer_size([0, 3 * BLOCK]) == BLOCK + 100
    assert client.source.read_block(0, 10) == data[:10]
    client.source.close()
    assert client.source.read_block(10, 10) == data[10:20]
