"""
How is a file served to clients elsewhere?

The server serves a :class:`.Replica`: a view decodes a request, calls the method of the replica that has its name, and
encodes the answer. There is no state between requests, so any request may be repeated, and processes may come and go.
Whatever a client does wrong is answered with a problem (RFC 9457) and never with 500; what a client asks for is bounded
by constants, not by its wishes.
"""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import chain, islice
from typing import Any, TypeVar

import flask
from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from pdiffcopy import answers, protocol, streams
from pdiffcopy.blocks import SET_ID_BITS
from pdiffcopy.bundles import ManyRequest
from pdiffcopy.cores import count_cores
from pdiffcopy.digests import compute_digest
from pdiffcopy.entries import Entry
from pdiffcopy.exceptions import (
    AbsentError,
    AuthenticationError,
    BusyError,
    ForbiddenError,
    ProgramError,
)
from pdiffcopy.files.confinement import Root, contain
from pdiffcopy.files.names import Namespace
from pdiffcopy.hashing import HEARTBEAT, STRIPE_BLOCKS, Budget, Hashers, submit
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.pace import make_pace
from pdiffcopy.replica import Reading
from pdiffcopy.request import Headers, Request
from pdiffcopy.server.admission import NOTED, Gate
from pdiffcopy.server.body import read_body, send_chunks, watch_client
from pdiffcopy.server.parts import answer_many
from pdiffcopy.words import ANSWER_HEADER, DIGEST_HEADER, REQUEST_HEADER, check_query

logger = logging.getLogger(__name__)

_HASHERS = Hashers(count_cores(), Budget(16 * STRIPE_BLOCKS * count_cores()))
"""The threads that hash for all clients of a process. What may wait is enough for four clients at full speed, some
20 MiB a core."""
_ENTRIES = 256
"""How many entries of a list are sent at a time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the operator wants."""

    root: str = ""
    """The directory that names are resolved in (empty means all of the machine)."""
    token: str = ""
    read_only: bool = False
    devices: bool = False
    allow_set_id: bool = False
    """Whether clients may set the bits that let a program run as its owner."""
    allow_hosts: tuple[str, ...] = ()
    """The names by which clients may call the server, see :class:`.Gate`."""
    bwlimit: int = 0
    """How many bytes of contents may pass in a second, over all clients and processes together (0: any number)."""


def create_app(settings: Settings, gate: Gate | None = None) -> Flask:
    """
    Make a WSGI application.

    :param settings: What the operator wants.
    :param gate: Who is a client (by default what the settings say).
    """
    views = _Views(settings, gate or Gate(settings.token, settings.allow_hosts))
    application = Flask("pdiffcopy.server", static_folder=None)
    application.before_request(views.authenticate)
    application.after_request(_sign)
    application.register_error_handler(Exception, _handle_error)
    kinds: tuple[type[Request], ...] = (*protocol.REQUESTS, ManyRequest)
    for kind in kinds:
        application.add_url_rule(
            f"/{kind.endpoint}", kind.action, partial(views.handle, kind), methods=[kind.verb],
            provide_automatic_options=False,
        )  # fmt: skip
    return application


class _Views:
    """What the endpoints do."""

    def __init__(self, settings: Settings, gate: Gate):
        self.settings = settings
        self.gate = gate
        self.pace = make_pace(settings.bwlimit)  # before the processes are forked that share it
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.descriptors, self.share = threading.Semaphore(most // 4), most // 16
        devices = settings.devices
        self.namespace = Root(settings.root, devices) if settings.root else Namespace(devices)

    def authenticate(self) -> None:
        """Decide whether somebody is a client, before any parameter or file is looked at."""
        request = flask.request
        authorization = request.headers.get("Authorization", "")
        if authorization and not self.gate.knows(authorization) and not request.environ.get(NOTED):
            self.gate.guesses.note(request.remote_addr or "")
        self.gate.check(request.headers)
        check_query(request.query_string, request.headers.get(REQUEST_HEADER, ""))

    def handle(self, kind: type[Request]) -> Any:
        """Answer the request that has come."""
        # The view is named like the method of the replica.
        return getattr(self, kind.action)(*self.prepare(kind, flask.request.query_string, flask.request.headers))

    def prepare(self, kind: type[Request], query: bytes, headers: Headers) -> tuple[Request, LocalReplica]:
        """Decode a request, and get the replica that it is about."""
        if kind.writes and self.settings.read_only:
            raise ForbiddenError("This server is read-only")
        request = kind.decode(query, headers)
        sets_id = isinstance(request, protocol.WithMetadata) and (request.mode or 0) & SET_ID_BITS
        if sets_id and not self.settings.allow_set_id:
            raise ForbiddenError("This server sets no set-id bits (unless it is started with --allow-set-id)")
        namespace = contain(self.namespace, request.within)
        replica = LocalReplica(request.filename, namespace, _HASHERS, watch_client(flask.request.environ))
        replica.file_id, replica.pace = request.file_id, self.pace
        for name, word in (("flush", "flush"), ("drop", "drop"), ("is_folder", "folder")):
            setattr(replica, name, getattr(request, word, False))
        return request, replica

    def reserve(self, count: int) -> ExitStack:
        """
        Reserve some descriptors, of which a single request may need many at once.

        :returns: A context manager that gives them back.
        :raises: :exc:`.BusyError` when so many aren't left.
        """
        with ExitStack() as stack:
            for _ in range(count):
                if not self.descriptors.acquire(blocking=False):
                    raise BusyError("There are too many open files already")
                stack.callback(self.descriptors.release)
            return stack.pop_all()

    def many(self, request: ManyRequest, replica: LocalReplica) -> Any:
        """``POST /many``"""
        return answer_many(flask.request.environ, self, _handle_error)

    def info(self, request: protocol.InfoRequest, replica: LocalReplica) -> Any:
        """``GET /info``"""
        info, peer = replica.info(request.run)
        peer = peer._replace(writable=not self.settings.read_only, sets_id=self.settings.allow_set_id)
        document = answers.encode_info(info, peer)
        if not info.exists:
            return _problem(404, f"No such file: {request.filename}", document)
        return document

    def entries(self, request: protocol.ListRequest, replica: LocalReplica) -> Response:
        """``GET /list``"""
        with ExitStack() as stack:
            stack.enter_context(self.reserve(min(request.depth, self.share)))
            entries = stack.enter_context(closing(replica.entries(request.depth)))
            first = next(entries)  # what can't be looked at at all is refused before the status is sent
            response = Response(_report(_collect(chain([first], entries))), mimetype="text/plain")
            response.call_on_close(stack.pop_all().close)
            return response

    def hashes(self, request: protocol.HashesRequest, replica: LocalReplica) -> Response:
        """``GET /hashes``"""
        stop = request.stop or None
        stripes = replica.hashes(
            request.block_size, request.method, request.concurrency, request.offset, stop, request.grain
        )
        lines = map(streams.format_hashes, stripes)
        body = _report(map(streams.add_check, lines)) if request.checks else lines
        response = Response(body, mimetype="text/plain")
        response.call_on_close(stripes.close)
        return response

    def holes(self, request: protocol.HolesRequest, replica: LocalReplica) -> Any:
        """``GET /holes``"""
        holes = replica.holes(request.offset, request.stop, grain=1)
        return answers.encode_holes(holes, request.stop, request.grain)

    def clear(self, request: protocol.ClearRequest, replica: LocalReplica) -> Any:
        """``POST /zeros``"""
        return {answers.CLEARED: replica.clear(request.packed, request.run, request.keep)}

    def read(self, request: protocol.ReadRequest, replica: LocalReplica) -> Response:
        """``GET /blocks``"""
        with ExitStack() as stack:
            state_digest = request.digest and flask.request.method != "HEAD"
            reading = stack.enter_context(replica.read(request.get_extents(), state_digest, not request.is_exact))
            headers = {"Content-Length": str(reading.size if request.data else 0)}
            if reading.digest:
                headers[DIGEST_HEADER] = reading.digest
            body = send_chunks(flask.request.environ, reading.chunks if request.data else ())
            response = Response(body, headers=headers, mimetype="application/octet-stream")
            response.call_on_close(stack.pop_all().close)
            return response

    def pieces(self, request: protocol.PiecesRequest, replica: LocalReplica) -> Response:
        """``GET /pieces``"""
        if flask.request.method == "HEAD":
            return Response(mimetype="application/octet-stream")
        digests = replica.pieces(request.extents, request.size, request.method)
        return Response(bytes.fromhex("".join(digests)), mimetype="application/octet-stream")

    def write(self, request: protocol.WriteRequest, replica: LocalReplica) -> Any:
        """``POST /blocks``"""
        length = flask.request.content_length
        extents = request.get_extents(length)
        body = read_body(flask.request.environ, length or 0, self.pace)
        replica.write(extents, Reading(body, request.digest, request.block_size, request.method), request.run)
        return {answers.VERIFIED: bool(request.digest)}

    def resize(self, request: protocol.ResizeRequest, replica: LocalReplica) -> Any:
        """``POST /resize``"""
        replica.resize(request.size, request.run, request.in_advance)
        return {"size": request.size}

    def claim(self, request: protocol.ClaimRequest, replica: LocalReplica) -> Any:
        """``POST /claim``"""
        claimed, info = replica.claim(request.run, request.create, request.mode)
        return {answers.CLAIMED: claimed, **info.as_dict()}

    def release(self, request: protocol.ReleaseRequest, replica: LocalReplica) -> Any:
        """``POST /release``"""
        return {answers.CLAIMED: False, **replica.release(request.run).as_dict()}

    def metadata(self, request: protocol.MetadataRequest, replica: LocalReplica) -> Any:
        """``GET /metadata``"""
        return replica.metadata()._asdict()

    def set_metadata(self, request: protocol.SetMetadataRequest, replica: LocalReplica) -> Any:
        """``POST /metadata``"""
        replica.set_metadata(request.get_metadata(), request.run, request.in_advance)
        return {}

    def make_folder(self, request: protocol.MakeFolderRequest, replica: LocalReplica) -> Any:
        """``POST /folder``"""
        replica.make_folder(request.mode)
        return {}

    def stage(self, request: protocol.StageRequest, replica: LocalReplica) -> Response:
        """``POST /stage``"""
        if request.file_id:
            replica.check()

        def work() -> str:
            staged = replica.stage(request.run, request.mode, request.takes)
            return answers.encode_staged(staged.filename, staged.claimed, staged.shares, staged.info)

        return Response(_report(_do(work)), mimetype="text/plain")

    def commit(self, request: protocol.CommitRequest, replica: LocalReplica) -> Any:
        """``POST /commit``"""
        return {answers.CLAIMED: False, **replica.commit(request.new_id, request.ctime_ns, request.run).as_dict()}

    def sync(self, request: protocol.SyncRequest, replica: LocalReplica) -> Response:
        """``POST /sync``"""
        replica.check()
        return Response(_report(_do(partial(replica.sync, request.run))), mimetype="text/plain")


def _report(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Send the lines of a stream, and how it ended: the status has been sent before that is known."""
    try:
        yield from lines
        yield streams.DONE.encode("ascii") + b"\n"
    except AbsentError:
        return
    except ProgramError as e:
        logger.error("%s", e)
        yield streams.encode_report(e).encode("ascii")


def _collect(entries: Iterator[Entry]) -> Iterator[bytes]:
    """Make the lines of a list, some entries at a time."""
    with ThreadPoolExecutor(1) as executor:
        while found := (yield from _await(submit(executor, lambda: list(islice(entries, _ENTRIES))))):
            yield streams.add_check(streams.format_entries(found))


def _do(work: Callable[[], str | None]) -> Iterator[bytes]:
    """Do what takes long, and make a line of what comes of it."""
    with ThreadPoolExecutor(1) as executor:
        result = yield from _await(submit(executor, work))
        yield f"{result or ''}\n".encode("ascii")


def _await(future: Future[T]) -> Generator[bytes, None, T]:
    """Wait for what is done in the background. Until then empty lines keep the connection alive."""
    while not wait([future], HEARTBEAT).done:
        yield b"\n"
    return future.result()


def _problem(status: int, detail: str, members: dict[str, Any] | None = None) -> Response:
    title = HTTPStatus(status).phrase
    return Response(answers.encode_problem(status, title, detail, members), status, mimetype=answers.PROBLEM_TYPE)


def _sign(response: Response) -> Response:
    """Say to which request an answer belongs. Nobody may keep it."""
    response.headers["Cache-Control"] = "no-store"
    if response.is_sequence:
        response.headers[DIGEST_HEADER] = compute_digest(response.get_data())
    if tag := flask.request.headers.get(REQUEST_HEADER, ""):
        digest = response.headers.get(DIGEST_HEADER, "")
        response.headers[ANSWER_HEADER] = answers.sign_answer(tag, response.status_code, digest)
    return response


def _handle_error(error: Exception) -> Response:
    """The edge where exceptions become responses."""
    if isinstance(error, HTTPException):
        response = _problem(error.code or 500, error.description or "")
        response.headers.extend((k, v) for k, v in error.get_headers() if k.lower() != "content-type")
        return response
    if not isinstance(error, ProgramError):
        logger.exception("A bug, please report it:")
        return _problem(500, "Internal error")
    response = _problem(error.http_status, str(error))
    if isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.http_status >= 500:
        logger.error("%s", error)
    return response
