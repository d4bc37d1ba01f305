"""Tests for :mod:`pdiffcopy.locations`: one suite over the local and the remote replica, and :class:`Location`."""

from __future__ import annotations

import hashlib
import os
import threading
from itertools import islice

import pytest
import xxhash

from pdiffcopy.address import Address
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.exceptions import (
    DigestMismatchError,
    FileMissingError,
    ForbiddenError,
    ProgramError,
    TakenOverError,
    UsageError,
)
from pdiffcopy.locations import LocalReplica, Location, Network, Reading, Replica, open_replica
from pdiffcopy.protocol import FEATURES, Extent, FileInfo
from pdiffcopy.remote import RemoteReplica
from tests.support import make_data, snapshot, write_pattern

BLOCK = 4096
NAME = "the 50% file+#?&.img"


@pytest.fixture(params=["local", "remote"])
def kind(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    """Where the file of the replica is."""
    return tmp_path / "folder" / NAME


@pytest.fixture
def replica(kind, request, path) -> Replica:
    """A replica of a file that doesn't exist yet, nor does its folder."""
    if kind == "local":
        return LocalReplica(str(path))
    server = request.getfixturevalue("server")
    return RemoteReplica(Address(str(path), "127.0.0.1", server.port), Network(retries=0, timeout=20))


@pytest.fixture
def data(path) -> bytes:
    """The contents of the file, which is there now."""
    path.parent.mkdir()
    return write_pattern(path, 3 * BLOCK + 100)


def read(replica: Replica, *extents: Extent) -> bytes:
    """All octets of some extents."""
    with replica.read(extents, state_digest=False) as reading:
        return b"".join(map(bytes, reading.chunks))


# The conformance suite {{{1


def test_info_of_a_missing_file(replica):
    """That there's no file is an answer and not an error."""
    info, peer = replica.info()
    assert info == FileInfo(exists=False)
    assert peer.writable


def test_info_tells_size_time_and_identity(replica, path, data):
    """All that a run watches: it's the same for the same file, and changes with it."""
    info, _ = replica.info()
    assert (info.exists, info.size, info.resizable) == (True, len(data), True)
    assert info.mtime_ns == path.stat().st_mtime_ns
    assert replica.info()[0] == info
    os.utime(path, ns=(1, 1))
    assert replica.info()[0] != info
    write_pattern(path.parent / "other", len(data))
    os.utime(path.parent / "other", ns=(1, 1))
    before = replica.info()[0]
    os.replace(path.parent / "other", path)
    after = replica.info()[0]
    assert (before.size, before.mtime_ns) == (after.size, after.mtime_ns)
    assert before.file_id != after.file_id


def test_info_tells_what_its_side_can_do(replica, data):
    """Both kinds can do all there is."""
    _, peer = replica.info()
    assert peer.features == FEATURES >= {"digest", "extents", "resume", "sync"}
    assert {"sha1", "md5", "xxh128", "blake3"} <= peer.methods


@pytest.mark.parametrize("block_size", [1000, BLOCK, 3 * BLOCK + 100, 10**6])
@pytest.mark.parametrize("method", ["sha1", "xxh128"])
def test_hashes_come_in_order(replica, data, method, block_size):
    """A digest a block, the last one for what's left."""
    new = xxhash.xxh3_128 if method == "xxh128" else hashlib.sha1
    expected = [new(data[o : o + block_size]).hexdigest() for o in range(0, len(data), block_size)]
    assert list(replica.hashes(len(data), block_size, method, 2)) == expected


def test_hashes_of_the_beginning(replica, data):
    """As many blocks as the size that was asked for takes."""
    digests = list(replica.hashes(2 * BLOCK, BLOCK, "md5", 2))
    assert digests == [hashlib.md5(data[o : o + BLOCK]).hexdigest() for o in (0, BLOCK)]
    assert list(replica.hashes(0, BLOCK, "md5", 2)) == []


def test_hashes_stop_when_nobody_wants_more(replica, path, data):
    """A stream that isn't read to its end is cleaned up, and the replica goes on working."""
    os.truncate(path, 100 * 1024 * 1024)
    stream = replica.hashes(100 * 1024 * 1024, BLOCK, "sha1", 2)
    assert list(islice(stream, 2)) == [hashlib.sha1(data[o : o + BLOCK]).hexdigest() for o in (0, BLOCK)]
    stream.close()
    assert replica.info()[0].size == 100 * 1024 * 1024
    assert not [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_hashes_of_a_missing_file(replica):
    """There's nothing to hash."""
    with pytest.raises(FileMissingError):
        list(replica.hashes(100, BLOCK, "sha1", 2))


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 1)],
        [(0, 3 * BLOCK + 100)],
        [(BLOCK, BLOCK)],
        [(3 * BLOCK, 100)],
        [(0, 10), (20, 5), (3 * BLOCK + 99, 1)],
        [(100, 1), (0, 1)],
    ],
)
def test_extents_are_read_exactly(replica, data, extents):
    """The octets of all extents, one after the other."""
    expected = b"".join(data[offset : offset + size] for offset, size in extents)
    assert read(replica, *(Extent(*extent) for extent in extents)) == expected


def test_no_extents_no_octets(replica, data):
    """Nothing asked for, nothing given."""
    assert read(replica) == b""


@pytest.mark.parametrize("extents", [[(0, 10)], [(5, 7), (100, 3 * BLOCK)]])
def test_digest_is_stated_on_request(replica, data, extents):
    """XXH128 of all octets of the reading."""
    extents = [Extent(*extent) for extent in extents]
    with replica.read(extents, state_digest=True) as reading:
        octets = b"".join(map(bytes, reading.chunks))
        assert reading.digest == xxhash.xxh3_128_hexdigest(octets)
    with replica.read(extents, state_digest=False) as reading:
        assert reading.digest == ""
        assert b"".join(map(bytes, reading.chunks)) == octets


@pytest.mark.parametrize("extents", [[(3 * BLOCK, 101)], [(10 * BLOCK, 1)], [(0, 1), (3 * BLOCK, 101)]])
def test_reading_beyond_the_end_is_an_error(replica, data, extents):
    """Fewer octets than asked for would go to the wrong places."""
    with pytest.raises(ProgramError):
        read(replica, *(Extent(*extent) for extent in extents))


def test_reading_a_missing_file_is_an_error(replica):
    """The most specific error there is."""
    with pytest.raises(FileMissingError):
        read(replica, Extent(0, 1))


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize("digest", [False, True])
def test_extents_are_written(replica, path, data, cut, digest):
    """The octets go where they belong however they're cut, and nothing else changes."""
    octets = make_data(1500, 3)
    chunks = [octets[i : i + cut] for i in range(0, len(octets), cut)]
    reading = Reading(chunks, xxhash.xxh3_128_hexdigest(octets) if digest else "")
    replica.write([Extent(10, 1000), Extent(2 * BLOCK, 499), Extent(3 * BLOCK + 99, 1)], reading)
    expected = bytearray(data)
    expected[10:1010] = octets[:1000]
    expected[2 * BLOCK : 2 * BLOCK + 499] = octets[1000:1499]
    expected[-1] = octets[1499]
    assert path.read_bytes() == bytes(expected)


def test_wrong_digest_is_noticed(replica, data):
    """What lies in the file isn't what the sender states."""
    with pytest.raises(DigestMismatchError):
        replica.write([Extent(0, 4)], Reading([b"data"], xxhash.xxh3_128_hexdigest(b"dada")))


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_blockwise_digest_is_compared(replica, path, data, cut):
    """The digest of the digests of the blocks does as well, wherever the octets were cut."""
    octets = make_data(2 * BLOCK + 100, 3)
    extents = [Extent(0, BLOCK), Extent(2 * BLOCK, BLOCK + 100)]
    chunks = [octets[i : i + cut] for i in range(0, len(octets), cut)]
    blocks = (octets[i : i + BLOCK] for i in range(0, len(octets), BLOCK))
    digest = digest_blockwise(map(xxhash.xxh3_128_hexdigest, blocks))
    replica.write(extents, Reading(chunks, digest, BLOCK))
    assert path.read_bytes() == octets[:BLOCK] + data[BLOCK : 2 * BLOCK] + octets[BLOCK:]
    for wrong in (Reading(chunks, digest), Reading(chunks, digest, BLOCK + 1), Reading(chunks[::-1], digest, BLOCK)):
        with pytest.raises(DigestMismatchError):
            replica.write(extents, wrong)


def test_writing_to_a_missing_file_is_an_error(replica, path):
    """A file is made by resizing, and only by that."""
    with pytest.raises(FileMissingError):
        replica.write([Extent(0, 4)], Reading([b"data"]))
    assert not path.exists()


def test_failure_of_the_source_is_passed_on(replica, data):
    """When the octets end in an error, it's that error that counts, and the replica goes on working."""

    def chunks():
        yield b"da"
        raise ForbiddenError("the source fails")

    with pytest.raises(ForbiddenError, match="the source fails"):
        replica.write([Extent(0, 4)], Reading(chunks()))
    assert replica.info()[0].size == len(data)


@pytest.mark.parametrize("size", [0, 1, 3 * BLOCK + 100, 10 * BLOCK])
def test_resize_grows_and_cuts(replica, path, data, size):
    """What's kept stays as it was, what's new is zeros."""
    replica.resize(size)
    assert path.read_bytes() == data[:size].ljust(size, b"\0")


def test_resize_makes_file_and_folders(replica, path):
    """Nothing has to be there beforehand."""
    replica.resize(5)
    assert path.read_bytes() == bytes(5)


def test_claim_and_release_tell_what_the_file_is(replica, path, data):
    """Nobody has to ask for that once more. Only one run at a time has a claim, and none has it after its end."""
    for run in ("aa", "bb"):
        assert replica.claim(run) == (True, replica.info()[0])
    replica.release("aa")
    with pytest.raises(TakenOverError):
        replica.info("aa")
    replica.resize(BLOCK, "bb")
    assert replica.info("bb")[0].size == BLOCK
    for _ in range(2):
        replica.release("bb")
    with pytest.raises(TakenOverError):
        replica.info("bb")


def test_claim_of_a_missing_file_is_an_error(replica, path):
    """It creates nothing, and neither does the end of a claim."""
    for action in (replica.claim, replica.release):
        with pytest.raises(FileMissingError):
            action("aa")
    assert not path.parent.exists()


def test_sync_leaves_the_file_as_it_is(replica, path, data):
    """It's flushed, not changed."""
    before = snapshot(path)
    replica.sync()
    assert snapshot(path) == before


def test_sync_of_a_missing_file_is_an_error(replica):
    """There's nothing to flush."""
    with pytest.raises(FileMissingError):
        replica.sync()


def test_folder_is_refused(replica, path):
    """A folder isn't a file, whatever one wants to do with it."""
    path.mkdir(parents=True)
    for action in (
        replica.info,
        lambda: list(replica.hashes(1, 1, "sha1", 1)),
        lambda: read(replica, Extent(0, 1)),
        lambda: replica.write([Extent(0, 1)], Reading([b"x"])),
        lambda: replica.resize(1),
        replica.sync,
    ):
        with pytest.raises(ProgramError, match="neither a regular file nor a block device"):
            action()


# Finding a replica {{{1


def test_replica_is_shared_within_a_process(server):
    """So that connections are used again, but only among those who talk to the server in the same way."""
    address = Address("/x", "127.0.0.1", server.port)
    assert open_replica(address, Network()) is open_replica(address, Network())
    assert open_replica(address, Network(token="a")) is not open_replica(address, Network(token="b"))
    assert open_replica(address._replace(filename="/y"), Network()) is not open_replica(address, Network())
    assert isinstance(open_replica(address, Network()), RemoteReplica)
    assert isinstance(open_replica(Address("/x"), Network()), LocalReplica)


def test_token_is_not_in_the_representation_of_a_network():
    """So it doesn't end up in a log by accident."""
    assert "secret" not in repr(Network(token="secret"))


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
