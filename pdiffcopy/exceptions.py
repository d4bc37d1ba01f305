"""
Which errors are there, and what does each one mean to a shell and to an HTTP client?

Each class knows its exit code and its HTTP status, and :func:`get_error_class` knows the way back, so that
:func:`.cli.main`, the error handler of the server and the client need no table of their own. The keyword arguments of
an error are interpolated into its text *and* stay available as attributes: ``error.filename``, ``error.offset``,
``error.reason``.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from typing import Any

from humanfriendly.text import compact


def printable(text: str) -> str:
    """Escape what could move the cursor of a terminal or forge a line in a log (control and undecodable characters)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


MORE_PROCESSES = "more processes have to be allowed (ulimit -u, or TasksMax of a systemd unit)"
"""What helps where no process or thread can be started."""
REMEDIES = {
    errno.EMFILE: "more open files have to be allowed (ulimit -n)",
    errno.ENFILE: "this machine has no room for more open files",
}
"""What helps where a limit of the machine is reached."""


def describe_error(error: BaseException) -> str:
    """Say in one line what went wrong, of errors that aren't ours."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):  # there's no class for that
        return f"Can't start a thread: {MORE_PROCESSES}"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return printable(f"The operating system says: {error.strerror}{where}")
    if isinstance(error, MemoryError):
        return "There isn't enough memory"
    return printable(f"Something unexpected happened: {type(error).__name__}: {error}")


class ProgramError(Exception):
    """The base exception class for all custom exceptions raised by the pdiffcopy modules."""

    exit_code = 1
    http_status = 500

    def __init__(self, text: str, *args: Any, **kw: Any):
        """
        Initialize a :class:`ProgramError` object.

        For argument handling see :func:`humanfriendly.text.compact()`. The resulting string is the message.
        """
        super().__init__(printable(compact(text, *args, **kw)))
        vars(self).update(kw)

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from a child process to its parent as it is (the message isn't interpolated twice)."""
        return (_restore, (type(self), str(self), vars(self)))


def _restore(cls: type[ProgramError], message: str, data: dict[str, Any]) -> ProgramError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    vars(error).update(data)
    return error


class BenchmarkAbortedError(ProgramError):
    """Raised when the operator doesn't give explicit permission to run the benchmark."""


class DependencyError(ProgramError):
    """Raised when client or server installation requirements are missing."""

    @classmethod
    def of(cls, extra: str, error: ImportError) -> DependencyError:
        """
        Make an error.

        :param extra: The half that isn't installed: ``client`` or ``server``.
        :param error: What Python says about it.
        """
        text = "A {extra} requirement is missing ({error}): install pdiffcopy[{extra}] from its checkout (README.rst)"
        return cls(text, extra=extra, error=error)


class UsageError(ProgramError):
    """Raised for options, locations and combinations of them that make no sense."""

    http_status = 400


class LocationError(UsageError, ValueError):
    """Raised for what can't be the name of a file, here or elsewhere."""


class WorkerError(ProgramError):
    """Raised when a child process dies (``kill -9``, out of memory) or fails in a way that can't be transported."""


# What a server may answer and a client may meet {{{1


class RequestError(ProgramError):
    """Raised when a request (or a parameter of it) is malformed."""

    http_status = 400


class AuthenticationError(ProgramError):
    """Raised when a request carries no token or a wrong one."""

    http_status = 401


class AbsentError(ProgramError):
    """Raised when a client has left, or sends nothing for too long. Another attempt may go better."""

    http_status = 408


class DamagedError(ProgramError):
    """Raised for a request that was damaged on its way: the same again may well arrive intact."""

    http_status = 422


class ForbiddenError(ProgramError):
    """Raised when a request is understood but not allowed here."""

    http_status = 403


class UnsupportedError(UsageError):
    """Raised when the server of the target can't do what the user wants, whatever file it is about."""


class ReadOnlyError(ForbiddenError):
    """Raised when a server lets nobody write."""


class DigestMismatchError(ProgramError):
    """Raised when what lies in the target isn't what the sender says it sent. Trying again may help."""

    http_status = 409


class ReplacedError(ProgramError):
    """Raised when a name doesn't lead to the file any more that the run is about."""

    http_status = 412


class TakenOverError(ProgramError):
    """Raised when a later run has claimed the target: its data and ours would mix."""

    http_status = 423


class LengthRequiredError(ProgramError):
    """Raised when a body comes without an exact ``Content-Length``."""

    http_status = 411


class TooLargeError(ProgramError):
    """Raised when a body or a parameter exceeds a limit of the server."""

    http_status = 413


class BusyError(ProgramError):
    """Raised when a server has no room for what is asked for."""

    http_status = 503


class RangeError(ProgramError):
    """Raised when an extent lies beyond the end of the file."""

    http_status = 416


class RemoteError(ProgramError):
    """Raised for an answer of a server that says no (:attr:`status` is its HTTP status)."""


class ReportedError(ProgramError):
    """Raised for a stream that ends with a problem (:attr:`status` is what its HTTP status would be)."""

    status: int


class ProtocolError(ProgramError):
    """Raised when the peer breaks the protocol: its answer can't be believed."""


class TransientError(ProgramError):
    """Raised when the network or a gateway failed in a way that usually passes: the request may be repeated."""


# What can be wrong with a file {{{1


class FileError(ProgramError):
    """Raised when the operating system refuses to do something with a file."""

    @classmethod
    def from_os_error(cls, error: OSError, action: str, filename: str) -> FileError:
        """Choose the most specific class for an :exc:`OSError`."""
        kind = _FILE_ERRORS.get(error.errno or 0, cls)
        remedy = REMEDIES.get(error.errno or 0)
        reason = (error.strerror or str(error)) + (f": {remedy}" if remedy else "")
        return kind("Can't {action} {filename}: {reason}", action=action, filename=filename, reason=reason)


class FileMissingError(FileError):
    """Raised when there is no such file."""

    http_status = 404


class FileForbiddenError(FileError):
    """Raised when a file is there but can't be used like this (permissions, a folder, a FIFO, a read-only mount)."""

    http_status = 403


class FileNameError(FileError):
    """Raised for a name that no file can have."""

    http_status = 400


class DiskFullError(FileError):
    """Raised when there is no room for the data."""

    http_status = 507


class FileTooLargeError(FileError):
    """Raised for a size that no file can have here."""

    http_status = 413


class translating(AbstractContextManager[None]):  # noqa: N801 (it is used like a function)
    """Turn an :exc:`OSError` into a :exc:`FileError` that names the file and what was tried."""

    # A class, since a generator would take longer than the system call that it surrounds.

    def __init__(self, action: str, filename: str):
        """
        Initialize a context manager.

        :param action: What is tried (a verb).
        :param filename: With which file.
        """
        self.action = action
        self.filename = filename

    def __exit__(self, exc_type: Any, error: BaseException | None, traceback: Any) -> None:
        """Translate the error, if there is one."""
        if isinstance(error, OSError):
            raise FileError.from_os_error(error, self.action, self.filename) from error


_FILE_ERRORS: dict[int, type[FileError]] = {
    errno.EACCES: FileForbiddenError,
    errno.EBUSY: FileForbiddenError,
    errno.EDQUOT: DiskFullError,
    errno.EEXIST: FileForbiddenError,
    errno.EFBIG: FileTooLargeError,
    errno.EINVAL: FileNameError,
    errno.EISDIR: FileForbiddenError,
    errno.ELOOP: FileForbiddenError,
    errno.ENAMETOOLONG: FileNameError,
    errno.ENODEV: FileForbiddenError,
    errno.ENOENT: FileMissingError,
    errno.ENOSPC: DiskFullError,
    errno.ENOTDIR: FileMissingError,
    errno.ENXIO: FileForbiddenError,
    errno.EPERM: FileForbiddenError,
    errno.EROFS: FileForbiddenError,
    errno.ETXTBSY: FileForbiddenError,
    errno.EXDEV: FileMissingError,
}

# The way back {{{1

_TRANSIENT = frozenset([502, 503, 504, AbsentError.http_status, DamagedError.http_status])
_BY_STATUS: dict[int, type[ProgramError]] = {
    error.http_status: error
    for error in (
        AuthenticationError,
        DigestMismatchError,
        DiskFullError,
        FileMissingError,
        ForbiddenError,
        ReplacedError,
        TakenOverError,
    )
}


def get_error_class(status: int, is_ours: bool = True) -> type[ProgramError]:
    """
    Choose the most specific class for a server that says no.

    :param status: The HTTP status.
    :param is_ours: Whether the answer is known to come from a pdiffcopy server, and not from something in between.
    :returns: :exc:`TransientError` where the same request may succeed later.
    """
    if status in _TRANSIENT:
        return TransientError
    return _BY_STATUS.get(status, RemoteError) if is_ours else RemoteError


# How a run can end badly {{{1


class SourceChangedError(ProgramError):
    """Raised when the source changed while it was copied: run again, or copy a snapshot."""

    exit_code = 3

    @classmethod
    def of(cls, label: str, what: str) -> SourceChangedError:
        """
        Make an error.

        :param label: How the source is called.
        :param what: What has changed of it: ``identity``, ``size``, ``time`` or ``contents``.
        """
        text = "The source {label} changed while it was copied (its {what}): run again, or copy a snapshot"
        return cls(text, label=label, what=what)


class FilesFailedError(ProgramError):
    """Raised at the end of a run of many files of which some have failed. Its exit code is theirs, if they agree."""


class VerificationError(ProgramError):
    """Raised when a part of the target keeps differing from what the source sent."""

    exit_code = 4
