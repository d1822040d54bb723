"""Decode passes as CUDA graphs hold them: the same calls on other numbers give the same tokens. What no graph holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import (
    FAMILIES,
    PLAIN,
    generate,
    make_engine,
    plan_as_for_a_cpu,
    prompt_of,
    request_of,
    save_checkpoint,
    tokens_of,
)  # fmt: skip

from elsa_serve.offload import graphs, loading
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.graphs import DecodeGraphs
from elsa_serve.offload.in_place import RepeatedCalls
from elsa_serve.protocol import Event, TokenEvent
from elsa_serve.stats import Steps

TOKENS = 40


class Replays:
    """Stands in for CUDA graphs on the CPU: issues the same calls again, those of a streamed layer when its weights are
    there, and counts."""

    def __init__(self, around: Callable[[int | None], AbstractContextManager[None]]) -> None:
        self.captured = self.replayed = 0
        self._around = around
        self._inside: AbstractContextManager[None] | None = None  # while a pass is issued again

    def __call__(self, issue: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        logits = issue().clone()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            self._inside = self._around(None)
            self._inside.__enter__()
            logits.copy_(issue())
            self._inside.__exit__(None, None, None)
            self._inside = None

        return replay, logits

    def cut(self, index: int | None) -> None:
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
            self._inside = self._around(index)
            self._inside.__enter__()


def with_graphs(engine: OffloadEngine) -> Replays:
    """Give an idle engine on the CPU the graphs that it would have on a GPU."""
    runner = engine._loaded.runner
    made = DecodeGraphs(runner._issue, torch.device("cpu"), runner._weights, runner._tiers, runner._look)
    runner.graphs, made._capturing = made, Replays(made._around)  # type: ignore[assignment]
    return made._capturing  # type: ignore[return-value]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def engines(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OffloadEngine, OffloadEngine]]:
    """(one that issues every pass, one that replays) with all layers and KV on the device."""
    directory: Path = save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    options = {"resident_layers": 5, "num_speculative_tokens": 0, "gpu_memory": "256MiB"}
    made = tuple(make_engine(directory, **options) for _ in range(2))
    yield made  # type: ignore[misc]
    for engine in made:
        engine.shutdown()


def together(engine: OffloadEngine, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """Tokens of requests that run at the same time."""
    import threading

    events: list[list[Event]] = [[] for _ in prompts]
    over = threading.Semaphore(0)

    def listen(own: list[Event]) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            own.append(event)
            if isinstance(event, TokenEvent) and event.finish_reason is not None:
                over.release()

        return on_event

    for prompt, own in zip(prompts, events):
        engine.submit(request_of(prompt, **sampling), listen(own))
    for _ in prompts:
        assert over.acquire(timeout=60)
    return [tokens_of([event for event in own if isinstance(event, TokenEvent)]) for own in events]


def test_replayed_passes_give_the_same_tokens(engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    plain, replaying = engines
    replays = with_graphs(replaying)
    prompt = prompt_of(70)
    expected = tokens_of(generate(plain, prompt, max_tokens=TOKENS))
    assert tokens_of(generate(replaying, prompt, max_tokens=TOKENS)) == expected
    # the first token comes with the prompt, the second pass is issued once more before it is captured
    assert (replays.captured, replays.replayed) == (1, TOKENS - 2)


def test_requests_in_company_replay_one_graph(engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    plain, replaying = engines
    replays = with_graphs(replaying)
    prompts = [prompt_of(20 + 9 * i, seed=i) for i in range(3)]
    expected = [tokens_of(generate(plain, prompt, max_tokens=TOKENS)) for prompt in prompts]
    assert together(replaying, prompts, max_tokens=TOKENS) == expected
    assert replays.replayed > TOKENS // 2


def test_kv_that_has_grown_by_spans(
    engines: tuple[OffloadEngine, OffloadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several spans a request, the last of which grows: merged, or issued anew where windows forbid it."""
    from elsa_serve.offload import scheduler

    plain, replaying = engines
    for name in ("FIRST_GROWTH", "LAST_GROWTH"):
        monkeypatch.setattr(scheduler, name, 16)
    monkeypatch.setattr(scheduler.Scheduler, "_plenty", lambda *_: False)
    replays = with_graphs(replaying)
    prompt = prompt_of(33, seed=5)
    expected = tokens_of(generate(plain, prompt, max_tokens=TOKENS))
    assert tokens_of(generate(replaying, prompt, max_tokens=TOKENS)) == expected
    windows = "sliding_window" in FAMILIES[plain._loaded.weights.config.model_type]
    assert replays.captured == (1 if windows else 3)


def test_memory_used_again_replays_the_graph_it_has(engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    plain, replaying = engines
    replays = with_graphs(replaying)
    replaying._scheduler.forget_prefixes("")
    for seed in (11, 12):
        prompt = prompt_of(40, seed=seed)
        expected = tokens_of(generate(plain, prompt, max_tokens=10))
        assert tokens_of(generate(replaying, prompt, max_tokens=10)) == expected
        replaying._scheduler.forget_prefixes("")
    assert replays.captured == 1


def test_what_cannot_be_captured_is_issued_and_announced(
    engines: tuple[OffloadEngine, OffloadEngine], caplog: pytest.LogCaptureFixture
) -> None:
    plain, replaying = engines
    with_graphs(replaying)
    runner = replaying._loaded.runner
    assert runner.graphs is not None

    class Refusing(Replays):
        def __call__(self, issue: Callable[[], torch.Tensor]) -> Any:
            issue()
            raise RuntimeError("operation not permitted when stream is capturing")

    runner.graphs._capturing = Refusing(runner.graphs._around)  # type: ignore[assignment]
    prompt = prompt_of(25, seed=3)
    expected = tokens_of(generate(plain, prompt, max_tokens=10))
    assert tokens_of(generate(replaying, prompt, max_tokens=10)) == expected
    assert "issued anew" in caplog.text
    assert not runner.graphs.usable


def test_graphs_are_few(engines: tuple[OffloadEngine, OffloadEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    _, replaying = engines
    with_graphs(replaying)
    monkeypatch.setattr(graphs, "KEPT", 2)
    for length in (20, 30, 40, 50):
        generate(replaying, prompt_of(length, seed=length), max_tokens=5)
    assert replaying._loaded.runner.graphs is not None
    assert len(replaying._loaded.runner.graphs._kept) == 2


SPLIT = {"num_speculative_tokens": 0, "gpu_memory": "1800KiB", "resident_layers": 1, "prefix_caching": False}


@pytest.fixture(scope="module", params=[2, 3])
def split_engines(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OffloadEngine, ...]]:
    """The same two with most layers streamed through so many slots, and most KV in host memory."""
    directory: Path = save_checkpoint("llama", tmp_path_factory.mktemp("split"))
    made = tuple(make_engine(directory, **SPLIT, slots=request.param) for _ in range(2))
    assert made[0].plan.kv_host_tokens > 0
    yield made
    for engine in made:
        engine.shutdown()


def test_passes_that_the_host_attends_are_replayed(split_engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    """Four layers through three slots begin in one of three: a graph for each."""
    plain, replaying = split_engines
    replays = with_graphs(replaying)
    room = plain.plan.kv_gpu_tokens
    prompt = prompt_of(room + 30)
    expected = tokens_of(generate(plain, prompt, max_tokens=TOKENS))
    assert tokens_of(generate(replaying, prompt, max_tokens=TOKENS)) == expected
    slots = plain.plan.slots
    assert replays.captured == (1 if slots == 2 else 3)
    assert replays.replayed == TOKENS - 2
    # Requests in company, of which every one has KV in host memory.
    prompts = [prompt_of(room + 40 + i, seed=i) for i in range(2)]
    expected_of_both = [tokens_of(generate(plain, one, max_tokens=TOKENS)) for one in prompts]
    assert together(replaying, prompts, max_tokens=TOKENS) == expected_of_both


def test_the_hosts_work_is_counted_in_replayed_passes(split_engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    plain, replaying = split_engines
    with_graphs(replaying)
    found = []
    for engine in (plain, replaying):
        steps = Steps()
        engine._sink, kept = steps, engine._sink
        generate(engine, prompt_of(plain.plan.kv_gpu_tokens + 20), max_tokens=8)
        engine._sink = kept
        found.append([(p.host_attention.bytes, p.host_attention.calls) for p in steps.passes if p.host_attention])
    assert len(found[0]) == 7
    assert found[0] == found[1]


def test_a_request_given_up_between_two_graphs_leaves_the_others_right(
    split_engines: tuple[OffloadEngine, OffloadEngine],
) -> None:
    plain, replaying = split_engines
    replays = with_graphs(replaying)
    prompt = prompt_of(plain.plan.kv_gpu_tokens + 25, seed=4)
    events: list[Event] = []
    over = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, TokenEvent) and event.finish_reason is not None:
            over.set()

    def around(index: int | None, inner: Any = replays._around) -> AbstractContextManager[None]:
        if replays.replayed == 3 and index == 2:
            replaying.abort("given-up")
        return inner(index)

    replays._around = around
    replaying.submit(replace(request_of(prompt, max_tokens=TOKENS), request_id="given-up"), on_event)
    assert over.wait(60)
    assert replays.replayed == 3
    expected = tokens_of(generate(plain, prompt, max_tokens=10))
    assert tokens_of(generate(replaying, prompt, max_tokens=10)) == expected


def test_a_host_job_that_fails_in_a_replayed_pass_ends_its_request(
    split_engines: tuple[OffloadEngine, OffloadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, replaying = split_engines
    replays = with_graphs(replaying)
    prompt = prompt_of(plain.plan.kv_gpu_tokens + 25, seed=6)
    end = RepeatedCalls.end

    def failing(calls: RepeatedCalls) -> None:
        if replays.replayed == 2:
            calls.calls.made[1].items[0].status = 3
        end(calls)

    monkeypatch.setattr(RepeatedCalls, "end", failing)
    last = generate(replaying, prompt, max_tokens=TOKENS)[-1]
    assert last.finish_reason == "error"
    assert "failed in one of its threads" in str(last.error)
    monkeypatch.undo()
    expected = tokens_of(generate(plain, prompt, max_tokens=10))
    assert tokens_of(generate(replaying, prompt, max_tokens=10)) == expected


def test_windows_over_kv_in_host_memory_are_issued_and_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_checkpoint("mistral", tmp_path)
    engine = make_engine(directory, **SPLIT)
    try:
        replays = with_graphs(engine)
        generate(engine, prompt_of(engine.plan.kv_gpu_tokens + 20), max_tokens=6)
        assert (replays.captured, replays.replayed) == (0, 0)
        assert caplog.text.count("requests that the host attends are issued anew") == 1
    finally:
        engine.shutdown()


def test_without_a_gpu_no_graph_is_made(engines: tuple[OffloadEngine, OffloadEngine]) -> None:
    assert engines[0]._loaded.runner.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_graphs_on_a_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured for good, beside torch's attention without graphs: one request and three in company, whose KV grows by
    spans where no window forbids their graph.

    Lengths are multiples of 16: Triton builds kernels anew for others, which is most of the time that this test takes.
    """
    from elsa_serve.offload import scheduler

    if family == "llama":
        for name in ("FIRST_GROWTH", "LAST_GROWTH"):
            monkeypatch.setattr(scheduler, name, 16)
        monkeypatch.setattr(scheduler.Scheduler, "_plenty", lambda *_: False)
    directory = save_checkpoint(family, tmp_path)
    options = {"device": "cuda", "gpu_memory": "3GiB", "dtype": "float32"}
    prompts = [prompt_of(32 + 16 * i, seed=i) for i in range(3)]

    def run(**more: Any) -> tuple[list[list[int]], DecodeGraphs | None]:
        engine = make_engine(directory, **PLAIN | options | more)
        try:
            tokens = [tokens_of(generate(engine, prompts[0], max_tokens=TOKENS))]
            tokens += together(engine, prompts, max_tokens=TOKENS)
            made = engine._loaded.runner.graphs
            assert made is None or (made.usable and made._in_spans and len(made._kept) > 1)
            return tokens, made
        finally:
            engine.shutdown()

    replayed, graphs_made = run(attention="elsa")
    expected, none = run()
    assert replayed == expected
    assert graphs_made is not None
    assert none is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "slots", "budget"),
    [("float32", 2, "1400KiB"), ("float32", 3, "1480KiB"), ("float16", 2, "700KiB"), ("float16", 3, "780KiB")],
)
def test_passes_that_the_host_attends_on_a_gpu(
    dtype: str, slots: int, budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs around streamed layers that call the host: the very logits of passes that are issued, also of requests in
    company and of one that gets the memory of another."""
    directory = save_checkpoint("llama", tmp_path)

    def run(graphs: bool) -> tuple[list[Any], list[torch.Tensor], DecodeGraphs | None]:
        monkeypatch.setattr(
            loading, "make_plan", lambda *args, **options: replace(plan_as_for_a_cpu(*args, **options), graphs=graphs)
        )
        options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "slots": slots, "gpu_memory": budget}
        options |= {"context": 256, "chunk_tokens": 64}
        engine = make_engine(directory, **SPLIT | options)
        try:
            found: list[torch.Tensor] = []
            run_pass = engine._loaded.runner.run

            def keeping(parts: Any) -> dict[int, torch.Tensor]:
                rows = run_pass(parts)
                found.extend(rows[id(part)] for part in parts)
                return rows

            engine._loaded.runner.run = keeping  # type: ignore[method-assign]
            room = engine.plan.kv_gpu_tokens
            assert 0 < room < 190
            tokens = [tokens_of(generate(engine, prompt_of(room + 16, seed=i), max_tokens=TOKENS)) for i in range(2)]
            alone = list(found)
            tokens += together(engine, [prompt_of(room + 20 + i, seed=i) for i in range(2)], max_tokens=TOKENS)
            made = engine._loaded.runner.graphs
            assert made is None or (made.usable and made._in_place and len(made._kept) > 1)
            return tokens, alone, made
        finally:
            engine.shutdown()

    replayed, logits, made = run(True)
    expected, plain, none = run(False)
    assert made is not None
    assert none is None
    assert replayed == expected
    assert len(logits) == len(plain) == 2 * TOKENS
    assert all(torch.equal(a, b) for a, b in zip(logits, plain))


@pytest.mark.gpu
def test_captures_share_the_memory_of_their_libraries() -> None:
    """cuBLAS keeps a workspace for each stream: a second engine's captures take no other."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1, 512, device=device, dtype=torch.float16)
    weight = torch.randn(512, 512, device=device, dtype=torch.float16)
    torch.mm(x, weight)
    made, used = [], []
    for _ in range(3):
        replay, out = graphs.Capturing(device)(lambda: torch.mm(x, weight))
        out.zero_()
        replay()
        torch.testing.assert_close(out, torch.mm(x, weight))
        made.append((replay, out))
        used.append(torch.cuda.memory_allocated(device))
    assert used[2] - used[1] < 1 << 20
