"""Several requests in one: as values, and as a server answers them."""

from __future__ import annotations

import json
import os
from io import BytesIO

import pytest
import requests

from pdiffcopy.blocks import Extent
from pdiffcopy.bundles import (
    MAX_HEAD,
    MAX_PARTS,
    PartAnswer,
    decode_answers,
    decode_frame,
    decode_requests,
    encode_answers,
    encode_frame,
    encode_requests,
)
from pdiffcopy.digests import compute_digest
from pdiffcopy.exceptions import DamagedError, ProtocolError, RequestError
from pdiffcopy.files.claims import RUN_ATTRIBUTE
from pdiffcopy.protocol import HashesRequest, InfoRequest, MetadataRequest, PiecesRequest
from pdiffcopy.wholes import MAX_BLOCKS, MAX_WHOLE, CreateRequest, FetchRequest, SummaryRequest, decode_summary
from tests.support import make_data

SIZE = 300_000
RUN = "5f" * 8


# As values {{{1


def test_requests_are_what_they_were():
    """Also a name that isn't UTF-8."""
    sent = [InfoRequest(filename="/a\udcff b"), CreateRequest(filename="/c", run=RUN, digest="0" * 32)]
    parts = decode_requests(decode_frame(BytesIO(encode_frame(encode_requests(sent, [0, 7]))).read))
    assert [part.kind.decode(part.query, {}) for part in parts] == sent
    assert [part.size for part in parts] == [0, 7]


def test_answers_are_what_they_were():
    """Documents are bytes."""
    sent = [PartAnswer(200, bytes(range(256)), 5, "ab" * 16), PartAnswer(404, b"{}")]
    assert decode_answers(decode_frame(BytesIO(encode_frame(encode_answers(sent))).read), 2) == sent


@pytest.mark.parametrize("position", [0, 8, 20, 41, 42, 60])
def test_damaged_head_is_noticed(position):
    """Wherever it's damaged."""
    frame = bytearray(encode_frame(encode_requests([InfoRequest(filename="/a")], [0])))
    frame[position] ^= 1
    with pytest.raises(DamagedError):
        decode_frame(BytesIO(frame).read)


def test_head_has_a_bound():
    """Nobody is made to read a gigabyte."""
    with pytest.raises(DamagedError):
        decode_frame(BytesIO(b"40000000 " + b"0" * 32 + b"\n").read)


@pytest.mark.parametrize(
    "head",
    [
        b"", b"[]", b"{}", b"null", b"[1]", b"[[]]", b"[" * 5000, b'[["GET","info","filename=/a"]]',
        b'[["GET","info","filename=/a","0"]]', b'[["GET","info","filename=/a",-1]]',
        b'[["GET","info","filename=/a",1.0]]',
        b'[["GET","info","filename=/\xc3\xa4",0]]', b'[["GET","info","filename=/a",true]]',
        json.dumps([["POST", "whole", "filename=/a", MAX_WHOLE + 1]]).encode(),
        json.dumps([["GET", "info", "filename=/a", 0]] * (MAX_PARTS + 1)).encode(),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(head):
    """With an error that becomes a 400."""
    with pytest.raises(RequestError):
        decode_requests(head)


@pytest.mark.parametrize(
    "head",
    [
        b"", b"[]", b"null", b"[[200]]", b'[[200,"",0,""],[200,"",0,""]]', b'[["200","",0,""]]', b'[[200,1,0,""]]',
        b'[[200,"",-1,""]]', b'[[200,"",99999999999,""]]', b'[[200,"",0,"xyz"]]', b'[[200,"\\u0100",0,""]]',
        b"[" * 5000,
    ],
)  # fmt: skip
def test_malformed_answers_are_refused(head):
    """Nothing of it is believed."""
    with pytest.raises(ProtocolError):
        decode_answers(head, 1)


@pytest.mark.parametrize("text", [b'{"size": 1, "server": {}, "digest": 5}', b'{"size": 1, "server": {}, "claim": []}'])
def test_malformed_summary_is_refused(text):
    """Members of other types, or none."""
    with pytest.raises(ProtocolError):
        decode_summary(text)


def test_grain_is_no_larger_than_a_block():
    """As with hashes."""
    with pytest.raises(RequestError):
        SummaryRequest(filename="/a", block_size=4096, method="sha1", grain=8192)


# As a server answers them {{{1


@pytest.fixture
def ask(server):
    """A function that sends several requests to the shared server, and returns answers with their contents."""

    def ask(*sent, contents=(), expect=200):
        contents = contents or [b""] * len(sent)
        head = encode_frame(encode_requests(sent, [len(data) for data in contents]))
        response = requests.post(f"{server.origin}/many", data=head + b"".join(contents), timeout=20)
        assert response.status_code == expect, response.text
        if expect != 200:
            return response.json()["detail"]
        body = BytesIO(response.content)
        answers = decode_answers(decode_frame(body.read), len(sent))
        found = [(answer, body.read(answer.size)) for answer in answers]
        assert not body.read()
        return found

    return ask


def create(path, data, **words):
    """A request for a new file."""
    return CreateRequest(filename=str(path), **{"run": RUN, "digest": compute_digest(data), **words})


def test_files_are_created(ask, tmp_path):
    """With their contents, the mode that was asked for, and no claim left."""
    data = [make_data(SIZE, seed) for seed in (1, 2)] + [b""]
    paths = [tmp_path / name for name in ("a", "b/c", "empty")]
    found = ask(*(create(path, item, new_mode=0o640) for path, item in zip(paths, data, strict=True)), contents=data)
    assert [answer.status for answer, _ in found] == [200] * 3
    assert [path.read_bytes() for path in paths] == data
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o640}
    assert json.loads(found[0][0].document)["claimed"] is True
    assert RUN_ATTRIBUTE not in os.listxattr(paths[0])


@pytest.mark.parametrize(
    "fault", ["exists", "is a folder", "link", "below a file", "digest", "device", "read only words"]
)
def test_failure_concerns_one_of_them(ask, tmp_path, fault):
    """What exists stays what it is, and the contents of the others arrive where they belong."""
    data = [make_data(SIZE, seed) for seed in (1, 2, 3)]
    paths = [tmp_path / name for name in ("a", "b", "c")]
    words, before = {}, None
    if fault == "exists":
        paths[1].write_bytes(b"precious")
        before = b"precious"
    elif fault == "is a folder":
        paths[1].mkdir()
    elif fault == "link":
        (tmp_path / "elsewhere").write_bytes(b"precious")
        paths[1].symlink_to(tmp_path / "elsewhere")
        before = b"precious"
    elif fault == "below a file":
        (tmp_path / "file").write_bytes(b"")
        paths[1] = tmp_path / "file" / "b"
    elif fault == "digest":
        words = {"digest": "0" * 32}
    elif fault == "device":
        paths[1] = "/dev/no-such-device"
    else:
        words = {"within": str(tmp_path / "elsewhere")}
        paths[1] = tmp_path / "elsewhere" / ".." / "b"
    sent = [
        create(path, item, **(words if i == 1 else {})) for i, (path, item) in enumerate(zip(paths, data, strict=True))
    ]
    found = ask(*sent, contents=data)
    assert [answer.status == 200 for answer, _ in found] == [True, False, True]
    assert paths[0].read_bytes() == data[0] and paths[2].read_bytes() == data[2]
    if before:
        assert paths[1].read_bytes() == before
    assert json.loads(found[1][0].document)["detail"]


def test_contents_that_nobody_wants_are_skipped(ask, tmp_path):
    """Whatever kind of request they belong to."""
    (tmp_path / "a").write_bytes(b"abc")
    found = ask(
        InfoRequest(filename=str(tmp_path / "a")),
        create(tmp_path / "b", b"xyz"),
        FetchRequest(filename=str(tmp_path / "a")),
        contents=[b"?" * SIZE, b"xyz", b"?"],
    )
    assert [answer.status for answer, _ in found] == [200, 200, 200]
    assert (tmp_path / "b").read_bytes() == b"xyz" and found[2][1] == b"abc"


def test_files_are_fetched(ask, tmp_path):
    """Each after the other, whatever becomes of those between them."""
    data = [make_data(SIZE, 1), b"", make_data(MAX_WHOLE, 2)]
    for name, item in zip("abc", data, strict=True):
        (tmp_path / name).write_bytes(item)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_WHOLE + 1)
    names = ["a", "gone", "b", "large", "c"]
    found = ask(*(FetchRequest(filename=str(tmp_path / name), digest=True) for name in names))
    assert [answer.status for answer, _ in found] == [200, 404, 200, 413, 200]
    assert [contents for answer, contents in found if answer.status == 200] == data
    assert [answer.digest for answer, _ in found if answer.status == 200] == [compute_digest(item) for item in data]
    assert json.loads(found[0][0].document)["size"] == SIZE


def test_many_tiny_blocks_are_not_hashed_as_a_whole(ask, tmp_path):
    """That would take seconds, in a thread that others can't use."""
    (tmp_path / "file").write_bytes(bytes(MAX_BLOCKS * 4))
    words = {"filename": str(tmp_path / "file"), "method": "sha1", "grain": 1}
    (few, _), (many, _) = ask(SummaryRequest(**words, block_size=4), SummaryRequest(**words, block_size=2))
    assert (few.status, many.status) == (200, 413)


def test_summary_tells_what_counts(ask, tmp_path):
    """Equal files have equal digests, others don't, nor does one with a hole where the other one has zeros."""
    data = bytes(65536) + make_data(65536, 1)
    for name in ("one", "same", "claimed"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "other").write_bytes(data[:-1] + b"!")
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(65536)
        file.write(data[65536:])
    os.setxattr(tmp_path / "claimed", RUN_ATTRIBUTE, b"abc")
    words = {"block_size": 65536, "method": "sha1", "grain": 4096}
    names = ["one", "same", "other", "sparse", "claimed", "gone"]
    found = ask(*(SummaryRequest(filename=str(tmp_path / name), **words) for name in names))
    assert [answer.status for answer, _ in found] == [200] * 5 + [404]
    one, same, other, sparse, claimed = (decode_summary(answer.document) for answer, _ in found[:5])
    assert one.digest == same.digest == claimed.digest and len({one.digest, other.digest, sparse.digest}) == 3
    assert (one.claim, claimed.claim) == ("", "abc")
    assert one.info.size == len(data) and one.info.file_id != same.info.file_id


def test_others_come_with_them(ask, tmp_path):
    """What has no contents is answered as if it had come alone."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "a").chmod(0o600)
    found = ask(MetadataRequest(filename=str(tmp_path / "a")), InfoRequest(filename=str(tmp_path / "gone")))
    assert [answer.status for answer, _ in found] == [200, 404]
    assert json.loads(found[0][0].document)["mode"] == 0o600


@pytest.mark.parametrize("body", [b"", b"GET info?filename=%2Fa\n", b"0" * 100])
def test_what_is_no_frame_is_damaged(server, body):
    """The client sends it once more."""
    response = requests.post(f"{server.origin}/many", data=body, timeout=20)
    assert response.status_code in (400, 422) and response.json()["detail"]


@pytest.mark.parametrize("missing", [1, -1])
def test_contents_have_the_sizes_that_were_told(server, tmp_path, missing):
    """A body with fewer bytes, or with more, is refused."""
    data = make_data(SIZE, 1)
    head = encode_frame(encode_requests([create(tmp_path / "a", data)], [SIZE + missing]))
    response = requests.post(f"{server.origin}/many", data=head + data, timeout=20)
    assert response.status_code == 400


def test_server_that_is_read_only_creates_nothing(launch, tmp_path):
    """Each request is looked at."""
    server = launch("--read-only")
    head = encode_frame(encode_requests([create(tmp_path / "a", b"")], [0]))
    response = requests.post(f"{server.origin}/many", data=head, timeout=20)
    answers = decode_answers(decode_frame(BytesIO(response.content).read), 1)
    assert answers[0].status == 403 and not (tmp_path / "a").exists()


def test_nothing_leaves_the_root(launch, tmp_path):
    """Names mean the same as alone."""
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    server = launch("--root", tmp_path / "root")
    sent = [FetchRequest(filename=name) for name in ("/link", "/../secret", str(tmp_path / "secret"))]
    head = encode_frame(encode_requests([*sent, create("/../new", b"")], [0] * 4))
    response = requests.post(f"{server.origin}/many", data=head, timeout=20)
    answers = decode_answers(decode_frame(BytesIO(response.content).read), 4)
    assert [answer.status for answer in answers] == [404, 404, 404, 200]
    assert (tmp_path / "root" / "new").exists() and not (tmp_path / "new").exists()


def test_new_files_get_no_set_id_bits(launch, tmp_path):
    """Unless the administrator allows that, as with those that are there."""
    head = encode_frame(encode_requests([create(tmp_path / "a", b"", mode=0o4755)], [0]))
    for options, status in (((), 403), (("--allow-set-id",), 200)):
        server = launch(*options)
        response = requests.post(f"{server.origin}/many", data=head, timeout=20)
        (answer,) = decode_answers(decode_frame(BytesIO(response.content).read), 1)
        assert answer.status == status and (tmp_path / "a").exists() is (status == 200)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o4755


def test_head_of_the_answers_has_room_for_all_of_them(ask, tmp_path):
    """What hasn't is asked for alone: binary documents take six times as many bytes as they have."""
    path = tmp_path / "a"
    path.write_bytes(make_data(MAX_WHOLE))
    request = PiecesRequest(filename=str(path), extents=(Extent(0, MAX_WHOLE),), size=4096, method="sha256")
    found = [answer for answer, _ in ask(*[request] * MAX_PARTS)]
    complete = [answer for answer in found if answer.status == 200]
    assert {len(answer.document) for answer in complete} == {1024 * 32}
    assert 4 < len(complete) < 30 and {answer.status for answer in found} == {200, 413}
    assert len(encode_answers(found)) <= MAX_HEAD


def test_long_answer_is_asked_for_alone(ask, tmp_path):
    """However much room there is."""
    (tmp_path / "a").write_bytes(make_data(SIZE))
    words = {"method": "sha1", "concurrency": 1, "checks": True}
    found = ask(*(HashesRequest(filename=str(tmp_path / "a"), block_size=size, **words) for size in (64, 4096)))
    assert [answer.status for answer, _ in found] == [413, 200]


def test_open_files_have_a_bound(launch, tmp_path):
    """Clients that ask for many files and read none leave descriptors to others."""
    server = launch("-c", "1", setup="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))")
    (tmp_path / "a").write_bytes(make_data(SIZE))
    head = encode_frame(encode_requests([FetchRequest(filename=str(tmp_path / "a"))] * MAX_PARTS, [0] * MAX_PARTS))
    for _ in range(3):  # those of the last time are closed by then
        response = requests.post(f"{server.origin}/many", data=head, timeout=20)
        found = decode_answers(decode_frame(BytesIO(response.content).read), MAX_PARTS)
        assert [answer.status for answer in found] == [200] * 50 + [503] * (MAX_PARTS - 50)
