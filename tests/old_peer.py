"""
How does a peer of version 1.0.1 behave?

Run as ``python -m tests.old_peer PORT [FAULT]`` this is a server that knows the frozen requests (docs/design.rst) and
nothing else: ``/info`` tells only the size, parameters that were added later are ignored, the connection is closed
after each response, and the hash lines come in any order. The functions at the end send requests in the old form.

A FAULT lets it flip one byte: ``corrupt-once`` in the first answer to ``GET /blocks``, ``corrupt-always`` in each of
them, ``corrupt-writes`` in what it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit


class OldHandler(BaseHTTPRequestHandler):
    """Answers the five frozen requests (the base class speaks HTTP/1.0, without keep-alive)."""

    fault = ""

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, verb: str) -> None:
        parts = urlsplit(self.path)
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
        view = getattr(self, f"{verb.lower()}_{parts.path[1:]}", None)
        if not view:
            self.respond(404, b"<h1>Not Found</h1>", "text/html")
            return
        try:
            view(parameters)
        except FileNotFoundError:
            self.respond(404, b"<h1>Not Found</h1>", "text/html")

    def respond(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def get_info(self, parameters: dict) -> None:
        size = os.stat(parameters["filename"]).st_size
        self.respond(200, json.dumps({"size": size}).encode(), "application/json")

    def get_hashes(self, parameters: dict) -> None:
        block_size = int(parameters["block_size"])
        int(parameters["concurrency"])
        with open(parameters["filename"], "rb") as handle:
            blocks = list(iter(lambda: handle.read(block_size), b""))
        digests = [hashlib.new(parameters["method"], block).hexdigest() for block in blocks]
        lines = [f"{index * block_size}\t{digest}\n" for index, digest in enumerate(digests)]
        random.Random(len(lines)).shuffle(lines)
        # The length of the stream isn't known in advance: the end of the connection is its end.
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        for line in lines:
            self.wfile.write(line.encode())

    def get_blocks(self, parameters: dict) -> None:
        with open(parameters["filename"], "rb") as handle:
            handle.seek(int(parameters["offset"]))
            data = bytearray(handle.read(int(parameters["size"])))
        if data and self.fault in ("corrupt-once", "corrupt-always"):
            data[len(data) // 2] ^= 1
            if self.fault == "corrupt-once":
                OldHandler.fault = ""
        self.respond(200, bytes(data))

    def post_blocks(self, parameters: dict) -> None:
        data = bytearray(self.rfile.read(int(self.headers["Content-Length"])))
        if data and self.fault == "corrupt-writes":
            data[len(data) // 2] ^= 1
        with open(parameters["filename"], "r+b") as handle:
            handle.seek(int(parameters["offset"]))
            handle.write(data)
        self.respond(200, b"")

    def post_resize(self, parameters: dict) -> None:
        filename = parameters["filename"]
        os.makedirs(os.path.dirname(filename), exist_ok=True)
        with open(filename, "ab") as handle:
            handle.truncate(int(parameters["size"]))
        self.respond(200, b"")


class OldServer(HTTPServer):
    """One connection after the other, so that a fault happens as often as it says."""

    request_queue_size = 64


def request(port: int, verb: str, endpoint: str, body: bytes | None = None, **parameters) -> tuple[int, bytes]:
    """Send a request as an old client does, on a connection of its own. Returns the status and the body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(verb, f"/{endpoint}?{urlencode(parameters)}", body, {"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def download(port: int, source: str, target: str, block_size: int, method: str = "sha1") -> int:
    """What an old client does to bring a local target into line. Returns the number of blocks that differed."""
    size = get_size(port, source)
    with open(target, "ab") as handle:
        handle.truncate(size)
    theirs = get_hashes(port, source, block_size, method)
    changed = 0
    with open(target, "r+b") as handle:
        for offset, digest in theirs.items():
            handle.seek(offset)
            if hashlib.new(method, handle.read(block_size)).hexdigest() != digest:
                status, data = request(port, "GET", "blocks", filename=source, offset=offset, size=block_size)
                assert status == 200, data
                handle.seek(offset)
                handle.write(data)
                changed += 1
    return changed


def upload(port: int, source: str, target: str, block_size: int, method: str = "sha1") -> int:
    """What an old client does to bring a remote target into line. Returns the number of blocks that differed."""
    size = os.stat(source).st_size
    status, _ = request(port, "GET", "info", filename=target)
    theirs = get_hashes(port, target, block_size, method) if status == 200 else {}
    status, body = request(port, "POST", "resize", filename=target, size=size)
    assert status == 200, body
    changed = 0
    with open(source, "rb") as handle:
        for offset in range(0, size, block_size):
            data = handle.read(block_size)
            if hashlib.new(method, data).hexdigest() != theirs.get(offset):
                status, body = request(port, "POST", "blocks", data, filename=target, offset=offset)
                assert status == 200, body
                changed += 1
    return changed


def get_size(port: int, filename: str) -> int:
    """The size of a remote file."""
    status, body = request(port, "GET", "info", filename=filename)
    assert status == 200, body
    return json.loads(body)["size"]


def get_hashes(port: int, filename: str, block_size: int, method: str) -> dict[int, str]:
    """The hashes of a remote file by offset."""
    parameters = {"filename": filename, "block_size": block_size, "method": method, "concurrency": 2}
    status, body = request(port, "GET", "hashes", **parameters)
    assert status == 200, body
    lines = [line.split("\t") for line in body.decode().splitlines()]
    assert len({offset for offset, _ in lines}) == len(lines)
    return {int(offset): digest for offset, digest in lines}


if __name__ == "__main__":
    OldHandler.fault = "".join(sys.argv[2:])
    OldServer(("127.0.0.1", int(sys.argv[1])), OldHandler).serve_forever()
