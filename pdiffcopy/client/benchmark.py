"""
How fast is a delta transfer, next to rsync?

The benchmark damages a part of the target, brings it into line again, and measures how long that takes; with rsync
once more after the same damage. The damage is repeatable (the same blocks, the same bytes) and spread over the whole
file; each measurement undoes it.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from humanfriendly import format_size, format_timespan
from humanfriendly.prompts import prompt_for_confirmation
from humanfriendly.tables import format_pretty_table
from humanfriendly.text import pluralize

from pdiffcopy.blocks import Extent, block_length, count_blocks
from pdiffcopy.client.location import Location
from pdiffcopy.client.report import Report
from pdiffcopy.exceptions import BenchmarkAbortedError, FileMissingError, ProgramError, UsageError
from pdiffcopy.replica import Reading, Replica

PERMISSION_VARIABLE = "PDIFFCOPY_BENCHMARK"
RSYNC_VARIABLES = tuple(f"PDIFFCOPY_BENCHMARK_RSYNC_{name}" for name in ("SERVER", "MODULE", "ROOT"))

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """A line of the table that the benchmark prints: sizes in bytes, times in seconds."""

    percentage: float
    changed: int
    moved: int
    runtime: float
    rsync_runtime: float | None


def run_benchmark(
    source: Location, target: Location, block_size: int, count: int, run: Callable[[], Report]
) -> list[Measurement]:
    """
    Damage and repair a target several times, and print a table.

    :param target: The file that is damaged (not a folder that it lies in).
    :param block_size: How large a part is damaged at a time, in bytes.
    :param count: How many times.
    :param run: Brings the target into line.
    :raises: :exc:`.BenchmarkAbortedError` when the operator doesn't agree.
    """
    if not target.replica.is_near:
        text = "The benchmark damages its target, which has to be a local file: {label} isn't one"
        raise UsageError(text, label=target.label)
    rsync = _get_rsync_command(source, target)
    _ask_permission(target, count)
    logger.info("Bringing the target into line before the first measurement ..")
    run()
    measurements = []
    try:
        for step in range(1, count + 1):
            measurements.append(_measure(target.replica, block_size, 100 * step / count, run, rsync))
    except BaseException:
        logger.warning("The benchmark was interrupted, %s is still damaged: synchronize again", target.label)
        raise
    print(format_table(measurements))
    return measurements


def mutate_target(target: Replica, block_size: int, percentage: float) -> int:
    """
    Invalidate a percentage of the blocks of a target, scattered over the whole file.

    Each byte of such a block is inverted, so the damage is real whatever the file contains.

    :returns: How many bytes were changed.
    """
    if not target.is_near:
        raise UsageError("Only a local file can be mutated: {label} isn't one", label=target.label)
    info, _ = target.info()
    if not info.exists:
        raise FileMissingError("The file {label} doesn't exist", label=target.label)
    size = info.size
    count = count_blocks(size, block_size)
    chosen = random.Random(count).sample(range(count), round(count * min(max(percentage, 0), 100) / 100))
    extents = [Extent(i * block_size, block_length(i * block_size, size, block_size)) for i in sorted(chosen)]
    for extent in extents:
        with target.read([extent]) as reading:
            target.write([extent], Reading(bytes(chunk).translate(_INVERTED) for chunk in reading.chunks))
    return sum(extent.size for extent in extents)


_INVERTED = bytes(255 - byte for byte in range(256))
_UNLIKELY_TIME = 12345
"""A modification time that no source has (neither 0 nor 1, which some tools give to all files)."""


def format_table(measurements: list[Measurement]) -> str:
    """Make a table: delta size, data transferred, runtime of pdiffcopy, runtime of rsync (if it was run)."""
    header = ["Delta size", "Data transferred", "Runtime of pdiffcopy", "Runtime of rsync"]
    rows = []
    for m in measurements:
        delta = f"{m.percentage:.0f}% ({format_size(m.changed, binary=True)})"
        row = [delta, format_size(m.moved, binary=True), format_timespan(m.runtime)]
        rows.append(row + ([format_timespan(m.rsync_runtime)] if m.rsync_runtime is not None else []))
    return str(format_pretty_table(rows, header[: len(rows[0])]))


def _measure(
    target: Replica, block_size: int, percentage: float, run: Callable[[], Report], rsync: list[str]
) -> Measurement:
    logger.info("Measuring a delta of %.0f%% ..", percentage)
    changed = mutate_target(target, block_size, percentage)
    report = run()
    rsync_runtime = None
    if rsync:
        mutate_target(target, block_size, percentage)
        # rsync leaves a file alone that has the size of the source and was modified in the same second.
        os.utime(rsync[-1], (_UNLIKELY_TIME, _UNLIKELY_TIME))
        rsync_runtime = _run_rsync(rsync)
    return Measurement(percentage, changed, report.result.bytes_moved, report.elapsed, rsync_runtime)


def _run_rsync(command: list[str]) -> float:
    started = time.monotonic()
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as e:
        raise ProgramError("Can't run rsync: {reason}", reason=e.strerror) from e
    except subprocess.CalledProcessError as e:
        raise ProgramError(
            "rsync failed with exit code {status}: {command}", status=e.returncode, command=" ".join(command)
        ) from e
    return time.monotonic() - started


def _get_rsync_command(source: Location, target: Location) -> list[str]:
    """The command that does with rsync what the client does, or an empty list when rsync isn't configured."""
    values = [os.environ.get(name, "") for name in RSYNC_VARIABLES]
    if not any(values):
        return []
    if not all(values):
        raise UsageError("Set all of {names} to compare with rsync, or none", names=", ".join(RSYNC_VARIABLES))
    server, module, root = values
    path = os.path.relpath(str(source.filename), root)
    if path.startswith(".."):
        raise UsageError(
            "The source {label} isn't below the root of the rsync module, {root}", label=source.label, root=root
        )
    return ["rsync", "--inplace", f"rsync://{server}/{module}/{path}", target.address.filename]


def _ask_permission(target: Location, count: int) -> None:
    if os.environ.get(PERMISSION_VARIABLE) == "allowed":
        return
    question = f"The benchmark damages {target.label} and repairs it, {pluralize(count, 'time')}. Continue?"
    if not prompt_for_confirmation(question, default=False, padding=False):
        raise BenchmarkAbortedError("The benchmark was aborted: nothing was changed")
