"""
Usage: pdiffcopy [OPTIONS] [SOURCE... TARGET]

Make TARGET equal to SOURCE: large files, on this server or on others. Both are hashed on many cores, and only the
blocks that differ move, many at a time.

Each of the two is the pathname of a local file, or the location of a file behind a pdiffcopy server: 'host:/path',
'host:port/path', '[v6]:port/path' (as it is) or 'http://host:port/path', 'https://...' (percent-encoded). The default
port is 8080. Write './host:8080/x' for a local file with a colon before the first slash of its name.

Several sources go into the folder TARGET, and so does one source if TARGET is a folder or ends with a slash. Folders
that are missing on the way to TARGET are created.

Without SOURCE and TARGET the program is the server.

Supported options:

  -b, --block-size=BYTES

    The unit of comparing and moving: a number of bytes, or something like 64KiB or 4MiB (defaults to 1 MiB).

  -m, --hash-method=NAME

    The hash method that compares blocks: any method of Python's hashlib that has a fixed length, 'blake3' (fast), or
    'xxh128' (by far the fastest, for files that nobody manipulates on purpose). The default is 'auto': 'blake3' where
    both sides have it, otherwise 'sha1', which every server knows.

  -W, --whole-file

    Don't compare, copy everything.

  -r, --recursive

    Bring the files in the folder SOURCE, and in all folders below, into line with those of the same names in the folder
    TARGET. Missing folders are created, and files that only TARGET has are left alone. Links, FIFOs, sockets and
    devices are left out and counted (-v names them), and nothing is followed out of a folder.

  -a, --archive

    The same as -r -p -t -o -g. With -r these hold for folders, too.

  --include=GLOB, --exclude=GLOB

    Choose files with -r by their names below SOURCE (may be repeated: the first one that fits decides, and what fits
    none is included). '*' stands for any characters, slashes too: 'a/*' is all that is in a, and 'a' the folder alone.

  -c, --concurrency=COUNT

    Client: how many blocks to hash and how many requests to make at the same time. Server: how many processes to run.
    The default is a third of the cores, but at least two.

  -n, --dry-run

    Compare the files and report how similar they are, but write nothing. (So what forbids to write isn't found.)

  -B, --benchmark=COUNT

    Damage TARGET (a local file) COUNT times, more each time, repair it, and print how long that took. The program asks
    for confirmation, unless $PDIFFCOPY_BENCHMARK is 'allowed'. To compare with an rsync daemon, set
    $PDIFFCOPY_BENCHMARK_RSYNC_SERVER (host:port), $PDIFFCOPY_BENCHMARK_RSYNC_MODULE and
    $PDIFFCOPY_BENCHMARK_RSYNC_ROOT (the directory that the module stands for).

  -l, --listen=ADDRESS

    Start a server that listens on PORT (all addresses of IPv4), HOST, HOST:PORT or [v6]:PORT ([::]:PORT is all of both
    kinds). The default is 8080.

  --no-verify

    Don't read back and check what was written to TARGET.

  --fsync

    Flush TARGET to its disk before reporting success.

  --atomic

    Leave TARGET as it is until a new version, beside it, is complete, verified and flushed, and takes its place in one
    step. It begins as a clone of TARGET where the file system has those, otherwise as a copy. One that a failed run has
    left ('.NAME.pdiffcopy') is what the next one begins with.

  -p, --perms
  -t, --times
  -o, --owner
  -g, --group

    Give TARGET the permission bits (those of set-id too), the modification time, the owner, the group of SOURCE.
    Users and groups are found by their names, and by their numbers where there are no such names.

  --sparse=WHEN

    What becomes of holes, which are parts of a file that take no room on the disk: 'auto' makes them where SOURCE has
    them and nowhere else (the default), 'always' makes them of all blocks of zeros, 'never' makes none.

  --bwlimit=RATE

    Let at most this many bytes of contents pass in a second: a number, or something like 10MiB. Client: over all of its
    processes. Server: over all clients together, in both directions. (Digests don't count, they are tiny.)

  --drop-cache

    Leave the page cache as it was: what SOURCE and TARGET bring into it leaves it again, on both sides, and what was
    there before stays. So the other programs of a busy host keep what they need in memory.

  --timeout=SECONDS

    How long to wait for a sign of life of the other side (defaults to 60).

  --retries=COUNT

    How many failures of the network in a row to survive (defaults to 8, which bridges about 20 seconds).

  --token-file=FILE

    The file with the shared secret that a server asks for and a client gives (or set $PDIFFCOPY_TOKEN). No other user
    may be able to read it.

  --ca-file=FILE

    Trust this certificate authority for locations that start with https://.

  --json

    Print one JSON object on stdout at the end (messages go to stderr).

  --progress=json

    Write a line of JSON to stderr each second: bytes and files done, the rate, the time left.

  --root=DIRECTORY

    Server: resolve paths inside this directory, and let none leave it.

  --read-only

    Server: refuse to write.

  --devices

    Server: serve block devices too, not only regular files.

  --allow-set-id

    Server: let clients that use -p set the set-id bits of a file.

  --certfile=FILE, --keyfile=FILE

    Server: serve https with this certificate and its key.

  --allow-host=NAME

    Server: let clients call it by this name (may be repeated; several names have commas between them; '*' is any
    name). Addresses, 'localhost', the name behind --listen and the name of this machine are always allowed. Web pages
    never are.

  --access-log=FILE

    Server: write a line for each request to this file ('-' is stderr).

  -v, --verbose

    Print more messages (may be repeated).

  -q, --quiet

    Print fewer messages (may be repeated).

  --version

    Show the version and exit.

  -h, --help

    Show this message and exit.

Exit codes: 0 done, 1 failed, 3 SOURCE changed while it was copied (run again, or copy a snapshot), 4 a block could
not be verified, 129 hung up, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import logging
import resource
import sys
from contextlib import closing, nullcontext, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from humanfriendly.terminal import usage

from pdiffcopy import __version__
from pdiffcopy.console import (
    EndingSignal,
    describe_end,
    fail,
    heed_signals,
    ignore_signals,
    leave,
    log_messages,
    open_standard_streams,
    print_json,
    printing,
    promise_json,
    show_traceback,
    starting,
)
from pdiffcopy.exceptions import DependencyError, UsageError
from pdiffcopy.options import parse_arguments, seems_to_want_json, select
from pdiffcopy.security import load_token, warn_of_eavesdroppers

if TYPE_CHECKING:
    from pdiffcopy.client import Client, Location

logger = logging.getLogger(__name__)

__all__ = ["main", "run_client", "run_server"]


def main() -> NoReturn:
    """The command line interface."""
    open_standard_streams()
    promise_json(seems_to_want_json(sys.argv[1:]))  # until it's known
    try:
        heed_signals()
        log_messages()
        _run(sys.argv[1:])
        sys.stdout.flush()
        message, status = "", 0
    except (EndingSignal, Exception) as e:
        message, status = describe_end(e)
        show_traceback(e)
    ignore_signals()  # what comes now would only hide how it ended
    if status:
        fail(message, status)
    leave(status)


def _run(arguments: list[str]) -> None:
    options, locations = parse_arguments(arguments)
    promise_json("--json" in options)
    if "--help" in options:
        with printing():
            usage(__doc__ or "")
    elif "--version" in options:
        with printing():
            print(f"pdiffcopy {__version__}")
    elif not locations:
        run_server(**select(options, "server"))
    elif "--listen" in options:
        raise UsageError("--listen starts a server, which takes no locations: leave out one or the other")
    elif len(locations) < 2:
        text = "Give two locations, SOURCE and TARGET, and not only {value} (pdiffcopy --help explains)"
        raise UsageError(text, value=repr(locations[0]))
    else:
        run_client(sources=locations[:-1], target=locations[-1], **select(options, "client"))


def run_client(**options: Any) -> None:
    """
    Run the client program.

    :param options: The options of the command line by their long names (with underscores): ``sources`` (or ``source``),
                    ``target``, ``block_size``, ``hash_method``, ``whole_file``, ``concurrency``, ``dry_run``,
                    ``benchmark``, ``no_verify``, ``fsync``, ``atomic``, ``perms``, ``times``, ``owner``, ``group``,
                    ``sparse``, ``bwlimit``, ``drop_cache``, ``recursive``, ``rules``, ``timeout``, ``retries``,
                    ``token_file``, ``ca_file``, ``progress``, ``json``.
    """
    as_json = options.pop("json", False)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with starting():
        client = _make_client(**options)
    warn_of_eavesdroppers([location.address for location in _get_locations(client)], client.network.token)
    if client.is_about_many:
        _run_files(client, as_json)
        return
    if client.benchmark:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # for its question and its table
            outcome = {"measurements": [vars(measurement) for measurement in client.run_benchmark()]}
    else:
        outcome = client.run().as_dict()
    if as_json:
        print_json(outcome)


def _run_files(client: Client, as_json: bool) -> None:
    from pdiffcopy.client.summary import Summary
    from pdiffcopy.spool import Spool

    if client.benchmark:
        raise UsageError("--benchmark takes one source, which is a file")
    summary = Summary()
    ended: Any = client.run_files(summary)
    with Spool(as_json, summary.as_dict) as files, closing(ended):  # so that no process goes on while it's printed
        for file in ended:
            files.add(file.as_dict)
        logger.log(logging.WARNING if summary.reservations else logging.INFO, "%s", summary)
    summary.check()


def _make_client(**options: Any) -> Client:
    try:
        from pdiffcopy.client import Client, Network
    except ImportError as e:
        raise DependencyError.of("client", e) from e
    network: dict[str, Any] = {name: options.pop(name) for name in ("timeout", "retries", "ca_file") if name in options}
    network["token"] = load_token(options.pop("token_file", ""))
    options.setdefault("hash_method", "auto")
    if len(options.get("sources", ())) == 1:
        (options["source"],) = options.pop("sources")
    client = Client(
        delta_transfer=not options.pop("whole_file", False),
        verify=not options.pop("no_verify", False),
        network=Network(**network),
        **options,
    )
    with suppress(DependencyError):  # that's for the run to tell
        for location in _get_locations(client):
            location.replica  # noqa: B018 (imports what it needs)
    return client


def _get_locations(client: Client) -> list[Location]:
    """The locations that are given: the client itself says what is missing."""
    return [location for location in (*client.sources, client.target) if location]


def run_server(**options: Any) -> None:
    """
    Run the server program.

    :param options: The options of the command line by their long names (with underscores): ``address``,
                    ``concurrency``, ``bwlimit``, ``root``, ``token_file``, ``read_only``, ``devices``,
                    ``allow_set_id``, ``certfile``, ``keyfile``, ``allow_hosts``, ``access_log``.
    """
    try:
        with starting():
            import pdiffcopy.server.daemon  # noqa: F401 (start_server needs it)
            from pdiffcopy.server import Settings, start_server
    except ImportError as e:
        raise DependencyError.of("server", e) from e
    names = ("root", "read_only", "devices", "allow_set_id", "allow_hosts", "bwlimit")
    settings: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    settings["token"] = load_token(options.pop("token_file", ""))
    start_server(settings=Settings(**settings), **options)
