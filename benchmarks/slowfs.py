"""
A file system on storage that takes its time.

Usage: ``python -m benchmarks.slowfs FOLDER MOUNTPOINT SECONDS`` serves the files of a folder. Each request to read or
write takes so many seconds, and any number of them is served at the same time, as volumes elsewhere do it. It ends when
it's unmounted.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pyfuse3
import trio

CONNECTIONS = Path("/sys/fs/fuse/connections")
READ_SIZE = 1024 * 1024
"""How many bytes a request has at most, read ahead included."""
MAX_REQUESTS = 1024
"""How many of those there are at the same time."""


class SlowFiles(pyfuse3.Operations):
    """The files of one folder, by their names."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, folder: Path, delay: float):
        super().__init__()
        self.folder, self.delay = folder, delay
        self.names = {pyfuse3.ROOT_INODE: b"."}
        self.open_maps: dict[int, memoryview] = {}
        self.maps: dict[int, memoryview] = {}

    def _path(self, inode: int) -> bytes:
        return os.path.join(os.fsencode(self.folder), self.names[inode])

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        status, entry = os.stat(self._path(inode)), pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(status, name))
        entry.st_ino, entry.st_blksize, entry.st_blocks = inode, 4096, status.st_blocks
        entry.attr_timeout = entry.entry_timeout = 60
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        try:
            inode = os.stat(os.path.join(os.fsencode(self.folder), name)).st_ino
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno or errno.EIO) from e
        self.names[inode] = name
        return await self.getattr(inode)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.truncate(self._path(inode), attr.st_size)
        return await self.getattr(inode)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        status, data = os.statvfs(self.folder), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(status, name))
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        raise pyfuse3.FUSEError(errno.ENOTSUP)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        descriptor = os.open(self._path(inode), os.O_RDWR)
        size = os.fstat(descriptor).st_size
        if size and len(self.maps.get(inode, "")) != size:
            self.maps[inode] = memoryview(mmap.mmap(descriptor, size))
        self.open_maps[descriptor] = self.maps.get(inode, memoryview(b""))
        return pyfuse3.FileInfo(fh=descriptor, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview:
        await trio.sleep(self.delay)
        return self.open_maps[fh][off : off + size]  # not a copy: the machine isn't to be busy with that

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await trio.sleep(self.delay)
        return os.pwrite(fh, buf, off)

    async def flush(self, fh: int) -> None:
        """There is nothing to do."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """There is nothing to do."""

    async def release(self, fh: int) -> None:
        del self.open_maps[fh]
        os.close(fh)


async def serve(mountpoint: str) -> None:
    """Serve until it's unmounted."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prepare, mountpoint)
        await pyfuse3.main(min_tasks=2, max_tasks=MAX_REQUESTS)


async def prepare(mountpoint: str) -> None:
    """Let the kernel ask for as much as such a volume is made for, as an administrator would."""
    device = (await trio.to_thread.run_sync(os.stat, mountpoint)).st_dev
    major, minor = os.major(device), os.minor(device)
    Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb").write_text(str(READ_SIZE // 1024))
    if not CONNECTIONS.is_mount():
        await trio.run_process(["mount", "-t", "fusectl", "none", str(CONNECTIONS)])
    for name in ("max_background", "congestion_threshold"):
        (CONNECTIONS / str(minor) / name).write_text(str(MAX_REQUESTS))
    print("mounted", flush=True)


def main() -> None:
    """The command line interface."""
    folder, mountpoint, delay = sys.argv[1:]
    options = {*pyfuse3.default_options, "fsname=slow"}
    pyfuse3.init(SlowFiles(Path(folder), float(delay)), mountpoint, options)
    try:
        trio.run(serve, mountpoint)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
