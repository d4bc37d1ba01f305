"""What a user gets to know when a run is over."""

from __future__ import annotations

import json

import pytest

from pdiffcopy.address import Address
from pdiffcopy.client.plan import Plan, Result, Verification
from pdiffcopy.client.report import Report

MIB = 1024 * 1024

PLAN = Plan(
    source=Address("/a b"),
    target=Address("/c d", "host"),
    size=10 * MIB,
    target_size=10 * MIB,
    block_size=MIB,
    method="sha1",
    concurrency=2,
    delta=True,
    verification=Verification.STATED,
)
RESULT = Result(
    blocks_compared=10,
    blocks_changed=2,
    bytes_compared=10 * MIB,
    bytes_moved=2 * MIB,
    bytes_verified=2 * MIB,
)
EQUAL = Result(blocks_compared=10, bytes_compared=10 * MIB)


def make_report(plan=PLAN, result=RESULT, dry_run=False, verify=True, elapsed=2.0):
    return Report(plan.target, plan, result, dry_run, verify, elapsed)


@pytest.mark.parametrize(
    "compared, changed, similarity", [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 0.0), (10, 2, 0.8), (4, 1, 0.75)]
)
def test_similarity(compared, changed, similarity):
    """The part of the blocks that were equal; two empty files are equal."""
    report = make_report(result=Result(blocks_compared=compared, blocks_changed=changed))
    assert report.similarity == pytest.approx(similarity)


@pytest.mark.parametrize(
    "planned, wanted, dry_run, expected",
    [
        (True, True, False, "verified"),
        (False, True, False, "unverified"),
        (False, False, False, "skipped"),
        (True, True, True, "skipped"),
        (False, True, True, "skipped"),
    ],
)
def test_verification(planned, wanted, dry_run, expected):
    """Nothing is called verified that wasn't."""
    report = make_report(
        PLAN._replace(verification=Verification.STATED if planned else Verification.NONE),
        dry_run=dry_run,
        verify=wanted,
    )
    assert report.verification == expected
    assert report.as_dict()["verification"] == expected


@pytest.mark.parametrize(
    "report, expected",
    [
        (
            make_report(),
            "2 of 10 blocks differed (80.00% similar by sha1), moved 2 MiB in 2 seconds (5 MiB/s). Verified 2 MiB.",
        ),
        (make_report(dry_run=True), "2 of 10 blocks differ (80.00% similar by sha1) in 2 seconds (5 MiB/s)."),
        (
            make_report(result=EQUAL),
            "0 of 10 blocks differed (100.00% similar by sha1), moved 0 bytes in 2 seconds (5 MiB/s).",
        ),
        (
            make_report(PLAN._replace(delta=False), RESULT._replace(blocks_changed=10, retries=1)),
            "The whole file was copied, moved 2 MiB in 2 seconds (5 MiB/s). 1 retry. Verified 2 MiB.",
        ),
        (make_report(PLAN._replace(delta=False), dry_run=True), "10 blocks to copy in 2 seconds (5 MiB/s)."),
        (
            make_report(result=RESULT._replace(retries=3), verify=False),
            "2 of 10 blocks differed (80.00% similar by sha1), moved 2 MiB in 2 seconds (5 MiB/s). 3 retries.",
        ),
    ],
    ids=["delta", "dry", "equal", "whole", "whole dry", "not verified"],
)
def test_sentences(report, expected):
    """One line with everything that matters."""
    assert str(report) == expected


@pytest.mark.parametrize(
    "compared, changed, expected",
    [(0, 0, "100.00%"), (10**6, 1, "99.99%"), (10**18, 1, "99.99%"), (3, 1, "66.66%"), (3, 3, "0.00%"),
     (10**6, 10**6 - 1, "0.00%"), (100, 29, "71.00%"), (10**4, 9995, "0.05%")],
)  # fmt: skip
def test_similarity_is_rounded_down(compared, changed, expected):
    """As long as something differs, it isn't called wholly similar."""
    report = make_report(result=Result(blocks_compared=compared, blocks_changed=changed))
    assert f"({expected} similar by sha1)" in str(report)


def test_old_servers_are_a_warning():
    """That a target couldn't be verified can't be overlooked, unless nothing was moved."""
    assert "NOT VERIFIED" in str(make_report(PLAN._replace(verification=Verification.NONE)))
    assert "NOT VERIFIED" not in str(make_report(PLAN._replace(verification=Verification.NONE), EQUAL))


def test_no_time_at_all():
    """A run may be too short for the clock."""
    assert "differed" in str(make_report(elapsed=0.0))


def test_report_as_json():
    """All that was planned and counted, in plain values, and no secret."""
    document = json.loads(json.dumps(make_report().as_dict()))
    assert document == {
        "source": "/a b",
        "target": "http://host:8080/c%20d",
        "outcome": "updated",
        "dry_run": False,
        "delta_transfer": True,
        "block_size": MIB,
        "hash_method": "sha1",
        "size": 10 * MIB,
        "similarity": 0.8,
        "verification": "verified",
        "bytes_cut": 0,
        "bytes_grown": 0,
        "bytes_left_alone": 0,
        "watched": True,
        "claimed": True,
        "elapsed": 2.0,
        "blocks_compared": 10,
        "blocks_changed": 2,
        "bytes_compared": 10 * MIB,
        "bytes_moved": 2 * MIB,
        "bytes_verified": 2 * MIB,
        "bytes_zeroed": 0,
        "retries": 0,
    }
