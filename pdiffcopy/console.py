"""
How does the program deal with what surrounds it: standard streams, signals, logging?

Whatever ends the program becomes one line on stderr, and a JSON object on stdout when the user asked for that.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import coloredlogs

from pdiffcopy.exceptions import FileError, ProgramError, UsageError, describe_error, printable

logger = logging.getLogger(__name__)


class EndingSignal(KeyboardInterrupt):
    """A signal arrived that ends the program."""

    def __init__(self, number: int):
        """Initialize an exception for a signal of this number."""
        super().__init__(number)
        self.number = number


_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_HEARD = (*_SIGNALS, signal.SIGALRM)
"""What the program hears: an alarm is one of these that arrives again."""
_QUIET = ("urllib3", "property_manager", "humanfriendly.prompts")
"""Whose messages aren't shown: tracebacks of what ends up as one line in our own words, and hundreds of lines about
properties."""
_is_ending = False
_is_json_due = False
"""Whether a JSON object has to be printed, whatever happens. (There's only one.)"""
_is_stdout_closed = False
"""Whether somebody has closed stdout, so that nobody reads what is printed there."""


def open_standard_streams() -> None:
    """
    See to it that nothing else gets the numbers of the standard streams, in case that somebody has closed them.

    A message would end up in the target otherwise.
    """
    global _is_stdout_closed
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            _is_stdout_closed |= fd == 1
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _let_go_of_terminal() -> None:
    """A terminal may be gone: to write there would fail, and take the place of what really happened."""
    for fd in (1, 2):
        try:
            os.write(fd, b"")
        except OSError:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), fd)


def log_messages() -> None:
    """Write messages to stderr: for somebody at a terminal without when, where and from which process they come."""
    is_configured = "COLOREDLOGS_LOG_FORMAT" in os.environ
    try:
        coloredlogs.install(fmt="%(message)s" if sys.stderr.isatty() and not is_configured else None)
        record = logging.makeLogRecord({})
        for handler in logging.getLogger().handlers:
            handler.filter(record)
            handler.format(record)
    except Exception as e:  # one of its many variables has a value that it doesn't like
        plain = "%(asctime)s %(name)s[%(process)d] %(levelname)s %(message)s"
        logging.basicConfig(level=logging.INFO, format=plain, force=True)
        logger.warning("Messages look plain, since $COLOREDLOGS_... has a bad value: %s", e)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_prepare)


def _prepare(record: logging.LogRecord) -> bool:
    """Nobody on the other side gets to write control characters to our terminal, and some aren't heard at all."""
    if record.levelno < logging.ERROR and record.name.startswith(_QUIET):
        return False
    with suppress(Exception):  # a message that can't be formatted: that's reported elsewhere
        record.msg, record.args = printable(record.getMessage()), None
    return True


def heed_signals() -> None:
    """Let signals end the program in an orderly way from now on."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) and a shell without job control leave it
            signal.signal(number, _end)
    sys.unraisablehook = _hear_again
    # They were kept waiting until now, see __main__.py.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)


def ignore_signals() -> None:
    """Let no signal end the program any more."""
    for number in _HEARD:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: Any) -> NoReturn:
    """End in an orderly way when the first signal arrives, and at once (child processes, too) at the second one."""
    global _is_ending
    if number == signal.SIGHUP:
        _let_go_of_terminal()
    if _is_ending:
        ignore_signals()
        os._exit(fail(*describe_end(EndingSignal(number))))
    _is_ending = True
    raise EndingSignal(number)


def _hear_again(unraisable: Any) -> None:
    """
    Let a signal arrive again, after it arrived where Python ignores exceptions (a finalizer or another callback).

    It can't do so at once, since exceptions are ignored here, too.
    """
    if not isinstance(unraisable.exc_value, EndingSignal):
        sys.__unraisablehook__(unraisable)
        return
    number = unraisable.exc_value.number

    def end(alarm: int, frame: Any) -> NoReturn:
        raise EndingSignal(number)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def promise_json(is_promised: bool) -> None:
    """Let it be known whether another program reads a JSON object from stdout, so that it gets one in any case."""
    global _is_json_due
    _is_json_due = is_promised


def print_json(document: dict[str, Any]) -> None:
    """Print what other programs want to know. They have to get all of it, or to learn that they didn't."""
    with printing():
        print(json.dumps(document))


@contextmanager
def printing() -> Iterator[None]:
    """Let it be known when what a program wants to know doesn't get to it, and print nothing of that kind again."""
    promise_json(False)
    try:
        if _is_stdout_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        yield
        sys.stdout.flush()
    except OSError as e:
        with open(os.devnull, "wb") as nowhere:  # or Python would try again when it ends
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise FileError.from_os_error(e, "write to", "stdout") from e


def fail(message: str, status: int) -> int:
    """Say why the program ends, in a line and (if it's wanted) as a JSON object, and return the exit code."""
    if _is_json_due:
        with suppress(ProgramError, RuntimeError):  # the latter when a signal has interrupted just that
            print_json({"error": message, "exit_code": status})
    with suppress(OSError):
        os.write(2, f"pdiffcopy: {printable(message)}\n".encode("utf-8", "backslashreplace"))
    return status


def describe_end(reason: BaseException) -> tuple[str, int]:
    """What to say of what ends the program, and the exit code."""
    if isinstance(reason, EndingSignal):
        return _SIGNALS[signal.Signals(reason.number)], 128 + reason.number  # as a shell has it
    if isinstance(reason, ProgramError):
        return str(reason), reason.exit_code
    return f"{describe_error(reason)} (-v shows where)", 1


def show_traceback(reason: BaseException) -> None:
    """Print where an error comes from, if the user wants to know (and hasn't typed it)."""
    if logger.isEnabledFor(logging.INFO - 1) and not isinstance(reason, (EndingSignal, UsageError)):
        traceback.print_exception(reason)


def leave(status: int) -> NoReturn:
    """
    End the program, without waiting for threads that wait for something else.

    Nor is anything taken apart that goes away with the process, which takes some milliseconds.
    """
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


@contextmanager
def starting() -> Iterator[None]:
    """Import what is needed without looking for garbage in it, now or ever: that's a sixth of the time of a start."""
    enabled, is_first = gc.isenabled(), not {"pdiffcopy.client", "pdiffcopy.server"} & set(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if enabled:
            gc.enable()
