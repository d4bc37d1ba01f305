"""Does a name stand for a file, or for a folder that a file goes into?"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pdiffcopy.address import Address
from pdiffcopy.client.job import Job
from pdiffcopy.entries import Entry, Kind
from pdiffcopy.exceptions import FileForbiddenError, FileMissingError, ForbiddenError, UsageError
from pdiffcopy.replica import Replica


def join(folder: Address, name: str) -> Address:
    """Make the address of something in a folder."""
    return folder._replace(filename=f"{folder.filename.rstrip('/')}/{name}")


def take_first(entries: Iterator[Entry], label: str, option: str = "") -> Entry:
    """
    Take the first entry of a listing, which is what the name leads to.

    :param label: The name.
    :param option: What takes a listing.
    :raises: :exc:`.UsageError` for a server that is too old to list anything, if there's an option.
    """
    try:
        return next(entries)
    except FileMissingError:  # what is missing is the endpoint: that there's no such file would be an answer
        if option:
            text = "The server of {label} is too old for {option} (or it isn't pdiffcopy)"
            raise UsageError(text, label=label, option=option) from None
        return Entry("", Kind.OTHER)


def find_kind(replica: Replica, option: str = "") -> Kind:
    """Find out what a name leads to, see :func:`take_first`."""
    return take_first(replica.entries(0), replica.label, option).kind


def is_folder(replica: Replica) -> bool:
    """Whether a name is known to lead to a folder."""
    return find_kind(replica) is Kind.FOLDER


def find_place(job: Job) -> Job:
    """
    Look at the files of a job, and if the target is a folder, at what is called like the source in there.

    :raises: :exc:`.UsageError` when the source is a folder.
    """
    source, target = job.source_address, job.target_address
    name = os.path.basename(source.filename)
    if target.filename.endswith(("/", "/.", "/..")) and name:
        job = Job(source, join(target, name), job.options, job.servers, job.is_given)
    try:
        job.look(writes=not job.options.dry_run)
    except (FileForbiddenError, ForbiddenError):
        if is_folder(job.servers.open(source)):
            raise UsageError("{label} is a folder: add -r", label=str(source)) from None
        if not is_folder(job.servers.open(target)):
            raise
        job = Job(source, join(target, name), job.options, job.servers, job.is_given)
        job.look(writes=not job.options.dry_run)
    return job
