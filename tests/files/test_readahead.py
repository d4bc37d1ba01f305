"""Tests for :mod:`pdiffcopy.files.readahead`: what the kernel reads ahead of us, on a real disk."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time

import pytest

from pdiffcopy.blocks import Extent
from pdiffcopy.files import kernel, readahead
from pdiffcopy.files.buffers import READ_SIZE
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.files.readahead import WINDOW, ReadAhead
from tests.support import loop_device, make_data

MEBIBYTE = 1024 * 1024
SIZE = 4 * WINDOW + MEBIBYTE


@pytest.fixture
def file(tmp_path):
    """A file of which nothing is in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(make_data(MEBIBYTE) * (SIZE // MEBIBYTE))
    with LocalFile(str(path), write=True) as file:
        drop_cache(file)
        if count_cached(file):
            pytest.skip("this file system keeps everything in memory")
        yield file


def drop_cache(file: LocalFile) -> None:
    """What somebody is just working with stays, so it may take several attempts."""
    os.fsync(file.fd)
    deadline = time.monotonic() + 2
    while count_cached(file) and time.monotonic() < deadline:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def count_cached(file: LocalFile) -> int:
    """How many bytes of a file are in the cache."""
    return kernel.count_cached_pages(file.fd, SIZE) * mmap.PAGESIZE


def wait_for_cached(file: LocalFile, size: int) -> None:
    """Storage may take its time, and what nobody has asked for yet is the first to be dropped where it's busy."""
    deadline = time.monotonic() + 20
    while count_cached(file) < size * 3 // 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count_cached(file) >= size * 3 // 4


def test_window_is_read_ahead(file):
    """No more than that, until the reader has got on."""
    ahead = ReadAhead(file.fd, [Extent(0, SIZE)])
    ahead.advance(0)
    wait_for_cached(file, WINDOW)
    assert count_cached(file) <= 2 * WINDOW  # the kernel itself reads ahead of what it's asked for, too
    ahead.advance(3 * WINDOW)
    wait_for_cached(file, 4 * WINDOW)


def test_only_what_is_asked_for_is_read(file):
    """Extents lie anywhere, and what's between them is left alone."""
    extents = [Extent(SIZE - 3 * MEBIBYTE, 2 * MEBIBYTE), Extent(5, 10)]
    ReadAhead(file.fd, extents).advance(0)
    wait_for_cached(file, 2 * MEBIBYTE + mmap.PAGESIZE)
    assert count_cached(file) <= WINDOW


def test_readers_are_ahead_of_themselves(file):
    """Whoever reads chunks has the next ones read meanwhile."""
    chunks = file.chunks([Extent(0, SIZE)])
    assert len(next(chunks)) == READ_SIZE
    wait_for_cached(file, WINDOW)
    chunks.close()


def test_sender_is_ahead_of_itself(file):
    """Before the receiver has taken anything."""
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(20)
        steps = file.send(near, [Extent(0, SIZE)])
        next(steps)
        wait_for_cached(file, WINDOW)
        steps.close()


def test_what_is_cached_is_not_asked_for(file, monkeypatch):
    """It would take the kernel longer to find that out than to read it. (A look has it read a little, too.)"""
    wait_for_cached_by_reading(file)
    asked = []
    monkeypatch.setattr(readahead.os, "posix_fadvise", lambda *args: asked.append(args))
    ReadAhead(file.fd, [Extent(0, SIZE)]).advance(SIZE)
    assert not asked
    monkeypatch.undo()
    drop_cache(file)
    monkeypatch.setattr(readahead.os, "posix_fadvise", lambda *args: asked.append(args))
    ReadAhead(file.fd, [Extent(0, SIZE)]).advance(SIZE)
    assert SIZE - MEBIBYTE <= sum(size for _, _, size, _ in asked) <= SIZE


def wait_for_cached_by_reading(file: LocalFile) -> None:
    for _ in file.chunks([Extent(0, SIZE)]):
        pass
    wait_for_cached(file, SIZE)


def test_block_devices_are_read_ahead(tmp_path):
    """They have a setting of their own for how much that is."""
    image = tmp_path / "image"
    image.write_bytes(make_data(MEBIBYTE) * (SIZE // MEBIBYTE))
    with loop_device(image) as name, LocalFile(name) as device:
        os.posix_fadvise(device.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        data = b"".join(map(bytes, device.chunks([Extent(0, SIZE)])))
    assert data == image.read_bytes()


def test_places_without_a_setting_have_the_usual_one():
    """As those have that are no block device, and no file system on one."""
    reader, writer = os.pipe()
    try:
        assert readahead._get_unit(reader) == 128 * 1024
    finally:
        os.close(reader)
        os.close(writer)


def test_many_readers_get_the_right_bytes(file):
    """Threads read parts of the same file at once, while the kernel reads ahead for all of them."""
    expected, found = make_data(MEBIBYTE), []

    def read(start: int) -> None:
        found.append(b"".join(map(bytes, file.chunks([Extent(start, 4 * MEBIBYTE)]))) == expected * 4)

    threads = [threading.Thread(target=read, args=(start * MEBIBYTE,)) for start in range(0, 16, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
