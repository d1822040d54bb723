"""Plain problems on PyTorch's fused CPU kernel, called only where it is right, its results merged as states.

`aten::_scaled_dot_product_flash_attention_for_cpu` returns (output, logsumexp) and is several times faster than tiles
of separate operations. What it gets wrong is kept away from it: its causal mask is aligned upper-left (a prefix that
all queries see becomes a call of its own, merged with the diagonal), a fully masked row has logsumexp 0 (no row of any
call is fully masked, unless by infinite keys, and such rows are computed again), an empty KV kills the process (never
passed), results are rounded to the inputs' dtype (16-bit inputs are widened first), and it does not split along the
keys (chunks become heads of the call).
"""

from __future__ import annotations

import torch

from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import State, tree_merge

# With at most this many packed rows, keys are cut into chunks of fixed length and place, for all cores to work on.
DECODE_ROWS = 64
CHUNK_KEYS = 1024
WIDENED_ELEMENTS = 2**21  # of a widened copy of 16-bit keys, or of values: a few MB, reused from span to span


def takes(problem: Problem) -> bool:
    """Whether the problem has nothing but causality, key ranges and sinks, in a dtype that float32 holds."""
    plain = problem.window is None and problem.softcap is None and not problem.has_alibi and not problem.has_bias
    return plain and problem.dtype != torch.float64


def attend(problem: Problem, operands: Operands) -> State:
    """The state of every row in float32, without sinks. Rows may be NaN that should not be if V is not finite."""
    q, k, v = operands.q, operands.k, operands.v
    if operands.kv_range is None:
        return _attend_range(problem, q, k, v, problem.q_start)
    parts = []
    for b, (first, end) in enumerate(operands.kv_range.tolist()):
        first, end = max(first, 0), min(end, problem.Nk)
        keys = slice(first, max(first, end))
        parts.append(
            _attend_range(problem, q[b : b + 1], k[b : b + 1, :, keys], v[b : b + 1, :, keys], problem.q_start - first)
        )
    return State(*(torch.cat([getattr(part, name) for part in parts]) for name in ("m", "S", "W")))


def _attend_range(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_start: int) -> State:
    """All of k, v exists; query i sees keys up to q_start + i if causal."""
    Nq, Nk = q.shape[2], k.shape[2]
    if not problem.causal:
        return _see_all(problem, q, k, v)
    blind = min(max(-q_start, 0), Nq)  # rows that lie before every key
    before = _see_all(problem, q[:, :, :blind], k[:, :, :0], v[:, :, :0])
    q, q_start = q[:, :, blind:], q_start + blind
    prefix = min(q_start, Nk)
    parts = [_see_all(problem, q, k[:, :, :prefix], v[:, :, :prefix])]
    if Nk > prefix and q.shape[2] > 0:
        parts.append(_see_triangle(problem, q, k[:, :, prefix:], v[:, :, prefix:]))
    rest = tree_merge(parts)
    return State(*(torch.cat([getattr(part, n) for part in (before, rest)], dim=2) for n in ("m", "S", "W")))


def _see_all(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
    """Every query sees every key: a group's heads become rows of one call."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1], k.shape[2]
    if Nq == 0 or Nk == 0:
        return State.identity((B, H, Nq), D)
    packed = q.float().reshape(B, Hkv, H // Hkv * Nq, D)
    if packed.shape[2] <= DECODE_ROWS and Nk >= 2 * CHUNK_KEYS:
        state = _by_chunks(problem, packed, k, v)
    else:
        state = _call(packed, k.float(), v.float(), problem.scale, causal=False)
    return State(state.m.reshape(B, H, Nq), state.S.reshape(B, H, Nq), state.W.reshape(B, H, Nq, D))


def _see_triangle(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
    """Query i sees keys 0 … i: one call per head of a group, so that keys need not be repeated."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.float().unflatten(1, (k.shape[1], group)), k.float(), v.float()
    heads = [_call(q[:, :, g], k, v, problem.scale, causal=True) for g in range(group)]
    return State(*(torch.stack([getattr(head, n) for head in heads], dim=2).flatten(1, 2) for n in ("m", "S", "W")))


def _by_chunks(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
    """Chunks of CHUNK_KEYS keys as heads of the call, merged in a tree by position; the last may be shorter."""
    states = []
    Hkv, Nk, D = k.shape[1:]
    span = Nk
    if k.dtype != torch.float32:
        span = max(1, WIDENED_ELEMENTS // (Hkv * D * CHUNK_KEYS)) * CHUNK_KEYS
    room = [torch.empty((Hkv, min(span, Nk), D)) for _ in range(2)] if span < Nk else None
    for b in range(q.shape[0]):
        chunks: list[State] = []
        for j in range(0, Nk, span):
            parts = [x[b, :, j : j + span] for x in (k, v)]  # [Hkv, keys, D]
            if room is not None:
                parts = [wide[:, : part.shape[1]].copy_(part) for wide, part in zip(room, parts)]
            chunks += _chunk_states(problem, q[b], parts[0].float(), parts[1].float())
        states.append(tree_merge(chunks))
    return State(*(torch.stack([getattr(state, name) for state in states]) for name in ("m", "S", "W")))


def _chunk_states(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[State]:
    """The states of q [Hkv, rows, D] over each chunk of k, v [Hkv, keys, D]."""
    states = []
    whole = k.shape[1] // CHUNK_KEYS
    for keys, count in ((slice(0, whole * CHUNK_KEYS), whole), (slice(whole * CHUNK_KEYS, None), 1)):
        k_part, v_part = k[:, keys], v[:, keys]
        if k_part.shape[1] == 0:
            continue
        k_heads, v_heads = (x.unflatten(1, (count, x.shape[1] // count)) for x in (k_part, v_part))
        part = _call(q.unsqueeze(1).expand(-1, count, -1, -1), k_heads, v_heads, problem.scale, causal=False)
        states += [State(part.m[:, c], part.S[:, c], part.W[:, c]) for c in range(count)]
    return states


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> State:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    state = State.from_output(out, lse)
    # A row whose logits are all −∞, by an infinite key, comes back like one whose only logit is 0 and whose value is 0.
    doubtful = (lse == 0) & (out == 0).all(-1)
    if bool(doubtful.any()):
        _settle(state, doubtful, q, k, v, scale, causal)
    return state


def _settle(
    state: State, rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> None:
    """Compute the marked rows [B, H, N] of a call again in plain operations, in place."""
    for b, h in rows.any(-1).nonzero().tolist():
        which = rows[b, h].nonzero().squeeze(1)
        logits = q[b, h, which] @ k[b, h].transpose(0, 1) * scale
        if causal:
            logits = logits.masked_fill(torch.arange(k.shape[2]) > which.unsqueeze(1), float("-inf"))
        exact = State.from_logits(logits, v[b, h])
        state.m[b, h, which], state.S[b, h, which], state.W[b, h, which] = exact.m, exact.S, exact.W
