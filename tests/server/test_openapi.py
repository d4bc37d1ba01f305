"""The OpenAPI description is exact: the real server is held to it, with requests that nobody would think of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import requests
import yaml
from hypothesis import HealthCheck, Phase, settings

schemathesis = pytest.importorskip("schemathesis")

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.yaml"
TOKEN = "a-token-for-the-tests"

schema = schemathesis.openapi.from_path(DOCUMENT)
bounded = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def confined(tmp_path_factory):
    """Two servers that can't do harm: one that's open, and one that wants a token."""
    from tests.support import start_server

    folder = tmp_path_factory.mktemp("openapi")
    root = folder / "root"
    root.mkdir()
    (root / "file").write_bytes(bytes(100_000))
    (root / "folder").mkdir()
    (root / "folder" / "\udcff\n é").touch()
    servers = [
        start_server(folder, "--root", str(root)),
        start_server(folder, "--root", str(root), env={"PDIFFCOPY_TOKEN": TOKEN}),
    ]
    yield servers
    for server in servers:
        server.stop()


@schema.parametrize()
@bounded
def test_answers_are_as_described(case, confined):
    """No response is a 5xx, or another one than the description allows."""
    check_case(case, confined[0])


@schema.parametrize()
@bounded
def test_answers_for_a_file_are_as_described(case, confined):
    """The same when the file exists, so that requests get further than its name."""
    case.query = {**(case.query or {}), "filename": "/file"}
    check_case(case, confined[0])


@schema.include(path="/list").parametrize()
@bounded
def test_lists_of_folders_are_as_described(case, confined):
    """The same for a folder, with a name that has to be encoded."""
    case.query = {**(case.query or {}), "filename": "/"}
    check_case(case, confined[0])


@schema.parametrize()
@settings(bounded, max_examples=5)
def test_strangers_are_answered_as_described(case, confined):
    """A server with a token answers everybody else with 401."""
    response = case.call(base_url=confined[1].origin, timeout=20)
    assert response.status_code in (400, 401, 414, 417, 431)
    case.validate_response(response, checks=CHECKS)


def check_case(case, server) -> None:
    response = case.call(base_url=server.origin, timeout=20)
    # A disk may really be full, everything else with a five is a bug.
    assert response.status_code < 500 or response.status_code == 507, response.text
    case.validate_response(response, checks=CHECKS)


CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in (
        "status_code_conformance", "content_type_conformance", "response_headers_conformance",
        "response_schema_conformance",
    )
]  # fmt: skip


def test_description_knows_all_endpoints(confined):
    """Each endpoint of the server is described, and each described one is there."""
    from pdiffcopy.server import app

    described = yaml.safe_load(DOCUMENT.read_text())["paths"]
    served = {
        (rule.rule, verb) for rule in app.url_map.iter_rules() for verb in rule.methods - {"HEAD", "OPTIONS"}
    }  # fmt: skip
    assert served == {(path, verb.upper()) for path, item in described.items() for verb in item if verb in VERBS}


VERBS = {"get", "post", "put", "delete", "patch", "head", "options"}


def test_description_knows_the_limits():
    """The numbers in the description are those of the protocol."""
    from pdiffcopy import blocks, words

    numbers = set(map(int, re.findall(r"(?:maximum|maxLength|maxItems): (\d+)", DOCUMENT.read_text())))
    assert {words.MAX_BLOCK_SIZE, words.MAX_CONCURRENCY, blocks.MAX_OFFSET} <= numbers


def test_methods_that_are_not_described_are_refused(confined):
    """Another method than those described is 405, and says which ones there are."""
    for verb in ("PUT", "DELETE", "PATCH"):
        for path in yaml.safe_load(DOCUMENT.read_text())["paths"]:
            response = requests.request(verb, confined[0].origin + path, timeout=20)
            assert response.status_code == 405
            assert response.headers["Allow"]
            assert response.headers["Content-Type"] == "application/problem+json"
