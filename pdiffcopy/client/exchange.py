"""What is a server to the client: how is a request exchanged for an answer?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import NoReturn, Protocol

from pdiffcopy.address import Address
from pdiffcopy.answers import (
    PeerInfo,
)
from pdiffcopy.client.retry import Patience
from pdiffcopy.exceptions import (
    ProgramError,
    TransientError,
    get_error_class,
)
from pdiffcopy.files.splice import Chunk
from pdiffcopy.replica import Reading
from pdiffcopy.request import Request

_KNOWN_STATUS = frozenset(HTTPStatus)


class Answer(Protocol):
    """What a server answers. Errors that stem from the network are :exc:`.ProgramError` objects."""

    status: int
    is_signed: bool
    """Whether it says to which request it belongs."""

    @property
    def length(self) -> int:
        """How many bytes the body has (0 when that isn't said)."""

    def get_digest(self) -> str:
        """Return the digest that the server states."""

    def read_document(self) -> bytes:
        """Read all of the body, which is a short one."""

    def read_lines(self) -> Iterator[bytes]:
        """Read the body as it arrives."""

    def read_exactly(self, size: int) -> Iterator[Chunk]:
        """Read the body, which has to have a certain size."""


def make_foreign_error(url: str) -> TransientError:
    """Make an error for an answer that belongs to another request."""
    text = "{url}: the answer isn't that to the request (does a proxy in between keep or repeat answers?)"
    return TransientError(text, url=url, status=0)


OR_OTHER = " (or it isn't pdiffcopy that answers there)"
"""What else may be the case where a server says no more than any server does."""
OR_PROXY = " (that's what something in between says, and not pdiffcopy)"
"""What is the case where a server that signs its answers hasn't signed one."""


def fail(url: str, request: Request, status: int, detail: str, is_ours: bool = True, hint: str = "") -> NoReturn:
    """Raise the most specific error for a status."""
    if not detail:
        detail = HTTPStatus(status).phrase if status in _KNOWN_STATUS else f"HTTP status {status}"
    action = f"{request.verb} {request.endpoint}"
    text = "{url}: the server refused {action}: {detail}" + hint
    raise get_error_class(status, is_ours)(text, url=url, action=action, detail=detail, status=status)


class Server(Protocol):
    """A way to a server."""

    peer: PeerInfo | None
    """What it can do (:data:`None` until it has answered for the first time)."""

    def get_address(self, filename: str) -> Address:
        """Return the address of a file behind it."""

    def get_patience(self) -> Patience:
        """Return how often something may fail in a row."""

    def exchange(
        self, request: Request, reading: Reading | None = None, expect: Sequence[int] = (200,)
    ) -> AbstractContextManager[Answer]:
        """
        Exchange a request for an answer with one of the expected statuses.

        :param reading: The body of the request.
        :raises: The most specific :exc:`.ProgramError`, also in the ``with`` block.
        """

    def find_remedy(self, filename: str) -> ProgramError | None:
        """Find out why a server didn't answer that has never answered, if that can be known."""

    def close(self) -> None:
        """Close the connections of this process."""
