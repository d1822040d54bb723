"""Validation of what users pass: every error names the value and the remedy, and nothing is silently changed."""

from __future__ import annotations

import math

import torch

from elsa_kernels.registry import PRECISIONS, Operands, Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def build_problem(
    operands: Operands,
    *,
    causal: bool,
    scale: float | None,
    q_start: int | None,
    window: int | None,
    softcap: float | None,
    precision: str | None,
    return_state: bool,
) -> Problem:
    """Check one call and describe it. Raises ValueError or TypeError."""
    _check_qkv(operands)
    _check_extras(operands)
    Nq, D, Nk = operands.q.shape[2], operands.q.shape[3], operands.k.shape[2]
    return describe(
        operands,
        causal=causal,
        scale=resolve_scale(scale, D),
        q_start=Nk - Nq if q_start is None else q_start,
        window=positive_window(window),
        softcap=positive_softcap(softcap),
        precision=resolve_precision(operands.q.dtype, precision),
        return_state=return_state,
    )


def describe(
    operands: Operands,
    *,
    causal: bool,
    scale: float,
    q_start: int,
    window: int | None,
    softcap: float | None,
    precision: str,
    return_state: bool,
) -> Problem:
    """The problem that checked operands and resolved options make."""
    q, k = operands.q, operands.k
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1], k.shape[2]
    return Problem(
        B=B,
        H=H,
        Hkv=Hkv,
        Nq=Nq,
        Nk=Nk,
        D=D,
        dtype=q.dtype,
        device=q.device,
        precision=precision,
        causal=causal,
        scale=scale,
        q_start=q_start,
        window=window,
        softcap=softcap,
        has_alibi=operands.alibi_slopes is not None,
        has_bias=operands.bias is not None,
        has_sinks=operands.sinks is not None,
        has_kv_range=operands.kv_range is not None,
        return_state=return_state,
    )


def resolve_scale(scale: float | None, D: int) -> float:
    if scale is None:
        return D**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; give a finite number, or None for 1/sqrt(head_dim)")
    return float(scale)


def resolve_precision(dtype: torch.dtype, precision: str | None) -> str:
    """The precision name that a call runs at. Never "tf32" unless that was asked for."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}, or None")
    if dtype == torch.float64:
        if precision not in (None, "ieee"):
            raise ValueError(
                f"precision {precision!r} does not apply to float64, which is computed as it is; pass None"
            )
        return "ieee"
    if precision == "tf32" and dtype != torch.float32:
        raise ValueError(f"precision 'tf32' applies to float32 tensors, not {dtype}; pass None")
    return precision or "fp32"


def check_same(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; move them to one device")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} is {tensor.dtype} and q is {q.dtype}; convert them to one dtype")


def check_dtype(q: torch.Tensor) -> None:
    if q.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"q is {q.dtype}; attention takes {names}")


def check_heads(H: int, Hkv: int) -> None:
    if Hkv == 0 or H % Hkv:
        raise ValueError(
            f"{H} query heads are not a multiple of {Hkv} key/value heads; grouped heads need H % Hkv == 0"
        )


def check_shape(name: str, tensor: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {wanted}")


def _check_qkv(operands: Operands) -> None:
    q, k, v = operands.q, operands.k, operands.v
    check_dtype(q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions, shape {list(tensor.shape)}; it must be [B, heads, N, D]"
            )
        check_same(name, tensor, q)
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1: call {name}.contiguous()"
            )
    B, H, _, D = q.shape
    if D == 0:
        raise ValueError("q has head dimension 0; it must be at least 1")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {list(k.shape)} and v {list(v.shape)}; they must be equal")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}; batch and head dimension must agree")
    check_heads(H, k.shape[1])


def _check_extras(operands: Operands) -> None:
    B, H, Nq, _ = operands.q.shape
    Nk = operands.k.shape[2]
    device = operands.q.device
    for name in ("alibi_slopes", "bias", "sinks", "kv_range"):
        tensor = getattr(operands, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and q on {device}; move them to one device")
    for name in ("alibi_slopes", "sinks"):
        tensor = getattr(operands, name)
        if tensor is not None:
            check_shape(name, tensor, (H,))
            _check_floating(name, tensor)
    if operands.bias is not None:
        bias = operands.bias
        _check_floating("bias", bias)
        fits = (
            bias.dim() == 4
            and all(n in (1, full) for n, full in zip(bias.shape[:3], (B, H, Nq)))
            and bias.shape[3] == Nk
        )
        if not fits:
            raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{B} or 1, {H} or 1, {Nq} or 1, {Nk}]")
    if operands.kv_range is not None:
        check_shape("kv_range", operands.kv_range, (B, 2))
        if operands.kv_range.dtype != torch.int32:
            raise TypeError(f"kv_range is {operands.kv_range.dtype}; it must be int32 (call kv_range.int())")


def _check_floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        hint = "; turn a boolean mask into 0 and −inf" if tensor.dtype == torch.bool else ""
        raise TypeError(f"{name} is {tensor.dtype}; it must be a floating-point tensor{hint}")


def positive_window(window: int | None) -> int | None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 (1 sees a query's own position), or None for all")
    return window


def positive_softcap(softcap: float | None) -> float | None:
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}; it must be a finite positive number, or None for no cap")
    return None if softcap is None else float(softcap)
