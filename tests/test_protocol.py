"""The wire contract, the way there: requests as values, and how their words are spelled."""

from __future__ import annotations

import os
from urllib.parse import parse_qs, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.blocks import MAX_OFFSET, MAX_TIME, Extent
from pdiffcopy.entries import MAX_DEPTH
from pdiffcopy.exceptions import DamagedError, LengthRequiredError, ProgramError, RequestError, TooLargeError
from pdiffcopy.extents import EXTENT_LENGTH, MAX_EXTENTS, MAX_PACKED, Extents, Packed, choose_form, split
from pdiffcopy.protocol import (
    REQUESTS,
    ClaimRequest,
    ClearRequest,
    HashesRequest,
    InfoRequest,
    PiecesRequest,
    ReadRequest,
    ReleaseRequest,
    ResizeRequest,
    SetMetadataRequest,
    WriteRequest,
)
from pdiffcopy.replica import Replica
from pdiffcopy.words import (
    DIGEST_HEADER,
    MAX_BLOCK_SIZE,
    REQUEST_HEADER,
    Integer,
    check_digest,
    check_query,
    parse_query,
    peek,
)

FILE = {"filename": "/a"}


def decode(kind, headers=(), **words):
    """What a server makes of a request."""
    return kind.decode(urlencode({**FILE, **words}).encode("ascii"), dict(headers))


# Requests {{{1

EXTENTS = st.builds(Extent, st.integers(0, MAX_OFFSET - MAX_BLOCK_SIZE), st.integers(1, MAX_BLOCK_SIZE // MAX_EXTENTS))


def lay_out(pairs: list[tuple[int, int]]) -> tuple[Extent, ...]:
    """Extents with these distances and sizes, in pages, the last one a byte shorter."""
    extents, end = [], 0
    for distance, size in pairs:
        extents.append(Extent(end + distance * 4096, size * 4096))
        end = sum(extents[-1])
    return (*extents[:-1], Extent(extents[-1].offset, extents[-1].size - 1))


WORDS = {
    "within": st.just("") | st.text(min_size=1).filter(lambda name: "\0" not in name).map(lambda name: "/" + name),
    "filename": st.text(min_size=1).filter(lambda name: "\0" not in name).map(lambda name: "/" + name),
    "file_id": st.sampled_from(["", "fe00:1234@0b-1", "!~"]),
    "run": st.sampled_from(["dead", "0" * 64]),
    "method": st.text(),
    "size": st.integers(0, MAX_BLOCK_SIZE),
    "offset": st.just(0) | st.integers(1, 100).map(lambda count: count * 4096),
    "extents": st.lists(EXTENTS, max_size=MAX_EXTENTS).map(tuple),
    "packed": st.just(()) | st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1).map(lay_out),
    "block_size": st.just(4096),
    "stop": st.integers(0, MAX_OFFSET),
    "concurrency": st.integers(1, 1024),
    "mode": st.integers(0, 0o777),
    "uid": st.none() | st.integers(0, 2**32 - 2),
    "gid": st.none() | st.integers(0, 2**32 - 2),
    **dict.fromkeys(["owner", "group"], st.sampled_from(["", "mysql", "Jürgen", "a b"])),
    "mtime_ns": st.none() | st.integers(-MAX_TIME, MAX_TIME),
    "ctime_ns": st.integers(-MAX_TIME, MAX_TIME),
    "takes": st.integers(0, MAX_OFFSET),
    "new_id": st.just("fe00:1234@0b-1"),
    "digest": st.just("0123456789abcdef" * 2),
    "grain": st.just(512),
    "depth": st.integers(0, MAX_DEPTH),
    **dict.fromkeys(["checks", "flush", "drop", "data", "create", "keep", "in_advance", "folder"], st.booleans()),
}


@pytest.mark.parametrize("kind", REQUESTS)
@given(data=st.data())
def test_requests_survive(kind, data):
    """What one side encodes is what the other one decodes, whatever the values are, and it isn't taken for damaged."""
    values = {name: data.draw(WORDS[name], name) for name in kind.declarations}
    if kind is HashesRequest:
        values["grain"] = data.draw(st.sampled_from([0, 512, 4096])) if values["checks"] else 0
    if kind is ClearRequest:
        values["packed"] = values["packed"] or (Extent(0, 1),)
    if kind is SetMetadataRequest:
        values["in_advance"] &= not values["folder"]
    if kind is ReadRequest:
        values["digest"] = data.draw(st.booleans())
    if kind is PiecesRequest:
        values["size"], values["extents"] = 4096, (Extent(data.draw(st.integers(0, 9)), data.draw(st.integers(1, 99))),)
    request = kind(**values)
    query, headers = request.encode(nonce="abc")
    assert query.isascii()
    assert kind.decode(query.encode("ascii"), headers) == request
    check_query(query.encode("ascii"), headers[REQUEST_HEADER])
    with pytest.raises(DamagedError):
        check_query(query.replace("abc", "abd").encode("ascii"), headers[REQUEST_HEADER])


def test_requests_are_values():
    """Equal when they are of one kind and have the same words, in whatever order, and never changed."""
    one = HashesRequest(filename="/a", method="md5", offset=0)
    assert one == HashesRequest(method="md5", filename="/a") and hash(one) == hash(HashesRequest(method="md5", **FILE))
    assert one != HashesRequest(filename="/b", method="md5") and InfoRequest(**FILE) != ReleaseRequest(**FILE, run="1")
    assert one.changed(checks=True) == HashesRequest(filename="/a", method="md5", checks=True) != one
    assert repr(InfoRequest(**FILE)) == "InfoRequest(filename='/a', file_id='', within='', run='', drop=False)"
    with pytest.raises(AttributeError, match="HashesRequest never changes"):
        one.offset = 1


@pytest.mark.parametrize("words", [{}, {"method": "md5", "size": 1}], ids=["one is missing", "one too many"])
def test_requests_take_their_words_and_no_others(words):
    """Python would say the same of a function."""
    with pytest.raises(TypeError, match="HashesRequest takes filename, file_id, within, block_size, method, "):
        HashesRequest(**FILE, **words)


def test_each_request_is_a_method_of_a_replica():
    """The routes and the replica have the same table, and no route is there twice."""
    assert {kind.action for kind in REQUESTS} == Replica.__abstractmethods__ - {"digest"}
    assert len({(kind.verb, kind.endpoint) for kind in REQUESTS}) == len(REQUESTS)
    reading = {"info", "entries", "hashes", "holes", "pieces", "read", "metadata"}
    assert {kind.action for kind in REQUESTS if not kind.writes} == reading
    assert all(kind.writes == (kind.verb == "POST") for kind in REQUESTS)


def test_requests_are_those_of_the_frozen_protocol():
    """Where a server of version 1.0.1 can do what is asked for, it gets what it knows and nothing else."""
    for request, expected in (
        (InfoRequest(filename="/a b"), {}),
        (
            HashesRequest(filename="/a b", block_size=10, method="sha1", concurrency=2),
            {"block_size": ["10"], "method": ["sha1"], "concurrency": ["2"]},
        ),
        (
            HashesRequest(filename="/a b", block_size=1048576, method="sha1", concurrency=1),
            {"block_size": ["1048576"], "method": ["sha1"], "concurrency": ["1"]},
        ),
        (ReadRequest.of([Extent(5, 10)], filename="/a b"), {"offset": ["5"], "size": ["10"]}),
        (WriteRequest.of([Extent(5, 10)], filename="/a b"), {"offset": ["5"]}),
        (ResizeRequest(filename="/a b", size=0), {"size": ["0"]}),
    ):
        query, headers = request.encode()
        assert parse_qs(query, strict_parsing=True) == {"filename": ["/a b"], **expected}
        assert set(headers) == {REQUEST_HEADER}


@pytest.mark.parametrize("kind", REQUESTS)
@given(query=st.binary())
def test_any_query_is_decoded_or_refused(kind, query):
    """Nothing but an error for the client comes of nonsense."""
    try:
        kind.decode(query, {DIGEST_HEADER: query.decode("latin-1")})
    except ProgramError as e:
        assert isinstance(e, (RequestError, TooLargeError)) and str(e).isprintable()


@pytest.mark.parametrize(
    ("kind", "words", "complaint"),
    [
        (HashesRequest, {}, "method is missing"),
        (HashesRequest, {"method": "sha1", "offset": 5, "block_size": 10}, "multiple of the block size"),
        (ReadRequest, {}, "size is missing"),
        (ReadRequest, {"size": 5}, "offset is missing"),
        (ReadRequest, {"offset": 5}, "size is missing"),
        (WriteRequest, {}, "offset is missing"),
        (ResizeRequest, {}, "size is missing"),
        (ClaimRequest, {}, "run is missing"),
        (ClaimRequest, {"run": ""}, "hexadecimal"),
        (ClaimRequest, {"run": "DEAD"}, "hexadecimal"),
        (InfoRequest, {"run": "x"}, "hexadecimal"),
        (InfoRequest, {"file_id": ""}, "identity of a file"),
        (InfoRequest, {"file_id": "a b"}, "identity of a file"),
    ],
)
def test_incomplete_requests(kind, words, complaint):
    """What is missing or makes no sense is named."""
    with pytest.raises(RequestError, match=complaint):
        decode(kind, **words)


def test_what_is_optional_has_a_default():
    """And what is unknown is ignored."""
    request = decode(HashesRequest, method="md5", nonce="x", whatever="1")
    assert request == HashesRequest(filename="/a", method="md5", block_size=1048576, concurrency=1)
    assert decode(ReadRequest, offset=1, size=2).data is True
    assert decode(ClaimRequest, run="ab").mode == 0o666


def test_extents_stand_for_offset_and_size():
    """One of the two says what is meant."""
    assert decode(ReadRequest, offset=5, size=7).get_extents() == (Extent(5, 7),)
    assert decode(ReadRequest, extents="1:2,5:1", offset=7, size=9).get_extents() == (Extent(1, 2), Extent(5, 1))


def test_bodies_fit_their_extents():
    """They have a length, and it is that of the extents."""
    assert decode(WriteRequest, offset=5).get_extents(7) == (Extent(5, 7),)
    request = decode(WriteRequest, extents="1:2,5:1")
    assert request.get_extents(3) == (Extent(1, 2), Extent(5, 1))
    for length, error in ((None, LengthRequiredError), (2, RequestError), (4, RequestError)):
        with pytest.raises(error):
            request.get_extents(length)
    for offset, length in ((0, MAX_BLOCK_SIZE + 1), (MAX_OFFSET, 1)):
        with pytest.raises(TooLargeError):
            decode(WriteRequest, offset=offset).get_extents(length)


def test_digest_of_a_body_is_in_a_header():
    """It isn't part of the URL, and an empty header is none."""
    request = decode(WriteRequest, {DIGEST_HEADER: "ab" * 16}, offset=1)
    assert request.digest == "ab" * 16
    assert decode(WriteRequest, {DIGEST_HEADER: ""}, offset=1).digest == ""
    query, headers = request.encode()
    assert headers[DIGEST_HEADER] == "ab" * 16 and "digest" not in query
    with pytest.raises(RequestError, match="32 hexadecimal digits"):
        decode(WriteRequest, {DIGEST_HEADER: "ab"}, offset=1)


# Words {{{1


@pytest.mark.parametrize("name", ["/a", "/a b?&#=+%\n", "/é", "/\udcff\udc80", "/" + "x" * 5000, "//a/../b"])
def test_filename_survives(name):
    """All names that Linux allows arrive as they are."""
    query, headers = InfoRequest(filename=name).encode()
    assert InfoRequest.decode(query.encode("ascii"), headers).filename == name


@pytest.mark.parametrize(
    "query, complaint",
    [
        (b"", "filename is missing"),
        (b"filename", "absolute"),
        (b"filename=", "absolute"),
        (b"filename=a/b", "absolute"),
        (b"filename=../a", "absolute"),
        (b"filename=/a%00b", "NUL"),
        (b"filename=%00/a", "NUL"),
        (b"Filename=/a", "filename is missing"),
    ],
)
def test_impossible_filenames(query, complaint):
    """A name is absolute and has no NUL byte."""
    with pytest.raises(RequestError, match=complaint):
        InfoRequest.decode(query, {})


@pytest.mark.parametrize(
    "query, complaint",
    [
        (b"a=1&a=2", "twice"),
        (b"filename=/a&filename=/a", "twice"),
        (b"a=\xff", "malformed"),
        (b"&".join(b"a%i=1" % i for i in range(1000)), "malformed"),
    ],
)
def test_malformed_queries(query, complaint):
    """A parameter comes once, escaped, and there aren't many of them."""
    with pytest.raises(RequestError, match=complaint):
        parse_query(query)


def test_log_learns_of_malformed_requests_too():
    """Of two names the first one counts, and nothing is an error."""
    assert peek("filename=/a&filename=/b&run=x%20y") == ("/a", "x y")
    assert peek("") == peek("&".join(f"a{i}=1" for i in range(1000))) == (None, "")


@pytest.mark.parametrize("text, expected", [("0", 0), ("7", 7), (str(MAX_OFFSET), MAX_OFFSET)])
def test_integers(text, expected):
    """Plain decimal numbers from 0 to the largest offset that there is."""
    assert decode(ResizeRequest, size=text).size == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "-0", "+1", " 1", "1 ", "1\n", "01", "1.0", "1e3", "0x10", "1_000", "٣", "a", "\udcff", "9" * 20,
     "9" * 5000],
)  # fmt: skip
def test_impossible_integers(text):
    """Whatever else int() would take isn't a number here."""
    with pytest.raises(RequestError, match="parameter size must be an integer"):
        decode(ResizeRequest, size=os.fsencode(text))


def test_integers_have_bounds():
    """Too small is malformed, too large is too large."""
    assert Integer(10, 10).read("n", "10") == 10
    with pytest.raises(RequestError, match="at least 11"):
        Integer(11).read("n", "10")
    with pytest.raises(TooLargeError, match="limit is 9"):
        Integer(0, 9).read("n", "10")
    with pytest.raises(TooLargeError):
        decode(ResizeRequest, size=MAX_OFFSET + 1)


@pytest.mark.parametrize(
    "text",
    ["", ",", "1", "1:", ":1", "1:0", "-1:1", "1:-1", "1:2,", ",1:2", "1:2:3", "1:2;3:4", "1: 2", "a:b", "1:2,x"],
)
def test_impossible_extents(text):
    """Anything but pairs of numbers is refused."""
    with pytest.raises(RequestError, match="isn't an extent"):
        decode(ReadRequest, extents=text)


@pytest.mark.parametrize(
    "text",
    [
        f"0:{MAX_BLOCK_SIZE + 1}",
        f"0:{MAX_BLOCK_SIZE},{MAX_BLOCK_SIZE}:1",
        f"{MAX_OFFSET}:1",
        "9999999999999999999:1",
        ",".join(f"{i}:1" for i in range(MAX_EXTENTS + 1)),
    ],
    ids=["one", "together", "beyond", "far beyond", "many"],
)
def test_extents_have_bounds(text):
    """A request is neither larger than allowed nor beyond what a file can be."""
    with pytest.raises(TooLargeError):
        decode(ReadRequest, extents=text)


LAYOUTS = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1, max_size=600).map(lay_out)


@given(LAYOUTS)
def test_packed_extents_survive(extents):
    """Whatever the distances are, and they take a few characters each."""
    text = Packed().write(extents)
    assert Packed().read("packed", text) == extents
    assert len(text) < 10 + 3 * len(extents)


@pytest.mark.parametrize(
    "text", ["", "A", "AA", "AAAA", "gICAgICAgICAgICA", "AQEA", "AQABAQ", "AQEAAA", "!", "AQEB==", "é"]
)
def test_impossible_packed_extents(text):
    """What isn't whole, or has no size, is refused."""
    with pytest.raises(RequestError, match="malformed"):
        decode(ReadRequest, packed=text)


@given(st.text(st.sampled_from("ABCgQwxyz019_-"), max_size=40))
def test_any_packed_extents_are_read_or_refused(text):
    """Nothing but an error for the client comes of nonsense."""
    try:
        extents = decode(ReadRequest, packed=text).packed
    except (RequestError, TooLargeError):
        return
    assert extents and all(extent.size > 0 for extent in extents)


def test_packed_extents_have_bounds():
    """Neither too many, nor beyond what a file can be."""
    most = tuple(Extent(2 * number, 1) for number in range(MAX_PACKED))
    assert decode(ReadRequest, packed=Packed().write(most)).get_extents() == most
    for extents in ((*most, Extent(MAX_PACKED * 2, 1)), (Extent(MAX_OFFSET, 1),), (Extent(0, MAX_BLOCK_SIZE + 1),)):
        with pytest.raises(TooLargeError):
            decode(ReadRequest, packed=Packed().write(extents))


@given(st.just(()) | LAYOUTS, st.integers(0, 4000))
def test_extents_are_split_where_a_url_has_no_room(extents, room):
    """All of them are left, in their order, and no part takes more than there is, unless it is a single one."""
    parts = list(split(extents, room))
    assert tuple(extent for part in parts for extent in part) == extents
    for part in parts:
        assert len(part) == 1 or len(quote_plus(choose_form(part)[1].write(part))) <= room
    assert len(parts) < 2 or len(quote_plus(choose_form(extents)[1].write(extents))) > room


def test_largest_extent_takes_as_much_room_as_it_may():
    """So it's known beforehand how many there is room for."""
    largest = Extents().write([Extent(MAX_OFFSET, MAX_BLOCK_SIZE)] * 2)
    assert len(quote_plus(largest)) + len(quote_plus(",")) == 2 * EXTENT_LENGTH


@pytest.mark.parametrize("size", [0, 4095, 6000, 512 * 1024])
def test_pieces_have_certain_sizes(size):
    """Powers of two, neither tiny nor huge, and not too many of them."""
    with pytest.raises((RequestError, TooLargeError)):
        decode(PiecesRequest, extents="0:10", size=size, method="md5")
    with pytest.raises(TooLargeError, match="4096 pieces"):
        decode(PiecesRequest, extents=f"0:{4096 * 4096 + 1}", size=4096, method="md5")


@pytest.mark.parametrize("text", [f"0:{MAX_BLOCK_SIZE}", f"{MAX_OFFSET - 1}:1"])
def test_extents_at_the_bounds(text):
    """The limits themselves are allowed."""
    assert decode(ReadRequest, extents=text).extents


def test_digests_are_checked():
    """The digest that goes with bytes has 32 hexadecimal digits, in small letters."""
    assert check_digest("0123456789abcdef" * 2) == "0123456789abcdef" * 2
    for digest in ["", "0" * 31, "0" * 33, "0" * 31 + "g", "A" * 32, "0" * 31 + " ", "0" * 32 + "\n", "é", "a" * 5000]:
        with pytest.raises(RequestError, match="32 hexadecimal digits") as info:
            check_digest(digest)
        assert len(str(info.value)) < 200
