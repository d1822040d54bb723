"""Decode context parallelism: each rank holds a share of every request's KV; shares merge as monoid states do.

A rank's output and logsumexp over its keys are a state `(m = lse, S = 1, W = out)`. Ranks exchange the logsumexps,
weigh their outputs by exp(lse − total), and sum: `elsa_kernels.state.merge`, with the network for its top level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Group(Protocol):
    """The part of vLLM's GroupCoordinator that is used: ranks hold equal heads, gathered and scattered along dim 1."""

    world_size: int
    rank_in_group: int
    device_communicator: Any

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor: ...

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor: ...


@dataclass(slots=True)
class Share:
    """A rank's part of a batch's KV. Lengths are device tensors [B] int32, persistent for CUDA graphs."""

    group: Any
    seq_lens: torch.Tensor  # keys that this rank holds, the batch's own tokens included
    context_lens: torch.Tensor  # the same without the batch's own tokens
    max_seq_len: int  # upper bound on seq_lens
    seqlens: tuple[tuple[int, int], ...] | None  # (queries, keys before them on this rank), where they help


def local_lengths(lengths: torch.Tensor, size: int, rank: int, interleave: int) -> torch.Tensor:
    """How many of the first `lengths` tokens a rank holds, runs of `interleave` tokens going round the ranks."""
    stripe = size * interleave
    whole = lengths // stripe * interleave
    rest = lengths % stripe - rank * interleave
    return whole + rest.clamp(0, interleave)


def merge_ranks(out: torch.Tensor, lse: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, ranks·H, D] and lse [T, ranks·H] (natural log, float32) over this rank's keys, for the heads of all
    ranks, become those over all keys for this rank's own heads: [T, H, D] float32 and [T, H]."""
    size, rank = group.world_size, group.rank_in_group
    T, heads = lse.shape
    by_rank = group.all_gather(lse.contiguous(), dim=0).view(size, T, heads)
    total = torch.logsumexp(by_rank, dim=0)
    # A row without keys on any rank has total −∞, and weight 0 rather than exp(−∞ + ∞).
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    merged = _sum_own_heads(out.float() * weight.unsqueeze(-1), group)
    own = heads // size
    return merged, total[:, rank * own : (rank + 1) * own]


def _sum_own_heads(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the ranks of parts [T, ranks·H, D], for this rank's own heads: [T, H, D]."""
    communicator = group.device_communicator
    pynccl = getattr(communicator, "pynccl_comm", None)
    if pynccl is None or not pynccl.disabled:
        return group.reduce_scatter(parts, dim=1)
    # vLLM calls no NCCL of its own: 0.32 gives that up, without a word, beside one older than 2.29.7, which lacks a
    # symbol. Its gathers then go through torch.distributed, but its reduce_scatter for CUDA returns unwritten memory.
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    summed: torch.Tensor = DeviceCommunicatorBase.reduce_scatter(communicator, parts, dim=1)
    return summed


def prove(group: Group, device: torch.device) -> None:
    """Merges states whose sum is known; every rank of the group must call it. RuntimeError where it comes out wrong.

    A communicator that could not be loaded may return memory that nobody wrote: tokens would be wrong without a word.
    """
    size, rank = group.world_size, group.rank_in_group
    heads = torch.arange(1.0, size + 1, device=device)  # of rank r the output at head h is h·(r + 1), its sum r + 1
    for times in (1.0, 3.0):
        out = (heads * (rank + 1) * times).view(1, size, 1).expand(2, size, 8)
        lse = torch.full((2, size), math.log(rank + 1), device=device)
        merged, total = merge_ranks(out, lse, group)
        sums = torch.arange(1.0, size + 1, dtype=torch.float64)
        expected = float((sums**2).sum() / sums.sum()) * (rank + 1) * times
        right = torch.full_like(merged, expected), torch.full_like(total, math.log(sums.sum()))
        if not (torch.allclose(merged, right[0], rtol=1e-5) and torch.allclose(total, right[1], rtol=1e-5)):
            raise RuntimeError(
                f"decode context parallelism: rank {rank} of {size} merges known states to "
                f"{merged.flatten()[0].item():g} where {expected:g} is right, so the communication between these GPUs "
                "is at fault (check that vLLM finds the NCCL it was built for, or set --decode-context-parallel-size 1)"
            )
