"""KV on its way to the disk tier's file."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library

from elsa_serve.offload import file_lane
from elsa_serve.offload.file_lane import SLOTS, FileLane, staging_bytes
from elsa_serve.offload.host import FileBuffer
from elsa_serve.offload.streams import Streams, make_streams

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, TOKENS, D = 5, 175, 16  # of a place in the file; four of them make a block of float32
NBYTES = 4 * 2 * HEADS * 4 * TOKENS * D


@pytest.fixture(params=[False, True], ids=["overlapped", "serial"])
def serial(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=DEVICES)
def streams(request: pytest.FixtureRequest, serial: bool) -> Iterator[Streams]:
    made = make_streams(request.param, serial=serial)
    yield made
    made.close()


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler is."""
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")


@pytest.fixture(params=[25_000, 5_000], ids=["two heads a slot", "half a head"])
def lane(
    request: pytest.FixtureRequest, streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileLane]:
    monkeypatch.setattr(file_lane, "SLOT", request.param)
    made = FileLane(FileBuffer(NBYTES + 52, tmp_path), streams)
    yield made
    made.close()


def blocks(lane: FileLane, streams: Streams) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Places in the file, [2, 5, 175, 16] of a block of 700 tokens, and values for them, the last place first."""
    block = lane._file.tensor[52:].view(torch.float32).view(2, HEADS, 4 * TOKENS, D)
    values = torch.randn(block.shape, device=streams.device)
    return [(x, y) for x, y in zip(block.split(TOKENS, 2), values.split(TOKENS, 2))][::-1]


def submit(lane: FileLane, streams: Streams, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for place, values in pairs:
        lane.submit(place, values, [streams.record()])


def test_everything_arrives_where_it_belongs_and_nothing_else_changes(lane: FileLane, streams: Streams) -> None:
    pairs = blocks(lane, streams)
    expected = [values.clone().cpu() for _, values in pairs]
    for place, values in pairs:
        for copy in lane.submit(place, values, [streams.record()]):
            streams.wait(copy)
        values.zero_()  # copied already, although not yet written
    assert lane.end() == []
    assert all(torch.equal(place, values) for (place, _), values in zip(pairs, expected))
    assert not lane._file.tensor[:52].any()
    assert sum(one.bytes for one in streams.drain_transfers()) == NBYTES


@pytest.mark.usefixtures("by_python")
def test_python_writes_the_same(lane: FileLane, streams: Streams) -> None:
    pairs = blocks(lane, streams)
    submit(lane, streams, pairs)
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)
    assert not lane._file.tensor[:52].any()


@needs_native
def test_rows_are_written_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each return to Python would wait for its turn while another thread computes there."""
    file, calls = FileBuffer(300 * 70, tmp_path), []
    write_rows = library.write_rows
    monkeypatch.setattr(library, "write_rows", lambda *arguments: (calls.append(arguments), write_rows(*arguments)))
    values = torch.randint(1, 256, (256, 128), dtype=torch.uint8)[:, :64]
    file.write(file.tensor[100:].view(-1)[: 256 * 70].view(256, 70)[:, 6:], values)
    places = file.tensor[100 : 100 + 256 * 70].view(256, 70)
    assert torch.equal(places[:, 6:], values)
    assert not any(part.any() for part in (places[:, :6], file.tensor[:100], file.tensor[100 + 256 * 70 :]))
    assert len(calls) == 1
    file.close()


@pytest.mark.usefixtures("by_python")
def test_writes_that_stop_short_go_on(lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:3_001], at))
    pairs = blocks(lane, streams)
    submit(lane, streams, pairs)
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


@needs_native
def test_a_native_write_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as read_only, pytest.raises(OSError, match="Bad file descriptor") as found:
        library.write_rows(read_only.fileno(), torch.zeros(2, 3, dtype=torch.uint8), 0, 3)
    assert found.value.errno == errno.EBADF


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit("killed")])
def test_a_write_that_fails_is_told_and_the_next_ones_go_on(
    lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: Any) -> int:
        raise error

    pairs = blocks(lane, streams)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fails)
        full.setattr(library, "write_rows", fails)
        submit(lane, streams, pairs)
        found = lane.end()
    assert len(found) > SLOTS  # none of the page-locked memory is lost
    assert all(isinstance(one, Exception) for one in found)
    assert any(word in str(found[0]) for word in ("No space left", "killed"))
    submit(lane, streams, pairs)
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


@pytest.mark.usefixtures("by_python")
def test_what_waits_to_be_written_is_bounded(lane: FileLane, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no write comes to its end, as many bytes are taken as the page-locked memory holds."""
    whole, gate = os.pwrite, threading.Event()

    def waits(*arguments: Any) -> int:
        assert gate.wait(30)
        return whole(*arguments)

    monkeypatch.setattr(os, "pwrite", waits)
    pairs, taken = blocks(lane, streams), threading.Event()

    def hand_over() -> None:
        submit(lane, streams, pairs)
        taken.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert not taken.wait(0.3)
    assert len(lane._writes) <= SLOTS
    gate.set()
    thread.join(30)
    assert lane.end() == []
    assert all(torch.equal(place, values.cpu()) for place, values in pairs)


def test_threads_take_turns_at_python_more_often_while_there_is_a_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first to the last, in whatever order they end, and however: one is given up without being closed."""
    monkeypatch.setattr(file_lane, "_turns", file_lane._Turns())
    streams, before = make_streams("cpu"), sys.getswitchinterval()
    monkeypatch.setattr(file_lane, "SWITCH_S", before / 2)
    first, second, third = (FileLane(FileBuffer(NBYTES, tmp_path), streams) for _ in range(3))
    for lane in (first, first, second):
        assert sys.getswitchinterval() == pytest.approx(file_lane.SWITCH_S, abs=1e-6)  # kept in microseconds, cut off
        lane.close()
    assert sys.getswitchinterval() == pytest.approx(file_lane.SWITCH_S, abs=1e-6)
    del third
    gc.collect()
    assert sys.getswitchinterval() == before
    streams.close()


def test_a_small_file_takes_little_memory() -> None:
    assert staging_bytes(0) == 0
    assert staging_bytes(1 << 20) == 1 << 20
    assert staging_bytes(1 << 40) == 64 << 20
