"""
Does the program keep its promises under long random attacks?

``python -m tests.torture [--count=200] [--seed=SEED]`` (``make torture COUNT=200``) attacks real clients and servers,
over and over, at random moments: the client is killed and run again, a relay does harm at random bytes or repeats
answers, names lead elsewhere for a while, the source is written to by programs that set its time back or have it
mapped, a run is paused while another one comes and goes, the server is killed and started again, and its machine loses
what it hasn't flushed and starts anew (for root). What must hold each time: exit code 0 means that the target equals
the source, a failure is one line, no process is left, and an undisturbed run completes the target. The seed is printed
first: the same seed chooses the same attacks (though not the same nanoseconds).
"""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.relay import RelayProcess
from tests.support import (
    MANY_BLOCKS,
    Server,
    children_of,
    ext4,
    find_free_port,
    is_alive,
    make_data,
    start_server,
    start_server_of_boot,
    wait_for,
)
from tests.test_faults import DIRECTIONS, METHODS, Pair, check_error, kill_server

ACTIONS = ("repeat", "reset", "close", "stall", "corrupt", "corrupt", "duplicate=7", "drop=7", "delay=0.2")
ENDPOINTS = ("GET+/info", "GET+/hashes", "GET+/blocks", "POST+/blocks", "POST+/resize")
LONGEST_RUN = 0.6
"""How many seconds an undisturbed run takes: the client is killed within that time."""


def kill_and_rerun(pair: Pair, seed: int, kills: int = 2) -> None:
    """Kill the client at random moments, and let one run end undisturbed."""
    chance = random.Random(seed)
    for _ in range(kills):
        process = pair.start(*chance.choice([(), MANY_BLOCKS]))
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, LONGEST_RUN))
        children = children_of(process.pid)
        process.kill()
        _, stderr = process.communicate()
        wait_for(lambda: not any(map(is_alive, children)), what="the end of the client's children")  # noqa: B023
        assert process.returncode or pair.is_equal(), stderr
    result = pair.run()
    assert result.returncode == 0, result.stderr


def choose_fault(chance: random.Random, direction: str) -> str:
    """A random fault, as :class:`.Fault` spells it."""
    action = chance.choice(ACTIONS)
    side = "response" if action == "repeat" else chance.choice(["request", "response"])
    endpoint = chance.choice([name for name in ENDPOINTS if direction == "upload" or "POST" not in name])
    if direction == "upload" and endpoint == "GET+/blocks":
        endpoint = "POST+/blocks"
    place = chance.choice(["first", "middle", "last", *(str(chance.randrange(400)) for _ in range(6))])
    return f"{side} {endpoint} {place} {action}"


def break_the_network(pair: Pair, server: Server, seed: int) -> None:
    """A run through a relay that does one to three kinds of harm."""
    chance = random.Random(seed)
    faults = [choose_fault(chance, pair.direction) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.5:
        pair.enlarge()
    with RelayProcess(server.port, *faults) as relay:
        result = pair.via(relay.port).run("--timeout", "1", "--retries", "5", "-m", chance.choice(METHODS))
    assert result.returncode or pair.is_equal(), (faults, result.stderr)
    pair.check_completion(server.port)


def restart_the_server(pair: Pair, folder: Path, seed: int) -> None:
    """A run whose server is killed at a random moment after its first answer, and comes back after a while."""
    chance = random.Random(seed)
    log = folder / f"access-{seed}.log"
    server = start_server(folder, f"--access-log={log}", port=find_free_port())
    with RelayProcess(server.port, rate=2_000_000) as relay:
        process = pair.via(relay.port).start("--timeout", "2", "-m", chance.choice(METHODS))
        # A server that has never answered is given up soon.
        wait_for(lambda: log.read_text() or process.poll() is not None, what="an answer")
        time.sleep(0.1 + chance.uniform(0, LONGEST_RUN))
        kill_server(server)
        time.sleep(chance.uniform(0, 3))
        server = start_server(folder, port=server.port)
        try:
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            server.stop()
    check_error(process.returncode, stderr)
    assert process.returncode == 0, stderr
    assert pair.is_equal()


def flip_names(pair: Pair, seed: int) -> None:
    """The name of the source or the target leads to another file for some milliseconds, again and again."""
    chance = random.Random(seed)
    side = chance.choice(["source", "target"])
    real, other, link = getattr(pair, side), pair.source.with_name("other"), pair.source.with_name("link")
    untouched = make_data(real.stat().st_size, seed=2)
    other.write_bytes(untouched)
    link.symlink_to(real)
    setattr(pair, side, link)
    process = pair.start("-m", chance.choice(METHODS))
    while process.poll() is None:
        time.sleep(chance.uniform(0, 0.1))
        for path in (other, real):
            link.with_name("new").symlink_to(path)
            os.replace(link.with_name("new"), link)
            time.sleep(chance.uniform(0, 0.03) if path is other else 0)
    _, stderr = process.communicate()
    check_error(process.returncode, stderr)
    setattr(pair, side, real)
    if not process.returncode and not pair.is_equal():
        # The first look fell on the other file, and then that's what the run is about.
        setattr(pair, side, other)
        assert pair.is_equal(), stderr
        setattr(pair, side, real)
    elif not process.returncode:
        assert other.read_bytes() == untouched
    pair.check_completion(pair.port)


def change_the_source(pair: Pair, seed: int) -> None:
    """Somebody writes to the source, and sets its time back or has it mapped."""
    chance = random.Random(seed)
    with pair.source.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as view:
        view[:] = view[:]  # all pages are dirty
        if chance.random() < 0.5:
            os.fsync(handle.fileno())
        process = pair.start("-m", chance.choice(METHODS))
        time.sleep(chance.uniform(0, LONGEST_RUN))
        times = pair.source.stat()
        position = chance.randrange(len(view) - 5)
        if chance.random() < 0.5:
            view[position : position + 5] = b"newer"
        else:
            os.pwrite(handle.fileno(), b"newer", position)
            os.utime(handle.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
        written = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    check_error(process.returncode, stderr)
    # A run is over some milliseconds after its last look, and doesn't know what comes then.
    assert process.returncode or pair.is_equal() or time.monotonic() - written < 0.15, stderr
    pair.check_completion(pair.port)


def pause_a_run(pair: Pair, seed: int) -> None:
    """A run is paused, another one with another source comes and goes: the target is the other one's."""
    chance = random.Random(seed)
    paused = pair.start()
    time.sleep(chance.uniform(0, LONGEST_RUN))
    processes = [paused.pid, *children_of(paused.pid)]
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    original, pair.source = pair.source, pair.source.with_name("later")
    pair.source.write_bytes(make_data(original.stat().st_size, seed=3))
    result = pair.run()
    assert result.returncode == 0, result.stderr
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    _, stderr = paused.communicate(timeout=60)
    check_error(paused.returncode, stderr)
    # One that had not begun to write when it was paused is the later one of the two.
    assert pair.is_equal() or (paused.returncode == 0 and pair.target.read_bytes() == original.read_bytes()), stderr
    pair.check_completion(pair.port)


def lose_the_machine(folder: Path, seed: int) -> None:
    """The server's file system loses what isn't flushed, and its machine starts anew, while a run uploads to it."""
    chance = random.Random(seed)
    port = find_free_port()
    image, mountpoint = folder / f"image-{seed}", folder / "disk"
    with ext4(image, mountpoint) as disk:
        pair = Pair(folder, "upload", port)
        pair.target = Path(shutil.copy(pair.target, disk))
        os.sync()
        server = start_server_of_boot(folder, f"first-{seed}", port)
        with RelayProcess(port, rate=2_000_000) as relay:
            process = pair.via(relay.port).start("--fsync", "--timeout", "2")
            time.sleep(chance.uniform(0.1, LONGEST_RUN))
            go_down(disk)
            kill_server(server)
            server.process.wait()
            subprocess.run(["umount", str(mountpoint)], check=True)
            subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
            server = start_server_of_boot(folder, f"second-{seed}", port)
            try:
                _, stderr = process.communicate(timeout=60)
                check_error(process.returncode, stderr)
                assert process.returncode or pair.is_equal(), stderr
                pair.check_completion(port)
            finally:
                process.kill()
                server.stop()
    image.unlink()


def go_down(disk: Path) -> None:
    """Shut a file system down without flushing its journal (``EXT4_IOC_SHUTDOWN`` in linux/ext4.h)."""
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
    finally:
        os.close(fd)


def main() -> None:
    """The command line interface."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how often the client is killed")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="what the attacks are chosen by")
    options = parser.parse_args()
    print(f"python -m tests.torture --count={options.count} --seed={options.seed}", flush=True)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = start_server(folder)
        try:
            for number in range(options.count):
                seed = options.seed + number
                for direction in DIRECTIONS:
                    failures += not attack(folder, direction, server, seed)
                if sys.stderr.isatty():
                    print(f"\r{number + 1} of {options.count}, {failures} failures", end="", file=sys.stderr)
        finally:
            server.stop()
    print(f"{options.count} rounds, {failures} failures")
    sys.exit(1 if failures else 0)


def attack(folder: Path, direction: str, server: Server, seed: int) -> bool:
    """All attacks in one direction. Those on the server, which take seconds, only come in every tenth round."""
    attacks: list[Callable[[Pair], None]] = [
        lambda pair: kill_and_rerun(pair, seed, kills=1),
        lambda pair: break_the_network(pair, server, seed),
        lambda pair: flip_names(pair, seed),
        lambda pair: change_the_source(pair, seed),
        lambda pair: pause_a_run(pair, seed),
    ]
    if seed % 10 == 0:
        attacks.append(lambda pair: restart_the_server(pair, folder, seed))
    if seed % 10 == 5 and direction == "upload" and os.geteuid() == 0:
        attacks.append(lambda pair: lose_the_machine(folder, seed))
    success = True
    for function in attacks:
        for leftover in ("link", "new", "other", "later"):
            (folder / leftover).unlink(missing_ok=True)
        try:
            function(Pair(folder, direction, server.port))
        except (AssertionError, OSError, subprocess.SubprocessError) as e:
            success = False
            print(f"--seed={seed} {direction}: {type(e).__name__} {e}", flush=True)
    return success


if __name__ == "__main__":
    main()
