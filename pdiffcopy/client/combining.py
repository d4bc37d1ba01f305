"""
How do many threads ask a server for many small things in few requests?

While one request is on its way, and for a moment before that, what other threads ask for is collected, and goes with
it or with the next one. What has a body, or takes long, goes alone, a few at a time, and so does what turns out to have
too long an answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pdiffcopy.address import Address
from pdiffcopy.answers import PeerInfo, decode_problem
from pdiffcopy.bundles import COMBINABLE, MAX_PARTS
from pdiffcopy.client.exchange import Answer, Server, fail
from pdiffcopy.client.exchanges import exchange_many
from pdiffcopy.client.retry import Patience
from pdiffcopy.exceptions import ProgramError, ReportedError, TooLargeError, TransientError
from pdiffcopy.features import FEATURE_MANY
from pdiffcopy.files.splice import Chunk
from pdiffcopy.protocol import HashesRequest, ReadRequest
from pdiffcopy.replica import Reading
from pdiffcopy.request import Request

COMPANY = 0.002
"""How long a request waits for others that may come with it, in seconds."""
AT_A_TIME = MAX_PARTS // 2
"""How many requests go together at most: as many as fit into a head, however long the names are."""
TOO_LONG = TooLargeError.http_status
"""How a server answers to what has too long an answer to be one of several."""
ALONE = 2
"""How many requests with a body are on their way at the same time, and how many that are answered by one."""


class CombiningServer:
    """A way to a server (:class:`.Server`) for many threads of one process."""

    def __init__(self, server: Server, has_company: Callable[[], bool] = lambda: True):
        """
        Initialize it.

        :param server: How a single request gets there.
        :param has_company: Whether there are other threads that may ask for something.
        """
        self.server, self.has_company = server, has_company
        # One thread may both read and write, or get two streams of hashes: what it waits for may not be what it has.
        self._reads, self._writes = threading.Semaphore(ALONE), threading.Semaphore(ALONE)
        self._waiting: deque[tuple[Request, Future[tuple[int, bytes]]]] = deque()
        self._turn = threading.Condition()
        self._is_taken = False

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
        status, document = TOO_LONG, b""
        if not reading and isinstance(request, COMBINABLE) and self._can_combine:
            try:
                status, document = self._ask(request)
            except TransientError:
                # A disk may be too slow for all of them together. One that hashes alone gives signs of life.
                if not isinstance(request, HashesRequest):
                    raise
        if status == TOO_LONG:
            with self._get_room(request, reading), self.server.exchange(request, reading, expect) as answer:
                yield answer
            return
        url = str(self.get_address(request.filename))
        try:
            if status not in expect:
                fail(url, request, status, decode_problem(document))
            yield _Part(status, document)
        except ReportedError as e:
            fail(url, request, e.status, str(e))

    def _get_room(self, request: Request, reading: Reading | None) -> AbstractContextManager[Any]:
        if reading:
            return self._writes
        return self._reads if isinstance(request, ReadRequest) else nullcontext()

    @property
    def _can_combine(self) -> bool:
        return self.peer is not None and FEATURE_MANY in self.peer.features

    def _ask(self, request: Request) -> tuple[int, bytes]:
        """Get an answer: whoever finds nobody on the way to the server goes there for all that wait."""
        future: Future[tuple[int, bytes]] = Future()
        self._waiting.append((request, future))
        while True:
            with self._turn:
                self._turn.wait_for(lambda: future.done() or not self._is_taken)
                if future.done():
                    return future.result()
                self._is_taken = True
            try:
                self._go()
            finally:
                with self._turn:
                    self._is_taken = False
                    self._turn.notify_all()

    def _go(self) -> None:
        if self.has_company():
            time.sleep(COMPANY)
        taken: list[tuple[Request, Future[tuple[int, bytes]]]] = []
        try:
            while self._waiting and len(taken) < AT_A_TIME:
                taken.append(self._waiting.popleft())
            answers = self._exchange([request for request, _ in taken])
            for (_, future), answer in zip(taken, answers, strict=True):
                future.set_result(answer)
        except BaseException as e:
            for _, future in taken:
                if not future.done():
                    future.set_exception(e)
            if not isinstance(e, Exception):  # a signal is for this thread, whose own request may still wait
                raise

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
