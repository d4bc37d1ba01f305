"""
How does a request become a query string and headers, and how is it read again?

The client encodes a request, the server decodes it, and neither knows the words. What comes in is checked here,
completely, so that the code behind it can rely on ranges and types. There is no I/O here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlencode

from pdiffcopy.exceptions import RequestError
from pdiffcopy.words import (
    FILE_ID,
    REQUEST_HEADER,
    REQUIRED,
    Declaration,
    Filename,
    digest_query,
    parse_query,
    word,
)

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # it means something to type checkers only
    dataclass_transform = lambda **_: lambda cls: cls  # noqa: E731

R = TypeVar("R", bound="Request")
W = TypeVar("W", bound="Words")


class Headers(Protocol):
    """The headers of a request, whatever holds them."""

    def get(self, name: str, default: str, /) -> str:
        """The value of a header."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Words:
    """
    Values with names, which never change. A subclass declares them with :func:`.word`.

    That's a dataclass, but those generate code for each class, which takes some milliseconds at each start.
    """

    declarations: ClassVar[dict[str, Declaration]]
    """What was declared, by the name of the word, what a superclass declares first."""

    def __init_subclass__(cls) -> None:
        attributes = [item for base in reversed(cls.__mro__) for item in vars(base).items()]
        cls.declarations = {name: value for name, value in attributes if isinstance(value, Declaration)}

    def __init__(self, **words: Any):
        """
        Initialize all words, as they are given or by their defaults.

        :raises: :exc:`.RequestError` when they make no sense together.
        """
        values = {name: words.pop(name, declared.default) for name, declared in self.declarations.items()}
        if words or REQUIRED in values.values():
            raise TypeError(f"{type(self).__name__} takes {', '.join(values)}")
        vars(self).update(values)
        self.check()

    def check(self) -> None:
        """Refuse what makes no sense together."""

    def changed(self: W, **words: Any) -> W:
        """Make the same once more, but for some words."""
        return type(self)(**{**vars(self), **words})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} never changes")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


class Request(Words):
    """What a client asks for. Its words are those on the wire."""

    verb: ClassVar[str]
    endpoint: ClassVar[str]
    action: ClassVar[str]
    """The method of :class:`.Replica` that does what is asked for."""
    writes: ClassVar[bool] = False

    filename: str = word(Filename())
    file_id: str = word(FILE_ID, "")
    within: str = word(Filename(), "")
    """A folder that the file lies in, and that no link below leads out of (empty: links are followed)."""

    def encode(self, nonce: str = "") -> tuple[str, dict[str, str]]:
        """
        Spell a request.

        :param nonce: A word that no other request has.
        :returns: A tuple of the query string and the headers.
        """
        words, headers = self._spell()
        query = urlencode([*words, ("nonce", nonce)] if nonce else words)
        return query, {REQUEST_HEADER: digest_query(query), **headers}

    def encode_query(self) -> str:
        """Spell a request that has no headers of its own, as a query string."""
        return urlencode(self._spell()[0])

    def _spell(self) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
        words: list[tuple[str, Any]] = []
        headers: dict[str, Any] = {}
        for name, (kind, default, header, is_frozen) in self.declarations.items():
            value = getattr(self, name)
            if value != default or is_frozen:
                text = kind.write(value)
                if header:
                    headers[header] = text
                else:
                    words.append((name, text))
        return words, headers

    @classmethod
    def decode(cls: type[R], query: bytes, headers: Headers) -> R:
        """
        Read a request.

        :param query: The query string as it came over the wire.
        :raises: :exc:`.RequestError` (or a subclass of :exc:`.ProgramError` that is as specific) for what isn't one.
        """
        given = parse_query(query)
        values = {}
        for name, (kind, default, header, _) in cls.declarations.items():
            text = (headers.get(header, "") or None) if header else given.get(name)
            if text is not None:
                values[name] = kind.read(name, text)
            elif default is REQUIRED:
                raise RequestError("The parameter {name} is missing", name=name)
        return cls(**values)
