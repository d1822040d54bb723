"""Faults under a running engine whose KV lies in part on the host: requests fail cleanly, the next are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library
from engine_models import generate, make_engine, prompt_of, save_checkpoint, tokens_of

from elsa_serve.errors import BudgetError
from elsa_serve.offload import in_place, streams
from elsa_serve.offload.engine import OffloadEngine

PROMPT = prompt_of(180, seed=3)  # three chunks, the second of which goes home by a copy


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OffloadEngine]:
    directory: Path = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    made = make_engine(
        directory, resident_layers=0, chunk_tokens=70, context=200, gpu_memory="1080KiB", prefix_caching=False
    )
    assert 0 < made.plan.kv_gpu_tokens <= 70
    yield made
    made.shutdown()


class Planted(Exception):
    """A fault of this test."""


def once(work: Callable[..., Any], fault: Callable[[Any], Any], skip: int) -> Callable[..., Any]:
    """`work`, but what its call after `skip` others returns goes through `fault`."""
    calls = [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        result = work(*arguments, **options)
        return fault(result) if calls[0] == skip + 1 else result

    return wrapped


def no_memory_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """The native attention cannot allocate the states of its chunks."""
    patch.setattr(library, "_describe", once(library._describe, lambda found: _changed(found, "D", 1 << 58), 7))


def a_thread_that_throws(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(library, "_describe", once(library._describe, lambda found: _changed(found, "dtype", 7), 7))


def _changed(found: Any, field: str, value: int) -> Any:
    setattr(found[0], field, value)
    return found


def no_page_locked_memory(patch: pytest.MonkeyPatch) -> None:
    """The staging buffer must grow, and cannot."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise BudgetError("CUDA refused to page-lock 2.0 MiB of host memory (error 2)")

    patch.setattr(in_place.Staging, "take", once(in_place.Staging.take, lambda _: refuse(), 9))


def a_copy_that_fails(patch: pytest.MonkeyPatch) -> None:
    """A lane's copy raises on its thread, when the prompt's KV is carried home."""
    run = streams._CpuCopy.run

    def broken(copy: Any) -> None:
        if copy.object == "kv":
            copy._pairs = [(torch.empty(2), torch.empty(3))]
        run(copy)

    patch.setattr(streams._CpuCopy, "run", broken)


def the_device_is_full(patch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("planted")

    patch.setattr(in_place, "build_problem", once(in_place.build_problem, refuse, 3))


FAULTS = [no_memory_on_the_host, a_thread_that_throws, no_page_locked_memory, a_copy_that_fails, the_device_is_full]


@pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("plant", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_ends_its_request_and_nothing_else(
    engine: OffloadEngine, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(generate(engine, PROMPT, max_tokens=8))
    assert len(expected) == 8
    with monkeypatch.context() as patch:
        plant(patch)
        events = generate(engine, PROMPT, max_tokens=8)
    assert events[-1].finish_reason == "error"
    assert events[-1].error
    assert tokens_of(events) == expected[: len(tokens_of(events))]
    assert set(engine.stats().kv_used_bytes.values()) == {0}
    for _ in range(2):
        assert tokens_of(generate(engine, PROMPT, max_tokens=8)) == expected
