"""The public functions and the custom ops beneath them, which torch.compile and CUDA graphs see as single nodes."""

from __future__ import annotations

from typing import Literal, overload

import torch

from elsa_kernels import checks, varlen
from elsa_kernels.registry import Operands, Problem, select
from elsa_kernels.state import State


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    q_start: int | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    kv_range: torch.Tensor | None = ...,
    precision: str | None = ...,
    return_state: Literal[False] = ...,
    impl: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    q_start: int | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    kv_range: torch.Tensor | None = ...,
    precision: str | None = ...,
    return_state: Literal[True],
    impl: str | None = ...,
) -> State: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    q_start: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_range: torch.Tensor | None = None,
    precision: str | None = None,
    return_state: bool = False,
    impl: str | None = None,
) -> torch.Tensor | State:
    """Exact attention of q [B, H, Nq, D] over k, v [B, Hkv, Nk, D]; H is a multiple of Hkv (GQA, MQA).

    All three share dtype (float32, float16, bfloat16; float64 on CPU) and device; the last dimension is contiguous,
    other strides are free. Forward only.

    causal: query i sees keys j ≤ q_start + i. q_start defaults to Nk − Nq (bottom-right aligned), so decode and
        chunked prefill over a cache of Nk keys need nothing else.
    scale: of q·k, 1/sqrt(D) by default.
    window: query at position p sees keys with |p − j| < window (with causal: p − window < j ≤ p).
    softcap: logits become softcap·tanh(logits / softcap), before ALiBi, bias and masks.
    alibi_slopes [H]: adds slope·(j − p). bias [B|1, H|1, Nq|1, Nk], floating: added, −∞ masks.
    sinks [H]: logits that join each row's softmax without a value. kv_range [B, 2] int32: half-open range of keys
        that exist for each batch element.
    precision: for float32 tensors "fp32" (default: FP32-accurate, on tensor cores where they help), "ieee" (no tensor
        core), "tf32". float16 and bfloat16 accumulate in FP32.
    return_state: return the `State` (m, S, W) in float32 (float64 for float64 inputs) instead of the output.
    impl: name of a registered implementation, strictly; None chooses, announcing a fallback once.

    Returns [B, H, Nq, D] in q's dtype, contiguous; rows that see no key are 0. Raises ValueError, TypeError or
    `UnsupportedProblem`, naming the value and the remedy.
    """
    operands = Operands(q, k, v, alibi_slopes, bias, sinks, kv_range)
    problem = checks.build_problem(
        operands,
        causal=causal,
        scale=scale,
        q_start=q_start,
        window=window,
        softcap=softcap,
        precision=precision,
        return_state=return_state,
    )
    op = _attention_state_op if return_state else _attention_op
    result = op(
        q,
        k,
        v,
        alibi_slopes,
        bias,
        sinks,
        kv_range,
        problem.causal,
        problem.scale,
        problem.q_start,
        problem.window,
        problem.softcap,
        problem.precision,
        impl,
    )
    return State(*result) if return_state else result


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    precision: str | None = ...,
    return_state: Literal[False] = ...,
    impl: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    precision: str | None = ...,
    return_state: Literal[True],
    impl: str | None = ...,
) -> State: ...


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    precision: str | None = None,
    return_state: bool = False,
    impl: str | None = None,
) -> torch.Tensor | State:
    """Attention within each of several sequences packed one after another.

    q [T, H, D], k and v [Tk, Hkv, D]; sequence s holds queries cu_seqlens_q[s] … cu_seqlens_q[s+1] and likewise keys
    (int32 [S + 1], starting at 0 and ending at T and Tk). Each sequence is aligned bottom-right, as if it were alone:
    the result of a sequence depends on its own tokens and on the bounds max_seqlen_q and max_seqlen_k of the lengths,
    never on its neighbours. An implementation that takes packed sequences as one problem makes one launch of them, and
    the offsets are not read by the host; the others get them one by one. Other options as in `attention`.

    Returns [T, H, D] in q's dtype, or a `State` with m, S [H, T] and W [H, T, D].
    """
    varlen.check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    op = _varlen_state_op if return_state else _varlen_op
    result = op(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        alibi_slopes,
        sinks,
        causal,
        checks.resolve_scale(scale, q.shape[-1]),
        checks.positive_window(window),
        checks.positive_softcap(softcap),
        checks.resolve_precision(q.dtype, precision),
        impl,
    )
    return State(*result) if return_state else result


def _output(problem: Problem, operands: Operands, impl: str | None) -> torch.Tensor:
    """Run one checked call for its output. Without queries or keys there is nothing to launch: the rows are 0."""
    implementation = select(problem, impl)
    if operands.q.numel() == 0 or problem.Nk == 0:
        return torch.zeros_like(operands.q, memory_format=torch.contiguous_format)
    out = implementation.run(problem, operands)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"implementation {implementation.name!r} returned {type(out).__name__} where a tensor was due")
    return out


def _state(problem: Problem, operands: Operands, impl: str | None) -> State:
    """Run one checked call for its state. Without queries or keys that is the identity, or the sinks alone."""
    implementation = select(problem, impl)
    if operands.q.numel() and problem.Nk:
        state = implementation.run(problem, operands)
        if not isinstance(state, State):
            raise TypeError(f"implementation {implementation.name!r} returned {type(state).__name__}, not a State")
        return state
    shape, dtype = operands.q.shape[:-1], state_dtype(problem.dtype)
    if operands.sinks is None:
        return State.identity(shape, problem.D, dtype=dtype, device=problem.device)
    return State.from_sinks(operands.sinks, shape, problem.D, dtype=dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("elsa::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_range: torch.Tensor | None,
    causal: bool,
    scale: float,
    q_start: int,
    window: int | None,
    softcap: float | None,
    precision: str,
    impl: str | None,
) -> torch.Tensor:
    operands = Operands(q, k, v, alibi_slopes, bias, sinks, kv_range)
    problem = checks.describe(
        operands,
        causal=causal,
        scale=scale,
        q_start=q_start,
        window=window,
        softcap=softcap,
        precision=precision,
        return_state=False,
    )
    return _output(problem, operands, impl).contiguous()


@_attention_op.register_fake
def _(q, k, v, alibi_slopes, bias, sinks, kv_range, causal, scale, q_start, window, softcap, precision, impl):
    return q.new_empty(q.shape)


@torch.library.custom_op("elsa::attention_state", mutates_args=())
def _attention_state_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_range: torch.Tensor | None,
    causal: bool,
    scale: float,
    q_start: int,
    window: int | None,
    softcap: float | None,
    precision: str,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    operands = Operands(q, k, v, alibi_slopes, bias, sinks, kv_range)
    problem = checks.describe(
        operands,
        causal=causal,
        scale=scale,
        q_start=q_start,
        window=window,
        softcap=softcap,
        precision=precision,
        return_state=True,
    )
    state = _state(problem, operands, impl)
    return state.m.contiguous(), state.S.contiguous(), state.W.contiguous()


@_attention_state_op.register_fake
def _(q, k, v, alibi_slopes, bias, sinks, kv_range, causal, scale, q_start, window, softcap, precision, impl):
    dtype = state_dtype(q.dtype)
    return (
        q.new_empty(q.shape[:-1], dtype=dtype),
        q.new_empty(q.shape[:-1], dtype=dtype),
        q.new_empty(q.shape, dtype=dtype),
    )


@torch.library.custom_op("elsa::attention_varlen", mutates_args=())
def _varlen_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    precision: str,
    impl: str | None,
) -> torch.Tensor:
    sequences = varlen.Sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal, scale, window,
        softcap, precision, False,
    )  # fmt: skip
    problem, operands = sequences.together()
    if q.numel() and k.numel() and select(problem, impl).packs:
        return _output(problem, operands, impl)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, problem, operands in sequences.each():
        out[rows] = _output(problem, operands, impl)[0].transpose(0, 1)
    return out


@_varlen_op.register_fake
def _(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal, scale, window,
    softcap, precision, impl,
):  # fmt: skip
    return q.new_empty(q.shape)


@torch.library.custom_op("elsa::attention_varlen_state", mutates_args=())
def _varlen_state_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    precision: str,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sequences = varlen.Sequences(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal, scale, window,
        softcap, precision, True,
    )  # fmt: skip
    problem, operands = sequences.together()
    if q.numel() and k.numel() and select(problem, impl).packs:
        state = _state(problem, operands, impl)
        return state.m, state.S, state.W
    T, H, D = q.shape
    dtype = state_dtype(q.dtype)
    m, S, W = q.new_empty((H, T), dtype=dtype), q.new_empty((H, T), dtype=dtype), q.new_empty((H, T, D), dtype=dtype)
    for rows, problem, operands in sequences.each():
        state = _state(problem, operands, impl)
        m[:, rows], S[:, rows], W[:, rows] = state.m[0], state.S[0], state.W[0]
    return m, S, W


@_varlen_state_op.register_fake
def _(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal, scale, window,
    softcap, precision, impl,
):  # fmt: skip
    T, H, D = q.shape
    dtype = state_dtype(q.dtype)
    return q.new_empty((H, T), dtype=dtype), q.new_empty((H, T), dtype=dtype), q.new_empty((H, T, D), dtype=dtype)
