"""How do many files become equal in one run?"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pdiffcopy.client.folders import check_owner, complete_folders, make_folders
from pdiffcopy.client.job import Job
from pdiffcopy.client.run import Run
from pdiffcopy.client.selection import Selection
from pdiffcopy.client.summary import FileReport, Summary
from pdiffcopy.client.twins import part_twins
from pdiffcopy.exceptions import ProgramError

VERBOSE = logging.INFO - 1
"""The level of messages that only some users want."""
logging.addLevelName(VERBOSE, "DETAIL")

logger = logging.getLogger(__name__)


def bring_all(selection: Selection, run: Run, summary: Summary | None = None) -> Iterator[FileReport]:
    """
    Bring all files of a selection into line.

    :param summary: Takes note of them.
    :returns: A generator of what has become of each of them.
    """
    summary = Summary() if summary is None else summary
    summary.skipped = selection.skipped
    for file in _bring(selection, run):
        summary.add(file)
        if file.error and str(file.target) in str(file.error):
            logger.error("%s", file.error)
        else:
            logger.log(logging.ERROR if file.error else VERBOSE, "%s: %s", file.target, file.error or file.report)
        yield file


def _bring(selection: Selection, run: Run) -> Iterator[FileReport]:
    is_dry = run.options.dry_run
    if not is_dry:
        check_owner(selection, run.options, run.servers)
    for name, error in selection.failed.items():
        yield FileReport(*selection.locate(name), error=error)
    if not is_dry:
        yield from make_folders(selection, run.servers)
    yield from _bring_files(selection, run)
    while selection.twins:
        yield from part_twins(selection, run.servers, is_dry)
        if selection.files:
            yield from _bring_files(selection, run)
    if run.options.wants_metadata and not is_dry:
        yield from complete_folders(selection, run.options, run.servers)


def _bring_files(selection: Selection, run: Run) -> Iterator[FileReport]:
    # Large ones first: they may have to be waited for at the end.
    selection.files.sort(reverse=True)
    jobs = (
        Job(*selection.locate(file.name), run.options, run.servers, size=file.size, is_new=file.is_new)
        for file in selection.files
    )
    for job, ended in run.synchronize_all(jobs, selection.size, len(selection.files)):
        addresses = job.source_address, job.target_address
        if isinstance(ended, ProgramError):
            yield FileReport(*addresses, error=ended)
        else:
            yield FileReport(*addresses, report=ended)
