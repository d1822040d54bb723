"""A pass's metadata, and passes over a tiny model: chunks, giving up, failing, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import make_engine, prompt_of, reference, save_checkpoint

from elsa_serve.offload.attention import NAME, AttentionOptions, offload_attention, sdpa_attend
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.kv import RequestKV
from elsa_serve.offload.step import SHORT_TOKENS, Part, PassAbandoned, StepPlan, _rows


def kv(length: int = 0) -> RequestKV:
    return RequestKV([], length)


def long(token: int, tokens: int = SHORT_TOKENS + 8) -> list[int]:
    return [token] * tokens


def test_short_parts_share_a_chunk_and_prompts_never_mix() -> None:
    parts = [Part(kv(), long(1)), Part(kv(7), [2]), Part(kv(), long(3, 36)), Part(kv(9), [4, 5, 6], rows=3)]
    plan = StepPlan.build(parts, chunk_tokens=20)
    assert plan.parts == (parts[1], parts[3], parts[0], parts[2])
    assert plan.token_ids.tolist() == [2, 4, 5, 6, *long(1), *long(3, 36)]
    assert plan.positions.tolist() == [7, 9, 10, 11, *range(40), *range(36)]
    assert [(c.low, c.high) for c in plan.chunks] == [(0, 4), (4, 24), (24, 44), (44, 64), (64, 80)]
    assert plan.wanted == [0, 1, 2, 3, 43, 79]
    assert [[s.part for s in c.segments] for c in plan.chunks[1:]] == [[parts[0]]] * 2 + [[parts[2]]] * 2
    assert [(s.start, s.final) for c in plan.chunks[1:3] for s in c.segments] == [(0, False), (20, True)]
    assert [(s.low, s.high) for s in plan.chunks[0].segments] == [(0, 1), (1, 4)]


def test_more_short_parts_than_a_chunk_holds_take_several() -> None:
    plan = StepPlan.build([Part(kv(i), [i] * (1 + i % 2)) for i in range(5)], chunk_tokens=3)
    assert [(c.low, c.high, len(c.segments)) for c in plan.chunks] == [(0, 3, 2), (3, 6, 2), (6, 7, 1)]
    assert [c.low for c in StepPlan.build([Part(kv(), [1] * 7)], chunk_tokens=3).chunks] == [0, 3, 6]


def test_what_is_left_of_a_prompt_goes_first_in_whole_tiles() -> None:
    for total, starts in ((500, [0]), (640, [0, 128]), (1000, [0, 512]), (1024, [0, 512]), (1030, [0, 128, 640])):
        chunks = StepPlan.build([Part(kv(), long(1, total))], chunk_tokens=512).chunks
        assert [c.low for c in chunks] == [c.segments[0].start for c in chunks] == starts
        assert [c.segments[0].final for c in chunks] == [False] * (len(starts) - 1) + [True]
        assert chunks[-1].high == total


def test_chunks_of_short_parts_are_filled_up_to_whole_tiles() -> None:
    parts = [Part(kv(), long(1)), Part(kv(7), [2, 3], rows=2), Part(kv(9), [4])]
    plan = StepPlan.build(parts, chunk_tokens=20, multiple=8)
    assert plan.token_ids.tolist() == [2, 3, 4, 0, 0, 0, 0, 0, *long(1)]
    assert plan.positions.tolist() == [7, 8, 9, 0, 0, 0, 0, 0, *range(40)]
    assert [(c.low, c.high) for c in plan.chunks] == [(0, 8), (8, 28), (28, 48)]
    assert [(s.low, s.high) for s in plan.chunks[0].segments] == [(0, 2), (2, 3)]
    assert plan.chunks[0].wanted == 8  # all that are wanted are among them
    assert plan.wanted == [0, 1, 2, 47, 47, 47, 47, 47]
    single = StepPlan.build([Part(kv(7), [5])], chunk_tokens=20, multiple=8)
    assert [(c.wanted, c.whole) for c in single.chunks] == [(8, False)]
    assert [c.whole for c in StepPlan.build([Part(kv(), [1] * 8)], chunk_tokens=20, multiple=8).chunks] == [True]


def test_an_unfinished_prompt_wants_no_logits() -> None:
    plan = StepPlan.build([Part(kv(), [1] * 5, rows=0), Part(kv(3), [2])], chunk_tokens=8)
    assert plan.wanted == [5]


def test_wanted_rows_of_a_chunk() -> None:
    parts = [Part(kv(), long(1), rows=1), Part(kv(7), [2, 3], rows=2), Part(kv(), long(4), rows=30)]
    chunks = StepPlan.build(parts, chunk_tokens=16).chunks
    assert [chunk.wanted for chunk in chunks] == [2, 0, 0, 1, 6, 16, 8]
    assert [chunk.wanted for chunk in StepPlan.build([Part(kv(), long(1), rows=0)], chunk_tokens=64).chunks] == [0]


def test_per_token_arguments_are_sliced_and_others_are_not() -> None:
    total, rows = 6, slice(2, 4)
    tokens = torch.arange(6)[None]
    tables = (torch.randn(1, 6, 8), torch.randn(1, 6, 8))
    other = torch.randn(6, 6)
    assert _rows(tokens, rows, total).tolist() == [[2, 3]]
    assert [tuple(t.shape) for t in _rows(tables, rows, total)] == [(1, 2, 8)] * 2
    assert _rows({"full": tables}, rows, total)["full"][0].shape == (1, 2, 8)
    assert _rows(other, rows, total) is other
    assert _rows(None, rows, total) is None


# --- SDPA's masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("new", "total", "window"), [(5, 5, None), (1, 9, None), (4, 9, None), (6, 11, 3), (1, 9, 4)])
def test_sdpa_is_causal_to_the_bottom_right(
    new: int, total: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import elsa_serve.offload.attention as attention

    monkeypatch.setattr(attention, "SDPA_MASK_ROWS", 2)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, new, 8), torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    i, j = torch.arange(total - new, total)[:, None], torch.arange(total)[None]
    visible = (j <= i) & (j > i - (window or total))
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3).masked_fill(~visible, -torch.inf)
    expected = logits.softmax(-1) @ v.double().repeat_interleave(2, 1)
    out = sdpa_attend(q, k, v, AttentionOptions(0.3, window))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_outside_the_engine_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=NAME):
        offload_attention(torch.nn.Identity(), x, x, x, None)


# --- passes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OffloadEngine]:
    """An idle engine, whose runner the tests drive themselves: streamed layers, some KV on the host."""
    directory: Path = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    made = make_engine(directory, resident_layers=0, chunk_tokens=8, context=200, gpu_memory="810KiB")
    yield made
    made.shutdown()


@pytest.fixture
def part(engine: OffloadEngine) -> Iterator[Callable[..., Part]]:
    """Makes parts with KV in the engine's pools, and gives it back."""
    made: list[RequestKV] = []

    def make(tokens: list[int], **options: Any) -> Part:
        memory = engine._loaded.pool.allocate(180)
        assert memory is not None
        made.append(memory)
        return Part(memory, tokens, **options)

    yield make
    for memory in made:
        engine._loaded.pool.free(memory)


def row_of(engine: OffloadEngine, *parts: Part) -> list[torch.Tensor]:
    rows = engine._loaded.runner.run(parts)
    return [rows[id(p)][-1] for p in parts]


def reference_row(tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference("llama")(torch.tensor([tokens])).logits[0, -1]


def test_logits_are_those_of_transformers_and_length_advances(engine: OffloadEngine, part: Any) -> None:
    tokens = prompt_of(30)
    one = part(tokens)
    torch.testing.assert_close(row_of(engine, one)[0], reference_row(tokens), rtol=1e-4, atol=1e-4)
    assert one.kv.length == 30
    one.tokens = [5]
    torch.testing.assert_close(row_of(engine, one)[0], reference_row([*tokens, 5]), rtol=1e-4, atol=1e-4)
    assert one.kv.length == 31


def test_tokens_beyond_the_first_pass_may_come_in_chunks_too(engine: OffloadEngine, part: Any) -> None:
    """A prefix, several tokens after it, one more: on the device and on the host."""
    tokens = prompt_of(41)
    one = part(tokens[:25])
    assert 0 < one.kv.split < 25
    for first, last in ((0, 25), (25, 40), (40, 41)):
        one.tokens = tokens[first:last]
        torch.testing.assert_close(row_of(engine, one)[0], reference_row(tokens[:last]), rtol=1e-4, atol=1e-4)


def test_several_rows_and_a_length_set_back(engine: OffloadEngine, part: Any) -> None:
    """What verification does: logits of several tokens, some of which are then taken back and replaced."""
    tokens = prompt_of(30)
    one = part(tokens[:20], rows=0)
    assert engine._loaded.runner.run([one])[id(one)].shape == (0, engine.info.vocab_size)
    one.tokens, one.rows = [*tokens[20:22], 9, 9, 9], 4
    rows = engine._loaded.runner.run([one])[id(one)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(row, reference_row([*tokens[:22], 9, 9, 9][: 22 + i]), rtol=1e-4, atol=1e-4)
    one.kv.length = 22
    one.tokens, one.rows = tokens[22:25], 1
    torch.testing.assert_close(row_of(engine, one)[0], reference_row(tokens[:25]), rtol=1e-4, atol=1e-4)


def test_progress_counts_layers_times_tokens(engine: OffloadEngine, part: Any) -> None:
    seen: list[int] = []
    row_of(engine, part(prompt_of(20), on_progress=seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == 20 * 5
    assert len(seen) == 3 * 5


class GiveUp:
    """True from its n-th call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("calls", [0, 1, 5, 13])
def test_a_pass_that_nobody_wants_stops_and_the_next_is_right(engine: OffloadEngine, part: Any, calls: int) -> None:
    unwanted = part(prompt_of(40, seed=9), given_up=GiveUp(calls))
    with pytest.raises(PassAbandoned):
        row_of(engine, unwanted)
    assert unwanted.kv.length == 0
    tokens = prompt_of(30)
    torch.testing.assert_close(row_of(engine, part(tokens))[0], reference_row(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [0, 1, 4, 9, 22])
def test_others_go_on_when_one_is_given_up(engine: OffloadEngine, part: Any, calls: int) -> None:
    tokens = prompt_of(20)
    decoding = part(tokens)
    row_of(engine, decoding)
    decoding.tokens = [7]
    unwanted = part(prompt_of(30, seed=9), given_up=GiveUp(calls))
    rows = engine._loaded.runner.run([unwanted, decoding])
    torch.testing.assert_close(rows[id(decoding)][0], reference_row([*tokens, 7]), rtol=1e-4, atol=1e-4)
    assert id(unwanted) not in rows
    assert unwanted.kv.length == 0
    decoding.tokens = [8]
    torch.testing.assert_close(row_of(engine, decoding)[0], reference_row([*tokens, 7, 8]), rtol=1e-4, atol=1e-4)


def test_a_failing_layer_leaves_the_kv_as_it_was(engine: OffloadEngine, part: Any) -> None:
    tokens = prompt_of(20)
    one = part(tokens)
    row_of(engine, one)
    one.tokens = [7]
    mlp = engine._loaded.weights.decoder_layers[3].mlp
    hook = mlp.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            row_of(engine, one)
    finally:
        hook.remove()
    assert one.kv.length == 20
    torch.testing.assert_close(row_of(engine, one)[0], reference_row([*tokens, 7]), rtol=1e-4, atol=1e-4)


def test_layers_get_their_own_forward_back(tmp_path: Path) -> None:
    made = make_engine(save_checkpoint("llama", tmp_path))
    layers = list(made._loaded.weights.decoder_layers)
    assert all("forward" in vars(layer) for layer in layers)
    made.shutdown()
    assert not any("forward" in vars(layer) for layer in layers)
