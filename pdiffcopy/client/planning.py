"""What does the user want, what can both sides do, and what follows from that?"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import algorithms_guaranteed

from pdiffcopy import digests
from pdiffcopy.address import Address
from pdiffcopy.answers import PeerInfo
from pdiffcopy.blocks import FileInfo
from pdiffcopy.client.delta import Sparse
from pdiffcopy.client.pieces import PIECE_SIZE
from pdiffcopy.client.plan import AUTO, COMMON, FAST, Options, Plan, Verification
from pdiffcopy.exceptions import DiskFullError, FileForbiddenError, ForbiddenError, UsageError
from pdiffcopy.features import (
    FEATURE_BLOCKWISE,
    FEATURE_DIGEST,
    FEATURE_EXTENTS,
    FEATURE_PIECES,
    FEATURE_SPARSE,
    FEATURE_SYNC,
)
from pdiffcopy.replica import Replica
from pdiffcopy.words import MAX_EXTENTS

CHEAP = frozenset([digests.METHOD, FAST])
"""By which methods the target is digested sooner than the source is read once more."""


@dataclass(frozen=True)
class Side:
    """What is known about one side at the first look."""

    replica: Replica
    info: FileInfo
    peer: PeerInfo


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
        self.method = self._choose_method()

    @property
    def delta(self) -> bool:
        """Whether there is something to compare with."""
        return self.options.delta_transfer and self.target.info.size > 0

    def _choose_method(self) -> str:
        """Find the hash method, and refuse one that a side doesn't have."""
        # An old server doesn't tell its methods: it surely has those that come with every Python.
        known = [(side, side.peer.methods or algorithms_guaranteed) for side in (self.source, self.target)]
        if self.options.hash_method == AUTO:
            return FAST if all(FAST in methods for _, methods in known) else COMMON
        for side, methods in known:
            if self.options.hash_method not in methods:
                text = "The server of {label} has no hash method {method}"
                raise UsageError(text, label=side.replica.label, method=self.options.hash_method)
        return self.options.hash_method

    def check(self, writes: bool) -> None:
        """
        Refuse what can't work.

        :param writes: Whether the target is going to be written to.
        """
        source, target = self.source, self.target
        if not target.info.resizable and target.info.size < source.info.size:
            text = "{label} is a block device of {size} bytes, and the source has {wanted}: that's too small"
            label = target.replica.label
            raise FileForbiddenError(text, label=label, size=target.info.size, wanted=source.info.size)
        if self.options.sparse != Sparse.AUTO.value and FEATURE_SPARSE not in self.common:
            old = target if FEATURE_SPARSE in source.peer.features else source
            text = "The server of {label} is too old for --sparse={choice}"
            raise UsageError(text, label=old.replica.label, choice=self.options.sparse)
        if writes and target.peer.room is not None and (needed := self._count_missing()) > target.peer.room:
            text = "{label} takes {needed} bytes more than now, and its file system has {room} left"
            raise DiskFullError(text, label=target.replica.label, needed=needed, room=target.peer.room)
        if writes and not target.peer.writable:
            raise ForbiddenError("The server of {label} is read-only", label=target.replica.label)
        if writes and self.options.fsync and FEATURE_SYNC not in target.peer.features:
            raise UsageError("The server of {label} is too old for --fsync", label=target.replica.label)

    def _count_missing(self) -> int:
        """How much more room the target takes in any case."""
        source, target, sparse = self.source.info, self.target.info, Sparse(self.options.sparse)
        # An old server tells nothing of this. Nor is it known how many zeros there are.
        if not target.resizable or FEATURE_SPARSE not in self.common or self.is_given or sparse is Sparse.ALWAYS:
            return 0
        return (source.size if sparse is Sparse.NEVER else source.allocated) - target.allocated

    def make_plan(
        self, addresses: tuple[Address, Address], target: FileInfo, target_size: int, run: str = ""
    ) -> Plan:  # fmt: skip
        """
        Make a plan.

        :param addresses: Those of the source and of the target.
        :param target: What the target is by now.
        :param target_size: How much of it there is to compare.
        :param run: The name under which it is claimed (empty when it isn't).
        """
        source, options = self.source.info, self.options
        sparse, grain = self._choose_sparse(target)
        return Plan(
            *addresses,
            source_id=source.file_id,
            target_id=target.file_id,
            size=source.size,
            target_size=target_size,
            block_size=options.block_size,
            method=self.method,
            concurrency=options.concurrency,
            delta=self.delta,
            verification=self._choose_verification(),
            piece_size=self._choose_piece_size(),
            max_extents=MAX_EXTENTS if FEATURE_EXTENTS in self.common else 1,
            sparse=sparse,
            grain=grain,
            has_holes=source.has_holes and sparse is not Sparse.IGNORED,
            is_new=not self.target.info.exists,
            run=run,
        )

    def _choose_sparse(self, target: FileInfo) -> tuple[Sparse, int]:
        """
        Decide what becomes of holes.

        :returns: That, and the size of the smallest hole that matters (0 where nobody looks for any).
        """
        wanted, grain = Sparse(self.options.sparse), max(self.source.info.grain, target.grain)
        if FEATURE_SPARSE not in self.common or self.is_given or not grain:
            return Sparse.IGNORED, 0
        # A device has no holes, and where a hole can't be a part of a block, it consists of whole ones.
        is_part = grain < self.options.block_size and self.options.block_size % grain == 0
        return wanted if target.resizable else Sparse.NEVER, grain if is_part else self.options.block_size

    def _choose_piece_size(self) -> int:
        is_possible = FEATURE_PIECES in self.common and self.options.block_size % PIECE_SIZE == 0
        return PIECE_SIZE if is_possible and self.delta and not self.is_given else 0

    def _choose_verification(self) -> Verification:
        if not self.options.verify or FEATURE_DIGEST not in self.target.peer.features:
            return Verification.NONE
        if FEATURE_DIGEST not in self.common:
            # Where the blocks are given, there are no hashes of them.
            return Verification.NONE if self.is_given else Verification.BY_HASHES
        # A run that compares by such a method has all that it takes.
        free = self.delta and not self.is_given and self.method in CHEAP
        is_free = free and FEATURE_BLOCKWISE in self.target.peer.features
        return Verification.BLOCKWISE if is_free else Verification.STATED
