"""The wire contract, the way back: hash lines, file information, problems."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.answers import (
    MAX_HOLES,
    MAX_LINE,
    PeerInfo,
    decode_holes,
    decode_info,
    decode_problem,
    encode_holes,
    encode_info,
    encode_problem,
    format_checked,
    format_hashes,
    parse_checked,
    parse_hashes,
)
from pdiffcopy.blocks import MAX_OFFSET, BlockDigest, Extent, FileInfo, Hole
from pdiffcopy.exceptions import ProtocolError
from pdiffcopy.features import FEATURES

# Hash lines {{{1


DIGESTS = st.builds(BlockDigest, st.integers(0, 10**19 - 1), st.text("0123456789abcdef", min_size=2, max_size=512))


def cut(data, positions):
    positions = [0, *sorted(positions), len(data)]
    return [data[i:j] for i, j in itertools.pairwise(positions)]


@given(st.lists(DIGESTS, max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_hash_lines_survive_any_cut(digests, positions):
    """What one side spells is what the other one reads, however the network cuts it."""
    assert list(parse_hashes(cut(format_hashes(digests), positions))) == digests


def test_hash_lines_are_frozen():
    """The format is that of version 1.0.1."""
    assert format_hashes([BlockDigest(0, "aa"), BlockDigest(1048576, "0f")]) == b"0\taa\n1048576\t0f\n"
    assert list(parse_hashes([b"0\taa\r\n"])) == [(0, "aa")]


HOLES = st.builds(Hole, st.integers(0, MAX_OFFSET), st.integers(1, MAX_OFFSET))
LAYOUTS = st.builds(
    lambda item, layout: item._replace(digest=f"{item.digest}.{layout:032x}"), DIGESTS, st.integers(0, 9)
)


@given(st.lists(DIGESTS | HOLES | LAYOUTS, max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_lines_with_holes_survive_any_cut(items, positions):
    """Runs of blocks and blocks with holes are told in the same stream."""
    assert list(parse_checked(cut(format_checked(items) + b"done\n", positions))) == items


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=8))
def test_holes_survive(pairs):
    """In their order, and it's told how far that goes."""
    holes, end = [], 0
    for distance, size in pairs:
        holes.append(Extent(end + distance, size))
        end = sum(holes[-1])
    assert decode_holes(json.dumps(encode_holes(holes, end + 1)), 0, end + 1) == (holes, end + 1)


def test_many_holes_are_told_in_parts():
    """The next request begins where an answer ends."""
    holes = (Extent(2 * number, 1) for number in itertools.count())
    found, stop = decode_holes(json.dumps(encode_holes(holes, MAX_OFFSET)), 0, MAX_OFFSET)
    assert (len(found), stop) == (MAX_HOLES, 2 * MAX_HOLES - 1)


@pytest.mark.parametrize(
    "document",
    ["", "[]", "{}", '{"holes": [], "stop": 0}', '{"holes": [], "stop": 11}', '{"holes": [[5, 6]], "stop": 10}',
     '{"holes": [[5, -1]], "stop": 10}', '{"holes": [[5, 1], [5, 1]], "stop": 10}', '{"holes": [[5]], "stop": 10}',
     '{"holes": [[1.5, 1]], "stop": 10}', '{"holes": 5, "stop": 10}', '{"holes": [[true, 1]], "stop": 10}',
     "[" * 100_000],
)  # fmt: skip
def test_impossible_holes(document):
    """Holes that overlap, lie elsewhere or lead nowhere aren't believed."""
    with pytest.raises(ProtocolError):
        decode_holes(document, 0, 10)


def test_hash_lines_come_as_soon_as_they_can():
    """A line is passed on before the next chunk is asked for."""

    def chunks():
        yield b"0\taa\n1"
        raise AssertionError("too eager")

    assert next(parse_hashes(chunks())) == (0, "aa")


@pytest.mark.parametrize(
    "data",
    [
        b"\n", b"x\n", b"0\n", b"0 aa\n", b"0\taa bb\n", b"0\taa\t1\n", b"-1\taa\n", b"01\taa\n", b"0\tAA\n",
        b"0\tgg\n", b"0\ta\n", b"0\t\n", b"\taa\n", b"0\taa\n\n", b"0\taa", b"0\taa\n10", b"<html>\n",
        b"\xff\n", b"0\taa\0\n",
        b"1" * 20 + b"\taa\n", b"0\t" + b"a" * 513 + b"\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 1000])
def test_impossible_hash_lines(data, size):
    """Anything but complete lines of an offset and a digest is refused."""
    with pytest.raises(ProtocolError) as info:
        list(parse_hashes(cut(data, range(size, len(data), size))))
    assert str(info.value).isprintable()


def test_endless_hash_line_is_not_followed():
    """A line that doesn't end can't fill the memory."""

    def chunks():
        for _ in range(MAX_LINE // 100 + 1):
            yield b"a" * 100
        raise AssertionError("too patient")

    with pytest.raises(ProtocolError, match=f"more than {MAX_LINE} bytes"):
        list(parse_hashes(chunks()))


@given(st.lists(st.binary(max_size=40)))
def test_any_hash_stream_is_parsed_or_refused(chunks):
    """Nothing but a protocol error comes of nonsense."""
    try:
        digests = list(parse_hashes(chunks))
    except ProtocolError:
        return
    assert format_hashes(digests) == b"".join(chunks).replace(b"\r", b"")


# File information {{{1

INFO = FileInfo(True, 123, 456, 789, "1:2", False, 0o640, 20)


def test_info_survives():
    """What the server knows is what the client gets to know."""
    text = json.dumps(encode_info(INFO, PeerInfo("2.0.0", FEATURES, frozenset(["sha1", "md5"]), writable=False)))
    info, peer = decode_info(text, exists=True)
    assert info == INFO
    assert (peer.features, peer.methods, peer.writable) == (FEATURES, {"sha1", "md5"}, False)
    assert peer.version.startswith("2.")


def test_info_of_a_missing_file_survives():
    """The answer for a missing file still tells what the server can do."""
    document = encode_info(FileInfo(False), PeerInfo("2.0.0", FEATURES, frozenset(["sha1"])))
    assert set(document) == {"server"}
    info, peer = decode_info(json.dumps(document), exists=False)
    assert info == FileInfo(False)
    assert (peer.features, peer.methods, peer.writable) == (FEATURES, {"sha1"}, True)


def test_info_of_an_old_server():
    """Version 1.0.1 tells the size and nothing else: it has no features."""
    assert decode_info(b'{"size": 5}', exists=True) == (FileInfo(True, 5), PeerInfo())
    for text in [b"", b"Not Found", b"<html>", b"[]", b"null", b'{"server": 7}', b"{}"]:
        assert decode_info(text, exists=False) == (FileInfo(False), PeerInfo())


@pytest.mark.parametrize(
    "text",
    [
        b"", b"OK", b"[]", b"null", b'"size"', b"{}", b"\xff", b'{"size": null}', b'{"size": -1}', b'{"size": 1.0}',
        b'{"size": true}', b'{"size": "5"}', b'{"size": 1e3}', b'{"size": 9223372036854775808}', b'{"size": NaN}',
        b'{"size": 5, "mtime_ns": "x"}', b'{"size": 5, "mtime_ns": 9223372036854775808}', b'{"size": 5, "server": []}',
        b'{"size": 5, "server": null}', b'{"size": ' + b"9" * 5000 + b"}", b"[" * 100000, b'{"a":' * 100000,
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_impossible_info(text):
    """An answer that makes no sense isn't believed."""
    with pytest.raises(ProtocolError) as info:
        decode_info(text, exists=True)
    assert str(info.value).isprintable() and len(str(info.value)) < 300


@pytest.mark.parametrize("depth", range(100, 1100, 50))
def test_deep_info_is_no_crash(depth):
    """Nesting is either understood or refused, at any depth."""
    deep = "[" * depth + "]" * depth
    for text in [f'{{"size": 1, "file_id": {deep}}}', f'{{"size": 1, "server": {{"version": {deep}}}}}']:
        with contextlib.suppress(ProtocolError):
            assert decode_info(text, exists=True)[0].size == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
SERVERS = st.fixed_dictionaries(
    {}, optional={"version": VALUES, "features": VALUES, "methods": VALUES, "writable": VALUES}
)
DOCUMENTS = VALUES | st.fixed_dictionaries(
    {"size": st.integers(0, 9) | VALUES},
    optional={"mtime_ns": VALUES, "file_id": VALUES, "resizable": VALUES, "server": SERVERS | VALUES},
)


@given(DOCUMENTS, st.booleans())
def test_any_document_is_understood_or_refused(document, exists):
    """Whatever a server sends: the result has the right types and ranges, or it's a protocol error."""
    try:
        info, peer = decode_info(json.dumps(document), exists)
    except ProtocolError:
        assert exists
        return
    assert info.exists == exists
    assert type(info.size) is int and 0 <= info.size <= MAX_OFFSET
    assert type(info.mtime_ns) is int and type(info.resizable) is bool and type(peer.writable) is bool
    assert type(info.file_id) is str and len(info.file_id) <= 80
    assert type(peer.version) is str and len(peer.version) <= 40
    assert peer.features <= FEATURES
    assert all(type(method) is str for method in peer.methods)


# Problems {{{1


def test_problem_survives():
    """What the server says is what the client shows."""
    text = encode_problem(404, "Not Found", "There's no é here", {"extra": 1}).encode("ascii")
    assert json.loads(text) == {
        "type": "about:blank", "title": "Not Found", "status": 404, "detail": "There's no é here", "extra": 1,
    }  # fmt: skip
    assert decode_problem(text) == "There's no é here"


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"[]", b"{}", b'{"detail": 7}', b'{"detail": null}', b"7", b"\xff", b"[" * 100000]
)
def test_foreign_problem_says_nothing(text):
    """What isn't ours has no detail."""
    assert decode_problem(text) == ""


def test_endless_problem_is_cut():
    """A server can't fill the screen."""
    assert decode_problem(encode_problem(500, "", "x" * 5000).encode()) == "x" * 400


@given(st.binary() | DOCUMENTS.map(json.dumps).map(str.encode))
def test_any_problem_is_understood(text):
    """Whatever a server sends, a short text comes of it."""
    assert len(decode_problem(text)) <= 400
