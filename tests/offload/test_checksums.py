"""ELSA_CHECKSUMS=1: a changed bit of KV, on any tier, ends the requests that would have read it, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import generate, plan_as_for_a_cpu, prompt_of, request_of, tokens_of

from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.kv import Tier
from elsa_serve.protocol import Event, GenerationRequest, TokenEvent

# As much as a tier before leaves for the next: all of the KV on the device, most in host memory, most on disk.
TIERS: dict[Tier, dict[str, Any]] = {
    "gpu": {},
    "host": {"gpu_memory": "900KiB", "context": 200},
    "disk": {"gpu_memory": "900KiB", "context": 200, "host_memory": "610KiB", "kv_disk": "2MiB"},
}


@pytest.fixture(autouse=True)
def checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSA_CHECKSUMS", "1")


def flip(engine: OffloadEngine, tokens: list[int], tier: Tier, layer: int = 2) -> None:
    """One bit of the values of the first token that a running request, known by its prompt, has on that tier."""
    (kv,) = (s.kv for s in engine._scheduler.running() if s.tokens[: len(tokens)] == tokens)
    assert kv is not None
    extent = next(span.extent for span in kv.spans if span.extent.tier == tier)
    words = extent.layers[layer][1, 0, 0].view(torch.int32)
    words[3] ^= 1 << 7


class Flips:
    """A listener that flips the bit when its request has had three tokens."""

    def __init__(self, engine: OffloadEngine, request: GenerationRequest, tier: Tier) -> None:
        self.engine, self.request, self.tier = engine, request, tier
        self.tokens: list[int] = []
        self.error: str | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.error = event.error
            self.tokens += [event.token_id] if event.token_id is not None else []
            if len(self.tokens) == 3 and event.finish_reason is None:
                flip(self.engine, list(self.request.prompt_token_ids), self.tier)


@pytest.mark.parametrize("speculative", [0, 8])
@pytest.mark.parametrize("tier", TIERS)
def test_a_flipped_bit_ends_its_own_request(
    make: Any, device: str, tier: Tier, speculative: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)
    plain = make(**TIERS[tier], device=device, prefix_caching=False, num_speculative_tokens=0)
    prompts = [prompt_of(90, seed=1), prompt_of(40, seed=2)]
    expected = [tokens_of(generate(plain, prompt, max_tokens=16)) for prompt in prompts]
    engine = make(**TIERS[tier], device=device, num_speculative_tokens=speculative)
    request = request_of(prompts[0], max_tokens=16)
    bad = Flips(engine, request, tier)
    engine.submit(request, bad)
    assert tokens_of(generate(engine, prompts[1], max_tokens=16)) == expected[1]
    assert "layer 2, " + {"gpu": "on the device", "host": "in host memory", "disk": "on disk"}[tier] in (
        bad.error or ""
    )
    assert 3 <= len(bad.tokens) < 16
    assert bad.tokens == expected[0][: len(bad.tokens)]
    # Its KV is not kept: the same request again is computed anew, and gets its tokens.
    again = generate(engine, prompts[0], max_tokens=16)
    assert again[-1].cached_tokens == 0
    assert tokens_of(again) == expected[0]
    assert engine.stats().state == "ready"


def test_a_cached_prefix_that_changed_is_used_once_at_most(make: Any) -> None:
    engine = make()
    document = prompt_of(150)
    expected = tokens_of(generate(engine, [*document, 7], max_tokens=5))
    (entry,) = engine._scheduler._cache._entries.values()
    entry.kv.spans[0].extent.layers[4][0, 1, 100] += 1.0
    (failed,) = generate(engine, [*document, 8], max_tokens=5)
    assert "token 100 in layer 4" in (failed.error or "")
    again = generate(engine, [*document, 7], max_tokens=5)
    assert again[-1].cached_tokens == 0
    assert tokens_of(again) == expected


def test_what_never_changed_is_never_found_changed(make: Any) -> None:
    """Shared beginnings, guesses taken back, KV that moves between the tiers, a batch that waits for memory."""
    options = {"gpu_memory": "1100KiB", "context": 300, "prefill_round_tokens": 48, "max_batch": 3}
    document = prompt_of(130)
    prompts = [[*document, *prompt_of(5 + i, seed=i)] for i in range(5)]
    plain = make(**options, prefix_caching=False, num_speculative_tokens=0)
    expected = [tokens_of(generate(plain, prompt, max_tokens=20)) for prompt in prompts]
    engine = make(**options, num_speculative_tokens=8)
    for _ in range(2):
        results: list[list[int]] = [[] for _ in prompts]
        for prompt, tokens in zip(prompts[1:], results[1:]):
            engine.submit(request_of(prompt, max_tokens=20), lambda event, tokens=tokens: take(event, tokens))
        results[0] = tokens_of(generate(engine, prompts[0], max_tokens=20))
        wait(engine)
        assert results == expected


def take(event: Event, tokens: list[int]) -> None:
    if isinstance(event, TokenEvent) and event.token_id is not None:
        tokens.append(event.token_id)


def wait(engine: OffloadEngine) -> None:
    with engine._work:
        assert engine._work.wait_for(engine._scheduler.idle, 60.0)
