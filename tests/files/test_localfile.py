"""What can be done with an open file, and who may write to it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.blocks import Extent
from pdiffcopy.digests import BlockwiseHasher, digest_blockwise
from pdiffcopy.exceptions import DigestMismatchError, DiskFullError, FileError, RangeError, TakenOverError
from pdiffcopy.files import claims, kernel, pagecache
from pdiffcopy.files.buffers import READ_SIZE
from pdiffcopy.files.claims import RUN_ATTRIBUTE, UNFLUSHED
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.splice import Piped, spread
from tests.support import make_data, snapshot, write_pattern

pytestmark = pytest.mark.usefixtures("no_hang", "no_descriptor_left")


def test_error_of_a_close_is_told_and_the_number_is_not_closed_again(tmp_path, monkeypatch):
    """Some file systems tell only then that the data could not be kept. The number may be another file's by then."""
    file = LocalFile(make_file(tmp_path / "file"))
    original, closed = os.close, []

    def close(fd):
        closed.append(fd)
        original(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        with pytest.raises(FileError, match="Can't close .*file: Input/output error"):
            file.close()
        file.close()
        del file
    assert len(closed) == 1


def test_file_with_a_lease_is_waited_for(tmp_path):
    """As cp does: whoever has the lease is told, and gives it back (fcntl(2), F_SETLEASE)."""
    name = make_file(tmp_path / "file")
    fd = os.open(name, os.O_RDWR)
    told = threading.Event()

    def give_back():
        told.wait(10)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    previous = signal.signal(signal.SIGIO, lambda *_: None)
    thread = threading.Thread(target=give_back)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        program = "import sys; from pdiffcopy.files.localfile import LocalFile; LocalFile(sys.argv[1]).close()"
        process = subprocess.Popen([sys.executable, "-c", program, name])
        thread.start()
        time.sleep(0.5)  # it has most likely come to the lease by then, and fails if it doesn't wait
        told.set()
        assert process.wait(20) == 0
    finally:
        told.set()
        thread.join()
        os.close(fd)
        signal.signal(signal.SIGIO, previous)


def test_machine_without_proc_is_named(tmp_path):
    """The source isn't said to be missing."""
    make_file(tmp_path / "source")
    program = f"umount -l /proc && exec {sys.executable} -m pdiffcopy {tmp_path}/source {tmp_path}/target"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a name space can't be made here")
    result = subprocess.run(["unshare", "-m", "sh", "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "/proc isn't mounted here" in result.stderr
    assert not (tmp_path / "target").exists()


def make_file(path, size=100):
    """A sparse file. Returns its name."""
    with path.open("wb") as handle:
        handle.truncate(size)
    return str(path)


def digest_of(data):
    return xxhash.xxh3_128_hexdigest(data)


def test_write_with_the_right_digest(tmp_path):
    """Several extents, cut anywhere, land where they belong."""
    before = write_pattern(tmp_path / "file", 100)
    data = make_data(35, seed=2)
    with LocalFile(str(tmp_path / "file"), write=True) as file:
        extents = [Extent(10, 20), Extent(50, 0), Extent(80, 15)]
        file.write(extents, [data[:3], b"", memoryview(data)[3:30], data[30:]], digest_of(data))
        assert file.digest(extents) == digest_of(data)
    assert (tmp_path / "file").read_bytes() == before[:10] + data[:20] + before[30:80] + data[20:] + before[95:]


def test_write_with_a_wrong_digest(tmp_path):
    """Bytes that aren't those that were sent are noticed, at the end of a long extent too."""
    data = make_data(2 * READ_SIZE + 10)
    with LocalFile(make_file(tmp_path / "file", len(data) + 7), write=True) as file:
        with pytest.raises(DigestMismatchError, match="file at offset 7 isn't what was sent") as info:
            file.write([Extent(7, len(data))], [data[:-1], b"?"], digest_of(data))
    assert info.value.offset == 7


def test_write_compares_what_lies_in_the_file(tmp_path, monkeypatch):
    """The digest is of what can be read afterwards: a disk that loses a byte is noticed."""
    original = os.pwrite

    def lossy(fd, data, offset):
        return original(fd, bytes(data[:-1]) + b"\0", offset)

    monkeypatch.setattr(os, "pwrite", lossy)
    with LocalFile(make_file(tmp_path / "file"), write=True) as file, pytest.raises(DigestMismatchError):
        file.write([Extent(0, 9)], [b"octets..."], digest_of(b"octets..."))


def test_short_writes_and_reads_go_on(tmp_path, monkeypatch):
    """The system may move less than it was asked to: the rest follows."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset, flags=0: preadv(fd, [views[0][:5]], offset, flags))
    data = make_data(1000)
    with LocalFile(make_file(tmp_path / "file", 1003), write=True) as file:
        file.write([Extent(3, 1000)], [data], digest_of(data))
        assert b"".join(map(bytes, file.chunks([Extent(0, 1003)]))) == bytes(3) + data


@pytest.mark.parametrize("extents", [[Extent(0, 11)], [Extent(0, 5), Extent(10, 1)], [Extent(100, 1)]])
def test_reading_behind_the_end_is_an_error(tmp_path, extents):
    """Where no bytes are, none are made up."""
    write_pattern(tmp_path / "file", 10)
    with LocalFile(str(tmp_path / "file")) as file:
        with pytest.raises(FileError, match="file up to offset"):
            list(file.chunks(extents))
        with pytest.raises(FileError, match="file up to offset"):
            file.digest(extents)


def test_reading_a_file_that_was_cut_and_regrown_is_an_error(tmp_path, monkeypatch):
    """A file that was shorter for a moment yields no stale bytes, though its size is right again."""
    write_pattern(tmp_path / "file", 10)
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset, flags=0: 0)
    with LocalFile(str(tmp_path / "file")) as file, pytest.raises(FileError, match="file up to offset 10"):
        list(file.chunks([Extent(0, 10)]))


def test_clip_ends_at_the_end(tmp_path):
    """The part of an extent that lies within the file, or nothing."""
    write_pattern(tmp_path / "file", 10)
    with LocalFile(str(tmp_path / "file")) as file:
        clipped = [file.clip(Extent(*extent)) for extent in [(0, 5), (5, 5), (5, 6), (10, 1), (99, 9)]]
    assert clipped == [(0, 5), (5, 5), (5, 5), (10, 0), (99, 0)]


def test_reading_does_not_write(tmp_path):
    """A file that is opened to be read can't be written to, and stays as it is."""
    path = tmp_path / "file"
    write_pattern(path, 10)
    before = snapshot(path)
    with LocalFile(str(path)) as file:
        with pytest.raises(FileError, match="Can't write to"):
            file.write([Extent(0, 1)], [b"x"])
        with pytest.raises(FileError, match="Can't resize"):
            file.resize(5)
    assert snapshot(path) == before


def test_open_files_are_closed_once(tmp_path):
    """Closing twice does no harm to the next owner of the descriptor."""
    (tmp_path / "file").touch()
    file = LocalFile(str(tmp_path / "file"))
    file.close()
    other = LocalFile(str(tmp_path / "file"))
    file.close()
    assert other.info().exists
    other.close()


def test_bytes_in_a_pipe_are_written(tmp_path):
    """They are spread over the extents, and compared with the digest, like bytes in memory."""
    before, data = write_pattern(tmp_path / "file", 100), make_data(40, seed=2)
    source, sink = os.pipe()
    with open(source, "rb", buffering=0), open(sink, "wb", buffering=0) as pipe:
        pipe.write(data * 2)
        with LocalFile(str(tmp_path / "file"), write=True) as file:
            extents = [Extent(10, 20), Extent(50, 20)]
            file.write(extents, [data[:5], Piped(source, 30), Piped(source, 5)], digest_of(data[:5] + data[:35]))
            with pytest.raises(DigestMismatchError):
                file.write([Extent(0, 5)], [Piped(source, 5)], digest_of(data[:5]))
    sent = data[:5] + data[:35]
    expected = data[35:40] + before[5:10] + sent[:20] + before[30:50] + sent[20:] + before[70:]
    assert (tmp_path / "file").read_bytes() == expected


@pytest.mark.parametrize("block_size", [0, 100_000])
@pytest.mark.parametrize(("kind", "size"), [("in a pipe", READ_SIZE // 4), ("in memory", READ_SIZE)])
def test_large_chunks_are_written_and_compared(tmp_path, kind, size, block_size):
    """They are cut if they're larger than what is read back at a time, which changes nothing else."""
    before, data = write_pattern(tmp_path / "file", 3 * size + 200_000), make_data(3 * size + 5, seed=3)
    digests = [digest_of(data[i : i + block_size]) for i in range(0, len(data), block_size)] if block_size else []
    digest = digest_blockwise(digests) if block_size else digest_of(data)
    source, sink = os.pipe()
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 1024 * 1024)
    with open(source, "rb", buffering=0), open(sink, "wb", buffering=0) as pipe:
        with LocalFile(str(tmp_path / "file"), write=True) as file:
            for stated in (digest, digest_of(b"")):
                chunk = data
                if kind == "in a pipe":
                    assert pipe.write(data) == len(data)
                    chunk = Piped(source, len(data))
                with nullcontext() if stated == digest else pytest.raises(DigestMismatchError):
                    hasher = BlockwiseHasher(block_size) if block_size else None
                    extents = [Extent(10, 2 * size), Extent(3 * size, size + 5)]
                    file.write(extents, [chunk], stated, hasher=hasher)
    first, second = data[: 2 * size], data[2 * size :]
    expected = bytearray(before.ljust(3 * size + len(second), b"\0"))
    expected[10 : 10 + len(first)] = first
    expected[3 * size : 3 * size + len(second)] = second
    assert (tmp_path / "file").read_bytes() == expected


def test_bytes_in_a_pipe_do_not_fit(small_disk):
    """An error of the system names the file, whichever way the bytes come."""
    source, sink = os.pipe()
    with open(source, "rb", buffering=0), open(sink, "wb", buffering=0) as pipe:
        pipe.write(make_data(10_000))
        with LocalFile(make_file(small_disk / "file", 1_000_000), write=True) as file:
            with pytest.raises(DiskFullError, match="Can't write to .*file: No space left"):
                file.write([Extent(0, 70_000)], [bytes(60_000), Piped(source, 10_000)])


# Claims {{{1


@pytest.fixture
def target(tmp_path):
    """A file that can be claimed, opened to be written to."""
    with LocalFile(make_file(tmp_path / "file"), write=True) as file:
        if not file.claims.take("0"):
            pytest.skip("the file system has no extended attributes")
        file.claims.release("0")
        yield file


def write(file, run):
    file.write([Extent(0, 4)], [b"here"], run=run)


def test_run_with_a_claim_writes(target):
    """A claim holds for everybody who opens the file, until it's released; then nothing is left of it."""
    assert target.claims.take("aa")
    assert os.listxattr(target.filename) == [RUN_ATTRIBUTE]
    with LocalFile(target.filename, write=True) as other:
        write(other, "aa")
        with other.claims.writing("aa"):
            pass
        other.claims.release("aa")
    assert os.listxattr(target.filename) == []


@pytest.mark.parametrize("later", ["comes", "goes", "is followed by one without a name"])
def test_later_run_ends_the_earlier_one(target, later):
    """Whether the later run goes on or is over: the earlier one writes nothing, and doesn't look successful."""
    assert target.claims.take("aa")
    with LocalFile(target.filename, write=True) as other:
        assert other.claims.take("bb")
        if later != "comes":
            other.claims.release("bb")
        if later.startswith("is"):
            write(other, "")
    before = snapshot_of(target)
    with pytest.raises(TakenOverError, match="file: another run has taken it over"):
        write(target, "aa")
    with pytest.raises(TakenOverError), target.claims.writing("aa"):
        pytest.fail("The run has no claim")
    assert snapshot_of(target) == before
    with pytest.raises(TakenOverError):
        target.claims.check("aa")
    target.claims.release("aa")
    if later == "comes":
        target.claims.check("bb")
        write(target, "bb")


def snapshot_of(file):
    with open(file.filename, "rb") as handle:
        return handle.read(), os.fstat(handle.fileno()).st_mtime_ns


def test_release_can_be_repeated(target):
    """A request whose answer was lost is sent once more."""
    assert target.claims.take("aa")
    target.claims.release("aa")
    target.claims.release("aa")
    assert os.listxattr(target.filename) == []


def test_claim_can_be_repeated(target):
    """The same goes for a claim."""
    assert target.claims.take("aa") and target.claims.take("aa")
    write(target, "aa")
    target.claims.release("aa")


def test_end_of_an_earlier_run_does_not_end_the_claim(target, monkeypatch):
    """It may remove what it has just found to be its own, when the later run has written its name there meanwhile."""
    assert target.claims.take("aa")
    original = target.claims._try_lock

    def try_lock(kind):
        if kind == fcntl.LOCK_EX:
            os.removexattr(target.fd, RUN_ATTRIBUTE)
        return original(kind)

    monkeypatch.setattr(target.claims, "_try_lock", try_lock)
    assert target.claims.take("bb")
    write(target, "bb")


def test_disk_that_refuses_what_is_to_leave_memory(target, monkeypatch):
    """The kernel tells of it only once, so the claim remembers that memory and disk may differ."""
    target.drop = True
    assert target.claims.take("aa")

    def refuse(*arguments):
        raise OSError(errno.EIO, "a broken disk")

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "write_back", refuse)
        patch.setattr(pagecache, "find_missing_pages", lambda fd, extents: iter([Extent(0, 4096)]))
        with pytest.raises(FileError, match="a broken disk"):
            write(target, "aa")
    assert target.claims.is_doubtful()
    assert target.claims.take("bb") and not target.claims.is_doubtful()


def test_file_that_cannot_be_mapped_can_be_claimed_after_a_flush_that_failed(target, monkeypatch):
    """Nothing of it is in memory (a file in user space that is read and written directly)."""

    def refuse(*arguments):
        raise OSError(errno.ENODEV, "it can't be mapped")

    os.setxattr(target.fd, RUN_ATTRIBUTE, b"aa" + UNFLUSHED.encode())
    monkeypatch.setattr(kernel, "count_cached_pages", refuse)
    assert target.claims.take("bb") and not target.claims.is_doubtful()


def test_room_in_advance_is_what_was_asked_for(target):
    """A file that is longer than that is cut."""
    target.resize(1000)
    target.resize(100, in_advance=True)
    assert target.size() == 100


def test_offsets_are_not_negative(target):
    """To the kernel -1 is where the file was read last."""
    with pytest.raises(RangeError, match="negative"):
        target.read_into(memoryview(bytearray(5)), -1)


def test_who_has_no_name_is_not_hindered(target):
    """A client of version 1.0.1 writes as ever, also when a run was killed and left its claim behind."""
    assert target.claims.take("dead")
    write(target, "")
    with target.claims.writing(""):
        pass
    assert snapshot_of(target)[0].startswith(b"here")


@contextmanager
def writing_elsewhere(filename):
    """Somebody is writing, and goes on until the block ends."""
    with LocalFile(filename, write=True) as other, other.claims.writing(""):
        yield


@pytest.mark.parametrize("action", ["claim", "release"])
def test_writes_in_progress_are_waited_for(target, action):
    """When the new run begins to compare, what the old one writes is over."""
    assert target.claims.take("aa")
    done = threading.Event()

    def act():
        target.claims.release("aa") if action == "release" else target.claims.take("bb")
        done.set()

    with writing_elsewhere(target.filename):
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        assert not done.wait(0.3)
    thread.join(20)
    assert done.is_set()
    assert os.listxattr(target.filename) == ([] if action == "release" else [RUN_ATTRIBUTE])


def test_several_write_at_the_same_time(target):
    """The workers of a run don't wait for each other."""
    assert target.claims.take("aa")
    with writing_elsewhere(target.filename), writing_elsewhere(target.filename):
        write(target, "aa")


@pytest.mark.parametrize("action", ["take", "release"])
def test_wait_for_writes_has_an_end(target, monkeypatch, action):
    """A write that never ends is an error of who waits for it."""
    monkeypatch.setattr(claims, "LOCK_TIMEOUT", 0.05)
    assert target.claims.take("aa")
    with writing_elsewhere(target.filename):
        with pytest.raises(TakenOverError, match="file: others keep writing to it"):
            getattr(target.claims, action)("aa")
    getattr(target.claims, action)("aa")


def test_wait_for_a_claim_has_an_end(target, monkeypatch):
    """A program that holds the exclusive lock forever doesn't make a write wait forever."""
    monkeypatch.setattr(claims, "LOCK_TIMEOUT", 0.05)
    with open(target.filename, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(TakenOverError, match="others keep writing"):
            write(target, "")


def test_failure_frees_the_lock(target):
    """After an error in the middle of a write, others go on."""
    with pytest.raises(ValueError), target.claims.writing(""):
        raise ValueError
    with open(target.filename, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_file_system_without_attributes_has_no_claims(bare_disk):
    """The answer says so, and a run without a claim writes as ever."""
    with LocalFile(make_file(bare_disk / "file"), write=True) as file:
        assert not file.claims.take("aa")
        write(file, "")
        file.claims.release("aa")
        assert snapshot_of(file)[0].startswith(b"here")


def test_attributes_that_are_refused_are_no_claims(target, monkeypatch):
    """Whatever the reason."""

    def refuse(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", refuse)
    assert not target.claims.take("aa")
    with pytest.raises(TakenOverError):
        write(target, "aa")


def test_file_system_without_locks_is_written_to(target, monkeypatch):
    """Some network file systems have none: there, claims are all that there is."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert target.claims.take("aa")
    write(target, "aa")
    with pytest.raises(TakenOverError):
        write(target, "bb")
    target.claims.release("aa")


def test_device_is_not_claimed(device):
    """A device has no attributes of its own contents: runs there work without."""
    with LocalFile(device, write=True) as file:
        assert not file.claims.take("aa")
        write(file, "")


@pytest.mark.parametrize("extents", [[Extent(4096, 32768)], [Extent(0, 65536)], [Extent(512, 512), Extent(8192, 512)]])
def test_device_makes_zeros_itself(device, extents, monkeypatch):
    """Nothing is written by us, and what wasn't meant stays as it was."""
    before = Path(device).read_bytes()
    with LocalFile(device, write=True) as file:
        monkeypatch.setattr(LocalFile, "_write_at", lambda *_: pytest.fail("zeros are written"))
        assert file.clear(extents, keep=True)
        _check_zeros(device, before, extents)


@pytest.mark.parametrize("fault", ["no sectors", "busy", "unknown"])
def test_zeros_are_written_where_a_device_does_not_make_them(device, monkeypatch, fault):
    """The part has no whole sectors, somebody has the device open alone, or the kernel can't do it."""
    before, extents = Path(device).read_bytes(), [Extent(100, 5000)] if fault == "no sectors" else [Extent(4096, 8192)]
    if fault != "no sectors":
        number = errno.EBUSY if fault == "busy" else errno.EOPNOTSUPP

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("pdiffcopy.files.kernel._check", refuse)
    with LocalFile(device, write=True) as file:
        assert file.clear(extents, keep=True)
    _check_zeros(device, before, extents)


def test_device_that_fails_is_an_error(device, monkeypatch):
    """And no reason to try something else."""

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pdiffcopy.files.kernel._check", refuse)
    with LocalFile(device, write=True) as file, pytest.raises(FileError, match="Input/output error"):
        file.clear([Extent(4096, 8192)], keep=True)


def _check_zeros(device: str, before: bytes, extents: list[Extent]) -> None:
    expected = bytearray(before)
    for offset, size in extents:
        expected[offset : offset + size] = bytes(size)
    with LocalFile(device) as file:
        found = b"".join(map(bytes, file.chunks([Extent(0, len(before))])))
    assert found == expected


# spread() {{{1


@given(
    sizes=st.lists(st.integers(0, 12), max_size=6),
    gaps=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    cuts=st.lists(st.integers(0, 80), max_size=10),
    difference=st.integers(-2, 2),
)
def test_spread_puts_each_byte_where_it_belongs(sizes, gaps, cuts, difference):
    """However extents and chunks are cut: each byte gets its place, and too many or too few are noticed."""
    extents, position = [], 0
    for size, gap in zip(sizes, gaps, strict=False):
        extents.append(Extent(position + gap, size))
        position += gap + size
    places = [n for offset, size in extents for n in range(offset, offset + size)]
    data = make_data(max(0, len(places) + difference))
    cuts = sorted(cut for cut in cuts if cut <= len(data))
    chunks = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    found = []

    def collect():
        for offset, piece in spread(extents, chunks):
            found.extend(zip(range(offset, offset + len(piece)), bytes(piece), strict=True))

    if len(data) != len(places):
        with pytest.raises(ValueError, match="bytes than the extents take"):
            collect()
    else:
        collect()
        assert found == list(zip(places, data, strict=True))
    # Nothing ever lands outside.
    assert {place for place, _ in found} <= set(places)
