"""The engine's tokens against transformers', and against its own: placement and overlap must not change one of them."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels.cpu import native
from engine_models import (
    FAMILIES,
    generate,
    make_engine,
    plan_as_for_a_cpu,
    prompt_of,
    reference,
    request_of,
    save_checkpoint,
    tokens_of,
)

from elsa_serve.protocol import Event, TokenEvent

STREAMED: dict[str, Any] = {"resident_layers": 0, "chunk_tokens": 16}
# The device's budget holds the ring, the working buffer and a part of the tokens' KV; the rest goes to the host.
KV_ON_HOST: dict[str, Any] = {"resident_layers": 0, "chunk_tokens": 16, "context": 200, "gpu_memory": "840KiB"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def same_placement_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)


def expected(family: str, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, eager attention in FP32."""
    ids = torch.tensor([prompt])
    out = reference(family).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def run(
    directory: Path, prompt: list[int], count: int = 12, splits: list[int] | None = None, **options: Any
) -> list[int]:
    """The tokens; `splits` takes how many tokens' KV the device holds."""
    engine = make_engine(directory, **options)
    if splits is not None:
        splits.append(engine.plan.kv_gpu_tokens)
    try:
        events = generate(engine, prompt, max_tokens=count)
        assert events[-1].finish_reason == "length", events[-1].error
        return tokens_of(events)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["elsa", "sdpa"])
def test_greedy_tokens_are_those_of_transformers(
    family: str, attention: str, device: str, checkpoints: dict[str, Path]
) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("SDPA has no softcap; the engine refuses it (test_engine)")
    prompt = prompt_of(61, seed=1)
    options = {**STREAMED, "device": device, "attention": attention}
    assert run(checkpoints[family], prompt, **options) == expected(family, prompt, 12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("serial", [False, True])
def test_placement_and_overlap_do_not_change_tokens(
    family: str, serial: bool, device: str, checkpoints: dict[str, Path]
) -> None:
    prompt = prompt_of(50, seed=2)
    resident = run(checkpoints[family], prompt, device=device, resident_layers=5, chunk_tokens=16)
    assert len(set(resident)) > 3  # a model that repeats itself would hide a wrong order of layers or tokens
    for options in (STREAMED, KV_ON_HOST, {**STREAMED, "resident_layers": 2, "slots": 2}):
        tokens = run(checkpoints[family], prompt, **options, device=device, serial=serial)
        assert tokens == resident, options


@pytest.mark.parametrize("seed", range(6))
def test_no_placement_changes_a_token(seed: int, device: str, checkpoints: dict[str, Path]) -> None:
    """Placements chosen at random: how much of every layer's KV the device holds, layers, slots, chunks, twin."""
    choice = random.Random(seed)
    family = choice.choice(list(FAMILIES))
    prompt, count = prompt_of(choice.randint(20, 180), seed=seed), 10
    resident, slots = choice.choice([0, 0, 1]), choice.choice([2, 3])
    options: dict[str, Any] = {
        "context": 200,
        # What the least plan needs, a layer being 120 KiB, and the KV of 0 to 160 tokens.
        "gpu_memory": f"{840 + 120 * (resident + slots - 2) + choice.randint(0, 200)}KiB",
        "resident_layers": resident,
        "slots": slots,
        "chunk_tokens": choice.choice([1, 7, 16, 30]),
        "max_batch": 2,
        "serial": choice.random() < 0.3,
        "host_threads": choice.choice([1, 2]),
    }
    splits: list[int] = []
    tokens = run(checkpoints[family], prompt, count, splits=splits, **options, device=device)
    assert tokens == expected(family, prompt, count), (family, splits, options)


def test_kv_on_disk_changes_no_token(device: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    prompt = prompt_of(170, seed=4)
    options: dict[str, Any] = {
        "context": 200, "gpu_memory": "880KiB", "resident_layers": 0, "slots": 2, "chunk_tokens": 16, "max_batch": 1,
        "host_memory": "700KiB", "kv_disk": "1MiB", "kv_disk_dir": tmp_path,
    }  # fmt: skip
    engine = make_engine(checkpoints["llama"], **options, device=device)
    try:
        plan = engine.plan
        assert min(plan.kv_gpu_tokens, plan.kv_host_tokens, plan.kv_disk_tokens) > 10
        for _ in range(2):  # the second time, from what the prefix cache holds
            assert tokens_of(generate(engine, prompt, max_tokens=10)) == expected("llama", prompt, 10)
    finally:
        engine.shutdown()


def test_kv_really_lies_on_the_host(device: str, checkpoints: dict[str, Path]) -> None:
    engine = make_engine(checkpoints["llama"], **KV_ON_HOST, device=device)
    try:
        assert 0 < engine.plan.kv_gpu_tokens < engine.plan.context
        used: dict[str, int] = {}

        def look(event: Event) -> None:
            if isinstance(event, TokenEvent) and event.finish_reason is None:
                used.update(engine.stats().kv_used_bytes)
            elif isinstance(event, TokenEvent):
                done.set()

        done = threading.Event()
        engine.submit(request_of(prompt_of(180), max_tokens=4), look)
        assert done.wait(20)
        assert used["gpu"] > 0
        assert used["host"] > 0
        # What the host took tells of the passes to come, where it is timed.
        assert (engine._pace.attention != 1.0) == (native.unavailable() is None)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("options", [STREAMED, {**KV_ON_HOST, "host_memory": "900KiB"}], ids=["gpu", "host"])
def test_requests_that_join_and_leave_get_the_tokens_they_get_alone(
    options: dict[str, Any], device: str, checkpoints: dict[str, Path]
) -> None:
    """Seven requests of different lengths through a batch of three: joins, leaves, mixed passes and waiting."""
    options = {**options, "device": device, "max_batch": 3}
    prompts = [prompt_of(length, seed=length) for length in (40, 3, 17, 1, 90, 33, 8)]
    counts = [9, 14, 3, 20, 6, 1, 11]
    engine = make_engine(checkpoints["llama"], **options)
    try:
        alone = [tokens_of(generate(engine, p, max_tokens=n)) for p, n in zip(prompts, counts)]
        results: list[list[TokenEvent]] = [[] for _ in prompts]
        done = [threading.Event() for _ in prompts]

        def listener(index: int) -> Any:
            def take(event: Event) -> None:
                if isinstance(event, TokenEvent):
                    results[index].append(event)
                    if event.finish_reason is not None:
                        done[index].set()

            return take

        for index, (prompt, count) in enumerate(zip(prompts, counts)):
            engine.submit(request_of(prompt, max_tokens=count), listener(index))
        assert all(event.wait(30) for event in done)
        assert [tokens_of(events) for events in results] == alone
        assert set(engine.stats().kv_used_bytes.values()) == {0}
    finally:
        engine.shutdown()
    assert alone == [expected("llama", p, n) for p, n in zip(prompts, counts)]
