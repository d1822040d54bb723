"""Decode passes as CUDA graphs hold them: the same calls on other numbers give the same tokens. What no graph holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import FAMILIES, PLAIN, generate, make_engine, prompt_of, request_of, save_checkpoint, tokens_of

from elsa_serve.offload import graphs
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.graphs import DecodeGraphs
from elsa_serve.protocol import Event, TokenEvent

TOKENS = 40


class Replays:
    """Stands in for a CUDA graph on the CPU: issues the same calls again, and counts."""

    def __init__(self, *_: Any) -> None:
        self.captured = self.replayed = 0

    def __call__(self, issue: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        logits = issue().clone()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            logits.copy_(issue())

        return replay, logits


def with_graphs(engine: OffloadEngine) -> Replays:
    """Give an idle engine on the CPU the graphs that it would have on a GPU."""
    runner = engine._loaded.runner
    runner.graphs = DecodeGraphs(runner._issue, torch.device("cpu"))
    runner.graphs._capturing = replays = Replays()  # type: ignore[assignment]
    return replays


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

    def refuse(issue: Callable[[], torch.Tensor]) -> Any:
        issue()
        raise RuntimeError("operation not permitted when stream is capturing")

    runner.graphs._capturing = refuse  # type: ignore[assignment]
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
