"""
What would a program need that does nothing but the work?

Usage: ``python -m benchmarks.limits SOURCE TARGET`` with the plan as one JSON object on standard input: ``hash`` (a
hash method, or empty to hash nothing), ``extents`` (what to move, a list of ``[offset, size]``) and ``verify`` (a hash
method for what was moved, or empty). One after the other, each on all cores:

1. both files are read and hashed in blocks of 1 MiB (the digests aren't compared with anything), unless the target is
   missing,
2. the extents are moved by ``sendfile``, ``recv_into`` and ``pwrite`` over as many connections on loopback as there
   are cores (unpaced ones, whatever the congestion control of the system is),
3. the extents are read from the target and hashed once more (and from the source, if nothing was hashed before).

How long each step took is printed as JSON. Whoever measures the whole process can so subtract what isn't part of
the limit in question. There is no protocol, no comparison and no error handling here: this isn't a program to use.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

BLOCK_SIZE = 1024 * 1024
PIECE_SIZE = 4 * 1024 * 1024
"""How much a process takes on at a time."""
CORES = len(os.sched_getaffinity(0))
UNPACED = (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def main() -> None:
    """Do the work that standard input asks for."""
    source, target = (os.open(name, os.O_RDWR | os.O_CREAT) for name in sys.argv[1:])
    plan = json.load(sys.stdin)
    size, moved = os.fstat(source).st_size, list(_cut(plan["extents"]))
    is_new = not os.fstat(target).st_size
    os.ftruncate(target, size)
    compared = [] if is_new else [(fd, *piece) for fd in (source, target) for piece in _cut([(0, size)])]
    verified = [(fd, *piece) for fd in ((source, target) if is_new else (target,)) for piece in moved]
    times = {
        "hash": _measure(lambda: _hash(compared, plan["hash"])),
        "move": _measure(lambda: _move(source, target, moved)),
        "verify": _measure(lambda: _hash(verified, plan["verify"])),
    }
    print(json.dumps(times))


def get_hasher(method: str) -> Callable[..., Any]:
    """The bare class of a hash method: imported only if it's asked for, like a program would."""
    if method == "xxh128":
        from xxhash import xxh3_128

        return xxh3_128
    if method == "blake3":
        from blake3 import blake3

        return blake3
    return getattr(hashlib, method)


def make_buffer(size: int) -> memoryview:
    """
    A buffer that begins at a page.

    A large bytearray begins 16 bytes behind a page, and to copy a page of the page cache to there takes a processor
    up to five times as long (seen on x86-64: the destination is a few bytes ahead of the source, modulo 4096).
    """
    return memoryview(mmap.mmap(-1, size))


def _measure(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _cut(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut extents into pieces that many processes can share evenly."""
    for offset, size in extents:
        for position in range(offset, offset + size, PIECE_SIZE):
            yield position, min(PIECE_SIZE, offset + size - position)


def _hash(pieces: list[tuple[int, int, int]], method: str) -> None:
    """Hash pieces of files, each a descriptor, an offset and a size."""
    if not (pieces and method):
        return
    new_hasher = get_hasher(method)
    # The processes share a pipe that holds the numbers of the pieces: whoever is done takes the next one.
    tickets, writer = os.pipe()

    def work() -> None:
        os.close(writer)
        buffer = make_buffer(BLOCK_SIZE)
        while ticket := os.read(tickets, 4):
            fd, offset, size = pieces[struct.unpack("I", ticket)[0]]
            for position in range(offset, offset + size, BLOCK_SIZE):
                length = min(BLOCK_SIZE, offset + size - position)
                new_hasher(buffer[: os.preadv(fd, [buffer[:length]], position)]).digest()

    children = [_fork(work) for _ in range(CORES)]
    for number in range(len(pieces)):
        os.write(writer, struct.pack("I", number))
    os.close(writer)
    os.close(tickets)
    _join(children)


def _move(source: int, target: int, pieces: list[tuple[int, int]]) -> None:
    """Copy pieces from one file to the other over loopback."""
    children = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(*UNPACED)
    for number in range(min(CORES, len(pieces))):
        share = pieces[number::CORES]
        sender = socket.socket()
        sender.setsockopt(*UNPACED)
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        children.append(_fork(partial(_send, sender, source, share)))
        children.append(_fork(partial(_receive, receiver, target, share)))
        sender.close()
        receiver.close()
    _join(children)


def _send(sock: socket.socket, fd: int, pieces: list[tuple[int, int]]) -> None:
    for offset, size in pieces:
        end = offset + size
        while offset < end:
            offset += os.sendfile(sock.fileno(), fd, offset, end - offset)


def _receive(sock: socket.socket, fd: int, pieces: list[tuple[int, int]]) -> None:
    buffer = make_buffer(BLOCK_SIZE)
    for offset, size in pieces:
        end = offset + size
        while offset < end:
            count = sock.recv_into(buffer[: end - offset])
            if not count:
                raise EOFError("the sender failed")
            offset += os.pwrite(fd, buffer[:count], offset)


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def _join(children: list[int]) -> None:
    for pid in children:
        if os.waitpid(pid, 0)[1]:
            sys.exit("a process failed")


if __name__ == "__main__":
    main()
