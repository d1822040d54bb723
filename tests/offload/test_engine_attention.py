"""An engine whose attention changes between requests: other kernels, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from engine_models import generate, make_config, make_engine, prompt_of, request_of, save_checkpoint, tokens_of

from elsa_serve.errors import UsageError
from elsa_serve.offload import attention as attentions
from elsa_serve.protocol import Event, TokenEvent
from elsa_serve.stats import Record, StepStats


class Backends:
    """A sink that keeps the attention of each pass."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def record(self, *stats: Record) -> None:
        self.names += [one.attention_backend for one in stats if isinstance(one, StepStats)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every kernel that is called from now on."""
    called: list[str] = []

    def counting(name: str, attend: attentions.Attend) -> attentions.Attend:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return attend(*arguments)

        return call

    for name, attend in attentions.ATTEND.items():
        monkeypatch.setitem(attentions.ATTEND, name, counting(name, attend))
    return called


def test_attention_changes_between_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, sink = counted(monkeypatch), Backends()
    engine = make_engine(save_checkpoint("llama", tmp_path), sink=sink)
    plan = engine.plan
    try:
        called.clear()  # of the try-out passes
        first = tokens_of(generate(engine, prompt_of(40), max_tokens=4))
        assert (set(called), set(sink.names), engine.info.attention) == ({"elsa"}, {"elsa"}, "elsa")
        called.clear()
        sink.names.clear()
        engine.use_attention("sdpa")
        assert tokens_of(generate(engine, prompt_of(40), max_tokens=4)) == first
        assert (set(called), set(sink.names), engine.info.attention) == ({"sdpa"}, {"sdpa"}, "sdpa")
        assert engine.plan is plan
    finally:
        engine.shutdown()


def test_attention_does_not_change_under_a_request(tmp_path: Path) -> None:
    engine = make_engine(save_checkpoint("llama", tmp_path))
    done = threading.Event()
    errors: list[UsageError] = []

    def on_event(event: Event) -> None:
        if isinstance(event, TokenEvent) and event.finish_reason is None:
            try:
                engine.use_attention("sdpa")
            except UsageError as error:
                errors.append(error)
        elif isinstance(event, TokenEvent):
            done.set()

    try:
        engine.submit(request_of(prompt_of(20), max_tokens=3), on_event)
        assert done.wait(30)
        assert [str(error) for error in errors] == [str(errors[0])] * 2
        assert "under way" in str(errors[0])
        assert engine.info.attention == "elsa"
    finally:
        engine.shutdown()


def test_attention_that_a_model_cannot_use_is_refused(tmp_path: Path) -> None:
    make_config("gemma2").save_pretrained(tmp_path)
    engine = make_engine(tmp_path, load_format="dummy")
    try:
        with pytest.raises(UsageError, match="caps its attention logits"):
            engine.use_attention("sdpa")
        with pytest.raises(UsageError, match="unknown attention"):
            engine.use_attention("flash")
        assert engine.info.attention == "elsa"
    finally:
        engine.shutdown()
