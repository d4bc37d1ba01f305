"""Tests for :mod:`pdiffcopy.client.workers`: when a run takes more processes than one, and what for."""

from __future__ import annotations

import errno
import os
from multiprocessing import Pipe

import pytest

from pdiffcopy.client import Client
from pdiffcopy.client.workers import _Comparisons
from pdiffcopy.exceptions import WorkerError
from tests.support import write_pattern

BLOCK = 4096


@pytest.fixture
def lonely(monkeypatch):
    """No process can be started."""

    def start(process):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("pdiffcopy.mp.Promise.start", start)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "whole file"])
@pytest.mark.parametrize("kind", ["local", "upload", "download"])
def test_one_batch_takes_one_process(lonely, server, tmp_path, kind, delta):
    """It would take longer to start others than to do the work."""
    data = write_pattern(tmp_path / "source", 100 * BLOCK + 1)
    write_pattern(tmp_path / "target", 50 * BLOCK)
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    locations = {
        "source": server.location(source) if kind == "download" else source,
        "target": server.location(target) if kind == "upload" else target,
    }
    report = Client(**locations, block_size=BLOCK, delta_transfer=delta).run()
    assert (tmp_path / "target").read_bytes() == data
    assert report.result.bytes_verified >= 50 * BLOCK


def test_several_batches_take_processes_which_are_missed_at_once(lonely, tmp_path):
    """What the machine lacks for them is known before the target is touched."""
    write_pattern(tmp_path / "source", 200 * BLOCK)
    client = Client(source=str(tmp_path / "source"), target=str(tmp_path / "target"), block_size=BLOCK)
    with pytest.raises(WorkerError, match="ulimit -u"):
        client.run()
    assert not (tmp_path / "target").exists()


@pytest.mark.usefixtures("no_hang")
def test_file_that_fails_is_not_compared_any_more():
    """Even when all others have begun by then, so that no more orders come."""
    receiver, sender = Pipe(duplex=False)

    def find(plan, servers, is_awaited):
        while True:
            yield "batch"

    work = iter(_Comparisons(find, None, receiver, is_alone=False, is_idle=lambda: True))
    sender.send((1, "plan"))
    sender.send(None)
    assert next(work) == (1, "plan", "batch")
    sender.send(1)
    *batches, last = work
    assert last == (1, "plan", len(batches) + 1)
