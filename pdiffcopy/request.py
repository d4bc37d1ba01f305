"""
How does a request become a query string and headers, and how is it read again?

The client encodes a request, the server decodes it, and neither knows the words. What comes in is checked here,
completely, so that the code behind it can rely on ranges and types. There is no I/O here.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlencode

from pdiffcopy.exceptions import RequestError
from pdiffcopy.words import FILE_ID, REQUEST_HEADER, Filename, digest_query, parse_query, word

R = TypeVar("R", bound="Request")


class Headers(Protocol):
    """The headers of a request, whatever holds them."""

    def get(self, name: str, default: str, /) -> str:
        """The value of a header."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Request:
    """What a client asks for. The fields are the words on the wire."""

    verb: ClassVar[str]
    endpoint: ClassVar[str]
    action: ClassVar[str]
    """The method of :class:`.Replica` that does what is asked for."""
    writes: ClassVar[bool] = False

    filename: str = word(Filename())
    file_id: str = word(FILE_ID, "")

    # What dataclass would generate for each of the classes takes some milliseconds at each start.

    def __repr__(self) -> str:
        """Name what is asked for."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        """Compare the words."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """Hash the words."""
        return hash((type(self), *vars(self).values()))

    def encode(self, nonce: str = "") -> tuple[str, dict[str, str]]:
        """
        Spell a request.

        :param nonce: A word that no other request has.
        :returns: A tuple of the query string and the headers.
        """
        words: list[tuple[str, Any]] = []
        headers = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default or item.metadata["is_frozen"]:
                text = item.metadata["kind"].write(value)
                if header := item.metadata["header"]:
                    headers[header] = text
                else:
                    words.append((item.name, text))
        query = urlencode([*words, ("nonce", nonce)] if nonce else words)
        return query, {REQUEST_HEADER: digest_query(query), **headers}

    @classmethod
    def decode(cls: type[R], query: bytes, headers: Headers) -> R:
        """
        Read a request.

        :param query: The query string as it came over the wire.
        :raises: :exc:`.RequestError` (or a subclass of :exc:`.ProgramError` that is as specific) for what isn't one.
        """
        given = parse_query(query)
        values = {}
        for item in fields(cls):
            header = item.metadata["header"]
            text = (headers.get(header, "") or None) if header else given.get(item.name)
            if text is not None:
                values[item.name] = item.metadata["kind"].read(item.name, text)
            elif item.default is MISSING:
                raise RequestError("The parameter {name} is missing", name=item.name)
        return cls(**values)
