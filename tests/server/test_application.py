"""Tests for :mod:`pdiffcopy.server`, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from urllib.parse import quote

import pytest
import requests
import xxhash

from pdiffcopy import __version__
from pdiffcopy.files.identity import identify
from tests.support import (
    Server,
    can_connect,
    children_of,
    exchange,
    find_free_port,
    make_data,
    run_pdiffcopy,
    snapshot,
    wait_for,
    write_pattern,
)

BLOCK = 4096
TIMEOUT = 20


@pytest.fixture
def ask(server):
    """A function that sends one request to the shared server."""
    with requests.Session() as session:

        def ask(verb: str, endpoint: str, data=None, headers=None, **params) -> requests.Response:
            url = f"{server.origin}/{endpoint}"
            return session.request(verb, url, params=params, data=data, headers=headers, timeout=TIMEOUT)

        yield ask


@pytest.fixture
def path(tmp_path):
    """A file with known contents: several blocks and a bit."""
    write_pattern(tmp_path / "file", 3 * BLOCK + 100)
    return tmp_path / "file"


def assert_problem(response: requests.Response, status: int) -> str:
    """The response is an error as RFC 9457 has it. Returns what it says."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"] == "about:blank" and problem["title"]
    assert "\n" not in problem["detail"] and problem["detail"]
    return problem["detail"]


# The frozen requests {{{1


def test_info_tells_size_and_identity(ask, path):
    """The answer has what version 1.0.1 had, what identifies the file, and what the server can do."""
    response = ask("GET", "info", filename=path)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
    document, status = response.json(), path.stat()
    assert document["size"] == 3 * BLOCK + 100
    assert document["mtime_ns"] == status.st_mtime_ns
    assert document["resizable"] is True
    server = document["server"]
    assert (server["version"], server["writable"]) == (__version__, True)
    assert {"digest", "extents", "resume", "sync"} <= set(server["features"])
    assert {"sha1", "md5", "xxh128", "blake3"} <= set(server["methods"])
    assert not {"shake_128", "shake_256"} & set(server["methods"])


def test_info_of_a_missing_file_is_404(ask, tmp_path):
    """There's no size, but a client learns what the server can do."""
    response = ask("GET", "info", filename=tmp_path / "nothing")
    assert "No such file" in assert_problem(response, 404)
    assert "size" not in response.json()
    assert "digest" in response.json()["server"]["features"]


@pytest.mark.parametrize("block_size", [1000, BLOCK, 10 * BLOCK])
@pytest.mark.parametrize("method", ["sha1", "md5", "sha256"])
def test_hashes_are_lines_of_offset_and_digest(ask, path, method, block_size):
    """A line a block, a tab between, a newline at the end."""
    response = ask("GET", "hashes", filename=path, block_size=block_size, method=method, concurrency=2)
    assert (response.status_code, response.headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    data = path.read_bytes()
    blocks = ((o, data[o : o + block_size]) for o in range(0, len(data), block_size))
    assert response.text == "".join(f"{o}\t{hashlib.new(method, block).hexdigest()}\n" for o, block in blocks)


def test_hashes_of_an_empty_file_are_empty(ask, tmp_path):
    """No block, no line."""
    (tmp_path / "empty").touch()
    response = ask("GET", "hashes", filename=tmp_path / "empty", block_size=1, method="sha1", concurrency=1)
    assert (response.status_code, response.content) == (200, b"")


def test_hashes_without_a_block_size_are_of_mebibytes(ask, tmp_path):
    """That's what version 1.0.1 answered."""
    write_pattern(tmp_path / "file", 2**20 + 1)
    response = ask("GET", "hashes", filename=tmp_path / "file", method="md5", concurrency=1)
    assert [line.split("\t")[0] for line in response.text.splitlines()] == ["0", str(2**20)]


def test_hashes_can_begin_later(ask, path):
    """A stream that broke off is resumed at an offset."""
    params = {"filename": path, "block_size": BLOCK, "method": "sha1"}
    everything = ask("GET", "hashes", **params).text.splitlines()
    assert ask("GET", "hashes", offset=2 * BLOCK, **params).text.splitlines() == everything[2:]
    assert ask("GET", "hashes", offset=100 * BLOCK, **params).text == ""


def test_nothing_behind_the_largest_file_is_nothing_in_memory(ask, path):
    """There's nothing to drop either."""
    response = ask("GET", "blocks", filename=path, offset=2**63 - 1, size=10, drop=1)
    assert (response.status_code, response.content) == (200, b"")


def test_hashes_can_end_sooner(ask, path):
    """Also within a block. A file that has become shorter than that isn't told to be as long."""
    params = {"filename": path, "block_size": BLOCK, "method": "sha1", "checks": "1"}
    data, stop = path.read_bytes(), 2 * BLOCK + 17
    lines = ask("GET", "hashes", offset=BLOCK, stop=stop, **params).text.splitlines()
    found = [line.split("\t") for line in lines if "\t" in line]
    parts = [(offset, data[offset : min(offset + BLOCK, stop)]) for offset in (BLOCK, 2 * BLOCK)]
    assert found == [[str(offset), hashlib.sha1(part).hexdigest()] for offset, part in parts]
    assert lines[-1] == "done"
    with path.open("r+b") as handle:
        handle.truncate(99 * BLOCK)  # so that it ends in a hole
    for grain in ("0", "512"):
        response = ask("GET", "hashes", offset=BLOCK, stop=2**63 - 1, grain=grain, **params)
        assert "shorter" in assert_problem(response, 416)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, BLOCK), (BLOCK, BLOCK), (17, 1000), (3 * BLOCK, BLOCK), (3 * BLOCK + 99, 1), (0, 10**9), (0, 0),
     (3 * BLOCK + 100, 1), (2**62, 5), (2**63 - 1, 1)],
)  # fmt: skip
def test_blocks_are_read(ask, path, offset, size):
    """Exactly the bytes that are there: fewer at the end of the file, none beyond it."""
    response = ask("GET", "blocks", filename=path, offset=offset, size=size)
    expected = path.read_bytes()[offset : offset + size]
    assert (response.status_code, response.content) == (200, expected)
    assert response.headers["Content-Length"] == str(len(expected))
    assert response.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize("offset", [0, 5, 3 * BLOCK, 3 * BLOCK + 100, 10 * BLOCK])
def test_blocks_are_written(ask, path, offset):
    """The bytes lie at the offset afterwards, and nothing else has changed (beyond the end, the file grows)."""
    before = path.read_bytes().ljust(offset + 300, b"\0")
    data = make_data(300, 5)
    assert ask("POST", "blocks", data, filename=path, offset=offset).status_code == 200
    assert path.read_bytes() == before[:offset] + data + before[offset + 300 :]


def test_empty_block_is_written(ask, path):
    """Nothing to write is no error."""
    before = path.read_bytes()
    assert ask("POST", "blocks", b"", {"Content-Length": "0"}, filename=path, offset=3).status_code == 200
    assert path.read_bytes() == before


def test_writing_does_not_create_files(ask, tmp_path):
    """It's resize that creates a file."""
    assert_problem(ask("POST", "blocks", b"x", filename=tmp_path / "nothing", offset=0), 404)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("size", [0, 1, 3 * BLOCK, 3 * BLOCK + 100, 10 * BLOCK])
def test_resize_cuts_and_grows(ask, path, size):
    """What's kept stays as it was, what's new is zeros."""
    before = path.read_bytes()
    assert ask("POST", "resize", filename=path, size=size).status_code == 200
    assert path.read_bytes() == before[:size].ljust(size, b"\0")


def test_resize_creates_file_and_folders(ask, tmp_path):
    """Missing parent folders are made too."""
    filename = tmp_path / "one" / "two" / "file"
    assert ask("POST", "resize", filename=filename, size=7).status_code == 200
    assert filename.read_bytes() == bytes(7)


# The additions {{{1


def test_list_is_a_stream_of_lines_with_checks(ask, tmp_path):
    """A line of kind, size, time, encoded name and, for some, identity for each thing; their digest; and the end."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "\udcff\n").write_bytes(b"12345")
    for name in ("a b/\udcff\n", "a b", ""):
        os.utime(tmp_path / name, ns=(7, 7))
    response = ask("GET", "list", filename=tmp_path, depth=2)
    assert (response.status_code, response.headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    outer, inner = (identify((tmp_path / name).stat()).encode() for name in ("", "a b"))
    lines = b"folder\t0\t7\t\t%b\nfolder\t0\t7\ta%%20b\t%b\nfile\t5\t7\ta%%20b/%%FF%%0A\n" % (outer, inner)
    assert response.content == lines + f"={xxhash.xxh3_128_hexdigest(lines)}\ndone\n".encode()
    assert ask("GET", "list", filename=tmp_path).content.count(b"folder") == 2  # one level
    assert ask("GET", "list", filename=tmp_path / "no").content.startswith(b"missing\t0\t0\t\n=")
    assert ask("HEAD", "list", filename=tmp_path).status_code == 200


def test_list_of_something_else_is_412(ask, path):
    """The identity is looked at before the status is sent."""
    file_id = ask("GET", "info", filename=path).json()["file_id"]
    assert ask("GET", "list", filename=path, file_id=file_id).content.startswith(b"file\t")
    assert_problem(ask("GET", "list", filename=path.parent, file_id=file_id), 412)


def test_list_that_fails_in_the_middle_ends_with_a_problem(ask, tmp_path):
    """Its status has been sent by then."""
    os.makedirs(tmp_path.joinpath(*["d"] * 100))
    response = ask("GET", "list", filename=tmp_path, depth=100)
    assert response.status_code == 200
    problem = json.loads(response.content.splitlines()[-1])
    assert (problem["status"], "more than 100 folders" in problem["detail"]) == (500, True)


def test_digest_of_a_read_block_is_stated(ask, path):
    """On request the header carries XXH128 of exactly the bytes in the body."""
    response = ask("GET", "blocks", filename=path, offset=100, size=BLOCK, digest=1)
    assert response.headers["Pdiffcopy-Digest"] == xxhash.xxh3_128_hexdigest(response.content)
    assert response.content == path.read_bytes()[100 : 100 + BLOCK]
    for params in ({}, {"digest": 0}):
        assert "Pdiffcopy-Digest" not in ask("GET", "blocks", filename=path, offset=0, size=1, **params).headers


def test_digest_of_a_written_block_is_compared(ask, path):
    """Whether it was stated and right is what the answer says."""
    digest = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest(b"data")}
    response = ask("POST", "blocks", b"data", digest, filename=path, offset=3)
    assert (response.status_code, response.json()) == (200, {"verified": True})
    assert ask("POST", "blocks", b"data", filename=path, offset=3).json() == {"verified": False}


def test_blockwise_digest_is_compared(ask, path):
    """It may be that of the digests of blocks, whose size is stated."""
    digests = [xxhash.xxh3_128_hexdigest(block) for block in (b"dat", b"a")]
    headers = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest("".join(digests).encode())}
    response = ask("POST", "blocks", b"data", headers, filename=path, offset=3, block_size=3)
    assert (response.status_code, response.json()) == (200, {"verified": True})
    for block_size in (2, 4, 100):
        assert_problem(ask("POST", "blocks", b"data", headers, filename=path, offset=3, block_size=block_size), 409)


@pytest.mark.parametrize(("block_size", "status"), [(0, 400), (-1, 400), ("x", 400), (2**40, 413)])
def test_absurd_blocks_of_a_digest_are_refused(ask, path, block_size, status):
    """Before anything is written."""
    before = snapshot(path)
    headers = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest(b"data")}
    assert_problem(ask("POST", "blocks", b"data", headers, filename=path, offset=3, block_size=block_size), status)
    assert snapshot(path) == before


def test_wrong_digest_is_409(ask, path):
    """A client learns that what lies in the target isn't what it sent."""
    digest = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest(b"data")}
    response = ask("POST", "blocks", b"dada", digest, filename=path, offset=BLOCK)
    detail = assert_problem(response, 409)
    assert str(path) in detail and str(BLOCK) in detail


def test_extents_are_read(ask, path):
    """The body carries the bytes of all extents, one after the other, in the order of the request."""
    data = path.read_bytes()
    response = ask("GET", "blocks", filename=path, extents="5:10,12000:388,0:1", digest=1)
    assert response.content == data[5:15] + data[12000:12388] + data[:1]
    assert response.headers["Pdiffcopy-Digest"] == xxhash.xxh3_128_hexdigest(response.content)


def test_extents_are_written(ask, path):
    """The bytes are spread over the extents."""
    before = path.read_bytes()
    digest = {"Pdiffcopy-Digest": xxhash.xxh3_128_hexdigest(b"abcdef")}
    response = ask("POST", "blocks", b"abcdef", digest, filename=path, extents="5:1,100:3,200:2")
    assert response.json() == {"verified": True}
    expected = before[:5] + b"a" + before[6:100] + b"bcd" + before[103:200] + b"ef" + before[202:]
    assert path.read_bytes() == expected


def test_extents_have_to_lie_in_the_file_to_be_read(ask, path):
    """Where extents are concerned, less than what was asked for is an error."""
    assert_problem(ask("GET", "blocks", filename=path, extents=f"0:1,{3 * BLOCK}:101"), 416)


def test_extents_have_to_fit_the_body(ask, path):
    """Bytes without a place and places without bytes change nothing."""
    before = snapshot(path)
    for body in (b"abc", b"abcde"):
        assert_problem(ask("POST", "blocks", body, filename=path, extents="0:2,8:2"), 400)
    assert snapshot(path) == before


def get_file(ask, path) -> dict:
    """What the server says of a file, but not of itself."""
    info = ask("GET", "info", filename=path).json()
    return {name: value for name, value in info.items() if name not in ("server", "settles_ms")}


def claim(ask, endpoint, path, run) -> dict:
    """What the server says of a claim, but for what becomes less from one moment to the next."""
    document = ask("POST", endpoint, filename=path, run=run).json()
    assert 0 <= document.pop("settles_ms") <= 2000
    return document


def test_run_that_has_lost_its_claim_is_423(ask, path):
    """A later run ends an earlier one: nothing that comes with its name changes anything any more."""
    assert claim(ask, "claim", path, "aa") == {"claimed": True, **get_file(ask, path)}
    assert ask("POST", "blocks", b"first", filename=path, offset=0, run="aa").status_code == 200
    assert ask("POST", "resize", filename=path, size=BLOCK, run="aa").status_code == 200
    assert claim(ask, "claim", path, "bb") == {"claimed": True, **get_file(ask, path)}
    before = snapshot(path)
    for verb, endpoint, body, params in (
        ("POST", "blocks", b"second", {"offset": 0}),
        ("POST", "resize", None, {"size": 1}),
        ("POST", "sync", None, {}),
        ("GET", "info", None, {}),
    ):
        response = ask(verb, endpoint, body, filename=path, run="aa", **params)
        if endpoint == "sync":  # the status had been sent before it was known
            assert response.json()["status"] == 423
            continue
        assert "another run has taken it over" in assert_problem(response, 423)
    assert snapshot(path) == before
    for _ in range(2):
        assert claim(ask, "release", path, "bb") == {"claimed": False, **get_file(ask, path)}
    assert os.listxattr(path) == []
    for run in ("aa", "bb"):
        assert_problem(ask("POST", "blocks", b"x", filename=path, offset=0, run=run), 423)
    assert ask("POST", "blocks", b"x", filename=path, offset=0).status_code == 200


@pytest.mark.parametrize("run", ["", "x", "AA", "a" * 65, "a b", "é"])
@pytest.mark.parametrize("endpoint", ["claim", "release", "blocks", "resize"])
def test_run_is_a_word(ask, path, endpoint, run):
    """The name of a run is up to 64 hexadecimal digits."""
    before = snapshot(path)
    response = ask("POST", endpoint, b"x" if endpoint == "blocks" else None, filename=path, run=run, offset=0, size=1)
    assert "run" in assert_problem(response, 400)
    assert (snapshot(path), os.listxattr(path)) == (before, [])


def test_claim_needs_a_name(ask, path, tmp_path):
    """A claim for nobody, or of what isn't there, is a mistake."""
    for endpoint in ("claim", "release"):
        assert "run" in assert_problem(ask("POST", endpoint, filename=path), 400)
        assert_problem(ask("POST", endpoint, filename=tmp_path / "nothing", run="aa"), 404)
    assert not (tmp_path / "nothing").exists()


def test_run_that_was_cut_short_is_refused(ask, path):
    """A run makes room before it writes: where there's none any more, somebody has cut the file."""
    ask("POST", "claim", filename=path, run="aa")
    before = snapshot(path)
    response = ask("POST", "blocks", b"x" * 10, filename=path, offset=len(before[0]) - 5, run="aa")
    assert "cut" in assert_problem(response, 416)
    assert snapshot(path) == before


def test_sync_flushes(ask, path):
    """The last line says that it is done."""
    response = ask("POST", "sync", filename=path)
    assert response.status_code == 200
    assert response.text.split("\n")[-2:] == ["done", ""]
    assert_problem(ask("POST", "sync", filename=path.parent / "nothing"), 404)


def test_names_are_bytes(ask, tmp_path):
    """A name that isn't UTF-8 is a name like any other."""
    filename = os.fsencode(tmp_path) + b"/\xff\n%+&#"
    ask("POST", "resize", filename=filename, size=3)
    assert ask("GET", "info", filename=filename).json()["size"] == 3
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\n%+&#"]


# What a client can do wrong {{{1

READ = {"offset": "0", "size": "1"}
HASH = {"block_size": "4096", "method": "sha1", "concurrency": "1"}
HUGE = str(2**63)

MISTAKES = [
    # Missing.
    ("GET", "info", {"filename": None}, 400),
    ("GET", "hashes", {**HASH, "filename": None}, 400),
    ("GET", "hashes", {**HASH, "method": None}, 400),
    ("GET", "blocks", {**READ, "filename": None}, 400),
    ("GET", "blocks", {**READ, "offset": None}, 400),
    ("GET", "blocks", {**READ, "size": None}, 400),
    ("POST", "blocks", {"offset": None}, 400),
    ("POST", "blocks", {"offset": "0", "filename": None}, 400),
    ("POST", "resize", {"size": None}, 400),
    ("POST", "resize", {"size": "1", "filename": None}, 400),
    ("POST", "sync", {"filename": None}, 400),
    # Malformed, negative, absurdly large.
    *[
        ("GET", "hashes", {**HASH, "block_size": value}, 400)
        for value in ("", "0", "-1", "x", "1.5", "1e3", "+1", " 1", "0x10", "1_000", "٣", "01")
    ],
    *[("GET", "hashes", {**HASH, "concurrency": value}, 400) for value in ("", "0", "-1", "many")],
    *[("GET", "hashes", {**HASH, "method": value}, 400) for value in ("", "nonsense", "shake_128", "sha1\0", "é")],
    *[("GET", "hashes", {**HASH, "offset": value}, 400) for value in ("", "-4096", "1", "x")],
    *[("GET", "blocks", {**READ, "offset": value}, 400) for value in ("", "-1", "x", "NaN", "1" * 5000)],
    *[("GET", "blocks", {**READ, "size": value}, 400) for value in ("", "-1", "x")],
    *[("GET", "blocks", {**READ, "digest": value}, 400) for value in ("", "-1", "yes")],
    *[
        ("GET", "blocks", {"extents": value}, 400)
        for value in ("", "1", "1:", ":1", "1:0", "-1:1", "1:1,", "1:1;2:1", "a:b", "1:1:1", "0:" + "9" * 30)
    ],
    *[("POST", "blocks", {"offset": value}, 400) for value in ("", "-1", "x", "1" * 30)],
    *[("POST", "resize", {"size": value}, 400) for value in ("", "-1", "x", "1" * 30)],
    ("GET", "hashes", {**HASH, "block_size": str(2**30 + 1)}, 413),
    ("GET", "hashes", {**HASH, "concurrency": "1000000"}, 413),
    ("GET", "hashes", {**HASH, "offset": HUGE}, 413),
    ("GET", "blocks", {**READ, "size": str(2**30 + 1)}, 413),
    ("GET", "blocks", {**READ, "size": HUGE}, 413),
    ("GET", "blocks", {**READ, "offset": HUGE}, 413),
    ("GET", "blocks", {**READ, "digest": "2"}, 413),
    ("GET", "blocks", {"extents": f"0:{2**30},5:1"}, 413),
    ("GET", "blocks", {"extents": f"{2**63 - 1}:1"}, 413),
    ("GET", "blocks", {"extents": ",".join(["0:1"] * 129)}, 413),
    ("POST", "blocks", {"offset": str(2**63 - 1)}, 413),
    ("POST", "resize", {"size": HUGE}, 413),
    # Names that no file can have.
    *[("GET", "info", {"filename": value}, 400) for value in ("", "relative", "./x", "/\0", "/tmp/x\0.img", "~/x")],
    ("GET", "hashes", {**HASH, "filename": "relative"}, 400),
    ("GET", "blocks", {**READ, "filename": "relative"}, 400),
    ("POST", "blocks", {"offset": "0", "filename": "relative"}, 400),
    ("POST", "resize", {"size": "1", "filename": "relative"}, 400),
    ("POST", "resize", {"size": "1", "filename": "/\0"}, 400),
    ("POST", "sync", {"filename": "relative"}, 400),
    ("GET", "info", {"filename": "/" + "x" * 300}, 400),
    ("GET", "info", {"filename": "/" + "xxxxxxx/" * 600}, 400),
    ("POST", "resize", {"size": "1", "filename": "/tmp/" + "x" * 300}, 400),
    # Names that lead nowhere.
    ("GET", "info", {"filename": "/nothing/at/all"}, 404),
    ("GET", "hashes", {**HASH, "filename": "/nothing/at/all"}, 404),
    ("GET", "blocks", {**READ, "filename": "/nothing/at/all"}, 404),
    ("POST", "blocks", {"offset": "0", "filename": "/nothing/at/all"}, 404),
    ("POST", "sync", {"filename": "/nothing/at/all"}, 404),
    ("GET", "info", {"filename": "/etc/passwd/x"}, 404),
    # Lists.
    ("GET", "list", {"filename": None}, 400),
    *[("GET", "list", {"depth": value}, 400) for value in ("", "-1", "x", "1.5", "01")],
    *[("GET", "list", {"depth": value}, 413) for value in ("101", HUGE)],
    *[("GET", "list", {"filename": value}, 400) for value in ("", "relative", "/\0", "/" + "x" * 300)],
]


@pytest.mark.parametrize(
    ("verb", "endpoint", "params", "status"),
    MISTAKES,
    ids=[f"{i}-{verb}-{endpoint}-{status}" for i, (verb, endpoint, _, status) in enumerate(MISTAKES)],
)
def test_mistake_of_a_client_is_a_problem(ask, path, verb, endpoint, params, status):
    """What a client does wrong is its error and not ours, is said in the same form each time, and changes nothing."""
    before = snapshot(path)
    response = ask(verb, endpoint, b"x" if endpoint == "blocks" and verb == "POST" else None,
                   **{"filename": path, **params})  # fmt: skip
    assert_problem(response, status)
    assert snapshot(path) == before


@pytest.mark.parametrize(
    "query",
    ["filename=/a&filename=/b", "&".join(f"p{i}=1" for i in range(40)), "filename=/etc/passwd&size=1&size=2"],
    ids=["name twice", "too many", "size twice"],
)
def test_ambiguous_queries_are_refused(server, query):
    """Nobody guesses which of two values was meant."""
    assert_problem(requests.get(f"{server.origin}/info?{query}", timeout=TIMEOUT), 400)


def test_unknown_parameters_are_ignored(ask, path):
    """A later version may send more."""
    assert ask("GET", "info", filename=path, future="1", size="x").status_code == 200


@pytest.mark.parametrize("digest", ["x", "ABCDEF", "0", "0" * 513, "é"])
def test_malformed_digest_is_refused(ask, path, digest):
    """What can't be a digest is refused before anything is written."""
    before = snapshot(path)
    headers = {"Pdiffcopy-Digest": digest.encode("latin1")}
    assert_problem(ask("POST", "blocks", b"data", headers, filename=path, offset=0), 400)
    assert snapshot(path) == before


def test_unknown_endpoints_are_404(ask, path):
    """There's nothing else, whatever one tries."""
    for endpoint in ("", "nothing", "info/", "static/x", "../etc/passwd", "%2e%2e/etc/passwd", "block", "INFO"):
        assert_problem(ask("GET", endpoint, filename=path), 404)


@pytest.mark.parametrize(
    ("verb", "endpoint", "allowed"),
    [("POST", "info", "GET, HEAD"), ("POST", "hashes", "GET, HEAD"), ("GET", "resize", "POST"), ("GET", "sync", "POST"),
     ("PUT", "blocks", "GET, HEAD, POST"), ("DELETE", "blocks", "GET, HEAD, POST"), ("OPTIONS", "info", "GET, HEAD"),
     ("PATCH", "resize", "POST"), ("BREW", "info", "GET, HEAD")],
)  # fmt: skip
def test_wrong_verbs_are_405(ask, path, verb, endpoint, allowed):
    """And the answer says which ones are right (RFC 9110)."""
    before = snapshot(path)
    response = ask(verb, endpoint, filename=path, offset=0, size=0)
    assert_problem(response, 405)
    assert sorted(response.headers["Allow"].replace(" ", "").split(",")) == allowed.split(", ")
    assert snapshot(path) == before


def test_head_has_the_headers_of_get(ask, path):
    """A HEAD request costs no body, and no digest of data."""
    wait_for(lambda: ask("GET", "info", filename=path).json()["settles_ms"] == 0, what="a time that tells of changes")
    for endpoint, params in (("info", {}), ("blocks", {"offset": 0, "size": BLOCK, "digest": 1})):
        head, get = (ask(verb, endpoint, filename=path, **params) for verb in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (200, b"")
        for name in ("Content-Length", "Content-Type"):
            assert head.headers.get(name) == get.headers.get(name)
        assert ("Pdiffcopy-Digest" in head.headers) == (endpoint == "info")


def test_body_without_length_is_411(server, path):
    """A chunked body has no length that could be checked beforehand."""
    before = snapshot(path)
    url = f"{server.origin}/blocks"
    response = requests.post(url, params={"filename": path, "offset": 0}, data=iter([b"data"]), timeout=TIMEOUT)
    assert_problem(response, 411)
    assert snapshot(path) == before


@pytest.mark.parametrize("length", [2**30 + 1, 10**18])
def test_body_that_is_too_long_is_413(server, path, length):
    """It's refused by what it announces, without being read."""
    before = snapshot(path)
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1"
    head = f"{line}\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")
    assert snapshot(path) == before


def test_body_that_ends_early_is_a_client_error(server, path):
    """A client that announces more than it sends learns of it, where it still listens."""
    line = f"POST /blocks?filename={quote(str(path))}&offset=0 HTTP/1.1"
    head = f"{line}\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nshort"
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(head.encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 "), answer


# What isn't a file {{{1


@pytest.fixture
def oddities(tmp_path):
    """Names of things that aren't regular files."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    names = {name: tmp_path / name for name in ("folder", "fifo", "link", "socket")}
    return {**names, "zero": "/dev/zero", "null": "/dev/null", "random": "/dev/urandom", "terminal": "/dev/tty"}


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "socket", "zero", "null", "random", "terminal"])
def test_what_is_not_a_file_never_blocks(ask, oddities, kind):
    """A folder, a FIFO or a device is refused at once by every endpoint: no worker waits or streams for ever."""
    filename = oddities[kind]
    for verb, endpoint, params in (
        ("GET", "info", {}),
        ("GET", "hashes", HASH),
        ("GET", "blocks", READ),
        ("GET", "blocks", {"extents": "0:1"}),
        ("POST", "blocks", {"offset": 0}),
        ("POST", "resize", {"size": 1}),
        ("POST", "sync", {}),
    ):
        data = b"x" if (verb, endpoint) == ("POST", "blocks") else None
        detail = assert_problem(ask(verb, endpoint, data, filename=filename, **params), 403)
        assert "neither a regular file nor a block device" in detail


def test_file_as_folder_is_refused(ask, path):
    """A file can't be a folder of the path that's to be made."""
    status = ask("POST", "resize", filename=path / "x", size=1).status_code
    assert status in (403, 404)
    assert path.is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_403(ask, path):
    """The server can't do more than its user."""
    path.chmod(0)
    assert_problem(ask("GET", "blocks", filename=path, **READ), 403)


def test_loop_of_links_is_403(ask, tmp_path):
    """The kernel gives up, and so does the server."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for endpoint in ("info", "list"):
        assert_problem(ask("GET", endpoint, filename=tmp_path / "a"), 403)


# The process {{{1


def test_connections_are_kept_alive(server, path):
    """Many requests travel on one connection, errors and all endpoints included."""
    filename = quote(str(path))
    targets = [
        f"GET /info?filename={filename}",
        f"GET /blocks?filename={filename}&offset=0&size=10",
        f"GET /blocks?filename={filename}&offset=0&size=10&digest=1",
        f"GET /blocks?filename={filename}&extents=0:1,5:2",
        f"GET /hashes?filename={filename}&block_size=1000&method=md5&concurrency=1",
        "GET /info?filename=/nothing",
        "GET /info",
        f"POST /resize?filename={filename}&size=100",
        f"POST /sync?filename={filename}",
        f"GET /info?filename={filename}",
    ]
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        reader = sock.makefile("rb")
        for target in targets:
            sock.sendall(f"{target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            assert reader.readline().startswith(b"HTTP/1.1 "), f"the connection was closed before {target}"
            headers = dict(line.lower().strip().split(b": ", 1) for line in iter(reader.readline, b"\r\n"))
            assert headers.get(b"connection") != b"close"
            if b"content-length" in headers:
                reader.read(int(headers[b"content-length"]))
            else:
                while size := int(reader.readline(), 16):
                    reader.read(size + 2)
                assert reader.readline() == b"\r\n"


def test_close_is_respected(server, path):
    """An old client wants its connection to be closed after the response."""
    head = f"GET /info?filename={quote(str(path))} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(server.port, head.encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["size"] == 3 * BLOCK + 100


def test_application_runs_in_gunicorn_alone(tmp_path, path):
    """``gunicorn pdiffcopy.server:app`` serves what ``pdiffcopy --listen`` serves, with gunicorn's own settings."""
    port, log = find_free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "pdiffcopy.server:app"]
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle)
    server = Server(process, port, log)
    try:
        wait_for(lambda: can_connect(port) or process.poll() is not None, what="gunicorn")
        assert process.poll() is None, log.read_text()
        result = run_pdiffcopy("-b", str(BLOCK), server.location(path), tmp_path / "copy")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
        result = run_pdiffcopy("-b", str(BLOCK), path, server.location(tmp_path / "upload"))
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "upload").read_bytes() == path.read_bytes()
    finally:
        assert server.stop() == 0


def _get_peak_memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as handle:
        return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("VmHWM:"))


def test_large_blocks_do_not_fill_the_memory(launch, tmp_path):
    """However large the block that's asked for or sent, it's never in the memory of the server as a whole."""
    server, size = launch("-c", "1"), 64 * 1024 * 1024
    with (tmp_path / "sparse").open("wb") as handle:
        handle.truncate(8 * size)
    params = {"filename": tmp_path / "sparse", "offset": 0, "size": 1000}
    (worker,) = wait_for(lambda: children_of(server.process.pid), what="a worker")
    with requests.Session() as session:
        for warm_up in ({}, {"digest": 1}, {"extents": "0:1,5:5"}):
            session.get(f"{server.origin}/blocks", params={**params, **warm_up}, timeout=TIMEOUT)
        before = _get_peak_memory(worker)
        for options in ({"size": size}, {"size": size, "digest": 1}, {"extents": f"0:{size // 2},{size}:{size // 2}"}):
            url = f"{server.origin}/blocks"
            with session.get(url, params={**params, **options}, timeout=TIMEOUT, stream=True) as response:
                assert sum(len(chunk) for chunk in response.iter_content(1024 * 1024)) == size
        params.pop("size")
        assert session.post(f"{server.origin}/blocks", params=params, data=bytes(size), timeout=TIMEOUT).ok
        params = {"filename": tmp_path / "sparse", "block_size": size, "method": "xxh128", "concurrency": 1}
        assert session.get(f"{server.origin}/hashes", params=params, timeout=TIMEOUT).text.count("\n") == 8
    assert _get_peak_memory(worker) - before < size // 4


@pytest.mark.parametrize("token", ["", "two words"])
def test_server_is_imported_whatever_the_environment_is(token):
    """What is wrong with it is told when the application is wanted."""
    code = """if True:
        import pdiffcopy.server
        from pdiffcopy.exceptions import UsageError
        try:
            pdiffcopy.server.app
        except UsageError as e:
            print(e)
        else:
            raise SystemExit("there is an application that nobody wanted like this")
    """
    environment = {**os.environ, "PDIFFCOPY_TOKEN": token}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "$PDIFFCOPY_TOKEN" in result.stdout


# Folders and their metadata {{{1


def test_metadata_of_a_folder_is_that_of_the_folder_that_is_meant(ask, tmp_path):
    """Not of another one, nor of what the kernel makes up; and there's nothing to try in advance."""
    words = {"filename": tmp_path, "folder": 1}
    for verb in ("GET", "POST"):
        more = {"mode": 0o700} if verb == "POST" else {}
        assert_problem(ask(verb, "metadata", **words, **more, file_id="9:9"), 412)
        assert_problem(ask(verb, "metadata", **{**words, "filename": "/proc/self"}, **more), 403)
    tmp_path.chmod(0o755)
    assert_problem(ask("POST", "metadata", **words, mode=0o700, in_advance=1), 400)
    assert tmp_path.stat().st_mode & 0o777 == 0o755


# What takes long {{{1


def test_head_of_pieces_digests_nothing(server, path):
    """Whoever wants to know only whether a file is there doesn't want that."""
    words = {"filename": path, "extents": "0:4096", "size": 4096, "method": "sha1"}
    answer = requests.head(f"{server.origin}/pieces", params=words, timeout=TIMEOUT)
    assert (answer.status_code, answer.content) == (200, b"")
    assert len(requests.get(f"{server.origin}/pieces", params=words, timeout=TIMEOUT).content) == 20


def test_deep_lists_leave_descriptors_to_others(launch, tmp_path):
    """One takes as many as there are levels, and a client may never read it."""
    server = launch("-c", "1", prefix=["sh", "-c", 'ulimit -n 1024 && exec "$@"', "sh"])
    folder = tmp_path
    for _ in range(90):
        folder = folder / "x"
    folder.mkdir(parents=True)
    for number in range(3000):
        (folder / f"{number:0200}").touch()
    head = f"GET /list?filename={tmp_path}&depth=100 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(8)]
        for connection in connections:
            connection.sendall(head)
        first = [connection.recv(15)[9:12] for connection in connections]
        assert {b"200", b"503"} == set(first)
        assert requests.get(f"{server.origin}/info", {"filename": tmp_path / "x"}, timeout=TIMEOUT).status_code == 403
