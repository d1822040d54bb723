"""What stands between a decoder layer's matrix products, one pass over memory each.

Every kernel computes in FP32 and rounds to the tensors' dtype where transformers' modules do, so that a layer gives the
same bits but for the order of the norm's sum and the last bit of exp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, weight, out, D, x_stride, out_stride, eps, BLOCK: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """out [R, D] = weight · x / rms(x), one program a row.

    UNIT_OFFSET: Gemma's (1 + weight), multiplied before rounding; without it LLaMA's, which rounds before.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
    dtype = value.dtype
    full = value.to(tl.float32)
    full = full * tl.rsqrt(tl.sum(full * full, axis=0) / D + eps)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        full = full * (1.0 + w)
    else:
        full = full.to(dtype).to(tl.float32) * w
    tl.store(out + row * out_stride + columns, full.to(dtype), mask=mask)


@triton.jit
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, H, Hkv, q_stride, k_stride, table_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q_out [T, H, D], k_out [T, Hkv, D] = x·cos + rotate_half(x)·sin; a program has HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK)
    m_half = (half < HALF)[None, :]
    dtype = q.dtype.element_ty
    c1 = tl.load(cos + token * table_stride + half, mask=half < HALF, other=0.0)[None, :].to(tl.float32)
    c2 = tl.load(cos + token * table_stride + HALF + half, mask=half < HALF, other=0.0)[None, :].to(tl.float32)
    s1 = tl.load(sin + token * table_stride + half, mask=half < HALF, other=0.0)[None, :].to(tl.float32)
    s2 = tl.load(sin + token * table_stride + HALF + half, mask=half < HALF, other=0.0)[None, :].to(tl.float32)
    is_q = heads < H
    mask = (heads < H + Hkv)[:, None] & m_half
    source = tl.where(is_q[:, None], q + token * q_stride + heads[:, None] * 2 * HALF,
                      k + token * k_stride + (heads - H)[:, None] * 2 * HALF) + half[None, :]  # fmt: skip
    target = tl.where(is_q[:, None], q_out + (token * H + heads[:, None]) * 2 * HALF,
                      k_out + (token * Hkv + heads[:, None] - H) * 2 * HALF) + half[None, :]  # fmt: skip
    x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    y1 = (x1 * c1).to(dtype).to(tl.float32) + (-x2 * s1).to(dtype).to(tl.float32)
    y2 = (x2 * c2).to(dtype).to(tl.float32) + (x1 * s2).to(dtype).to(tl.float32)
    tl.store(target, y1.to(dtype), mask=mask)
    tl.store(target + HALF, y2.to(dtype), mask=mask)


@triton.jit
def gated_kernel(gate, up, out, F, gate_stride, up_stride, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """out [T, F] = activation(gate)·up, the activation "silu" or "gelu_tanh"; a program has BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    raw = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0)
    g = raw.to(tl.float32)
    # GELU by tanh is g·sigmoid(2y); exp that overflows gives the limit, 0.
    y = g
    if ACTIVATION == "gelu_tanh":
        y = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    g = g / (1.0 + tl.exp(-y))
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * F + columns, (g.to(raw.dtype).to(tl.float32) * u).to(raw.dtype), mask=mask)


@triton.jit
def copy_heads_kernel(
    target, source, T, D, target_h, target_t, source_h, source_t, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """target [H, T, D] = source [H, T, D], each with its own strides: a program has ROWS tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    tokens = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = (tokens < T)[:, None] & (columns < D)[None, :]
    value = tl.load(source + head * source_h + tokens[:, None] * source_t + columns[None, :], mask=mask)
    tl.store(target + head * target_h + tokens[:, None] * target_t + columns[None, :], value, mask=mask)
