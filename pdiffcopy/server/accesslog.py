"""
Who asked the server for what?

A line for each request, in the form ``name=value``, that people and programs can read (it's a single one)::

  2026-01-31T12:00:00+0000 address=192.0.2.1 method=GET endpoint=/blocks file="/srv/disk.img" bytes=1048576 \
      seconds=0.012 status=200 run=-

There's nothing secret in it, and no name can forge a line.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from datetime import timedelta
from typing import Any

from pdiffcopy.exceptions import FileError, printable
from pdiffcopy.words import peek

SENT = "pdiffcopy.sent"
"""The variable of a WSGI environment that says how many bytes of a body went to the client past WSGI."""

_PLAIN = re.compile(r"[A-Za-z0-9/.:_%-]+")
_MAX_LENGTH = 4096

_log = logging.getLogger("pdiffcopy.access")
_log.propagate = False


class _Handler(logging.handlers.WatchedFileHandler):
    """Goes on in a new file when the old one was renamed (logrotate), and survives a full disk."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging for each line. What keeps a new file from being opened arrives nowhere else."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (called by logging)
        """Called by logging when a line can't be written."""
        logging.getLogger(__name__).error("Can't write the access log: %s", sys.exc_info()[1])


def open_access_log(filename: str) -> None:
    """
    Begin to log requests.

    :param filename: Where to (``-`` is stderr).
    :raises: :exc:`.FileError` when that's not possible.
    """
    try:
        handler = logging.StreamHandler() if filename == "-" else _open(filename)
    except OSError as e:
        raise FileError.from_os_error(e, "write the access log", filename) from e
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


def _open(filename: str) -> _Handler:
    """Open a log. A FIFO that nobody reads would be waited for, and is an error."""
    fd = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        return _Handler(filename, encoding="utf-8")
    finally:
        os.close(fd)  # now, and not before: its reader would take that for the end


def log_access(environ: dict[str, Any], status: int, size: int, duration: timedelta) -> None:
    """
    Log a request, if that's wanted.

    :param environ: The WSGI environment of the request.
    :param status: The status of the response.
    :param size: How many bytes the bodies had, as far as they moved.
    :param duration: How long it took.
    """
    if not _log.handlers:
        return
    filename, run = peek(environ.get("QUERY_STRING", ""))
    _log.info(
        "address=%s method=%s endpoint=%s file=%s bytes=%d seconds=%.3f status=%d run=%s",
        _write(environ.get("REMOTE_ADDR")),
        _write(environ.get("REQUEST_METHOD")),
        _write(environ.get("PATH_INFO")),
        "-" if filename is None else _quote(filename),
        size,
        duration.total_seconds(),
        status,
        _write(run),
    )


def _write(text: str | None) -> str:
    return (text if _PLAIN.fullmatch(text) else _quote(text)) if text else "-"


def _quote(text: str) -> str:
    """Let a value end where it ends."""
    text = text[:_MAX_LENGTH].replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(text)}"'
