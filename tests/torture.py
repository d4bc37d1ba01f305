"""
Does the program keep its promises under long random attacks?

``python -m tests.torture [--count=200] [--seed=SEED]`` (``make torture``) runs three attacks on real clients and
servers, over and over: the client is killed at a random moment and run again, a relay does random harm at random
bytes, and the server is killed and started again. What must hold each time: exit code 0 means that the target equals
the source, a failure is one line, no process is left, and an undisturbed run completes the target. The seed is
printed first: the same seed chooses the same attacks (though not the same nanoseconds).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.relay import RelayProcess
from tests.support import Server, children_of, find_free_port, is_alive, start_server, wait_for
from tests.test_faults import DIRECTIONS, METHODS, Pair, check_error, kill_server

ACTIONS = ("reset", "close", "stall", "corrupt", "corrupt", "duplicate=7", "drop=7", "delay=0.2")
ENDPOINTS = ("GET+/info", "GET+/hashes", "GET+/blocks", "POST+/blocks", "POST+/resize")
LONGEST_RUN = 0.6
"""How many seconds an undisturbed run takes: the client is killed within that time."""


def kill_and_rerun(pair: Pair, seed: int, kills: int = 2) -> None:
    """Kill the client at random moments, and let one run end undisturbed."""
    chance = random.Random(seed)
    for _ in range(kills):
        process = pair.start()
        try:
            process.wait(chance.uniform(0, LONGEST_RUN))
        except subprocess.TimeoutExpired:
            pass
        children = children_of(process.pid)
        process.kill()
        _, stderr = process.communicate()
        wait_for(lambda: not any(map(is_alive, children)), what="the end of the client's children")  # noqa: B023
        assert process.returncode or pair.is_equal(), stderr
    result = pair.run()
    assert result.returncode == 0, result.stderr


def choose_fault(chance: random.Random, direction: str) -> str:
    """A random fault, as :class:`.Fault` spells it."""
    side = chance.choice(["request", "response"])
    endpoint = chance.choice([name for name in ENDPOINTS if direction == "upload" or "POST" not in name])
    if direction == "upload" and endpoint == "GET+/blocks":
        endpoint = "POST+/blocks"
    place = chance.choice(["first", "middle", "last", *(str(chance.randrange(400)) for _ in range(6))])
    return f"{side} {endpoint} {place} {chance.choice(ACTIONS)}"


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
    """A run whose server is killed at a random moment, and comes back after a while."""
    chance = random.Random(seed)
    server = start_server(folder, port=find_free_port())
    with RelayProcess(server.port, rate=2_000_000) as relay:
        process = pair.via(relay.port).start("--timeout", "2", "-m", chance.choice(METHODS))
        time.sleep(chance.uniform(0, LONGEST_RUN))
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
    """All attacks in one direction. The server's, which takes seconds, only comes in every tenth round."""
    attacks = [
        lambda pair: kill_and_rerun(pair, seed, kills=1),
        lambda pair: break_the_network(pair, server, seed),
    ]
    if seed % 10 == 0:
        attacks.append(lambda pair: restart_the_server(pair, folder, seed))
    success = True
    for function in attacks:
        try:
            function(pair := Pair(folder, direction, server.port))
            assert pair.is_equal()
        except AssertionError as e:
            success = False
            print(f"--seed={seed} {direction}: {e}", flush=True)
    return success


if __name__ == "__main__":
    main()
