"""RMS norm, rotary embedding, gated activation and transposes of heads, one pass over memory each.

Triton; on a CPU plain torch.
All round where transformers' modules round: FP32 inside, the tensors' dtype between the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.knobs

    _TRITON_MISSING = None
except ImportError as error:
    _TRITON_MISSING = str(error)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
FEW_TOKENS = 64  # up to which torch's copy is the quicker one to launch
ACTIVATIONS = ("silu", "gelu_tanh")


def _on_device(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Launches go to the device of the first argument, whichever is current."""

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return guarded


@_on_device
def rms_norm(
    x: torch.Tensor,
    /,
    weight: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension of x [..., D], rounded as LLaMA's module rounds.

    unit_offset: Gemma's form, (1 + weight) multiplied in FP32.
    """
    if not _by_triton(x):
        return _rms_norm_torch(x, weight, eps, unit_offset)
    from elsa_kernels.triton.elementwise import rms_norm_kernel

    D = x.shape[-1]
    # Heads that lie transposed, as Gemma 3 normalises them, are no rows of one stride: those are copied.
    rows = _rows(x.reshape(-1, D), "x")
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(D)
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, D, rows.stride(0), D, eps,
            BLOCK=block, UNIT_OFFSET=unit_offset, num_warps=min(max(block // 1024, 1), 16),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out.view(x.shape)


def _rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    full = x.float()
    full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + eps)
    return (full * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * full.to(x.dtype)


def rotary(
    q: torch.Tensor, /, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D] and k [T, Hkv, D], turned by cos and sin [T, D] in halves (GPT-NeoX's form): new tensors."""
    T, H, D = q.shape
    if cos.shape != (T, D) or sin.shape != (T, D):
        raise ValueError(f"cos and sin are {tuple(cos.shape)} and {tuple(sin.shape)}: expected {(T, D)}")
    for name, x in (("q", q), ("k", k)):
        if x.stride(2) != 1 or x.stride(1) != D:
            raise ValueError(f"{name} has strides {x.stride()}: a token's heads must lie side by side")
    if not _by_triton(q):
        return tuple(x * cos[:, None] + _rotate_half(x) * sin[:, None] for x in (q, k))  # type: ignore[return-value]
    from elsa_kernels.triton.elementwise import rotary_kernel

    cos, sin = cos.contiguous(), sin.contiguous()
    Hkv = k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if T:
        heads = 16
        rotary_kernel[(T, triton.cdiv(H + Hkv, heads))](
            q, k, cos, sin, q_out, k_out, H, Hkv, q.stride(0), k.stride(0), D,
            HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), HEADS=heads, num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add would skip the rounding between them
        )  # fmt: skip
    return q_out, k_out


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@_on_device
def gated(gate: torch.Tensor, /, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up for gate and up [..., F]: a new tensor. The activation is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, up is {tuple(up.shape)}: they are multiplied")
    if not _by_triton(gate):
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    from elsa_kernels.triton.elementwise import gated_kernel

    gates, ups = _rows(gate, "gate"), _rows(up, "up")
    R, columns = gates.shape
    out = torch.empty(R, columns, dtype=gate.dtype, device=gate.device)
    if out.numel():
        block = min(triton.next_power_of_2(columns), 2048)
        gated_kernel[(R, triton.cdiv(columns, block))](
            gates, ups, out, columns, gates.stride(0), ups.stride(0), BLOCK=block, ACTIVATION=activation, num_warps=4
        )
    return out.view(gate.shape)


@_on_device
def copy_heads(target: torch.Tensor, /, source: torch.Tensor) -> None:
    """target [H, T, D] = source [H, T, D] where one lies head by head and the other token by token.

    torch's copy of such transposes reaches a third of the memory's bandwidth.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"target is {tuple(target.shape)} {target.dtype}, source {tuple(source.shape)} {source.dtype}: they differ"
        )
    plain = target.device != source.device or target.stride(2) != 1 or source.stride(2) != 1
    if plain or not _by_triton(target) or target.shape[1] < FEW_TOKENS:
        target.copy_(source)
        return
    from elsa_kernels.triton.elementwise import copy_heads_kernel

    H, T, D = target.shape
    if target.numel():
        rows = 64
        copy_heads_kernel[(triton.cdiv(T, rows), H)](
            target, source, T, D, *target.stride()[:2], *source.stride()[:2],
            ROWS=rows, BLOCK=triton.next_power_of_2(D), num_warps=4,
        )  # fmt: skip


def _by_triton(x: torch.Tensor) -> bool:
    if _TRITON_MISSING is not None or x.device.type == "meta":
        return False
    return x.device.type != "cpu" or triton.knobs.runtime.interpret


def _rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., D] as [R, D], never a copy."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension: expected 1")
    return x.view(-1, x.shape[-1])
