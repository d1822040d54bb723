"""The truth every implementation is tested against: plain attention over the full matrix of logits, in float64.

Order of operations on a logit: softcap·tanh(scale·q·k / softcap), then + slope·(j − i) (ALiBi), then + bias, then the
masks (causal, window, kv_range), which set −∞. Semantics at the edges:

- A key with logit −∞, whether masked or by arithmetic, contributes nothing, even if its value is ∞ or NaN.
- A row without any visible key gives output 0 and the state (−∞, 0, 0); with a sink, (sink, 1, 0).
- A visible NaN logit, or a visible logit of +∞, gives a NaN row.
- A visible key with a non-finite value gives ±∞ or NaN in that column, as IEEE addition would.
"""

from __future__ import annotations

import torch

from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import NEG_INF, State


def visible_keys(
    q_positions: torch.Tensor, Nk: int, *, causal: bool = False, window: int | None = None
) -> torch.Tensor:
    """Which keys j each query at position p sees: [Nq, Nk] bool. causal: j ≤ p; window: |p − j| < window."""
    distance = q_positions.unsqueeze(-1) - torch.arange(Nk, device=q_positions.device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    q_start: int | None = None,
    q_positions: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_range: torch.Tensor | None = None,
    return_state: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor | State:
    """Attention of q [B, H, Nq, D] over k, v [B, Hkv, Nk, D], computed and returned in `dtype`.

    Options as in `elsa_kernels.attention`. `q_positions` [Nq] replaces q_start + i, for checks on a sample of rows.
    Memory: B·H·Nq·Nk elements several times over, so keep Nq·Nk small.
    """
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    if q_positions is None:
        q_positions = torch.arange(Nq, device=q.device) + (Nk - Nq if q_start is None else q_start)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // Hkv, dim=1) for x in (k, v))

    logits = scale * (q @ k.transpose(-1, -2))  # [B, H, Nq, Nk]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    keys = torch.arange(Nk, device=q.device)
    if alibi_slopes is not None:
        distance = (keys - q_positions.unsqueeze(-1)).to(dtype)
        logits = logits + alibi_slopes.to(dtype).view(H, 1, 1) * distance
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits.masked_fill(~visible_keys(q_positions, Nk, causal=causal, window=window), NEG_INF)
    if kv_range is not None:
        first, end = kv_range[:, 0].view(B, 1, 1, 1), kv_range[:, 1].view(B, 1, 1, 1)
        logits = logits.masked_fill((keys < first) | (keys >= end), NEG_INF)

    state = State.from_logits(logits, v)
    if sinks is not None:
        state = state.merge(State.from_sinks(sinks, (B, H, Nq), D, dtype=dtype))
    return state if return_state else state.finalize()


def _run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    dtype = torch.float64
    result = attention_reference(
        operands.q,
        operands.k,
        operands.v,
        causal=problem.causal,
        scale=problem.scale,
        q_start=problem.q_start,
        window=problem.window,
        softcap=problem.softcap,
        alibi_slopes=operands.alibi_slopes,
        bias=operands.bias,
        sinks=operands.sinks,
        kv_range=operands.kv_range,
        return_state=problem.return_state,
        dtype=dtype,
    )
    if isinstance(result, State):
        return result if problem.dtype == dtype else result.to(torch.float32)
    return result.to(problem.dtype)


# Takes everything but only when asked by name: it holds the whole matrix of logits in float64.
implementation = register(Implementation(name="reference", priority=-1, supports=lambda problem: None, run=_run))
