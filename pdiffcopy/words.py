"""
How are the words of a request spelled, and what is refused?

A word has a name, a value, and a form in which it stands in a query string or a header. :mod:`.protocol` makes requests
of words. Whatever is wrong with one is a :exc:`.RequestError`, or as specific.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from pdiffcopy.blocks import MAX_OFFSET, MAX_TIME, Extent, total_size
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import DamagedError, RequestError, TooLargeError, UsageError

DIGEST_HEADER = "Pdiffcopy-Digest"
REQUEST_HEADER = "Pdiffcopy-Request"
"""The digest of the parameters of a request (:func:`.digest_query`): nothing gets written to the wrong place because a
bit of an offset was damaged on its way. A server that knows the header answers 422 when it doesn't fit."""
ANSWER_HEADER = "Pdiffcopy-Answer"
"""Says to which request an answer belongs (:func:`.sign_answer`): one that was kept or repeated isn't believed."""

MAX_BLOCK_SIZE = 1024**3
"""The largest block that one request may ask for or carry, in bytes."""
MAX_EXTENTS = 128
"""How many extents fit into one request (each takes some twenty characters of its URL)."""
MAX_PACKED = 1024
"""How many do in their packed form (each takes three or four characters)."""
MAX_CONCURRENCY = 1024
_MAX_PARAMETERS = 32


def check_concurrency(count: int) -> None:
    """Refuse a number of processes or threads that can't be meant."""
    if not 0 < count <= MAX_CONCURRENCY:
        raise UsageError("The concurrency has to be from 1 to {limit}", limit=MAX_CONCURRENCY)


_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")


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
        if not _INTEGER.fullmatch(text) or int(text) < self.minimum:
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


class Extents(Text):
    """``OFFSET:SIZE,OFFSET:SIZE,...``"""

    def read(self, name: str, text: str) -> tuple[Extent, ...]:
        """See :meth:`Text.read`."""
        items = text.split(",")
        if len(items) > MAX_EXTENTS:
            raise TooLargeError("A request may carry {maximum} extents at most", maximum=MAX_EXTENTS)
        extents = []
        for item in items:
            offset, _, size = item.partition(":")
            if not (_INTEGER.fullmatch(offset) and _INTEGER.fullmatch(size) and int(size)):
                raise RequestError("{value} isn't an extent: write OFFSET:SIZE", value=repr(item[:80]))
            extents.append(Extent(int(offset), int(size)))
        check_extents(extents)
        return tuple(extents)

    def write(self, value: Sequence[Extent]) -> str:
        """See :meth:`Text.write`."""
        return ",".join(f"{extent.offset}:{extent.size}" for extent in value)


class Packed(Text):
    """
    Many extents in a few characters each, in ascending order.

    In base64url without padding (RFC 4648) there are numbers of 7 bits a byte, the lowest bits first, with the highest
    bit of each byte but the last one set (LEB128): the unit in bytes, and for each extent its distance from the end of
    the one before and its size, both in units. The last size is rounded up, and the last number says by how many bytes.
    """

    def __init__(self, most: int = MAX_BLOCK_SIZE):
        """:param most: How many bytes they may have together."""
        self.most = most

    def read(self, name: str, text: str) -> tuple[Extent, ...]:
        """See :meth:`Text.read`."""
        try:
            unit, *pairs, surplus = _read_numbers(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
        except ValueError:
            raise RequestError("The packed extents are malformed") from None
        if len(pairs) > 2 * MAX_PACKED:
            raise TooLargeError("A request may carry {maximum} packed extents at most", maximum=MAX_PACKED)
        if len(pairs) % 2 or not unit or not pairs or not all(pairs[1::2]) or surplus >= unit:
            raise RequestError("The packed extents are malformed")
        extents, end = [], 0
        for distance, size in zip(pairs[::2], pairs[1::2], strict=True):
            extents.append(Extent(end + distance * unit, size * unit))
            end += (distance + size) * unit
        extents[-1] = Extent(extents[-1].offset, extents[-1].size - surplus)
        check_extents(extents, self.most)
        return tuple(extents)

    def write(self, value: Sequence[Extent]) -> str:
        """See :meth:`Text.write`."""
        if not value:
            return ""
        last = value[-1].size
        unit = math.gcd(*(offset for offset, _ in value), *(size for _, size in value[:-1])) or last
        numbers, end = [unit], 0
        for offset, size in value:
            numbers += [(offset - end) // unit, -(-size // unit)]
            end = offset + -(-size // unit) * unit
        numbers.append(-last % unit)
        return base64.urlsafe_b64encode(b"".join(map(_write_number, numbers))).rstrip(b"=").decode("ascii")


def _write_number(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_numbers(data: bytes) -> list[int]:
    numbers, number, shift = [], 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if shift > 63:
            raise ValueError("too large")
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    if shift or len(numbers) < 2:
        raise ValueError("it ends early")
    return numbers


def check_extents(extents: Sequence[Extent], most: int = MAX_BLOCK_SIZE) -> None:
    """Refuse extents that reach beyond what a file can be, or that are together too large for a request."""
    if any(extent.offset + extent.size > MAX_OFFSET for extent in extents):
        raise TooLargeError("An extent reaches beyond {maximum}", maximum=MAX_OFFSET)
    if total_size(extents) > most:
        raise TooLargeError("A request may be about {maximum} bytes at most", maximum=most)


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
