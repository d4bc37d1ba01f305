"""
How is the server started?

``app`` is the WSGI application, for ``python -m gunicorn pdiffcopy.server:app``: it serves everything, and wants the
token that ``$PDIFFCOPY_TOKEN`` holds, if it's set.
"""

from __future__ import annotations

import os
from functools import cache

from flask import Flask

from pdiffcopy import DEFAULT_CONCURRENCY, DEFAULT_PORT
from pdiffcopy.address import parse_listen
from pdiffcopy.files.identity import find_boot
from pdiffcopy.security import check_certificate, load_token, warn_of_strangers
from pdiffcopy.server.admission import Gate
from pdiffcopy.server.application import Settings, create_app
from pdiffcopy.words import check_concurrency

__all__ = ["Settings", "app", "create_app", "start_server"]

app: Flask


@cache
def _make_default_app() -> Flask:
    return create_app(Settings(token=load_token()))


def __getattr__(name: str) -> Flask:
    """Make :data:`app` when somebody wants it: what is wrong with the environment is no reason not to be imported."""
    if name == "app":
        return _make_default_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    :raises: :exc:`.UsageError` when an argument can't be meant.
    """
    from pdiffcopy.server.accesslog import open_access_log
    from pdiffcopy.server.daemon import Daemon, raise_file_limit

    check_concurrency(concurrency)
    find_boot()
    host, port = parse_listen(address or str(DEFAULT_PORT))
    check_certificate(certfile, keyfile)
    settings = settings or Settings(token=load_token())
    if access_log:
        open_access_log(access_log)
    warn_of_strangers(host, settings.token, settings.root and os.path.abspath(settings.root), settings.read_only)
    raise_file_limit()  # of which the application makes its own limits
    gate = Gate(settings.token, (*settings.allow_hosts, host))
    application = create_app(settings, gate)
    Daemon(application, (host, port), concurrency, certfile, keyfile, settings.bwlimit, gate).run()
