"""
How do many threads ask a server for many small things in few requests?

While one request is on its way, and for a moment after that, what other threads ask for is collected, and goes with the
next one. What has a body, or takes long, goes alone, a few at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from pdiffcopy.address import Address
from pdiffcopy.answers import PeerInfo, decode_problem
from pdiffcopy.bundles import COMBINABLE, MAX_PARTS
from pdiffcopy.client.exchange import Answer, Server, fail
from pdiffcopy.client.exchanges import exchange_many
from pdiffcopy.client.retry import Patience
from pdiffcopy.exceptions import ProgramError, ReportedError
from pdiffcopy.features import FEATURE_MANY
from pdiffcopy.files.splice import Chunk
from pdiffcopy.replica import Reading
from pdiffcopy.request import Request

COMPANY = 0.002
"""How long a request waits for others that may come with it, in seconds."""
ALONE = 2
"""How many requests with a body are on their way at the same time."""


class CombiningServer:
    """A way to a server (:class:`.Server`) for many threads of one process."""

    def __init__(self, server: Server):
        """
        Initialize it.

        :param server: How a single request gets there.
        """
        self.server = server
        self._room = threading.Semaphore(ALONE)
        self._waiting: deque[tuple[Request, Future[tuple[int, bytes]]]] = deque()
        self._has_some = threading.Condition()
        self._courier: threading.Thread | None = None

    @property
    def peer(self) -> PeerInfo | None:
        """See :attr:`.Server.peer`."""
        return self.server.peer

    @peer.setter
    def peer(self, peer: PeerInfo | None) -> None:
        self.server.peer = peer

    def get_address(self, filename: str) -> Address:
        """See :meth:`.Server.get_address`."""
        return self.server.get_address(filename)

    def get_patience(self) -> Patience:
        """See :meth:`.Server.get_patience`."""
        return self.server.get_patience()

    def find_remedy(self, filename: str) -> ProgramError | None:
        """See :meth:`.Server.find_remedy`."""
        return self.server.find_remedy(filename)

    def close(self) -> None:
        """See :meth:`.Server.close`."""
        self.server.close()

    @contextmanager
    def exchange(
        self, request: Request, reading: Reading | None = None, expect: Sequence[int] = (200,)
    ) -> Iterator[Answer]:
        """See :meth:`.Server.exchange`."""
        if reading or not isinstance(request, COMBINABLE) or not self._can_combine:
            with self._room, self.server.exchange(request, reading, expect) as answer:
                yield answer
            return
        url = str(self.get_address(request.filename))
        status, document = self._ask(request)
        try:
            if status not in expect:
                fail(url, request, status, decode_problem(document))
            yield _Part(status, document)
        except ReportedError as e:
            fail(url, request, e.status, str(e))

    @property
    def _can_combine(self) -> bool:
        return self.peer is not None and FEATURE_MANY in self.peer.features

    def _ask(self, request: Request) -> tuple[int, bytes]:
        future: Future[tuple[int, bytes]] = Future()
        with self._has_some:
            self._waiting.append((request, future))
            if not self._courier:
                self._courier = threading.Thread(target=self._carry, daemon=True)
                self._courier.start()
            self._has_some.notify()
        return future.result()

    def _carry(self) -> None:
        """Carry requests to the server, as many at a time as there are."""
        while True:
            with self._has_some:
                self._has_some.wait_for(lambda: self._waiting)
            time.sleep(COMPANY)
            with self._has_some:
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_PARTS))]
            try:
                answers = self._exchange([request for request, _ in taken])
            except Exception as e:
                for _, future in taken:
                    future.set_exception(e)
                continue
            for (_, future), answer in zip(taken, answers, strict=True):
                future.set_result(answer)

    def _exchange(self, requests: Sequence[Request]) -> list[tuple[int, bytes]]:
        with exchange_many(self.server, requests) as parts:
            return [(answer.status, answer.document) for answer, _ in parts]


class _Part:
    """One answer of several (an :class:`.Answer`)."""

    is_signed = True

    def __init__(self, status: int, document: bytes):
        self.status = status
        self.document = document
        self.length = len(document)

    def get_digest(self) -> str:
        """There is none: all of them together had one."""
        return ""

    def read_document(self) -> bytes:
        """See :meth:`.Answer.read_document`."""
        return self.document

    def read_lines(self) -> Iterator[bytes]:
        """See :meth:`.Answer.read_lines`."""
        yield self.document

    def read_exactly(self, size: int) -> Iterator[Chunk]:
        """See :meth:`.Answer.read_exactly`."""
        yield memoryview(self.document)
