"""What goes wrong for one request stays with it: memory that is not there, cancels in storms, samplers and tokenizers
that raise. The others get the tokens that they get alone."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels.cpu.native import library
from engine_models import PLAIN, generate, prompt_of, request_of, tokens_of

from elsa_serve.offload import streams
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.kv import KVPool
from elsa_serve.offload.output import OutputText
from elsa_serve.offload.sampling import Sampler
from elsa_serve.protocol import Event, FinishReason, GenerationRequest, TokenEvent

WAIT = 60.0
MARK = 299  # a token that no text decodes to, by which a test knows its own request


class Answer:
    """A request on an engine and what comes of it."""

    def __init__(self, engine: OffloadEngine, request: GenerationRequest) -> None:
        self.request, self.tokens, self.over = request, [], threading.Event()
        self.reason: FinishReason | None = None
        self.error: str | None = None
        engine.submit(request, self)

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens += [event.token_id] if event.token_id is not None else []
            if event.finish_reason is not None:
                self.reason, self.error = event.finish_reason, event.error
                self.over.set()

    def end(self) -> FinishReason | None:
        assert self.over.wait(WAIT)
        return self.reason


def alone(make: Any, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    plain = make(**PLAIN)
    return [tokens_of(generate(plain, prompt, **sampling)) for prompt in prompts]


def nothing_left(engine: OffloadEngine) -> bool:
    """No memory is held but by the prefix cache, and all of that can be given up."""
    used = set(engine.stats().kv_used_bytes.values())
    engine._scheduler.forget_prefixes("")
    return used == {0} == {arena.used_bytes for arena in engine._loaded.pool.arenas.values()}


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_allocations_that_fail_now_and_then_delay_requests_and_nothing_else(
    make: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("elsa_serve.offload.scheduler.FIRST_GROWTH", 16)
    engine = make(context=300)
    prompts = [prompt_of(20 + i, seed=i) for i in range(5)]
    expected = alone(make, prompts, max_tokens=60)
    luck, extent = random.Random(seed), KVPool._extent

    def fails_sometimes(self: KVPool, tier: Any, capacity: int) -> Any:
        return None if luck.random() < 0.5 and engine.stats().running else extent(self, tier, capacity)

    monkeypatch.setattr(KVPool, "_extent", fails_sometimes)
    answers = [Answer(engine, request_of(prompt, max_tokens=60)) for prompt in prompts]
    assert [answer.end() for answer in answers] == ["length"] * 5
    assert [answer.tokens for answer in answers] == expected
    assert nothing_left(engine)


def test_memory_that_never_comes_ends_the_request_and_not_the_engine(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    with monkeypatch.context() as broken:
        broken.setattr(KVPool, "_extent", lambda self, tier, capacity: None)
        answers = [Answer(engine, request_of(prompt_of(20))) for _ in range(2)]
        assert [answer.end() for answer in answers] == ["error", "error"]
    assert "no KV memory for 20 tokens" in (answers[0].error or "")
    assert generate(engine, prompt_of(20))[-1].finish_reason == "length"


# --- workers ------------------------------------------------------------------------------------------------------


class Deadly:
    def copy_(self, source: Any) -> None:
        raise SystemExit("killed")


@pytest.mark.parametrize("kind", ["weights", "kv"])
def test_a_worker_killed_at_its_work_ends_the_request_that_it_worked_for(
    make: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In the pass in which a second prompt joins one that decodes: the prompt ends in error, the decode goes on."""
    engine = make(context=200, gpu_memory="1180KiB", slots=2, chunk_tokens=100)
    prompts = [prompt_of(50, seed=1), prompt_of(120, seed=2)]
    expected = alone(make, prompts, max_tokens=60)
    run, killed = streams._CpuCopy.run, []

    def dies(copy: streams._CpuCopy) -> None:
        if not killed and copy.object == kind and engine.stats().running == 2:
            killed.append(copy.object)
            copy._pairs = [(Deadly(), torch.zeros(1))]  # type: ignore[list-item]
        run(copy)

    monkeypatch.setattr(streams._CpuCopy, "run", dies)
    first = Answer(engine, request_of(prompts[0], max_tokens=60))
    while not first.tokens:
        time.sleep(0.001)
    second = Answer(engine, request_of(prompts[1], max_tokens=60))
    assert second.end() == "error"
    assert "killed" in (second.error or "")
    assert killed == [kind]
    assert (first.end(), first.tokens) == ("length", expected[0])
    again = Answer(engine, request_of(prompts[1], max_tokens=60))
    assert (again.end(), again.tokens) == ("length", expected[1])
    assert nothing_left(engine)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit("killed")], ids=repr)
def test_a_disk_that_fails_ends_the_request_whose_kv_it_was_to_hold(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """In the pass in which a long prompt joins one that decodes, whose KV is on the other tiers."""
    engine = make(
        context=200, gpu_memory="880KiB", host_memory="700KiB", kv_disk="1MiB", kv_disk_dir=tmp_path, slots=2,
        chunk_tokens=16, max_batch=2,
    )  # fmt: skip
    prompts = [prompt_of(20, seed=1), prompt_of(170, seed=2)]
    expected = alone(make, prompts, max_tokens=20)

    def fails(*_: Any) -> int:
        raise error

    first = Answer(engine, request_of(prompts[0], max_tokens=20))
    while not first.tokens:
        time.sleep(0.001)
    with monkeypatch.context() as failing:
        failing.setattr(os, "pwrite", fails)
        failing.setattr(library, "write_rows", fails)
        second = Answer(engine, request_of(prompts[1], max_tokens=20))
        assert second.end() == "error"
        assert any(word in (second.error or "") for word in ("No space left", "killed"))
    assert (first.end(), first.tokens) == ("length", expected[0])
    again = Answer(engine, request_of(prompts[1], max_tokens=20))
    assert (again.end(), again.tokens) == ("length", expected[1])
    assert nothing_left(engine)


# --- cancels ------------------------------------------------------------------------------------------------------


def test_a_storm_of_cancels_leaves_the_others_as_they_are(make: Any) -> None:
    """Forty requests over two documents, most of them cancelled from several threads, at any time."""
    engine = make(context=400, max_batch=5, max_queue=100, prefill_round_tokens=48, gpu_memory="1300KiB")
    documents = [prompt_of(130, seed=1), prompt_of(70, seed=2)]
    prompts = [[*documents[i % 2], *prompt_of(1 + i % 9, seed=i)] for i in range(40)]
    staying = [0, 7, 13, 22, 39]
    expected = alone(make, [prompts[i] for i in staying], max_tokens=25)
    answers = [Answer(engine, request_of(prompt, max_tokens=25)) for prompt in prompts]

    def storm(first: int) -> None:
        luck = random.Random(first)
        for i in range(first, 40, 3):
            time.sleep(luck.random() * 0.02)
            if i not in staying:
                engine.abort(answers[i].request.request_id)

    threads = [threading.Thread(target=storm, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [answer.end() for answer in answers]
    assert set(reasons) <= {"cancelled", "length"}
    assert reasons.count("cancelled") > 10
    assert [answers[i].tokens for i in staying] == expected
    assert nothing_left(engine)


# --- one request's own faults -------------------------------------------------------------------------------------


def bad_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Sampler.draw

    def broken(self: Sampler, logits: Any) -> Any:
        if self._params.seed == MARK and self._drawn == 3:
            raise IndexError("the sampler is broken")
        return draw(self, logits)

    monkeypatch.setattr(Sampler, "draw", broken)


def bad_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    push = OutputText.push

    def broken(self: OutputText, token_id: int, last: bool) -> tuple[str, bool]:
        if self._min_tokens == 1 and self._count == 3:
            raise IndexError("the tokenizer is broken")
        return push(self, token_id, last)

    monkeypatch.setattr(OutputText, "push", broken)
    monkeypatch.setattr(OutputText, "flush", lambda self: 1 / 0)  # and it stays so, when the request ends


@pytest.mark.parametrize("fault", [bad_sampler, bad_tokenizer])
@pytest.mark.parametrize("speculative", [0, 8])
def test_a_request_whose_token_cannot_be_drawn_fails_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], speculative: int
) -> None:
    engine = make(num_speculative_tokens=speculative)
    prompts = [prompt_of(20 + i, seed=i) for i in range(3)]
    expected = alone(make, prompts, max_tokens=20)
    before = tokens_of(generate(engine, prompts[0], max_tokens=3))
    fault(monkeypatch)
    good = [Answer(engine, request_of(prompt, max_tokens=20)) for prompt in prompts]
    bad = Answer(engine, request_of(prompts[0], max_tokens=20, seed=MARK, min_tokens=1))
    assert bad.end() == "error"
    assert "is broken" in (bad.error or "")
    assert bad.tokens == before
    assert [answer.end() for answer in good] == ["length"] * 3
    assert [answer.tokens for answer in good] == expected
    cancelled = Answer(engine, request_of(prompt_of(100), max_tokens=300))
    engine.abort(cancelled.request.request_id)
    assert cancelled.end() == "cancelled"
    assert engine.stats().state == "ready"
    assert nothing_left(engine)
