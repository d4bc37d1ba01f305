"""
How fast is a delta transfer, next to rsync?

The benchmark damages a part of the target, brings it into line again, and measures how long that takes; with rsync
once more after the same damage. The damage is repeatable (the same blocks, the same octets) and spread over the whole
file; each measurement undoes it.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from humanfriendly import format_size, format_timespan
from humanfriendly.prompts import prompt_for_confirmation
from humanfriendly.tables import format_pretty_table

from pdiffcopy.delta import block_length, count_blocks
from pdiffcopy.exceptions import BenchmarkAbortedError, ProgramError, UsageError
from pdiffcopy.localfile import LocalFile
from pdiffcopy.protocol import Extent

if TYPE_CHECKING:
    from pdiffcopy.client import Client

PERMISSION_VARIABLE = "PDIFFCOPY_BENCHMARK"
RSYNC_VARIABLES = tuple(f"PDIFFCOPY_BENCHMARK_RSYNC_{name}" for name in ("SERVER", "MODULE", "ROOT"))

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One line of the table: sizes in bytes, times in seconds."""

    percentage: float
    changed: int
    moved: int
    runtime: float
    rsync_runtime: float | None


def run_benchmark(client: Client) -> list[Measurement]:
    """
    Damage and repair the target several times, and print a table.

    :raises: :exc:`.BenchmarkAbortedError` when the operator doesn't agree.
    """
    if client.target.hostname:
        raise UsageError(
            "The benchmark damages its target, which has to be a local file: {label} isn't one",
            label=client.target.label,
        )
    rsync = _get_rsync_command(client)
    _ask_permission(client)
    logger.info("Bringing the target into line before the first measurement ..")
    client.synchronize_once()
    measurements = []
    try:
        for step in range(1, client.benchmark + 1):
            measurements.append(_measure(client, 100 * step / client.benchmark, rsync))
    except BaseException:
        logger.warning("The benchmark was interrupted, %s is still damaged: synchronize again", client.target.label)
        raise
    print(format_table(measurements))
    return measurements


def mutate_target(client: Client, percentage: float) -> int:
    """
    Invalidate a percentage of the blocks of the target, scattered over the whole file.

    Each octet of such a block is inverted, so the damage is real whatever the file contains.

    :returns: How many bytes were changed.
    """
    if client.target.hostname:
        raise UsageError("Only a local file can be mutated: {label} isn't one", label=client.target.label)
    with LocalFile(client.target.address.filename, write=True) as file:
        size = file.size()
        count = count_blocks(size, client.block_size)
        chosen = random.Random(count).sample(range(count), round(count * min(max(percentage, 0), 100) / 100))
        changed = 0
        for index in sorted(chosen):
            offset = index * client.block_size
            extent = Extent(offset, block_length(offset, size, client.block_size))
            changed += extent.size
            for chunk in file.chunks([extent]):
                file.write([Extent(offset, len(chunk))], [bytes(chunk).translate(_INVERTED)])
                offset += len(chunk)
    return changed


_INVERTED = bytes(255 - octet for octet in range(256))
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
    return format_pretty_table(rows, header[: len(rows[0])])


def _measure(client: Client, percentage: float, rsync: list[str]) -> Measurement:
    logger.info("Measuring a delta of %.0f%% ..", percentage)
    changed = mutate_target(client, percentage)
    report = client.run()
    rsync_runtime = None
    if rsync:
        mutate_target(client, percentage)
        # rsync leaves a file alone that has the size of the source and was modified in the same second.
        os.utime(client.target.address.filename, (_UNLIKELY_TIME, _UNLIKELY_TIME))
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


def _get_rsync_command(client: Client) -> list[str]:
    """The command that does with rsync what the client does, or an empty list when rsync isn't configured."""
    values = [os.environ.get(name, "") for name in RSYNC_VARIABLES]
    if not any(values):
        return []
    if not all(values):
        raise UsageError("Set all of {names} to compare with rsync, or none", names=", ".join(RSYNC_VARIABLES))
    server, module, root = values
    path = os.path.relpath(client.source.filename, root)
    if path.startswith(".."):
        raise UsageError(
            "The source {label} isn't below the root of the rsync module, {root}", label=client.source.label, root=root
        )
    return ["rsync", "--inplace", f"rsync://{server}/{module}/{path}", client.target.address.filename]


def _ask_permission(client: Client) -> None:
    if os.environ.get(PERMISSION_VARIABLE) == "allowed":
        return
    question = f"The benchmark damages {client.target.label} and repairs it, {client.benchmark} times. Continue?"
    if not prompt_for_confirmation(question, default=False, padding=False):
        raise BenchmarkAbortedError("The benchmark was aborted: nothing was changed")
