"""
What becomes of answers of a server that are wrong, late or missing.

(That the right ones are understood is shown in :mod:`tests.test_replica`.)
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import tracemalloc
from contextlib import contextmanager

import pytest
import xxhash

from pdiffcopy.address import Address, parse_location
from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import MAX_OFFSET, Extent
from pdiffcopy.client import Network, http
from pdiffcopy.client.http import HttpServer
from pdiffcopy.client.remote import RemoteReplica
from pdiffcopy.exceptions import (
    AuthenticationError,
    DigestMismatchError,
    DiskFullError,
    FileMissingError,
    ForbiddenError,
    ProgramError,
    ProtocolError,
    RemoteError,
    ReplacedError,
    TransientError,
)
from pdiffcopy.features import FEATURE_ANSWER, FEATURES
from pdiffcopy.files.openfile import OpenFile
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading
from pdiffcopy.streams import parse_checked, parse_hash
from tests.support import find_free_port

FILE = "/the file"
FILE_URL = r"http://127\.0\.0\.1:[0-9]+/the%20file"


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """How long is waited between attempts is a matter of :mod:`pdiffcopy.client.retry`."""
    monkeypatch.setattr("pdiffcopy.client.retry.FIRST_DELAY", 0.001)


def make_replica(address: Address, **network) -> RemoteReplica:
    return RemoteReplica(HttpServer(address, Network(**network)), address.filename)


def digests_of(stream) -> list[str]:
    return [digest for stripe in stream for _, digest in stripe]


def answer(status: int = 200, body: bytes = b"", length: int | None = None, **headers: str) -> bytes:
    """An HTTP response after which the connection is closed."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def describe(size: int = 10, **server) -> bytes:
    """An answer to ``/info`` (of a server that doesn't say to which request it belongs, since it doesn't look)."""
    features = sorted(FEATURES - {FEATURE_ANSWER})
    return answer(body=json.dumps({"size": size, "server": {"features": features, **server}}).encode())


def check(*lines: bytes) -> bytes:
    """A hash stream with its digest and its end."""
    text = b"".join(lines)
    return text + b"=%b\ndone\n" % xxhash.xxh3_128_hexdigest(text).encode()


def problem(status: int, detail: str) -> bytes:
    """A problem as RFC 9457 has it."""
    return answer(status, json.dumps({"status": status, "detail": detail}).encode())


@contextmanager
def canned(*answers: bytes | None, **network):
    """
    A replica behind a server that gives these answers, one a connection, whatever it's asked.

    None is an answer that never comes. Yields the replica and the list of the requests that arrived.
    """
    requests: list[bytes] = []
    done = threading.Event()

    def serve() -> None:
        for canned_answer in answers:
            with listener.accept()[0] as connection:
                connection.settimeout(5)
                requests.append(read_request(connection))
                if canned_answer is None:
                    done.wait(10)
                else:
                    connection.sendall(canned_answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        options = {"retries": 0, "timeout": 5, **network}
        replica = make_replica(Address(FILE, "127.0.0.1", listener.getsockname()[1]), **options)
        try:
            yield replica, requests
        finally:
            done.set()
            thread.join()
            replica.server.close()


def read_request(connection: socket.socket) -> bytes:
    """The head and the body of a request."""
    request = b""
    while b"\r\n\r\n" not in request and (chunk := connection.recv(65536)):
        request += chunk
    head, _, body = request.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length and (chunk := connection.recv(65536)):
        body += chunk
        request += chunk
    return request


def read(replica: RemoteReplica, *extents: Extent, state_digest: bool = False) -> bytes:
    with replica.read(extents, state_digest) as reading:
        return b"".join(map(bytes, reading.chunks))


# What is sent {{{1


def test_local_file_is_sent_without_being_read(tmp_path, monkeypatch):
    """The operating system moves the bytes from the file to the connection."""
    (tmp_path / "source").write_bytes(b"0123456789")
    monkeypatch.delattr(OpenFile, "chunks")
    source, extents = LocalReplica(str(tmp_path / "source")), [Extent(7, 3), Extent(0, 2)]
    with canned(answer()) as (replica, requests), source.read(extents, state_digest=False) as reading:
        replica.write(extents, reading)
    assert b"Content-Length: 5\r\n" in requests[0] and requests[0].endswith(b"\r\n\r\n78901")


def test_requests_are_spelled_the_frozen_way():
    """One extent is an offset and a size, as an old server knows it."""
    with canned(answer(body=b"0123456789"), answer(), answer()) as (replica, requests):
        assert read(replica, Extent(5, 10)) == b"0123456789"
        replica.write([Extent(7, 4)], Reading([b"da", b"ta"]))
        replica.resize(9)
    first, second, third = requests
    assert first.startswith(b"GET /blocks?filename=%2Fthe+file&offset=5&size=10&nonce=")
    assert second.startswith(b"POST /blocks?filename=%2Fthe+file&offset=7&nonce=")
    assert b"Content-Length: 4\r\n" in second and second.endswith(b"\r\n\r\ndata")
    assert b"chunked" not in second
    assert third.startswith(b"POST /resize?filename=%2Fthe+file&size=9&nonce=")
    assert b"Pdiffcopy-Digest" not in second


def test_token_is_in_the_header_and_nowhere_else():
    """Not in a URL, which ends up in logs."""
    with canned(describe(), token="s3cret") as (replica, requests):
        replica.info()
    head, _, _ = requests[0].partition(b"\r\n")
    assert b"s3cret" not in head
    assert b"\r\nAuthorization: Bearer s3cret\r\n" in requests[0]


def test_environment_has_no_say(monkeypatch):
    """A proxy or a password file that's meant for browsers doesn't redirect copies."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{find_free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with canned(describe()) as (replica, _):
        assert replica.info()[0].size == 10


@pytest.mark.parametrize("location", ["[fe80::1%30]:8/x", "http://[fe80::1%2530]:8/x", "https://[fe80::1%30]:8/x"])
def test_zone_of_an_address_stays_what_it_is(monkeypatch, location):
    """%30 isn't a zero at the end of another address."""
    hosts = []

    def resolve(host, *args, **options):
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(RemoteError):
        make_replica(parse_location(location), retries=0).info()
    assert set(hosts) == {"fe80::1%30"}


# Answers that say no {{{1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RemoteError), (401, AuthenticationError), (403, ForbiddenError), (404, FileMissingError),
     (409, DigestMismatchError), (413, RemoteError), (416, RemoteError), (418, RemoteError), (500, RemoteError),
     (501, RemoteError), (502, TransientError), (503, TransientError), (504, TransientError), (507, DiskFullError)],
)  # fmt: skip
def test_status_becomes_the_most_specific_error(status, kind):
    """With the reason that the server gave, and the URL that it's about."""
    with canned(problem(status, "because of this")) as (replica, _), pytest.raises(kind) as info:
        replica.resize(1)
    assert type(info.value) is kind
    assert "because of this" in str(info.value)
    assert replica.label in str(info.value)
    assert info.value.status == status


@pytest.mark.parametrize(
    "body",
    [b"", b"<h1>Not yours</h1>", b"{}", b"[]", b'{"detail": 5}', b"\xff\xfe", b"[" * 100000, b'{"detail": ["x"]}'],
)
def test_error_without_a_reason_is_named_by_its_status(body):
    """The body of a proxy isn't shown, and can't do harm."""
    with canned(answer(403, body)) as (replica, _), pytest.raises(ForbiddenError, match="Forbidden"):
        replica.resize(1)
    with canned(answer(799, body)) as (replica, _), pytest.raises(RemoteError, match="HTTP status 799"):
        replica.resize(1)


def test_server_that_may_be_another_program_is_called_that():
    """Whoever mistypes a port learns more than what a web server says to that. What has told its features is known."""
    with canned(answer(404)) as (replica, _), pytest.raises(ProgramError, match="isn't pdiffcopy that answers there"):
        replica.resize(1)
    with canned(describe(), answer(404)) as (replica, _), pytest.raises(ProgramError) as info:
        replica.info()
        replica.resize(1)
    assert "isn't pdiffcopy" not in str(info.value)
    with canned(b"SSH-2.0-x\r\n") as (replica, _), pytest.raises(TransientError, match="speak http .'SSH-2.0-x'"):
        replica.info()


def test_redirect_says_where_it_leads():
    """Without what was asked for."""
    moved = answer(301, Location="https://db2/info?filename=x")
    with canned(moved) as (replica, _), pytest.raises(RemoteError) as info:
        replica.info()
    assert "it redirects to https://db2/info (or" in str(info.value)


def test_reason_of_a_server_is_escaped():
    """What a server says can't move the cursor or forge a line."""
    with canned(problem(403, "a\n\x1b[2Jb")) as (replica, _), pytest.raises(ForbiddenError) as info:
        replica.resize(1)
    assert "\n" not in str(info.value) and "\x1b" not in str(info.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status):
    """Nobody gets our bytes or our token but the server that was named."""
    with canned(answer(status, Location="http://127.0.0.1:1/x"), token="x") as (replica, requests):
        with pytest.raises(RemoteError):
            replica.info()
    assert len(requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_body_of_a_redirect_is_not_read(status):
    """It may have no end, or unpack to more than there is room for."""
    bomb = answer(status, gzip.compress(bytes(64 * 1024**2)), Location="/x", Content_Encoding="gzip")
    tracemalloc.start()
    try:
        with canned(bomb) as (replica, _), pytest.raises(RemoteError, match="it redirects to /x"):
            replica.info()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024**2


def test_cookies_are_not_kept():
    """A server could have them sent back to it without an end."""
    told = describe().replace(b"\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n", 1)
    with canned(told, told) as (replica, requests):
        replica.info()
        replica.info()
    assert b"cookie" not in requests[1].lower()


# Answers that are none {{{1


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"5", b'"x"', b"{}", b'{"size": "5"}', b'{"size": -1}', b'{"size": 1.5}', b'{"size": null}',
     b'{"size": true}', b'{"size": 9223372036854775808}', b'{"size": 5, "mtime_ns": "x"}', b'{"size": 5, "server": []}',
     b"<html>", b"\xff", b"[" * 100000],
)  # fmt: skip
def test_nonsense_about_a_file_is_refused(body):
    """What isn't the answer of a pdiffcopy server isn't believed."""
    with canned(answer(body=body)) as (replica, _), pytest.raises(ProtocolError):
        replica.info()


def test_endless_document_is_refused():
    """A server can't fill our memory with its answer to a small question."""
    with canned(answer(body=b" " * (2 * 1024 * 1024))) as (replica, _), pytest.raises(ProtocolError, match="document"):
        replica.info()


@pytest.mark.parametrize("length", [0, 9, 11, 10**12])
def test_wrong_number_of_bytes_is_refused(length):
    """It's the announced length that counts, before anything is written anywhere."""
    response = answer(body=b"x" * min(length, 20), length=length)
    with canned(response) as (replica, _), pytest.raises(ProtocolError, match="instead of 10"):
        read(replica, Extent(0, 10))


def test_bytes_of_unknown_number_are_refused():
    """A stream without a length may be cut anywhere, and nobody would notice."""
    chunked = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n"
    with canned(chunked) as (replica, _), pytest.raises(ProtocolError, match="unknown number"):
        read(replica, Extent(0, 10))


def test_bytes_that_end_early_are_transient():
    """The connection broke: it's worth another try."""
    with canned(answer(body=b"01234", length=10)) as (replica, _), pytest.raises(TransientError):
        read(replica, Extent(0, 10))


def test_malformed_digest_is_refused():
    """What the header carries has to be a digest."""
    with canned(answer(body=b"0123456789", Pdiffcopy_Digest="nonsense")) as (replica, _):
        with pytest.raises(ProtocolError, match=f"{FILE_URL}: .*hexadecimal"):
            read(replica, Extent(0, 10), state_digest=True)


@pytest.mark.parametrize(
    "lines",
    [b"", b"0\taa\n", b"0\taa\n0\taa\n", b"0\taa\n5\tbb", b"0\taa\n3\tbb\n", b"0\taa\n5\tbbbb\n", b"0 aa\n5 bb\n",
     b"0\taa\n-5\tbb\n", b"0\tzz\n5\tbb\n", b"\n\n", b"<html>\n", b"0\t" + b"a" * 5000, b"00\taa\n05\tbb\n"],
)  # fmt: skip
def test_impossible_hashes_are_refused(lines):
    """Missing, repeated, cut, misplaced, of different lengths, malformed: none of it is believed."""
    for features, body in ([], lines), (["resume"], lines), (["resume"], check(lines)):
        with canned(describe(features=features), answer(body=body)) as (replica, _):
            with pytest.raises((ProtocolError, TransientError), match=FILE_URL):
                digests_of(replica.hashes(5, "md5", 1, stop=10))
    assert list(parse_checked([check(b"0\taa\n", b"5\tbb\n")], parse_hash)) == [(0, "aa"), (5, "bb")]


def test_holes_take_as_many_requests_as_answers():
    """However large they are: a server tells how far it has come."""
    first = {"holes": [[5, 2**62], [2**62 + 10, 7]], "stop": 2**62 + 17}
    second = {"holes": [[2**63 - 9, 8]], "stop": MAX_OFFSET}
    answers = [answer(body=json.dumps(document).encode()) for document in (first, second)]
    with canned(*answers) as (replica, requests):
        found = list(replica.holes(0, MAX_OFFSET, 4096))
    assert found == [Extent(5, 2**62), Extent(2**62 + 10, 7), Extent(2**63 - 9, 8)]
    assert [f"&offset={start}&stop={MAX_OFFSET}&".encode() in request for start, request in
            zip((0, 2**62 + 17), requests, strict=True)] == [True, True]  # fmt: skip


def test_damaged_hashes_are_asked_for_again():
    """A digit that arrived wrong would have a block moved that is equal, or one left alone that isn't."""
    damaged = answer(body=check(b"0\taa\n", b"5\tbb\n").replace(b"bb", b"bc"))
    with canned(describe(), damaged, answer(body=check(b"0\taa\n", b"5\tbb\n")), retries=1) as (replica, requests):
        assert digests_of(replica.hashes(5, "md5", 1, stop=10)) == ["aa", "bb"]
    assert len(requests) == 3


def test_hashes_that_end_with_a_problem_tell_the_reason():
    """The status had been sent before the disk turned out to be bad."""
    body = b'0\taa\n\n{"status": 507, "detail": "no room"}\n'
    with canned(describe(), answer(body=body)) as (replica, _), pytest.raises(DiskFullError, match="no room"):
        digests_of(replica.hashes(5, "md5", 1, stop=10))


def test_answer_to_another_request_is_not_believed():
    """Errors included: it's asked again, on another connection."""
    features = sorted(FEATURES)
    told = answer(body=json.dumps({"size": 10, "server": {"features": features}}).encode())
    for foreign in (told, answer(body=b'{"size": 10}', Pdiffcopy_Answer="0" * 32), answer(404, Pdiffcopy_Answer="0")):
        with canned(foreign, describe(), retries=1) as (replica, requests):
            assert replica.info()[0].exists
        assert len(requests) == 2


@pytest.mark.parametrize("status", [200, 409])
def test_answer_without_a_signature(status):
    """Whoever has signed answers signs all of them. (Only an error may be from something in between.)"""
    with canned(answer(status, b'{"verified": true}')) as (replica, _):
        replica.server.peer = PeerInfo(features=FEATURES)
        with pytest.raises(TransientError if status == 200 else RemoteError) as info:
            replica.write([Extent(0, 1)], Reading([b"x"], "0" * 32))
        assert ("isn't that to the request" in str(info.value)) == (status == 200)


@pytest.mark.parametrize(
    "ask",
    [
        lambda replica: replica.claim("aa"),
        lambda replica: replica.release("aa"),
        lambda replica: replica.metadata(),
        lambda replica: list(replica.holes(0, 5, 1)),
        lambda replica: replica.commit("1:1", 5, "aa"),
        lambda replica: replica.write([Extent(0, 1)], Reading([b"x"], "0" * 32)),
    ],
    ids=["claim", "release", "metadata", "holes", "commit", "write"],
)
def test_answers_without_a_sense_name_the_server(ask):
    """Of several, it's the one to look at."""
    with canned(answer(body=b"[]")) as (replica, _):
        replica.server.peer = PeerInfo(features=FEATURES - {FEATURE_ANSWER})
        with pytest.raises(ProtocolError, match=FILE_URL):
            ask(replica)


def test_error_of_a_proxy_says_nothing_of_the_file():
    """A server that signs its answers hasn't said that there is no such file."""
    with canned(answer(404, b"<h1>Not here</h1>")) as (replica, _):
        replica.server.peer = PeerInfo(features=FEATURES)
        with pytest.raises(RemoteError, match="something in between says, and not pdiffcopy") as info:
            replica.pinned("1:1").info()
        assert type(info.value) is RemoteError


def test_hashes_of_an_old_server_may_go_on_after_what_is_compared():
    """The file is longer there, which is no mistake; more lines than its size allows are one."""
    with canned(describe(20, features=[]), answer(body=b"15\tdd\n5\tbb\n0\taa\n10\tcc\n")) as (replica, _):
        assert digests_of(replica.hashes(5, "md5", 1, stop=10)) == ["aa", "bb"]
    # It isn't waited for, however much there is to come.
    with canned(describe(20, features=[]), answer(body=b"0\taa\n5\tbb\n", length=100)) as (replica, _):
        assert digests_of(replica.hashes(5, "md5", 1, stop=10)) == ["aa", "bb"]
    lines = b"".join(b"%i\taa\n" % offset for offset in range(5, 100000, 5))
    with canned(describe(20, features=[]), answer(body=lines)) as (replica, _):
        with pytest.raises(ProtocolError, match="more hashes"):
            digests_of(replica.hashes(5, "md5", 1, stop=10))


def test_known_server_is_asked_for_hashes_only():
    """How large the file is needn't be known to end a stream where what is compared ends."""
    with canned(answer(body=check(b"0\taa\n", b"5\tbb\n"))) as (replica, requests):
        replica.server.peer = PeerInfo(features=FEATURES - {FEATURE_ANSWER})
        assert digests_of(replica.hashes(5, "md5", 1, stop=8)) == ["aa", "bb"]
    (request,) = requests
    assert b"&stop=8&" in request.splitlines()[0]


def listed(*lines: bytes) -> bytes:
    """A list of a folder: its own line, and these behind it."""
    return check(b"folder\t0\t0\t\n", *lines)


def names_of(replica: RemoteReplica, depth: int = 9) -> list[str]:
    replica.server.peer = PeerInfo(features=FEATURES - {FEATURE_ANSWER})
    return [entry.name for entry in replica.entries(depth)]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"done\n", b"\n\n", b"<html>\n", check(), check(b"file\t0\t0\ta\n"), check(b"0\taa\n"),
        listed()[:-5], b"folder\t0\t0\t\ndone\n", listed(b"file\t0\t0\t..\n"), listed(b"file\t0\t0\t%2E%2E/a\n"),
        listed(b"file\t0\t0\t/etc/passwd\n"), listed(b"file\t0\t0\t%2Fetc\n"), listed(b"file\t0\t0\ta/b\n"),
        listed(b"file\t0\t0\ta%00\n"), listed(b"file\t0\t0\tb\n", b"file\t0\t0\ta\n"),
        listed(b"file\t0\t0\ta\n", b"file\t0\t0\ta\n"), listed(b"file\t0\t0\t\n"), listed(b"missing\t0\t0\ta\n"),
        listed(b"link\t0\t0\ta\n", b"file\t0\t0\ta/b\n"), listed(b"file\t-1\t0\ta\n"), listed(b"exe\t0\t0\ta\n"),
        listed(b"file\t0\t0\t" + b"a" * 5000 + b"\n"), listed(b"file\t0\t0\t" + b"a" * 50_000),
        listed(b"folder\t0\t0\ta\n", b"folder\t0\t0\ta/a\n", b"folder\t0\t0\ta/a/a\n"),
    ],
)  # fmt: skip
def test_impossible_lists_are_refused(body):
    """Names that lead elsewhere, come twice, or lie in nothing: it's the server that says so, and it is named."""
    with canned(answer(body=body)) as (replica, _), pytest.raises(ProtocolError) as info:
        names_of(replica, 2)
    assert str(info.value).startswith(f"{replica.label}: ") and str(info.value).isprintable()


def test_list_of_an_unknown_server_needs_a_signature():
    """Whoever has lists says to which request they belong, also before it was asked what it can do."""
    with canned(answer(body=listed()), retries=0) as (replica, _), pytest.raises(TransientError, match="isn't that to"):
        next(replica.entries(1))


def test_server_that_is_too_old_has_no_lists():
    """That is told like a missing file, and never taken for a folder that is."""
    with canned(answer(404, b"<h1>Not Found</h1>")) as (replica, _), pytest.raises(FileMissingError):
        next(replica.entries(1))


def test_list_that_ends_with_a_problem_tells_the_reason():
    """A folder that can't be read is named by the server. What came before it was told."""
    body = listed(b"folder\t0\t0\ta\n").removesuffix(b"done\n") + b'{"status": 403, "detail": "not /x/a/b"}\n'
    with canned(answer(body=body)) as (replica, _):
        entries = replica.entries(2)
        replica.server.peer = PeerInfo()
        assert [next(entries).name for _ in range(2)] == ["", "a"]
        with pytest.raises(ForbiddenError, match="not /x/a/b"):
            next(entries)


# Connections that fail {{{1


LIST = [b"folder\t0\t0\ta\n", b"file\t0\t0\ta/b\n", b"file\t0\t0\ta.b\n", b"file\t0\t0\tc\n"]


def broken(*lines: bytes) -> bytes:
    """The beginning of a list."""
    return answer(body=listed(*lines).removesuffix(b"done\n"), length=10_000)


def test_list_goes_on_where_it_broke_off():
    """Nothing is told twice, and nothing is left out, not even what is new by then."""
    rest = listed(*LIST, b"file\t0\t0\td\n")
    with canned(
        b"", broken(*LIST[:2]), answer(503), broken(*LIST[:2]), broken(*LIST), answer(body=rest), retries=3
    ) as (
        replica,
        requests,
    ):
        assert names_of(replica) == ["", "a", "a/b", "a.b", "c", "d"]
    assert len(requests) == 6
    with canned(broken(*LIST), broken(*LIST), retries=1) as (replica, _), pytest.raises(TransientError):
        names_of(replica)


@pytest.mark.parametrize(
    "second",
    [check(b"missing\t0\t0\t\n"), listed(), listed(LIST[0]), listed(*LIST[2:]), listed(LIST[0], b"link\t0\t0\ta/b\n")],
)
def test_list_of_something_else_is_not_gone_on_with(second):
    """A folder that is gone by then, or another one, would end the list early, as if that were all."""
    with canned(broken(*LIST[:2]), answer(body=second), retries=1) as (replica, _):
        with pytest.raises(ReplacedError, match="changed while it was listed"):
            names_of(replica)


def test_list_that_is_out_of_order_the_second_time_is_refused():
    """What is skipped isn't used, what comes behind it is checked as ever."""
    second = listed(*LIST[:2], b"file\t0\t0\t..\n")
    with canned(broken(*LIST[:2]), answer(body=second), retries=1) as (replica, _), pytest.raises(ProtocolError):
        names_of(replica)


def test_damaged_list_is_asked_for_again():
    """A letter that arrived wrong would be another file."""
    damaged = answer(body=listed(*LIST).replace(b"a.b", b"a.c"))
    with canned(damaged, answer(body=listed(*LIST)), retries=1) as (replica, requests):
        assert names_of(replica) == ["", "a", "a/b", "a.b", "c"]
    assert len(requests) == 2


def test_connection_is_used_again_after_a_stream(server, tmp_path):
    """Also after a list."""
    (tmp_path / "file").write_bytes(bytes(20))
    replica = make_replica(Address(f"{tmp_path}/file", "127.0.0.1", server.port))
    for _ in range(3):
        assert len(digests_of(replica.hashes(5, "md5", 1))) == 4
        assert len(list(replica.entries(1))) == 1
    pools = replica.server.connections.adapter.poolmanager.pools
    (pool,) = [pools[key] for key in pools.keys()]  # noqa: SIM118 (it is no dictionary)
    assert pool.num_connections == 1
    replica.server.close()


def test_hashes_go_on_where_they_broke_off():
    """What is known isn't hashed again by a server that can resume, and is skipped for one that can't."""
    first = answer(body=check(b"0\taa\n", b"5\tbb\n")[:-5], length=100)
    rest = answer(body=check(b"10\tcc\n", b"15\tdd\n"))
    with canned(describe(20), first, rest, retries=1) as (replica, requests):
        assert digests_of(replica.hashes(5, "md5", 1, stop=20)) == ["aa", "bb", "cc", "dd"]
    assert b"&offset=10&" in requests[2].splitlines()[0]
    first = answer(body=b"0\taa\n5\tbb\n", length=100)
    everything = answer(body=b"15\tdd\n10\tcc\n5\tbb\n0\taa\n")
    with canned(describe(20, features=[]), first, everything, retries=1) as (replica, requests):
        assert digests_of(replica.hashes(5, "md5", 1, stop=20)) == ["aa", "bb", "cc", "dd"]
    assert b"offset" not in requests[2].splitlines()[0]


@pytest.mark.parametrize("failure", [b"", b"garbage\r\n\r\n", answer(503), answer(502, b"<html>"), answer(504)])
def test_small_requests_are_repeated(failure):
    """As many times as the user allows, then it's an error."""
    with canned(failure, failure, describe(), retries=2) as (replica, requests):
        assert replica.info()[0].size == 10
    assert len(requests) == 3
    with canned(failure, failure, retries=1) as (replica, _), pytest.raises(TransientError):
        replica.info()


@pytest.mark.parametrize("failure", [answer(500), answer(403), answer(body=b"nonsense")])
def test_what_would_not_help_is_not_repeated(failure):
    """An answer is an answer."""
    with canned(failure, retries=5) as (replica, requests), pytest.raises(ProgramError):
        replica.info()
    assert len(requests) == 1


def test_server_that_has_never_answered_is_given_up_soon():
    """A wrong port is no restart: three attempts, however many are allowed later on."""
    with canned(b"", b"", b"", retries=30) as (replica, requests), pytest.raises(TransientError):
        replica.info()
    assert len(requests) == 3
    with canned(describe(), *[b""] * 5, describe(), retries=5) as (replica, requests):
        replica.info()
        assert replica.info()[0].size == 10
    assert len(requests) == 7


def test_firewall_that_drops_is_told_from_a_slow_server(monkeypatch):
    """To connect takes less patience than to answer."""
    monkeypatch.setattr(http, "FIRST_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), pytest.raises(TransientError, match="no connection within 0.2 seconds"):
            make_replica(Address(FILE, *address), retries=0).info()


@pytest.mark.parametrize(("code", "kind"), [(socket.EAI_AGAIN, TransientError), (socket.EAI_NONAME, RemoteError)])
def test_name_server_that_is_down_may_come_back(monkeypatch, code, kind):
    """A name that doesn't exist is another matter."""

    def resolve(*args, **options):
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(kind) as info:
        make_replica(Address(FILE, "host.invalid"), retries=0).info()
    assert type(info.value) is kind


def test_silence_is_an_error():
    """A server that never answers costs the timeout and not the evening."""
    with canned(None, timeout=0.2) as (replica, _), pytest.raises(TransientError, match="no sign of life for 0.2"):
        replica.info()


def test_refused_connection_is_one_line():
    """The reason is that of the operating system, not the inside of a library."""
    port = find_free_port()
    replica = make_replica(Address(FILE, "127.0.0.1", port), retries=0)
    with pytest.raises(TransientError) as info:
        replica.info()
    assert str(info.value) == f"http://127.0.0.1:{port}/the%20file: can't exchange info with the server: " \
                              "Connection refused (is it running, and is that its port?)"  # fmt: skip


def test_unknown_host_is_final():
    """A name that doesn't exist won't exist in a second (RFC 6761 reserves .invalid)."""
    replica = make_replica(Address(FILE, "nothing.invalid"), retries=3)
    with pytest.raises(RemoteError) as info:
        replica.info()
    assert type(info.value) is RemoteError
    assert "nothing.invalid" in str(info.value)


# Flushing {{{1


@pytest.mark.parametrize("body", [b"done\n", b"\n\n\ndone\n"])
def test_flush_that_is_done(body):
    """Empty lines keep the connection alive in the meantime."""
    with canned(answer(body=body)) as (replica, _):
        replica.sync()


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [(b"", ProtocolError, "isn't one"), (b"\n\n", ProtocolError, "isn't one"), (b"done\nnot\n", ProtocolError, "isn't"),
     (b'\n{"status": 507, "detail": "no room"}\n', DiskFullError, "no room"), (b'{"detail": "x"}', RemoteError, "x")],
)  # fmt: skip
def test_flush_that_is_not_done_is_an_error(body, kind, reason):
    """The status had been sent before it was known: it's the last line that counts."""
    with canned(answer(body=body)) as (replica, _), pytest.raises(kind, match=reason):
        replica.sync()


@pytest.mark.parametrize("failure", [b"", answer(503), answer(504), answer(body=b"\n", length=10)])
def test_flush_of_unknown_outcome_has_failed(failure):
    """The answer that got lost may have been the only one to tell that the disk failed: it isn't asked for again."""
    with canned(failure, retries=5) as (replica, requests), pytest.raises(RemoteError, match="isn't known"):
        replica.sync()
    assert len(requests) == 1


def test_connections_belong_to_a_process(monkeypatch):
    """A process that is forked opens its own: two that read from one socket would take the answers from each other."""
    server = HttpServer(Address(FILE, "127.0.0.1", 1), Network())
    ours = server.connections
    assert server.connections is ours
    monkeypatch.setattr(http.os, "getpid", lambda: 0)
    assert server.connections is not ours
