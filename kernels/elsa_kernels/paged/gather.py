"""Sequence by sequence: its pages gathered to contiguous K and V, then dense attention. Right on every device.

It needs the lengths on the host. Where the caller did not pass them, it reads them from the device, which no CUDA
graph can capture. On a CPU the gather is a copy within the cache hierarchy; on a Hopper GPU it is the fast way for
sequences with many queries, since the dense kernels reach several times what a kernel over pages does.
"""

from __future__ import annotations

import torch

from elsa_kernels import checks
from elsa_kernels.paged.problem import FP8, Lengths, PagedOperands, PagedProblem
from elsa_kernels.paged.registry import PagedImplementation, register
from elsa_kernels.registry import Operands
from elsa_kernels.registry import select as select_dense
from elsa_kernels.state import NEG_INF, State


def pages_of(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` rows of a sequence, [length, Hkv, D] contiguous, whose pages are listed in `blocks`."""
    used = blocks[: -(-length // cache.shape[1])]
    if cache.dtype == FP8:
        return cache.view(torch.uint8).index_select(0, used).flatten(0, 1)[:length].view(FP8)
    return cache.index_select(0, used).flatten(0, 1)[:length]


def widened(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows [N, Hkv, D] of an FP8 cache times their scale, in `dtype`; those of other caches as they are."""
    if x.dtype != FP8:
        return x
    if scale is None:
        return x.to(dtype)
    return (x.float() * scale.view(1, -1, 1)).to(dtype)


def host_lengths(problem: PagedProblem, operands: PagedOperands) -> Lengths:
    """(queries, keys) of every sequence, read from the device if need be. Raises ValueError where they cannot be."""
    if problem.lengths is not None:
        return problem.lengths
    offsets, keys = operands.cu_seqlens_q.tolist(), operands.seqused_k.tolist()
    lengths = tuple((b - a, n) for a, b, n in zip(offsets, offsets[1:], keys))
    if offsets[0] != 0 or min((min(pair) for pair in lengths), default=0) < 0:
        raise ValueError(f"cu_seqlens_q must rise from 0 and seqused_k be ≥ 0; they hold {offsets[:8]}…, {keys[:8]}…")
    longest_q, longest_k = (max((pair[i] for pair in lengths), default=0) for i in (0, 1))
    room = operands.block_table.shape[1] * problem.page
    if longest_k > min(room, problem.max_seqlen_k):
        raise ValueError(
            f"a sequence has {longest_k} keys; max_seqlen_k is {problem.max_seqlen_k} and the block table holds {room}"
        )
    if longest_q > problem.max_seqlen_q and offsets[-1] <= problem.T:
        raise ValueError(f"a sequence has {longest_q} queries; max_seqlen_q is {problem.max_seqlen_q}")
    return lengths


def attend_sequence(
    problem: PagedProblem, operands: PagedOperands, s: int, rows: slice, keys: int, position: int, impl: str | None
) -> None:
    """Sequence s, whose queries lie at `rows`, the first of them at key position `position`, over its `keys` keys."""
    # An FP8 cache is widened for every call: on a CPU to float32, where rounding its scale to 16 bits saves nothing.
    dtype = torch.float32 if problem.kv_dtype == FP8 and problem.device.type == "cpu" else problem.dtype
    blocks = operands.block_table[s]
    k = widened(pages_of(operands.k_cache, blocks, keys), operands.k_scale, dtype)
    v = widened(pages_of(operands.v_cache, blocks, keys), operands.v_scale, dtype)
    attend_contiguous(problem, operands, rows, k, v, position, impl)


def attend_contiguous(
    problem: PagedProblem,
    operands: PagedOperands,
    rows: slice,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    impl: str | None,
) -> None:
    """Queries at `rows` over k, v [keys, Hkv, D]; writes out and lse."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (operands.q[rows].to(k.dtype), k, v))
    dense = Operands(q, k, v, alibi_slopes=operands.alibi_slopes, sinks=operands.sinks)
    described = checks.describe(
        dense,
        causal=problem.causal,
        scale=problem.scale,
        q_start=position,
        window=problem.window,
        softcap=problem.softcap,
        precision=problem.precision,
        return_state=operands.lse is not None,
    )
    out, lse = operands.out[rows], None if operands.lse is None else operands.lse[rows]
    if k.shape[2] == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(NEG_INF) if operands.sinks is None else lse.copy_(operands.sinks)
        return
    result = select_dense(described, impl).run(described, dense)
    if isinstance(result, State):
        if lse is not None:
            lse.copy_(result.logsumexp()[0].transpose(0, 1))
        result = result.finalize()
    out.copy_(result[0].transpose(0, 1))


def attend_all(problem: PagedProblem, operands: PagedOperands, impl: str | None = None) -> None:
    """Every sequence in turn. Queries beyond q's T tokens, which padding may name, do not exist."""
    start = 0
    for s, (queries, keys) in enumerate(host_lengths(problem, operands)):
        rows = slice(start, min(start + queries, problem.T))
        if rows.stop > rows.start:
            attend_sequence(problem, operands, s, rows, keys, keys - queries, impl)
        start += queries


def supports(problem: PagedProblem) -> str | None:
    if problem.device.type == "cuda" and problem.lengths is None and torch.cuda.is_current_stream_capturing():
        return "it needs the sequences' lengths on the host, which a CUDA graph cannot read; pass seqlens"
    return None


gather = register(PagedImplementation(name="gather", priority=10, supports=supports, run=attend_all, home=("cpu",)))
reference = register(
    PagedImplementation(
        name="reference",
        priority=-1,
        supports=supports,
        run=lambda problem, operands: attend_all(problem, operands, "reference"),
    )
)
