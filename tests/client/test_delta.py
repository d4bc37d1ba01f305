"""The geometry of blocks, and how two streams of digests become work."""

from __future__ import annotations

import random
from itertools import count, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdiffcopy.blocks import (
    MAX_OFFSET,
    Block,
    BlockDigest,
    Extent,
    Hole,
    align,
    block_length,
    count_blocks,
    find_layout,
    halve,
    intersect,
    subtract,
)
from pdiffcopy.client import delta
from pdiffcopy.client.delta import MAX_PARTS, Comparison, Sparse, make_batches
from pdiffcopy.digests import digest_blockwise, digest_layout, new_hasher
from pdiffcopy.exceptions import ProtocolError

BLOCK = 10


def in_order(*arguments):
    """The digests in order (no file here has holes)."""
    return (item.digest for item in delta.in_order(*arguments))


def compare(source, target, size, block_size):
    """Compare two streams of digests, neither of which has holes."""
    streams = [(BlockDigest(i * block_size, digest) for i, digest in enumerate(x)) for x in (source, target)]
    return Comparison(size, block_size, Sparse.IGNORED, new_hasher).compare(*streams)


def make_digests(size, block_size=BLOCK, start=0):
    return [BlockDigest(offset, f"{offset:08x}") for offset in range(start, size, block_size)]


def make_blocks(changes, block_size=BLOCK, last=None):
    """A block for each flag (the last one may be shorter)."""
    blocks = [Block(i * block_size, block_size, flag, f"{i:04x}") for i, flag in enumerate(changes)]
    if blocks and last:
        blocks[-1] = blocks[-1]._replace(size=last)
    return blocks


# Geometry {{{1


@pytest.mark.parametrize(
    "size, blocks, last",
    [(0, 0, 0), (1, 1, 1), (9, 1, 9), (10, 1, 10), (11, 2, 1), (19, 2, 9), (20, 2, 10), (21, 3, 1), (57, 6, 7)],
)
def test_geometry(size, blocks, last):
    """All blocks but the last one are whole, the last one has what remains, and there is nothing behind it."""
    assert count_blocks(size, BLOCK) == blocks
    lengths = [block_length(offset, size, BLOCK) for offset in range(0, size, BLOCK)]
    assert lengths == [BLOCK] * (blocks - 1) + ([last] if blocks else [])
    assert block_length(blocks * BLOCK, size, BLOCK) == 0
    assert block_length((blocks + 7) * BLOCK, size, BLOCK) == 0


def test_geometry_is_exact_for_huge_files():
    """No rounding error, whatever the size."""
    assert count_blocks(2**63 - 1, 3) == (2**63 + 1) // 3
    assert block_length(2**63 - 2, 2**63 - 1, 2) == 1


def test_extents_meet_and_are_left():
    """What lies in some extents, and what is left of them."""
    extents = [Extent(0, 10), Extent(20, 10), Extent(40, 10)]
    assert list(intersect(Extent(5, 40), extents)) == [Extent(5, 5), Extent(20, 10), Extent(40, 5)]
    assert list(intersect(Extent(10, 10), extents)) == []
    assert list(intersect(Extent(60, 10), extents)) == []
    assert list(subtract(extents, [])) == extents
    assert list(subtract(extents, [Extent(5, 20)])) == [Extent(0, 5), Extent(25, 5), Extent(40, 10)]
    assert list(subtract(extents, [Extent(0, 3), Extent(5, 5), Extent(20, 10), Extent(41, 2)])) == [
        Extent(3, 2), Extent(40, 1), Extent(43, 7)
    ]  # fmt: skip


# Putting in order, distrusting {{{1


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 1000, 1005])
@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_digests_are_put_in_order(size, seed):
    """The digests come out in the order of the file, in whatever order they came in."""
    digests = make_digests(size)
    expected = [digest for _, digest in digests]
    random.Random(seed).shuffle(digests)
    assert list(in_order(digests, 0, size, BLOCK)) == expected


def test_order_can_begin_in_the_middle():
    """A stream that is resumed begins at its own offset."""
    assert list(in_order(reversed(make_digests(55, start=30)), 30, 55, BLOCK)) == ["0000001e", "00000028", "00000032"]
    assert list(in_order([], 60, 60, BLOCK)) == []


def test_digests_come_as_soon_as_they_can():
    """A digest is passed on when all digests before it are known, without waiting for further ones."""

    def stream():
        yield BlockDigest(10, "bb")
        yield BlockDigest(0, "aa")
        raise AssertionError("too eager")

    assert list(islice(in_order(stream(), 0, 100, BLOCK), 2)) == ["aa", "bb"]


@pytest.mark.parametrize(
    "digests",
    [
        [],
        [(0, "aa")],
        [(0, "aa"), (20, "cc")],
        [(10, "bb"), (20, "cc")],
        [(0, "aa"), (0, "aa"), (10, "bb"), (20, "cc")],
        [(10, "bb"), (10, "bb"), (0, "aa"), (20, "cc")],
        [(0, "aa"), (10, "bb"), (15, "cc")],
        [(0, "aa"), (10, "bb"), (30, "cc")],
        [(-10, "aa"), (0, "aa"), (10, "bb"), (20, "cc")],
        [(0, "aa"), (10, "bbbb"), (20, "cc")],
        [(0, "aa"), (10, ""), (20, "cc")],
    ],
    ids=[
        "none", "end", "gap", "head", "twice", "early twice", "odd offset", "beyond", "negative", "longer", "empty",
    ],
)  # fmt: skip
def test_impossible_digests_are_refused(digests):
    """A block that is missing, comes twice, lies elsewhere or has a digest of another length is an error."""
    with pytest.raises(ProtocolError, match="offset"):
        list(in_order([BlockDigest(*item) for item in digests], 0, 25, BLOCK))


def test_digests_before_the_start_are_refused():
    """When a stream is resumed, what was there before can't come again."""
    with pytest.raises(ProtocolError, match="offset 10"):
        list(in_order(make_digests(50, start=10), 20, 50, BLOCK))


def test_digests_of_an_empty_file_are_refused():
    """Where there is no block, there is no digest."""
    with pytest.raises(ProtocolError, match="impossible"):
        list(in_order(make_digests(1), 0, 0, BLOCK))


def test_digests_far_ahead_are_refused(monkeypatch):
    """A peer can't fill the memory with digests while it owes the first one."""
    monkeypatch.setattr(delta, "REORDER_WINDOW", 5)
    late = [*make_digests(60, start=10), BlockDigest(0, "00000000")]
    assert len(list(in_order(late, 0, 60, BLOCK))) == 6
    endless = (BlockDigest(i * BLOCK, "00000000") for i in count(1))
    with pytest.raises(ProtocolError, match="offset 60"):
        list(in_order(endless, 0, 10**9, BLOCK))
    assert next(endless).offset == 70


def test_endless_digests_are_not_followed():
    """What comes after the last block isn't even read."""
    assert len(list(in_order((BlockDigest(i * BLOCK, "aa") for i in count()), 0, 995, BLOCK))) == 100


@given(st.data())
def test_any_damage_to_a_stream_is_noticed(data):
    """Whatever a peer sends: either the digests come out in order and complete, or the stream is refused."""
    size = data.draw(st.integers(0, 60))
    items = st.tuples(st.integers(-20, 80), st.sampled_from(["aa", "bb", "abcd", ""]))
    stream = [BlockDigest(*item) for item in data.draw(st.lists(items, max_size=10))]
    stream += data.draw(st.permutations(make_digests(size)))
    stream = [digest._replace(digest=digest.digest[:2]) for digest in stream]
    wanted = [dict(stream[::-1]).get(offset) for offset in range(0, size, BLOCK)]
    try:
        assert list(in_order(stream, 0, size, BLOCK)) == wanted
    except ProtocolError:
        offsets = [offset for offset, _ in stream]
        assert offsets != list(range(0, size, BLOCK))


# Comparing {{{1


@pytest.mark.parametrize(
    "source, target, size, changed",
    [
        ("", "", 0, ""),
        ("", "abc", 0, ""),
        ("a", "", 1, "1"),
        ("abc", "abc", 30, "000"),
        ("abc", "axc", 30, "010"),
        ("abc", "ab", 25, "001"),
        ("abc", "", 21, "111"),
        ("abc", "abcdef", 30, "000"),
        ("ab", "xyz", 11, "11"),
    ],
)
def test_compare(source, target, size, changed):
    """Each block of the source is compared with its counterpart; without one it counts as changed."""
    blocks = list(compare(iter(source), iter(target), size, BLOCK))
    assert [(block.offset, block.size, block.digest) for block in blocks] == [
        (i * BLOCK, block_length(i * BLOCK, size, BLOCK), digest) for i, digest in enumerate(source)
    ]
    assert [block.changed for block in blocks] == [flag == "1" for flag in changed]
    assert sum(block.size for block in blocks) == size


NOTHING = new_hasher(bytes(BLOCK)).hexdigest()
KINDS = {
    "-": Hole(0, BLOCK),
    "0": BlockDigest(0, NOTHING),
    "a": BlockDigest(0, "aa"),
    "b": BlockDigest(0, "bb"),
    "A": BlockDigest(0, "aa.1"),
    "Z": BlockDigest(0, NOTHING + ".1"),
}


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        (Sparse.AUTO, ["= h h h h h", "z = z z z z", "m m = m m m", "m m m = m m", "m m m m = m", "m m m m m ="]),
        (Sparse.ALWAYS, ["= h h h h h", "= h h h h h", "m m = m = m", "m m m = m m", "m m = m = m", "= h h h h h"]),
        (Sparse.NEVER, ["z = z z z =", "z = z z z =", "m m = m = m", "m m m = m m", "m m = m = m", "z = z z z ="]),
    ],
)
def test_what_becomes_of_holes_and_zeros(sparse, expected):
    """Moved (m), made a hole (h), filled with zeros (z), or left alone (=), for each kind of target."""
    for source, outcomes in zip(KINDS, expected, strict=True):
        found = []
        for target in KINDS.values():
            (block,) = Comparison(BLOCK, BLOCK, sparse, new_hasher).compare([KINDS[source]], [target])
            found.append({"": "m", "holes": "h", "zeros": "z"}[block.fill] if block.changed else "=")
        assert " ".join(found) == outcomes, source


def test_holes_of_blocks_that_are_no_whole_grains():
    """A block that is zeros, but for its whole grains, is as much of a hole as it can be."""
    size, block_size, grain = 30_000, 10_000, 4096
    zeros = new_hasher(bytes(block_size)).hexdigest()
    layouts = {text: digest_layout(text) for text in ("", "2288:6384", "2288:10384")}
    source, outcomes = [Hole(0, size)], []
    for layout in layouts.values():
        target = [Hole(0, 10_000), BlockDigest(10_000, f"{zeros}.{layout}".rstrip(".")), Hole(20_000, 10_000)]
        comparison = Comparison(size, block_size, Sparse.AUTO, new_hasher, grain)
        outcomes.append([block.changed for block in comparison.compare(source, target)])
    assert outcomes == [[False, True, False], [False, False, False], [False, True, False]]
    assert find_layout(Extent(10_000, 10_000), source, block_size, grain) == "2288:6384"


@pytest.mark.parametrize("kind", ["--", "-0"])
def test_zeros_of_any_size_are_told_in_a_moment(kind):
    """In parts for many workers, but not in too many."""
    size = MAX_OFFSET
    target = [Hole(0, size)] if kind == "--" else []
    blocks = list(Comparison(size, BLOCK, Sparse.NEVER, new_hasher).compare([Hole(0, size)], target))
    assert sum(block.size for block in blocks) == size
    assert sum(block.blocks for block in blocks) == -(-size // BLOCK)
    assert all(block.changed and block.fill == "zeros" for block in blocks)
    assert 1000 < len(blocks) <= 2 * MAX_PARTS


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_compared_like_their_blocks(seed):
    """However long the holes of both sides are, the outcome is that of comparing block by block."""
    generator = random.Random(seed)
    files = ["".join(generator.choice("--0ab") * generator.choice([1, 1, 3]) for _ in range(20))[:20] for _ in range(2)]
    size = 20 * BLOCK - 3

    def tell(letters: str, joined: bool) -> list:
        items = []
        for index, letter in enumerate(letters):
            offset, length = index * BLOCK, block_length(index * BLOCK, size, BLOCK)
            if letter != "-":
                digest = new_hasher(bytes(length)).hexdigest() if letter == "0" else letter * 2
                items.append(BlockDigest(offset, digest))
            elif joined and items and isinstance(items[-1], Hole):
                items[-1] = Hole(items[-1].offset, items[-1].size + length)
            else:
                items.append(Hole(offset, length))
        return items

    for sparse in (Sparse.AUTO, Sparse.ALWAYS, Sparse.NEVER):
        outcomes = []
        for joined in (True, False):
            comparison = Comparison(size, BLOCK, sparse, new_hasher)
            blocks = list(comparison.compare(*(tell(letters, joined) for letters in files)))
            assert sum(block.blocks for block in blocks) == 20
            assert sum(block.size for block in blocks) == size
            outcomes.append(
                [(at, block.changed, block.fill) for block in blocks
                 for at in range(block.offset, block.offset + block.size, BLOCK)]
            )  # fmt: skip
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("item", [Hole(0, 15), Hole(0, 40), Hole(10, 10), Hole(5, 10)])
def test_impossible_holes(item):
    """They keep to the order, consist of blocks, and end with the file."""
    with pytest.raises(ProtocolError, match="impossible"):
        list(delta.in_order([item], 0, 35, BLOCK))
    assert list(delta.in_order([Hole(0, 20), Hole(20, 15)], 0, 35, BLOCK)) == [Hole(0, 20), Hole(20, 15)]


@pytest.mark.parametrize(
    ("extent", "unit", "stop", "expected"),
    [((0, 10), 5, None, (0, 10)), ((1, 8), 5, None, None), ((1, 9), 5, None, (5, 5)), ((1, 13), 5, None, (5, 5)),
     ((1, 13), 5, 14, (5, 9)), ((11, 3), 5, 14, None), ((MAX_OFFSET - 7, 7), 4, MAX_OFFSET, (MAX_OFFSET - 7, 7)),
     ((MAX_OFFSET - 7, 7), 4, None, (MAX_OFFSET - 7, 4))],
)  # fmt: skip
def test_whole_units(extent, unit, stop, expected):
    """The last one may end early."""
    assert align(Extent(*extent), unit, stop) == expected


def test_batches_of_holes():
    """A hole of any size is a part of a batch, and takes no time; zeros count like what is moved."""
    terabyte = 2**40
    blocks = [
        Block(0, BLOCK, True, "aa"),
        Block(BLOCK, BLOCK, True, "", "zeros"),
        Block(2 * BLOCK, terabyte, True, "", "holes", terabyte // BLOCK),
        Block(2 * BLOCK + terabyte, BLOCK, True, "bb"),
    ]
    (batch,) = make_batches(blocks)
    assert (batch.extents, batch.zeros) == (
        (Extent(0, BLOCK), Extent(2 * BLOCK + terabyte, BLOCK)),
        (Extent(BLOCK, BLOCK),),
    )
    assert batch.holes == (Extent(2 * BLOCK, terabyte),)
    assert (batch.size, batch.blocks_changed) == (2 * BLOCK, 3 + terabyte // BLOCK)
    assert (batch.bytes_compared, batch.digest) == (3 * BLOCK + terabyte, digest_blockwise(["aa", "bb"]))


def test_compare_is_lazy():
    """A block comes out as soon as both digests are known."""

    def one_digest():
        yield "aa"
        raise AssertionError("too eager")

    assert next(compare(one_digest(), one_digest(), 100, BLOCK)) == Block(0, 10, False, "aa")


# Making batches {{{1


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    """Limits that small tests reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "BATCH_SIZE", 4 * BLOCK)
        patch.setattr(delta, "HELD_BATCH_SIZE", 3 * BLOCK)
        patch.setattr(delta, "COMPARE_WINDOW", 12 * BLOCK)
        patch.setattr(delta, "FIRST_WINDOW", 8 * BLOCK)
        patch.setattr(delta, "LOOK_WINDOW", 2 * BLOCK)
        yield


@pytest.mark.parametrize(
    "changes, expected",
    [
        ("", []),
        ("0", [[]]),
        ("1", [[(0, 10)]]),
        ("0110", [[(10, 20)]]),
        ("10101", [[(0, 10), (20, 10), (40, 10)]]),
        ("1111", [[(0, 40)]]),
        ("11111", [[(0, 40)], [(40, 10)]]),
        ("1101011", [[(0, 20), (30, 10), (50, 10)], [(60, 10)]]),
        ("0" * 12, [[]]),
        ("0" * 12 + "1", [[], [(120, 10)]]),
        ("1" + "0" * 11 + "1", [[(0, 10)], [(120, 10)]]),
    ],
)
def test_batches(changes, expected):
    """Neighbors are joined, several extents travel together, and limits close a batch."""
    batches = list(make_batches(make_blocks(flag == "1" for flag in changes)))
    assert [[tuple(extent) for extent in batch.extents] for batch in batches] == expected


def test_extents_of_a_batch_are_limited():
    """An old peer takes one extent a request: neighbors are still joined."""
    changes = [flag == "1" for flag in "110100111"]
    batches = list(make_batches(make_blocks(changes), max_extents=1))
    assert [batch.extents for batch in batches] == [(Extent(0, 20),), (Extent(30, 10),), (Extent(60, 30),)]


def test_block_larger_than_a_batch_is_not_cut():
    """A block travels whole, and alone."""
    batches = list(make_batches(make_blocks([True] * 3, block_size=100)))
    assert [batch.extents for batch in batches] == [(Extent(0, 100),), (Extent(100, 100),), (Extent(200, 100),)]


@given(
    changes=st.lists(st.booleans(), max_size=80),
    block_size=st.sampled_from([1, 3, 10, 39, 40, 41, 130]),
    short=st.booleans(),
    max_extents=st.integers(1, 5),
    keep=st.booleans(),
    awaited=st.booleans(),
)
def test_batches_carry_exactly_what_changed(changes, block_size, short, max_extents, keep, awaited):
    """The extents are the changed blocks, once each, in order; the limits hold; what was compared adds up."""
    blocks = make_blocks(changes, block_size, last=1 if short else None)
    batches = list(make_batches(blocks, max_extents, keep, lambda: awaited))
    changed = [block for block in blocks if block.changed]

    payload = [n for batch in batches for offset, size in batch.extents for n in range(offset, offset + size)]
    assert payload == [n for block in changed for n in range(block.offset, block.offset + block.size)]

    for batch in batches:
        assert len(batch.extents) <= max_extents
        limit = delta.BATCH_SIZE if max_extents > 1 and not keep else delta.HELD_BATCH_SIZE
        assert batch.size <= max(limit, block_size)
        assert batch.bytes_compared < delta.COMPARE_WINDOW + block_size
        # Neighbors are joined within a batch.
        assert all(sum(left) < right.offset for left, right in pairwise(batch.extents))
        own = [b for b in changed if any(e.offset <= b.offset < e.offset + e.size for e in batch.extents)]
        assert batch.blocks_changed == len(own)
        assert batch.digest == digest_blockwise(b.digest for b in own)
        assert batch.digests == (tuple(BlockDigest(b.offset, b.digest) for b in own) if keep else ())

    assert sum(batch.blocks_compared for batch in batches) == len(blocks)
    assert sum(batch.blocks_changed for batch in batches) == len(changed)
    assert sum(batch.bytes_compared for batch in batches) == sum(block.size for block in blocks)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 1))
def test_halves_are_the_whole(sizes):
    """Both have the same size, none has an empty extent or more extents than there were, and no byte is lost."""
    extents = [Extent(100 * index, size) for index, size in enumerate(sizes)]
    halves = halve(extents)
    left, right = (sum(extent.size for extent in half) for half in halves)
    assert (left, right) == (sum(sizes) // 2, -(-sum(sizes) // 2))
    assert all(extent.size > 0 for half in halves for extent in half)
    assert max(map(len, halves)) <= len(extents)

    def payload(extents):
        return [n for offset, size in extents for n in range(offset, offset + size)]

    assert payload(halves[0]) + payload(halves[1]) == payload(extents)


@pytest.mark.parametrize("changed", [True, False])
def test_batches_are_made_on_the_way(changed):
    """Of an endless file, batches come out while blocks go in, and no more of it is read than a batch needs."""
    taken = []

    def endless():
        for i in count():
            taken.append(i)
            yield Block(i * BLOCK, BLOCK, changed, "")

    batches = make_batches(endless())
    for number in range(1, 50):
        batch = next(batches)
        assert len(taken) <= number * 12 + 1
        assert batch.size == (4 * BLOCK if changed else 0)
        assert batch.bytes_compared == (4 if changed else 12) * BLOCK


def test_awaited_batches_come_early():
    """The first batch waits for a small part of the file only, each further one for a quarter more, up to a limit."""
    batches = make_batches(make_blocks([False] * 52), is_awaited=lambda: True)
    assert [batch.blocks_compared for batch in batches] == [8, 10, 12, 12, 10]


def test_batches_fill_up_while_nobody_waits():
    """Fewer requests move the same bytes, and it's noticed soon when somebody begins to wait."""
    looks = iter([False, True, False, False, True])
    batches = make_batches(make_blocks([False] * 34), is_awaited=lambda: next(looks))
    # Looks after 8 and 10 blocks, then after 10, then (at the limit of 12, whoever waits) not any more.
    assert [batch.blocks_compared for batch in batches] == [10, 12, 12]
    assert list(looks) == [False, True]
