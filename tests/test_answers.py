"""The wire contract, the way back: file information, holes, problems."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.answers import (
    MAX_HOLES,
    PeerInfo,
    decode_holes,
    decode_info,
    decode_problem,
    encode_holes,
    encode_info,
    encode_problem,
)
from pdiffcopy.blocks import MAX_OFFSET, MAX_TIME, Extent, FileInfo
from pdiffcopy.exceptions import ProtocolError
from pdiffcopy.features import FEATURES

# File information {{{1

INFO = FileInfo(True, 123, 456, 789, "1:2", False, 0o640, 20)


def test_info_survives():
    """What the server knows is what the client gets to know."""
    told = PeerInfo("2.0.0", FEATURES, frozenset(["sha1", "md5"]), writable=False, sets_id=False, room=5)
    assert decode_info(json.dumps(encode_info(INFO, told)), exists=True) == (INFO, told)


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
        b'{"size": 5, "mtime_ns": "x"}', b'{"size": 5, "mtime_ns": 9223372036854775808000000001}',
        b'{"size": 5, "server": []}',
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
    {}, optional={"version": VALUES, "features": VALUES, "methods": VALUES, "writable": VALUES, "sets_id": VALUES}
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


# Holes {{{1


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


def test_holes_that_are_too_small_take_part_of_the_time():
    """They aren't told, but a server that finds nothing else tells how far it has come."""
    holes = (Extent(20 * number, 15) for number in itertools.count())
    found, stop = decode_holes(json.dumps(encode_holes(holes, MAX_OFFSET, 10)), 0, MAX_OFFSET)
    assert found[:3] == [Extent(0, 10), Extent(20, 10), Extent(40, 10)]
    assert (len(found), stop) == (MAX_HOLES, 20 * MAX_HOLES - 5)
    holes = (Extent(20 * number + 1, 15) for number in itertools.count())
    assert decode_holes(json.dumps(encode_holes(holes, MAX_OFFSET, 10)), 0, MAX_OFFSET) == ([], 20 * MAX_HOLES - 4)


@pytest.mark.parametrize("time", [-MAX_TIME, -1, 0, 2**63, MAX_TIME])
def test_times_before_1970_and_after_2262_survive(time):
    """Linux counts seconds in 64 bits, and we count nanoseconds."""
    info = FileInfo(True, 5, mtime_ns=time, ctime_ns=time)
    assert decode_info(json.dumps(encode_info(info, PeerInfo())), exists=True)[0] == info


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
