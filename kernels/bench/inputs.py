"""Inputs of a case, and the truth about a sample of its rows."""

from __future__ import annotations

import torch
from elsa_kernels.reference import attention_reference

from kernels.bench.cases import Case

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(case: Case, family: str = "normal", seed: int = 0, device: str = "cuda") -> Tensors:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] of a family of inputs."""
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(case.B, heads, length, case.D, device=device, generator=g)

    q, k, v = normal(case.H, case.Nq), normal(case.Hkv, case.Nk), normal(case.Hkv, case.Nk)
    if family == "positive":
        q, k, v = q.abs(), k.abs(), v.abs()
    elif family == "outlier":  # one channel in 32 a hundred times as large, in each tensor
        for x in (q, k, v):
            x[..., ::32] *= 100.0
        q[..., ::32] *= 1e-3  # keeps the logits in a range where the softmax is no one-hot
    elif family == "small":
        q, k, v = q * 1e-4, k * 1e-4, v * 1e-4
    elif family == "large":
        q, k, v = q * 1e-4, k * 1e4, v * 1e4
    elif family == "sharp":
        q = q * 4.0
    elif family == "flat":
        q = q * 0.01
    elif family != "normal":
        raise ValueError(f"unknown family of inputs {family!r}")
    dtype = getattr(torch, case.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def relative_error(case: Case, tensors: Tensors, out: torch.Tensor, rows: int = 16, heads: int = 4) -> float:
    """‖out − truth‖ / ‖truth‖ against float64, over `rows` query rows of up to `heads` heads of one batch element.

    The rows are spread over the second half of the queries, the last one included: those that see most keys.
    """
    q, k, v = tensors
    b = case.B - 1
    group = case.H // case.Hkv
    picked_heads = torch.linspace(0, case.H - 1, min(heads, case.H)).long().unique()
    picked_rows = torch.linspace(case.Nq // 2, case.Nq - 1, min(rows, case.Nq)).long().unique().to(q.device)
    off, norm = 0.0, 0.0
    for h in picked_heads.tolist():
        kv = slice(h // group, h // group + 1)
        truth = attention_reference(
            q[b : b + 1, h : h + 1, picked_rows].double(), k[b : b + 1, kv].double(), v[b : b + 1, kv].double(),
            causal=case.causal, q_positions=picked_rows + case.Nk - case.Nq,
        )  # fmt: skip
        got = out[b : b + 1, h : h + 1, picked_rows].double()
        off += (got - truth).square().sum().item()
        norm += truth.square().sum().item()
    return (off / norm) ** 0.5
