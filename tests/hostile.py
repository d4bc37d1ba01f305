"""
What can a server do to a client?

``python -m tests.hostile BEHAVIOUR [--size=BYTES] [--elsewhere=PORT]`` is a server on loopback that pretends to have a
file of so many zero bytes, and that does one thing wrong. It prints its port, and then a line for each request: the
request line, and the header ``Authorization`` if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, quote, urlsplit

import xxhash

FEATURES = ["answer", "digest", "extents", "resume", "sync"]
BEHAVIOURS: dict[str, Callable[[Handler], None]] = {}
KILOBYTE = b"0" * 1024
CONTROL_CHARACTERS = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nfake: line\x00\u202e"


class Handler(BaseHTTPRequestHandler):
    """Answers honestly, where the behaviour (named ``ENDPOINT-WHAT``) has nothing else in mind."""

    protocol_version = "HTTP/1.1"
    size = 0
    behaviour = ""
    elsewhere = 0

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        """Any request."""
        print(self.requestline, self.headers.get("Authorization", ""), flush=True)
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.endpoint = url.path.strip("/")
        kind = "write" if self.command == "POST" and self.endpoint == "blocks" else self.endpoint
        try:
            if self.behaviour.partition("-")[0] in (kind, "all"):
                BEHAVIOURS[self.behaviour](self)
            else:
                getattr(self, f"send_{kind}")()
        except OSError:  # the client has had enough
            self.close_connection = True

    do_POST = do_GET

    def start(self, *headers: str, status: str = "200 OK") -> None:
        """Send a status line and headers, and say to which request they belong."""
        digest = "".join(line.partition(": ")[2] for line in headers if line.startswith("Pdiffcopy-Digest: "))
        text = f"{self.headers.get('Pdiffcopy-Request', '')} {status.partition(' ')[0]} {digest}"
        answer = xxhash.xxh3_128_hexdigest(text.encode())
        lines = [f"HTTP/1.1 {status}", *headers, f"Pdiffcopy-Answer: {answer}", "", ""]
        self.wfile.write("\r\n".join(lines).encode("latin-1", "replace"))

    def send(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        """Send a whole response."""
        self.start(f"Content-Length: {len(body)}", *headers, status=status)
        self.wfile.write(body)

    def send_chunks(self, *chunks: bytes) -> None:
        """Send a body of unknown length."""
        self.start("Transfer-Encoding: chunked")
        for chunk in chunks:
            self.send_chunk(chunk)
        self.wfile.write(b"0\r\n\r\n")

    def send_chunk(self, chunk: bytes) -> None:
        """Send a piece of such a body."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def send_for_ever(self, chunk: bytes) -> None:
        """Send until the client goes away."""
        while True:
            self.wfile.write(chunk)

    def send_info(self, **members: object) -> None:
        """The honest answer to ``/info``, or a changed one."""
        server = {"version": "2.0.0", "features": FEATURES, "methods": ["sha1"], "writable": True}
        document = {"size": self.size, "mtime_ns": 1, "file_id": "1:1", "resizable": True, "server": server, **members}
        self.send(json.dumps(document).encode())

    def lines(self) -> list[bytes]:
        """The honest hash lines."""
        step, start = int(self.query["block_size"]), int(self.query.get("offset", 0))
        return [
            b"%d\t%b\n" % (offset, hashlib.sha1(bytes(min(step, self.size - offset))).hexdigest().encode())
            for offset in range(start, self.size, step)
        ]

    def send_hashes(self) -> None:
        """The honest answer to ``/hashes``."""
        self.send_chunks(*check(self.lines()))

    def wanted(self) -> int:
        """How many bytes were asked for."""
        if "extents" in self.query:
            return sum(int(item.partition(":")[2]) for item in self.query["extents"].split(","))
        return int(self.query["size"])

    def send_blocks(self) -> None:
        """The honest answer to ``GET /blocks``."""
        body = bytes(self.wanted())
        self.send(body, f"Pdiffcopy-Digest: {xxhash.xxh3_128_hexdigest(body)}")

    def take_body(self) -> None:
        """Receive what is uploaded, and forget it."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_write(self) -> None:
        """The honest answer to ``POST /blocks``."""
        self.take_body()
        self.send(b"{}")

    def send_resize(self) -> None:
        """The honest answer to ``/resize``."""
        self.send(b"{}")

    def send_sync(self) -> None:
        """The honest answer to ``/sync``."""
        self.send(b"done\n")


def check(lines: list[bytes]) -> list[bytes]:
    """A hash stream with its digest and its end."""
    return [*lines, b"=%b\n" % xxhash.xxh3_128_hexdigest(b"".join(lines)).encode(), b"done\n"]


def behaviour(function: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """Add a behaviour under the name of its function."""
    BEHAVIOURS[function.__name__.replace("_", "-")] = function
    return function


def _add_lines(name: str, change: Callable[[list[bytes], Handler], list[bytes]]) -> None:
    BEHAVIOURS[f"hashes-{name}"] = lambda handler: handler.send_chunks(*check(change(handler.lines(), handler)))


# What can be wrong with a finite hash stream.
_SHA1 = b"\tda39a3ee5e6b4b0d3255bfef95601890afd80709\n"
_add_lines("short", lambda lines, _: lines[:-1])
_add_lines("repeating", lambda lines, _: [*lines[:2], *lines[1:]])
_add_lines("out-of-range", lambda lines, handler: [*lines[:-1], b"%d%b" % (handler.size + 4096, _SHA1)])
_add_lines("huge-offset", lambda lines, _: [b"9" * 30 + _SHA1, *lines[1:]])
_add_lines("unaligned", lambda lines, _: [lines[0], b"4097" + _SHA1, *lines[2:]])
_add_lines("negative", lambda lines, _: [b"-4096" + _SHA1, *lines[1:]])
_add_lines("malformed", lambda lines, _: [lines[0], b"\xff\xfe\x1b[2J;\n", *lines[2:]])
_add_lines("no-digest", lambda lines, _: [lines[0], b"4096\t\n", *lines[2:]])
_add_lines("not-hexadecimal", lambda lines, _: [lines[0], b"4096\t" + b"z" * 40 + b"\n", *lines[2:]])
_add_lines("mixed-lengths", lambda lines, _: [lines[0], b"4096\tda39\n", *lines[2:]])
_add_lines("cut", lambda lines, _: [*lines[:-1], lines[-1][:-9]])
_add_lines("empty-line", lambda lines, _: [lines[0], b"\n", *lines[1:]])


@behaviour
def hashes_endless(handler: Handler) -> None:
    """Lines for ever, far behind the end of the file."""
    handler.start("Transfer-Encoding: chunked")
    for i in count():
        handler.send_chunk(b"".join(b"%d%b" % (offset * 4096, _SHA1) for offset in range(i * 1000, (i + 1) * 1000)))


@behaviour
def hashes_endless_repetition(handler: Handler) -> None:
    """The first line for ever."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(handler.lines()[0] * 1000)


@behaviour
def hashes_endless_line(handler: Handler) -> None:
    """A line that has no end."""
    handler.start("Transfer-Encoding: chunked")
    handler.send_chunk(b"0\t")
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def hashes_stall(handler: Handler) -> None:
    """A part of the lines, and then nothing."""
    handler.start("Transfer-Encoding: chunked")
    if "offset" not in handler.query:
        handler.send_chunk(b"".join(handler.lines()[:2]))
    handler.rfile.read(1)


@behaviour
def hashes_unchecked(handler: Handler) -> None:
    """Lines without the digest that was asked for."""
    handler.send_chunks(*handler.lines())


@behaviour
def hashes_wrong_check(handler: Handler) -> None:
    """Lines with the digest of other ones."""
    handler.send_chunks(*handler.lines(), *check([b"0\taa\n"])[1:])


@behaviour
def hashes_endless_heartbeat(handler: Handler) -> None:
    """Signs of life for ever."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(b"\n" * 1024)


@behaviour
def list_endless(handler: Handler) -> None:
    """A folder that has no last file."""
    handler.start("Transfer-Encoding: chunked")
    handler.send_chunk(b"".join(check([b"folder\t0\t0\t\n"])[:-1]))
    for i in count():
        handler.send_chunk(b"".join(check([b"file\t0\t0\t%015d\n" % (i * 1000 + j) for j in range(1000)])[:-1]))


@behaviour
def list_endless_name(handler: Handler) -> None:
    """A line that has no end."""
    handler.start("Transfer-Encoding: chunked")
    handler.send_chunk(b"folder\t0\t0\t")
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def list_unchecked(handler: Handler) -> None:
    """Lines without end that have no digest."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(b"folder\t0\t0\t\n" * 1000)


@behaviour
def list_endless_heartbeat(handler: Handler) -> None:
    """Signs of life for ever."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(b"\n" * 1024)


@behaviour
def list_way_out(handler: Handler) -> None:
    """A name that leads out of the folder."""
    handler.send_chunks(*check([b"folder\t0\t0\t\n", b"file\t0\t0\t../evil\n"]))


@behaviour
def list_control_characters(handler: Handler) -> None:
    """A name that wants to draw on the terminal, and can't be one."""
    name = quote(CONTROL_CHARACTERS.encode()).encode()
    handler.send_chunks(*check([b"folder\t0\t0\t\n", b"file\t0\t0\t" + name + b"\n"]))


@behaviour
def all_answer_to_another_request(handler: Handler) -> None:
    """What somebody else asked for."""
    handler.headers.replace_header("Pdiffcopy-Request", "0" * 32)
    all_honest(handler)


@behaviour
def hashes_gzip(handler: Handler) -> None:
    """An encoding that nobody asked for."""
    handler.send(b"\x1f\x8b\x08\x00" + bytes(100), "Content-Encoding: gzip")


@behaviour
def blocks_short(handler: Handler) -> None:
    """Fewer bytes than asked for, and honest about it."""
    handler.send(bytes(handler.wanted() - 1))


@behaviour
def blocks_long(handler: Handler) -> None:
    """More bytes than asked for."""
    handler.send(b"x" * (handler.wanted() + 1))


@behaviour
def blocks_endless(handler: Handler) -> None:
    """Bytes for ever."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def blocks_more_than_announced(handler: Handler) -> None:
    """The announced bytes, and then more of them."""
    handler.start(f"Content-Length: {handler.wanted()}")
    handler.send_for_ever(KILOBYTE)


@behaviour
def blocks_negative_length(handler: Handler) -> None:
    """A length that can't be."""
    handler.start("Content-Length: -1")
    handler.send_for_ever(KILOBYTE)


@behaviour
def blocks_garbage_length(handler: Handler) -> None:
    """A length that is no number."""
    handler.start("Content-Length: many")
    handler.send_for_ever(KILOBYTE)


@behaviour
def blocks_garbage_digest(handler: Handler) -> None:
    """A digest that can't be one."""
    handler.send(bytes(handler.wanted()), "Pdiffcopy-Digest: \x1b[2J\xff-nonsense")


@behaviour
def blocks_wrong_digest(handler: Handler) -> None:
    """A digest of something else."""
    handler.send(bytes(handler.wanted()), f"Pdiffcopy-Digest: {'0' * 32}")


@behaviour
def blocks_no_digest(handler: Handler) -> None:
    """No digest, although the server says that it states one."""
    handler.send(bytes(handler.wanted()))


@behaviour
def blocks_wrong_data(handler: Handler) -> None:
    """Something else than what the digest is of."""
    handler.send(b"x" * handler.wanted(), f"Pdiffcopy-Digest: {xxhash.xxh3_128_hexdigest(bytes(handler.wanted()))}")


@behaviour
def write_endless_answer(handler: Handler) -> None:
    """An answer without end."""
    handler.take_body()
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def write_endless_chunk_size(handler: Handler) -> None:
    """An answer that doesn't get past the size of its first chunk."""
    handler.take_body()
    handler.start("Transfer-Encoding: chunked")
    handler.send_for_ever(KILOBYTE)


@behaviour
def resize_endless_answer(handler: Handler) -> None:
    """An answer without end."""
    handler.start("Connection: close")
    handler.send_for_ever(KILOBYTE)


@behaviour
def sync_endless_heartbeat(handler: Handler) -> None:
    """More signs of life than anybody wants."""
    handler.start("Transfer-Encoding: chunked")
    while True:
        handler.send_chunk(b"\n" * 1024)


@behaviour
def sync_silence(handler: Handler) -> None:
    """An answer that doesn't say whether it's done."""
    handler.send(b"\n\n")


@behaviour
def info_huge(handler: Handler) -> None:
    """A document without end."""
    handler.start("Transfer-Encoding: chunked")
    handler.send_chunk(b'{"size": 1, "server": {}, "x": "')
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def info_deep(handler: Handler) -> None:
    """Brackets that nobody can count."""
    handler.send(b"[" * 500_000)


@behaviour
def info_no_json(handler: Handler) -> None:
    """Another service."""
    handler.send(b"<html>It works!</html>")


@behaviour
def info_list(handler: Handler) -> None:
    """JSON, but no object."""
    handler.send(b"[1, 2]")


for _name, _value in (
    ("negative", -1),
    ("fraction", 1.5),
    ("text", "4096"),
    ("true", True),
    ("missing", None),
    ("huge", 2**80),
    ("digits", 10**4000),
):
    BEHAVIOURS[f"info-size-{_name}"] = lambda handler, value=_value: handler.send_info(size=value)  # type: ignore[misc]


@behaviour
def info_size_impossible(handler: Handler) -> None:
    """A size that a file system can't have."""
    handler.send_info(size=2**63 - 1)


@behaviour
def info_garbage_members(handler: Handler) -> None:
    """Values of the wrong type wherever there's room for them."""
    handler.send_info(server={"features": {"a": 1}, "methods": 7, "writable": "yes", "version": [1]})


@behaviour
def all_endless_header(handler: Handler) -> None:
    """A header line without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    handler.send_for_ever(KILOBYTE)


@behaviour
def all_endless_headers(handler: Handler) -> None:
    """Header lines without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.send_for_ever(b"X: y\r\n")


@behaviour
def all_header_without_colon(handler: Handler) -> None:
    """A line that is no header, in front of an error."""
    handler.start("Content-Length: 0", "X-Secret\x1b[2J", status="500 Internal Server Error")


@behaviour
def all_endless_status(handler: Handler) -> None:
    """A status line without end."""
    handler.send_for_ever(KILOBYTE)


@behaviour
def all_endless_continue(handler: Handler) -> None:
    """Go on, go on, go on."""
    handler.send_for_ever(b"HTTP/1.1 100 Continue\r\n\r\n")


@behaviour
def all_endless_chunk_size(handler: Handler) -> None:
    """The size of a chunk without end."""
    handler.start("Transfer-Encoding: chunked")
    handler.send_for_ever(KILOBYTE)


@behaviour
def all_negative_chunk_size(handler: Handler) -> None:
    """A chunk with fewer than no bytes."""
    handler.start("Transfer-Encoding: chunked")
    handler.wfile.write(b"-5\r\nhello\r\n0\r\n\r\n")


@behaviour
def all_endless_error(handler: Handler) -> None:
    """An error that isn't done explaining."""
    handler.start("Transfer-Encoding: chunked", status="500 Internal Server Error")
    while True:
        handler.send_chunk(KILOBYTE)


@behaviour
def all_garbage(handler: Handler) -> None:
    """Another protocol."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\x00\x01\x02")
    handler.close_connection = True


@behaviour
def all_silence(handler: Handler) -> None:
    """Nothing at all."""
    handler.rfile.read(1)


@behaviour
def all_goodbye(handler: Handler) -> None:
    """An end without an answer."""
    handler.close_connection = True


@behaviour
def all_status_1000(handler: Handler) -> None:
    """A status that isn't one."""
    handler.send(b"", status="1000 \x1b[2J")


@behaviour
def all_error(handler: Handler) -> None:
    """Something of the server's own is broken, for good."""
    handler.send(b"{}", status="500 Internal Server Error")


@behaviour
def all_control_characters(handler: Handler) -> None:
    """An error that wants to draw on the terminal."""
    problem = json.dumps({"detail": f"No{CONTROL_CHARACTERS}!", "title": CONTROL_CHARACTERS}).encode()
    handler.send(problem, "Content-Type: application/problem+json", status="400 Bad\x1b[2J")


@behaviour
def all_transient_control_characters(handler: Handler) -> None:
    """An error that's retried (and logged) and wants to draw on the terminal."""
    problem = json.dumps({"detail": f"No{CONTROL_CHARACTERS}!"}).encode()
    handler.send(problem, status="503 Bad\x1b[2J")


@behaviour
def all_redirect(handler: Handler) -> None:
    """Somebody else is said to have the answer."""
    handler.send(b"", f"Location: http://127.0.0.1:{handler.elsewhere}{handler.path}", status="307 Temporary Redirect")


@behaviour
def all_honest(handler: Handler) -> None:
    """Nothing wrong."""
    kind = "write" if handler.command == "POST" and handler.endpoint == "blocks" else handler.endpoint
    getattr(handler, f"send_{kind}")()


def main() -> None:
    """The command line interface."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviour", choices=sorted(BEHAVIOURS))
    parser.add_argument("--size", type=int, default=65536, help="the size of the file that the server pretends to have")
    parser.add_argument("--elsewhere", type=int, default=0, help="the port that redirects lead to")
    options = parser.parse_args()
    Handler.behaviour, Handler.size, Handler.elsewhere = options.behaviour, options.size, options.elsewhere
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


class HostileProcess:
    """A hostile server in a process of its own (a context manager)."""

    def __init__(self, behaviour: str, size: int = 65536, elsewhere: int = 0):
        """See :func:`main` for the parameters."""
        command = [sys.executable, "-m", "tests.hostile", behaviour, f"--size={size}", f"--elsewhere={elsewhere}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())  # type: ignore[union-attr]

    def __enter__(self) -> HostileProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]

    @property
    def location(self) -> str:
        """The location of the file that the server pretends to have."""
        return f"127.0.0.1:{self.port}/file"

    def stop(self) -> list[str]:
        """End the server, and return a line for each request."""
        self.process.kill()
        return self.process.stdout.read().splitlines()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
