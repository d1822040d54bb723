"""The engine with layers on disk: the same tokens, and requests that fail cleanly where the disk does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_fault import Fault
from engine_models import (
    generate,
    make_engine,
    plan_as_for_a_cpu,
    prompt_of,
    reference,
    request_of,
    save_checkpoint,
    tokens_of,
)

from elsa_serve.errors import BudgetError
from elsa_serve.offload import disk_layers
from elsa_serve.offload.disk import Bounce, DirectFile
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.protocol import TokenEvent, stream
from elsa_serve.stats import Steps

COUNT = 6
# 5 layers of 120 KiB, of which host memory holds one beside the staging buffers and the KV that lies there.
ON_DISK: dict[str, Any] = {
    "resident_layers": 0, "chunk_tokens": 16, "context": 200, "host_memory": "500KiB", "max_batch": 2,
    "prefix_caching": False,
}  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)
    monkeypatch.setattr(disk_layers, "PIECE", 4 * 5003)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_checkpoint("llama", tmp_path)


@pytest.fixture
def engine(directory: Path) -> Iterator[OffloadEngine]:
    made = make_engine(directory, **ON_DISK, num_speculative_tokens=0)
    yield made
    made.shutdown()


def expected(prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"serial": True},
        {"slots": 3},
        {"resident_layers": 1, "host_memory": "470KiB"},
        {"gpu_memory": "1000KiB", "host_memory": "600KiB", "max_batch": 1},
    ],
    ids=str,
)
def test_the_same_tokens_from_disk(directory: Path, device: str, options: dict[str, Any]) -> None:
    steps = Steps()
    made = make_engine(directory, sink=steps, device=device, **ON_DISK | options)
    try:
        assert len(made.plan.disk_layers) >= 2
        prompt = prompt_of(70, seed=4)
        assert tokens_of(generate(made, prompt, max_tokens=COUNT)) == expected(prompt)
    finally:
        made.shutdown()
    reads = [step.disk for step in steps.passes if step.disk is not None]
    layer = made.plan.disk_bytes / len(made.plan.disk_layers)
    assert sum(one.bytes for one in reads) >= 0.9 * len(steps.passes) * (len(made.plan.disk_layers) - 1) * layer
    if not options.get("serial"):
        assert steps.passes[0].predicted_s == steps.passes[0].planned_s > 0
        # From then on at the pace that the disk has shown, which is bounded.
        assert all(0 < step.planned_s / 4 <= step.predicted_s <= 4 * step.planned_s for step in steps.passes)


def test_random_weights_are_refused_with_the_memory_they_need(directory: Path) -> None:
    with pytest.raises(BudgetError, match="in host memory"):
        make_engine(directory, **ON_DISK, load_format="dummy")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), SystemExit("killed")], ids=["disk", "worker"]
)
def test_a_disk_error_fails_the_request_and_the_next_one_is_right(
    engine: OffloadEngine, fault: Fault, error: BaseException
) -> None:
    prompt = prompt_of(40, seed=1)
    assert tokens_of(generate(engine, prompt, max_tokens=COUNT)) == expected(prompt)
    fault.error = error
    last = generate(engine, prompt_of(30, seed=2), max_tokens=COUNT)[-1]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert str(error) in last.error
    fault.error = None
    for seed in (3, 4):
        prompt = prompt_of(50, seed=seed)
        assert tokens_of(generate(engine, prompt, max_tokens=COUNT)) == expected(prompt)
    assert engine.stats().state == "ready"
    assert engine.stats().kv_used_bytes["host"] == 0


def test_a_read_that_fails_once_is_tried_again(
    engine: OffloadEngine, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    generate(engine, prompt_of(20), max_tokens=2)
    read, failed = fault._read, threading.Event()

    def fail_once(file: DirectFile, start: int, nbytes: int, bounce: Bounce) -> torch.Tensor:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return read(file, start, nbytes, bounce)

    fault._read = fail_once
    prompt = prompt_of(40, seed=8)
    assert tokens_of(generate(engine, prompt, max_tokens=COUNT)) == expected(prompt)
    assert failed.is_set()
    assert "is read again: [Errno 5] Input/output error" in caplog.text


def test_a_decoding_request_outlives_the_failure_of_a_new_one(engine: OffloadEngine, fault: Fault) -> None:
    """The pass fails while one request decodes and another begins: the new one ends, the other goes on, unchanged."""
    first, second = prompt_of(40, seed=5), prompt_of(30, seed=6)
    begun, tokens, ends = threading.Event(), [], []

    def decode() -> None:
        for event in stream(engine, request_of(first, max_tokens=60)):
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
                ends.append(event.finish_reason)
                if len(tokens) == 3:
                    begun.set()

    thread = threading.Thread(target=decode)
    thread.start()
    assert begun.wait(60)
    read = fault._read

    def fail_the_mixed_pass(file: DirectFile, start: int, nbytes: int, bounce: Bounce) -> torch.Tensor:
        if engine.stats().running == 2:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, start, nbytes, bounce)

    fault._read = fail_the_mixed_pass
    last = generate(engine, second, max_tokens=20)[-1]
    thread.join(60)
    ids = torch.tensor([first])
    whole = (
        reference("llama")
        .generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=None)[
            0, 40:
        ]
        .tolist()
    )
    assert ends[-1] == "length"
    assert tokens == whole
    assert last.finish_reason == "error"
    assert engine.stats().state == "ready"


def test_a_shard_cut_short_while_serving_fails_requests_by_name(engine: OffloadEngine, directory: Path) -> None:
    generate(engine, prompt_of(20), max_tokens=2)
    shard = directory / "model.safetensors"
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) // 8)
    last = generate(engine, prompt_of(30, seed=2), max_tokens=COUNT)[-1]
    assert last.finish_reason == "error"
    assert "it is truncated" in str(last.error)
    shard.write_bytes(whole)
    prompt = prompt_of(30, seed=3)
    assert tokens_of(generate(engine, prompt, max_tokens=COUNT)) == expected(prompt)


def test_a_flipped_bit_is_found_with_checksums(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSA_CHECKSUMS", "1")
    made = make_engine(directory, **ON_DISK)
    try:
        generate(made, prompt_of(20), max_tokens=3)
        disk = made._loaded.weights.disk
        assert disk is not None
        extent = disk._extents[made.plan.disk_layers[0]][0]
        with extent.file.open("r+b") as shard:
            shard.seek(extent.start + 100)
            byte = shard.read(1)
            shard.seek(extent.start + 100)
            shard.write(bytes([byte[0] ^ 1]))
        last = generate(made, prompt_of(30), max_tokens=COUNT)[-1]
        assert last.finish_reason == "error"
        assert "has checksum" in str(last.error)
    finally:
        made.shutdown()


def test_a_disk_that_stays_broken_ends_the_engine_with_its_reason(engine: OffloadEngine, fault: Fault) -> None:
    generate(engine, prompt_of(20), max_tokens=2)
    fault.error = OSError(errno.EIO, "Input/output error")
    for seed in range(3):
        assert generate(engine, prompt_of(20, seed=seed), max_tokens=2)[-1].finish_reason == "error"
    thread = engine._thread
    thread.join(30)
    assert engine.stats().state == "failed"
    assert "Input/output error" in engine.stats().detail
