"""RMS norm, rotary embedding and gated activation in one pass each (Triton: any GPU it takes, and its interpreter)."""

from __future__ import annotations

import torch

ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension of x [..., D], rounded as LLaMA's module rounds.

    With `residual` (of x's shape): residual += x, in place, and it is the sum that is normalised. unit_offset: Gemma's
    form, (1 + weight) multiplied in FP32.
    """
    import triton

    from elsa_kernels.triton.elementwise import rms_norm_kernel

    D = x.shape[-1]
    rows = _rows(x, "x")
    sums = rows if residual is None else _rows(residual, "residual")
    if sums.shape != rows.shape:
        raise ValueError(f"residual is {tuple(sums.shape)}, x is {tuple(rows.shape)}: they are added")
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(D)
        rms_norm_kernel[(rows.shape[0],)](
            rows, sums, weight, out, D, rows.stride(0), sums.stride(0), D, eps,
            BLOCK=block, ADD=residual is not None, UNIT_OFFSET=unit_offset, num_warps=min(max(block // 1024, 1), 16),
        )  # fmt: skip
    return out.view(x.shape)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D] and k [T, Hkv, D], heads contiguous within a token, turned by cos and sin [T, D]: new tensors."""
    import triton

    from elsa_kernels.triton.elementwise import rotary_kernel

    T, H, D = q.shape
    Hkv = k.shape[1]
    for name, x in (("q", q), ("k", k)):
        if x.stride(2) != 1 or x.stride(1) != D:
            raise ValueError(f"{name} has strides {x.stride()}: a token's heads must lie side by side")
    if cos.shape != (T, D) or sin.shape != (T, D) or cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise ValueError(f"cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}: expected rows of {(T, D)}")
    q_out, k_out = torch.empty(T, H, D, dtype=q.dtype, device=q.device), torch.empty_like(k, memory_format=torch.contiguous_format)
    if T:
        heads = 16
        rotary_kernel[(T, triton.cdiv(H + Hkv, heads))](
            q, k, cos, sin, q_out, k_out, H, Hkv, q.stride(0), k.stride(0), cos.stride(0),
            HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), HEADS=heads, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up for gate and up [..., F]: a new tensor. The activation is one of ACTIVATIONS."""
    import triton

    from elsa_kernels.triton.elementwise import gated_kernel

    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    gates, ups = _rows(gate, "gate"), _rows(up, "up")
    if gates.shape != ups.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, up is {tuple(up.shape)}: they are multiplied")
    R, F = gates.shape
    out = torch.empty(R, F, dtype=gate.dtype, device=gate.device)
    if out.numel():
        block = min(triton.next_power_of_2(F), 2048)
        gated_kernel[(R, triton.cdiv(F, block))](
            gates, ups, out, F, gates.stride(0), ups.stride(0), BLOCK=block, ACTIVATION=activation, num_warps=4
        )
    return out.view(*gate.shape[:-1], F)


def _rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., D] as [R, D], never a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension: expected 1")
    return x.view(-1, x.shape[-1])
