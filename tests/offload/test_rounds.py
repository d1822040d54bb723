"""Prompts in rounds: how many tokens a pass takes, and that tokens do not depend on it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import generate, make_engine, prompt_of, request_of, save_checkpoint, tokens_of
from transformers import AutoConfig

from elsa_serve.errors import UsageError
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.machine import assumed_rates
from elsa_serve.offload.plan import ROUND_TOKENS, make_plan
from elsa_serve.offload.rounds import pass_tokens
from elsa_serve.offload.scheduler import PassTokens
from elsa_serve.protocol import Event, TokenEvent
from elsa_serve.stats import Steps

LLAMA_13B = Path(__file__).parents[2] / "load_tests" / "models" / "llama-13b.json"


@functools.cache
def geometry() -> Geometry:
    return Geometry.from_config(AutoConfig.from_pretrained(LLAMA_13B), torch.float16)


# --- limits -------------------------------------------------------------------------------------------------------


def limits(gpu: int, context: int, **options: Any) -> PassTokens:
    return pass_tokens(make_plan(geometry(), gpu_budget=gpu << 30, host_budget=200 << 30, context=context), **options)


def test_a_round_computes_for_longer_than_its_copies_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(8, 32768).alone > 24000  # 4 seconds, by the assumed rates
    assert limits(24, 131072).alone < 131072 // 4
    monkeypatch.setattr("elsa_serve.offload.rounds.ROUND_S", 0.0)
    streamed = limits(8, 32768)
    assert 8192 < streamed.alone < 32768  # two rounds of 16K, each of which hides the weights and half of the KV
    assert streamed.alone > limits(40, 32768).alone  # fewer layers stream, less KV lies on the host


def test_layers_on_disk_make_rounds_longer() -> None:
    options: dict[str, Any] = {"gpu_budget": 8 << 30, "context": 65536, "resident_layers": 0, "disk": True}
    memory, disk = (make_plan(geometry(), host_budget=size << 30, **options) for size in (100, 60))
    assert disk.disk_layers
    assert not memory.disk_layers
    assert pass_tokens(disk).alone >= disk.context  # half the reading takes longer than all computing
    assert pass_tokens(memory).alone < 40000


def test_beside_decodes_a_round_is_what_hides_behind_the_decode_pass() -> None:
    assert 1024 < limits(8, 32768).beside_decode < limits(8, 32768).alone
    assert 256 <= limits(130, 32768).beside_decode < 1024
    # With all on the device, the pass that a prompt joins comes from no graph: its issue hides as much of the prompt.
    slow = replace(assumed_rates(torch.float16), layer_s=2e-3)
    made, slowly = (
        make_plan(geometry(), gpu_budget=130 << 30, host_budget=200 << 30, context=32768, rates=rates)
        for rates in (None, slow)
    )
    assert made.s_per_token == slowly.s_per_token
    assert pass_tokens(slowly).beside_decode > 3 * pass_tokens(made).beside_decode


def test_prompts_that_share_a_pass_are_no_more_than_the_plan_has_memory_for() -> None:
    assert limits(8, 4096) == PassTokens(4096, 4096)
    assert limits(24, 131072, alone=100_000).alone == ROUND_TOKENS
    long, longer = (
        make_plan(geometry(), gpu_budget=24 << 30, host_budget=200 << 30, context=context).gpu_bytes
        for context in (ROUND_TOKENS, 131072)
    )
    assert long["hidden states of the prompt"] == longer["hidden states of the prompt"]


def test_what_is_asked_for_holds_and_nonsense_is_refused() -> None:
    assert limits(8, 32768, alone=5, beside_decode=3) == PassTokens(5, 3)
    for options, flag in (({"alone": 0}, "--prefill-round-tokens"), ({"beside_decode": -1}, "--max-num-batched")):
        with pytest.raises(UsageError, match=f"{flag}.* is (0|-1): at least 1"):
            limits(8, 32768, **options)


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gemma2")}


@pytest.fixture
def make(checkpoints: dict[str, Path]) -> Iterator[Callable[..., OffloadEngine]]:
    engines: list[OffloadEngine] = []

    def build(family: str = "llama", **options: Any) -> OffloadEngine:
        engines.append(make_engine(checkpoints[family], **{"resident_layers": 0, "chunk_tokens": 16} | options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.shutdown()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("placement", [{}, {"context": 200, "gpu_memory": "1000KiB"}], ids=["device", "host"])
def test_rounds_do_not_change_tokens(make: Any, family: str, placement: dict[str, Any]) -> None:
    prompt = prompt_of(101)
    whole = tokens_of(generate(make(family, **placement), prompt))
    for tokens in (9, 40):
        steps = Steps()
        engine = make(family, prefill_round_tokens=tokens, sink=steps, **placement)
        assert tokens_of(generate(engine, prompt)) == whole
        prefill = [one for one in steps.passes if one.phase == "prefill"]
        assert len(prefill) == -(-101 // tokens)
        assert sum(one.prompt_tokens for one in prefill) == 101
        assert [one.generated_tokens for one in prefill] == [0] * (len(prefill) - 1) + [1]


def test_a_decode_goes_on_beside_a_long_prompt(make: Any) -> None:
    """Twenty passes take the long prompt; the decoding request gets a token, or more, from each of them."""
    steps = Steps()
    engine = make(max_num_batched_tokens=8, num_speculative_tokens=0, prefix_caching=False, sink=steps)
    alone = {length: tokens_of(generate(engine, prompt_of(length), max_tokens=60)) for length in (10, 160)}
    steps.passes.clear()
    tokens: dict[int, list[int]] = {10: [], 160: []}
    started, done = threading.Event(), {length: threading.Event() for length in tokens}

    def listener(length: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            if isinstance(event, TokenEvent):
                started.set()
                tokens[length] += [event.token_id] if event.token_id is not None else []
                if event.finish_reason is not None:
                    done[length].set()

        return take

    engine.submit(request_of(prompt_of(10), max_tokens=60), listener(10))
    assert started.wait(20)
    engine.submit(request_of(prompt_of(160), max_tokens=60), listener(160))
    assert all(event.wait(20) for event in done.values())
    assert tokens == alone
    mixed = [one for one in steps.passes if one.phase == "mixed"]
    assert len(mixed) == 20
    assert {one.prompt_tokens for one in mixed} == {8}
    assert [one.generated_tokens for one in mixed] == [1] * 19 + [2]


def test_progress_counts_earlier_rounds(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elsa_serve.offload.engine.PROGRESS_S", 0.0)
    engine, seen, done = make(prefill_round_tokens=30), [], threading.Event()

    def take(event: Event) -> None:
        if isinstance(event, TokenEvent):
            done.set()
        else:
            seen.append(event.processed_tokens)

    engine.submit(request_of(prompt_of(100), max_tokens=1), take)
    assert done.wait(20)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert {25, 50, 75} <= set(seen)
