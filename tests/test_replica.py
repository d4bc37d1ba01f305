"""Tests for :mod:`pdiffcopy.replica`: one suite over the local and the remote replica."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

import pytest
import xxhash

from pdiffcopy.address import Address
from pdiffcopy.blocks import Extent, FileInfo
from pdiffcopy.client import Network
from pdiffcopy.client.servers import Servers
from pdiffcopy.digests import digest_blockwise
from pdiffcopy.entries import MAX_DEPTH, Entry, Kind, check_entries
from pdiffcopy.exceptions import (
    DigestMismatchError,
    FileMissingError,
    ForbiddenError,
    ProgramError,
    ReplacedError,
    SourceChangedError,
    TakenOverError,
)
from pdiffcopy.features import FEATURES
from pdiffcopy.files.identity import identify
from pdiffcopy.hashing import Hashers
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.methods import get_hasher
from pdiffcopy.replica import Reading, Replica
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
def open_replica(kind, request) -> Callable[[Path], Replica]:
    """A function that makes replicas."""
    if kind == "local":
        return lambda path: LocalReplica(str(path))
    server = request.getfixturevalue("server")
    servers = Servers(Network(retries=0, timeout=20))
    return lambda path: servers.open(Address(str(path), "127.0.0.1", server.port))


@pytest.fixture
def replica(open_replica, path) -> Replica:
    """A replica of a file that doesn't exist yet, nor does its folder."""
    return open_replica(path)


@pytest.fixture
def data(path) -> bytes:
    """The contents of the file, which is there now."""
    path.parent.mkdir()
    return write_pattern(path, 3 * BLOCK + 100)


def read(replica: Replica, *extents: Extent) -> bytes:
    """All bytes of some extents."""
    with replica.read(extents, state_digest=False) as reading:
        return b"".join(map(bytes, reading.chunks))


def digests_of(stream) -> list[str]:
    """The digests of all blocks of a stream."""
    return [digest for stripe in stream for _, digest in stripe]


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
    assert not info.describe_change(replica.info()[0])
    os.utime(path, ns=(1, 1))
    assert info.describe_change(replica.info()[0]) == "time"
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


def test_entries_tell_what_a_name_leads_to(replica, open_replica, path):
    """Nothing, a file or a folder; and a link leads to what it leads to."""
    assert list(replica.entries(5)) == [Entry("", Kind.MISSING)]
    path.parent.mkdir()
    size = len(write_pattern(path, 100))
    file = Entry("", Kind.FILE, size, path.stat().st_mtime_ns)
    (path.parent / "link").symlink_to(path)
    assert list(replica.entries(5)) == list(open_replica(path.parent / "link").entries(0)) == [file]
    status = path.parent.stat()
    folder = Entry("", Kind.FOLDER, 0, status.st_mtime_ns, identify(status))
    assert list(open_replica(path.parent).entries(0)) == [folder]


ODD_NAMES = [
    b"\xff\xfe",
    "é ü".encode(),
    b"new\nline",
    b"a\tb",
    b" ",
    b"...",
    b"%2e%2e",
    b"x" * 255,
    b"done",
    b"=",
    b"{}",
]


@pytest.mark.parametrize("depth", [0, 1, 2, 3, MAX_DEPTH])
def test_entries_of_a_folder(open_replica, tmp_path, depth):
    """Each once, in order, as deep as was asked for, whatever they are called and whatever they are."""
    for number, (first, second) in enumerate(itertools.product(ODD_NAMES, repeat=2)):
        name = os.path.join(os.fsencode(tmp_path), first, second)
        os.makedirs(os.path.join(os.path.dirname(name), b"folder %d" % number))
        os.symlink("..", os.path.join(os.path.dirname(name), b"folder %d" % number, second))
        with open(name, "wb") as handle:
            handle.truncate(number)
        os.utime(name, ns=(0, number * 10**9 - 5))
    os.mkfifo(tmp_path / "fifo")
    told = list(check_entries(open_replica(tmp_path).entries(depth), depth))
    paths = sorted(tmp_path.rglob("*"), key=lambda path: [os.fsencode(part) for part in path.parts])
    names = [str(path.relative_to(tmp_path)) for path in paths]
    assert [entry.name for entry in told] == ["", *(name for name in names if name.count("/") < depth)]
    for entry in told:
        status = (tmp_path / entry.name).lstat()
        assert entry.kind.value in {"file", "folder", "link", "fifo"}
        assert (entry.kind is Kind.FOLDER) == (tmp_path / entry.name).is_dir() or entry.kind is Kind.LINK
        assert (entry.size, entry.mtime_ns) == (status.st_size * (entry.kind is Kind.FILE), status.st_mtime_ns)


def test_entries_are_as_many_as_there_are(open_replica, tmp_path):
    """20,000 names are no problem, and whoever has seen enough may leave."""
    for number in range(20_000):
        (tmp_path / f"{number:05}").touch()
    replica = open_replica(tmp_path)
    names = [entry.name for entry in check_entries(replica.entries(1), 1)]
    assert names == ["", *(f"{number:05}" for number in range(20_000))]
    with closing(replica.entries(1)) as entries:
        assert [next(entries).name for _ in range(3)] == ["", "00000", "00001"]
    assert next(replica.entries(0)).kind is Kind.FOLDER


def test_entries_of_what_can_not_be_read(open_replica, tmp_path):
    """An error, also in the middle: a part of a list would look like all of it."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ProgramError, match="symbolic links"):
        list(open_replica(tmp_path / "loop").entries(1))
    os.makedirs(tmp_path.joinpath(*["d"] * MAX_DEPTH))
    with pytest.raises(ProgramError, match=f"more than {MAX_DEPTH} folders"):
        list(open_replica(tmp_path).entries(MAX_DEPTH))


def test_entries_of_something_else(replica, path, data):
    """A replica that is pinned to a file isn't listed when another one has its name."""
    pinned = [replica.pinned(replica.info()[0].file_id, is_source) for is_source in (False, True)]
    assert [next(one.entries(1)).kind for one in pinned] == [Kind.FILE] * 2
    path.rename(path.parent / "other")
    path.touch()
    for one, kind in zip(pinned, (ReplacedError, SourceChangedError), strict=True):
        with pytest.raises(kind):
            next(one.entries(1))


@pytest.mark.parametrize("block_size", [1000, BLOCK, 3 * BLOCK + 100, 10**6])
@pytest.mark.parametrize("method", ["sha1", "xxh128"])
def test_hashes_come_in_order(replica, data, method, block_size):
    """A digest a block, the last one for what's left."""
    new = xxhash.xxh3_128 if method == "xxh128" else hashlib.sha1
    expected = [new(data[o : o + block_size]).hexdigest() for o in range(0, len(data), block_size)]
    assert digests_of(replica.hashes(block_size, method, 2, stop=len(data))) == expected


def test_hashes_of_the_beginning(replica, data):
    """As many blocks as the size that was asked for takes."""
    digests = digests_of(replica.hashes(BLOCK, "md5", 2, stop=2 * BLOCK))
    assert digests == [hashlib.md5(data[o : o + BLOCK]).hexdigest() for o in (0, BLOCK)]
    assert digests_of(replica.hashes(BLOCK, "md5", 2, stop=0)) == []


def test_hashes_to_the_end(replica, data):
    """Where nobody says where to stop, it's where the file does; and one may begin in the middle."""
    (stripe,) = [stripe for stripe in replica.hashes(BLOCK, "md5", 2, 3 * BLOCK) if stripe]
    assert stripe == [(3 * BLOCK, hashlib.md5(data[3 * BLOCK :]).hexdigest())]


def test_hashes_stop_when_nobody_wants_more(replica, path, data):
    """A stream that isn't read to its end is cleaned up, and the replica goes on working."""
    os.truncate(path, 100 * 1024 * 1024)
    stream = replica.hashes(BLOCK, "sha1", 2, stop=100 * 1024 * 1024)
    first = next(stripe for stripe in stream if stripe)
    assert first[0] == (0, hashlib.sha1(data[:BLOCK]).hexdigest())
    stream.close()
    assert replica.info()[0].size == 100 * 1024 * 1024
    assert not [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_hashes_of_a_missing_file(replica):
    """There's nothing to hash."""
    with pytest.raises(FileMissingError):
        list(replica.hashes(BLOCK, "sha1", 2, stop=100))


@pytest.mark.parametrize("count", [1, 2, 200])
@pytest.mark.parametrize("method", ["xxh128", "blake3", "sha1"])
def test_pieces_are_digested(replica, path, data, method, count):
    """Each piece of each extent, also of many, the last one of an extent for what's left of it."""
    write_pattern(path, 3 * count * 4096)
    extents = [Extent(3 * number * 4096 + 1, 2 * 4096 - 1) for number in range(count)]
    whole = path.read_bytes()
    pieces = [whole[o : o + s] for offset, _ in extents for o, s in ((offset, 4096), (offset + 4096, 4095))]
    assert replica.pieces(extents, 4096, method) == [get_hasher(method)(piece).hexdigest() for piece in pieces]
    with pytest.raises(ProgramError):
        replica.pieces([Extent(0, len(whole) + 1)], 4096, method)


def test_pieces_are_digested_by_the_threads_of_the_process(tmp_path):
    """However many clients ask for some: those threads are as many as there are cores."""
    write_pattern(tmp_path / "file", 10 * 4096)
    with Hashers(1) as hashers:
        replica = LocalReplica(str(tmp_path / "file"), hashers=hashers)
        busy = threading.Event()
        blocker = hashers.executor.submit(busy.wait, 20)
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(replica.pieces, [Extent(0, 10 * 4096)], 4096, "md5")
            assert not wait([answer], 0.2).done
            busy.set()
            assert len(answer.result(20)) == 10
        assert blocker.result()


def test_many_extents_are_read_and_written(replica, path, data):
    """More than a list of them in a URL could name."""
    size = 1000 * 4096
    before = write_pattern(path, size)
    extents = [Extent(offset, 100) for offset in range(0, size, 4096)]
    assert read(replica, *extents) == b"".join(before[o : o + s] for o, s in extents)
    payload = make_data(100 * len(extents), 5)
    replica.write(extents, Reading([payload], xxhash.xxh3_128_hexdigest(payload)))
    assert read(replica, *extents) == payload
    assert path.read_bytes()[100:4096] == before[100:4096]


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
    """The bytes of all extents, one after the other."""
    expected = b"".join(data[offset : offset + size] for offset, size in extents)
    assert read(replica, *(Extent(*extent) for extent in extents)) == expected


def test_no_extents_no_bytes(replica, data):
    """Nothing asked for, nothing given."""
    assert read(replica) == b""


@pytest.mark.parametrize("extents", [[(0, 10)], [(5, 7), (100, 3 * BLOCK)]])
def test_digest_is_stated_on_request(replica, data, extents):
    """XXH128 of all bytes of the reading."""
    extents = [Extent(*extent) for extent in extents]
    with replica.read(extents, state_digest=True) as reading:
        payload = b"".join(map(bytes, reading.chunks))
        assert reading.digest == xxhash.xxh3_128_hexdigest(payload)
    with replica.read(extents, state_digest=False) as reading:
        assert reading.digest == ""
        assert b"".join(map(bytes, reading.chunks)) == payload


@pytest.mark.parametrize("extents", [[(3 * BLOCK, 101)], [(10 * BLOCK, 1)], [(0, 1), (3 * BLOCK, 101)]])
def test_reading_beyond_the_end_is_an_error(replica, data, extents):
    """Fewer bytes than asked for would go to the wrong places."""
    with pytest.raises(ProgramError):
        read(replica, *(Extent(*extent) for extent in extents))


def test_extents_may_be_clipped(replica, data):
    """Where less will do, a reading tells how much there is."""
    for extent, expected in ((Extent(3 * BLOCK, BLOCK), data[3 * BLOCK :]), (Extent(10 * BLOCK, 1), b"")):
        with replica.read([extent], clip=True) as reading:
            assert (reading.size, b"".join(map(bytes, reading.chunks))) == (len(expected), expected)


def test_reading_a_missing_file_is_an_error(replica):
    """The most specific error there is."""
    with pytest.raises(FileMissingError):
        read(replica, Extent(0, 1))


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize("digest", [False, True])
def test_extents_are_written(replica, path, data, cut, digest):
    """The bytes go where they belong however they're cut, and nothing else changes."""
    payload = make_data(1500, 3)
    chunks = [payload[i : i + cut] for i in range(0, len(payload), cut)]
    reading = Reading(chunks, xxhash.xxh3_128_hexdigest(payload) if digest else "")
    replica.write([Extent(10, 1000), Extent(2 * BLOCK, 499), Extent(3 * BLOCK + 99, 1)], reading)
    expected = bytearray(data)
    expected[10:1010] = payload[:1000]
    expected[2 * BLOCK : 2 * BLOCK + 499] = payload[1000:1499]
    expected[-1] = payload[1499]
    assert path.read_bytes() == bytes(expected)


def test_wrong_digest_is_noticed(replica, data):
    """What lies in the file isn't what the sender states."""
    with pytest.raises(DigestMismatchError):
        replica.write([Extent(0, 4)], Reading([b"data"], xxhash.xxh3_128_hexdigest(b"dada")))


@pytest.mark.parametrize("method", ["xxh128", "blake3", "md5"])
@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_blockwise_digest_is_compared(replica, path, data, cut, method):
    """The digest of the digests of the blocks does as well, wherever the bytes were cut."""
    payload = make_data(2 * BLOCK + 100, 3)
    extents = [Extent(0, BLOCK), Extent(2 * BLOCK, BLOCK + 100)]
    chunks = [payload[i : i + cut] for i in range(0, len(payload), cut)]
    blocks = (payload[i : i + BLOCK] for i in range(0, len(payload), BLOCK))
    digest = digest_blockwise(get_hasher(method)(block).hexdigest() for block in blocks)
    replica.write(extents, Reading(chunks, digest, BLOCK, method))
    assert path.read_bytes() == payload[:BLOCK] + data[BLOCK : 2 * BLOCK] + payload[BLOCK:]
    for wrong in (
        Reading(chunks, digest),
        Reading(chunks, digest, BLOCK + 1, method),
        Reading(chunks[::-1], digest, BLOCK, method),
        Reading(chunks, digest, BLOCK, "sha1"),
    ):
        with pytest.raises(DigestMismatchError):
            replica.write(extents, wrong)


def test_writing_to_a_missing_file_is_an_error(replica, path):
    """A file is made by resizing, and only by that."""
    with pytest.raises(FileMissingError):
        replica.write([Extent(0, 4)], Reading([b"data"]))
    assert not path.exists()


def test_failure_of_the_source_is_passed_on(replica, data):
    """When the bytes end in an error, it's that error that counts, and the replica goes on working."""

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
        claimed, info = replica.claim(run)
        assert claimed and not info.describe_change(replica.info()[0])
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
        lambda: list(replica.hashes(1, "sha1", 1, stop=1)),
        lambda: replica.pieces([Extent(0, 1)], 4096, "sha1"),
        lambda: read(replica, Extent(0, 1)),
        lambda: replica.write([Extent(0, 1)], Reading([b"x"])),
        lambda: replica.resize(1),
        replica.sync,
    ):
        with pytest.raises(ProgramError, match="neither a regular file nor a block device"):
            action()
