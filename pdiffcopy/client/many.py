"""How do many files become equal in one run?"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pdiffcopy.client.job import Job
from pdiffcopy.client.run import Run
from pdiffcopy.client.selection import Selection
from pdiffcopy.client.summary import FileReport, Summary
from pdiffcopy.exceptions import ProgramError

VERBOSE = logging.INFO - 1
"""The level of messages that only some users want."""

logger = logging.getLogger(__name__)


def bring_all(selection: Selection, run: Run, summary: Summary | None = None) -> Iterator[FileReport]:
    """
    Bring all files of a selection into line.

    :param summary: Takes note of them.
    :returns: A generator of what has become of each of them.
    """
    summary = Summary() if summary is None else summary
    summary.skipped.update(selection.skipped)
    if not run.options.dry_run:
        _make_folders(selection, run)
    # Large ones first: they may have to be waited for at the end.
    selection.files.sort(reverse=True)
    jobs = (
        Job(*selection.locate(file.name), run.options, run.servers, size=file.size, is_new=file.is_new)
        for file in selection.files
    )
    for job, ended in run.synchronize_all(jobs, selection.size, len(selection.files)):
        addresses = job.source_address, job.target_address
        if isinstance(ended, ProgramError):
            file = FileReport(*addresses, error=ended)
        else:
            file = FileReport(*addresses, report=ended)
        summary.add(file)
        logger.log(logging.ERROR if file.error else VERBOSE, "%s: %s", file.target, ended)
        yield file


def _make_folders(selection: Selection, run: Run) -> None:
    folders = selection.folders
    for folder, following in zip(folders, [*folders[1:], ""], strict=False):
        if not following.startswith(f"{folder}/"):  # which is made with that
            _, address = selection.locate(folder)
            run.servers.open(address).make_folder()
