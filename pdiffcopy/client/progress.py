"""
How does a user see that a run makes progress?

The core tells a :class:`Reporter` what was done and never draws anything. The plain reporter is silent;
:class:`Bar` draws, and only on a terminal.

A bar counts in shared memory, since the bytes pass through child processes, and a thread of the client draws it once
a second, whether anything has passed or not. The counters only grow, and only under their locks; whoever reads them
may see the one before the other. The thread begins after the processes, which can't be forked from then on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from pdiffcopy.exceptions import UsageError

JSON = "json"
INTERVAL = 1.0
"""How often a bar is drawn, in seconds."""
DELAY = 0.3
"""What takes no longer than this needs no bar, in seconds: to import tqdm takes a part of it."""

_LAYOUT = "{percentage:3.0f}%|{bar}|{remaining}, {rate_fmt}{postfix}"
"""With a bar of one character, an hour to go and the longest numbers that's 38 characters wide."""

logger = logging.getLogger(__name__)


class Reporter:
    """Is told about progress (and ignores it). A context manager, so that whatever it drew is finished."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Nothing to clean up."""

    def advance(self, compared: int, moved: int) -> None:
        """Take note of bytes that were compared and of bytes that were moved since the last call, in any process."""

    def end_file(self) -> None:
        """Take note that all is done with another file, in the process in whose ``with`` block that is."""


class Tally:
    """
    Tells a reporter of the bytes of a batch as they pass.

    While some of them move, the same part of what was compared counts as done. What has to be repeated is done when it
    passes for the first time.
    """

    def __init__(self, size: int, compared: int, reporter: Reporter):
        """
        Begin to count.

        :param size: How many bytes are going to be moved.
        :param compared: How many were compared to find them.
        :param reporter: Is told of them.
        """
        self.size = size
        self.bytes_compared = compared
        self.reporter = reporter
        self.passed = self.told = 0

    def count(self, size: int) -> None:
        """Take note of bytes that have passed."""
        self.passed = min(self.passed + size, self.size)
        self._tell(self.bytes_compared * self.passed // self.size, size)

    def finish(self) -> None:
        """Take note that all is done, whether it had to be moved or not."""
        self._tell(self.bytes_compared, 0)

    def _tell(self, compared: int, moved: int) -> None:
        self.reporter.advance(compared - self.told, moved)
        self.told = compared


class Counter:
    """A number that this process counts with. :func:`.make_counter` makes one for several processes."""

    value = 0

    def __init__(self) -> None:
        """Begin at zero."""
        self._lock = threading.Lock()

    def get_lock(self) -> AbstractContextManager[Any]:
        """Several threads may count."""
        return self._lock


class Display(Reporter, ABC):
    """Shows in a ``with`` block, during which no process may be forked, what was counted in all processes."""

    def __init__(self, total: int, files: int, label: str = "", make_counter: Callable[[], Any] = Counter):
        """
        Initialize a display.

        :param total: How many bytes there are to compare.
        :param files: How many files they are in.
        :param label: What is done with them.
        :param make_counter: Makes what it counts with.
        """
        self.total, self.files, self.label = total, files, label
        self.compared, self.moved = make_counter(), make_counter()
        self.files_done = 0

    def __enter__(self) -> Display:
        self._done = threading.Event()
        self._artist = threading.Thread(target=self._draw, daemon=True)
        self._artist.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._done.set()
        self._artist.join()

    def advance(self, compared: int, moved: int) -> None:
        """See :meth:`Reporter.advance`."""
        for counter, size in ((self.compared, compared), (self.moved, moved)):
            with counter.get_lock():
                counter.value += size

    def end_file(self) -> None:
        """See :meth:`Reporter.end_file`."""
        self.files_done += 1

    @abstractmethod
    def _draw(self) -> None:
        """Show what was counted, again and again, until all is done."""


class Bar(Display):
    """Shows the part that was compared, the time left, the rate, and the bytes moved."""

    def _draw(self) -> None:
        """Draw until all is done, or until the terminal or its environment doesn't like it: a run needs no bar."""
        if self._done.wait(DELAY):
            return
        try:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no other thread than this one
            is_narrow = os.get_terminal_size(sys.stderr.fileno()).columns < 60
            layout = _LAYOUT if is_narrow else f"{self.label}: {_LAYOUT}"
            with tqdm(
                total=self.total, bar_format=layout, unit="B", unit_scale=True, unit_divisor=1024, leave=False,
                dynamic_ncols=True, mininterval=0, file=sys.stderr,
            ) as bar:  # fmt: skip
                while True:
                    moved = bar.format_sizeof(self.moved.value, "B", 1024)
                    bar.set_postfix_str(f"{moved} moved" if self.moved.value else "", refresh=False)
                    bar.update(self.compared.value - bar.n)
                    bar.refresh()
                    if self._done.wait(INTERVAL):
                        break
        except Exception as e:
            logger.debug("There is no progress bar: %r", e)


class Lines(Display):
    """Writes a JSON object a second to stderr, and a last one at the end, for programs that watch."""

    def _draw(self) -> None:
        """Write until all is done, or until nobody reads it."""
        started = time.monotonic()
        with suppress(OSError, ValueError):  # it has no stderr any more
            is_over = False
            while not is_over:
                is_over = self._done.wait(INTERVAL)
                print(json.dumps(self._look(time.monotonic() - started)), file=sys.stderr, flush=True)

    def _look(self, elapsed: float) -> dict[str, Any]:
        compared, moved = self.compared.value, self.moved.value
        rate = compared / elapsed
        return {
            "bytes": compared,
            "bytes_total": self.total,
            "bytes_moved": moved,
            "files": self.files_done,
            "files_total": self.files,
            "elapsed": elapsed,
            "rate": rate,
            "time_left": max(0, self.total - compared) / rate if rate else None,
        }


def make_reporter(
    total: int, files: int, label: str, style: str = "", make_counter: Callable[[], Any] = Counter
) -> Reporter:
    """
    Choose how progress is shown.

    :param style: ``json``, or empty for a bar, if there's a terminal to draw it on and nobody asked for silence.
    :param make_counter: Makes what is counted with.
    """
    if style == JSON:
        return Lines(total, files, make_counter=make_counter)
    if style:
        raise UsageError("--progress takes json, not {value}", value=repr(style))
    return (
        Bar(total, files, label, make_counter) if _has_terminal() and logger.isEnabledFor(logging.INFO) else Reporter()
    )


def _has_terminal() -> bool:
    with suppress(AttributeError, ValueError):  # there's no such stream, or it's closed
        return sys.stderr.isatty()
    return False
