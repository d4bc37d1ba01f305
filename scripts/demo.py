"""
What does pdiffcopy do? A demonstration on this machine, with the real commands.

A server is started on loopback; it has a copy of a large file in which a tenth of the blocks is out of date. The
client brings that copy into line, once more from the other side, and other programs (cmp, sha256sum) have a look.
Everything happens in a temporary directory that disappears afterwards, also when the demonstration is interrupted.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

PDIFFCOPY = Path(sys.executable).with_name("pdiffcopy")
BLOCK_SIZE = 1024 * 1024
PAGE_SIZE = 16 * 1024
SIZE = 512 * BLOCK_SIZE
CHANGED = SIZE // BLOCK_SIZE // 10
PATIENCE = 20  # seconds


def main() -> None:
    """Run the demonstration."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="pdiffcopy-demo-") as folder:
            demonstrate(Path(folder))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted, everything is cleaned up.")


def demonstrate(folder: Path) -> None:
    """All of it, in a folder of its own."""
    if shutil.disk_usage(folder).free < 3 * SIZE:
        sys.exit(f"The demonstration needs 1.5 GiB in {folder.parent} (TMPDIR can name another directory)")
    near, far = folder / "near", folder / "far"
    near.mkdir()
    far.mkdir()
    source, copy = near / "table.ibd", far / "table.ibd"

    say(f"Making a table of {SIZE >> 20} MiB, and a copy from before {CHANGED} of its {SIZE // BLOCK_SIZE} MiB changed")
    make_table(source)
    make_older_copy(source, copy)
    say(f"The two differ: {subprocess.run(['cmp', source, copy], capture_output=True, text=True).stdout.strip()}")

    with running_server(far) as port:
        location = f"127.0.0.1:{port}/table.ibd"
        say("How similar are they? Nothing is written yet")
        pdiffcopy("--dry-run", source, location)
        say("Upload what differs")
        upload = pdiffcopy(source, location)
        prove_equal(source, copy)

        say("The other way round, with the fastest hash method: damage the near file and download what differs")
        make_older_copy(copy, source)
        download = pdiffcopy("--hash-method=xxh128", location, source)
        prove_equal(copy, source)

    for name, report in ("upload", upload), ("download", download):
        assert report["blocks_changed"] == CHANGED, report
        assert report["verification"] == "verified", report
        print(
            f"\n{name.capitalize():9} {report['size'] >> 20} MiB compared and {report['bytes_moved'] >> 10} KiB moved"
            f" in {report['elapsed']:.2f} seconds, {report['similarity']:.1%} similar, {report['verification']}",
            end="",
        )
    print("\n\nIt works: both times the target equals the source.")


def make_table(path: Path) -> None:
    """Write something like a table of a database: pages with a header, rows of text, and empty space at their end."""
    rng = random.Random(2024)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 12))) for _ in range(2000)]
    rows = b"".join(b"%012d|%b|%b|%d\n" % (i, *rng.choices(words, k=2), rng.getrandbits(60)) for i in range(40_000))
    with path.open("wb") as handle:
        for number in range(SIZE // PAGE_SIZE):
            header = rng.randbytes(4) + number.to_bytes(8, "big") + bytes(26)
            start = rng.randrange(len(rows) - PAGE_SIZE)
            page = header + rows[start : start + rng.randint(PAGE_SIZE // 2, PAGE_SIZE - len(header))]
            handle.write(page.ljust(PAGE_SIZE, b"\0"))


def make_older_copy(source: Path, copy: Path) -> None:
    """Copy a table, and let a page in a tenth of its blocks (all over the file) be another one."""
    shutil.copyfile(source, copy)
    rng = random.Random(2023)
    with copy.open("r+b") as handle:
        for block in rng.sample(range(SIZE // BLOCK_SIZE), CHANGED):
            handle.seek(block * BLOCK_SIZE + rng.randrange(BLOCK_SIZE // PAGE_SIZE) * PAGE_SIZE)
            handle.write(rng.randbytes(PAGE_SIZE))


@contextmanager
def running_server(folder: Path):
    """Serve a folder, and nothing but that, on a free port of loopback."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = start("--listen", f"127.0.0.1:{port}", "--root", folder)
    try:
        deadline = time.monotonic() + PATIENCE
        while not can_connect(port):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("The server didn't start")
            time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()


def can_connect(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def pdiffcopy(*arguments: object) -> dict:
    """Run the client and return its report."""
    process = start("--json", *arguments, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        sys.exit(f"pdiffcopy ended with exit code {process.returncode}")
    return json.loads(output)


def start(*arguments: object, **options) -> subprocess.Popen:
    """Show a command and start it."""
    command = list(map(str, (PDIFFCOPY, *arguments)))
    print(f"$ pdiffcopy {shlex.join(command[1:])}", flush=True)
    return subprocess.Popen(command, **options)


def prove_equal(source: Path, target: Path) -> None:
    """Ask programs that know nothing of pdiffcopy."""
    for command in ["cmp", str(source), str(target)], ["sha256sum", str(source), str(target)]:
        print(f"$ {shlex.join(command)}", flush=True)
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(result.stdout, end="")
        digests = {line.split()[0] for line in result.stdout.splitlines()}
        if result.returncode or len(digests) > 1:
            sys.exit("The two differ: that must not happen")
    print("They are equal.")


def say(text: str) -> None:
    """Tell what is going on."""
    print(f"\n# {text}", flush=True)


if __name__ == "__main__":
    main()
