"""What does a user get to know when a run is over?"""

from __future__ import annotations

from typing import Any, NamedTuple

from humanfriendly import format_size, format_timespan
from humanfriendly.text import pluralize

from pdiffcopy.address import Address
from pdiffcopy.client.plan import Plan, Result, Verification


class Report(NamedTuple):
    """What a run did."""

    target: Address
    """What was to be brought into line (the plan may be about a new version of it)."""
    plan: Plan
    result: Result
    dry_run: bool
    verify: bool
    """Whether the user wanted the transfer to be verified."""
    elapsed: float
    """In seconds."""
    watched: bool = True
    """Whether a change of the source would have shown: neither a device nor an old server tells a time."""
    cut: int = 0
    """How many bytes the target was (or would be) cut by."""
    grown: int = 0
    """How many bytes the target grew (or would grow) by."""
    left_alone: int = 0
    """How many bytes a device has behind the end of the source."""
    created: bool = False
    """Whether there was no target before."""
    claimed: bool = True
    """Whether the target was claimed, so that no other run can have mixed its data with that of this one."""

    @property
    def outcome(self) -> str:
        """What has become of the target: ``equal`` (it was before), ``updated`` or ``created``."""
        if self.created:
            return "created"
        return "updated" if self.result.blocks_changed or self.cut or self.grown else "equal"

    @property
    def similarity(self) -> float:
        """The part of the blocks that were equal (a number from 0 to 1)."""
        if not self.result.blocks_compared:
            return 1.0
        return 1 - self.result.blocks_changed / self.result.blocks_compared

    @property
    def verification(self) -> str:
        """What can be said of the target: ``verified``, ``unverified`` (an old server) or ``skipped``."""
        if self.dry_run or not self.verify:
            return "skipped"
        return "unverified" if self.plan.verification is Verification.NONE else "verified"

    @property
    def reservations(self) -> list[str]:
        """What a user should know who relies on the target (sentences)."""
        sentences = []
        if self.verification == "unverified" and self.result.bytes_moved:
            sentences.append("NOT VERIFIED: the server is too old to check what it wrote.")
        if not self.watched:
            sentences.append("NOT WATCHED: the source tells no time, so it may have changed unnoticed.")
        if self.left_alone:
            size = format_size(self.left_alone, binary=True)
            sentences.append(f"The target is larger than the source: {size} at its end were left alone.")
        if not (self.claimed or self.dry_run):
            sentences.append("NOT CLAIMED: the target can't be, so another run at the same time would go unnoticed.")
        return sentences

    def as_dict(self) -> dict[str, Any]:
        """The report as one JSON object: sizes in bytes, times in seconds."""
        return {
            "source": str(self.plan.source),
            "target": str(self.target),
            "outcome": self.outcome,
            "dry_run": self.dry_run,
            "delta_transfer": self.plan.delta,
            "block_size": self.plan.block_size,
            "hash_method": self.plan.method,
            "size": self.plan.size,
            "similarity": self.similarity,
            "verification": self.verification,
            "bytes_cut": self.cut,
            "bytes_grown": self.grown,
            "bytes_left_alone": self.left_alone,
            "watched": self.watched,
            "claimed": self.claimed,
            "elapsed": self.elapsed,
            **self.result._asdict(),
        }

    def __str__(self) -> str:
        """The report as a few sentences on one line."""
        result = self.result
        verb = ("differs" if result.blocks_changed == 1 else "differ") if self.dry_run else "differed"
        text = f"{result.blocks_changed} of {pluralize(result.blocks_compared, 'block')} {verb}"
        if not self.plan.delta:
            text = (
                f"{pluralize(result.blocks_compared, 'block')} to copy" if self.dry_run else "The whole file was copied"
            )
            text += " to a new file" if self.created else ""
        else:
            text += f" ({_format_similarity(result)} similar by {self.plan.method})"
        if not self.dry_run:
            text += f", moved {format_size(result.bytes_moved, binary=True)}"
        if result.bytes_zeroed:
            text += f", made zeros of {format_size(result.bytes_zeroed, binary=True)}"
        would_be = "would be " if self.dry_run else ""
        for size, verb in ((self.cut, "cut off"), (self.grown, "added")):
            if size:
                text += f", {format_size(size, binary=True)} {would_be}{verb}"
        rate = format_size(int(self.plan.size / max(self.elapsed, 1e-6)), binary=True)
        text += f" in {format_timespan(self.elapsed)} ({rate}/s)."
        if result.retries:
            text += f" {pluralize(result.retries, 'retry', 'retries')}."
        if self.verification == "verified" and result.bytes_moved:
            text += f" Verified {format_size(result.bytes_verified, binary=True)}."
        return " ".join([text, *self.reservations])


def _format_similarity(result: Result) -> str:
    """Round down: it's 100% only when nothing differs."""
    total = max(result.blocks_compared, 1)
    whole, hundredths = divmod(10000 * (total - result.blocks_changed) // total, 100)
    return f"{whole}.{hundredths:02}%"
