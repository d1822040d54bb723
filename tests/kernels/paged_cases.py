"""Paged problems that every paged implementation must solve: whole batches, each against float64 on unpaged tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import elsa_kernels
import torch
from elsa_kernels import State
from elsa_kernels.reference import attention_reference

from tests.kernels.cases import INF, NAN, judge, judge_logsumexp, poisoned_memory

FP8 = torch.float8_e4m3fn
LAYOUTS = ("separate", "kv_first", "blocks_first", "heads_first")


@dataclass(frozen=True)
class Batch:
    """(queries, keys) of every sequence, the cache's form, options, and `prepare(q, keys, values)` on lists."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    H: int = 2
    Hkv: int = 2
    D: int = 32
    page: int = 16
    layout: str = "separate"
    options: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Batch], dict[str, torch.Tensor]] = lambda batch: {}
    prepare: Callable[..., Any] = lambda q, k, v: None
    fp8: bool = False
    scales: tuple[float, float] | None = None
    padded_tokens: int = 0  # rows of q that belong to no sequence
    padded_sequences: int = 0  # sequences without queries and keys


def _slopes(batch: Batch) -> dict[str, torch.Tensor]:
    return {"alibi_slopes": torch.tensor([2.0 ** -(i + 1) for i in range(batch.H)])}


def _sinks(batch: Batch) -> dict[str, torch.Tensor]:
    return {"sinks": torch.tensor([2.0, -INF, -3.0, 5.0, 0.0, 1.0, -1.0, 0.5][: batch.H])}


def _bad_values(q, k, v):
    v[0][3, 0, 1], v[0][-1, 1, 2] = NAN, INF
    v[1][1, 0, 0] = -INF


def _bad_keys(q, k, v):
    k[0][-1, 0, 0], k[1][2, 1, 3] = INF, NAN
    q[0, 0, 0] = 1.0


def _hidden_key(q, k, v):
    k[0][-1, 0, 0] = INF  # times a negative query: a logit of −∞
    q[0, :, 0] = -1.0


def _hidden_value(q, k, v):
    _hidden_key(q, k, v)
    v[0][-1, 0, 4] = NAN


def _positive(q, k, v):
    for x in (q, *k, *v):
        x.abs_()


def _outliers(q, k, v):
    q[..., 3] /= 500
    for keys, values in zip(k, v):
        keys[..., 3] *= 1000
        values[..., 5] *= 100


def _sharp(q, k, v):
    q.mul_(8.0)


PREFILL = ((33, 33), (1, 1), (20, 20))
CHUNKED = ((7, 60), (25, 41), (1, 17))
DECODE = ((1, 40), (1, 1), (1, 77), (1, 16))
MIXED = ((1, 50), (30, 30), (1, 5), (12, 70), (4, 33))

BATCHES = [
    Batch("prefill", PREFILL),
    Batch("prefill_gqa", PREFILL, H=4),
    Batch("chunked_prefill", CHUNKED, H=4),
    Batch("decode", DECODE),
    Batch("decode_gqa", DECODE, H=8),
    Batch("decode_mqa", DECODE, H=4, Hkv=1),
    Batch("decode_gqa_of_three", DECODE, H=6),
    Batch("verification", ((4, 40), (4, 4), (3, 77)), H=4),
    Batch("mixed", MIXED, H=4),
    Batch("mixed_mha", MIXED),
    Batch("more_queries_than_keys", ((9, 3), (2, 1), (40, 8)), H=4),
    Batch("no_keys", ((1, 0), (5, 20), (3, 0), (1, 9))),
    Batch("no_queries", ((0, 30), (1, 20), (0, 0))),
    Batch("padded", ((1, 40), (1, 21)), H=4, padded_tokens=6, padded_sequences=3),
    Batch("page_1", CHUNKED, page=1),
    Batch("page_32", MIXED, page=32, layout="kv_first"),
    Batch("page_64", MIXED, H=4, page=64, layout="blocks_first"),
    Batch("page_odd", CHUNKED, page=24, layout="heads_first"),
    Batch("not_causal", MIXED, H=4, options={"causal": False}),
    Batch("window", MIXED, H=4, options={"window": 9}),
    Batch("window_one", CHUNKED, options={"window": 1}),
    Batch("window_both_sides", MIXED, options={"window": 12, "causal": False}),
    Batch("softcap", MIXED, H=4, options={"softcap": 0.7}),
    Batch("alibi", MIXED, H=4, tensors=_slopes),
    Batch("sinks", MIXED, H=4, tensors=_sinks),
    Batch("sinks_without_keys", ((1, 0), (3, 0), (20, 5)), H=4, tensors=_sinks),
    Batch("everything", MIXED, H=4, layout="kv_first", options={"window": 30, "softcap": 5.0, "scale": 0.3},
          tensors=lambda b: _slopes(b) | _sinks(b)),
    Batch("scale_negative", MIXED, options={"scale": -0.5}),
    Batch("head_dim_80", MIXED, D=80),
    Batch("head_dim_256", ((1, 40), (5, 20)), D=256, H=1, Hkv=1),
    Batch("head_dim_5", CHUNKED, D=5),
    Batch("splits", ((1, 1100), (2, 530), (1, 512)), H=4),
    Batch("splits_mha", ((1, 1100), (2, 530), (1, 512)), H=1, Hkv=1),
    Batch("splits_window", ((1, 1400), (3, 700)), H=2, Hkv=1, tensors=_sinks, options={"window": 600}),
    Batch("positive", MIXED, H=4, prepare=_positive),
    Batch("outlier_channels", MIXED, H=4, prepare=_outliers),
    Batch("sharp", MIXED, prepare=_sharp),
    Batch("bad_values", MIXED, prepare=_bad_values),
    Batch("bad_values_gqa", ((2, 50), (30, 30), (4, 33)), H=4, prepare=_bad_values),
    Batch("bad_keys", ((1, 50), (20, 30)), prepare=_bad_keys),
    Batch("hidden_key", ((1, 50), (1, 20)), prepare=_hidden_key),
    Batch("hidden_only_key", ((1, 1), (1, 20)), prepare=_hidden_key),
    Batch("hidden_value", ((1, 50), (1, 20)), prepare=_hidden_value),
    Batch("fp8", MIXED, H=4, fp8=True),
    Batch("fp8_scales", DECODE, fp8=True, scales=(0.37, 2.9)),
]  # fmt: skip


@dataclass
class Made:
    """A batch's tensors on a device: the arguments of the call, and what is true of each sequence."""

    arguments: dict[str, Any]
    keys: list[torch.Tensor]  # [Nk, Hkv, D], as the cache holds them
    values: list[torch.Tensor]
    lengths: tuple[tuple[int, int], ...]
    options: dict[str, Any]

    def rows(self, s: int) -> slice:
        start = sum(n for n, _ in self.lengths[:s])
        return slice(start, start + self.lengths[s][0])


def caches(batch: Batch, blocks: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two caches [blocks, page, Hkv, D] full of NaN, in one of the ways in which engines lay them out."""
    shape = {
        "separate": (2, blocks, batch.page, batch.Hkv, batch.D),
        "kv_first": (2, blocks, batch.page, batch.Hkv, batch.D),
        "blocks_first": (blocks, 2, batch.page, batch.Hkv, batch.D),
        "heads_first": (blocks, 2, batch.Hkv, batch.page, batch.D),
    }[batch.layout]
    memory = torch.full(shape, NAN).to(dtype).to(device)
    if batch.layout == "separate":
        return memory[0].clone(), memory[1].clone()
    if batch.layout == "kv_first":
        return memory[0], memory[1]
    if batch.layout == "heads_first":
        memory = memory.transpose(2, 3)
    return memory[:, 0], memory[:, 1]


def make(batch: Batch, device: str, dtype: torch.dtype) -> Made:
    torch.manual_seed(0)
    q = torch.randn(sum(n for n, _ in batch.lengths) + batch.padded_tokens, batch.H, batch.D)
    keys, values = ([torch.randn(k, batch.Hkv, batch.D) for _, k in batch.lengths] for _ in range(2))
    batch.prepare(q, keys, values)
    kv_dtype = FP8 if batch.fp8 else dtype
    pages = [-(-k // batch.page) for _, k in batch.lengths]
    order = torch.randperm(sum(pages) + 1).tolist()
    k_cache, v_cache = caches(batch, len(order), kv_dtype, device)
    sequences = len(batch.lengths) + batch.padded_sequences
    table = torch.full((sequences, max(pages, default=0) + 2), order[-1], dtype=torch.int32)
    for s, n in enumerate(pages):
        blocks = [order.pop(0) for _ in range(n)]
        table[s, :n] = torch.tensor(blocks, dtype=torch.int32)
        for rows, cache, scale in zip((keys, values), (k_cache, v_cache), batch.scales or (1.0, 1.0)):
            stored = (rows[s] / scale).to(kv_dtype).to(device)
            for i, block in enumerate(blocks):
                page = stored[i * batch.page : (i + 1) * batch.page]
                bits = torch.uint8 if batch.fp8 else dtype
                cache.view(bits)[block, : page.shape[0]] = page.view(bits)
            rows[s] = stored.double() * scale
    queries = [n for n, _ in batch.lengths] + [0] * batch.padded_sequences
    used = [k for _, k in batch.lengths] + [0] * batch.padded_sequences
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    options = batch.options | {name: t.to(device) for name, t in batch.tensors(batch).items()}
    arguments = options | {
        "q": q.to(device, dtype), "k_cache": k_cache, "v_cache": v_cache, "cu_seqlens_q": offsets.to(device),
        "seqused_k": torch.tensor(used, dtype=torch.int32, device=device), "block_table": table.to(device),
        "max_seqlen_q": max(queries, default=0), "max_seqlen_k": max(used, default=0),
    }  # fmt: skip
    if batch.scales:
        arguments |= {name: torch.tensor([s], device=device) for name, s in zip(("k_scale", "v_scale"), batch.scales)}
    return Made(arguments, keys, values, batch.lengths, {"causal": True} | options)


def truth(made: Made, s: int) -> State:
    """Sequence s alone, from its unpaged keys and values, in float64: [1, H, queries]."""
    q = made.arguments["q"][made.rows(s)]
    state = attention_reference(
        *(x.to(q.device).transpose(0, 1).unsqueeze(0) for x in (q, made.keys[s], made.values[s])),
        return_state=True, **made.options,
    )  # fmt: skip
    assert isinstance(state, State)
    return state


def check(batch: Batch, impl: str | None, device: str, dtype: torch.dtype, **options: Any) -> None:
    """Output and lse of every sequence of a batch against the reference; padding is left alone."""
    made = make(batch, device, dtype)
    room = torch.full_like(made.arguments["q"], NAN)
    with poisoned_memory():
        out, lse = elsa_kernels.attention_paged(**made.arguments, return_lse=True, out=room, impl=impl, **options)
        plain = elsa_kernels.attention_paged(**made.arguments, impl=impl, **options)
    assert out is room
    assert lse.dtype == torch.float32
    end = made.rows(len(batch.lengths) - 1).stop
    assert bool(out[end:].isnan().all()), "rows of no sequence were written"
    for s in range(len(batch.lengths)):
        rows, expected = made.rows(s), truth(made, s)
        if rows.stop > rows.start:
            for result in (out, plain):
                judge(result[rows].transpose(0, 1).unsqueeze(0), expected.finalize(), dtype)
            judge_logsumexp(lse[rows].transpose(0, 1).unsqueeze(0), expected.logsumexp(), torch.float32)
