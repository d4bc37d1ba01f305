"""The wire contract, the way back: answers that take long."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.blocks import MAX_OFFSET, BlockDigest, Hole
from pdiffcopy.digests import compute_digest
from pdiffcopy.entries import MAX_NAME, Entry, Kind
from pdiffcopy.exceptions import FileForbiddenError, ProtocolError, ReportedError, TransientError
from pdiffcopy.hashing import STRIPE_BLOCKS
from pdiffcopy.server import application
from pdiffcopy.streams import (
    MAX_EMPTY,
    MAX_LINE,
    MAX_UNCHECKED,
    add_check,
    encode_report,
    format_entries,
    format_hashes,
    parse_checked,
    parse_entry,
    parse_hash,
    parse_hashes,
)

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
    assert list(parse_checked(cut(add_check(format_hashes(items)) + b"done\n", positions), parse_hash)) == items


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


# Entries of a list {{{1

NAMES = st.binary(min_size=1, max_size=80).map(lambda name: name.replace(b"\0", b"")).map(os.fsdecode)
ENTRIES = st.builds(
    Entry,
    NAMES,
    st.sampled_from(Kind),
    st.integers(0, MAX_OFFSET),
    st.integers(1 - 10**30, 10**30 - 1),
    st.sampled_from(["", "fe00:123@0f6f1b3c", "~" * 80]),
)


@given(st.lists(ENTRIES, max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_entries_survive_any_cut(entries, positions):
    """Names are bytes: newlines, tabs and what isn't UTF-8 arrive as they are."""
    data = add_check(format_entries(entries)) + b"done\n"
    assert list(parse_checked(cut(data, positions), parse_entry)) == entries


def test_entries_are_ascii():
    """What a line looks like."""
    entries = [Entry("", Kind.FOLDER, 0, -5, "1:2@3"), Entry("a b/\udcff\n%é", Kind.FILE, 7, 8)]
    assert format_entries(entries) == b"folder\t0\t-5\t\t1:2@3\nfile\t7\t8\ta%20b/%FF%0A%25%C3%A9\n"


@pytest.mark.parametrize("byte", [b"a", b"\xff", b"/", b"\n"])
def test_longest_name_fits(byte):
    """However it's encoded, it's shorter than the longest line; one that is longer is refused."""
    entry = Entry(os.fsdecode(byte * MAX_NAME), Kind.FILE, MAX_OFFSET, 1 - 10**30, "~" * 80)
    line = format_entries([entry])
    assert len(line) < MAX_LINE
    assert parse_entry(line[:-1]) == entry
    with pytest.raises(ProtocolError):
        parse_entry(format_entries([entry._replace(name=entry.name + "a")])[:-1])


@pytest.mark.parametrize(
    "line",
    [
        b"x", b"file", b"file\t0\t0", b"file\t0\t0\ta\t", b"file\t0\t0\ta b", b"file\t0\t0\ta\\", b"file\t0\t0\t\xff",
        b"file\t0\t0\t%", b"file\t0\t0\t%4", b"file\t0\t0\t%4g", b"file\t0\t0\t%ff", b"file\t0\t0\ta\r",
        b"file\t-1\t0\ta", b"file\t01\t0\ta", b"file\t1.5\t0\ta", b"file\t0\t-0\ta", b"file\t0\t+1\ta",
        b"file\t9223372036854775808\t0\ta", b"file\t" + b"9" * 5000 + b"\t0\ta", b"file\t0\t" + b"9" * 31 + b"\ta",
        b"volume\t0\t0\ta", b"File\t0\t0\ta", b"\t0\t0\ta", b"file 0 0 a", b"0\taa",
    ],
)  # fmt: skip
def test_impossible_entries(line):
    """Anything but a kind that is known, a size, a time and an encoded name is refused."""
    with pytest.raises(ProtocolError) as info:
        list(parse_checked([add_check(line + b"\n")], parse_entry))
    assert str(info.value).isprintable() and len(str(info.value)) < 300


# Streams with checks {{{1

LINE = b"0\taa\n"


def read(*chunks):
    return list(parse_checked(chunks, parse_hash))


@pytest.mark.parametrize("beats", [b"", b"\n", b"\n" * 1000])
def test_empty_lines_tell_nothing(beats):
    """Wherever they are, and however many."""
    assert read(beats, LINE, beats, add_check(LINE)[len(LINE) :], beats, b"done\n") == [(0, "aa")]


def test_nothing_to_tell():
    """That is an empty line, and no check of nothing."""
    assert add_check(b"") == b"\n"
    assert read(b"done\n") == []


def test_nothing_is_believed_before_its_check():
    """A line that was damaged is another matter than one that makes no sense."""
    with pytest.raises(TransientError, match="damaged"):
        read(LINE, b"nonsense\n", b"=" + b"0" * 32 + b"\n", b"done\n")
    stream = parse_checked([add_check(LINE), add_check(b"nonsense\n")], parse_hash)
    assert next(stream) == (0, "aa")
    with pytest.raises(ProtocolError, match="malformed"):
        next(stream)


@pytest.mark.parametrize("end", [b"", LINE, LINE + b"done\n", add_check(LINE)])
def test_stream_without_an_end_is_incomplete(end):
    """It's the last line that says that there is nothing more."""
    with pytest.raises(ProtocolError, match="ends early"):
        read(add_check(LINE), end)


def test_problem_ends_a_stream():
    """It arrives with what is known about it."""
    report = encode_report(FileForbiddenError("Can't list {filename}: no", filename="/x")).encode("ascii")
    stream = parse_checked([add_check(LINE), report], parse_hash)
    assert next(stream) == (0, "aa")
    with pytest.raises(ReportedError, match="Can't list /x: no") as info:
        next(stream)
    assert info.value.status == 403


def test_unchecked_lines_are_bounded():
    """A server can't fill the memory by never sending a check, whether its lines are long, short or empty."""

    def endless(chunk, most):
        for _ in range(most // len(chunk) + 2):
            yield chunk
        raise AssertionError("too patient")

    for chunk, most in (
        (b"x" * 1000 + b"\n", MAX_UNCHECKED),
        (b"x\n" * 1000, MAX_UNCHECKED),
        (b"\n" * 1000, MAX_EMPTY),
    ):
        with pytest.raises(ProtocolError, match="without a check"):
            list(parse_checked(endless(chunk, most), parse_hash))


def test_servers_stay_below_the_bounds():
    """What they send between two checks at most, be it names that are as long as can be or digests."""
    assert application._ENTRIES * MAX_LINE <= MAX_UNCHECKED
    digest = BlockDigest(10**19 - 1, "a" * 512 + "." + "b" * 32)
    assert STRIPE_BLOCKS * len(format_hashes([digest])) <= MAX_UNCHECKED


def test_checks_are_digests_of_lines():
    """XXH128 of all that came since the last check, newlines included."""
    assert add_check(LINE * 2) == LINE * 2 + b"=" + compute_digest(LINE * 2).encode("ascii") + b"\n"
