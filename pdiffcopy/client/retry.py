"""How long is a failing network given?"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pdiffcopy.exceptions import TransientError

FIRST_DELAY = 0.25
"""The delay before the first repetition in seconds. It doubles with each further one..."""
LONGEST_DELAY = 4.0
"""... up to this one. Each is spread by half (jitter), so that many clients don't come back in step."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Patience:
    """Counts failures in a row, waits between them, and gives up after too many."""

    def __init__(self, retries: int):
        """:param retries: How many failures in a row are forgiven."""
        self.retries = retries
        self.failures = 0
        self.total = 0

    def succeeded(self) -> None:
        """Start anew: something worked."""
        self.failures = 0

    def failed(self, error: TransientError) -> None:
        """Wait before the next attempt, or raise the error when there have been enough of them."""
        self.failures += 1
        if self.failures > self.retries:
            raise error
        self.total += 1
        delay = min(FIRST_DELAY * 2 ** min(self.failures - 1, 10), LONGEST_DELAY) * random.uniform(0.5, 1.5)
        logger.warning("%s (attempt %i, trying again in %.1f seconds)", error, self.failures, delay)
        time.sleep(delay)

    def persist(self, action: Callable[[], T]) -> T:
        """Call a function until it succeeds."""
        while True:
            try:
                return action()
            except TransientError as e:
                self.failed(e)
