"""
How are the words of a request spelled, and what is refused?

A word has a name, a value, and a form in which it stands in a query string or a header. :mod:`.protocol` makes requests
of words. Whatever is wrong with one is a :exc:`.RequestError`, or as specific.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from pdiffcopy.blocks import MAX_OFFSET, MAX_TIME
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import DamagedError, RequestError, TooLargeError, UsageError

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`.digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
MAX_LINE = 8190
"""How long the first line of a request may be, in characters. (Other servers in between mostly take 8 KiB.)"""
ANSWER_HEADER = "Pdiffcopy-Answer"
"""Says to which request an answer belongs (:func:`.sign_answer`): one that was kept or repeated isn't believed."""

MAX_BLOCK_SIZE = 1024**3
"""The largest block that one request may ask for or carry, in bytes."""
MAX_CONCURRENCY = 1024
_MAX_PARAMETERS = 32


def check_concurrency(count: int) -> None:
    """Refuse a number of processes or threads that can't be meant."""
    if not 0 < count <= MAX_CONCURRENCY:
        raise UsageError("The concurrency has to be from 1 to {limit}", limit=MAX_CONCURRENCY)


INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")


class Text:
    """Any text."""

    def read(self, name: str, text: str) -> Any:
        """
        Make a value of what stands in a request.

        :raises: :exc:`.RequestError` for what isn't one.
        """
        return text

    def write(self, value: Any) -> str | bytes:
        """Spell a value."""
        return str(value)


class Filename(Text):
    """An absolute pathname. Its bytes need not be UTF-8."""

    def read(self, name: str, text: str) -> str:
        """See :meth:`Text.read`."""
        if "\0" in text:
            raise RequestError("The filename contains a NUL byte")
        if not text.startswith("/"):
            raise RequestError("The filename {filename} isn't absolute: begin it with a slash", filename=repr(text))
        return text

    def write(self, value: str) -> bytes:
        """See :meth:`Text.write`."""
        return os.fsencode(value)


class Word(Text):
    """A word of a certain form."""

    def __init__(self, pattern: str, complaint: str):
        """
        Initialize a kind.

        :param pattern: A regular expression for the form.
        :param complaint: What is wrong with a value that doesn't have it.
        """
        self.pattern = re.compile(pattern)
        self.complaint = complaint

    def read(self, name: str, text: str) -> str:
        """See :meth:`Text.read`."""
        if not self.pattern.fullmatch(text):
            raise RequestError(self.complaint, value=repr(text[:80]))
        return text


class Integer(Text):
    """A decimal number within bounds."""

    def __init__(self, minimum: int = 0, maximum: int = MAX_OFFSET):
        """Initialize a kind with its bounds."""
        self.minimum, self.maximum = minimum, maximum

    def read(self, name: str, text: str) -> int:
        """See :meth:`Text.read`."""
        if not INTEGER.fullmatch(text) or int(text) < self.minimum:
            complaint = "The parameter {name} must be an integer of at least {minimum}, not {value}"
            raise RequestError(complaint, name=name, minimum=self.minimum, value=repr(text[:40]))
        if int(text) > self.maximum:
            complaint = "The parameter {name} is {value}, this server's limit is {maximum}"
            raise TooLargeError(complaint, name=name, value=text, maximum=self.maximum)
        return int(text)


class Time(Text):
    """A number of nanoseconds since 1970, which may be negative."""

    def read(self, name: str, text: str) -> int:
        """See :meth:`Text.read`."""
        if not re.fullmatch(r"0|-?[1-9][0-9]{0,29}", text) or abs(int(text)) > MAX_TIME:
            raise RequestError("The parameter {name} is no time: {value}", name=name, value=repr(text[:40]))
        return int(text)


class Flag(Integer):
    """1 or 0."""

    def __init__(self) -> None:
        """Initialize a kind."""
        super().__init__(0, 1)

    def read(self, name: str, text: str) -> bool:
        """See :meth:`Text.read`."""
        return bool(super().read(name, text))

    def write(self, value: bool) -> str:
        """See :meth:`Text.write`."""
        return str(int(value))


FILE_ID = Word(r"[!-~]{1,80}", "{value} isn't the identity of a file")
RUN = Word(r"[0-9a-f]{1,64}", "The run {value} isn't a word of hexadecimal digits")
ACCOUNT = Word(r"[^\0:/]{1,256}", "{value} isn't the name of a user or a group")
DIGEST = Word(r"[0-9a-f]{32}", "{value} isn't a digest of 32 hexadecimal digits")


def check_digest(digest: str) -> str:
    """
    Refuse what can't be the value of :data:`.DIGEST_HEADER`.

    :raises: :exc:`.RequestError` for anything but 32 hexadecimal digits in small letters.
    """
    return DIGEST.read("", digest)


class Declaration(NamedTuple):
    """What a request says of one of its words, see :func:`word`."""

    kind: Text
    default: Any
    header: str
    is_frozen: bool


REQUIRED = object()
"""The default of a word that has none."""


def word(kind: Text, default: Any = REQUIRED, header: str = "", is_frozen: bool = False) -> Any:
    """
    Declare a word of a request. It has the name of its parameter.

    :param kind: How the value is spelled.
    :param default: What it is when the request doesn't say so (by default the request has to).
    :param header: The header that carries it in place of a parameter.
    :param is_frozen: Whether version 1.0.1 wants it in each request, also where it is the default of ours.
    """
    return Declaration(kind, default, header, is_frozen)


# Query strings {{{1


def parse_query(query: bytes) -> dict[str, str]:
    """
    Take a query string apart.

    :param query: The query string as it came over the wire (names of files are bytes, not always UTF-8).
    :raises: :exc:`.RequestError` when it is malformed, or when a parameter is given twice.
    """
    try:
        text = query.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        raise RequestError("The query string is malformed") from None
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestError("A parameter is given twice")
    return values


def peek(query: str) -> tuple[str | None, str]:
    """
    Find out what a request is about that may be malformed, for a log.

    :returns: A tuple of the filename (:data:`None` if there is none) and the run (empty if there is none).
    """
    try:
        pairs = parse_qsl(query, errors="surrogateescape", max_num_fields=100)
    except ValueError:
        return None, ""
    values = dict(reversed(pairs))  # of several the first one counts
    return values.get("filename"), values.get("run", "")


def make_query(filename: str, **parameters: Any) -> str:
    """Spell a query string by hand, for :meth:`.Location.get_url`."""
    return urlencode({"filename": os.fsencode(filename), **parameters})


def digest_query(query: str) -> str:
    """Compute the digest of a query string, whatever the order and the spelling of its parameters."""
    pairs = sorted(parse_qsl(query, keep_blank_values=True, encoding="latin-1", max_num_fields=_MAX_PARAMETERS))
    return compute_digest(repr(pairs).encode("ascii", "backslashreplace"))


def check_query(query: bytes, digest: str) -> None:
    """Raise :exc:`.DamagedError` when a request isn't what its header :data:`.REQUEST_HEADER` says (if it has one)."""
    try:
        damaged = bool(digest) and digest_query(query.decode("ascii")) != digest
    except ValueError:
        damaged = True
    if damaged:
        raise DamagedError("The request was damaged on its way")
