"""Where are files that most file systems can't have? On a disk that is a file itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.links import UnavailableError

LEAST_SIZE = 512 * 1024**2
"""An XFS isn't smaller than that."""


class Disk:
    """An XFS, which allows files of up to 8 EiB (a context manager). It takes as much room as what is in it."""

    def __init__(self, folder: Path, size: int):
        """
        Initialize it.

        :param folder: Where to put the file.
        :param size: The size of the disk in bytes.
        """
        self.image = folder / "disk.img"
        self.mountpoint = folder / "disk"
        self.size = max(size, LEAST_SIZE)

    def __enter__(self) -> Path:
        if os.geteuid() or not shutil.which("mkfs.xfs"):
            raise UnavailableError("no disk of our own here (it takes mkfs.xfs and the privileges of root)")
        self.mountpoint.mkdir()
        with self.image.open("wb") as file:
            file.truncate(self.size)
        subprocess.run(["mkfs.xfs", "-q", str(self.image)], check=True)
        command = ["mount", "-o", "loop", str(self.image), str(self.mountpoint)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            self.__exit__()
            raise UnavailableError("no disk of our own here (loop devices can't be mounted)")
        return self.mountpoint

    def __exit__(self, *exc_info: Any) -> None:
        if self.mountpoint.is_mount():
            subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=True)
        self.mountpoint.rmdir()
        self.image.unlink()
