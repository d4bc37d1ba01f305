"""What does the user want, what can both sides do, and what follows from that?"""

from __future__ import annotations

from hashlib import algorithms_guaranteed
from typing import NamedTuple

from pdiffcopy import digests
from pdiffcopy.address import Address
from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import SET_ID_BITS, FileInfo, count_blocks
from pdiffcopy.client.delta import FIRST_WINDOW, Sparse
from pdiffcopy.client.exchange import OR_OTHER
from pdiffcopy.client.pieces import PIECE_SIZE
from pdiffcopy.client.plan import AUTO, COMMON, FAST, Options, Plan, Target, Verification
from pdiffcopy.exceptions import DiskFullError, FileForbiddenError, ReadOnlyError, UnsupportedError, UsageError
from pdiffcopy.extents import EXTENT_LENGTH, count_certain
from pdiffcopy.features import (
    FEATURE_ATOMIC,
    FEATURE_BLOCKWISE,
    FEATURE_DIGEST,
    FEATURE_DROP,
    FEATURE_EXTENTS,
    FEATURE_METADATA,
    FEATURE_PIECES,
    FEATURE_SPARSE,
    FEATURE_SYNC,
)
from pdiffcopy.files.staging import is_new_version
from pdiffcopy.replica import Replica
from pdiffcopy.words import MAX_LINE

CHEAP = frozenset([digests.METHOD, FAST])
"""By which methods the target is digested sooner than the source is read once more."""


class Side(NamedTuple):
    """What is known about one side at the first look."""

    replica: Replica
    info: FileInfo
    peer: PeerInfo


def check_writable(label: str, peer: PeerInfo) -> None:
    """Refuse a target on a server that lets nobody write."""
    if not peer.writable:
        raise ReadOnlyError("The server of {label} is read-only", label=label)


class Planner:
    """Makes the plan of a run."""

    def __init__(self, source: Side, target: Side, options: Options, is_given: bool):
        """
        Initialize a planner.

        :param options: What the user wants.
        :param is_given: Whether the blocks to transfer are given.
        """
        self.source, self.target, self.options, self.is_given = source, target, options, is_given
        self.common = source.peer.features & target.peer.features
        self.url_room = min(source.replica.url_room, target.replica.url_room)
        self.method = self._choose_method()

    @property
    def delta(self) -> bool:
        """Whether there seems to be something to compare with."""
        return self.options.delta_transfer and self.target.info.size > 0

    @property
    def takes(self) -> int:
        """How much room a target takes that has none yet, in bytes, as far as that's known."""
        sparse = Sparse(self.options.sparse)
        # An old server tells nothing of this. Nor is it known how many zeros there are.
        if FEATURE_SPARSE not in self.common or self.is_given or sparse is Sparse.ALWAYS:
            return 0
        return self.source.info.size if sparse is Sparse.NEVER else self.source.info.allocated

    @property
    def max_extents(self) -> int:
        """How many extents one request can carry."""
        return count_certain(self.url_room) if FEATURE_EXTENTS in self.common else 1

    @property
    def makes_one_batch(self) -> bool:
        """Whether all that may differ makes up one batch."""
        size = self.source.info.size
        # No batch is closed sooner for those who wait, and in the worst case each other block differs.
        return size < FIRST_WINDOW and count_blocks(size, self.options.block_size) <= self.max_extents

    def _choose_method(self) -> str:
        """Find the hash method, and refuse one that a side doesn't have."""
        # An old server doesn't tell its methods: it surely has those that come with every Python.
        known = [(side, side.peer.methods or algorithms_guaranteed) for side in (self.source, self.target)]
        if self.options.hash_method == AUTO:
            return FAST if all(FAST in methods for _, methods in known) else COMMON
        for side, methods in known:
            if self.options.hash_method not in methods:
                text = "The server of {label} has no hash method {method}" + ("" if side.peer.features else OR_OTHER)
                raise self._choose_error(side)(text, label=side.replica.label, method=self.options.hash_method)
        return self.options.hash_method

    def check(self, writes: bool) -> None:
        """
        Refuse what can't work.

        :param writes: Whether the target is going to be written to.
        """
        source, target = self.source, self.target
        if self.url_room < EXTENT_LENGTH:
            text = "{label} is a name that leaves no room in a URL of {limit} characters: use a shorter one (of a link)"
            longer = max(source.replica.label, target.replica.label, key=len)
            raise FileForbiddenError(text, label=longer, limit=MAX_LINE)
        if not target.info.resizable and target.info.size < source.info.size:
            text = "{label} is a block device of {size} bytes, and the source has {wanted}: that's too small"
            label = target.replica.label
            raise FileForbiddenError(text, label=label, size=target.info.size, wanted=source.info.size)
        if self.options.sparse != Sparse.AUTO.value:
            for side in (source, target):
                self._demand(side, FEATURE_SPARSE, f"--sparse={self.options.sparse}")
        if self.options.drop_cache:
            for side in (source, target):
                self._demand(side, FEATURE_DROP, "--drop-cache")
        self._check_metadata()
        if self.options.atomic:
            self._check_atomic()
        if writes:
            self._check_target()

    def _check_metadata(self) -> None:
        if not self.options.wants_metadata:
            return
        for side in (self.source, self.target):
            if not side.info.resizable:
                text = "{label} is a block device: leave out -p, -t, -o and -g"
                raise UsageError(text, label=side.replica.label)
            self._demand(side, FEATURE_METADATA, "-p, -t, -o and -g")

    def _check_atomic(self) -> None:
        label = self.target.replica.label
        if not self.target.info.resizable:
            raise UsageError("{label} is a block device, which --atomic can't replace", label=label)
        if self.is_given:
            raise UsageError("--atomic takes no blocks that are given")
        if is_new_version(self.source.replica.filename):
            text = "{label} may be what --atomic works on: give it another name"
            raise UsageError(text, label=self.source.replica.label)
        self._demand(self.target, FEATURE_ATOMIC, "--atomic")

    def _check_target(self) -> None:
        """Refuse a target that can't be written to as it's wanted."""
        target, room = self.target, self.target.peer.room
        needed = self.takes - target.info.allocated if target.info.resizable else 0
        if room is not None and needed > room:
            text = "{label} takes {needed} bytes more than now, and its file system has {room} left: make room there"
            raise DiskFullError(text, label=target.replica.label, needed=needed, room=room)
        check_writable(target.replica.label, target.peer)
        if self.options.fsync:
            self._demand(target, FEATURE_SYNC, "--fsync")

    def check_mode(self, mode: int | None) -> None:
        """Refuse a mode for the target that its server wouldn't set."""
        if (mode or 0) & SET_ID_BITS and not self.target.peer.sets_id:
            text = "{label} would get the set-id bits of its source, and its server sets none without --allow-set-id"
            raise FileForbiddenError(text, label=self.target.replica.label)

    def _demand(self, side: Side, feature: str, option: str) -> None:
        """Refuse an option for which a server is too old."""
        if feature not in side.peer.features:
            text = "The server of {label} is too old for {option}"
            raise self._choose_error(side)(text, label=side.replica.label, option=option)

    def _choose_error(self, side: Side) -> type[UsageError]:
        """Sources may be on other servers, but the target is on one for all of them."""
        return UnsupportedError if side is self.target else UsageError

    def make_plan(self, source_address: Address, target: Target) -> Plan:
        """Make a plan."""
        source, options = self.source.info, self.options
        sparse, grain = self._choose_sparse(target.info)
        delta = options.delta_transfer and target.info.size > 0
        piece_size = self._choose_piece_size() if delta else 0
        # Where there are holes, or are going to be, it takes all of a file to find them. What a target grows by is one.
        grows = target.info.size < source.size
        has_holes = source.has_holes or target.info.has_holes or grows or sparse is Sparse.ALWAYS
        return Plan(
            source_address,
            target.address,
            source_id=source.file_id,
            target_id=target.info.file_id,
            size=source.size,
            target_size=target.size,
            surplus=max(0, target.info.size - source.size) if target.info.resizable else 0,
            block_size=options.block_size,
            method=self.method,
            concurrency=options.concurrency,
            delta=delta,
            verification=self._choose_verification(delta),
            piece_size=piece_size,
            may_sample=piece_size > 0 and not has_holes,
            largest_move=options.largest_move,
            max_extents=self.max_extents,
            url_room=self.url_room,
            sparse=sparse,
            grain=grain,
            has_holes=source.has_holes and sparse is not Sparse.IGNORED,
            is_new=target.info.size == 0,
            run=target.run,
            baseline=target.baseline,
            baseline_id=self.target.info.file_id if target.baseline else "",
        )

    def _choose_sparse(self, target: FileInfo) -> tuple[Sparse, int]:
        """
        Decide what becomes of holes.

        :returns: That, and the size of the smallest hole that matters (0 where nobody looks for any).
        """
        wanted, grain = Sparse(self.options.sparse), max(self.source.info.grain, target.grain)
        if FEATURE_SPARSE not in self.common or self.is_given or not grain:
            return Sparse.IGNORED, 0
        if not target.resizable:  # a device has no holes
            wanted = Sparse.NEVER
        elif target.exists and not target.grain and wanted is not Sparse.NEVER:
            wanted = Sparse.HIDDEN
        # Where blocks are so small that some have no whole grain, holes consist of blocks.
        is_part = 2 * grain <= self.options.block_size
        return wanted, grain if is_part else self.options.block_size

    def _choose_piece_size(self) -> int:
        is_possible = FEATURE_PIECES in self.common and self.options.block_size % PIECE_SIZE == 0
        return PIECE_SIZE if is_possible and not self.is_given else 0

    def _choose_verification(self, delta: bool) -> Verification:
        if not self.options.verify or FEATURE_DIGEST not in self.target.peer.features:
            return Verification.NONE
        if FEATURE_DIGEST not in self.common:
            # Where the blocks are given, there are no hashes of them.
            return Verification.NONE if self.is_given else Verification.BY_HASHES
        # A run that compares by such a method has all that it takes.
        free = delta and not self.is_given and self.method in CHEAP
        is_free = free and FEATURE_BLOCKWISE in self.target.peer.features
        return Verification.BLOCKWISE if is_free else Verification.STATED
