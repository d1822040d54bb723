"""The public function and its custom op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from elsa_kernels import checks
from elsa_kernels.paged import problem as described
from elsa_kernels.paged.problem import PagedOperands
from elsa_kernels.paged.registry import select


@overload
def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | float | None = ...,
    v_scale: torch.Tensor | float | None = ...,
    precision: str | None = ...,
    return_lse: Literal[False] = ...,
    out: torch.Tensor | None = ...,
    seqlens: Sequence[tuple[int, int]] | None = ...,
    counters: torch.Tensor | None = ...,
    impl: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | float | None = ...,
    v_scale: torch.Tensor | float | None = ...,
    precision: str | None = ...,
    return_lse: Literal[True],
    out: torch.Tensor | None = ...,
    seqlens: Sequence[tuple[int, int]] | None = ...,
    counters: torch.Tensor | None = ...,
    impl: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    seqlens: Sequence[tuple[int, int]] | None = None,
    counters: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed queries over paged keys and values: prefill, chunked prefill, decode, verification in one.

    q [T, H, D]; k_cache and v_cache [blocks, block_size, Hkv, D] in q's dtype or float8_e4m3fn, any strides with a
    contiguous last dimension. Sequence s has queries cu_seqlens_q[s] … cu_seqlens_q[s+1] (int32 [B + 1]) and
    seqused_k[s] keys (int32 [B]), key j in page block_table[s, j // block_size] (int32 [B, pages]). With `causal` it is
    aligned bottom-right: its last query sees its last key. A sequence's bits do not depend on its batch.

    max_seqlen_q, max_seqlen_k: upper bounds on the lengths. scale, window, softcap, alibi_slopes [H], sinks [H] and
    precision as in `elsa_kernels.attention`. k_scale, v_scale: float32, one number or one a key head, multiply an FP8
    cache. out: where to write, [T, H, D] in q's dtype. return_lse: also return the natural logarithm of each row's sum
    of exponentials, float32 [T, H]; `State.from_output(out, lse)` of several calls over disjoint keys merge exactly.
    seqlens: (queries, keys) of every sequence, where the host knows them: on a GPU sequences with many queries are then
    gathered to contiguous K and V and run on the fast dense kernels. Nothing else in the call reads from the device,
    so it can be captured in a CUDA graph. counters: int32 zeros that decode's programs count themselves with, kept
    between calls of one stream (`decode_counters`); by default a fresh tensor a call. impl: name of a registered
    paged implementation, strictly.

    Rows without keys are 0 with lse −∞; rows of q that belong to no sequence are not written. Returns out [T, H, D],
    or (out, lse). Raises ValueError, TypeError or `UnsupportedProblem`.
    """
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None
    operands = PagedOperands(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=block_table,
        out=out,
        lse=lse,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    described.check_operands(operands, max_seqlen_q, max_seqlen_k)
    lengths = described.check_lengths(seqlens, seqused_k.numel())
    _paged_op(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seqused_k,
        block_table,
        out,
        lse,
        alibi_slopes,
        sinks,
        described.check_scale("k_scale", k_scale, k_cache, q.device),
        described.check_scale("v_scale", v_scale, k_cache, q.device),
        counters,
        max_seqlen_q,
        max_seqlen_k,
        None if lengths is None else [n for pair in lengths for n in pair],
        causal,
        checks.resolve_scale(scale, q.shape[-1]),
        checks.positive_window(window),
        checks.positive_softcap(softcap),
        checks.resolve_precision(q.dtype, precision),
        impl,
    )
    return out if lse is None else (out, lse)


@torch.library.custom_op("elsa::attention_paged", mutates_args=("out", "lse", "counters"))
def _paged_op(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    counters: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqlens: list[int] | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    precision: str,
    impl: str | None,
) -> None:
    operands = PagedOperands(
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, out, lse, alibi_slopes, sinks, k_scale, v_scale,
        counters,
    )  # fmt: skip
    problem = described.describe(
        operands,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        precision=precision,
        lengths=None if seqlens is None else tuple(zip(seqlens[::2], seqlens[1::2])),
    )
    implementation = select(problem, impl)
    if q.numel() and problem.B:
        implementation.run(problem, operands)


@_paged_op.register_fake
def _(
    q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, out, lse, alibi_slopes, sinks, k_scale, v_scale,
    counters, max_seqlen_q, max_seqlen_k, seqlens, causal, scale, window, softcap, precision, impl,
):  # fmt: skip
    return None
