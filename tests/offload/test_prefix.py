"""The prefix cache: what is found, what is given up first, and tokens that never depend on it."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_models import (
    PLAIN,
    generate,
    plan_as_for_a_cpu,
    prompt_of,
    request_of,
    tokens_of,
)

from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.kv import KVPool, KVShape, RequestKV
from elsa_serve.offload.prefix import BLOCK_TOKENS, PrefixCache, chain
from elsa_serve.offload.scheduler import Sequence
from elsa_serve.protocol import Event, GenerationRequest, TokenEvent
from elsa_serve.stats import Gauges, Preempted, PrefixLookup, Record, StepStats

SHAPE = KVShape(layers=2, kv_heads=1, head_dim=64, dtype=torch.float32)
B = BLOCK_TOKENS


def digests_of(tokens: list[int], root: bytes = b"model") -> list[bytes]:
    known: list[bytes] = []
    chain(root, known, tokens, len(tokens))
    return known


def pool(gpu_tokens: int, host_tokens: int = 0, disk_tokens: int = 0) -> KVPool:
    sizes = (SHAPE.layers * SHAPE.block_nbytes(n) for n in (gpu_tokens, host_tokens, disk_tokens))
    gpu, host, disk = (torch.zeros(n, dtype=torch.uint8) for n in sizes)
    return KVPool(SHAPE, gpu, host, disk=disk if disk_tokens else None)


class Texts:
    """Requests over a pool and its cache, as the scheduler runs them."""

    def __init__(self, gpu_tokens: int, host_tokens: int = 0, disk_tokens: int = 0) -> None:
        self.pool = pool(gpu_tokens, host_tokens, disk_tokens)
        self.cache = PrefixCache(self.pool, "model")

    def digests(self, tokens: list[int]) -> list[bytes]:
        return digests_of(tokens, self.cache.root)

    def run(self, tokens: list[int], shared: tuple[RequestKV | None, int] = (None, 0)) -> RequestKV:
        kv = self.pool.allocate(len(tokens), *shared)
        assert kv is not None
        kv.length = len(tokens)
        self.cache.publish(kv, self.digests(tokens))
        return kv

    def hit(self, tokens: list[int]) -> int:
        return self.cache.match(self.digests(tokens), len(tokens) - 1)[1]


# --- names --------------------------------------------------------------------------------------------------------


def test_a_digest_stands_for_the_model_and_every_token_before() -> None:
    tokens = list(range(3 * B + 5))
    whole = digests_of(tokens)
    assert len(whole) == 3
    assert digests_of(tokens[: 2 * B]) == whole[:2]
    changed = [7, *tokens[1:]]
    assert not set(digests_of(changed)) & set(whole)
    assert digests_of([*tokens[: 2 * B], 0, *tokens[2 * B + 1 :]])[:2] == whole[:2]
    assert not set(digests_of(tokens, b"another model")) & set(whole)
    known = whole[:1]
    chain(b"model", known, tokens, 2 * B + 3)
    assert known == whole[:2]


# --- the cache ----------------------------------------------------------------------------------------------------


def test_running_and_ended_requests_offer_their_full_blocks() -> None:
    texts, document = Texts(1000), list(range(3 * B))
    kv = texts.run([*document, 1, 2])
    assert texts.hit([*document, 9]) == 3 * B
    assert texts.hit(document) == 2 * B  # at least one token is to be computed
    assert texts.hit([*document[: 2 * B], 5, 5]) == 2 * B
    assert texts.hit([4, *document]) == 0
    texts.cache.keep(kv)
    assert texts.hit([*document, 9]) == 3 * B
    assert texts.cache.reclaim()
    assert texts.hit([*document, 9]) == 0
    assert not texts.cache.reclaim()
    assert texts.pool.arenas["gpu"].used_bytes == 0


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning() -> None:
    texts = Texts(1000)
    first, second = [1] * 2 * B, [2] * 2 * B
    one = texts.run(first)
    assert texts.pool.extend(one, 4 * B)
    longer = first + [3] * 2 * B
    one.length = 4 * B
    texts.cache.publish(one, texts.digests(longer))
    texts.cache.keep(one)
    texts.cache.keep(texts.run(second))
    assert texts.hit([*longer, 0]) == 4 * B  # used again: now `second` is the older
    assert texts.cache.reclaim()
    assert texts.hit([*second, 0]) == 0
    assert texts.cache.reclaim()
    assert texts.hit([*longer, 0]) == 2 * B
    assert texts.cache.reclaim()
    assert texts.hit([*longer, 0]) == 0


def test_what_another_entry_holds_too_is_not_kept_twice() -> None:
    texts, document = Texts(1000), list(range(4 * B))
    one, two = texts.run(document), texts.run(document)
    texts.cache.keep(one)
    texts.cache.keep(two)
    assert texts.cache.kept() == 1
    longer = texts.run([*document, *document], texts.cache.match(texts.digests([*document, 1]), 4 * B))
    texts.cache.keep(longer)
    assert texts.cache.kept() == 1
    assert texts.hit([*document, *document, 1]) == 8 * B
    texts.cache.clear()
    assert texts.pool.arenas["gpu"].used_bytes == 0


def test_a_request_that_takes_kv_over_offers_what_it_still_has() -> None:
    texts, document = Texts(1000), list(range(4 * B))
    texts.cache.keep(texts.run(document))
    kv, shared = texts.cache.match(texts.digests(document), 2 * B)
    assert kv is not None
    texts.cache.adopt(kv, shared)
    assert texts.hit([*document, 1]) == 2 * B
    texts.cache.forget(kv)
    assert texts.hit([*document, 1]) == 0


def test_the_device_is_cleared_for_a_request_and_given_back_to_what_it_reads_again() -> None:
    texts = Texts(gpu_tokens=4 * B, host_tokens=4 * B)
    texts.cache.keep(texts.run([1] * 4 * B))
    old = texts.cache.match(texts.digests([1] * 4 * B), 4 * B)[0]
    texts.cache.prepare(None, 0, 4 * B)
    assert old is not None
    assert old.split == 0
    texts.cache.keep(texts.run([2] * 4 * B))
    texts.cache.prepare(*texts.cache.match(texts.digests([1] * 4 * B), 4 * B), 0)
    assert old.split == 4 * B  # after the other was given up, for which the host had no room
    assert texts.hit([2] * 5 * B) == 0


def test_host_memory_goes_to_disk_before_anything_is_given_up() -> None:
    texts = Texts(gpu_tokens=0, host_tokens=4 * B, disk_tokens=4 * B)
    first, second, third = ([i] * 2 * B for i in range(3))
    texts.cache.keep(texts.run(first))
    texts.cache.keep(texts.run(second))
    for tiers in ({"host": 2, "disk": 2}, {"host": 0, "disk": 4}):
        assert texts.cache.reclaim()
        block = SHAPE.layers * SHAPE.block_nbytes(B)
        held = {tier: nbytes // block for tier, nbytes in texts.pool.cached_bytes().items()}
        assert held == {"gpu": 0} | tiers
    assert [texts.hit([*text, 9]) for text in (first, second)] == [2 * B, 2 * B]
    texts.cache.keep(texts.run(third))
    assert texts.cache.reclaim()  # the disk is full: the oldest goes
    assert texts.cache.reclaim()  # and makes room for what lies in host memory
    assert [texts.hit([*text, 9]) for text in (first, second, third)] == [0, 2 * B, 2 * B]
    assert texts.pool.cached_bytes()["host"] == 0


# --- the engine ---------------------------------------------------------------------------------------------------


class Sink:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def record(self, *stats: Record) -> None:
        self.records += stats

    def of(self, kind: type) -> list[Any]:
        return [one for one in self.records if isinstance(one, kind)]


@pytest.fixture
def make(make: Callable[..., OffloadEngine]) -> Callable[..., OffloadEngine]:
    return functools.partial(make, num_speculative_tokens=0)


PLACEMENTS = {"device": {"context": 500}, "host": {"context": 300, "gpu_memory": "1100KiB"}}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_follow_up_questions_start_from_the_document(make: Any, placement: str) -> None:
    sink = Sink()
    engine = make(sink=sink, **PLACEMENTS[placement])
    plain = make(prefix_caching=False, **PLACEMENTS[placement])
    document = prompt_of(3 * B + 11)
    for question in range(4):
        prompt = [*document, *prompt_of(9 + question, seed=question + 1)]
        events = generate(engine, prompt, max_tokens=8)
        assert tokens_of(events) == tokens_of(generate(plain, prompt, max_tokens=8))
        assert events[-1].cached_tokens == (3 * B if question else 0)
    other = prompt_of(2 * B, seed=99)
    assert tokens_of(generate(engine, other)) == tokens_of(generate(plain, other))
    lookups = sink.of(PrefixLookup)
    assert [(one.tokens, one.hits) for one in lookups] == [
        (212, 0), (213, 3 * B), (214, 3 * B), (215, 3 * B), (2 * B, 0)
    ]  # fmt: skip
    computed = [one.prompt_tokens for one in sink.of(StepStats) if one.phase == "prefill"]
    assert computed == [tokens - hits for tokens, hits in ((one.tokens, one.hits) for one in lookups)]
    gauges = sink.of(Gauges)[-1]
    assert set(gauges.kv_used_bytes.values()) == {0}
    assert sum(gauges.kv_cached_bytes.values()) > 0


def test_a_conversation_goes_on_from_its_answers(make: Any) -> None:
    engine, plain = make(), make(**PLAIN)
    text = prompt_of(50)
    for turn in range(3):
        events = generate(engine, text, max_tokens=40)
        assert tokens_of(events) == tokens_of(generate(plain, text, max_tokens=40))
        assert events[-1].cached_tokens == max(0, (len(text) - 10 - 1) // B * B) * bool(turn)
        text = [*text, *tokens_of(events), *prompt_of(10, seed=turn)]


def test_requests_that_arrive_together_share_the_document_once(make: Any) -> None:
    """The first computes it, in rounds; the others wait for that rather than compute it again."""
    sink = Sink()
    engine = make(sink=sink, max_batch=8, prefill_round_tokens=96, max_num_batched_tokens=48)
    plain = make(**PLAIN)
    document = prompt_of(5 * B)
    prompts = [[*document, *prompt_of(7, seed=i)] for i in range(6)]
    results, done = run_together(engine, prompts, max_tokens=12)
    assert all(event.wait(30) for event in done)
    assert results == [tokens_of(generate(plain, prompt, max_tokens=12)) for prompt in prompts]
    assert [one.hits for one in sink.of(PrefixLookup)] == [0, *[5 * B] * 5]
    used = [sum(one.kv_used_bytes.values()) for one in sink.of(Gauges)]
    assert max(used) < 3 * engine.plan.geometry.kv_bytes(len(prompts[0]) + 300)


def run_together(
    engine: OffloadEngine, prompts: list[list[int]], **sampling: Any
) -> tuple[list[list[int]], list[threading.Event]]:
    return submit_all(engine, [request_of(prompt, **sampling) for prompt in prompts])[:2]


def submit_all(
    engine: OffloadEngine, requests: list[GenerationRequest]
) -> tuple[list[list[int]], list[threading.Event], list[str]]:
    """Tokens of each request as they come, events that say when all are there, and the reasons of the ends."""
    ends: list[str] = []
    results: list[list[int]] = [[] for _ in requests]
    done = [threading.Event() for _ in requests]

    def listener(index: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            if isinstance(event, TokenEvent):
                results[index] += [event.token_id] if event.token_id is not None else []
                if event.finish_reason is not None:
                    ends.append(event.finish_reason)
                    done[index].set()

        return take

    for index, request in enumerate(requests):
        engine.submit(request, listener(index))
    return results, done, ends


@pytest.mark.parametrize("end", ["cancelled", "timeout"])
def test_a_retry_goes_on_where_the_prompt_was_stopped(make: Any, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Stopped in the fourth round of seven, in its last chunk of the first layer: three rounds are whole."""
    engine = make(prefill_round_tokens=B)
    prompt = prompt_of(7 * B)
    expected = tokens_of(generate(make(), prompt))
    request = request_of(prompt)
    ending, chunks, late = Sequence.ending, [], []
    monkeypatch.setattr(Sequence, "ending", lambda self: "timeout" if late else ending(self))

    def stop(*_: Any) -> None:
        chunks.append(1)
        if len(chunks) == 4 * 4:  # four chunks a round
            late.append(1) if end == "timeout" else engine.abort(request.request_id)

    hook = engine._loaded.weights.decoder_layers[0].mlp.register_forward_hook(stop)
    _, done, ends = submit_all(engine, [request])
    assert done[0].wait(20)
    hook.remove()
    late.clear()
    assert ends == [end]
    events = generate(engine, prompt)
    assert tokens_of(events) == expected
    assert events[-1].cached_tokens == 3 * B


def test_a_request_that_failed_leaves_nothing_to_others(make: Any) -> None:
    engine = make()
    prompt = prompt_of(2 * B)
    hook = engine._loaded.weights.model.lm_head.register_forward_hook(lambda m, a, out: out * torch.nan)
    assert generate(engine, prompt)[-1].finish_reason == "error"
    hook.remove()
    events = generate(engine, prompt)
    assert events[-1].finish_reason == "length"
    assert events[-1].cached_tokens == 0


# --- growth and preemption ----------------------------------------------------------------------------------------


def test_kv_is_taken_at_once_where_there_is_plenty(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", 16)
    sink = Sink()
    engine = make(sink=sink, gpu_memory="64MiB", max_batch=2)
    generate(engine, prompt_of(20), max_tokens=60)
    used = {sum(one.kv_used_bytes.values()) for one in sink.of(Gauges)}
    assert used == {0, engine.plan.geometry.kv_bytes(79)}
    assert not engine._scheduler._plenty(512, 512)  # as much again for the other of the batch: more than there is


def test_kv_grows_with_the_output(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", 16)
    monkeypatch.setattr("elsa_serve.offload.scheduler.Scheduler._plenty", lambda *_: False)
    sink = Sink()
    engine = make(sink=sink)
    expected = tokens_of(generate(make(**PLAIN), prompt_of(20), max_tokens=120))
    assert tokens_of(generate(engine, prompt_of(20), max_tokens=120)) == expected
    used = [sum(one.kv_used_bytes.values()) for one in sink.of(Gauges)]
    growth = sorted(set(used))
    assert growth[0] == 0
    assert growth[1] == engine.plan.geometry.kv_bytes(36)
    assert len(growth) > 4


@pytest.mark.parametrize("caching", [True, False])
def test_the_youngest_gives_way_and_every_request_ends_with_its_tokens(
    make: Any, monkeypatch: pytest.MonkeyPatch, caching: bool
) -> None:
    """Six requests, of which three at their ends would fill the memory."""
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", 16)
    sink = Sink()
    memory = {"gpu_memory": "900KiB", "host_memory": "900KiB"}  # 360 tokens of KV
    engine = make(sink=sink, context=150, max_batch=6, prefix_caching=caching, **memory)
    prompts = [prompt_of(30 + i, seed=i) for i in range(6)]
    plain = make(**PLAIN)
    expected = [tokens_of(generate(plain, prompt, max_tokens=55)) for prompt in prompts]
    results, done = run_together(engine, prompts, max_tokens=55)
    assert all(event.wait(60) for event in done)
    assert results == expected
    assert sum(one.requests for one in sink.of(Preempted)) > 0
    assert set(engine.stats().kv_used_bytes.values()) == {0}


def test_a_request_without_a_limit_leaves_room_for_others(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat without max_tokens may fill the context; until it does, others run beside it."""
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", 16)
    engine = make(context=400, gpu_memory="1700KiB", host_memory="900KiB", max_batch=4)  # 709 tokens of KV
    seen = []
    prompts = [prompt_of(20, seed=i) for i in range(4)]
    results, done = run_together(engine, prompts, max_tokens=380)
    while not all(results):
        seen.append(engine.stats().running)
        time.sleep(0.002)
    assert max(seen) == 4
    engine.shutdown()
    assert all(event.wait(20) for event in done)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("device", DEVICES)
def test_any_mixture_of_requests_gives_the_tokens_of_each_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch, seed: int, device: str
) -> None:
    """Random prompts with shared beginnings, lengths, samplings, arrivals, cancels and limits, all features on."""
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)
    random.seed(seed)
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", random.choice([16, 64]))
    engine = make(
        context=300,
        max_batch=random.randint(2, 6),
        gpu_memory=random.choice(["1100KiB", "2MiB"]),
        host_memory=random.choice(["850KiB", "1500KiB"]),
        prefill_round_tokens=random.choice([40, 100, 300]),
        max_num_batched_tokens=random.choice([16, 64]),
        num_speculative_tokens=random.choice([0, 4, 15]),
        max_queue=100,
        device=device,
    )
    oracle = PLAIN if device == "cpu" else {"prefix_caching": False}
    plain = make(**oracle, context=300, device=device)
    documents = [prompt_of(n, seed=n) for n in (70, 130, 200)]
    cases = []
    for i in range(14):
        prompt = [*random.choice([[], *documents]), *prompt_of(random.randint(1, 40), seed=i)]
        sampling = {"max_tokens": random.randint(1, 50), "temperature": random.choice([0.0, 0.8]), "seed": i}
        cases.append((prompt, sampling, random.random() < 0.25))
    expected = [tokens_of(generate(plain, prompt, **sampling)) for prompt, sampling, _ in cases]
    results: list[list[int]] = []
    done: list[threading.Event] = []
    for prompt, sampling, cancelled in cases:
        request = request_of(prompt, **sampling)
        tokens, events, _ = submit_all(engine, [request])
        results += tokens
        done += events
        if cancelled:
            time.sleep(random.random() * 0.05)
            engine.abort(request.request_id)
        time.sleep(random.random() * 0.03)
    assert all(event.wait(60) for event in done)
    for (_, _, cancelled), tokens, alone in zip(cases, results, expected):
        assert tokens == (alone[: len(tokens)] if cancelled else alone)
    assert set(engine.stats().kv_used_bytes.values()) == {0}
