"""What is wanted of a run, what does it do, and what has become of it?"""

from __future__ import annotations

import os
from enum import Enum
from operator import add
from typing import NamedTuple

from pdiffcopy.address import Address
from pdiffcopy.blocks import FileInfo, Metadata
from pdiffcopy.client.delta import Batch, Sparse
from pdiffcopy.exceptions import UsageError
from pdiffcopy.extents import MAX_EXTENTS
from pdiffcopy.methods import find_method
from pdiffcopy.pace import SLOW_RATE
from pdiffcopy.words import MAX_BLOCK_SIZE, MAX_LINE, check_concurrency

AUTO, FAST, COMMON = "auto", "blake3", "sha1"
"""The hash method that stands for FAST where both sides have that, and for COMMON otherwise."""

LEAST_MOVE = 4096
"""How many bytes may move in one go at any rate."""

SPARSE_CHOICES = tuple(choice.value for choice in (Sparse.AUTO, Sparse.ALWAYS, Sparse.NEVER))


class Options(NamedTuple):
    """What a user wants of a run (:class:`.Client` has the defaults)."""

    block_size: int
    concurrency: int
    delta_transfer: bool
    dry_run: bool
    fsync: bool
    hash_method: str
    verify: bool
    sparse: str
    atomic: bool
    perms: bool
    times: bool
    owner: bool
    group: bool
    bwlimit: int
    drop_cache: bool

    def select(self, metadata: Metadata) -> Metadata:
        """Pick the metadata that the target is to have."""
        return Metadata(
            mode=metadata.mode if self.perms else None,
            uid=metadata.uid if self.owner else None,
            owner=metadata.owner if self.owner else "",
            gid=metadata.gid if self.group else None,
            group=metadata.group if self.group else "",
            mtime_ns=metadata.mtime_ns if self.times else None,
        )

    def are_alike(self, ours: Metadata | None, theirs: Metadata | None) -> bool:
        """Whether a target is known to have all of the metadata that it is to have."""
        if not (ours and theirs):
            return False
        wanted, found = self.select(ours), self.select(theirs)
        # The number of somebody whose name is known on both sides doesn't count.
        if wanted.owner and found.owner:
            wanted, found = wanted._replace(uid=None), found._replace(uid=None)
        if wanted.group and found.group:
            wanted, found = wanted._replace(gid=None), found._replace(gid=None)
        return wanted == found

    @property
    def wants_metadata(self) -> bool:
        """Whether the target is to have any metadata of the source."""
        return self.perms or self.times or self.owner or self.group

    @property
    def workers(self) -> int:
        """How many processes move data: fewer where each of them would be slow."""
        return min(self.concurrency, max(self.bwlimit // SLOW_RATE, 1)) if self.bwlimit else self.concurrency

    @property
    def largest_move(self) -> int:
        """How many bytes move in one go at most: few where they are slow, or they would look like a stall."""
        return max(self.bwlimit // 4, LEAST_MOVE) if 0 < self.bwlimit < SLOW_RATE else MAX_BLOCK_SIZE

    def checked(self) -> Options:
        """Refuse what can't be meant, and find the name that both sides have for the hash method."""
        for name in ("block_size", "bwlimit", "concurrency"):
            if not isinstance(value := getattr(self, name), int):
                raise UsageError("{name} has to be a whole number, not {value}", name=name, value=repr(value))
        if not 0 < self.block_size <= MAX_BLOCK_SIZE:
            text = "The block size has to be from 1 byte to 1 GiB, not {size} bytes"
            raise UsageError(text, size=self.block_size)
        check_concurrency(self.concurrency)
        if self.sparse not in SPARSE_CHOICES:
            choices = ", ".join(SPARSE_CHOICES)
            raise UsageError("--sparse takes {choices}, not {value}", choices=choices, value=repr(self.sparse))
        method = str(self.hash_method)
        return self._replace(hash_method=AUTO if method.lower() == AUTO else find_method(method))


def make_run() -> str:
    """Make a name for a run, under which it claims what it writes to: nobody else has it."""
    return os.urandom(8).hex()


class Verification(Enum):
    """How what was moved is compared with what lies in the target."""

    NONE = "none"
    STATED = "stated"
    """The source reads what it sends once more, and states a digest."""
    BLOCKWISE = "blockwise"
    """By the digests that were compared, since they are what the source would state."""
    BY_HASHES = "by hashes"
    """By the hashes of the blocks, since the source is too old to state digests."""


class Target(NamedTuple):
    """What a run writes to, or compares."""

    address: Address
    info: FileInfo
    """What it was when it was claimed."""
    size: int
    """How much of it there is to compare, in bytes."""
    run: str = ""
    """The name under which it is claimed (empty when it can't be)."""
    baseline: Address | None = None
    """What has the same contents, and is compared in its place."""


class Plan(NamedTuple):
    """What a run does (child processes get a copy). It is made once, when the target has been claimed."""

    source: Address
    target: Address
    size: int
    """The size of the source in bytes."""
    target_size: int
    """How much of the target there is to compare, in bytes."""
    block_size: int
    method: str
    """The hash method, see :func:`.find_method`."""
    concurrency: int
    delta: bool
    """Whether the target is compared (otherwise all of the source is copied)."""
    verification: Verification
    piece_size: int = 0
    """In how large pieces changed blocks are compared once more, in bytes (0: they aren't)."""
    may_sample: bool = False
    """Whether not all of it has to be compared where everything seems to differ."""
    max_extents: int = MAX_EXTENTS
    """How many extents one request can carry."""
    url_room: int = MAX_LINE
    """How many characters they can take there."""
    largest_move: int = MAX_BLOCK_SIZE
    """How many bytes move in one go at most."""
    sparse: Sparse = Sparse.IGNORED
    grain: int = 0
    """The size of the smallest hole that matters, in bytes."""
    has_holes: bool = False
    """Whether the source has some."""
    surplus: int = 0
    """How many bytes the target has behind the end of the source, which are going to be cut off."""
    is_new: bool = False
    """Whether there was nothing in the target, so that it's one hole."""
    run: str = ""
    """The name under which the target is claimed (empty when it can't be)."""
    source_id: str = ""
    """Which file the source has to be (see :class:`.FileInfo`, empty when its server can't tell)."""
    target_id: str = ""
    """Which file the target has to be."""
    baseline: Address | None = None
    """What has the contents of the target, and is compared in its place."""
    baseline_id: str = ""
    """Which file that has to be."""

    @property
    def fills_new_file(self) -> bool:
        """Whether the target is new and going to have no holes."""
        has_holes = self.has_holes and self.sparse is not Sparse.NEVER
        return self.is_new and not has_holes and self.sparse is not Sparse.ALWAYS

    @property
    def needs_hashes(self) -> bool:
        """Whether the source has to be hashed block by block."""
        return self.delta or self.sparse is Sparse.ALWAYS or self.verification is Verification.BY_HASHES


class Result(NamedTuple):
    """What has become of a batch, or of several."""

    blocks_compared: int = 0
    blocks_changed: int = 0
    bytes_compared: int = 0
    bytes_moved: int = 0
    bytes_verified: int = 0
    retries: int = 0
    bytes_zeroed: int = 0
    """What became holes or zeros without being moved."""

    @classmethod
    def of_comparison(cls, batch: Batch) -> Result:
        """Make the result of not transferring a batch."""
        return cls(batch.blocks_compared, batch.blocks_changed, batch.bytes_compared)

    def __add__(self, other: Result) -> Result:  # type: ignore[override]
        """Add up all numbers (to make a longer tuple of two makes no sense here)."""
        return Result(*map(add, self, other))
