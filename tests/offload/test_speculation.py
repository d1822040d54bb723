"""Prompt lookup: good guesses, and tokens that never depend on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import generate, make_engine, plan_as_for_a_cpu, prompt_of, tokens_of
from transformers import LlamaConfig

from elsa_serve.errors import UsageError
from elsa_serve.offload import loading
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.sampling import Sampler
from elsa_serve.offload.scheduler import Sequence
from elsa_serve.offload.speculation import PromptLookup
from elsa_serve.protocol import GenerationRequest, SamplingParams
from elsa_serve.stats import Steps


def lookup(*tokens: int, longest: int = 8) -> PromptLookup:
    return PromptLookup(tokens, 100, longest)


# --- guesses ------------------------------------------------------------------------------------------------------


def test_what_followed_the_longest_match_comes_first_and_the_latest_of_equals() -> None:
    assert lookup(1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 6, 1, 2, 3).draft(2) == [4, 5]
    assert lookup(2, 3, 4, 9, 2, 3, 7, 6, 2, 3).draft(2) == [7, 6]
    assert lookup(1, 2, 3).draft(4) == []
    assert lookup(2, 9, 9, 3, 1, 2).draft(4) == []  # a single token that occurred before is no match
    assert lookup(5).draft(4) == []


def test_a_repetition_goes_on() -> None:
    assert lookup(7, 1, 2, 3, 1, 2, 3, 1, 2).draft(4) == [3, 1, 2, 3]
    assert lookup(4, 4, 4, 4).draft(3) == [4, 4, 4]


def test_output_is_looked_up_too_and_the_limit_holds() -> None:
    words = lookup(1, 2, 3)
    for token in (4, 5, 6, 9, 4, 5):
        words.append(token)
    assert words.draft(1) == [6]
    assert words.draft(0) == []
    assert words.draft(3) == [6, 9, 4]


def test_guesses_grow_while_they_hold_and_shrink_when_they_fail() -> None:
    words = lookup(*range(50), *range(10), longest=12)
    sizes = []
    for drafted, accepted in ((4, 4), (8, 8), (12, 12), (12, 2), (3, 0), (1, 1)):
        assert len(words.draft(50)) == drafted
        sizes.append(drafted)
        words.verified(drafted, accepted)
    assert len(words.draft(50)) == 2


# --- verification -------------------------------------------------------------------------------------------------


class NoText:
    def push(self, token_id: int, last: bool) -> tuple[str, bool]:
        return "", False

    def flush(self) -> str:
        return ""


def sequence(**sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8} | sampling)
    request = GenerationRequest("a", [0], params)
    output: Any = NoText()
    return Sequence(request, lambda event: None, Sampler(params, frozenset(), 0), output, time.monotonic())


def test_the_distribution_is_the_models_whatever_is_drafted() -> None:
    """Over 6,000 seeds, pairs of tokens against their probabilities: chi-squared, 0.999 quantile of 8 degrees."""
    torch.manual_seed(0)
    first, second = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4], [0.3, 0.3, 0.4]])
    expected = (first[:, None] * second).flatten()
    for drafted in (1, 2):
        counts = torch.zeros(9)
        for seed in range(6_000):
            one = sequence(seed=seed)
            taken = one.take(torch.stack([first, second[drafted]]).log(), [drafted], frozenset())
            if len(taken) == 1:  # the guess failed: the next pass computes the row that belongs to what was drawn
                assert one.tokens[1] != drafted
                one.take(second[one.tokens[1]].log()[None], [], frozenset())
            counts[3 * one.tokens[1] + one.tokens[2]] += 1
        assert ((counts - 6_000 * expected) ** 2 / (6_000 * expected)).sum() < 26.12


def test_tokens_end_at_the_first_that_differs_at_the_end_of_text_and_at_the_last() -> None:
    rows = torch.eye(6)[[3, 4, 5, 1]] * 50
    greedy = {"temperature": 0.0}

    def drawn(draft: list[int], eos: frozenset[int] = frozenset(), **params: Any) -> list[tuple[int, str | None]]:
        taken = sequence(**greedy, **params).take(rows[: 1 + len(draft)], draft, eos)
        return [(one.draw.token_id, one.reason) for one in taken]

    assert drawn([3, 4, 5]) == [(3, None), (4, None), (5, None), (1, None)]
    assert drawn([3, 0, 5]) == [(3, None), (4, None)]
    assert drawn([0, 4, 5]) == [(3, None)]
    assert drawn([3, 4, 5], frozenset({4})) == [(3, None), (4, "stop")]
    assert drawn([3, 4, 5], max_tokens=3) == [(3, None), (4, None), (5, "length")]


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["KV on the device", "KV on the host"])
def engines(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[tuple[OffloadEngine, OffloadEngine, Steps]]:
    """With drafts and without."""
    placement = {} if request.param == "KV on the device" else {"context": 200, "gpu_memory": "1000KiB"}
    steps = Steps()
    drafting = make_engine(checkpoint, resident_layers=0, chunk_tokens=16, sink=steps, **placement)
    plain = make_engine(checkpoint, resident_layers=0, chunk_tokens=16, num_speculative_tokens=0, **placement)
    yield drafting, plain, steps
    drafting.shutdown()
    plain.shutdown()


def oracle(*texts: list[int]) -> Callable[[PromptLookup, int], list[int]]:
    """In place of `PromptLookup.draft`: guesses from the known answers, every fifth token of them wrong."""

    def draft(asked: PromptLookup, limit: int) -> list[int]:
        text = asked._tokens[: asked._count].tolist()
        answer = next(known for known in texts if known[: len(text)] == text)
        coming = enumerate(answer[len(text) : len(text) + min(limit, 7)], len(text))
        return [token if place % 5 else 0 for place, token in coming]

    return draft


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 5, "top_k": 40},
        {"temperature": 1.0, "seed": 6, "top_p": 0.9, "logprobs": 2},
        {"temperature": 0.8, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
        {"temperature": 0.0, "min_tokens": 20, "ignore_eos": False, "stop": ("\u0001", "e")},
    ],
    ids=["greedy", "top-k", "logprobs", "penalties", "stop"],
)
def test_tokens_do_not_depend_on_drafts(
    engines: tuple[OffloadEngine, OffloadEngine, Steps], sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting, plain, steps = engines
    steps.passes.clear()
    prompt = prompt_of(40)
    expected = generate(plain, prompt, max_tokens=60, **sampling)
    monkeypatch.setattr(PromptLookup, "draft", oracle([*prompt, *tokens_of(expected)]))
    events = generate(drafting, prompt, max_tokens=60, **sampling)
    assert tokens_of(events) == tokens_of(expected)
    assert [e.text for e in events] == [e.text for e in expected]
    assert [e.finish_reason for e in events] == [e.finish_reason for e in expected]
    for one, other in zip(events, expected):
        if one.logprob is not None and other.logprob is not None:
            assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
    accepted = sum(one.accepted_tokens for one in steps.passes)
    assert sum(one.drafted_tokens for one in steps.passes) > accepted > len(events) // 2
    assert len(steps.passes) == sum(one.generated_tokens for one in steps.passes) - accepted


def test_drafts_of_several_requests_share_a_pass(
    engines: tuple[OffloadEngine, OffloadEngine, Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting, plain, _ = engines
    prompts = [prompt_of(length, seed=length) for length in (30, 5, 17)]
    alone = [tokens_of(generate(plain, prompt, max_tokens=40)) for prompt in prompts]
    monkeypatch.setattr(PromptLookup, "draft", oracle(*(p + t for p, t in zip(prompts, alone))))
    with ThreadPoolExecutor(3) as clients:
        together = list(clients.map(lambda p: tokens_of(generate(drafting, p, max_tokens=40)), prompts))
    assert together == alone


def test_rows_that_are_nobodys_change_no_token(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode passes filled up to 16 rows, as on a GPU: with KV on both tiers, with drafts, and with shared passes."""
    prompts = [prompt_of(length, seed=length) for length in (30, 5, 17)]
    options: dict[str, Any] = {"resident_layers": 0, "chunk_tokens": 16, "context": 200, "gpu_memory": "1000KiB"}
    plain = make_engine(checkpoint, **options, num_speculative_tokens=0)
    alone = [tokens_of(generate(plain, prompt, max_tokens=40)) for prompt in prompts]
    plain.shutdown()
    monkeypatch.setattr(loading, "row_multiple", lambda device_type, dtype: 16)
    filled = make_engine(checkpoint, **options)
    try:
        assert [tokens_of(generate(filled, prompt, max_tokens=40)) for prompt in prompts] == alone
        monkeypatch.setattr(PromptLookup, "draft", oracle(*(p + t for p, t in zip(prompts, alone))))
        with ThreadPoolExecutor(3) as clients:
            together = list(clients.map(lambda p: tokens_of(generate(filled, p, max_tokens=40)), prompts))
        assert together == alone
    finally:
        filled.shutdown()


WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 4096, "head_dim": 128,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "gpu_memory"), [((8, 8), "155MiB"), ((8, 2), "145MiB"), ((8, 2), "600MiB")])
def test_in_16_bits_logits_depend_neither_on_drafts_nor_on_company(
    dtype: str, heads: tuple[int, int], gpu_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a row of a pass of 16 is computed as it would be alone. (Of requests in company where KV is on the
    device alone: they share its room, so that elsewhere other tokens lie on the host.)"""
    monkeypatch.setattr(loading, "make_plan", plan_as_for_a_cpu)
    config = LlamaConfig(num_attention_heads=heads[0], num_key_value_heads=heads[1], **WIDE)
    config.save_pretrained(tmp_path)
    engine = make_engine(
        tmp_path, device="cuda", dtype=dtype, load_format="dummy", context=2048, max_batch=3, resident_layers=2,
        gpu_memory=gpu_memory, host_memory="3GiB", prefix_caching=False, max_num_batched_tokens=4096,
        num_speculative_tokens=15,
    )  # fmt: skip
    prompts = [torch.randint(4096, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1500, 700, 333)]
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 3, "logprobs": 1, "max_tokens": 80}

    def answers(clients: int) -> list[list[tuple[int, float]]]:
        def answer(prompt: list[int]) -> list[tuple[int, float]]:
            events = [event for event in generate(engine, prompt, **sampling) if event.token_id is not None]
            return [(event.token_id, event.logprob.logprob) for event in events if event.logprob is not None]

        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(answer, prompts))

    try:
        on_host = engine.plan.kv_host_bytes > 0
        assert on_host == (gpu_memory != "600MiB")
        monkeypatch.setattr(PromptLookup, "draft", lambda self, limit: [])
        alone = answers(1)
        assert all(len(found) == 80 for found in alone)
        assert on_host or answers(3) == alone
        texts = [[*prompt, *(token for token, _ in found)] for prompt, found in zip(prompts, alone)]
        monkeypatch.setattr(PromptLookup, "draft", oracle(*texts))
        assert answers(1) == alone
    finally:
        engine.shutdown()


@pytest.mark.parametrize("count", [-1, 32])
def test_counts_that_make_no_sense_are_refused(checkpoint: Path, count: int) -> None:
    with pytest.raises(UsageError, match=f"--num-speculative-tokens is {count}"):
        make_engine(checkpoint, num_speculative_tokens=count)


def test_all_resident_means_no_drafts_unless_asked(checkpoint: Path) -> None:
    for options, expected in (({}, 0), ({"num_speculative_tokens": 3}, 3), ({"resident_layers": 0}, 15)):
        engine = make_engine(checkpoint, **options)
        assert engine._draft_tokens == expected
        engine.shutdown()
