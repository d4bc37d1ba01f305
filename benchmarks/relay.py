"""
What does a long wire do to a run, and what goes over it?

Usage: ``python -m benchmarks.relay LISTEN_PORT SERVER_PORT DELAY`` passes on connections to a server on loopback.
Each byte arrives DELAY seconds after it was sent, in both directions; there's no limit to how many are under way
in between, so bandwidth doesn't suffer. A client can't be kept waiting for the handshake of a connection that is
accepted at once; what it sends first is delayed by that much more instead.

On SIGTERM the relay prints what it has seen as one JSON object: ``sent`` and ``received`` (bytes from the client
and to it), ``connections``, and ``exchanges``: how often a client spoke after the server had (that's the number of
requests, if none is sent before the answer to the one before it).

Each direction of a connection has two threads: one reads and notes the time, one waits until that time plus the
delay has come and writes. TCP itself (slow start, loss) isn't part of the picture.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

CHUNK_SIZE = 256 * 1024
MOST_CHUNKS = 4096
"""How many chunks may be under way at most: a bound for the memory, far above what a fast wire holds."""


class Relay:
    """Listens on one port of loopback and passes connections on to another one."""

    def __init__(self, listen_port: int, server_port: int, delay: float):
        self.listener = socket.create_server(("127.0.0.1", listen_port), backlog=128)
        self.server_port = server_port
        self.delay = delay
        self.connections: list[Connection] = []

    def serve(self) -> None:
        """Accept connections for ever."""
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.server_port))
            self.connections.append(Connection(client, server, self.delay))

    def count(self) -> dict[str, int]:
        """What all connections have seen."""
        return {
            "connections": len(self.connections),
            "sent": sum(connection.payload["up"] for connection in self.connections),
            "received": sum(connection.payload["down"] for connection in self.connections),
            "exchanges": sum(connection.exchanges for connection in self.connections),
        }


class Connection:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket, delay: float):
        self.payload = {"up": 0, "down": 0}
        self.exchanges = 0
        self.last_direction = "down"
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handshake = time.monotonic() + 2 * delay
        self._start("up", client, server, delay, handshake)
        self._start("down", server, client, delay, handshake)

    def _start(self, direction: str, source: socket.socket, target: socket.socket, delay: float, begin: float) -> None:
        wire: queue.Queue[tuple[float, bytes]] = queue.Queue(MOST_CHUNKS)
        for work, arguments in (
            (self._read, (direction, source, wire, delay, begin)),
            (self._write, (target, wire)),
        ):
            threading.Thread(target=work, args=arguments, daemon=True).start()

    def _read(self, direction: str, sock: socket.socket, wire: Any, delay: float, begin: float) -> None:
        while True:
            try:
                chunk = sock.recv(CHUNK_SIZE)
            except OSError:
                chunk = b""
            if chunk and direction != self.last_direction:
                self.exchanges += direction == "up"
                self.last_direction = direction
            self.payload[direction] += len(chunk)
            wire.put((max(time.monotonic(), begin) + delay, chunk))
            if not chunk:
                return

    def _write(self, sock: socket.socket, wire: Any) -> None:
        try:
            while True:
                due, chunk = wire.get()
                time.sleep(max(0, due - time.monotonic()))
                if not chunk:
                    return sock.shutdown(socket.SHUT_WR)
                sock.sendall(chunk)
        except OSError:
            # The reader of this direction must not wait for us when the other side has left.
            while wire.get()[1]:
                pass


def main() -> None:
    """Pass on until SIGTERM arrives."""
    listen_port, server_port, delay = sys.argv[1:]
    relay = Relay(int(listen_port), int(server_port), float(delay))

    def finish(signum: int, frame: Any) -> None:
        print(json.dumps(relay.count()), flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, finish)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    relay.serve()


if __name__ == "__main__":
    main()
