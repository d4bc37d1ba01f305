"""
How does a user see that a run makes progress?

The core tells a :class:`Reporter` what was done and never draws anything. The plain reporter is silent;
:class:`Bar` draws, and only on a terminal.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


class Reporter:
    """Is told about progress (and ignores it). A context manager, so that whatever it drew is finished."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Nothing to clean up."""

    def advance(self, compared: int, moved: int) -> None:
        """Take note of bytes that were compared and of bytes that were moved since the last call."""


class Bar(Reporter):
    """Shows bytes compared, bytes moved, the rate and the time left."""

    def __init__(self, total: int, label: str):
        """
        Draw the bar.

        :param total: How many bytes there are to compare.
        :param label: What stands before the bar.
        """
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread: processes may be forked while a bar is there
        self.moved = 0
        self.bar = tqdm(
            total=total,
            desc=label,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __exit__(self, *exc_info: Any) -> None:
        self.bar.close()

    def advance(self, compared: int, moved: int) -> None:
        """See :meth:`Reporter.advance`."""
        self.moved += moved
        if moved:
            self.bar.set_postfix_str(f"{self.bar.format_sizeof(self.moved, 'B', 1024)} moved", refresh=False)
        self.bar.update(compared)


def make_reporter(total: int, label: str) -> Reporter:
    """Get a bar when there's a terminal to draw it on, and nobody asked for silence."""
    return Bar(total, label) if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO) else Reporter()
