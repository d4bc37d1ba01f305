"""
How is a file behind a server read and written?

This is the edge where requests ends: whatever it raises leaves here as a :exc:`.ProgramError`, and whatever a server
says is checked before it's believed.

Every request is idempotent. Requests without a body to speak of are repeated here; a transfer is repeated by
:mod:`.pipeline`, since the octets have to come from the other replica again. A stream of hashes that breaks off
goes on where it was.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any, NoReturn

import requests
import urllib3

from pdiffcopy.address import Address
from pdiffcopy.connections import open_session
from pdiffcopy.delta import count_blocks, in_order
from pdiffcopy.exceptions import (
    AbsentError,
    AuthenticationError,
    DamagedError,
    DigestMismatchError,
    DiskFullError,
    FileMissingError,
    ForbiddenError,
    ProgramError,
    ProtocolError,
    RemoteError,
    ReplacedError,
    ReportedError,
    TakenOverError,
    TransientError,
)
from pdiffcopy.localfile import CHUNK_SIZE, Stored
from pdiffcopy.locations import Network, Reading, Replica
from pdiffcopy.protocol import (
    ANSWER_HEADER,
    BLOCKS,
    CLAIM,
    CLAIMED,
    DIGEST_HEADER,
    DONE,
    FEATURE_ANSWER,
    FEATURE_CLAIM,
    FEATURE_RESUME,
    HASHES,
    INFO,
    RELEASE,
    REQUEST_HEADER,
    RESIZE,
    SYNC,
    VERIFIED,
    BlockDigest,
    Extent,
    FileInfo,
    PeerInfo,
    check_digest,
    decode_flag,
    decode_info,
    decode_problem,
    decode_report,
    digest_query,
    digest_text,
    format_extents,
    parse_checked,
    parse_hashes,
    sign_answer,
)
from pdiffcopy.retry import Patience
from pdiffcopy.splice import Chunk, Piped, receive

_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What comes of a bad network or a bad server (a chunk of negative size is a :exc:`ValueError` in http.client)."""
_NO_TLS = frozenset(["WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"])
"""What OpenSSL calls an answer that isn't TLS."""
FIRST_RETRIES, FIRST_TIMEOUT = 2, 10.0
"""How often a server that has never answered is asked again, and how long a connection to it may take, in seconds."""
_KNOWN_STATUS = frozenset(HTTPStatus)
_TRANSIENT_STATUS = frozenset([502, 503, 504, AbsentError.http_status, DamagedError.http_status])
_ERRORS = {
    error.http_status: error
    for error in (
        AuthenticationError,
        DigestMismatchError,
        DiskFullError,
        FileMissingError,
        ForbiddenError,
        ReplacedError,
        TakenOverError,
    )
}
_MAX_DOCUMENT = 1024 * 1024
"""The longest JSON document that is read from a server, in bytes."""


class RemoteReplica(Replica):
    """A file behind a server."""

    def __init__(self, address: Address, network: Network):
        """
        Initialize a replica (the server isn't contacted yet).

        :param address: Where it is.
        :param network: How to get there.
        """
        self.address = address
        self.network = network
        self._peer: PeerInfo | None = None
        self._size = 0
        self._sessions: dict[int, requests.Session] = {}

    @property
    def session(self) -> requests.Session:
        """The connections of this process: one that is forked opens its own, but knows what we have been told."""
        pid = os.getpid()
        if pid not in self._sessions:
            self._sessions[pid] = open_session(self.address.hostname, self.network.token, self.network.ca_file)
        return self._sessions[pid]

    def info(self, run: str = "") -> tuple[FileInfo, PeerInfo]:
        """See :meth:`.Replica.info`."""

        def ask() -> tuple[FileInfo, PeerInfo]:
            with self._request("GET", INFO, _name(run), expect=(200, 404)) as response:
                info, peer = decode_info(_read_document(response), exists=response.status_code == 200)
                if FEATURE_ANSWER in peer.features and ANSWER_HEADER not in response.headers:
                    raise self._foreign_answer()
                return info, peer

        try:
            info, self._peer = self._patience().persist(ask)
        except (TransientError, RemoteError) as e:
            if self._is_first_contact and self.address.scheme == "http" and self._speaks_tls():
                text = "{url}: the server speaks https, use {secure}"
                secure = self.address._replace(scheme="https")
                raise RemoteError(text, url=self.address, secure=str(secure), status=0) from e
            raise
        self._size = info.size
        return info, self._peer

    @property
    def peer(self) -> PeerInfo:
        """What the server can do (it's asked once)."""
        return self._peer or self.info()[1]

    def hashes(self, size: int, block_size: int, method: str, concurrency: int, start: int = 0) -> Iterator[str]:
        """See :meth:`.Replica.hashes`."""
        patience, position = self._patience(), start
        while position < size:
            try:
                stream = self._hash_lines(position, size, block_size=block_size, method=method, concurrency=concurrency)
                for digest in in_order(stream, position, size, block_size):
                    yield digest
                    position += block_size
                    patience.succeeded()
            except TransientError as e:
                patience.failed(e)

    def _hash_lines(self, start: int, stop: int, **params: Any) -> Iterator[BlockDigest]:
        resumes = FEATURE_RESUME in self.peer.features
        if resumes:
            params |= {"offset": start, "checks": 1}
        with self._request("GET", HASHES, params) as response:
            # An old server can only begin at the beginning, and a file may be longer than what we compare.
            most = count_blocks(max(stop, self._size), params["block_size"])
            parse = parse_checked if resumes else parse_hashes
            for count, line in enumerate(parse(self._lines(response))):
                if count >= most:
                    raise ProtocolError("{url}: the server sent more hashes than the file has blocks", url=self.address)
                if line.offset >= stop and resumes:
                    return
                if start <= line.offset < stop:
                    yield line

    @contextmanager
    def read(self, extents: Sequence[Extent], state_digest: bool) -> Iterator[Reading]:
        """See :meth:`.Replica.read`."""
        if not extents:
            yield Reading([])
            return
        params: dict[str, Any] = _place(extents)
        if state_digest:
            params["digest"] = 1
        size = sum(extent.size for extent in extents)
        with self._request("GET", BLOCKS, params) as response:
            digest = check_digest(response.headers.get(DIGEST_HEADER, "")) if state_digest else ""
            yield Reading(self._exactly(size, response), digest)

    def digest(self, extents: Sequence[Extent]) -> str:
        """See :meth:`.Replica.digest`."""
        with self._request("GET", BLOCKS, _place(extents) | {"digest": 1, "data": 0}) as response:
            return check_digest(response.headers.get(DIGEST_HEADER, ""))

    def write(self, extents: Sequence[Extent], reading: Reading, run: str = "") -> None:
        """See :meth:`.Replica.write`."""
        params = _place(extents) | _name(run)
        params.pop("size", None)
        if reading.block_size:
            params["block_size"] = reading.block_size
        body = _Body(sum(extent.size for extent in extents), reading.chunks)
        headers = {DIGEST_HEADER: reading.digest} if reading.digest else {}
        with self._request("POST", BLOCKS, params, body, headers) as response:
            document = _read_document(response)
        if reading.digest and not decode_flag(document, VERIFIED):
            raise ProtocolError("{url}: the server didn't verify what it wrote", url=self.address)

    def resize(self, size: int, run: str = "") -> None:
        """See :meth:`.Replica.resize`."""
        self._post(RESIZE, {"size": size} | _name(run))

    def claim(self, run: str, create: bool = False, mode: int = FileInfo.mode) -> tuple[bool, FileInfo]:
        """See :meth:`.Replica.claim`."""
        if FEATURE_CLAIM not in self.peer.features:
            return False, self.info()[0]
        document = self._post(CLAIM, _name(run) | ({"create": 1, "mode": mode} if create else {}))
        info, _ = decode_info(document, exists=True)
        self._size = info.size
        return decode_flag(document, CLAIMED), info

    def release(self, run: str) -> None:
        """See :meth:`.Replica.release`."""
        self._post(RELEASE, _name(run))

    def _post(self, endpoint: str, params: dict[str, Any]) -> bytes:
        def ask() -> bytes:
            with self._request("POST", endpoint, params) as response:
                return _read_document(response)

        return self._patience().persist(ask)

    def sync(self, run: str = "") -> None:
        """See :meth:`.Replica.sync`."""
        # It isn't repeated: an answer that got lost may have been the only one to tell of an error.
        try:
            with self._request("POST", SYNC, _name(run)) as response:
                last = _read_document(response).strip()
                if last.startswith(b"{"):
                    raise decode_report(last)
                if last != DONE.encode("ascii"):
                    raise ProtocolError("{url}: the server's answer to a flush isn't one", url=self.address)
        except TransientError as e:
            text = "{url}: it isn't known whether the data has reached the disk, run again ({reason})"
            raise RemoteError(text, url=self.address, reason=e, status=0) from e

    # The edge {{{1

    def _patience(self) -> Patience:
        # A server that has never answered is more likely to be somewhere else than to be restarted right now.
        return Patience(min(self.network.retries, FIRST_RETRIES if self._is_first_contact else self.network.retries))

    @property
    def _is_first_contact(self) -> bool:
        return not (self._peer or self.file_id)

    @property
    def _connect_timeout(self) -> float:
        return min(FIRST_TIMEOUT, self.network.timeout) if self._is_first_contact else self.network.timeout

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
    def _request(
        self, verb: str, endpoint: str, params: Any = None, body: Any = None, headers: Any = None, expect: Any = (200,)
    ) -> Iterator[requests.Response]:
        """
        Exchange a request for a response with one of the expected statuses.

        An error in the ``with`` block that stems from the network is translated like one before it.
        """
        params = dict(params or {})
        if self.file_id and endpoint != INFO:
            params["file_id"] = self.file_id
        if self.is_source and verb == "GET" and endpoint != INFO:
            params["flush"] = 1
        # A word that no other request has: no cache has an answer to this one.
        url = self.address.url(endpoint, **params, nonce=os.urandom(8).hex())
        tag = digest_query(url.partition("?")[2])
        headers = {REQUEST_HEADER: tag, **(headers or {})}
        try:
            with self.session.request(
                verb, url, data=body, headers=headers, stream=True, allow_redirects=False,
                timeout=(self._connect_timeout, self.network.timeout),
            ) as response:  # fmt: skip
                _check_head(response)
                is_signed = self._check_answer(tag, response)
                if response.status_code not in expect or (response.status_code >= 400 and not is_signed):
                    detail = decode_problem(_read_document(response))
                    self._fail(f"{verb} {endpoint}", response.status_code, detail, is_signed)
                yield response
        except ReportedError as e:
            self._fail(f"{verb} {endpoint}", e.status, str(e))
        except ProgramError:
            raise
        except _NETWORK_ERRORS as e:
            raise self._translate(e, endpoint) from e

    def _check_answer(self, tag: str, response: requests.Response) -> bool:
        """
        Find out whether an answer belongs to a request, before anything of it is believed.

        A proxy may have kept it from an earlier request, or have sent an earlier one twice: then all that follows on
        that connection are answers to other requests. It is closed then, since its answer isn't read.

        :returns: Whether the answer says so: that of an old server doesn't, nor does an error that a proxy reports.
        """
        answer = response.headers.get(ANSWER_HEADER, "")
        is_signed = answer == sign_answer(tag, response.status_code, response.headers.get(DIGEST_HEADER, ""))
        signs = bool(self.file_id) or (self._peer is not None and FEATURE_ANSWER in self._peer.features)
        if not is_signed and (answer or (signs and response.status_code < 400)):
            raise self._foreign_answer()
        return is_signed or not signs

    def _foreign_answer(self) -> TransientError:
        text = "{url}: the answer isn't that to the request (does a proxy in between keep or repeat answers?)"
        return TransientError(text, url=self.address, status=0)

    def _fail(self, action: str, status: int, detail: str, is_signed: bool = True) -> NoReturn:
        """Raise the most specific error for a status."""
        if not detail:
            detail = HTTPStatus(status).phrase if status in _KNOWN_STATUS else f"HTTP status {status}"
        kind: type[ProgramError] = _ERRORS.get(status, RemoteError) if is_signed else RemoteError
        if status in _TRANSIENT_STATUS:
            kind = TransientError
        text = "{url}: the server refused {action}: {detail}"
        error = kind(text, url=self.address, action=action, detail=detail, status=status)
        if isinstance(error, ReplacedError):
            raise self.describe_replacement(error, str(self.address))
        raise error

    def _translate(self, error: Exception, action: str) -> ProgramError:
        """Make one line of what requests, urllib3 and the operating system raise."""
        causes = list(_causes(error))
        reason = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
        kind: type[ProgramError] = TransientError
        if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            kind, reason = RemoteError, f"{reason or causes[-1]} (--ca-file names an authority to trust)"
        elif self.address.scheme == "https" and any(getattr(c, "reason", "") in _NO_TLS for c in causes):
            kind, reason = RemoteError, f"the server doesn't speak https, use {self.address._replace(scheme='http')}"
        elif names := [cause for cause in causes if isinstance(cause, socket.gaierror)]:
            kind = TransientError if names[0].errno == socket.EAI_AGAIN else RemoteError
        elif isinstance(error, requests.ConnectTimeout):
            reason = f"no connection within {self._connect_timeout:g} seconds"
        elif any(isinstance(cause, (TimeoutError, requests.Timeout)) for cause in causes):
            reason = f"no sign of life for {self.network.timeout:g} seconds"
        elif isinstance(error, requests.exceptions.InvalidURL):
            kind = RemoteError
        text = "{url}: can't exchange {action} with the server: {reason}"
        return kind(text, url=self.address, action=action, reason=reason or str(causes[-1]), status=0)

    def _exactly(self, size: int, response: requests.Response) -> Iterator[Chunk]:
        """The body of a response, which has to have a certain size."""
        length = response.headers.get("Content-Length", "")
        if length != str(size):
            text = "{url}: the server sent {length} bytes of data instead of {size}"
            raise ProtocolError(text, url=self.address, length=length[:40] or "an unknown number of", size=size)
        original = getattr(response.raw, "_original_response", None)
        if self.address.scheme == "http" and isinstance(original, HTTPResponse) and original.fp:
            yield from self._splice(original, size)
            original.close()
            response.raw.release_conn()
            return
        while chunk := response.raw.read(CHUNK_SIZE):
            yield chunk

    def _splice(self, original: HTTPResponse, size: int) -> Iterator[Chunk]:
        """Take what was read together with the header, then receive the rest without touching it."""
        ahead = original.fp.peek(1)[:size]
        yield original.fp.read(len(ahead))
        yield from receive(original.fp.fileno(), size - len(ahead), self.network.timeout)

    def _lines(self, response: requests.Response) -> Iterator[bytes]:
        """The body of a response as it arrives."""
        # Not response.iter_content(), which reads the size of a chunk without a limit to its length.
        while chunk := response.raw.read1(CHUNK_SIZE):
            yield chunk


class _Body:
    """A request body of known length that is read while it is sent (requests asks for the length first)."""

    def __init__(self, size: int, chunks: Iterable[Chunk]):
        self.size = size
        self.chunks = chunks

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes | memoryview | Stored]:
        if isinstance(self.chunks, Stored):
            # The connection knows how to send that as a whole (and http.client takes an iterable where it's encrypted).
            return iter([self.chunks])
        return (bytes(chunk) if isinstance(chunk, Piped) else chunk for chunk in self.chunks)


def _place(extents: Sequence[Extent]) -> dict[str, Any]:
    """Spell extents as parameters: the frozen way where that is possible."""
    if len(extents) == 1:
        return {"offset": extents[0].offset, "size": extents[0].size}
    return {"extents": format_extents(extents)}


def _name(run: str) -> dict[str, Any]:
    return {"run": run} if run else {}


def _check_head(response: requests.Response) -> None:
    """A damaged head may not tell any more where the body ends."""
    ends = {"content-length", "transfer-encoding"} & {name.lower() for name in response.headers}
    if not ends and response.raw.version == 11 and response.headers.get("Connection", "").lower() != "close":
        raise TransientError("{url}: the server's answer is damaged", url=response.url.partition("?")[0], status=0)


def _read_document(response: requests.Response) -> bytes:
    document = b""
    # A read that comes up short says nothing: only the one after it raises an error when the body isn't complete.
    while len(document) <= _MAX_DOCUMENT and (chunk := response.raw.read(_MAX_DOCUMENT + 1 - len(document))):
        document += chunk
    if len(document) > _MAX_DOCUMENT:
        raise ProtocolError("The server sent a document of more than {limit} bytes", limit=_MAX_DOCUMENT)
    digest = response.headers.get(DIGEST_HEADER, "")
    if digest and digest != digest_text(document):
        raise TransientError("{url}: the server's answer is damaged", url=response.url.partition("?")[0], status=0)
    return document


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised because of, the root cause last."""
    while error is not None:
        yield error
        reason = getattr(error, "reason", None)
        nested = [arg for arg in (reason, *error.args) if isinstance(arg, BaseException)]
        error = nested[0] if nested else error.__cause__ or error.__context__
