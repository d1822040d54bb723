"""KV on its way to the disk tier's file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elsa_serve.offload import file_lane
from elsa_serve.offload.file_lane import SLOTS, FileLane, staging_bytes
from elsa_serve.offload.host import FileBuffer
from elsa_serve.offload.streams import Streams, make_streams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUNS, ROW = 40, (700, 16)  # runs of float32 rows: 1.8 MB in all


@pytest.fixture(params=[False, True], ids=["overlapped", "serial"])
def serial(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=DEVICES)
def streams(request: pytest.FixtureRequest, serial: bool) -> Iterator[Streams]:
    made = make_streams(request.param, serial=serial)
    yield made
    made.close()


@pytest.fixture
def lane(streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileLane]:
    monkeypatch.setattr(file_lane, "SLOT", 100_000)  # two runs and a part of the third
    made = FileLane(FileBuffer(RUNS * 4 * ROW[0] * ROW[1] + 52, tmp_path), streams)
    yield made
    made.close()


def runs(lane: FileLane, streams: Streams) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Places in the file and values for them, the last place first."""
    places = lane._file.tensor[52:].view(torch.float32).view(RUNS, *ROW)
    values = torch.randn(RUNS, *ROW, device=streams.device)
    return [(places[i], values[i]) for i in reversed(range(RUNS))]


def test_everything_arrives_where_it_belongs_and_nothing_else_changes(lane: FileLane, streams: Streams) -> None:
    pairs = runs(lane, streams)
    expected = [values.clone().cpu() for _, values in pairs]
    for low in range(0, RUNS, 10):
        for copy in lane.submit(pairs[low : low + 10], [streams.record()]):
            streams.wait(copy)
        for _, values in pairs[low : low + 10]:
            values.zero_()  # copied already, although not yet written
    assert lane.end() == []
    assert all(torch.equal(place, values) for (place, _), values in zip(pairs, expected))
    assert not lane._file.tensor[:52].any()
    assert sum(one.bytes for one in streams.drain_transfers()) == RUNS * 4 * ROW[0] * ROW[1]


def test_writes_that_stop_short_go_on(lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:30_001], at))
    pairs = runs(lane, streams)
    lane.submit(pairs, [streams.record()])
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit("killed")])
def test_a_write_that_fails_is_told_and_the_next_ones_go_on(
    lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: Any) -> int:
        raise error

    pairs = runs(lane, streams)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fails)
        lane.submit(pairs, [streams.record()])
        found = lane.end()
    assert len(found) > SLOTS  # none of the page-locked memory is lost
    assert all(isinstance(one, Exception) for one in found)
    assert any(word in str(found[0]) for word in ("No space left", "killed"))
    lane.submit(pairs, [streams.record()])
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


def test_what_waits_to_be_written_is_bounded(lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no write comes to its end, as many bytes are taken as the page-locked memory holds."""
    whole, gate = os.pwrite, threading.Event()

    def waits(*arguments: Any) -> int:
        assert gate.wait(30)
        return whole(*arguments)

    monkeypatch.setattr(os, "pwrite", waits)
    pairs, taken = runs(lane, streams), threading.Event()

    def submit() -> None:
        lane.submit(pairs, [streams.record()])
        taken.set()

    thread = threading.Thread(target=submit)
    thread.start()
    assert not taken.wait(0.3)
    assert len(lane._writes) <= SLOTS
    gate.set()
    thread.join(30)
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


def test_a_small_file_takes_little_memory() -> None:
    assert staging_bytes(0) == 0
    assert staging_bytes(1 << 20) == 1 << 20
    assert staging_bytes(1 << 40) == 64 << 20
