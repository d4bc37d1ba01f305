"""
How are requests and answers exchanged with a server over HTTP?

This is the edge where requests (the library) ends: whatever it raises leaves here as a :exc:`.ProgramError`, and no
answer is passed on that belongs to another request.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import BadStatusLine, HTTPResponse
from typing import Any

import requests
import urllib3

from pdiffcopy.address import Address
from pdiffcopy.answers import MAX_DETAIL, PeerInfo, decode_problem, sign_answer
from pdiffcopy.client.connections import Connections
from pdiffcopy.client.exchange import OR_OTHER, OR_PROXY, fail, make_foreign_error
from pdiffcopy.client.network import Network
from pdiffcopy.client.retry import Patience
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import (
    REMEDIES,
    ProgramError,
    ProtocolError,
    RemoteError,
    ReportedError,
    RequestError,
    TransientError,
)
from pdiffcopy.features import FEATURE_ANSWER
from pdiffcopy.files.buffers import CHUNK_SIZE
from pdiffcopy.files.sockets import receive_rest
from pdiffcopy.files.splice import Chunk, Piped
from pdiffcopy.files.stored import Sendable
from pdiffcopy.pace import UNLIMITED, Pace
from pdiffcopy.replica import Reading
from pdiffcopy.request import Request
from pdiffcopy.words import ANSWER_HEADER, DIGEST_HEADER, REQUEST_HEADER, check_digest

_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What comes of a bad network or a bad server (a chunk of negative size is a :exc:`ValueError` in http.client)."""
_NO_TLS = frozenset(["WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"])
"""What OpenSSL calls an answer that isn't TLS."""
_OTHER_NAMES = frozenset([62, 64])
"""The numbers that OpenSSL has for a certificate of another host name or IP address (x509_vfy.h)."""
FIRST_RETRIES, FIRST_TIMEOUT = 2, 10.0
"""How often a server that has never answered is asked again, and how long a connection to it may take, in seconds."""
MAX_DIGITS = 20
"""How long the decimal number of the bytes of a body may be."""
_MAX_DOCUMENT = 1024 * 1024
"""The longest JSON document that is read from a server, in bytes."""


class HttpServer:
    """A server that is reached over HTTP, encrypted or not (a :class:`.Server`)."""

    def __init__(self, address: Address, network: Network, pace: Pace = UNLIMITED):
        """
        Initialize a server (it isn't contacted yet).

        :param address: The address of any file behind it.
        :param network: How to talk to it.
        :param pace: How fast the contents of files may come from there.
        """
        self.address = address._replace(filename="")
        self.network = network
        self.pace = pace
        self.peer: PeerInfo | None = None
        self.has_answered = False
        self._connections: dict[int, Connections] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens connections of its own."""
        return {**vars(self), "_connections": {}}

    @property
    def connections(self) -> Connections:
        """The connections of this process: one that is forked opens its own."""
        pid = os.getpid()
        if pid not in self._connections:
            address, network = self.address, self.network
            self._connections[pid] = Connections(address.base, address.hostname, network.token, network.ca_file)
        return self._connections[pid]

    def close(self) -> None:
        """See :meth:`.Server.close`."""
        if connections := self._connections.pop(os.getpid(), None):
            connections.close()

    def get_address(self, filename: str) -> Address:
        """See :meth:`.Server.get_address`."""
        return self.address._replace(filename=filename)

    def get_patience(self) -> Patience:
        """See :meth:`.Server.get_patience`."""
        # A server that has never answered is more likely to be somewhere else than to be restarted right now.
        return Patience(self.network.retries if self._is_known else min(self.network.retries, FIRST_RETRIES))

    @property
    def _connect_timeout(self) -> float:
        return self.network.timeout if self._is_known else min(FIRST_TIMEOUT, self.network.timeout)

    @property
    def _is_known(self) -> bool:
        """Whether it has ever answered: an old server doesn't say that an answer is its own."""
        return self.has_answered or self.peer is not None

    def find_remedy(self, filename: str) -> ProgramError | None:
        """See :meth:`.Server.find_remedy`."""
        if self.peer or self.address.scheme != "http" or not self._speaks_tls():
            return None
        address = self.get_address(filename)
        secure = str(address._replace(scheme="https"))
        return RemoteError("{url}: the server speaks https, use {secure}", url=address, secure=secure, status=0)

    def _speaks_tls(self) -> bool:
        """Whether somebody answers the beginning of a TLS connection (whose certificate doesn't matter here)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        place, timeout = (self.address.hostname, self.address.port), min(FIRST_TIMEOUT, self.network.timeout)
        with suppress(OSError), socket.create_connection(place, timeout) as connection:
            with context.wrap_socket(connection):
                return True
        return False

    @contextmanager
    def exchange(
        self, request: Request, reading: Reading | None = None, expect: Sequence[int] = (200,)
    ) -> Iterator[HttpAnswer]:
        """See :meth:`.Server.exchange`."""
        url = str(self.get_address(request.filename))
        # No cache has an answer to a word that no other request has.
        query, headers = request.encode(nonce=os.urandom(8).hex())
        target, body = f"/{request.endpoint}?{query}", reading and _Body(reading)
        timeout = self._connect_timeout, self.network.timeout
        try:
            with self.connections.exchange(request.verb, target, headers, body, timeout) as response:
                answer = HttpAnswer(url, response, self.network.timeout, self.pace)
                is_ours = self._check(answer, headers[REQUEST_HEADER])
                self.has_answered |= is_ours
                if answer.status not in expect or (answer.status >= 400 and not is_ours):
                    is_known = answer.is_signed or (self.peer is not None and self.peer.features)
                    hint = OR_OTHER if not is_known else "" if is_ours else OR_PROXY
                    fail(url, request, answer.status, answer.describe_refusal(), is_ours, hint)
                yield answer
        except ReportedError as e:
            fail(url, request, e.status, str(e))
        except ProgramError:
            raise
        except _NETWORK_ERRORS as e:
            raise self._translate(e, url, request.endpoint) from e

    def _check(self, answer: HttpAnswer, tag: str) -> bool:
        """
        Find out whether an answer belongs to a request, before anything of it is believed.

        A proxy may have kept it from an earlier request, or have sent an earlier one twice: then all that follows on
        that connection are answers to other requests. It is closed then, since its answer isn't read.

        :returns: Whether the answer says so: that of an old server doesn't, nor does an error that a proxy reports.
        """
        stated = answer.get_header(ANSWER_HEADER)
        answer.is_signed = stated == sign_answer(tag, answer.status, answer.get_header(DIGEST_HEADER))
        has_to_sign = self.peer is not None and FEATURE_ANSWER in self.peer.features
        if not answer.is_signed and (stated or (has_to_sign and answer.status < 400)):
            raise make_foreign_error(answer.url)
        return answer.is_signed or not has_to_sign

    def _translate(self, error: Exception, url: str, action: str) -> ProgramError:
        """Make one line of what requests, urllib3 and the operating system raise."""
        causes = list(_causes(error))
        reason = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
        kind: type[ProgramError] = TransientError
        if doubts := [cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)]:
            is_other = doubts[0].verify_code in _OTHER_NAMES
            remedy = "call it by that of its certificate" if is_other else "--ca-file names an authority to trust"
            kind, reason = RemoteError, f"{doubts[0].verify_message} ({remedy})"
        elif remedies := [REMEDIES[c.errno or 0] for c in causes if isinstance(c, OSError) and c.errno in REMEDIES]:
            kind, reason = RemoteError, f"{reason}: {remedies[0]}"
        elif any(type(cause) is BadStatusLine for cause in causes) and not self._is_known:
            reason = f"the server doesn't speak http ({str(causes[-1]).strip()[:60]!r})"
        elif self.address.scheme == "https" and any(getattr(c, "reason", "") in _NO_TLS for c in causes):
            kind, reason = RemoteError, f"the server doesn't speak https, use http{url.removeprefix('https')}"
        elif names := [cause for cause in causes if isinstance(cause, socket.gaierror)]:
            kind = TransientError if names[0].errno == socket.EAI_AGAIN else RemoteError
        elif isinstance(error, requests.ConnectTimeout):
            reason = f"no connection within {self._connect_timeout:g} seconds"
        elif any(isinstance(cause, (TimeoutError, requests.Timeout)) for cause in causes):
            reason = f"no sign of life for {self.network.timeout:g} seconds"
        elif isinstance(error, requests.exceptions.InvalidURL):
            kind = RemoteError
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes) and not self._is_known:
            reason += " (is it running, and is that its port?)"
        text = "{url}: can't exchange {action} with the server: {reason}"
        return kind(text, url=url, action=action, reason=reason or str(causes[-1]), status=0)


class HttpAnswer:
    """A response to a request (an :class:`.Answer`)."""

    def __init__(self, url: str, response: requests.Response, timeout: float, pace: Pace = UNLIMITED):
        """
        Look at the head of a response.

        :param url: The file that it is about.
        :param timeout: How long its body may show no sign of life, in seconds.
        :param pace: How fast the bytes of a file may come.
        :raises: :exc:`.TransientError` when the head is damaged, so that it may not tell where the body ends.
        """
        self.url = url
        self.status = response.status_code
        self.is_signed = False
        self._response = response
        self._timeout = timeout
        self._pace = pace
        ends = {"content-length", "transfer-encoding"} & {name.lower() for name in response.headers}
        if not ends and response.raw.version == 11 and response.headers.get("Connection", "").lower() != "close":
            raise self._make_damage_error()

    def _make_damage_error(self) -> TransientError:
        return TransientError("{url}: the server's answer is damaged", url=self.url, status=0)

    def get_header(self, name: str) -> str:
        """Return the value of a header (empty if there is none)."""
        return str(self._response.headers.get(name, ""))

    def describe_refusal(self) -> str:
        """Say why the server doesn't do what it was asked for, as far as it tells."""
        place, _, _ = self.get_header("Location").partition("?")
        return f"it redirects to {place[:MAX_DETAIL]}" if place else decode_problem(self.read_document())

    def get_digest(self) -> str:
        """See :meth:`.Answer.get_digest`."""
        try:
            return check_digest(self.get_header(DIGEST_HEADER))
        except RequestError as e:
            raise ProtocolError("{url}: {reason}", url=self.url, reason=e) from e

    @property
    def length(self) -> int:
        """See :attr:`.Answer.length`."""
        text = self.get_header("Content-Length")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < MAX_DIGITS else 0

    def read_document(self) -> bytes:
        """See :meth:`.Answer.read_document`."""
        document, raw = b"", self._response.raw
        # A read that comes up short says nothing: only the one after it raises an error when the body isn't complete.
        while len(document) <= _MAX_DOCUMENT and (chunk := raw.read(_MAX_DOCUMENT + 1 - len(document))):
            document += chunk
        if len(document) > _MAX_DOCUMENT:
            raise ProtocolError("The server sent a document of more than {limit} bytes", limit=_MAX_DOCUMENT)
        digest = self.get_header(DIGEST_HEADER)
        if digest and digest != compute_digest(document):
            raise self._make_damage_error()
        return document

    def read_lines(self) -> Iterator[bytes]:
        """See :meth:`.Answer.read_lines`."""
        # Not response.iter_content(), which reads the size of a chunk without a limit to its length.
        while chunk := self._response.raw.read1(CHUNK_SIZE):
            yield chunk

    def read_exactly(self, size: int) -> Iterator[Chunk]:
        """See :meth:`.Answer.read_exactly`."""
        length, raw = self.get_header("Content-Length"), self._response.raw
        if length != str(size):
            text = "{url}: the server sent {length} bytes of data instead of {size}"
            raise ProtocolError(text, url=self.url, length=length[:40] or "an unknown number of", size=size)
        original = getattr(raw, "_original_response", None)
        if isinstance(original, HTTPResponse) and original.fp:
            yield from self._receive(original, size)
            original.close()
            raw.release_conn()
            return
        while chunk := raw.read(min(CHUNK_SIZE, self._pace.step)):
            yield chunk
            self._pace.take(len(chunk))

    def _receive(self, original: HTTPResponse, size: int) -> Iterator[Chunk]:
        """Take what was read together with the header, then receive the rest without a detour."""
        ahead = original.fp.read(len(original.fp.peek(1)[:size]))
        raw: Any = original.fp.raw
        yield from receive_rest(raw._sock, ahead, size, self._timeout, self._pace)


class _Body:
    """A request body of known length that is read while it is sent."""

    def __init__(self, reading: Reading):
        self.reading = reading

    def __len__(self) -> int:
        return self.reading.size

    def __iter__(self) -> Iterator[bytes | memoryview | Sendable]:
        chunks: Iterable[Chunk] = self.reading.chunks
        if isinstance(chunks, Sendable):
            # The connection knows how to send that as a whole.
            return iter([chunks])
        return (bytes(chunk) if isinstance(chunk, Piped) else chunk for chunk in chunks)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised because of, the root cause last."""
    while error is not None:
        yield error
        reason = getattr(error, "reason", None)
        nested = [arg for arg in (reason, *error.args) if isinstance(arg, BaseException)]
        error = nested[0] if nested else error.__cause__ or error.__context__
