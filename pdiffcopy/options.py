"""
Which options are there, and what do they mean?

The usage message is in :mod:`.cli`; a test sees to it that it names all of them.
"""

from __future__ import annotations

import getopt
import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import coloredlogs
from humanfriendly import parse_size

from pdiffcopy.exceptions import UsageError
from pdiffcopy.pace import LEAST_RATE


def _parse_text(option: str, value: str) -> str:
    if not value:
        raise UsageError("{option} needs a value", option=option)
    return value


_SIZE = re.compile(r"[0-9]+ *(b|bytes?)?|[0-9]+(\.[0-9]+)? *[kmgtpezy]i?b?", re.ASCII | re.IGNORECASE)


def _parse_size(option: str, value: str) -> int:
    try:
        # humanfriendly looks at the first letter of a unit, so a Mbit would be a megabyte, and so would a Mi.
        if _SIZE.fullmatch(value):
            return int(parse_size(f"{value}B" if value[-1] in "iI" else value))
    except (ValueError, OverflowError):  # for a number without end
        pass
    text = "{option} needs a size in bytes like 65536, 64KiB or 4MiB, not {value}"
    raise UsageError(text, option=option, value=repr(value))


def _parse_rate(option: str, value: str) -> int:
    rate = _parse_size(option, value)
    if rate < LEAST_RATE:
        text = "{option} has to be at least {least} (bytes a second, or something like 10MiB), not {value}"
        raise UsageError(text, option=option, least=LEAST_RATE, value=repr(value))
    return rate


def _parse_number(option: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        text = "{option} needs a whole number without a sign, not {value}"
        raise UsageError(text, option=option, value=repr(value))
    return int(value)


def _parse_count(option: str, value: str) -> int:
    number = _parse_number(option, value)
    if not number:
        raise UsageError("{option} has to be at least 1", option=option)
    return number


_MAX_SECONDS = 1_000_000
"""In the kernel a wait has milliseconds, and 31 bits for them (poll(2))."""


def _parse_seconds(option: str, value: str) -> float:
    try:
        seconds = float(value) if value.isascii() and "_" not in value else 0
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _MAX_SECONDS:
        text = "{option} needs a number of seconds above 0, and at most {maximum}, not {value}"
        raise UsageError(text, option=option, maximum=_MAX_SECONDS, value=repr(value))
    return seconds


def _parse_names(option: str, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|\*", name):
            text = "{option} needs the name of a host, without a port, not {value}"
            raise UsageError(text, option=option, value=repr(name))
    return names


def _parse_rule(option: str, value: str) -> tuple[tuple[bool, str], ...]:
    return ((option == "--include", _parse_text(option, value)),)


# What each option means: who wants it ("both", "client" or "server"), its name there, and how its value is read.
# An option whose value isn't read takes none.
OPTIONS: dict[str, tuple[str, str, Callable[[str, str], Any] | None]] = {
    "--block-size": ("client", "block_size", _parse_size),
    "--hash-method": ("client", "hash_method", _parse_text),
    "--whole-file": ("client", "whole_file", None),
    "--concurrency": ("both", "concurrency", _parse_count),
    "--recursive": ("client", "recursive", None),
    "--include": ("client", "rules", _parse_rule),
    "--exclude": ("client", "rules", _parse_rule),
    "--dry-run": ("client", "dry_run", None),
    "--benchmark": ("client", "benchmark", _parse_count),
    "--listen": ("server", "address", _parse_text),
    "--no-verify": ("client", "no_verify", None),
    "--fsync": ("client", "fsync", None),
    "--atomic": ("client", "atomic", None),
    "--perms": ("client", "perms", None),
    "--times": ("client", "times", None),
    "--owner": ("client", "owner", None),
    "--group": ("client", "group", None),
    "--bwlimit": ("both", "bwlimit", _parse_rate),
    "--drop-cache": ("client", "drop_cache", None),
    "--sparse": ("client", "sparse", _parse_text),
    "--timeout": ("client", "timeout", _parse_seconds),
    "--retries": ("client", "retries", _parse_number),
    "--token-file": ("both", "token_file", _parse_text),
    "--ca-file": ("client", "ca_file", _parse_text),
    "--progress": ("client", "progress", _parse_text),
    "--json": ("client", "json", None),
    "--root": ("server", "root", _parse_text),
    "--read-only": ("server", "read_only", None),
    "--allow-set-id": ("server", "allow_set_id", None),
    "--devices": ("server", "devices", None),
    "--certfile": ("server", "certfile", _parse_text),
    "--keyfile": ("server", "keyfile", _parse_text),
    "--allow-host": ("server", "allow_hosts", _parse_names),
    "--access-log": ("server", "access_log", _parse_text),
}
SHORT = {
    "-b": "--block-size",
    "-m": "--hash-method",
    "-W": "--whole-file",
    "-c": "--concurrency",
    "-r": "--recursive",
    "-a": "--archive",
    "-n": "--dry-run",
    "-B": "--benchmark",
    "-l": "--listen",
    "-p": "--perms",
    "-t": "--times",
    "-o": "--owner",
    "-g": "--group",
    "-v": "--verbose",
    "-q": "--quiet",
    "-h": "--help",
}


ARCHIVE = ("--recursive", "--perms", "--times", "--owner", "--group")
"""What --archive stands for."""
_OTHERS = ("archive", "verbose", "quiet", "version", "help")


def parse_arguments(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """
    Read a command line.

    :returns: A tuple of the values of the options by their long names, and the locations.
    :raises: :exc:`.UsageError` for what makes no sense.
    """
    short = "".join(name[1] + (":" if OPTIONS.get(long, (0, 0, 0))[2] else "") for name, long in SHORT.items())
    long = [name[2:] + ("=" if parse else "") for name, (_, _, parse) in OPTIONS.items()]
    try:
        pairs, locations = getopt.gnu_getopt(arguments, short, [*long, *_OTHERS])
    except getopt.GetoptError as e:
        import difflib

        names = [name[2:] for name in OPTIONS] if "not recognized" in e.msg else []
        similar = difflib.get_close_matches(e.opt, names, n=1)
        remedy = f"is it --{similar[0]}?" if similar else "pdiffcopy --help explains"
        raise UsageError("{reason} ({remedy})", reason=e.msg, remedy=remedy) from None
    options: dict[str, Any] = {}
    for name, value in pairs:
        name = SHORT.get(name, name)
        if name == "--verbose":
            coloredlogs.increase_verbosity()
        elif name == "--quiet":
            coloredlogs.decrease_verbosity()
        parse = OPTIONS[name][2] if name in OPTIONS else None
        parsed = parse(name, value) if parse else True
        # What may be repeated is a tuple. Of these two the order counts, whatever stands between them.
        for option in {"--exclude": ("--include",), "--archive": ARCHIVE}.get(name, (name,)):
            options[option] = options.get(option, ()) + parsed if isinstance(parsed, tuple) else parsed
    return options, locations


def seems_to_want_json(arguments: list[str]) -> bool:
    """Guess whether ``--json`` is given (or what it's short for), without making sense of anything else."""
    return any(len(argument) > 2 and "--json".startswith(argument) for argument in takewhile("--".__ne__, arguments))


def select(options: dict[str, Any], side: str) -> dict[str, Any]:
    """
    Pick the options that a side understands, under the names that it has for them.

    :param side: ``client`` or ``server``.
    :raises: :exc:`.UsageError` for an option of the other side.
    """
    selected = {}
    for option, value in options.items():
        if option in OPTIONS:
            wanted_by, name, _ = OPTIONS[option]
            if wanted_by not in (side, "both"):
                text = "{option} is for a {other}, and this would be a {side} (pdiffcopy --help explains)"
                raise UsageError(text, option=option, other=wanted_by, side=side)
            selected[name] = value
    return selected
