"""The engine as a server sees it: events, refusals, cancellation, failures, metrics that add up."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import (
    generate,
    make_config,
    make_engine,
    prompt_of,
    reference,
    request_of,
    text_of,
    tokens_of,
)

from elsa_serve.errors import (
    BudgetError,
    CheckpointError,
    ContextTooLong,
    EngineDraining,
    EngineFailed,
    QueueFull,
    UsageError,
)
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.protocol import Event, PrefillProgress, TokenEvent
from elsa_serve.stats import (
    Gauges,
    InterTokenLatency,
    Record,
    RequestFinished,
    RequestReceived,
    RequestRejected,
    StepStats,
)

WAIT = 30.0


class Sink:
    """Keeps records, and checks after every call that received = finished + running + waiting."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.wrong: list[Gauges] = []

    def record(self, *stats: Record) -> None:
        self.records += stats
        gauges = self.of(Gauges)[-1]  # the engine records its state before anything else
        open_requests = gauges.running_prefill + gauges.running_decode + gauges.waiting
        if len(self.of(RequestReceived)) - len(self.of(RequestFinished)) != open_requests:
            self.wrong.append(gauges)

    def of(self, kind: type) -> list[Any]:
        return [r for r in self.records if isinstance(r, kind)]


class Listener:
    """Collects a request's events; `on` runs on each, on the engine's thread."""

    def __init__(self, on: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[TokenEvent] = []
        self.progress: list[PrefillProgress] = []
        self.first, self.done = threading.Event(), threading.Event()
        self.on = on

    def __call__(self, event: Event) -> None:
        if isinstance(event, PrefillProgress):
            self.progress.append(event)
        else:
            assert not self.done.is_set(), "an event after the last"
            self.events.append(event)
            self.first.set()
            if event.finish_reason is not None:
                self.done.set()
        self.on(event)

    def end(self) -> TokenEvent:
        assert self.done.wait(WAIT)
        return self.events[-1]


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[OffloadEngine]:
    """One engine for the tests that leave it as it was."""
    engine = make_engine(checkpoint, resident_layers=0, chunk_tokens=16)
    yield engine
    engine.shutdown()


def slow_layers(engine: OffloadEngine, seconds: float) -> None:
    for layer in engine._loaded.weights.decoder_layers:
        layer.mlp.register_forward_hook(lambda *_: time.sleep(seconds))


# --- answers ------------------------------------------------------------------------------------------------------


def test_info_says_what_runs(shared: OffloadEngine) -> None:
    info = shared.info
    assert (info.max_context, info.vocab_size, info.dtype, info.attention) == (512, 384, "float32", "elsa")
    assert info.name == shared._options.model_dir.name


def test_eos_ends_with_stop_and_shows_no_text(shared: OffloadEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(shared, prompt_of(20), max_tokens=8)
    eos = tokens_of(free)[4]
    first = tokens_of(free).index(eos)
    monkeypatch.setattr(shared._loaded, "eos_ids", frozenset({eos}))
    events = generate(shared, prompt_of(20), max_tokens=8, ignore_eos=False)
    assert tokens_of(events) == tokens_of(free)[: first + 1]
    assert events[-1].finish_reason == "stop"
    assert events[-1].text in ("", "\ufffd", "\ufffd\ufffd")  # at most an unfinished character, flushed
    longer = generate(shared, prompt_of(20), max_tokens=8, ignore_eos=False, min_tokens=7)
    assert len(tokens_of(longer)) >= 7
    assert eos not in tokens_of(longer)[:7]


def test_stop_tokens_end_the_text_and_have_neither_text_nor_logprob(shared: OffloadEngine) -> None:
    free = generate(shared, prompt_of(20), max_tokens=8)
    stop = tokens_of(free)[4]
    first = tokens_of(free).index(stop)
    events = generate(shared, prompt_of(20), max_tokens=8, stop_token_ids=(stop,), logprobs=1)
    assert tokens_of(events) == tokens_of(free)[: first + 1]
    assert (events[-1].finish_reason, events[-1].text, events[-1].logprob, events[-1].top_logprobs) == (
        "stop",
        "",
        None,
        (),
    )
    assert all(event.logprob is not None for event in events[:-1])


def test_a_stop_string_is_cut_out_of_the_text(shared: OffloadEngine) -> None:
    whole = text_of(generate(shared, prompt_of(20), max_tokens=24))
    stop = whole[6:9]
    events = generate(shared, prompt_of(20), max_tokens=24, stop=(stop,))
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(tokens_of(events)) < 24


def test_text_is_the_decoded_tokens(shared: OffloadEngine) -> None:
    events = generate(shared, prompt_of(20), max_tokens=30)
    decoded = shared.tokenizer.decode([*prompt_of(20), *tokens_of(events)], skip_special_tokens=True)
    assert decoded.endswith(text_of(events))
    assert len(text_of(events)) > 5


def test_logprobs_are_those_of_transformers(shared: OffloadEngine) -> None:
    prompt = prompt_of(25)
    events = generate(shared, prompt, max_tokens=5, logprobs=3, temperature=0.8, seed=4, top_k=5)
    tokens = tokens_of(events)
    with torch.inference_mode():
        logits = reference("llama")(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    for event, row in zip(events, expected):
        assert event.logprob is not None
        assert event.logprob.token_id == event.token_id
        assert event.logprob.logprob == pytest.approx(row[event.token_id].item(), abs=1e-4)
        assert [t.token_id for t in event.top_logprobs] == row.topk(3).indices.tolist()
        assert [t.logprob for t in event.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert event.logprob.text == shared.tokenizer.decode([event.token_id])


def test_a_seed_gives_the_same_text_alone_and_in_company(shared: OffloadEngine) -> None:
    def draw(seed: int) -> list[int]:
        return tokens_of(generate(shared, prompt_of(12), max_tokens=10, temperature=1.0, seed=seed))

    alone = draw(11)
    assert draw(12) != alone
    company = [Listener() for _ in range(3)]
    for i, listener in enumerate(company):
        shared.submit(request_of(prompt_of(30 + i, seed=i), max_tokens=25, temperature=1.0), listener)
    assert draw(11) == alone
    assert all(listener.end().finish_reason == "length" for listener in company)


def test_progress_of_a_long_prompt_grows_to_the_whole(
    make: Callable[..., OffloadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elsa_serve.offload.engine.PROGRESS_S", 0.0)
    engine, listener = make(), Listener()
    engine.submit(request_of(prompt_of(100), max_tokens=1), listener)
    listener.end()
    done = [p.processed_tokens for p in listener.progress]
    assert done == sorted(done)
    assert done[-1] == 100
    assert len(done) > 10
    assert {p.total_tokens for p in listener.progress} == {100}


def test_progress_is_throttled(make: Callable[..., OffloadEngine]) -> None:
    engine, listener = make(), Listener()
    engine.submit(request_of(prompt_of(100), max_tokens=1), listener)
    listener.end()
    assert len(listener.progress) <= 3


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "message"),
    [
        (prompt_of(510), {"max_tokens": 3}, ContextTooLong, r"maximum context length is 512 tokens.* 513 tokens"),
        ([], {}, UsageError, "empty"),
        ([1, 384], {}, UsageError, "outside 0 … 383"),
        ([1], {"max_tokens": 0}, UsageError, "max_tokens is 0"),
        ([1], {"temperature": -1.0}, UsageError, "temperature is -1"),
        ([1], {"logit_bias": ((384, 1.0),)}, UsageError, "logit_bias has token ids outside 0 … 383"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    shared: OffloadEngine, prompt: list[int], sampling: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shared.submit(request_of(prompt, **sampling), Listener())


def test_an_id_in_use_is_refused(make: Callable[..., OffloadEngine]) -> None:
    engine, listener = make(), Listener()
    slow_layers(engine, 0.02)
    request = request_of(prompt_of(5), max_tokens=3)
    engine.submit(request, listener)
    with pytest.raises(UsageError, match="already under way"):
        engine.submit(request, Listener())
    assert listener.end().finish_reason == "length"
    again = Listener()
    engine.submit(request, again)
    assert again.end().finish_reason == "length"


def test_a_full_queue_refuses_and_recovers(make: Callable[..., OffloadEngine]) -> None:
    sink = Sink()
    engine = make(max_batch=1, max_queue=2, sink=sink)
    slow_layers(engine, 0.02)
    listeners = [Listener() for _ in range(3)]
    engine.submit(request_of(prompt_of(5), max_tokens=3), listeners[0])
    assert listeners[0].first.wait(WAIT)
    for listener in listeners[1:]:
        engine.submit(request_of(prompt_of(5), max_tokens=3), listener)
    with pytest.raises(QueueFull) as caught:
        engine.submit(request_of(prompt_of(5)), Listener())
    assert caught.value.retry_after_s >= 1.0
    assert [r.reason for r in sink.of(RequestRejected)] == ["queue_full"]
    assert all(listener.end().finish_reason == "length" for listener in listeners)
    assert generate(engine, prompt_of(5))[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpu_memory": "100KiB"}, BudgetError, "--gpu-memory"),
        ({"context": 5000}, BudgetError, "maximum of 1024"),
        ({"gpu_memory": "lots"}, UsageError, "not a size"),
        ({"dtype": "float8"}, UsageError, "unknown dtype 'float8'"),
        ({"attention": "flash"}, UsageError, "unknown attention 'flash'; known: elsa, sdpa"),
        ({"slots": 1}, BudgetError, "--slots 1"),
        ({"host_threads": 0}, UsageError, "--host-threads 0"),
        ({"gpu_memory": "900KiB", "host_memory": "500KiB", "kv_disk": "1EiB"}, UsageError, "not a size"),
    ],
)
def test_options_that_cannot_work_are_refused(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_engine(checkpoint, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", *["linear_attention"] * 4]}, "linear_attention"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"num_kv_shared_layers": 2}, "share their KV"),
    ],
)
def test_models_that_would_be_wrong_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = make_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        make_engine(tmp_path, load_format="dummy")


def test_sdpa_refuses_a_model_with_softcap(tmp_path: Path) -> None:
    make_config("gemma2").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="caps its attention logits"):
        make_engine(tmp_path, load_format="dummy", attention="sdpa")


def test_a_checkpoint_without_tokenizer_is_refused_but_a_dummy_runs(tmp_path: Path) -> None:
    reference("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        make_engine(tmp_path)
    engine = make_engine(tmp_path, load_format="dummy")
    try:
        events = generate(engine, engine.tokenizer.encode("hello"), max_tokens=4)
        assert events[-1].finish_reason == "length"
        assert text_of(events) == engine.tokenizer.decode(tokens_of(events))
    finally:
        engine.shutdown()


# --- cancelling ---------------------------------------------------------------------------------------------------


def test_cancelling_in_the_middle_of_a_prefill(make: Callable[..., OffloadEngine]) -> None:
    sink = Sink()
    engine = make(sink=sink)
    before = tokens_of(generate(engine, prompt_of(30)))
    slow_layers(engine, 0.05)
    listener = Listener()
    request = request_of(prompt_of(160), max_tokens=4)  # 10 chunks × 5 layers × 50 ms = 2.5 s
    start = time.monotonic()
    engine.submit(request, listener)
    while engine.stats().running == 0:
        time.sleep(0.005)
    time.sleep(0.2)
    assert engine.abort(request.request_id)
    end = listener.end()
    assert time.monotonic() - start < 1.5
    assert (end.finish_reason, end.token_id) == ("cancelled", None)
    assert not engine.abort(request.request_id)
    assert set(engine.stats().kv_used_bytes.values()) == {0}
    assert tokens_of(generate(engine, prompt_of(30), max_tokens=3)) == before[:3]
    assert [r.outcome for r in sink.of(RequestFinished)] == ["length", "cancelled", "length"]
    assert not sink.wrong


def test_cancelling_one_of_several_that_decode(make: Callable[..., OffloadEngine]) -> None:
    engine = make()
    alone = tokens_of(generate(engine, prompt_of(10), max_tokens=30))
    stays, goes = Listener(), Listener()
    leaving = request_of(prompt_of(14), max_tokens=400)
    engine.submit(leaving, goes)
    engine.submit(request_of(prompt_of(10), max_tokens=30), stays)
    assert goes.first.wait(WAIT)
    assert engine.abort(leaving.request_id)
    assert goes.end().finish_reason == "cancelled"
    assert stays.end().finish_reason == "length"
    assert tokens_of(stays.events) == alone


def test_cancelling_a_waiting_request_needs_no_pass_to_end(make: Callable[..., OffloadEngine]) -> None:
    engine = make(max_batch=1)
    slow_layers(engine, 0.05)
    running, waiting = Listener(), Listener()
    first, second = request_of(prompt_of(160), max_tokens=1), request_of(prompt_of(5))
    engine.submit(first, running)
    engine.submit(second, waiting)
    while engine.stats().running == 0:
        time.sleep(0.005)
    assert engine.abort(second.request_id)
    assert waiting.end().finish_reason == "cancelled"
    assert not running.done.is_set()
    engine.abort(first.request_id)
    assert running.end().finish_reason == "cancelled"


def test_a_deadline_ends_running_and_waiting_requests(make: Callable[..., OffloadEngine]) -> None:
    sink = Sink()
    engine = make(max_batch=1, sink=sink)
    slow_layers(engine, 0.03)
    listeners = [Listener(), Listener()]
    for listener in listeners:
        engine.submit(request_of(prompt_of(5), max_tokens=400, deadline_s=0.5), listener)
    assert [listener.end().finish_reason for listener in listeners] == ["timeout", "timeout"]
    assert [r.outcome for r in sink.of(RequestFinished)] == ["timeout", "timeout"]
    assert not sink.wrong


def test_a_broken_listener_loses_its_own_request_only(make: Callable[..., OffloadEngine]) -> None:
    engine = make()

    def broken(event: Event) -> None:
        raise OSError("the client is gone")

    good = Listener()
    engine.submit(request_of(prompt_of(5), max_tokens=400), broken)
    engine.submit(request_of(prompt_of(6), max_tokens=10), good)
    assert good.end().finish_reason == "length"
    deadline = time.monotonic() + WAIT
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().running == 0


# --- failures -----------------------------------------------------------------------------------------------------


class Failing:
    """A hook on a layer that raises while switched on."""

    def __init__(self, engine: OffloadEngine, error: Exception) -> None:
        self.on, self.error = False, error
        engine._loaded.weights.decoder_layers[2].mlp.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        if self.on:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken layer"), torch.cuda.OutOfMemoryError("no memory")])
def test_a_failing_pass_ends_its_requests_and_the_engine_goes_on(
    make: Callable[..., OffloadEngine], error: Exception
) -> None:
    sink = Sink()
    engine = make(sink=sink)
    before = tokens_of(generate(engine, prompt_of(20)))
    failing = Failing(engine, error)
    failing.on = True
    end = generate(engine, prompt_of(20))[-1]
    assert end.finish_reason == "error"
    assert str(error) in (end.error or "")
    failing.on = False
    assert tokens_of(generate(engine, prompt_of(20))) == before
    assert [r.outcome for r in sink.of(RequestFinished)] == ["length", "server_error", "length"]
    assert set(engine.stats().kv_used_bytes.values()) == {0}
    assert not sink.wrong


def test_a_new_request_that_fails_does_not_take_the_decoding_ones_with_it(make: Callable[..., OffloadEngine]) -> None:
    engine = make(num_speculative_tokens=0)  # a pass of more than four tokens is the prompt's
    alone = tokens_of(generate(engine, prompt_of(4), max_tokens=60))
    failing = Failing(engine, MemoryError("too long a prompt"))

    def only_long_prompts(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        failing.on = args[0].shape[1] > 4

    engine._loaded.weights.decoder_layers[2].mlp.register_forward_pre_hook(only_long_prompts)
    decoding, fresh = Listener(), Listener()
    engine.submit(request_of(prompt_of(4), max_tokens=60), decoding)
    assert decoding.first.wait(WAIT)
    engine.submit(request_of(prompt_of(10)), fresh)
    end = fresh.end()
    assert end.finish_reason == "error"
    assert "out of memory" in (end.error or "")
    assert decoding.end().finish_reason == "length"
    assert tokens_of(decoding.events) == alone


def test_passes_that_keep_failing_stop_the_engine(make: Callable[..., OffloadEngine]) -> None:
    engine = make()
    Failing(engine, RuntimeError("broken for good")).on = True
    for _ in range(3):
        assert generate(engine, prompt_of(5))[-1].finish_reason == "error"
    deadline = time.monotonic() + WAIT
    while engine.stats().state != "failed" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "broken for good" in engine.stats().detail
    with pytest.raises(EngineFailed, match="must be restarted"):
        engine.submit(request_of(prompt_of(5)), Listener())


def test_logits_that_are_not_finite_fail_their_request_alone(make: Callable[..., OffloadEngine]) -> None:
    engine = make()
    alone = tokens_of(generate(engine, prompt_of(10), max_tokens=20))
    poisoned = prompt_of(30)

    def poison(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(1, torch.tensor([0]), torch.nan) if output.shape[1] == 2 else output

    good, bad = Listener(), Listener()
    engine.submit(request_of(poisoned, max_tokens=400), bad)
    assert bad.first.wait(WAIT)
    engine._loaded.weights.model.lm_head.register_forward_hook(poison)
    engine.submit(request_of(prompt_of(10), max_tokens=20), good)
    end = bad.end()
    assert end.finish_reason == "error"
    assert "not finite" in (end.error or "")
    assert good.end().finish_reason == "length"
    assert tokens_of(good.events) == alone


def test_a_pass_without_a_sign_of_life_is_called_stalled(
    make: Callable[..., OffloadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, listener = make(), Listener()
    gate = threading.Event()
    engine._loaded.weights.decoder_layers[1].mlp.register_forward_hook(lambda *_: gate.wait(WAIT) and None)
    monkeypatch.setattr("elsa_serve.offload.engine.STALL_S", 0.2)
    engine.submit(request_of(prompt_of(5), max_tokens=1), listener)
    deadline = time.monotonic() + WAIT
    while engine.stats().state != "stalled" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "no layer was finished" in engine.stats().detail
    gate.set()
    listener.end()
    assert engine.stats().state == "ready"


# --- ending -------------------------------------------------------------------------------------------------------


def test_shutdown_drains_then_cancels_and_frees(make: Callable[..., OffloadEngine]) -> None:
    engine = make(max_batch=1)
    short, long = Listener(), Listener()
    engine.submit(request_of(prompt_of(5), max_tokens=3), short)
    engine.submit(request_of(prompt_of(5), max_tokens=500), long)
    slow_layers(engine, 0.01)
    thread = threading.Thread(target=engine.shutdown, args=(0.7,))
    thread.start()
    while engine.stats().state != "draining":
        time.sleep(0.005)
    with pytest.raises(EngineDraining):
        engine.submit(request_of(prompt_of(5)), Listener())
    thread.join(WAIT)
    assert short.end().finish_reason == "length"
    assert long.end().finish_reason == "cancelled"
    engine.shutdown()
    assert not engine._thread.is_alive()
    assert not [t for t in threading.enumerate() if t.name == "elsa-engine" and t is engine._thread]


def test_shutdown_returns_as_soon_as_nothing_runs(make: Callable[..., OffloadEngine]) -> None:
    engine = make()
    start = time.monotonic()
    engine.shutdown(drain_timeout_s=20.0)
    assert time.monotonic() - start < 5


# --- metrics ------------------------------------------------------------------------------------------------------


def test_the_books_balance_over_a_busy_minute(make: Callable[..., OffloadEngine]) -> None:
    """Sixty requests with every kind of end, submitted and aborted from several threads."""
    sink = Sink()
    engine = make(sink=sink, max_batch=3, max_queue=100)
    listeners = [Listener() for _ in range(60)]

    def client(first: int) -> None:
        for i in range(first, 60, 3):
            deadline = 0.001 if i % 10 == 7 else None
            request = request_of(prompt_of(1 + i % 40, seed=i), max_tokens=1 + i % 6, deadline_s=deadline)
            engine.submit(request, listeners[i])
            if i % 5 == 3:
                engine.abort(request.request_id)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [listener.end().finish_reason for listener in listeners]
    assert {"length", "cancelled", "timeout"} == set(reasons)
    assert len(sink.of(RequestReceived)) == len(sink.of(RequestFinished)) == 60
    assert not sink.wrong
    outputs = sum(len(tokens_of(listener.events)) for listener in listeners)
    assert sum(r.output_tokens for r in sink.of(RequestFinished)) == outputs
    assert len(sink.of(InterTokenLatency)) == outputs - sum(bool(tokens_of(x.events)) for x in listeners)
    assert set(engine.stats().kv_used_bytes.values()) == {0}
    gauges = sink.of(Gauges)[-1]
    assert (gauges.running_prefill, gauges.running_decode, gauges.waiting) == (0, 0, 0)


def test_steps_say_their_phase_tokens_and_transfers(make: Callable[..., OffloadEngine]) -> None:
    sink = Sink()
    engine = make(sink=sink)
    generate(engine, prompt_of(40), max_tokens=3)
    prefill, *decodes = sink.of(StepStats)
    assert (prefill.phase, prefill.prompt_tokens, prefill.generated_tokens) == ("prefill", 40, 1)
    assert [(s.phase, s.prompt_tokens, s.generated_tokens) for s in decodes] == [("decode", 0, 1)] * 2
    assert {s.attention_backend for s in sink.of(StepStats)} == {"elsa"}
    moved = sum(t.bytes for s in sink.of(StepStats) for t in s.transfers if t.object == "weights")
    # Three passes stream every layer; what the ring had fetched ahead before the first, or for the one after the last,
    # may be counted or not.
    layer_bytes = engine._loaded.weights.store.nbytes // engine.plan.geometry.layers
    assert engine.plan.slots < engine.plan.geometry.layers
    assert abs(moved // layer_bytes - 3 * engine.plan.geometry.layers) <= engine.plan.slots
    for transfer in (t for s in sink.of(StepStats) for t in s.transfers):
        assert transfer.hidden_s <= transfer.seconds + 1e-9
        assert transfer.stall_s >= 0


def test_times_of_a_request_add_up(make: Callable[..., OffloadEngine]) -> None:
    sink = Sink()
    engine = make(sink=sink)
    generate(engine, prompt_of(40), max_tokens=4)
    (finished,) = sink.of(RequestFinished)
    assert finished.prompt_tokens == 40
    assert finished.output_tokens == 4
    assert finished.ttft_s == pytest.approx(finished.queue_s + finished.prefill_s)
    assert finished.duration_s == pytest.approx(finished.ttft_s + finished.decode_s, abs=1e-3)


def test_many_requests_leave_nothing_behind(make: Callable[..., OffloadEngine]) -> None:
    engine = make(context=200, gpu_memory="840KiB")

    def round_of_requests() -> int:
        for i in range(6):
            generate(engine, prompt_of(20 + i, seed=i), max_tokens=4)
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    round_of_requests()
    before = round_of_requests()
    assert round_of_requests() <= before + 5
    assert engine._scheduler.idle()
    assert set(engine.stats().kv_used_bytes.values()) == {0}


def test_a_model_that_does_not_run_is_refused_at_the_start(tmp_path: Path) -> None:
    """GPT-2 reshapes its last hidden states to the prompt's length, which the engine has cut to the wanted rows."""
    from transformers import GPT2Config

    GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=128).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel does not run in the offload engine"):
        make_engine(tmp_path, load_format="dummy", context=64)


@pytest.mark.gpu
def test_the_device_budget_is_enforced_and_given_back(checkpoint: Path) -> None:
    from elsa_serve.offload.plan import CUDA_CONTEXT

    budget = 128 << 20
    engine = make_engine(checkpoint, device="cuda", gpu_memory=CUDA_CONTEXT + budget, host_memory="4GiB")
    generate(engine, prompt_of(100))
    assert 0 < engine.memory().peak_reserved <= engine.memory().budget == budget
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(budget, dtype=torch.uint8, device="cuda")
    engine.shutdown()
    torch.empty(budget, dtype=torch.uint8, device="cuda")


def test_shutdown_frees_the_pools_at_once(checkpoint: Path) -> None:
    """Not when the collector comes: the next engine of the process needs the memory."""
    engine = make_engine(checkpoint)
    generate(engine, prompt_of(100))
    pool = engine._loaded.pool.arenas["gpu"].storage.data_ptr()
    assert engine._loaded.pool.cached_bytes()["gpu"]
    gc.collect()
    gc.disable()
    try:
        engine.shutdown()
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor and not found.is_meta]
        assert not [tensor.shape for tensor in tensors if tensor.untyped_storage().data_ptr() == pool]
    finally:
        gc.enable()
