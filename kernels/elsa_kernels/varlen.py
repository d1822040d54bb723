"""Packed sequences of different lengths: checks, and the walk over them as single problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a call of `attention_varlen`, checked: one problem together, or one each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    precision: str
    return_state: bool

    def together(self) -> tuple[Problem, Operands]:
        """All sequences as one problem, for implementations that take it (`packs`). The offsets are not read."""
        operands = self._operands(
            slice(None),
            slice(None),
            cu_seqlens_q=self.cu_seqlens_q.contiguous(),
            cu_seqlens_k=self.cu_seqlens_k.contiguous(),
        )
        problem = checks.describe(operands, q_start=0, **self._options())
        B = self.cu_seqlens_q.numel() - 1
        return replace(problem, B=B, Nq=self.max_seqlen_q, Nk=self.max_seqlen_k, packed=True), operands

    def each(self) -> Iterator[tuple[slice, Problem, Operands]]:
        """Each sequence as its rows in q and one problem with B = 1. Reads the offsets: a GPU is waited for."""
        q_offsets = _offsets("q", self.cu_seqlens_q, self.q.shape[0], self.max_seqlen_q)
        k_offsets = _offsets("k", self.cu_seqlens_k, self.k.shape[0], self.max_seqlen_k)
        for rows, keys in zip(starmap(slice, pairwise(q_offsets)), starmap(slice, pairwise(k_offsets))):
            operands = self._operands(rows, keys)
            yield rows, checks.build_problem(operands, q_start=None, **self._options()), operands

    def _operands(self, rows: slice, keys: slice, **offsets: torch.Tensor) -> Operands:
        """[tokens, heads, D] of some rows and keys as [1, heads, N, D]."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (self.q[rows], self.k[keys], self.v[keys]))
        return Operands(q, k, v, self.alibi_slopes, sinks=self.sinks, **offsets)

    def _options(self) -> dict[str, Any]:
        names = ("causal", "scale", "window", "softcap", "precision", "return_state")
        return {name: getattr(self, name) for name in names}


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
