"""Do peers of version 1.0.1 keep working, in both roles? (:mod:`tests.old_peer` has the stand-ins.)"""

from __future__ import annotations

import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdiffcopy.address import parse_location
from pdiffcopy.client import Client, Location, Network
from pdiffcopy.client.servers import Servers
from pdiffcopy.exceptions import FileMissingError, UsageError, VerificationError
from pdiffcopy.features import FEATURE_LIST
from pdiffcopy.files.localfile import LocalFile
from tests import old_peer
from tests.support import error_lines, make_data, run_pdiffcopy, snapshot, write_pattern

BLOCK = 4096
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 123]


def _write_older_copy(path, data: bytes) -> None:
    older = bytearray(data)
    for position in {0, len(data) // 2, len(data) - 1} if data else ():
        older[position] ^= 0xFF
    path.write_bytes(older)


# A new client and an old server {{{1


@pytest.mark.parametrize("state", ["missing", "empty", "shorter", "longer", "different"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_new_client_works_with_old_server(launch_old, tmp_path, direction, size, state):
    """The frozen requests are enough for both directions."""
    peer = launch_old()
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    data = write_pattern(source, size)
    if state != "missing":
        target.parent.mkdir()
        _write_older_copy(target, data)
    if state in ("empty", "shorter"):
        target.write_bytes(target.read_bytes()[: size // 2 if state == "shorter" else 0])
    elif state == "longer":
        target.write_bytes(target.read_bytes() + make_data(2 * BLOCK + 7))
    locations = {"source": str(source), "target": str(target)}
    side = "source" if direction == "download" else "target"
    locations[side] = peer.location(locations[side])
    report = Client(**locations, block_size=BLOCK).run()
    assert target.read_bytes() == data
    assert report.verification == ("verified" if direction == "download" else "unverified")
    if direction == "download":
        assert report.result.bytes_verified == report.result.bytes_moved


def test_old_server_has_no_lists(launch_old, tmp_path):
    """It says so by what it can't do, and to ask for one anyway is an error, not an empty folder."""
    with Servers(Network()) as servers:
        replica = servers.open(parse_location(launch_old().location(tmp_path)))
        assert FEATURE_LIST not in replica.info()[1].features
        with pytest.raises(FileMissingError):
            list(replica.entries(1))


@pytest.mark.parametrize("option", [(), ("-r",)], ids=["file", "folder"])
def test_another_server_is_no_old_one(tmp_path, option):
    """Whoever has the port of a web server in mind doesn't look for a file that is there."""
    write_pattern(tmp_path / "file", 100)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        result = run_pdiffcopy(*option, f"127.0.0.1:{other.server_port}{tmp_path}/file", tmp_path / "target")
        other.shutdown()
    (line,) = error_lines(result)
    assert result.returncode == 1 and "(or it isn't pdiffcopy" in line and not (tmp_path / "target").exists()


def test_between_an_old_and_a_new_server(launch_old, server, tmp_path):
    """Remote to remote works when only one of them is old, whichever it is."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    peer = launch_old()
    for sender, receiver, verification in ((peer, server, "verified"), (server, peer, "unverified")):
        _write_older_copy(tmp_path / "target", data)
        source, target = sender.location(tmp_path / "source"), receiver.location(tmp_path / "target")
        report = Client(source=source, target=target, block_size=BLOCK).run()
        assert (tmp_path / "target").read_bytes() == data
        assert (report.result.blocks_changed, report.verification) == (3, verification)


def test_dry_run_against_old_server(launch_old, tmp_path):
    """An old server is compared with, and not written to."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    _write_older_copy(tmp_path / "target", data)
    before = snapshot(tmp_path / "target")
    target = launch_old().location(tmp_path / "target")
    client = Client(source=tmp_path / "source", target=target, block_size=BLOCK)
    assert client.find_changes() == [0, 3 * BLOCK, 7 * BLOCK]
    client.dry_run = True
    assert client.synchronize_once() == 3
    assert snapshot(tmp_path / "target") == before


def test_dry_run_of_a_download_to_a_missing_target(launch_old, tmp_path):
    """There's nothing to compare with, so all differs, and no file is made."""
    write_pattern(tmp_path / "source", 3 * BLOCK)
    source = launch_old().location(tmp_path / "source")
    assert Client(source=source, target=tmp_path / "target", block_size=BLOCK, dry_run=True).synchronize_once() == 3
    assert not (tmp_path / "target").exists()


def test_steps_work_with_old_server(launch_old, tmp_path):
    """The documented halves of a run need nothing new."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    _write_older_copy(tmp_path / "target", data)
    client = Client(source=launch_old().location(tmp_path / "source"), target=tmp_path / "target", block_size=BLOCK)
    client.transfer_changes(client.find_changes())
    assert (tmp_path / "target").read_bytes() == data


def test_location_of_old_server(launch_old, tmp_path):
    """A location behind an old server has all that a location has."""
    location = Location(expression=launch_old().location(tmp_path / "file"))
    assert not location.exists
    location.resize(2 * BLOCK)
    location.write_block(BLOCK, b"data")
    assert (tmp_path / "file").read_bytes() == bytes(BLOCK) + b"data" + bytes(BLOCK - 4)
    assert location.read_block(BLOCK, 6) == b"data\0\0"
    assert location.read_block(2 * BLOCK - 1, 100) == b"\0"
    assert location.read_block(2 * BLOCK, 100) == b""


def test_whole_file_download_is_verified_by_hashes(launch_old, tmp_path):
    """An old server states no digests, so the block hashes of the source take their place."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    source = launch_old().location(tmp_path / "source")
    report = Client(source=source, target=tmp_path / "target", block_size=BLOCK, delta_transfer=False).run()
    assert (report.verification, report.result.bytes_verified) == ("verified", len(data))
    assert (tmp_path / "target").read_bytes() == data


def test_upload_to_old_server_says_that_it_is_unverified(launch_old, tmp_path):
    """Nobody may believe that somebody checked: the text and the JSON object say so, on the command line."""
    data = write_pattern(tmp_path / "source", 3 * BLOCK)
    target = launch_old().location(tmp_path / "target")
    result = run_pdiffcopy("--json", tmp_path / "source", target)
    assert result.returncode == 0
    assert "NOT VERIFIED" in result.stderr
    facts = json.loads(result.stdout)
    assert (facts["verification"], facts["bytes_verified"], facts["bytes_moved"]) == ("unverified", 0, len(data))


def test_new_client_needs_more_for_fsync(launch_old, tmp_path):
    """What an old server can't do is refused before anything is touched."""
    write_pattern(tmp_path / "source", 10)
    with pytest.raises(UsageError, match="too old"):
        Client(source=tmp_path / "source", target=launch_old().location(tmp_path / "target"), fsync=True).synchronize()
    assert not (tmp_path / "target").exists()


def test_command_line_works_with_an_old_server(launch_old, tmp_path):
    """It needs no option for that: what an old server wants to know is said, also where it's the default here."""
    write_pattern(tmp_path / "source", 3 * BLOCK)
    write_pattern(tmp_path / "target", 3 * BLOCK, seed=2)
    result = run_pdiffcopy("--json", "-c", "1", launch_old().location(tmp_path / "source"), tmp_path / "target")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["hash_method"] == "sha1"
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_hash_method_that_old_server_may_lack_is_refused(launch_old, tmp_path, direction):
    """An old server has what comes with Python, and tells of nothing else."""
    write_pattern(tmp_path / "source", 10)
    locations = {"source": str(tmp_path / "source"), "target": str(tmp_path / "target")}
    side = "source" if direction == "download" else "target"
    locations[side] = launch_old().location(locations[side])
    with pytest.raises(UsageError, match="no hash method xxh128"):
        Client(**locations, hash_method="xxh128").synchronize()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("options", [[], ["--whole-file"]], ids=["delta", "whole"])
def test_byte_that_arrives_wrong_once_is_fetched_again(launch_old, tmp_path, options):
    """A download from an old server that flips a byte once is right in the end, and says that it took a retry."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    _write_older_copy(tmp_path / "target", data)
    source = launch_old("corrupt-once").location(tmp_path / "source")
    result = run_pdiffcopy("--json", "-b", str(BLOCK), *options, source, tmp_path / "target")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "target").read_bytes() == data
    facts = json.loads(result.stdout)
    assert (facts["verification"], facts["retries"]) == ("verified", 1)


@pytest.mark.parametrize("options", [[], ["--whole-file"]], ids=["delta", "whole"])
def test_byte_that_always_arrives_wrong_ends_the_run(launch_old, tmp_path, options):
    """A download from an old server that flips a byte each time ends with exit code 4 and one line."""
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    _write_older_copy(tmp_path / "target", data)
    source = launch_old("corrupt-always").location(tmp_path / "source")
    result = run_pdiffcopy("-b", str(BLOCK), *options, source, tmp_path / "target")
    assert result.returncode == VerificationError.exit_code == 4
    (line,) = error_lines(result)
    assert "couldn't be verified" in line and str(tmp_path / "target") in line


def test_what_old_server_writes_wrong_is_found_by_the_next_run(launch_old, tmp_path):
    """That's why an upload to an old server isn't called verified."""
    write_pattern(tmp_path / "source", 3 * BLOCK)
    bad, good = launch_old("corrupt-writes"), launch_old()
    first = Client(source=tmp_path / "source", target=bad.location(tmp_path / "target"), block_size=BLOCK).run()
    assert first.verification == "unverified"
    again = Client(source=tmp_path / "source", target=good.location(tmp_path / "target"), block_size=BLOCK)
    assert again.synchronize_once() > 0
    assert again.synchronize_once() == 0


# An old client and a new server {{{1


@pytest.mark.parametrize("method", ["sha1", "md5"])
@pytest.mark.parametrize("size", SIZES)
def test_old_client_downloads(server, tmp_path, size, method):
    """An old client gets what it expects from a new server."""
    source, target = tmp_path / "source", tmp_path / "target"
    data = write_pattern(source, size)
    _write_older_copy(target, data)
    changed = old_peer.download(server.port, str(source), str(target), BLOCK, method)
    assert target.read_bytes() == data
    assert changed == len({0, size // 2 // BLOCK, (size - 1) // BLOCK}) * bool(size)


@pytest.mark.parametrize("state", ["missing", "shorter", "longer", "different"])
@pytest.mark.parametrize("size", SIZES)
def test_old_client_uploads(server, tmp_path, size, state):
    """An old client can write to a new server, a file in a folder that doesn't exist included."""
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    data = write_pattern(source, size)
    if state != "missing":
        target.parent.mkdir()
        _write_older_copy(target, data)
    if state == "shorter":
        target.write_bytes(target.read_bytes()[: size // 2])
    elif state == "longer":
        target.write_bytes(target.read_bytes() + make_data(2 * BLOCK + 7))
    old_peer.upload(server.port, str(source), str(target), BLOCK)
    assert target.read_bytes() == data


def test_old_client_is_not_hindered_by_a_claim(server, tmp_path):
    """Version 1.0.1 knows no claims: what a run that was killed has left behind doesn't stop it."""
    source, target = tmp_path / "source", tmp_path / "target"
    data = write_pattern(source, 7 * BLOCK + 123)
    _write_older_copy(target, data)
    with LocalFile(str(target), write=True) as file:
        file.claims.take("dead")
    old_peer.upload(server.port, str(source), str(target), BLOCK)
    assert target.read_bytes() == data


def test_old_client_learns_that_a_file_is_missing(server, tmp_path):
    """The status is all that it looks at."""
    assert old_peer.request(server.port, "GET", "info", filename=str(tmp_path / "nothing"))[0] == 404


def test_old_client_reads_short_blocks_at_the_end(server, tmp_path):
    """Fewer bytes at the end of the file, none beyond it."""
    data = write_pattern(tmp_path / "file", BLOCK + 10)
    for offset, size in ((0, 5), (BLOCK, BLOCK), (BLOCK + 9, 1), (BLOCK + 10, BLOCK), (10 * BLOCK, 1), (0, 2 * BLOCK)):
        status, body = old_peer.request(
            server.port, "GET", "blocks", filename=str(tmp_path / "file"), offset=offset, size=size
        )
        assert (status, body) == (200, data[offset : offset + size])


def test_old_client_speaks_to_the_stand_in(launch_old, tmp_path):
    """The two stand-ins agree with each other, so what they show of us isn't a misunderstanding among them."""
    peer = launch_old()
    data = write_pattern(tmp_path / "source", 7 * BLOCK + 123)
    _write_older_copy(tmp_path / "one", data)
    assert old_peer.download(peer.port, str(tmp_path / "source"), str(tmp_path / "one"), BLOCK) == 3
    assert old_peer.upload(peer.port, str(tmp_path / "source"), str(tmp_path / "new" / "two"), BLOCK) == 8
    assert (tmp_path / "one").read_bytes() == (tmp_path / "new" / "two").read_bytes() == data
