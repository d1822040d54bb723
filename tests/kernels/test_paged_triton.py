"""The paged Triton kernels: on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from elsa_kernels import attention_paged, reshape_and_cache
from elsa_kernels.paged import decode_counters, launch, tuning

from tests.kernels.cases import judge, judge_logsumexp
from tests.kernels.paged_cases import BATCHES, FP8, LAYOUTS, Batch, check, make, truth
from tests.kernels.test_paged import alone_arguments, check_cache_write

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
BY_NAME = {batch.name: batch for batch in BATCHES}
pytestmark = (
    # NumPy's own warnings about the arithmetic it was asked to interpret
    [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
    if INTERPRETED
    else [pytest.mark.gpu]
)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_fp32(batch: Batch) -> None:
    check(batch, "triton", DEVICE, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_half(batch: Batch, dtype: torch.dtype) -> None:
    check(batch, "triton", DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "splits"])
def test_a_sequence_alone_has_the_bits_it_has_in_any_batch(name: str, dtype: torch.dtype) -> None:
    made = make(BY_NAME[name], DEVICE, dtype)
    together, lse = attention_paged(**made.arguments, return_lse=True, impl="triton")
    for s in range(len(made.lengths)):
        alone, alone_lse = attention_paged(**alone_arguments(made, s), return_lse=True, impl="triton")
        assert torch.equal(alone, together[made.rows(s)])
        assert torch.equal(alone_lse, lse[made.rows(s)])


@pytest.mark.parametrize("programs", [1, 7])
def test_bits_do_not_depend_on_the_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(BY_NAME["splits"], DEVICE, torch.float16)
    expected = attention_paged(**made.arguments, impl="triton")
    real = tuning.decode_tile
    monkeypatch.setattr(
        tuning, "decode_tile", lambda *arguments: dataclasses.replace(real(*arguments), programs=programs)
    )
    assert torch.equal(attention_paged(**made.arguments, impl="triton"), expected)


@pytest.mark.parametrize("name", ["splits", "splits_window"])
def test_bits_do_not_depend_on_what_a_unit_of_work_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, or whole nodes of them where their states would need much memory."""
    made = make(BY_NAME[name], DEVICE, torch.float16)
    made.arguments |= {"counters": decode_counters(3, 2, 1400, DEVICE)}
    expected, lse = attention_paged(**made.arguments, return_lse=True, impl="triton")
    monkeypatch.setattr(launch, "MAX_CHUNK_BYTES", -1)
    monkeypatch.setattr(launch, "NODE_PROGRAMS", 3)
    out, its_lse = attention_paged(**made.arguments, return_lse=True, impl="triton")
    assert torch.equal(out, expected)
    assert torch.equal(its_lse, lse)
    assert not made.arguments["counters"].any()


def test_counters_are_left_as_they_were() -> None:
    made = make(BY_NAME["splits"], DEVICE, torch.float16)
    counters = decode_counters(3, 2, 1100, DEVICE)
    first = attention_paged(**made.arguments, counters=counters, impl="triton")
    assert int(counters.abs().sum()) == 0
    assert torch.equal(attention_paged(**made.arguments, counters=counters, impl="triton"), first)
    with pytest.raises(ValueError, match=r"counters is torch.int32 with 4 elements.*see decode_counters"):
        attention_paged(**made.arguments, counters=counters[:4], impl="triton")


def test_bounds_beyond_the_lengths_change_nothing() -> None:
    made = make(BY_NAME["padded"], DEVICE, torch.float16)
    expected = attention_paged(**made.arguments, impl="triton")[:2]
    wide = made.arguments | {"max_seqlen_q": 40, "max_seqlen_k": 10**6}
    assert torch.equal(attention_paged(**wide, impl="triton")[:2], expected)


def test_padding_that_points_beyond_the_tokens() -> None:
    """The offsets of a padded graph may end beyond q: what is there is computed and nothing else is touched."""
    made = make(BY_NAME["padded"], DEVICE, torch.float16)
    offsets = torch.tensor([0, 1, 2, 3, 60, 70], dtype=torch.int32, device=DEVICE)
    out = torch.full_like(made.arguments["q"], 7.0)
    attention_paged(**made.arguments | {"cu_seqlens_q": offsets, "max_seqlen_q": 60}, out=out, impl="triton")
    assert torch.equal(out[:2], attention_paged(**made.arguments, impl="triton")[:2])
    assert bool((out[2:] == 0).all())  # of sequences without keys


def test_lengths_from_the_host_give_the_same_answers() -> None:
    lengths = ((140, 300), (1, 90), (0, 7), (200, 200))
    made = make(Batch("long", lengths, H=4, D=64), DEVICE, torch.float16)
    out, lse = attention_paged(**made.arguments, seqlens=lengths, return_lse=True, impl="triton")
    for s in (0, 1, 3):
        expected = truth(made, s)
        judge(out[made.rows(s)].transpose(0, 1).unsqueeze(0), expected.finalize(), torch.float16)
        judge_logsumexp(lse[made.rows(s)].transpose(0, 1).unsqueeze(0), expected.logsumexp(), torch.float16)
    alone = attention_paged(**alone_arguments(made, 1), seqlens=lengths[1:2], impl="triton")
    assert torch.equal(alone, out[made.rows(1)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.25, "per head"])
def test_cache_write(layout: str, scale: float | str | None) -> None:
    check_cache_write(DEVICE, layout, scale)


def test_every_fp8_code_and_every_tie() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(FP8).float()
    steps = values[:126]  # 0 … 416, ascending
    ties = (steps + values[1:127]) / 2
    x = torch.cat([values, ties, -ties, ties * 1.0001, ties * 0.9999, torch.tensor([500.0, -1e9, 1e-9])])
    k = x.view(1, 1, -1).to(DEVICE)
    cache = torch.zeros(1, 1, *k.shape[1:], dtype=FP8, device=DEVICE)
    reshape_and_cache(k, k, cache, cache.clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE))
    torch.testing.assert_close(cache.float().flatten().cpu(), x.clamp(-448, 448).to(FP8).float(), equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_a_cuda_graph_follows_its_tensors() -> None:
    made = make(BY_NAME["splits"], DEVICE, torch.float16)
    made.arguments |= {"counters": decode_counters(3, 2, 1100, DEVICE)}
    used = made.arguments["seqused_k"]
    before = attention_paged(**made.arguments, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_paged(**made.arguments, impl="triton")
    graph.replay()
    assert torch.equal(out, before)
    used -= 100
    expected = attention_paged(**made.arguments, impl="triton")
    graph.replay()
    assert torch.equal(out, expected)
    assert not torch.equal(out, before)
