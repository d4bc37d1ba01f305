"""
How are several requests answered that have come as one?

Each as if it had come alone. Those about a small file as a whole (:mod:`.wholes`) come only like this: their contents
follow the head, in either direction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import Any, Protocol

from flask import Response

from pdiffcopy import answers, wholes
from pdiffcopy.bundles import (
    MAX_HEAD,
    MAX_PART,
    MAX_PARTS,
    PartAnswer,
    PartRequest,
    count_bytes,
    decode_frame,
    decode_requests,
    encode_answers,
    encode_frame,
)
from pdiffcopy.exceptions import AbsentError, RequestError, TooLargeError
from pdiffcopy.files.splice import Chunk, Parts, PartsError
from pdiffcopy.files.stored import Joined
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.replica import Reading
from pdiffcopy.request import Headers, Request
from pdiffcopy.server.accesslog import log_access
from pdiffcopy.server.body import read_body, send_chunks

SHORT = 32
"""How many bytes of a head an answer takes that was too long."""


class Views(Protocol):
    """What answers a request that has come alone."""

    pace: Any

    def prepare(self, kind: type[Request], query: bytes, headers: Headers) -> tuple[Request, LocalReplica]:
        """Decode a request, and get the replica that it is about."""

    def reserve(self, count: int) -> AbstractContextManager[Any]:
        """Reserve some descriptors, or raise :exc:`.BusyError`."""


def answer_many(environ: dict[str, Any], views: Views, handle_error: Callable[[Exception], Response]) -> Response:
    """
    Answer the requests that make up the body of one.

    :param environ: The WSGI environment of that.
    :param views: Has a method for each kind, which is called like that of the replica.
    :param handle_error: Makes the answer to a request that fails.
    """
    length = int(environ.get("CONTENT_LENGTH") or 0)
    parts = Parts(read_body(environ, length, views.pace))
    with ExitStack() as stack:
        try:
            requests = decode_requests(decode_frame(parts.take_bytes))
            answer = _Answer(environ, views, handle_error, stack)
            found = [answer.add(request, parts.take(request.size)) for request in requests]
            parts.end()
        except PartsError as e:
            raise RequestError("What was sent as several requests can't be read: {reason}", reason=e) from e
        head = encode_frame(encode_answers(found))
        body = send_chunks(environ, Joined([[head], *answer.contents]))
        size = len(head) + sum(part.size for part in found)
        response = Response(body, headers={"Content-Length": str(size)}, mimetype="application/octet-stream")
        response.call_on_close(stack.pop_all().close)
        return response


class _Answer:
    """The answer to all of them."""

    def __init__(
        self,
        environ: dict[str, Any],
        views: Views,
        handle_error: Callable[[Exception], Response],
        stack: ExitStack,
    ):
        self.environ, self.views, self.handle_error = environ, views, handle_error
        self.stack = stack
        """Closes the files whose contents are a part of it."""
        self.contents: list[Any] = []
        self.room = MAX_HEAD - MAX_PARTS * SHORT
        """How many bytes of documents still fit into the head."""

    def add(self, request: PartRequest, body: Generator[Chunk, None, None]) -> PartAnswer:
        """Answer one request."""
        started = time.monotonic()
        try:
            part = self._answer(request, body)
        except (AbsentError, PartsError):  # of what isn't there nobody knows where the next part begins
            raise
        except Exception as e:
            response = self.handle_error(e)
            part = PartAnswer(response.status_code, response.get_data())
        # A client asks for what is too long by a request of its own.
        needed = count_bytes(part)
        if not part.size and (len(part.document) > MAX_PART or needed > self.room):
            part, needed = PartAnswer(TooLargeError.http_status, b""), 0
        self.room -= needed
        method, path, query = request.verb, f"/{request.endpoint}", request.query.decode("ascii")
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
        duration = timedelta(seconds=time.monotonic() - started)
        log_access({**self.environ, **environ}, part.status, request.size + part.size, duration)
        return part

    def _answer(self, request: PartRequest, body: Generator[Chunk, None, None]) -> PartAnswer:
        kind = request.kind
        decoded, replica = self.views.prepare(kind, request.query, {})
        if isinstance(decoded, wholes.SummaryRequest):
            summary = replica.summarize(decoded.block_size, decoded.method, decoded.grain)
            return _make_part(wholes.encode_summary(summary))
        if isinstance(decoded, wholes.FetchRequest):
            return self._fetch(decoded, replica)
        if isinstance(decoded, wholes.CreateRequest):
            reading = Reading(body, decoded.digest, size=request.size)
            how = decoded.new_mode, decoded.in_advance, decoded.get_metadata()
            claimed, info = replica.create(reading, decoded.run, *how)
            return _make_part({answers.CLAIMED: claimed, **info.as_dict()})
        result = getattr(self.views, kind.action)(decoded, replica)
        return _collect(result) if isinstance(result, Response) else _make_part(result)

    def _fetch(self, request: wholes.FetchRequest, replica: LocalReplica) -> PartAnswer:
        self.stack.enter_context(self.views.reserve(1))
        info, reading = self.stack.enter_context(replica.fetch(request.digest))
        self.contents.append(reading.chunks)
        return _make_part(info.as_dict())._replace(size=reading.size, digest=reading.digest)


def _make_part(document: dict[str, Any]) -> PartAnswer:
    return PartAnswer(200, json.dumps(document).encode("ascii"))


def _collect(response: Response) -> PartAnswer:
    document = b""
    with response:
        for chunk in response.iter_encoded():
            document += chunk
            if len(document) > MAX_PART:
                break
    return PartAnswer(response.status_code, document)
