"""Hashing the blocks of a file on many cores."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice

import blake3
import pytest
import xxhash

from pdiffcopy import hashing
from pdiffcopy.blocks import Extent, Hole, find_layout
from pdiffcopy.digests import digest_layout
from pdiffcopy.exceptions import BusyError, FileError, FileMissingError, UsageError
from pdiffcopy.files.buffers import READ_SIZE
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.openfile import OpenFile
from pdiffcopy.hashing import LEAST_BLOCKS, Budget, Hashers, compute_hashes, hash_worker
from pdiffcopy.methods import get_hasher, get_methods
from tests.support import wait_for, write_pattern

SMALL_STRIPE = 4096


@pytest.fixture
def small_stripes(monkeypatch):
    """Stripes that small files have several of."""
    monkeypatch.setattr(hashing, "STRIPE_SIZE", SMALL_STRIPE)


def hash_directly(method, data):
    if method == "xxh128":
        return xxhash.xxh3_128_hexdigest(data)
    if method == "blake3":
        return blake3.blake3(data).hexdigest()
    return hashlib.new(method, data, usedforsecurity=False).hexdigest()


def hash_all(data, block_size, method="sha1"):
    return [(i, hash_directly(method, data[i : i + block_size])) for i in range(0, len(data), block_size)]


@pytest.mark.parametrize("method", sorted(get_methods()))
def test_each_method_is_what_its_name_says(tmp_path, method):
    """The digests are those that hashlib, xxhash and blake3 compute."""
    data = write_pattern(tmp_path / "file", 2500)
    assert list(compute_hashes(str(tmp_path / "file"), 1000, method, 2)) == hash_all(data, 1000, method)


def test_methods_are_known():
    """What every Python has is there, and so are the fast methods."""
    assert get_methods() >= {"md5", "sha1", "sha256", "sha512", "blake2b", "sha3_256", "xxh128", "blake3"}
    assert not any(name.startswith("shake") for name in get_methods())


@pytest.mark.parametrize("method", ["", "nonsense", "SHAKE_128", "shake_128", "shake_256", "xxh64", "sha1\0", "/"])
def test_unknown_methods_are_refused(tmp_path, method):
    """A method that doesn't exist, or has no fixed length, is an error that names those that can be had."""
    with pytest.raises(UsageError, match="try one of .*sha1") as info:
        get_hasher(method)
    assert info.value.method == method
    with pytest.raises(UsageError, match="no hash method"):
        list(compute_hashes(str(tmp_path / "missing"), 1000, method, 2))


SIZES = [0, 1, 99, 100, 101, SMALL_STRIPE - 1, SMALL_STRIPE, SMALL_STRIPE + 1, 3 * SMALL_STRIPE + 7]


@pytest.mark.parametrize("block_size", [7, 100, 1000, SMALL_STRIPE, SMALL_STRIPE + 1, 10**6])
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.usefixtures("small_stripes")
def test_sizes_around_blocks_and_stripes(tmp_path, block_size, concurrency):
    """Each block has its digest, in order, whatever divides what."""
    for size in SIZES:
        data = write_pattern(tmp_path / "file", size)
        digests = list(compute_hashes(str(tmp_path / "file"), block_size, "sha1", concurrency))
        assert digests == hash_all(data, block_size), size


@pytest.mark.parametrize("block_size", [READ_SIZE // 3, READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 2_400_000])
@pytest.mark.parametrize("size", [READ_SIZE - 1, READ_SIZE, 4 * READ_SIZE + 10])
def test_sizes_around_chunks(tmp_path, block_size, size):
    """A block larger than what is read at once is one block nevertheless."""
    data = write_pattern(tmp_path / "file", size)
    assert list(compute_hashes(str(tmp_path / "file"), block_size, "xxh128", 2)) == hash_all(data, block_size, "xxh128")


def test_hash_worker_hashes_one_block(tmp_path):
    """A single block, the last one included."""
    data = write_pattern(tmp_path / "file", 250)
    for offset in (0, 100, 200):
        expected = (offset, hash_directly("md5", data[offset : offset + 100]))
        assert hash_worker(offset, 100, str(tmp_path / "file"), "md5") == expected


@pytest.mark.parametrize("offset", [250, 300, 10**12])
def test_hash_worker_behind_the_end(tmp_path, offset):
    """Where there is nothing, it's the digest of nothing."""
    write_pattern(tmp_path / "file", 250)
    assert hash_worker(offset, 100, str(tmp_path / "file"), "md5") == (offset, hash_directly("md5", b""))


@pytest.mark.parametrize("size", [1, READ_SIZE, READ_SIZE + 1, 3 * READ_SIZE])
def test_hash_worker_begins_anywhere(tmp_path, size):
    """The offset needn't be a multiple of the block size."""
    data = write_pattern(tmp_path / "file", 3 * READ_SIZE)
    expected = (37, hash_directly("xxh128", data[37 : 37 + size]))
    assert hash_worker(37, size, str(tmp_path / "file"), "xxh128") == expected


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_has_a_size(tmp_path, block_size):
    """Nothing can't be hashed."""
    write_pattern(tmp_path / "file", 250)
    with pytest.raises(UsageError, match=f"at least one byte, not {block_size}"):
        list(compute_hashes(str(tmp_path / "file"), block_size, "sha1", 2))


@pytest.mark.usefixtures("small_stripes")
def test_hashing_can_begin_and_end_anywhere(tmp_path):
    """A stream that is resumed has the digests that the whole one has, and a shorter end is a shorter last block."""
    data = write_pattern(tmp_path / "file", 20000)
    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        stripes = list(hashers.hash(file, 5000, 15250, 500, "sha1", 2))
    assert len(stripes) > 1
    assert [tuple(digest) for stripe in stripes for digest in stripe] == hash_all(data[:15250], 500)[10:]


@pytest.mark.usefixtures("small_stripes")
def test_files_without_holes_are_searched_once(tmp_path, monkeypatch):
    """To look for the next hole may take as long as to hash what comes before it."""
    data = write_pattern(tmp_path / "file", 100 * SMALL_STRIPE)
    searches = []
    original = LocalFile.holes
    monkeypatch.setattr(LocalFile, "holes", lambda *args: searches.append(args) or original(*args))
    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        found = list(chain.from_iterable(hashers.hash(file, 0, len(data), 512, "sha1", grain=512)))
    assert [tuple(digest) for digest in found] == hash_all(data, 512)
    assert len(searches) == 1


@pytest.mark.usefixtures("small_stripes")
@pytest.mark.parametrize("block_size", [2048, 4096, 10_000, 16384])
def test_holes_are_told_and_not_read(tmp_path, monkeypatch, block_size):
    """However blocks and stripes lie: each block is told once, whole holes as such, and all layouts are known."""
    letters = "ab--c----------d-e-f" * 3 + "-"
    size = len(letters) * 4096 - 100
    with (tmp_path / "file").open("wb") as handle:
        handle.truncate(size)
        for index, letter in enumerate(letters):
            if letter != "-":
                handle.seek(4096 * index)
                handle.write(letter.encode() * 4096)
    data = (tmp_path / "file").read_bytes()
    read = []
    original = LocalFile.read_into
    monkeypatch.setattr(LocalFile, "read_into", lambda *args: read.append(original(*args)) or read[-1])
    with LocalFile(str(tmp_path / "file")) as file, Hashers(3) as hashers:
        holes = list(file.holes(0, size))
        if sum(hole.size for hole in holes) != letters.count("-") * 4096 - 100:
            pytest.skip("this file system has no holes of a page")
        found = list(chain.from_iterable(hashers.hash(file, 0, size, block_size, "sha1", grain=4096)))
    position = 0
    for item in found:
        assert item.offset == position
        if isinstance(item, Hole):
            assert not any(data[position : sum(item)])
            position = sum(item)
            continue
        block = Extent(position, min(block_size, size - position))
        layout = digest_layout(find_layout(block, holes, block_size, 4096))
        digest = hash_directly("sha1", data[position : sum(block)])
        assert item.digest == (f"{digest}.{layout}" if layout else digest)
        position = sum(block)
    assert position == size
    assert sum(read) == len(letters.replace("-", "")) * 4096


def test_missing_file_is_an_error(tmp_path):
    """A file that isn't there has no digests."""
    with pytest.raises(FileMissingError, match="missing"):
        list(compute_hashes(str(tmp_path / "missing"), 10, "sha1", 2))


@pytest.mark.usefixtures("small_stripes")
def test_reader_that_leaves_stops_the_threads(tmp_path, monkeypatch):
    """Closing the generator ends the threads and the file, and what nobody will read isn't computed."""
    write_pattern(tmp_path / "file", 200 * SMALL_STRIPE)
    hashed = []
    original = hashing._hash_stripe
    monkeypatch.setattr(hashing, "_hash_stripe", lambda *args: hashed.append(args) or original(*args))
    before = set(threading.enumerate()), sorted(os.listdir("/proc/self/fd"))
    with closing(compute_hashes(str(tmp_path / "file"), 1024, "sha1", 2)) as digests:
        assert len(list(islice(digests, 3))) == 3
        assert set(threading.enumerate()) != before[0]
    assert (set(threading.enumerate()), sorted(os.listdir("/proc/self/fd"))) == before
    assert len(hashed) < 20


@pytest.mark.usefixtures("small_stripes")
def test_reader_who_waits_stops_the_threads(tmp_path, monkeypatch):
    """Nothing is computed far ahead of the reader: memory stays flat."""
    write_pattern(tmp_path / "file", 100 * SMALL_STRIPE)
    submitted = []

    class Recorder(ThreadPoolExecutor):
        def submit(self, *args):
            submitted.append(args)
            return super().submit(*args)

    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        hashers.executor = Recorder(2)
        stripes = hashers.hash(file, 0, 100 * SMALL_STRIPE, 1024, "sha1", 2)
        for number, _ in enumerate(stripes, 1):
            assert len(submitted) <= number + 4
    # The first stripes are smaller than the others.
    assert len(submitted) == number == 108


@pytest.mark.usefixtures("small_stripes")
def test_what_nobody_will_read_is_not_begun(tmp_path, monkeypatch):
    """When the reader leaves, what runs comes to its end (it uses the file), and what waits for a thread is dropped."""
    write_pattern(tmp_path / "file", 100 * SMALL_STRIPE)
    begun, futures, is_busy, may_end = [], [], threading.Event(), threading.Event()

    def hash_stripe(*args):
        begun.append(args)
        if len(begun) > 1:
            is_busy.set()
            assert may_end.wait(20)

    class Recorder(ThreadPoolExecutor):
        def submit(self, *args):
            futures.append(super().submit(*args))
            return futures[-1]

    def end() -> None:
        wait_for(futures[2].cancelled, what="the stripe that waits to be dropped")
        may_end.set()

    monkeypatch.setattr(hashing, "_hash_stripe", hash_stripe)
    with LocalFile(str(tmp_path / "file")) as file, Hashers(1) as hashers:
        hashers.executor = Recorder(1)
        stripes = hashers.hash(file, 0, 100 * SMALL_STRIPE, 1024, "sha1", 1)
        next(stripes)
        assert is_busy.wait(20)
        thread = threading.Thread(target=end)
        thread.start()
        stripes.close()
        thread.join()
    assert len(begun) == 2


def test_slow_readers_share_a_budget(tmp_path):
    """However many they are: what waits for them is bounded, each of them gets on, and all is given back."""
    path = tmp_path / "file"
    write_pattern(path, 20_000)
    budget = Budget(10_000)
    waiting = []

    class Recorder(ThreadPoolExecutor):
        def submit(self, function, file, start, end, block_size, *rest):
            waiting.append(end - start)
            return super().submit(function, file, start, end, block_size, *rest)

    with LocalFile(str(path)) as file, Hashers(2, budget) as hashers:
        hashers.executor = Recorder(2)
        streams = [hashers.hash(file, 0, 20_000, 1, "xxh128", 2) for _ in range(40)]
        firsts = [next(stream) for stream in streams]
        assert sum(waiting) <= 10_000 + len(streams) * LEAST_BLOCKS
        expected = list(compute_hashes(str(path), 1, "xxh128", 2))
        for first, stream in zip(firsts, streams, strict=True):
            digests = [*first, *chain.from_iterable(islice(stream, 3))]
            assert digests == expected[: len(digests)] and len(digests) >= 4 * LEAST_BLOCKS
        for stream in streams:
            stream.close()
    assert budget.take(10_000) and not budget.take(1)


@pytest.mark.usefixtures("small_stripes")
def test_stripes_grow(tmp_path):
    """Somebody waits for the first ones, which are small; later ones cost less, up to a limit."""
    write_pattern(tmp_path / "file", 100 * SMALL_STRIPE)
    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        lengths = [len(stripe) for stripe in hashers.hash(file, 0, 100 * SMALL_STRIPE, 64, "sha1", 2)]
    most = SMALL_STRIPE // 64
    assert lengths[0] == most // 8
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths.count(most) > 90


@pytest.mark.usefixtures("small_stripes")
def test_stripes_are_large_where_there_are_several_files(tmp_path):
    """The threads have enough to do, so no time goes by with handing over small ones, as long as that is so."""
    write_pattern(tmp_path / "file", 8 * SMALL_STRIPE)
    most = SMALL_STRIPE // 64
    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        other = hashers.hash(file, 0, SMALL_STRIPE, 64, "sha1", 2)
        next(other)
        for is_alone in (False, True):
            lengths = [len(stripe) for stripe in hashers.hash(file, 0, 8 * SMALL_STRIPE, 64, "sha1", 2)]
            assert lengths[0] == (most // 8 if is_alone else most)
            assert sum(lengths) == 8 * most
            other.close()


@pytest.mark.usefixtures("small_stripes")
def test_file_that_becomes_shorter_is_an_error(tmp_path):
    """Digests of what isn't there any more are never made up."""
    data = write_pattern(tmp_path / "file", 100 * SMALL_STRIPE)
    digests = compute_hashes(str(tmp_path / "file"), 1024, "sha1", 2)
    head = list(islice(digests, 4))
    os.truncate(tmp_path / "file", 50 * SMALL_STRIPE + 10)
    with pytest.raises(FileError, match="file.*shorter") as info:
        head.extend(digests)
    assert head == hash_all(data, 1024)[: len(head)]
    assert len(head) <= 50 * 4
    assert info.value.offset > 50 * SMALL_STRIPE


def test_file_that_is_shorter_than_expected_is_an_error(tmp_path):
    """That's neither padding nor a hang."""
    (tmp_path / "file").write_bytes(bytes(1000))
    with LocalFile(str(tmp_path / "file")) as file, Hashers(2) as hashers:
        with pytest.raises(FileError, match="never was that long"):
            list(hashers.hash(file, 0, 4096, 1024, "sha1", 2))


def test_lack_of_threads_takes_nothing_of_the_budget(tmp_path, monkeypatch):
    """It may pass, and what nobody works on has no digests."""
    write_pattern(tmp_path / "file", 10_000)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    budget = Budget(100)
    monkeypatch.setattr("threading.Thread.start", refuse)
    with OpenFile(str(tmp_path / "file")) as file, Hashers(2, budget) as hashers:
        for _ in range(3):
            with pytest.raises(BusyError, match="ulimit -u"):
                list(hashers.hash(file, 0, 10_000, 100, "md5"))
        with pytest.raises(BusyError, match="ulimit -u"):
            hashers.digest(file, [Extent(0, 100)], 100, "md5")
    assert budget.take(100)
