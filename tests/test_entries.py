"""Which series of entries are listings: what a server can make a client believe of a folder."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.entries import Entry, Kind, check_entries, skip_to
from pdiffcopy.exceptions import ProtocolError

FOLDER, FILE, LINK = Kind.FOLDER, Kind.FILE, Kind.LINK


def make(*names: str) -> list[Entry]:
    """Entries of these names: those that end with a slash are folders, the others are files. The first is the top."""
    return [Entry("", FOLDER), *(Entry(name.rstrip("/"), FOLDER if name.endswith("/") else FILE) for name in names)]


def check(entries: list[Entry], depth: int = 100) -> None:
    """What passes is what came."""
    assert list(check_entries(entries, depth)) == entries


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["a"],
        ["a", "b", "c/"],
        ["a/", "a/b", "a/c", "a.b"],  # "." comes before "/", but the components count
        ["a/", "a/b/", "a/b/c", "a/d/", "b"],
        ["a/", "a/b/", "a/b/c/", "a/b/c/d", "b/", "b/b"],
        ["...", "..a", ".a", "a\tb", "a\n", "a b", "a\\..\\b", "~"],
        ["z", "\u00e9", "\udcff"],
    ],
)
def test_listings_pass(names):
    """The order is that of the bytes of each component, and a folder comes before what is in it."""
    check(make(*names))


@pytest.mark.parametrize("kind", Kind)
def test_listing_may_be_about_anything(kind):
    """Nothing follows what isn't a folder."""
    check([Entry("", kind)], 0)
    if kind is not FOLDER:
        with pytest.raises(ProtocolError, match="isn't a folder"):
            check([Entry("", kind), Entry("a", FILE)])


@pytest.mark.parametrize(
    "names",
    [
        [".."], ["."], ["/a"], ["/etc/passwd"], ["../a"], ["a/", "a/.."], ["a/", "a/../b"], ["a/", "a/."],
        ["a/", "a//b"], ["a\0"], ["a/", "a/\0"], ["a/", "a/b/../../../c"],
    ],
    ids=repr,
)  # fmt: skip
def test_names_that_lead_elsewhere(names):
    """No name gets through that isn't below the folder, as it stands there."""
    with pytest.raises(ProtocolError, match="can't be the name") as info:
        check(make(*names))
    assert str(info.value).isprintable()


@pytest.mark.parametrize(
    "names, fault",
    [
        (["a", "a"], "twice"),
        (["a/", "a"], "twice"),
        (["a", "b", "a"], "twice"),
        (["b", "a"], "too late"),
        (["a/", "a/c", "a/b"], "too late"),
        (["a/", "b/", "a/b"], "too late"),
        (["a.b", "a/", "a/b"], "too late"),
        (["\udcff", "\u00e9"], "too late"),
        (["a", ""], "twice"),
        (["a/b"], "isn't a folder"),
        (["a", "a/b"], "isn't a folder"),
        (["a/", "a/b", "a/b/c"], "isn't a folder"),
        (["a/", "a/b/c"], "isn't a folder"),
        (["a/", "a/b/", "a/b/c", "a/c/d"], "isn't a folder"),
        (["a/", "b/c"], "isn't a folder"),
        (["a/", "a/b", "ab/c"], "isn't a folder"),
    ],
    ids=repr,
)
def test_impossible_listings(names, fault):
    """Nothing comes twice, nothing out of order, and nothing but a folder that was told has something in it."""
    with pytest.raises(ProtocolError, match=fault):
        check(make(*names))


@pytest.mark.parametrize("entries", [[], [Entry("a", FILE)], [Entry("", FOLDER), Entry("", FOLDER)]])
def test_listing_begins_with_what_it_is_about(entries):
    """Otherwise nobody knows what the name leads to."""
    with pytest.raises(ProtocolError):
        check(entries)


def test_what_is_missing_is_in_no_folder():
    """That makes sense for the thing itself only."""
    with pytest.raises(ProtocolError, match="missing"):
        check([Entry("", FOLDER), Entry("a", Kind.MISSING)])


@pytest.mark.parametrize("depth", range(4))
def test_nothing_is_deeper_than_what_was_asked_for(depth):
    """However deep the folders are in reality."""
    entries = make("a/", "a/b/", "a/b/c")
    check(entries[: depth + 1], depth)
    if depth < 3:
        with pytest.raises(ProtocolError, match="deeper"):
            check(entries, depth)


NAMES = st.lists(st.sampled_from(["a", "b", "..", "", ".", "\0", "c"]), max_size=3).map("/".join)


@given(st.lists(st.builds(Entry, NAMES, st.sampled_from([FOLDER, FILE, LINK])), max_size=6))
def test_whatever_passes_is_a_listing(entries):
    """Any series of entries is refused, or has all of the properties that a client relies on."""
    passed = []
    try:
        passed += check_entries([Entry("", FOLDER), *entries], 3)
    except ProtocolError:
        return
    kinds = {entry.name: entry.kind for entry in passed}
    assert len(kinds) == len(passed)
    assert [entry.place for entry in passed] == sorted(entry.place for entry in passed)
    for entry in passed[1:]:
        assert not {"", ".", ".."}.intersection(entry.name.split("/")) and "\0" not in entry.name
        assert os.path.normpath(entry.name) == entry.name
        assert kinds[os.path.dirname(entry.name)] is FOLDER


def test_check_takes_no_memory():
    """However much a server lists: one entry is remembered."""
    entries = (Entry(f"{number:0200d}" if number else "", FILE if number else FOLDER) for number in range(20_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in check_entries(entries, 1)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "wanted, found, rest",
    [
        (Entry("a", FOLDER, 0, 5), True, ["a/b", "c"]),
        (Entry("a/b", FILE), True, ["c"]),
        (Entry("c", FILE), True, []),
        (Entry("", FOLDER), True, ["a", "a/b", "c"]),
        (Entry("", Kind.MISSING), False, ["a", "a/b", "c"]),
        (Entry("a", FILE), False, ["a/b", "c"]),
        (Entry("b", FILE), False, []),
        (Entry("d", FILE), False, []),
    ],
)
def test_listing_goes_on_behind_an_entry(wanted, found, rest):
    """If that is still there, and what it was."""
    entries = iter(make("a/", "a/b", "c"))
    assert skip_to(wanted, entries) == found
    assert [entry.name for entry in entries] == rest
