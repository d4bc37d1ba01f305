"""Nobody in: what strangers, local users and hostile servers try, and what load does."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread, Timer
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import requests

from pdiffcopy.address import parse_location
from pdiffcopy.client import Network
from pdiffcopy.client.servers import Servers
from pdiffcopy.entries import Kind
from pdiffcopy.exceptions import FileError, ProtocolError
from pdiffcopy.files.confinement import Root
from pdiffcopy.files.localfile import LocalFile
from pdiffcopy.localreplica import LocalReplica
from pdiffcopy.operations import read_block, write_block
from pdiffcopy.security import describe_exposure, warn_of_eavesdroppers
from pdiffcopy.server import Settings, start_server
from tests.hostile import BEHAVIOURS, HostileProcess
from tests.support import (
    children_of,
    error_lines,
    ext4,
    loop_device,
    make_data,
    mounted,
    read_links,
    run_pdiffcopy,
    serve_https,
    wait_for,
)
from tests.test_faults import check_error

SECRET = b"the secret of another directory"
TOKEN = "correct-horse-battery-staple"
MEBIBYTE = 1024 * 1024
ENDPOINTS = (
    ("GET", "info"), ("GET", "hashes"), ("GET", "blocks"), ("POST", "blocks"), ("POST", "resize"), ("POST", "sync"),
)  # fmt: skip
WRITES = (("POST", "blocks"), ("POST", "resize"), ("POST", "sync"))
PARAMETERS = {"block_size": 4096, "method": "sha1", "offset": 0, "size": 4}


def ask(server, verb: str, endpoint: str, filename: str, **options) -> requests.Response:
    """Send a request that fits any endpoint. The filename is sent as it is (percent-encode it if need be)."""
    query = "&".join(f"{name}={value}" for name, value in {**PARAMETERS, **options}.items())
    data = b"evil" if (verb, endpoint) == ("POST", "blocks") else None
    url = f"{server.origin}/{endpoint}?filename={filename}&{query}"
    with requests.Session() as session:
        request = session.prepare_request(requests.Request(verb, url, data=data))
        request.url = url  # with all its dots
        return session.send(request, timeout=20)


# Inside the root {{{1


@pytest.fixture
def jail(tmp_path):
    """A root directory with ways out of it, and a secret outside."""
    inside, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (inside / "folder", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_bytes(SECRET)
    (inside / "file").write_bytes(b"harmless")
    (inside / "folder" / "file").write_bytes(b"harmless")
    (inside / "absolute").symlink_to(outside)
    (inside / "relative").symlink_to("../outside")
    (inside / "folder" / "deep").symlink_to("../../outside/secret")
    (inside / "to-secret").symlink_to(outside / "secret")
    (inside / "proc").symlink_to("/proc/self/root")
    (inside / "within").symlink_to("/folder/file")
    return tmp_path


def ways_out(outside: Path) -> list[str]:
    """Spellings of the secret's name."""
    depth = "../" * 20
    return [
        str(outside / "secret"),
        "/../outside/secret",
        f"/{depth}{str(outside / 'secret')[1:]}",
        "/folder/../../outside/secret",
        "//..//..//outside//secret",
        "/%2e%2e/outside/secret",
        "/%2e%2e%2foutside%2fsecret",
        "/..%2foutside%2fsecret",
        "/./../outside/./secret",
        "/absolute/secret",
        "/relative/secret",
        "/folder/deep",
        "/to-secret",
        f"/proc{outside}/secret",
        f"/proc/self/root{outside}/secret",
        "/file/../../outside/secret",
    ]


def state_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder and their contents."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_spelling_leads_out_of_the_root(launch, jail):
    """Whatever a path looks like: nothing outside is read, written, created, resized or flushed."""
    server = launch("--root", str(jail / "root"))
    before = state_of(jail / "outside")
    for name in ways_out(jail / "outside"):
        for method, endpoint in ENDPOINTS:
            if (method, endpoint) != ("POST", "resize"):
                response = ask(server, method, endpoint, name)
                assert 400 <= response.status_code < 500, (name, endpoint)
                assert SECRET not in response.content
    for name in [*ways_out(jail / "outside"), "/absolute/new", "/relative/new", "/../outside/new", f"{jail}/new"]:
        for method, endpoint in (("POST", "resize"), ("POST", "blocks")):  # may make such a file inside
            assert ask(server, method, endpoint, name).status_code < 500
    assert state_of(jail / "outside") == before


def test_links_inside_the_root_are_followed(launch, jail):
    """A leading slash is the root, also in a symbolic link."""
    server = launch("--root", str(jail / "root"))
    for name in ("/within", "/file", "/../file", "/folder/../file", "//file"):
        assert ask(server, "GET", "blocks", name, size=8).content == b"harmless"


def test_errors_do_not_tell_what_is_outside(launch, jail):
    """What exists outside the root and what doesn't look the same."""
    server = launch("--root", str(jail / "root"))
    for method, endpoint in ENDPOINTS:
        for prefix in ("/../outside", "/absolute", "/relative", str(jail / "outside")):
            if (method, endpoint) == ("POST", "resize"):
                continue  # makes what's missing, inside the root
            answers = [ask(server, method, endpoint, f"{prefix}/{name}") for name in ("secret", "nobody")]
            texts = [answer.text.replace("nobody", "secret") for answer in answers]
            # The room left on a disk changes while others write to it.
            texts = [re.sub(r'"room": \d+', '"room": 0', text) for text in texts]
            assert texts[0] == texts[1]
            assert answers[0].status_code == answers[1].status_code


SWAPPER = """
import ctypes, os, sys
libc, folder = ctypes.CDLL(None), sys.argv[1].encode()
print("ready", flush=True)
while True:
    for name in (b"swapped-folder", b"swapped-file"):
        if libc.renameat2(-100, folder + b"/" + name, -100, folder + b"/other-" + name, 2):
            sys.exit("renameat2 failed")
"""


@contextmanager
def swapping(jail: Path):
    """Exchange a folder and a file for links that lead out of the root, as often as the kernel can."""
    root, outside = jail / "root", jail / "outside"
    (root / "swapped-folder").mkdir()
    (root / "swapped-folder" / "secret").write_bytes(b"harmless")
    (root / "other-swapped-folder").symlink_to("../outside")
    (root / "swapped-file").write_bytes(b"harmless")
    (root / "other-swapped-file").symlink_to(outside / "secret")
    process = subprocess.Popen([sys.executable, "-c", SWAPPER, str(root)], stdout=subprocess.PIPE)
    try:
        if not process.stdout.readline():
            pytest.skip("this file system can't exchange names")
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


NAMES = ("/swapped-folder/secret", "/swapped-file", "/swapped-folder/../swapped-folder/secret")


def test_swapped_links_leak_nothing(launch, jail):
    """Somebody swaps links under a running server for seconds: there's no moment between a check and the use."""
    server = launch("--root", str(jail / "root"))
    before = state_of(jail / "outside")
    session = requests.Session()
    statuses = set()
    with swapping(jail):
        over = Timer(3, lambda: None)
        over.start()
        number = 0
        while over.is_alive():
            number += 1
            name = NAMES[number % len(NAMES)]
            for method, endpoint, extra in (
                ("GET", "info", ""), ("GET", "blocks", "&offset=0&size=99"), ("POST", "blocks", "&offset=0"),
                ("POST", "resize", "&size=8"),
            ):  # fmt: skip
                url = f"{server.origin}/{endpoint}?filename={name}{extra}"
                response = session.request(method, url, data=b"harmless" if method == "POST" else None, timeout=20)
                statuses.add((endpoint, response.status_code))
                assert SECRET not in response.content
                assert response.status_code < 500
                assert response.status_code != 200 or endpoint != "info" or response.json()["size"] == 8
            session.post(f"{server.origin}/resize?filename=/swapped-folder/new{number}/file&size=1", timeout=20)
    session.close()
    assert state_of(jail / "outside") == before
    assert os.listdir(jail / "outside") == ["secret"]
    assert {("info", 200), ("blocks", 200), ("resize", 200), ("info", 404)} <= statuses


@pytest.mark.parametrize("walks", [False, True])
def test_swapped_links_leak_nothing_without_openat2_either(jail, walks):
    """The walk that replaces openat2(2) where there is none keeps the same promise."""
    root = Root(str(jail / "root"))
    root.walks = root.walks or walks
    outcomes = set()
    try:
        with swapping(jail):
            for number in range(3000):
                name = NAMES[number % len(NAMES)]
                try:
                    with LocalFile(name, write=True, namespace=root) as file:
                        assert file.info().size == 8
                    LocalReplica("/swapped-folder/secret", root).resize(8)
                    outcomes.add("opened")
                except FileError:
                    outcomes.add("refused")
    finally:
        os.close(root.fd)
    assert outcomes == {"opened", "refused"}
    assert state_of(jail / "outside") == {str(jail / "outside" / "secret"): SECRET}


def list_lines(server, name: str, depth: int = 100) -> list[bytes]:
    """The lines of a list, without size and time."""
    response = ask(server, "GET", "list", name, depth=depth)
    assert response.status_code == 200, response.text
    *lines, end = response.content.splitlines()
    assert end == b"done"
    return [b" ".join(line.split(b"\t")[::3]) for line in lines if not line.startswith(b"=")]


def test_no_list_leads_out_of_the_root(launch, jail):
    """It tells what is inside, and of that what a link leads to only if that is inside, too."""
    server = launch("--root", str(jail / "root"))
    inside = [b"folder ", b"link absolute", b"file file", b"folder folder", b"link folder/deep", b"file folder/file"]
    inside += [b"link proc", b"link relative", b"link to-secret", b"link within"]
    for name in ("/", "/..", "/../..", "//", "/folder/.."):
        assert list_lines(server, name) == inside
    names = [name for way in ways_out(jail / "outside") for name in (way, os.path.dirname(way))]
    for name in set(names) - {"/", "/folder"}:
        if name.startswith("/proc"):  # which leads to itself inside
            assert ask(server, "GET", "list", name).status_code == 403
        else:
            assert list_lines(server, name) == [b"missing "]
    assert list_lines(server, "/within") == [b"file "]


@pytest.mark.parametrize("walks", [False, True])
def test_swapped_links_lead_no_list_outside(jail, walks):
    """Somebody swaps a folder for a link while it is listed: with and without openat2, what is outside isn't told."""
    root = Root(str(jail / "root"))
    root.walks = root.walks or walks
    (jail / "outside" / "another secret").mkdir()
    outcomes = set()
    try:
        with swapping(jail):
            for name, path in [("/", "swapped-folder"), ("/swapped-folder", "")] * 1000:
                entries = {entry.name: entry for entry in LocalReplica(name, root).entries(100)}
                outcomes.add((name, entries[path].kind))
                for told in entries.values():
                    assert "another" not in told.name
                    assert told.size in (0, len(b"harmless"))
    finally:
        os.close(root.fd)
    assert outcomes == {
        ("/", Kind.FOLDER), ("/", Kind.LINK), ("/swapped-folder", Kind.FOLDER), ("/swapped-folder", Kind.MISSING)
    }  # fmt: skip


# Tokens {{{1


@pytest.fixture
def token_file(tmp_path):
    """A file that holds the token, and that nobody else can read."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


def test_token_is_asked_for_before_anything_else(launch, token_file):
    """Without the token each request gets the same answer, whatever it's about."""
    at_once = "from pdiffcopy.server import admission; admission.LONGEST_DELAY = 0"
    server = launch("--token-file", str(token_file), setup=at_once)
    targets = [(method, f"{endpoint}{query}") for method, endpoint in ENDPOINTS for query in (
        "", "?filename=/etc/hostname", "?filename=relative", "?filename=%00", "?offset=-1&offset=2"
    )]  # fmt: skip
    targets += [("GET", "list"), ("GET", "list?filename=/&depth=9")]
    targets += [("GET", ""), ("GET", "unknown"), ("POST", "info"), ("DELETE", "blocks"), ("OPTIONS", "blocks")]
    answers = set()
    for authorization in (None, "", "Bearer", f"Basic {TOKEN}", "Bearer wrong", f"Bearer {TOKEN}x", "Bearer \xff\xfe"):
        for method, target in targets:
            headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
            response = requests.request(method, f"{server.origin}/{target}", headers=headers, timeout=20)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            answers.add((response.status_code, response.content))
    assert [status for status, _ in answers] == [401]


def test_token_opens_the_server_and_stays_secret(launch, token_file, tmp_path):
    """With the token a run succeeds; it's in no log, no error and no list of processes, however verbose."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(make_data(100_000))
    server = launch("--token-file", str(token_file), "-vv")
    environments = ([], {"PDIFFCOPY_TOKEN": TOKEN}), (["--token-file", str(token_file)], {})
    for options, environment in environments:
        result = run_pdiffcopy("-vv", *options, server.location(source), target, env=environment)
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stderr + result.stdout
    for token in ("", "wrong-token"):
        result = run_pdiffcopy("-vv", server.location(source), target, env={"PDIFFCOPY_TOKEN": token} if token else {})
        assert result.returncode == 1
        assert "token" in result.stderr
        assert "wrong-token" not in result.stderr
    for pid in [server.process.pid, *children_of(server.process.pid)]:
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert TOKEN not in server.log.read_text()


@pytest.mark.parametrize("problem, words", [
    ("missing", "No such file"), ("empty", "empty"), ("blank", "empty"), ("public", "Others can read"),
    ("group", "Others can read"), ("lines", "one line"), ("folder", "directory"),
])  # fmt: skip
@pytest.mark.parametrize("side", ["client", "server"])
def test_unsafe_token_files_are_refused(token_file, problem, words, side):
    """A token file that's missing, empty or open to others is an error, never a reason to go on without."""
    changes = {
        "missing": token_file.unlink,
        "empty": lambda: token_file.write_text(""),
        "blank": lambda: token_file.write_text(" \n"),
        "public": lambda: token_file.chmod(0o644),
        "group": lambda: token_file.chmod(0o640),
        "lines": lambda: token_file.write_text("two\nlines"),
        "folder": lambda: (token_file.unlink(), token_file.mkdir(0o700)),
    }
    changes[problem]()
    arguments = ["127.0.0.1:1/a", "/nowhere/b"] if side == "client" else ["-l", "127.0.0.1:1"]
    result = run_pdiffcopy("--token-file", token_file, *arguments)
    assert result.returncode == 1
    assert words in check_error(1, result.stderr)


def test_empty_token_variable_is_refused():
    """$PDIFFCOPY_TOKEN that is set to nothing doesn't open the server."""
    result = run_pdiffcopy("-l", "127.0.0.1:1", env={"PDIFFCOPY_TOKEN": ""})
    assert result.returncode == 1
    assert "empty" in check_error(1, result.stderr)


@pytest.mark.parametrize("role", ["source", "target"])
def test_redirects_are_not_followed(tmp_path, role):
    """A server that points elsewhere is refused, and the token doesn't travel there."""
    local = tmp_path / "local"
    local.write_bytes(b"local")
    with HostileProcess("all-honest") as elsewhere, HostileProcess("all-redirect", elsewhere=elsewhere.port) as server:
        locations = [server.location, local] if role == "source" else [local, server.location]
        result = run_pdiffcopy(*locations, env={"PDIFFCOPY_TOKEN": TOKEN})
        assert result.returncode == 1
        check_error(1, result.stderr)
        assert any(f"Bearer {TOKEN}" in line for line in server.stop())
        assert elsewhere.stop() == []


# https {{{1


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_https_with_an_authority_of_ones_own(launch, authority, tmp_path, direction):
    """--certfile and --keyfile on one side, https:// and --ca-file on the other."""
    server = serve_https(launch, authority)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(make_data(3 * MEBIBYTE))
    target.write_bytes(make_data(3 * MEBIBYTE)[:MEBIBYTE])
    locations = [source, f"{server.origin}{target}"]
    if direction == "download":
        locations = [f"{server.origin}{source}", target]
    result = run_pdiffcopy("--ca-file", authority / "ca.pem", *locations)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("certificate, ca_file, words", [
    ("server", "other-ca.pem", "certificate verify failed|unable to get local issuer|self.signed"),
    ("server", None, "certificate verify failed|unable to get local issuer|self.signed"),
    ("stranger", "ca.pem", "not valid for '127.0.0.1'. .call it by that of its certificate"),
])  # fmt: skip
def test_wrong_certificates_are_refused(launch, authority, tmp_path, certificate, ca_file, words):
    """An unknown authority and another host's certificate are refused at once, in one line."""
    server = serve_https(launch, authority, certificate)
    options = ["--ca-file", authority / ca_file] if ca_file else []
    result = run_pdiffcopy(*options, f"{server.origin}/etc/hostname", tmp_path / "target")
    assert result.returncode == 1
    assert re.search(words, check_error(1, result.stderr))
    assert "trying again" not in result.stderr
    assert not (tmp_path / "target").exists()


def test_wrong_scheme_is_named_with_the_right_url(launch, server, authority, tmp_path):
    """At once, and not as a broken connection or a certificate."""
    (tmp_path / "file").write_bytes(b"x")
    secure = serve_https(launch, authority)
    for scheme, right, port in (("http", "https", secure.port), ("https", "http", server.port)):
        result = run_pdiffcopy(f"{scheme}://127.0.0.1:{port}{tmp_path}/file", tmp_path / "target")
        assert result.returncode == 1
        assert f"use {right}://127.0.0.1:{port}{tmp_path}/file" in error_lines(result)[0]
    assert not (tmp_path / "target").exists()


def test_missing_authority_is_an_error(launch, authority, tmp_path):
    """A --ca-file that isn't there is an error in one line, not a reason to trust everybody."""
    server = serve_https(launch, authority)
    result = run_pdiffcopy("--ca-file", tmp_path / "nothing", f"{server.origin}/etc/hostname", tmp_path / "target")
    assert result.returncode == 1
    assert "nothing" in check_error(1, result.stderr)


def test_old_tls_is_refused(launch, authority):
    """TLS 1.1 gets no connection, TLS 1.2 does."""
    server = serve_https(launch, authority)

    def connect(version: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = version
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped:
                return wrapped.version()

    assert connect(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(ssl.TLSVersion.TLSv1_1)


@pytest.mark.parametrize("options", [
    ["--certfile", "server.pem"], ["--keyfile", "server.key"],
    ["--certfile", "server.pem", "--keyfile", "stranger.key"], ["--certfile", "nothing", "--keyfile", "server.key"],
    ["--certfile", "ca.pem", "--keyfile", "ca.pem"],
])  # fmt: skip
def test_half_a_configuration_does_not_start(authority, options):
    """A certificate without its key (or the other way round) is an error, not plain http."""
    options = [option if option.startswith("--") else str(authority / option) for option in options]
    result = run_pdiffcopy("-l", "127.0.0.1:1", *options)
    assert result.returncode == 1
    assert "certificate" in check_error(1, result.stderr) or "--keyfile" in result.stderr


# Warnings {{{1


@pytest.mark.parametrize("host, token, warned", [
    ("", "", True), ("0.0.0.0", "", True), ("192.0.2.7", "", True), ("::", "", True), ("example.org", "", True),
    ("127.0.0.1", "", False), ("::1", "", False), ("localhost", "", False), ("0.0.0.0", TOKEN, False),
])  # fmt: skip
def test_open_server_is_warned_of(host, token, warned):
    """A server that strangers reach without a token says so, and names the options that close it."""
    warning = describe_exposure(host, token, "", False)
    assert bool(warning) == warned
    assert not warned or all(option in warning for option in ("--token-file", "--root", "--read-only"))


@pytest.mark.parametrize("settings, advice", [
    (("", False), "Use --token-file, --root and --read-only to close it."),
    (("/srv", False), "Use --token-file and --read-only to close it."),
    (("", True), "Use --token-file and --root to close it."),
    (("/srv", True), "Use --token-file to close it."),
])  # fmt: skip
def test_warning_names_what_is_missing(settings, advice):
    """Nobody is told to use an option that is in use."""
    assert describe_exposure("", "", *settings).endswith(advice)


# Web pages {{{1


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Host": "evil.example"}, {"Host": "evil.example:8080"},
])  # fmt: skip
def test_web_pages_are_not_clients(server, tmp_path, headers):
    """A page in a browser on the same machine can neither write nor read, by whatever name it calls the server."""
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    for method, endpoint in ENDPOINTS:
        data = b"evil" if (method, endpoint) == ("POST", "blocks") else None
        url = f"{server.origin}/{endpoint}?filename={file}&block_size=4096&method=sha1&offset=0&size=4"
        response = requests.request(method, url, data=data, headers=headers, timeout=20)
        assert response.status_code == 403
        assert response.headers["Content-Type"] == "application/problem+json"
        assert not any(name.startswith("Access-Control") for name in response.headers)
        assert b"prec" not in response.content
    preflight = requests.options(url, headers={"Origin": "http://evil.example"}, timeout=20)
    assert preflight.status_code == 403
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize("options, hosts, others", [
    (["--allow-host=files.lan,db2", "--allow-host=db3"], ["files.lan", "db2:80", "DB3."], ["db4", "lan"]),
    (["--allow-host=*"], ["anything.example"], []),
    ([], ["127.0.0.1", "[::1]:1", "localhost", socket.gethostname()], ["files.lan"]),
])  # fmt: skip
def test_host_may_be_allowed(launch, options, hosts, others):
    """--allow-host takes several names, by repetition or with commas. What refuses a name says how to allow it."""
    server = launch(*options)
    for host in hosts:
        assert requests.get(f"{server.origin}/info?filename=/x", headers={"Host": host}, timeout=20).status_code == 404
    for host in others:
        response = requests.get(f"{server.origin}/info?filename=/x", headers={"Host": host}, timeout=20)
        assert response.status_code == 403
        assert host in response.json()["detail"] and "--allow-host" in response.json()["detail"]


def test_name_that_was_listened_on_is_allowed(monkeypatch):
    """A server that listens on a name may be called by it, too."""
    from pdiffcopy.server import daemon

    gates = []

    def make_daemon(*arguments):
        gates.append(arguments[-1])
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(daemon, "Daemon", make_daemon)
    for address in ("files.lan:8080", "8080"):
        start_server(address, settings=Settings())
    assert [gate.is_ours("files.lan:8080") for gate in gates] == [True, False]


@pytest.mark.parametrize("value", ["", "db2:8080", "http://db2", "a b", "db2,", "**"])
def test_impossible_hosts_are_refused(value):
    """What can't be the name of a host is an error, not a name that nobody ever uses."""
    result = run_pdiffcopy("-l", "127.0.0.1:1", f"--allow-host={value}")
    assert result.returncode == 1
    assert "--allow-host" in check_error(1, result.stderr)


@pytest.mark.parametrize(
    "headers",
    [{"SCRIPT_NAME": "/info"}, {"PATH_INFO": "/hashes"}, {"X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"}],
    ids="".join,
)
def test_headers_of_proxies_are_ignored(launch, token_file, tmp_path, headers):
    """They could change what a request is about, after somebody has looked at it."""
    server = launch("--token-file", str(token_file))
    url, words = f"{server.origin}/info", {"filename": tmp_path / "x"}
    answer = requests.get(url, words, headers={"Authorization": f"Bearer {TOKEN}", **headers}, timeout=20)
    assert answer.status_code == 404 and f"No such file: {tmp_path}/x" in answer.json()["detail"]
    assert requests.get(url, words, headers={"Authorization": "Bearer wrong", **headers}, timeout=20).status_code == 401


# Guessing {{{1


def test_wrong_tokens_take_longer_and_longer(launch, token_file):
    """Guesses wait, and are in the log; clients with the token are served at once, though it's the same address."""
    slowly = "from pdiffcopy.server import admission; admission.FIRST_DELAY = 0.5"
    server = launch("--token-file", str(token_file), "-c", "1", setup=slowly)
    url = f"{server.origin}/info?filename=/x"

    def ask_with(token: str) -> tuple[int, float]:
        started = time.monotonic()
        status = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60).status_code
        return status, time.monotonic() - started

    outcomes = [ask_with("wrong-token") for _ in range(5)]
    assert [status for status, _ in outcomes] == [401] * 5
    assert outcomes[3][1] >= 0.5 and outcomes[4][1] >= 1
    head = b"GET /info?filename=/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong-token\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            sock.sendall(head)
        status, _ = ask_with(TOKEN)
        assert status == 404
        assert not select.select([sock], [], [], 0)[0]  # the last one of them still waits
    wait_for(lambda: server.log.read_text().count("A wrong token from 127.0.0.1") == 25, what="the log")
    assert "wrong-token" not in server.log.read_text()


@pytest.mark.parametrize(
    "location, warned",
    [("http://example.org/x", True), ("https://example.org/x", False), ("127.0.0.1:9/x", False), ("/x", False)],
)
def test_token_over_plain_http_is_warned_of(caplog, location, warned):
    """A token that others could read on its way to another machine is a warning; on this machine it's none."""
    warn_of_eavesdroppers([parse_location(location), parse_location("/nowhere/x")], TOKEN)
    assert ("use https" in caplog.text) == warned
    assert TOKEN not in caplog.text


# What kinds of files, and writing {{{1


def test_read_only_refuses_every_write(launch, tmp_path):
    """--read-only: each write is 403 before anything is touched, or even looked at."""
    server = launch("--read-only")
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    status = file.stat()
    for method, endpoint in WRITES:
        for name in (str(file), f"{tmp_path}/new/file", "relative", "%00"):
            assert ask(server, method, endpoint, name).status_code == 403
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (b"precious", status.st_mtime_ns)
    assert os.listdir(tmp_path) == ["file"]
    result = run_pdiffcopy(__file__, server.location(tmp_path / "new"))
    assert result.returncode == 1
    assert "read-only" in check_error(1, result.stderr)
    assert ask(server, "GET", "blocks", str(file), size=8).content == b"precious"


def test_special_files_are_refused_promptly(launch, tmp_path):
    """A FIFO, a terminal, a socket, a folder or a character device neither blocks a request nor is it opened."""
    server = launch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    master, slave = pty.openpty()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        names = [tmp_path / "fifo", tmp_path / "link", tmp_path / "socket", tmp_path, os.ttyname(slave), "/dev/zero"]
        for name in names:
            for method, endpoint in ENDPOINTS:
                assert ask(server, method, endpoint, str(name)).status_code == 403, (name, endpoint)
    os.close(slave)
    os.close(master)


@pytest.fixture
def device(tmp_path):
    """A block device of 8 MiB."""
    (tmp_path / "backing").write_bytes(make_data(8 * MEBIBYTE))
    with loop_device(tmp_path / "backing") as name:
        yield name


def test_block_devices_need_an_option(launch, server, device, tmp_path):
    """A block device is refused, and with --devices (the shared server has it) it's read and written."""
    source = tmp_path / "source"
    source.write_bytes(make_data(8 * MEBIBYTE, seed=2))
    closed = launch()
    for method, endpoint in ENDPOINTS:
        response = ask(closed, method, endpoint, device)
        assert response.status_code == 403
        assert "--devices" in response.text
    result = run_pdiffcopy(source, server.location(device))
    assert result.returncode == 0, result.stderr
    result = run_pdiffcopy(server.location(device), tmp_path / "copy")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_device_in_use_is_not_written_to(server, tmp_path):
    """Neither here nor there: what is mounted would be destroyed under the hands of the kernel."""
    source = tmp_path / "source"
    source.write_bytes(make_data(8 * MEBIBYTE))
    with ext4(tmp_path / "image", tmp_path / "disk", size=16 * MEBIBYTE) as disk:
        (disk / "file").write_bytes(b"precious")
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        device = next(line[0] for line in mounts if line[1] == str(disk))
        for place in (device, server.location(device)):
            for options in ((), ("-W",)):
                result = run_pdiffcopy(*options, source, place)
                assert result.returncode == 1
                assert "it is mounted, or another program uses it" in error_lines(result)[0]
        assert (disk / "file").read_bytes() == b"precious"
    with ext4(tmp_path / "image", tmp_path / "disk"):
        assert (disk / "file").read_bytes() == b"precious"


def test_device_in_use_is_not_written_to_by_others_either(server, tmp_path):
    """A client of version 1.0.1 claims nothing, and curl says nothing of a run."""
    with ext4(tmp_path / "image", tmp_path / "disk", size=16 * MEBIBYTE) as disk:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        device = next(line[0] for line in mounts if line[1] == str(disk))
        before = (tmp_path / "image").read_bytes()
        for endpoint in ("blocks", "resize"):
            response = ask(server, "POST", endpoint, device, offset=0, size=4096)
            assert response.status_code == 403
            assert "it is mounted, or another program uses it" in response.text
        with pytest.raises(FileError, match="mounted"):
            write_block(device, 0, b"x")
        assert (tmp_path / "image").read_bytes() == before


def test_free_device_is_written_to_by_many_at_once(server, device):
    """None of them takes the others for somebody who uses it."""

    def write(i: int) -> requests.Response:
        params = {"filename": device, "offset": 4096 * i}
        return requests.post(f"{server.origin}/blocks", params=params, data=bytes([i]) * 4096, timeout=20)

    with ThreadPoolExecutor(8) as executor:
        assert [response.status_code for response in executor.map(write, range(64))] == [200] * 64
    assert read_block(device, 0, 64 * 4096) == b"".join(bytes([i]) * 4096 for i in range(64))


def test_two_nodes_of_a_device_are_one_device(server, device, tmp_path):
    """It's the number of the device that counts, not where its node is."""
    os.mknod(tmp_path / "node", stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
    for places in ((device, tmp_path / "node"), (server.location(device), tmp_path / "node")):
        result = run_pdiffcopy("-W", *places)
        assert result.returncode == 1
        assert "the same file" in error_lines(result)[0]


@pytest.mark.parametrize("name", ["/proc/self/mem", "/proc/version", "/sys/kernel/notes", "/proc/self/maps"])
def test_parts_of_the_kernel_are_no_files(server, tmp_path, name):
    """They look like files, and to write to one changes the machine or the memory of a process."""
    for verb, endpoint in ENDPOINTS:
        response = ask(server, verb, endpoint, name)
        assert response.status_code == 403
        assert "part of the kernel" in response.text
    for places in ((name, tmp_path / "target"), (__file__, name)):
        result = run_pdiffcopy(*places)
        assert result.returncode == 1
        assert "part of the kernel" in error_lines(result)[0]
    assert not (tmp_path / "target").exists()


def test_nothing_is_created_among_parts_of_the_kernel(launch, tmp_path):
    """A folder there may be a control group, and a missing file has no folder yet that could be asked what it is."""
    with mounted(tmp_path / "kernel", "bpf") as folder:
        server, name = launch(), folder / "x" / "y"
        for endpoint, parameters in (("resize", {"size": 1}), ("claim", {"run": "ab", "create": 1})):
            response = ask(server, "POST", endpoint, name, **parameters)
            assert response.status_code == 403, response.text
            assert "part of the kernel" in response.text
        result = run_pdiffcopy(__file__, name)
        assert result.returncode == 1
        assert "part of the kernel" in error_lines(result)[0]
        assert not (folder / "x").exists()
        server.stop()


# Hostile servers {{{1

HARMLESS = ("all-honest", "blocks-more-than-announced", "hashes-endless", "info-garbage-members")
"""These don't keep a careful client from getting the right file."""
LISTS = {name for name in BEHAVIOURS if name.startswith("list-")}
ELSEWHERE = {"all-redirect", "all-silence", "hashes-stall", "all-endless-continue", *LISTS}
"""These have tests of their own."""
ONLY_AS_TARGET = ("write-", "resize-", "sync-")
CLIENT_MEMORY = 160 * MEBIBYTE
"""An undisturbed run takes about a third of this."""


def run_measured(*arguments, **environment) -> tuple[int, str, int]:
    """Run a client: its exit code, what it wrote to stderr, and the most memory that one of its processes had."""
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "pdiffcopy", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env={**os.environ, **environment}, start_new_session=True) as process:
        killer = Timer(30, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        stdout, stderr = process.communicate()
        killer.cancel()
    returncode, memory = map(int, stdout.split())
    return returncode, stderr.decode("utf-8", "replace"), memory * 1024


MEASURE = """
import resource, subprocess, sys
process = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(process.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a command and prints its exit code and memory. (Memory counts from the fork on, and a test run has a lot.)"""


@pytest.mark.parametrize("behaviour", sorted(BEHAVIOURS.keys() - ELSEWHERE - set(HARMLESS)))
def test_hostile_servers_get_nowhere(tmp_path, behaviour):
    """
    Whatever a server answers: one line, a bounded amount of memory, and nothing outside the target's range.

    Nothing that it says reaches the terminal as it is.
    """
    size = 65536
    as_target = behaviour.startswith(ONLY_AS_TARGET)
    local = tmp_path / "local"
    local.write_bytes(b"x" * size)
    options = ["-b", "4096", "-c", "2", "--timeout", "1", "--retries", "1", *(["--fsync"] if as_target else [])]
    with HostileProcess(behaviour, size) as server:
        locations = [local, server.location] if as_target else [server.location, local]
        returncode, stderr, memory = run_measured(*options, *locations)
    assert returncode in (1, 3, 4), stderr
    assert memory < CLIENT_MEMORY
    assert local.stat().st_size <= size or behaviour == "info-size-impossible"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ufffd]", stderr), repr(stderr)
    lines = [line for line in stderr.splitlines() if line.startswith("pdiffcopy: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    assert len(lines[0]) < 2000
    assert os.listdir(tmp_path) == ["local"]


@pytest.mark.parametrize("behaviour", sorted(LISTS))
def test_hostile_lists_get_nowhere(behaviour):
    """Whatever a server says of a folder: memory stays bounded, and no name leads out of it."""
    with HostileProcess(behaviour) as server, Servers(Network(timeout=5, retries=1)) as servers, ExitStack() as stack:
        entries = stack.enter_context(closing(servers.open(parse_location(server.location)).entries(5)))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        if behaviour == "list-endless":
            assert sum(entry.kind is Kind.FILE for entry in islice(entries, 20_001)) == 20_000
        else:
            with pytest.raises(ProtocolError) as info:
                list(entries)
            assert str(info.value).startswith("http://127.0.0.1:") and str(info.value).isprintable()
        assert tracemalloc.get_traced_memory()[1] < 32 * MEBIBYTE


def test_interim_responses_come_to_an_end(tmp_path):
    """A server that says 100 Continue for ever is an error."""
    with HostileProcess("all-endless-continue") as server:
        options = ["--timeout", "1", "--retries", "0"]
        returncode, _, _ = run_measured(*options, server.location, tmp_path / "target")
    assert returncode == 1


@pytest.mark.parametrize("behaviour", HARMLESS)
def test_superfluous_bytes_are_not_believed(tmp_path, behaviour):
    """What a server sends beyond what was asked for doesn't get into the target."""
    local = tmp_path / "local"
    local.write_bytes(b"x" * 65536)
    with HostileProcess(behaviour) as server:
        returncode, stderr, memory = run_measured(
            "-b", "4096", "--timeout", "2", "--retries", "1", server.location, local
        )
    assert memory < CLIENT_MEMORY
    assert returncode or local.read_bytes() == bytes(65536), stderr


# Load {{{1


def test_many_clients_at_once(launch, tmp_path):
    """64 clients at once on one server all succeed."""
    server = launch("-c", "2")
    source = tmp_path / "source"
    source.write_bytes(make_data(200_000))
    targets = [tmp_path / f"target-{number}" for number in range(64)]
    command = [sys.executable, "-m", "pdiffcopy", "-q", "-c", "1", "-b", "65536"]
    processes = [
        subprocess.Popen(
            [*command, *([server.location(source), target] if number % 2 else [source, server.location(target)])],
            stderr=subprocess.PIPE, text=True,
        )
        for number, target in enumerate(targets)
    ]  # fmt: skip
    failures = [stderr for process in processes if (stderr := process.communicate()[1]) or process.returncode]
    assert not failures
    assert all(target.read_bytes() == source.read_bytes() for target in targets)


@pytest.fixture
def many_descriptors():
    """Room for some thousand connections in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_do_not_stop_a_client(launch, tmp_path, many_descriptors):
    """500 idle connections, 500 with half a header and 100 with half a body: a real client doesn't wait for them."""
    patient = "from pdiffcopy.server import visitors as r; r.STALL_TIMEOUT = r.HEAD_TIMEOUT = 60"
    server = launch("-c", "2", setup=patient)
    file, other = tmp_path / "file", tmp_path / "other"
    for path in (file, other):
        path.write_bytes(bytes(1000))
    # What has arrived is written, when a thread comes to it: that would be a change of what is copied.
    body = f"POST /blocks?filename={other}&offset=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf"
    openings = [b""] * 500 + [b"GET /info?filename=/ HTTP/1.1\r\nHo"] * 500 + [body.encode()] * 100
    with ExitStack() as stack:
        for opening in openings:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            sock.sendall(opening)
        for _ in range(5):
            assert requests.get(f"{server.origin}/info?filename={file}", timeout=20).json()["size"] == 1000
        result = run_pdiffcopy(server.location(file), tmp_path / "copy")
    assert result.returncode == 0, result.stderr


def cpu_time(server) -> int:
    """The processor time that a server has used, in clock ticks."""
    total = 0
    for pid in children_of(server.process.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


def wait_for_rest(server) -> None:
    """Wait until a server has closed all connections, and does nothing any more."""
    (worker,) = children_of(server.process.pid)

    def rests() -> bool:
        before = cpu_time(server)
        time.sleep(0.5)
        return cpu_time(server) <= before + 1

    # One socket is the one that it listens on.
    wait_for(lambda: sum(link.startswith("socket:") for link in read_links(worker)) == 1, what="the last connection")
    wait_for(rests, what="the end of the work")


def test_client_that_leaves_costs_no_more_work(launch, tmp_path):
    """A client that asks for the hashes of a huge file and goes away isn't worked for any longer."""
    server = launch("-c", "1")
    with (tmp_path / "huge").open("wb") as handle:
        handle.truncate(2000 * 1024**3)
    query = f"filename={tmp_path / 'huge'}&block_size=65536&method=sha256&concurrency=2"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(f"GET /hashes?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        before = cpu_time(server)
        wait_for(lambda: cpu_time(server) > before + 5, what="work")
    wait_for_rest(server)


@pytest.mark.parametrize("verb, endpoint, parameters", [
    ("GET", "hashes", "block_size=1073741824&method=sha512&concurrency=2"),
    ("GET", "blocks", "offset=0&size=1073741824&digest=1&data=0"),
    ("GET", "blocks", "offset=0&size=1073741824&digest=1"),
    ("HEAD", "blocks", "offset=0&size=1073741824&digest=1"),
    ("HEAD", "hashes", "block_size=1048576&method=sha512&concurrency=2"),
])  # fmt: skip
def test_clients_that_leave_take_their_work_along(launch, tmp_path, verb, endpoint, parameters):
    """At once, also what was begun, and though nothing was sent yet. A HEAD is no work at all."""
    server = launch("-c", "1")
    with (tmp_path / "huge").open("wb") as handle:
        handle.truncate(8 * 1024**3)
    assert ask(server, "GET", "hashes", __file__, block_size=1000, method="sha512").ok  # all is imported
    before = cpu_time(server)
    head = f"{verb} /{endpoint}?filename={tmp_path / 'huge'}&{parameters} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            sock.sendall(head.encode())
            if verb == "HEAD":
                assert sock.recv(17) == b"HTTP/1.1 200 OK\r\n"
    assert ask(server, "GET", "info", __file__).ok  # so the others, which came before, were let in
    wait_for_rest(server)
    # One of these requests would be half a second of work, or two.
    assert cpu_time(server) - before < 1.5 * os.sysconf("SC_CLK_TCK")


def test_slow_readers_share_the_memory(launch, tmp_path):
    """Many streams of hashes of tiny blocks that nobody reads cost as much as a few."""
    server = launch("-c", "1")
    with (tmp_path / "file").open("wb") as handle:
        handle.truncate(100_000_000)
    (worker,) = children_of(server.process.pid)
    query = f"filename={tmp_path / 'file'}&block_size=1&method=sha512&concurrency=2"
    with ExitStack() as stack:
        for _ in range(150):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(f"GET /hashes?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        rests = 0.0
        while rests < 1:
            before = cpu_time(server)
            time.sleep(0.25)
            rests = rests + 0.25 if cpu_time(server) <= before + 1 else 0
        status = Path(f"/proc/{worker}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 250_000


def test_lists_that_nobody_reads_are_cheap(launch, tmp_path):
    """Each takes two MiB at most, however much there is to tell, and nothing stays open when its reader leaves."""
    server, count = launch("-c", "1"), 50
    for number in range(8000):
        (tmp_path / f"{number:04}{'é' * 125}").touch()
    assert len(list_lines(server, str(tmp_path))) == 8001
    before = peak_memory(server)
    (worker,) = children_of(server.process.pid)

    def count_open() -> int:
        return read_links(worker).count(str(tmp_path))

    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(f"GET /list?filename={tmp_path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_for(lambda: count_open() == count, 60, "the lists")
        assert peak_memory(server) - before < 2 * count * MEBIBYTE
    wait_for(lambda: count_open() == 0, what="the end of the lists")


@pytest.mark.parametrize("method, endpoint, parameters", [
    ("GET", "hashes", {"block_size": 2**40}), ("GET", "hashes", {"concurrency": 10**6}),
    ("GET", "blocks", {"size": 2**40}), ("GET", "blocks", {"offset": 10**30}), ("POST", "resize", {"size": 10**30}),
    ("GET", "blocks", {"extents": ",".join(f"{n}:1" for n in range(1000))}),
    ("POST", "blocks", {"offset": 2**63 - 2}), ("POST", "resize", {"size": 2**63 - 1}),
])  # fmt: skip
def test_wishes_are_bounded(server, tmp_path, method, endpoint, parameters):
    """What a client may ask for is limited by the server."""
    file = tmp_path / "file"
    file.write_bytes(b"data")
    response = ask(server, method, endpoint, str(file), **parameters)
    assert 400 <= response.status_code < 500 or response.status_code == 507
    assert response.headers["Content-Type"] == "application/problem+json"
    assert file.read_bytes() == b"data"


@pytest.mark.parametrize("header, status", [
    ("Content-Length: 99999999999999", 413), ("Content-Length: 1073741825", 413), ("Transfer-Encoding: chunked", 411),
    ("X: y", 411), ("Content-Length: -1", 400), ("Content-Length: four", 400), ("Content-Length: 4, 5", 400),
    ("Content-Length: 4\r\nContent-Length: 5", 400),
])  # fmt: skip
def test_bodies_need_an_exact_and_limited_length(server, tmp_path, header, status):
    """A body says how long it is, and isn't longer than the limit."""
    file = tmp_path / "file"
    file.write_bytes(b"data")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        head = f"POST /blocks?filename={file}&offset=0 HTTP/1.1\r\nHost: localhost\r\n{header}"
        sock.sendall(f"{head}\r\n\r\n4\r\nevil\r\n".encode())
        assert sock.recv(65536).split()[1] == str(status).encode()
    assert file.read_bytes() == b"data"


def peak_memory(server) -> int:
    """The most memory that a process of a server ever had, in bytes."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in children_of(server.process.pid)]
    return max(int(re.search(r"VmHWM:\s*(\d+)", text)[1]) for text in texts) * 1024


def test_memory_of_the_server_stays_flat(launch, tmp_path):
    """Blocks of 1 GiB are hashed, sent and received by many at a time without being held in memory."""
    server = launch("-c", "1")
    file = tmp_path / "file"
    with file.open("wb") as handle:
        handle.truncate(2**30)
    assert ask(server, "GET", "info", str(file)).status_code == 200
    before = peak_memory(server)

    def talk(opening: str, body: bytes = b"") -> None:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            sock.sendall(opening.encode() + body)
            sock.recv(65536)

    name = quote(str(file))
    end = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    extents = f"0:{2**29},{2**29}:{2**29}"
    openings = [
        (f"GET /blocks?filename={name}&offset=0&size={2**30} {end}\r\n", b""),
        (f"GET /blocks?filename={name}&extents={extents} {end}\r\n", b""),
        (f"GET /hashes?filename={name}&block_size={2**30}&method=xxh128&concurrency=1024 {end}\r\n", b""),
        (f"POST /blocks?filename={name}&offset=0 {end}Content-Length: {24 * MEBIBYTE}\r\n\r\n", bytes(24 * MEBIBYTE)),
    ]
    threads = [Thread(target=talk, args=opening) for opening in openings for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peak_memory(server) < before + 80 * MEBIBYTE


def test_what_clients_send_is_escaped_in_the_log(launch, tmp_path):
    """A name or a header can't forge lines of the log, or move the cursor of who reads it."""
    server = launch("-vv")
    evil = "%0a2026-01-01 00:00:00 forged%1b[2J%c2%9b31m"
    for method, endpoint in ENDPOINTS:
        ask(server, method, endpoint, f"/{evil}")
        ask(server, method, endpoint, f"{tmp_path}/{evil}", method=evil)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(b"GET /\x1b[2J HTTP/1.1\r\nHost: localhost\r\nX\x1b: \x1b[2J\r\n\r\n")
        sock.recv(65536)
    log = server.log.read_text("utf-8", errors="replace")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]", log)
    assert not re.search(r"(?m)^2026-01-01", log)
