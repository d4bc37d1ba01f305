"""The access log: who asked for what, and nothing else."""

from __future__ import annotations

import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import requests

from pdiffcopy.exceptions import FileError
from pdiffcopy.server import accesslog
from pdiffcopy.server.accesslog import open_access_log
from tests.support import error_lines, exchange, find_free_port, run_pdiffcopy, wait_for, write_pattern

TOKEN = "correct-horse-battery-staple"
VALUE = r'([A-Za-z0-9/.:_%-]+|"(?:[^"\\]|\\.)*")'
LINE = re.compile(
    rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{{4}} address=(?P<address>{VALUE}) method=(?P<method>{VALUE}) "
    rf"endpoint=(?P<endpoint>{VALUE}) file=(?P<file>{VALUE}) bytes=(?P<bytes>\d+) seconds=\d+\.\d{{3}} "
    rf"status=(?P<status>\d{{3}}) run=(?P<run>{VALUE})"
)


def read_log(path, count: int) -> list[dict[str, str]]:
    """The fields of the lines of a log, as soon as there are so many."""
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= count, what=f"{count} lines")
    lines = path.read_text().splitlines()
    assert len(lines) == count, lines
    return [LINE.fullmatch(line).groupdict() for line in lines]


@pytest.fixture
def path(tmp_path):
    """A file with known contents."""
    write_pattern(tmp_path / "file", 100_000)
    return tmp_path / "file"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_each_request_is_a_line(launch, authority, tmp_path, path, scheme):
    """Address, endpoint, name, how many bytes of a body moved in either direction, status and run."""
    options = ["--certfile", str(authority / "server.pem"), "--keyfile", str(authority / "server.key")]
    log = tmp_path / "access.log"
    server = launch(f"--access-log={log}", *(options if scheme == "https" else []), scheme=scheme)
    with requests.Session() as session:
        session.trust_env, session.verify = False, str(authority / "ca.pem")
        query = {"filename": path, "offset": 0}
        session.get(f"{server.origin}/blocks", params={**query, "size": 70_000})
        session.get(f"{server.origin}/blocks", params={"filename": path, "extents": "0:10,50000:20"})
        answer = session.post(f"{server.origin}/blocks", params=query, data=bytes(1000))
        missing = session.get(f"{server.origin}/info", params={"filename": f"{path}x"})
        session.post(f"{server.origin}/claim", params={"run": "a1b2"})
    lines = read_log(log, 5)
    assert {line["address"] for line in lines} == {"127.0.0.1"}
    assert [line["bytes"] for line in lines[:2]] == ["70000", "30"]
    assert lines[2]["bytes"] == str(1000 + len(answer.content))
    assert lines[3]["bytes"] == str(len(missing.content))
    assert [(line["method"], line["endpoint"], line["status"]) for line in lines] == [
        ("GET", "/blocks", "200"), ("GET", "/blocks", "200"), ("POST", "/blocks", "200"),
        ("GET", "/info", "404"), ("POST", "/claim", "400"),
    ]  # fmt: skip
    assert [line["run"] for line in lines] == ["-", "-", "-", "-", "a1b2"]
    assert [line["file"] for line in lines] == [*[f'"{path}"'] * 3, f'"{path}x"', "-"]


def test_whole_run_is_in_the_log(launch, tmp_path, path):
    """Stderr is a place for it, too."""
    server = launch("--access-log=-")
    assert run_pdiffcopy(path, server.location(tmp_path / "target")).returncode == 0
    lines = [match.groupdict() for line in server.log.read_text().splitlines() if (match := LINE.fullmatch(line))]
    assert {"/info", "/claim", "/blocks", "/release"} <= {line["endpoint"] for line in lines}
    assert len({line["run"] for line in lines if line["method"] == "POST"}) == 1
    assert sum(int(line["bytes"]) for line in lines if line["endpoint"] == "/blocks") >= 100_000


def test_no_name_forges_a_line(launch, tmp_path):
    """Line ends, quotes and what a terminal would obey are escaped, in each field; what's too long is cut off."""
    log = tmp_path / "access.log"
    server = launch(f"--access-log={log}")
    evil = "%0a2026-01-01%20forged%22%20status=200%5c%22%1b[2J%c2%9b31m%ff"
    requests.post(f"{server.origin}/resize?filename=/{evil}&run={evil}&size=0&filename=/other")
    read_log(log, 1)  # lines come after the answers, from several processes
    exchange(server.port, f"GET /{evil} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    read_log(log, 2)
    exchange(server.port, b"nonsense\r\n\r\n")
    first, second, third = read_log(log, 3)
    assert first["file"] == r'"/\n2026-01-01 forged\" status=200\\\"\x1b[2J\x9b31m\udcff"'
    assert first["run"].startswith(r'"\n2026') and third["endpoint"] == "-" and third["status"] == "400"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", log.read_text())
    assert second["endpoint"].startswith(r'"/\n2026')


def test_nothing_secret_is_logged(launch, tmp_path, path):
    """Neither a right token nor a wrong one; a wrong one is a warning besides, whether there's an access log or not."""
    log = tmp_path / "access.log"
    server = launch(f"--access-log={log}", "-q", env={"PDIFFCOPY_TOKEN": TOKEN})
    for token in (TOKEN, "wrong-token"):
        requests.get(f"{server.origin}/info", {"filename": path}, headers={"Authorization": f"Bearer {token}"})
    assert sorted(line["status"] for line in read_log(log, 2)) == ["200", "401"]
    text = server.log.read_text() + log.read_text()
    assert TOKEN not in text and "wrong-token" not in text
    assert "A wrong token from 127.0.0.1 (number 1 from there)" in server.log.read_text()


def test_log_may_be_rotated(launch, tmp_path, path):
    """A file that was renamed stays as it is, and a new one is begun."""
    log = tmp_path / "access.log"
    server = launch(f"--access-log={log}")
    requests.get(f"{server.origin}/info", {"filename": path})
    read_log(log, 1)
    log.rename(tmp_path / "access.log.1")
    requests.get(f"{server.origin}/info", {"filename": path})
    read_log(log, 1)
    read_log(tmp_path / "access.log.1", 1)


def test_request_that_breaks_off_is_logged(launch, tmp_path, path):
    """A line tells what moved, not what was announced."""
    log = tmp_path / "access.log"
    server = launch(f"--access-log={log}")
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        head = f"POST /blocks?filename={path}&offset=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n\r\n"
        sock.sendall(head.encode() + bytes(1000))
    (line,) = read_log(log, 1)
    assert line["status"] == "408"
    assert int(line["bytes"]) < 5000


def test_impossible_log_is_one_line(tmp_path):
    """It's an error before the server starts."""
    result = run_pdiffcopy("--listen", "127.0.0.1:1", "--access-log", tmp_path / "missing" / "log")
    (line,) = error_lines(result)
    assert result.returncode == 1
    assert "access log" in line and "No such file" in line


def test_full_disk_does_not_end_the_server(launch, path):
    """What can't be logged is served, and that it can't is said in one line."""
    server = launch("--access-log=/dev/full")
    for _ in range(2):
        assert requests.get(f"{server.origin}/info", {"filename": path}).status_code == 200
    wait_for(lambda: "No space left" in server.log.read_text(), what="a message")
    assert "Traceback" not in server.log.read_text()


def test_fifo_that_nobody_reads_is_not_waited_for(tmp_path):
    """One that somebody reads is a log like any other (as stdout of a container often is)."""
    os.mkfifo(tmp_path / "log")
    result = run_pdiffcopy("--listen", f"127.0.0.1:{find_free_port()}", f"--access-log={tmp_path}/log")
    (line,) = error_lines(result)
    assert result.returncode == 1 and "Can't write the access log" in line
    reader, writer = os.pipe()
    try:
        open_access_log(f"/proc/self/fd/{writer}")
        accesslog._log.info("a line")
        assert os.read(reader, 100).endswith(b" a line\n")
    finally:
        accesslog._log.handlers.pop().close()
        os.close(reader)
        os.close(writer)


@pytest.mark.usefixtures("no_hang")
def test_reader_of_a_fifo_is_there_for_all_lines(tmp_path, monkeypatch):
    """It doesn't take for the end that the log is tried before it's opened."""

    class Late(accesslog._Handler):
        def __init__(self, *arguments, **options):
            time.sleep(0.3)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(accesslog, "_Handler", Late)
    os.mkfifo(tmp_path / "log")
    with ThreadPoolExecutor(1) as executor:
        text = executor.submit((tmp_path / "log").read_text)
        wait_for(partial(_open_log, f"{tmp_path}/log"), what="the reader")
        try:
            accesslog._log.info("a line")
        finally:
            accesslog._log.handlers.pop().close()
        assert text.result(10).endswith(" a line\n")


def _open_log(filename):
    try:
        open_access_log(filename)
    except FileError:  # there's no reader yet
        return False
    return True


def test_folder_that_is_gone_for_a_while_ends_nothing(tmp_path, caplog):
    """A line is lost then, and no request."""
    (tmp_path / "logs").mkdir()
    open_access_log(f"{tmp_path}/logs/log")
    try:
        accesslog._log.info("one")
        (tmp_path / "logs").rename(tmp_path / "elsewhere")
        accesslog._log.info("two")
        assert "Can't write the access log" in caplog.text
        (tmp_path / "elsewhere").rename(tmp_path / "logs")
        accesslog._log.info("three")
    finally:
        accesslog._log.handlers.pop().close()
    assert [line.split()[-1] for line in (tmp_path / "logs/log").read_text().splitlines()] == ["one", "three"]
