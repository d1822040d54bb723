"""Packed sequences of different lengths: checks, and the walk over them as single problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import torch

from elsa_kernels import checks
from elsa_kernels.registry import Operands, Problem


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    """Check everything that can be checked without reading the offsets, which may lie on a GPU."""
    checks.check_dtype(q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; packed sequences need [tokens, heads, D]")
        checks.check_same(name, tensor, q)
    if k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} disagree; k and v need one shape and q's D"
        )
    checks.check_heads(q.shape[1], k.shape[1])
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets.dtype != torch.int32 or offsets.dim() != 1:
            raise TypeError(f"{name} is {offsets.dtype} {list(offsets.shape)}; it must be int32 [sequences + 1]")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.numel() < 1:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.numel()} entries and cu_seqlens_k {cu_seqlens_k.numel()}; "
            "both need sequences + 1"
        )


def packed(
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
    return_state: bool,
) -> tuple[Problem, Operands]:
    """All sequences as one problem, for implementations that take it (`packs`). The offsets are not read."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    operands = Operands(
        q,
        k,
        v,
        alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
    )
    problem = checks.describe(
        operands,
        causal=causal,
        scale=scale,
        q_start=0,
        window=window,
        softcap=softcap,
        precision=precision,
        return_state=return_state,
    )
    B = cu_seqlens_q.numel() - 1
    return dataclasses.replace(problem, B=B, Nq=max_seqlen_q, Nk=max_seqlen_k, packed=True), operands


def sequences(
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
    return_state: bool,
) -> Iterator[tuple[slice, Problem, Operands]]:
    """Each sequence as its rows in q and one problem with B = 1. Reads the offsets: one synchronisation on a GPU."""
    q_offsets = _offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    k_offsets = _offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    for s in range(len(q_offsets) - 1):
        rows, keys = slice(q_offsets[s], q_offsets[s + 1]), slice(k_offsets[s], k_offsets[s + 1])
        operands = Operands(
            q=q[rows].transpose(0, 1).unsqueeze(0),
            k=k[keys].transpose(0, 1).unsqueeze(0),
            v=v[keys].transpose(0, 1).unsqueeze(0),
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
        problem = checks.build_problem(
            operands,
            causal=causal,
            scale=scale,
            q_start=None,
            window=window,
            softcap=softcap,
            precision=precision,
            return_state=return_state,
        )
        yield rows, problem, operands


def _offsets(of: str, tensor: torch.Tensor, total: int, longest: int) -> list[int]:
    offsets: list[int] = tensor.tolist()
    lengths = [b - a for a, b in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{of} must rise from 0 to the number of packed tokens, {total}; it holds {offsets[:8]}…"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{of} is {longest}, but a sequence has {max(lengths)} tokens; pass at least that")
    return offsets
