"""How does a run get hold of what it writes to, and let go of it at the end?"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from pdiffcopy.address import Address
from pdiffcopy.blocks import FileInfo, Metadata
from pdiffcopy.client.plan import Target, make_run
from pdiffcopy.client.planning import Side
from pdiffcopy.client.retry import Patience
from pdiffcopy.exceptions import FileError, ProgramError
from pdiffcopy.replica import Replica, Staged

logger = logging.getLogger(__name__)


class Taking(ABC):
    """A way to get hold of a target."""

    needs_flush: bool
    """Whether the target has to reach its disk before a run lets go of it."""

    def __init__(self, address: Address, side: Side):
        """
        Initialize it. Nothing is touched yet.

        :param address: The name that the target has, or is going to have.
        :param side: What was found there.
        """
        self.address, self.info = address, side.info
        self.replica = side.replica.pinned(side.info.file_id)

    @abstractmethod
    def take(self, source: FileInfo) -> Target:
        """
        Claim the target. From here on no other run may mix its data with ours: one that begins later ends this one.

        :param source: What the target is going to be.
        """

    @abstractmethod
    def complete(self, metadata: Metadata) -> Metadata:
        """Add to the metadata that a target gets at the end what it had to lack until then."""

    @abstractmethod
    def let_go(self, target: Target, replica: Replica) -> None:
        """
        End the claim.

        :param replica: What was claimed.
        """


class InPlace(Taking):
    """The target is changed as it lies there."""

    needs_flush = False

    def take(self, source: FileInfo) -> Target:
        """See :meth:`Taking.take`."""
        run = make_run()
        claimed, info = self.replica.claim(run, not self.info.exists, source.mode)
        # A target that is shorter is going to be grown before it is compared. An earlier run may have resized it since.
        return Target(self.address, info, source.size, run if claimed else "")

    def complete(self, metadata: Metadata) -> Metadata:
        """See :meth:`Taking.complete`."""
        return metadata

    def let_go(self, target: Target, replica: Replica) -> None:
        """See :meth:`Taking.let_go`. A claim that stays behind does no harm, so that's no failure."""
        try:
            if target.run:
                replica.release(target.run)
        except ProgramError as e:
            logger.warning("The claim on %s stays behind: %s", replica.label, e)


class Atomic(Taking):
    """A new version is made beside the target, and takes its place in one step."""

    needs_flush = True

    def __init__(self, address: Address, side: Side, retries: int, takes: int):
        """
        Initialize it.

        :param retries: How many failures of the network in a row to survive.
        :param takes: How much room the new version takes at least, in bytes.
        """
        super().__init__(address, side)
        self.retries, self.takes = retries, takes

    def take(self, source: FileInfo) -> Target:
        """See :meth:`Taking.take`."""

        def stage() -> tuple[str, Staged]:
            # What a server still does for an earlier attempt is ended by the name of the next one.
            run = make_run()
            return run, self.replica.stage(run, source.mode, self.takes)

        run, staged = Patience(self.retries).persist(stage)
        return Target(
            self.address._replace(filename=staged.filename),
            staged.info,
            min(self.info.size, source.size) if staged.shares else source.size,
            run if staged.claimed else "",
            # It is in the cache if any of the two is.
            self.address if staged.shares else None,
        )

    def complete(self, metadata: Metadata) -> Metadata:
        """See :meth:`Taking.complete`."""
        # The owner can read and write a new version until then, whatever the mode of the old one.
        is_private = self.info.exists and self.info.mode & 0o600 != 0o600
        return metadata._replace(mode=self.info.mode) if is_private and metadata.mode is None else metadata

    def let_go(self, target: Target, replica: Replica) -> None:
        """See :meth:`Taking.let_go`."""
        after = self.replica.commit(target.info.file_id, self.info.ctime_ns, target.run)
        if after.file_id != target.info.file_id:
            raise FileError("The target {label} was replaced by another file: run again", label=self.replica.label)
