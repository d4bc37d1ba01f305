"""
How is a file served to clients elsewhere?

Thin Flask views over :mod:`.operations` and :mod:`.hashing`, on gunicorn with threads. There's no state between
requests, so any request may be repeated, and processes may come and go. Whatever a client does wrong is answered with
a problem (RFC 9457) and never with 500; what a client asks for is bounded by constants, not by its wishes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from pdiffcopy import BLOCK_SIZE, DEFAULT_CONCURRENCY, DEFAULT_PORT
from pdiffcopy import protocol as wire
from pdiffcopy.accesslog import open_access_log
from pdiffcopy.address import parse_listen
from pdiffcopy.admission import NOTED, Gate
from pdiffcopy.body import read_body, send_extents, watch_client
from pdiffcopy.confinement import Root
from pdiffcopy.cores import count_cores
from pdiffcopy.exceptions import (
    AbsentError,
    AuthenticationError,
    FileMissingError,
    ForbiddenError,
    LengthRequiredError,
    ProgramError,
    RangeError,
    RequestError,
)
from pdiffcopy.hashing import HEARTBEAT, STRIPE_BLOCKS, Budget, get_hasher, get_methods, hash_stripes
from pdiffcopy.localfile import MACHINE, LocalFile
from pdiffcopy.operations import claim_file, release_file, resize_file, sync_file
from pdiffcopy.protocol import BlockDigest, Extent, Parameters
from pdiffcopy.security import check_certificate, is_loopback, load_token

logger = logging.getLogger(__name__)

_BUDGET = Budget(16 * STRIPE_BLOCKS * count_cores())
"""Enough for four clients at full speed, some 20 MiB a core. It holds for all clients of a process together."""


@dataclass(frozen=True)
class Settings:
    """What the operator wants."""

    root: str = ""
    """The directory that names are resolved in (empty means all of the machine)."""
    token: str = ""
    read_only: bool = False
    devices: bool = False
    allow_hosts: tuple[str, ...] = ()
    """The names by which clients may call the server, see :class:`.Gate`."""


def create_app(settings: Settings, gate: Gate | None = None) -> Flask:
    """
    Make a WSGI application.

    :param settings: What the operator wants.
    :param gate: Who is a client (by default what the settings say).
    """
    views = _Views(settings, gate or Gate(settings.token, settings.allow_hosts))
    application = Flask(__name__, static_folder=None)
    application.before_request(views.authenticate)
    application.after_request(_sign)
    application.register_error_handler(Exception, _handle_error)
    for method, endpoint, view in (
        ("GET", wire.INFO, views.info),
        ("GET", wire.HASHES, views.hashes),
        ("GET", wire.BLOCKS, views.read),
        ("POST", wire.BLOCKS, views.write),
        ("POST", wire.RESIZE, views.resize),
        ("POST", wire.CLAIM, views.claim),
        ("POST", wire.RELEASE, views.release),
        ("POST", wire.SYNC, views.sync),
    ):
        application.add_url_rule(f"/{endpoint}", view.__name__, view, methods=[method], provide_automatic_options=False)
    return application


class _Views:
    """What the endpoints do."""

    def __init__(self, settings: Settings, gate: Gate):
        self.settings = settings
        self.gate = gate
        self.namespace = Root(settings.root) if settings.root else MACHINE

    def authenticate(self) -> None:
        """Comes first, before any parameter or file is looked at."""
        authorization = request.headers.get("Authorization", "")
        if authorization and not self.gate.knows(authorization) and not request.environ.get(NOTED):
            self.gate.guesses.note(request.remote_addr or "")
        self.gate.check(request.headers)
        wire.check_query(request.query_string, request.headers.get(wire.REQUEST_HEADER, ""))

    def info(self) -> Any:
        """``GET /info``"""
        parameters = Parameters(request.query_string)
        info = wire.FileInfo(exists=False)
        try:
            with self.open(parameters) as file:
                file.check_claim(parameters.run)
                info = file.info()
        except FileMissingError as e:
            return _problem(e.http_status, str(e), self.describe(info))
        return self.describe(info)

    def hashes(self) -> Response:
        """``GET /hashes``"""
        parameters = Parameters(request.query_string)
        block_size = parameters.integer("block_size", 1, wire.MAX_BLOCK_SIZE, default=BLOCK_SIZE)
        start = parameters.integer("offset", default=0)
        if start % block_size:
            raise RequestError("The offset {start} isn't a multiple of the block size", start=start)
        method = parameters.get("method")
        get_hasher(method)
        executor, limit = _get_executor(os.getpid())
        concurrency = min(parameters.integer("concurrency", 1, wire.MAX_CONCURRENCY, default=1), limit)
        checks = parameters.flag("checks")
        file = self.open(parameters)
        stripes = hash_stripes(file, start, file.size(), block_size, method, executor, concurrency, _BUDGET)
        lines = self.report_hashes(stripes) if checks else map(wire.format_hashes, stripes)
        response = Response(lines, mimetype="text/plain")
        response.call_on_close(stripes.close)
        response.call_on_close(file.close)
        return response

    def read(self) -> Response:
        """``GET /blocks``"""
        parameters = Parameters(request.query_string)
        extents, state_digest = parameters.extents(), parameters.flag("digest") and request.method != "HEAD"
        send_data = parameters.flag("data", default=1)
        file = self.open(parameters)
        if not extents:
            size = parameters.integer("size", 0, wire.MAX_BLOCK_SIZE)
            extents = [file.clip(Extent(parameters.integer("offset"), size))]
        elif max(map(sum, extents)) > file.size():
            raise RangeError("An extent lies beyond the end of the file")
        headers = {wire.DIGEST_HEADER: file.digest(extents)} if state_digest else {}
        if not send_data:
            extents = []
        headers["Content-Length"] = str(sum(extent.size for extent in extents))
        body = send_extents(request.environ, file, extents)
        response = Response(body, headers=headers, mimetype="application/octet-stream")
        response.call_on_close(file.close)
        return response

    def write(self) -> Any:
        """``POST /blocks``"""
        self.check_writable()
        parameters = Parameters(request.query_string)
        length = request.content_length
        if length is None:
            raise LengthRequiredError("The body needs a Content-Length")
        extents = parameters.extents() or [Extent(parameters.integer("offset"), length)]
        wire.check_extents(extents)
        block_size = parameters.integer("block_size", 1, wire.MAX_BLOCK_SIZE, default=0)
        if length != sum(extent.size for extent in extents):
            raise RequestError("The body has {length} bytes, the extents have a different size", length=length)
        digest = request.headers.get(wire.DIGEST_HEADER, "")
        with self.open(parameters, write=True) as file:
            body = read_body(request.environ, length)
            file.write(extents, body, digest and wire.check_digest(digest), parameters.run, block_size)
        return {wire.VERIFIED: bool(digest)}

    def resize(self) -> Any:
        """``POST /resize``"""
        self.check_writable()
        parameters = Parameters(request.query_string)
        size = parameters.integer("size")
        resize_file(run=parameters.run, size=size, **self.locate(parameters))
        return {"size": size}

    def claim(self) -> Any:
        """``POST /claim``"""
        self.check_writable()
        parameters = Parameters(request.query_string)
        parameters.get("run")
        create = parameters.flag("create")
        mode = parameters.integer("mode", 0, wire.MAX_MODE, default=wire.FileInfo.mode)
        claimed, info = claim_file(run=parameters.run, create=create, mode=mode, **self.locate(parameters))
        return {wire.CLAIMED: claimed, **info.as_dict()}

    def release(self) -> Any:
        """``POST /release``"""
        self.check_writable()
        parameters = Parameters(request.query_string)
        parameters.get("run")
        info = release_file(run=parameters.run, **self.locate(parameters))
        return {wire.CLAIMED: False, **info.as_dict()}

    def sync(self) -> Response:
        """``POST /sync``"""
        self.check_writable()
        parameters = Parameters(request.query_string)
        self.open(parameters).close()
        work = partial(sync_file, run=parameters.run, **self.locate(parameters))
        return Response(self.report_sync(work), mimetype="text/plain")

    def report_hashes(self, stripes: Iterator[list[BlockDigest]]) -> Iterator[bytes]:
        """Send hashes with checks. The status has been sent before it's known whether all of the file can be read."""
        try:
            yield from map(wire.format_checked, stripes)
            yield wire.DONE.encode("ascii") + b"\n"
        except AbsentError:
            return
        except ProgramError as e:
            logger.error("%s", e)
            yield wire.encode_report(e).encode("ascii")

    def report_sync(self, work: Callable[[], None]) -> Iterator[str]:
        """Flush a file in the background. The status has been sent before it's known how that ends."""
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(work)
            while not wait([future], HEARTBEAT).done:
                yield "\n"
            error = future.exception()
        if isinstance(error, ProgramError):
            yield wire.encode_report(error)
        elif error:
            raise error
        else:
            yield f"{wire.DONE}\n"

    def open(self, parameters: Parameters, write: bool = False) -> LocalFile:
        """Open the file that a request is about. It isn't read any more when the client has left."""
        file = LocalFile(write=write, flush=parameters.flag("flush"), **self.locate(parameters))
        file.is_awaited = watch_client(request.environ)
        return file

    def locate(self, parameters: Parameters) -> dict[str, Any]:
        """Where the file of a request is, and which one it has to be."""
        return {
            "filename": parameters.filename,
            "namespace": self.namespace,
            "devices": self.settings.devices,
            "file_id": parameters.file_id,
        }

    def describe(self, info: wire.FileInfo) -> dict[str, Any]:
        """Tell about a file and about this server."""
        return wire.encode_info(info, get_methods(), not self.settings.read_only)

    def check_writable(self) -> None:
        """Refuse what would change something, before anything is touched."""
        if self.settings.read_only:
            raise ForbiddenError("This server is read-only")


@lru_cache(maxsize=1)
def _get_executor(pid: int) -> tuple[ThreadPoolExecutor, int]:
    """The threads that hash for all clients of this process, and how many there are."""
    threads = count_cores()
    return ThreadPoolExecutor(threads, "hash"), threads


def _problem(status: int, detail: str, members: dict[str, Any] | None = None) -> Response:
    title = HTTPStatus(status).phrase
    return Response(wire.encode_problem(status, title, detail, members), status, mimetype=wire.PROBLEM_TYPE)


def _sign(response: Response) -> Response:
    """Say to which request an answer belongs. Nobody may keep it."""
    response.headers["Cache-Control"] = "no-store"
    if response.is_sequence:
        response.headers[wire.DIGEST_HEADER] = wire.digest_text(response.get_data())
    if tag := request.headers.get(wire.REQUEST_HEADER, ""):
        digest = response.headers.get(wire.DIGEST_HEADER, "")
        response.headers[wire.ANSWER_HEADER] = wire.sign_answer(tag, response.status_code, digest)
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


app = create_app(Settings(token=load_token()))
"""The WSGI application, for ``python -m gunicorn pdiffcopy.server:app``: it serves everything, and wants the token
that ``$PDIFFCOPY_TOKEN`` holds, if it's set."""


def start_server(
    address: str = "",
    concurrency: int = DEFAULT_CONCURRENCY,
    settings: Settings | None = None,
    certfile: str = "",
    keyfile: str = "",
    access_log: str = "",
) -> None:
    """
    Serve until SIGTERM or SIGINT arrives.

    :param address: Where to listen, see :func:`.parse_listen` (a string, by default all addresses and port 8080).
    :param concurrency: How many processes answer requests (an integer).
    :param settings: What the operator wants (a :class:`Settings` object).
    :param certfile: The certificate to serve https with.
    :param keyfile: The key of that certificate.
    :param access_log: Where to log requests, see :func:`.open_access_log` (by default they aren't).
    """
    from pdiffcopy.daemon import Daemon

    host, port = parse_listen(address or str(DEFAULT_PORT))
    check_certificate(certfile, keyfile)
    settings = settings or Settings(token=load_token())
    if access_log:
        open_access_log(access_log)
    if warning := describe_exposure(settings, host):
        logger.warning("%s", warning)
    gate = Gate(settings.token, (*settings.allow_hosts, host))
    Daemon(create_app(settings, gate), (host, port), concurrency, certfile, keyfile, gate).run()


def describe_exposure(settings: Settings, host: str) -> str:
    """What an operator should know who lets strangers in (an empty string: only this machine, or a token is asked)."""
    if settings.token or is_loopback(host):
        return ""
    verb = "read" if settings.read_only else "read and write"
    where = f"below {settings.root}" if settings.root else "of this machine that this user can"
    missing = {"--token-file": True, "--root": not settings.root, "--read-only": not settings.read_only}
    options = [option for option, is_missing in missing.items() if is_missing]
    last = f" and {options.pop()}" if len(options) > 1 else ""
    return (
        f"This server is open: whoever can reach it may {verb} all files {where}. "
        f"Use {', '.join(options)}{last} to close it."
    )
