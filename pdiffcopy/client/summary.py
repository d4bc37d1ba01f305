"""What has become of many files?"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from humanfriendly import format_size, format_timespan
from humanfriendly.text import pluralize

from pdiffcopy.address import Address
from pdiffcopy.client.report import Report
from pdiffcopy.exceptions import FilesFailedError, ProgramError

FAILED = "failed"
OUTCOMES = ("equal", "updated", "created", FAILED)
"""What can become of a file."""
TOTALS = ("bytes_compared", "bytes_moved", "bytes_verified", "bytes_zeroed", "retries")
"""What is added up."""


@dataclass(frozen=True)
class FileReport:
    """What has become of one of many files: there is a report or an error."""

    source: Address
    target: Address
    report: Report | None = None
    error: ProgramError | None = None

    @property
    def outcome(self) -> str:
        """One of :data:`OUTCOMES`."""
        return self.report.outcome if self.report else FAILED

    def as_dict(self) -> dict[str, Any]:
        """The JSON object that a run of this file alone would give."""
        if self.report:
            return self.report.as_dict()
        assert self.error
        return {
            "source": str(self.source),
            "target": str(self.target),
            "error": str(self.error),
            "exit_code": self.error.exit_code,
        }


@dataclass
class Summary:
    """What has become of all of them, as far as that's known."""

    skipped: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    exit_codes: set[int] = field(default_factory=set)
    reservations: Counter[str] = field(default_factory=Counter)
    is_dry: bool = False
    started: float = field(default_factory=time.monotonic)

    def add(self, file: FileReport) -> None:
        """Take note of a file."""
        self.outcomes[file.outcome] += 1
        if file.report:
            self.totals.update({name: getattr(file.report.result, name) for name in TOTALS})
            self.reservations.update(file.report.reservations)
            self.is_dry |= file.report.dry_run
        elif file.error:
            self.exit_codes.add(file.error.exit_code)

    @property
    def elapsed(self) -> float:
        """For how long it took, in seconds."""
        return time.monotonic() - self.started

    def check(self) -> None:
        """
        Let it be known if any file failed.

        :raises: :exc:`.FilesFailedError` with the exit code of the failures, if they agree.
        """
        if self.exit_codes:
            count = self.outcomes[FAILED]
            error = FilesFailedError("{count} failed, the messages above say why", count=pluralize(count, "file"))
            error.exit_code = self.exit_codes.pop() if len(self.exit_codes) == 1 else 1
            raise error

    def as_dict(self) -> dict[str, Any]:
        """Make a JSON object: sizes in bytes, times in seconds."""
        outcomes = {outcome: self.outcomes[outcome] for outcome in OUTCOMES}
        totals = {name: self.totals[name] for name in TOTALS}
        return {**outcomes, "skipped": dict(self.skipped), **totals, "elapsed": self.elapsed}

    def __str__(self) -> str:
        """Make a few sentences on one line."""
        parts = [f"{self.outcomes[outcome]} {outcome}" for outcome in OUTCOMES if self.outcomes[outcome]]
        parts += [f"{self.skipped.total()} skipped"] if self.skipped.total() else []
        text = f"{pluralize(self.outcomes.total(), 'file')}: {', '.join(parts) or 'nothing to do'}"
        moved = format_size(self.totals["bytes_moved"], binary=True)
        done = "This was a dry run, it took" if self.is_dry else f"Moved {moved} in"
        text += f". {done} {format_timespan(self.elapsed)}."
        if self.totals["retries"]:
            text += f" {pluralize(self.totals['retries'], 'retry', 'retries')}."
        for sentence, count in self.reservations.items():
            text += f" {pluralize(count, 'file')}: {sentence}"
        return text
