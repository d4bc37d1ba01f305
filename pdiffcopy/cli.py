"""
Usage: pdiffcopy [OPTIONS] [SOURCE TARGET]

Bring one large file in line with another one, on this server or elsewhere: both are hashed on many cores, and only
the blocks that differ are moved, many at a time.

SOURCE is read, TARGET is written. Each is the pathname of a local file, or the location of a file behind a pdiffcopy
server: 'host:/path', 'host:port/path', '[v6]:port/path' (as it is) or 'http://host:port/path', 'https://...'
(percent-encoded). The default port is 8080. A local file with a colon before the first slash of its name is written
'./host:8080/x'.

Without SOURCE and TARGET the server is started.

Supported options:

  -b, --block-size=BYTES

    How much is compared and moved as one unit: a number of bytes, or something like 64KiB or 4MiB (defaults to 1 MiB).

  -m, --hash-method=NAME

    How blocks are compared: any hash method of Python's hashlib that has a fixed length, 'xxh128' (by far the
    fastest, for files that nobody manipulates on purpose) or 'blake3'. The default is 'sha1'.

  -W, --whole-file

    Don't compare, copy everything.

  -c, --concurrency=COUNT

    How many blocks are hashed and how many requests are made at the same time, or how many processes serve them
    (defaults to a third of the cores, but at least two).

  -n, --dry-run

    Compare and report the similarity, but write nothing.

  -B, --benchmark=COUNT

    Damage TARGET (a local file) more and more, COUNT times, bring it into line each time, and print what that took.
    Asks for confirmation, unless $PDIFFCOPY_BENCHMARK is 'allowed'. To compare with an rsync daemon, set
    $PDIFFCOPY_BENCHMARK_RSYNC_SERVER (host:port), $PDIFFCOPY_BENCHMARK_RSYNC_MODULE and
    $PDIFFCOPY_BENCHMARK_RSYNC_ROOT (the directory that the module stands for).

  -l, --listen=ADDRESS

    Start a server that listens on PORT, HOST, HOST:PORT or [v6]:PORT.

  --no-verify

    Don't check what was moved as it lies in TARGET.

  --fsync

    Flush TARGET to its disk before success is reported.

  --timeout=SECONDS

    How long the other side may show no sign of life (defaults to 60).

  --retries=COUNT

    How often in a row something may fail because of the network before the run does (defaults to 8, which bridges
    about 20 seconds).

  --token-file=FILE

    The shared secret that a server asks for, and that a client gives (or set $PDIFFCOPY_TOKEN). Nobody else may be
    able to read that file.

  --ca-file=FILE

    Trust this certificate authority when the location starts with https://.

  --json

    Print one JSON object on stdout when all is done (messages go to stderr).

  --root=DIRECTORY

    Server: paths are resolved inside this directory and can't leave it.

  --read-only

    Server: refuse to write.

  --devices

    Server: serve block devices too, not only regular files.

  --certfile=FILE, --keyfile=FILE

    Server: serve https with this certificate and its key.

  --allow-host=NAME

    Server: clients may call it by this name (can be repeated, or several with commas; '*' is any name). Addresses,
    'localhost', the name behind --listen and the name of this machine are allowed anyway. Web pages get in by no name.

  --access-log=FILE

    Server: write a line for each request to this file ('-' is stderr).

  -v, --verbose

    Say more (can be repeated).

  -q, --quiet

    Say less (can be repeated).

  --version

    Show the version and exit.

  -h, --help

    Show this message and exit.

Exit codes: 0 done, 1 failed, 3 SOURCE changed while it was copied (run again, or copy a snapshot), 4 a block could
not be verified, 129 hung up, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import gc
import getopt
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import coloredlogs
from humanfriendly import InvalidSize, parse_size
from humanfriendly.terminal import usage

from pdiffcopy import __version__
from pdiffcopy.exceptions import DependencyError, FileError, ProgramError, UsageError, describe_error, printable
from pdiffcopy.security import load_token, warn_of_eavesdroppers

if TYPE_CHECKING:
    from pdiffcopy.client import Client

logger = logging.getLogger(__name__)


def _parse_text(option: str, value: str) -> str:
    if not value:
        raise UsageError("{option} needs a value", option=option)
    return value


def _parse_size(option: str, value: str) -> int:
    try:
        return parse_size(value)
    except (InvalidSize, ValueError, OverflowError):  # the latter two for a number without end
        raise UsageError(
            "{option} needs a size like 65536, 64KiB or 4MiB, not {value}", option=option, value=repr(value)
        ) from None


def _parse_number(option: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise UsageError("{option} needs a number, not {value}", option=option, value=repr(value))
    return int(value)


def _parse_count(option: str, value: str) -> int:
    number = _parse_number(option, value)
    if not number:
        raise UsageError("{option} has to be at least 1", option=option)
    return number


def _parse_seconds(option: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError("{option} needs a number of seconds, not {value}", option=option, value=repr(value))
    return seconds


def _parse_names(option: str, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|\*", name):
            text = "{option} needs the name of a host, without a port, not {value}"
            raise UsageError(text, option=option, value=repr(name))
    return names


# What each option means: who wants it ("both", "client" or "server"), its name there, and how its value is read.
# An option whose value isn't read takes none.
_OPTIONS: dict[str, tuple[str, str, Callable[[str, str], Any] | None]] = {
    "--block-size": ("client", "block_size", _parse_size),
    "--hash-method": ("client", "hash_method", _parse_text),
    "--whole-file": ("client", "whole_file", None),
    "--concurrency": ("both", "concurrency", _parse_count),
    "--dry-run": ("client", "dry_run", None),
    "--benchmark": ("client", "benchmark", _parse_count),
    "--listen": ("server", "address", _parse_text),
    "--no-verify": ("client", "no_verify", None),
    "--fsync": ("client", "fsync", None),
    "--timeout": ("client", "timeout", _parse_seconds),
    "--retries": ("client", "retries", _parse_number),
    "--token-file": ("both", "token_file", _parse_text),
    "--ca-file": ("client", "ca_file", _parse_text),
    "--json": ("client", "json", None),
    "--root": ("server", "root", _parse_text),
    "--read-only": ("server", "read_only", None),
    "--devices": ("server", "devices", None),
    "--certfile": ("server", "certfile", _parse_text),
    "--keyfile": ("server", "keyfile", _parse_text),
    "--allow-host": ("server", "allow_hosts", _parse_names),
    "--access-log": ("server", "access_log", _parse_text),
}
_SHORT = {
    "-b": "--block-size",
    "-m": "--hash-method",
    "-W": "--whole-file",
    "-c": "--concurrency",
    "-n": "--dry-run",
    "-B": "--benchmark",
    "-l": "--listen",
    "-v": "--verbose",
    "-q": "--quiet",
    "-h": "--help",
}


class _Signal(KeyboardInterrupt):
    """A signal arrived that ends the program."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def describe(self) -> tuple[str, int]:
        """What to say, and the exit code (as a shell has it)."""
        return _SIGNALS[signal.Signals(self.number)], 128 + self.number


_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def main() -> NoReturn:
    """The command line interface."""
    _open_standard_streams()
    try:
        _heed_signals()
        _log_messages()
        _run(sys.argv[1:])
        message, status = "", 0
    except _Signal as e:
        message, status = e.describe()
    except ProgramError as e:
        message, status = str(e), e.exit_code
        _show_traceback()
    except Exception as e:
        message, status = f"{describe_error(e)} (-v shows where)", 1
        _show_traceback()
    _ignore_signals()  # what comes now would only hide how it ended
    if status:
        _fail(message, status)
    if _is_ending:  # without waiting for threads that wait for something else
        os._exit(status)
    sys.exit(status)


def _show_traceback() -> None:
    if logger.isEnabledFor(logging.INFO - 1):
        traceback.print_exc()


def _log_messages() -> None:
    """Write messages to stderr: for somebody at a terminal without when, where and from which process they come."""
    is_configured = "COLOREDLOGS_LOG_FORMAT" in os.environ
    try:
        coloredlogs.install(fmt="%(message)s" if sys.stderr.isatty() and not is_configured else None)
    except Exception as e:  # one of its many variables has a value that it doesn't like
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s %(message)s")
        logger.warning("Messages look plain, since $COLOREDLOGS_... has a bad value: %s", e)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_escape)
    # It prints tracebacks of what ends up as one line in our own words.
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def _open_standard_streams() -> None:
    """
    See to it that nothing else gets the numbers of the standard streams, in case that somebody has closed them.

    A message would end up in the target otherwise.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False))


def _print_json(document: dict[str, Any]) -> None:
    """Print what other programs want to know. They have to get all of it, or to learn that they didn't."""
    try:
        print(json.dumps(document), flush=True)
    except OSError as e:
        with open(os.devnull, "wb") as nowhere:  # or Python would try again when it ends
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise FileError.from_os_error(e, "write the report to", "stdout") from e


def _heed_signals() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) and a shell without job control leave it
            signal.signal(number, _end)
    # They were kept waiting until now, see __main__.py.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: Any) -> NoReturn:
    """End in an orderly way when the first signal arrives, and at once (child processes, too) at the second one."""
    global _is_ending
    if number == signal.SIGHUP:
        _let_go_of_terminal()
    if _is_ending:
        _ignore_signals()
        os._exit(_fail(*_Signal(number).describe()))
    _is_ending = True
    raise _Signal(number)


_is_ending = False


def _let_go_of_terminal() -> None:
    """A terminal may be gone: to write there would fail, and take the place of what really happened."""
    for fd in (1, 2):
        try:
            os.write(fd, b"")
        except OSError:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), fd)


def _escape(record: logging.LogRecord) -> bool:
    """Nobody on the other side gets to write control characters to our terminal."""
    with suppress(Exception):  # a message that can't be formatted: that's reported elsewhere
        record.msg, record.args = printable(record.getMessage()), None
    return True


def _fail(message: str, status: int) -> int:
    if "--json" in sys.argv[1:]:
        with suppress(ProgramError, RuntimeError):  # the latter when a signal has interrupted just that
            _print_json({"error": message, "exit_code": status})
    with suppress(OSError):
        os.write(2, f"pdiffcopy: {printable(message)}\n".encode("utf-8", "backslashreplace"))
    return status


def _run(arguments: list[str]) -> None:
    options, locations = _parse_arguments(arguments)
    if "--help" in options:
        usage(__doc__ or "")
    elif "--version" in options:
        print(f"pdiffcopy {__version__}")
    elif not locations:
        run_server(**_select(options, "server"))
    elif "--listen" in options:
        raise UsageError("--listen starts a server, which takes no locations: leave out one or the other")
    elif len(locations) != 2:
        raise UsageError("Give two locations, SOURCE and TARGET (pdiffcopy --help explains)")
    else:
        run_client(source=locations[0], target=locations[1], **_select(options, "client"))


def _parse_arguments(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of the options by their long names, and the locations."""
    short = "".join(name[1] + (":" if _OPTIONS.get(long, (0, 0, 0))[2] else "") for name, long in _SHORT.items())
    long = [name[2:] + ("=" if parse else "") for name, (_, _, parse) in _OPTIONS.items()]
    try:
        pairs, locations = getopt.gnu_getopt(arguments, short, long + ["verbose", "quiet", "version", "help"])
    except getopt.GetoptError as e:
        raise UsageError("{reason} (pdiffcopy --help explains)", reason=e.msg) from None
    options: dict[str, Any] = {}
    for name, value in pairs:
        name = _SHORT.get(name, name)
        if name == "--verbose":
            coloredlogs.increase_verbosity()
        elif name == "--quiet":
            coloredlogs.decrease_verbosity()
        parse = _OPTIONS[name][2] if name in _OPTIONS else None
        parsed = parse(name, value) if parse else True
        # What may be repeated is a tuple.
        options[name] = options.get(name, ()) + parsed if isinstance(parsed, tuple) else parsed
    return options, locations


def _select(options: dict[str, Any], side: str) -> dict[str, Any]:
    """The options that a side understands, under the names that it has for them."""
    selected = {}
    for option, value in options.items():
        if option in _OPTIONS:
            wanted_by, name, _ = _OPTIONS[option]
            if wanted_by not in (side, "both"):
                text = "{option} is for a {other}, and this would be a {side} (pdiffcopy --help explains)"
                raise UsageError(text, option=option, other=wanted_by, side=side)
            selected[name] = value
    return selected


def run_client(**options: Any) -> None:
    """
    Run the client program.

    :param options: The options of the command line by their long names (with underscores): ``source``, ``target``,
                    ``block_size``, ``hash_method``, ``whole_file``, ``concurrency``, ``dry_run``, ``benchmark``,
                    ``no_verify``, ``fsync``, ``timeout``, ``retries``, ``token_file``, ``ca_file``, ``json``.
    """
    as_json = options.pop("json", False)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with _starting():
        client = _make_client(**options)
    warn_of_eavesdroppers(client)
    if client.benchmark:
        outcome = {"measurements": [vars(measurement) for measurement in client.run_benchmark()]}
    else:
        outcome = client.run().as_dict()
    if as_json:
        _print_json(outcome)


def _make_client(**options: Any) -> Client:
    try:
        from pdiffcopy.client import Client
        from pdiffcopy.locations import Network, open_replica
    except ImportError as e:
        text = "A client requirement is missing ({error}): install pdiffcopy[client] from its checkout (README.rst)"
        raise DependencyError(text, error=e) from e
    network: dict[str, Any] = {name: options.pop(name) for name in ("timeout", "retries", "ca_file") if name in options}
    network["token"] = load_token(options.pop("token_file", ""))
    client = Client(
        delta_transfer=not options.pop("whole_file", False),
        verify=not options.pop("no_verify", False),
        network=Network(**network),
        **options,
    )
    with suppress(DependencyError):  # that's for the run to tell
        for location in (client.source, client.target):
            open_replica(location.address, client.network)
    return client


@contextmanager
def _starting() -> Iterator[None]:
    """Import what is needed without looking for garbage in it, now or ever: that's a sixth of the time of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if enabled:
            gc.enable()


def run_server(**options: Any) -> None:
    """
    Run the server program.

    :param options: The options of the command line by their long names (with underscores): ``address``,
                    ``concurrency``, ``root``, ``token_file``, ``read_only``, ``devices``, ``certfile``, ``keyfile``,
                    ``allow_hosts``, ``access_log``.
    """
    try:
        with _starting():
            import pdiffcopy.daemon  # noqa: F401 (start_server needs it)
            from pdiffcopy.server import Settings, start_server
    except ImportError as e:
        text = "A server requirement is missing ({error}): install pdiffcopy[server] from its checkout (README.rst)"
        raise DependencyError(text, error=e) from e
    names = ("root", "read_only", "devices", "allow_hosts")
    settings: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    settings["token"] = load_token(options.pop("token_file", ""))
    start_server(settings=Settings(**settings), **options)
