"""From a problem to launches: mode and tile, planes, the forward kernel, its careful second pass, chunks merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from elsa_kernels.devices import architecture
from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import State
from elsa_kernels.triton import forward, merge_kernel, tiles
from elsa_kernels.triton.split import split_kv

CAREFUL_TILE = tiles.Tile(BM=16, BN=16, num_warps=4, num_stages=1)
# Keys up to which each program splits K and V itself, for head dimensions up to INLINE_HEAD_DIM: one launch for two.
INLINE_KEYS = {"sm_90": 256}
INLINE_HEAD_DIM = 64
MERGE_CHUNKS = 16  # chunk states that `merge_kernel` holds at once
JOINED = 4  # states that `join_states_kernel` merges at once


@dataclass(frozen=True, slots=True)
class Plan:
    """How one problem is cut up."""

    mode: str
    tile: tiles.Tile
    BD: int
    blocks: int  # of packed query rows, per batch element and key head
    chunk: int  # keys of a chunk, 0 for one pass over all
    first_chunk: int
    chunks: int


def plan(problem: Problem, arch: str) -> Plan:
    rows = problem.Nq * (problem.H // problem.Hkv)
    mode = choose_mode(problem, rows, arch)
    BD = max(16, triton.next_power_of_2(problem.D))
    tile = tiles.rows_of_tile(tiles.choose(mode, BD, arch), rows)
    blocks = triton.cdiv(rows, tile.BM)
    if mode == "inline":
        tile = tiles.crowded(tile, blocks, problem.B * problem.Hkv)
        blocks = triton.cdiv(rows, tile.BM)
    first, end = _reach(problem)
    if rows > tiles.DECODE_ROWS or end - first <= tiles.CHUNK_KEYS:
        return Plan(mode, tile, BD, blocks, chunk=0, first_chunk=0, chunks=1)
    first_chunk = first // tiles.CHUNK_KEYS
    chunks = triton.cdiv(end, tiles.CHUNK_KEYS) - first_chunk
    return Plan(mode, tile, BD, blocks, tiles.CHUNK_KEYS, first_chunk, chunks)


def choose_mode(problem: Problem, rows: int, arch: str) -> str:
    """How products are made: see forward.py."""
    if problem.precision in ("ieee", "tf32"):
        return problem.precision
    if arch == "sm_75":  # Triton 3.6 emits no tensor-core instruction for Turing
        return "ieee"
    if problem.dtype != torch.float32:
        return "half"
    # Splitting K and V reads and writes them once more, which few query rows cannot pay for.
    if rows <= 16:
        return "ieee"
    return "inline" if problem.D <= INLINE_HEAD_DIM and problem.Nk <= INLINE_KEYS.get(arch, 0) else "split"


def _reach(problem: Problem) -> tuple[int, int]:
    """The half-open range of keys that any query sees by causality and window."""
    first, end = 0, problem.Nk
    if problem.packed:  # each sequence has positions of its own
        return first, end
    if problem.causal:
        end = min(end, problem.q_start + problem.Nq)
    if problem.window is not None:
        first = max(first, problem.q_start - problem.window + 1)
        end = min(end, problem.q_start + problem.Nq - 1 + problem.window)
    return first, max(first, end)


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    if problem.device.type != "cuda":  # the interpreter
        return _run(problem, operands, "default")
    with torch.cuda.device(problem.device):
        return _run(problem, operands, architecture(operands.q.get_device()))


def _run(problem: Problem, operands: Operands, arch: str) -> torch.Tensor | State:
    cut = plan(problem, arch)
    q, k, v = operands.q, _addressable(operands.k), _addressable(operands.v)
    keys: tuple[torch.Tensor | None, ...] = (k, None, None, None)
    values: tuple[torch.Tensor | None, ...] = (v, None, None)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    strides_of_planes = strides
    if cut.mode == "split":
        planes = split_kv(k, v, operands.kv_range, operands.cu_seqlens_k, problem.Nk if problem.packed else None)
        keys = (planes.k_hi, planes.k_lo, planes.k_scale, planes.order)
        values = (planes.v_hi, planes.v_lo, planes.v_scale)
        strides_of_planes = (*q.stride()[:3], *planes.k_hi.stride()[:3], *planes.v_hi.stride()[:3])
    state = problem.return_state or cut.chunks > 1
    m, S, out = _results(problem, operands, cut.chunks, state)
    grid = (cut.blocks * problem.B * problem.Hkv * cut.chunks,)
    todo = out if cut.mode == "inline" else torch.empty(grid, dtype=torch.int32, device=problem.device)
    shared = _shared_arguments(problem, operands, cut, state)
    extras = (
        operands.bias, operands.alibi_slopes, operands.sinks, operands.kv_range,
        operands.cu_seqlens_q, operands.cu_seqlens_k,
    )  # fmt: skip
    forward.forward_kernel[grid](
        q, *keys, *values, out, m, S, todo, *extras, *strides_of_planes,
        **shared, BM=cut.tile.BM, BN=cut.tile.BN, MODE=cut.mode, **cut.tile.options(),
    )  # fmt: skip
    if cut.mode != "inline":
        forward.careful_kernel[grid](
            q, k, v, out, m, S, todo, *extras, *strides,
            **shared, BM=cut.tile.BM, PART=CAREFUL_TILE.BM, BN=CAREFUL_TILE.BN, MARKS=1, BMARKS=1,
            num_warps=CAREFUL_TILE.num_warps, num_stages=CAREFUL_TILE.num_stages,
        )  # fmt: skip
    if cut.chunks > 1:
        return _merge(problem, operands, m, S, out)
    if m is not None and S is not None:
        return State(m[0], S[0], out[0])
    return out[0]


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a compact copy where a tile's offsets would not fit the kernel's 32 bits."""
    return x if x.stride(2) * 128 < 2**31 else x.contiguous()


def _results(
    problem: Problem, operands: Operands, chunks: int, state: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Room for m, S [chunks, B, H, Nq] and W or output [chunks, B, H, Nq, D].

    Of packed sequences: [chunks, H, tokens] and [chunks, H, tokens, D], but for the output, [1, tokens, H, D].
    """
    shape: tuple[int, ...] = (chunks, problem.B, problem.H, problem.Nq)
    if problem.packed:
        shape = (chunks, *operands.q.shape[1:3]) if state else (chunks, operands.q.shape[2], problem.H)
    if not state:
        return None, None, torch.empty((*shape, problem.D), dtype=problem.dtype, device=problem.device)
    m, S = (torch.empty(shape, dtype=torch.float32, device=problem.device) for _ in range(2))
    return m, S, torch.empty((*shape, problem.D), dtype=torch.float32, device=problem.device)


def _shared_arguments(problem: Problem, operands: Operands, cut: Plan, state: bool) -> dict[str, object]:
    """The arguments that both passes take alike."""
    bias = operands.bias
    strides = [0] * 4 if bias is None else [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride())]
    return {
        **dict(zip(("sbb", "sbh", "sbn", "sbj"), strides)),
        "B": problem.B,
        "Hkv": problem.Hkv,
        "Nq": problem.Nq,
        "Nk": problem.Nk,
        "total": operands.q.shape[2],
        "q_start": problem.q_start,
        "window": problem.window or 0,
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "n_blocks": cut.blocks,
        "first_chunk": cut.first_chunk,
        "GROUP": problem.H // problem.Hkv,
        "D": problem.D,
        "BD": cut.BD,
        "CHUNK": cut.chunk,
        "STATE": state,
        "CAUSAL": problem.causal,
        "WINDOW": problem.window is not None,
        "SOFTCAP": problem.softcap is not None,
        "ALIBI": problem.has_alibi,
        "HAS_BIAS": problem.has_bias,
        # With several chunks the sinks join once, when the chunks are merged.
        "HAS_SINKS": problem.has_sinks and cut.chunks == 1,
        "HAS_RANGES": problem.has_kv_range,
        "VARLEN": problem.packed,
    }


def _merge(
    problem: Problem, operands: Operands, m: torch.Tensor | None, S: torch.Tensor | None, W: torch.Tensor
) -> torch.Tensor | State:
    merged_m, merged_S, out = _results(problem, operands, 1, problem.return_state)
    tokens = operands.q.shape[2]  # Nq, or those of all packed sequences
    rows = operands.q.shape[0] * problem.H * tokens
    if problem.packed:
        out = out.view(1, problem.H, tokens, problem.D)
    merge_kernel.merge_kernel[(rows,)](
        m, S, W, operands.sinks, merged_m, merged_S, out,
        chunks=W.shape[0], rows=rows, Nq=tokens, H=problem.H,
        D=problem.D, BD=triton.next_power_of_2(problem.D), BC=MERGE_CHUNKS,
        STATE=problem.return_state, HAS_SINKS=problem.has_sinks, num_warps=4,
    )  # fmt: skip
    if merged_m is not None and merged_S is not None:
        return State(merged_m[0], merged_S[0], out[0])
    return out[0].transpose(0, 1).contiguous() if problem.packed else out[0]


def joined_output(states: Sequence[State], dtype: torch.dtype) -> torch.Tensor:
    """The output over all states' keys; see elsa_kernels.merging."""
    while len(states) > JOINED:
        first = states[0]
        joined = State(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (first.m, first.S, first.W)))
        _join(states[:JOINED], joined.W, joined)
        states = [joined, *states[JOINED:]]
    out = torch.empty(states[0].W.shape, dtype=dtype, device=states[0].W.device)
    _join(states, out)
    return out


def _join(states: Sequence[State], out: torch.Tensor, into: State | None = None) -> None:
    """Write the states' output to `out`, or their state to `into`, whose W is `out`. Both contiguous."""
    rows = [_in_rows(state) for state in states]
    missing = JOINED - len(rows)
    m, S = (into.m, into.S) if into is not None else (None, None)
    merge_kernel.join_states_kernel[(states[0].m.numel(),)](
        *(x for state in rows for x in (state.m, state.S, state.W)), *[None] * 3 * missing, m, S, out, out.shape[2],
        *(state.m.stride(1) for state in rows), *[0] * missing,
        COUNT=len(rows), D=out.shape[3], BD=triton.next_power_of_2(out.shape[3]), STATE=into is not None, num_warps=1,
    )  # fmt: skip


def _in_rows(state: State) -> State:
    """The state itself where heads are some rows apart and their queries lie one behind the other, as in a part of a
    larger state; else a compact copy."""
    (B, H, Nq), D = state.m.shape, state.W.shape[-1]
    heads = state.m.stride(1)
    in_rows = all(
        (B == 1 or x.stride(0) == H * heads * unit) and x.stride(1) == heads * unit and (Nq == 1 or x.stride(2) == unit)
        for x, unit in ((state.m, 1), (state.S, 1), (state.W, D))
    )
    if in_rows and state.W.stride(3) == 1:
        return state
    return State(state.m.contiguous(), state.S.contiguous(), state.W.contiguous())
