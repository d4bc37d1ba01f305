"""
What does a bad network do to HTTP, at exactly which byte?

A TCP relay on loopback between a client and a server. It passes everything on, knows where each request and each
response begins, and does what it was told at a byte of them: reset or close the connection, stall, delay, corrupt,
duplicate or drop bytes, hold them until a line arrives on stdin, answer in the server's place, or answer the next
request with the same once more. ``python -m
tests.relay --help`` explains its arguments; it prints the port that it listens on and then one line for each fault
that hit, so that a test can tell that its fault took place. It ends with its stdin.

Requests aren't pipelined, so a response belongs to the last request that was seen on its connection.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

LOOPBACK = "127.0.0.1"
ACTIONS = ("reset", "close", "stall", "delay", "hold", "corrupt", "duplicate", "drop", "answer", "repeat")
CHUNKED_MIDDLE = 300
"""Where the "middle" of a body of unknown length is taken to be."""
_LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass
class Fault:
    """
    What happens where.

    The text form is ``SIDE ENDPOINT PLACE ACTION[=VALUE] [COUNT] [SKIP]``: the side is ``request`` or ``response``;
    the endpoint is how the request begins, with a plus sign for the space (``GET+/blocks``, a single plus sign for
    all); the place is a number (the offset in the message, its head included), ``first``, ``middle`` or ``last``
    (byte of the body) or ``@TEXT`` (the byte after this text in the head, with ~ for a space). The value is a
    number of seconds for a delay, a status for an answer (0: garbage), and otherwise a number of bytes. It hits
    COUNT messages (1, unless given), after SKIP of them.
    """

    side: str
    endpoint: str
    place: str
    action: str
    value: float = 1.0
    count: int = 1
    skip: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read the text form."""
        side, endpoint, place, action, *numbers = text.split()
        action, _, value = action.partition("=")
        if side not in ("request", "response") or action not in ACTIONS:
            raise ValueError(f"not a fault: {text}")
        return cls(side, endpoint.replace("+", " ").strip(), place, action, float(value or 1), *map(int, numbers))

    def claim(self, request_line: bytes) -> bool:
        """Whether this fault is meant for a message (each message asks once)."""
        if not request_line.startswith(self.endpoint.encode()):
            return False
        with self.lock:
            self.skip -= 1
            if self.skip >= 0 or self.count <= 0:
                return False
            self.count -= 1
            return True


class Message:
    """A request or response on its way: how much of it has passed, and where faults wait for it."""

    def __init__(self, faults: list[Fault]):
        self.faults = faults
        self.head = b""
        self.position = 0
        self.length: int | None = None
        self.complete_head = False

    def advance(self, data: bytes) -> tuple[int, Fault | None]:
        """Returns how many bytes of the data may pass, and the fault that waits behind them."""
        limit = len(data)
        if not self.complete_head:
            before = len(self.head)
            self.head += data
            end = self.head.find(b"\r\n\r\n") + 4
            if end >= 4:
                self.complete_head = True
                self.head = self.head[:end]
                limit = end - before
                match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.head)
                chunked = re.search(rb"(?i)\r\ntransfer-encoding: *chunked", self.head)
                self.length = None if chunked else end + int(match[1] if match else 0)
        elif self.length is not None:
            limit = min(limit, self.length - self.position)
        for fault in self.faults:
            place = self.find(fault.place, data)
            if place is not None and self.position <= place < self.position + limit:
                self.faults.remove(fault)
                if place < len(self.head):  # what follows is looked at again, after the fault
                    self.head, self.complete_head = self.head[:place], False
                count = place - self.position
                self.position = place
                return count, fault
        self.position += limit
        return limit, None

    def find(self, place: str, data: bytes) -> int | None:
        """Where in this message a place is, if that is known by now."""
        if place.isdecimal():
            return int(place)
        if place.startswith("@"):
            found = self.head.find(place[1:].replace("~", " ").encode())
            return found + len(place) - 1 if found >= 0 else None
        if not self.complete_head:
            return None
        start = len(self.head)
        if place == "first":
            return start
        if self.length is not None:
            return start + (self.length - start) // 2 if place == "middle" else self.length - 1
        if place == "middle":
            return start + CHUNKED_MIDDLE
        end = data.find(_LAST_CHUNK)
        return self.position + end + 2 if end >= 0 else None

    @property
    def is_complete(self) -> bool:
        """Whether all of it has passed (never, when nobody said how long it is)."""
        return self.length is not None and self.position >= self.length


class Connection:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, relay: Relay, client: socket.socket):
        self.relay = relay
        self.client = client
        self.server: socket.socket | None = None
        self.response = Message([])
        self.record = self.repetition = b""
        self.broken = threading.Event()

    def run(self) -> None:
        """Connect, and pump in both directions until both are over."""
        try:
            self.server = socket.create_connection((LOOPBACK, self.relay.target))
        except OSError:
            self.abort()
            return
        back = threading.Thread(target=self._pump, args=(self.server, self.client, "response"), daemon=True)
        back.start()
        self._pump(self.client, self.server, "request")
        back.join()
        for sock in (self.client, self.server):
            sock.close()

    def _pump(self, origin: socket.socket, destination: socket.socket, side: str) -> None:
        message = Message([])
        started = False
        try:
            while data := origin.recv(65536):
                while data and not self.broken.is_set():
                    if side == "request" and (not started or message.is_complete):
                        message, started = self._begin(data), True
                    elif side == "response":
                        message = self.response
                        if message.is_complete:  # more than was announced
                            message = Message([])
                    self.record += data if any(fault.action == "repeat" for fault in message.faults) else b""
                    count, fault = message.advance(data)
                    self.relay.throttle(count)
                    destination.sendall(data[:count])
                    data = data[count:]
                    if fault:
                        data = self._hit(fault, destination, data)
                if self.broken.is_set():
                    return
            destination.shutdown(socket.SHUT_WR)
        except OSError:
            self.abort()

    def _begin(self, data: bytes) -> Message:
        """A new request: a client sends its first line in one piece."""
        if self.repetition:
            self.client.sendall(self.repetition)
            self.repetition = b""
        line = data.partition(b"\r\n")[0]
        claimed = [fault for fault in self.relay.faults if fault.claim(line)]
        self.response = Message([fault for fault in claimed if fault.side == "response"])
        return Message([fault for fault in claimed if fault.side == "request"])

    def _hit(self, fault: Fault, destination: socket.socket, data: bytes) -> bytes:
        if fault.action == "hold":
            self.relay.released.clear()
        self.relay.report(fault)
        size = int(fault.value)
        if fault.action == "reset":
            self.abort()
        elif fault.action == "close":
            self.broken.set()
            for sock in (self.client, self.server):
                sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        elif fault.action == "stall":
            self.broken.wait()
        elif fault.action == "delay":
            self.broken.wait(fault.value)
        elif fault.action == "hold":
            self.relay.released.wait()
        elif fault.action == "answer":
            self._answer(size)
        elif fault.action == "corrupt":
            return bytes(byte ^ 1 for byte in data[:size]) + data[size:]
        elif fault.action == "duplicate":
            destination.sendall(data[:size])
        elif fault.action == "repeat":
            self.repetition, self.record = self.record, b""
        elif fault.action == "drop":
            return data[size:]
        return data

    def _answer(self, status: int) -> None:
        """Answer in the server's place, and let the client finish what it has to say."""
        head = f"HTTP/1.1 {status} Whatever" if status else "\0garbage\xff\r\n"
        self.client.sendall(f"{head}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode("latin-1"))
        self.client.shutdown(socket.SHUT_WR)
        while self.client.recv(65536):
            pass
        self.abort()

    def abort(self) -> None:
        """Reset both connections."""
        self.broken.set()
        for sock in filter(None, (self.client, self.server)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Only the last reference sends the reset, and the other thread may be asleep in recv().
                sock.shutdown(socket.SHUT_RD)
            except OSError:
                pass
            sock.close()


class Relay:
    """A listening socket and what is to happen to those who connect to it."""

    def __init__(self, target: int, faults: list[Fault], rate: float = 0, listen: int = 0):
        """
        Initialize a relay (:attr:`port` is known and connections are accepted from now on).

        :param target: The port of the server.
        :param rate: How many bytes pass in a second, all connections together (0 means any number).
        :param listen: The port to listen on (0 means a free one).
        """
        self.target = target
        self.faults = faults
        self.rate = rate
        self.hits: list[Fault] = []
        self.released = threading.Event()
        self._turn = threading.Lock()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((LOOPBACK, listen))
        self._listener.listen(1024)
        self.port = self._listener.getsockname()[1]

    def serve(self) -> None:
        """Accept connections until :meth:`close` is called."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Connection(self, client).run, daemon=True).start()

    def start(self) -> Relay:
        """Serve in a thread."""
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def throttle(self, count: int) -> None:
        """Take the time that some bytes take."""
        if self.rate and count:
            with self._turn:
                time.sleep(count / self.rate)

    def report(self, fault: Fault) -> None:
        """Tell that a fault has hit."""
        self.hits.append(fault)
        print("hit", fault.action, fault.side, fault.endpoint, fault.place, flush=True)


def main() -> None:
    """The command line interface."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=int, help="the port of the server on loopback")
    parser.add_argument("faults", nargs="*", type=Fault.parse, help=Fault.__doc__)
    parser.add_argument("--listen", type=int, default=0, help="the port to listen on")
    parser.add_argument("--rate", type=float, default=0, help="bytes per second")
    options = parser.parse_args()
    relay = Relay(options.target, options.faults, options.rate, options.listen).start()
    print(relay.port, flush=True)
    for _ in sys.stdin:
        relay.released.set()


class RelayProcess:
    """A relay in a process of its own (a context manager), so that its threads are nobody else's."""

    def __init__(self, target: int, *faults: str, rate: float = 0):
        """
        Start a relay.

        :param target: The port of the server.
        :param faults: See :class:`Fault`.
        :param rate: How many bytes pass in a second.
        """
        command = [sys.executable, "-m", "tests.relay", f"--rate={rate}", str(target), *faults]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self._next_line())

    def _next_line(self) -> str:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        assert line, "the relay has ended"
        return line

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def location(self, path: os.PathLike | str) -> str:
        """The location of a file behind this relay, in the short form."""
        return f"{LOOPBACK}:{self.port}{os.path.abspath(path)}"

    def wait_for_hit(self) -> str:
        """Wait until the next fault hits (the time limit of the test bounds this)."""
        return self._next_line()

    def release(self) -> None:
        """Let go of what is held."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def stop(self) -> list[str]:
        """End the relay, and return a line for each hit that nobody waited for."""
        return self.process.communicate()[0].splitlines()


if __name__ == "__main__":
    main()
