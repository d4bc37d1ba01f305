"""How do extents stand in a URL, and for how many of them does it have room?"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from urllib.parse import quote_plus

from pdiffcopy.blocks import MAX_OFFSET, Extent, total_size
from pdiffcopy.exceptions import RequestError, TooLargeError
from pdiffcopy.words import INTEGER, MAX_BLOCK_SIZE, Text

MAX_EXTENTS = 128
"""How many extents one request may carry..."""
MAX_PACKED = 2048
"""... and how many in their packed form: as many as there are when each other piece differs of those that a request may
ask for."""
EXTENT_LENGTH = 35
"""How many characters of a URL an extent takes at most."""


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
            if not (INTEGER.fullmatch(offset) and INTEGER.fullmatch(size) and int(size)):
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


def split(extents: Sequence[Extent], room: int) -> Iterator[tuple[Extent, ...]]:
    """
    Split extents into parts, each for a request.

    :param room: How many characters of its URL they may take there.
    """
    if not fit(extents, room):
        middle = len(extents) // 2
        yield from split(extents[:middle], room)
        yield from split(extents[middle:], room)
    elif extents:
        yield tuple(extents)


def fit(extents: Sequence[Extent], room: int) -> bool:
    """Whether a request has room for some extents. One is never too much."""
    if len(extents) <= count_certain(room):
        return True
    _, form = choose_form(extents)
    return len(extents) <= MAX_PACKED and len(quote_plus(form.write(extents))) <= room


def count_certain(room: int) -> int:
    """Count the extents that a request has room for, whatever they are (at least one)."""
    return max(1, min(MAX_EXTENTS, room // EXTENT_LENGTH))


def choose_form(extents: Sequence[Extent]) -> tuple[str, Text]:
    """Choose the form of extents, and the word of a request that has it: a few stand there as they are."""
    return ("extents", Extents()) if len(extents) <= MAX_EXTENTS else ("packed", Packed())
