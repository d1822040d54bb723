"""Splitting rows into FP16 pairs, and X·Wᵀ from such pairs in plain Triton (sm_80 and newer, and the interpreter)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_rows_kernel(x, hi, lo, exponent, nonfinite, K, stride, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """x [R, K] FP32 → hi, lo [R, K] FP16 and exponent [R] with x = (hi + lo)·2^exponent; one program a row.

    The row's largest finite value lands in [2^14, 2^15), so that lo keeps eleven bits below hi's eleven down to 2^-39
    of it. An Inf or NaN stays in hi, with lo = 0, and sets nonfinite [R]. ONE: a block holds the row, read once.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x += row * stride
    largest = tl.zeros([BLOCK], tl.float32)
    special = tl.zeros([BLOCK], tl.int32)
    value = tl.load(x + columns, mask=columns < K, other=0.0)
    for start in range(0, BLOCK if ONE else K, BLOCK):
        if not ONE:
            value = tl.load(x + start + columns, mask=start + columns < K, other=0.0)
        finite = tl.abs(value) < float("inf")
        largest = tl.maximum(largest, tl.where(finite, tl.abs(value), 0.0))
        special = special | tl.where(finite, 0, 1)
    # From the float's bits; clamped so that 2^(14 - e) is a normal number: below 2^-112 the scale stays.
    e = tl.maximum(tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23, 15) - 127
    up = ((141 - e) << 23).to(tl.float32, bitcast=True)
    for start in range(0, BLOCK if ONE else K, BLOCK):
        mask = start + columns < K
        if not ONE:
            value = tl.load(x + start + columns, mask=mask, other=0.0)
        finite = tl.abs(value) < float("inf")
        scaled = tl.where(finite, value * up, value)
        high = scaled.to(tl.float16)
        low = tl.where(finite, scaled - high.to(tl.float32), 0.0).to(tl.float16)
        tl.store(hi + row * K + start + columns, high, mask=mask)
        tl.store(lo + row * K + start + columns, low, mask=mask)
    tl.store(exponent + row, e - 14)
    tl.store(nonfinite + row, tl.max(special, axis=0))


@triton.jit
def _power_of_two(e):
    """2^e in FP32 for e ≤ 127; below 2^-126, which no sum here can tell from 0, it stays 2^-126."""
    return ((tl.maximum(e, -126) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _apply_exponent(value, e):
    """value·2^e in two exact halves, neither of which overflows where the result does not."""
    half = e >> 1
    return value * _power_of_two(half) * _power_of_two(e - half)


@triton.jit
def linear_kernel(
    x_hi, x_lo, x_exponent, w_hi, w_lo, w_exponent, bias, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out [M, N] = X·Wᵀ (+ bias); each BK of K is three products from zero, added outside the tensor core."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    index = tl.program_id(0)
    per_group = GROUP * tiles_n
    first = (index // per_group) * GROUP
    height = tl.minimum(GROUP, tiles_m - first)
    m = first + (index % per_group) % height
    n = (index % per_group) // height
    rows = m * BM + tl.arange(0, BM)
    cols = n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    o_x = rows.to(tl.int64)[:, None] * K + inner[None, :]
    o_w = cols.to(tl.int64)[None, :] * K + inner[:, None]
    m_rows = (rows < M)[:, None]
    m_cols = (cols < N)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        m_inner = start + inner < K
        b_x1 = tl.load(x_lo + o_x + start, mask=m_rows & m_inner[None, :], other=0.0)  # [BM, BK]
        b_x0 = tl.load(x_hi + o_x + start, mask=m_rows & m_inner[None, :], other=0.0)
        b_w0 = tl.load(w_hi + o_w + start, mask=m_cols & m_inner[:, None], other=0.0)  # [BK, BN]
        b_w1 = tl.load(w_lo + o_w + start, mask=m_cols & m_inner[:, None], other=0.0)
        part = tl.dot(b_x1, b_w0, input_precision="ieee", out_dtype=tl.float32)
        part = tl.dot(b_x0, b_w1, part, input_precision="ieee", out_dtype=tl.float32)
        part = tl.dot(b_x0, b_w0, part, input_precision="ieee", out_dtype=tl.float32)
        acc += part
    e = tl.load(x_exponent + rows, mask=rows < M, other=0)[:, None]
    e += tl.load(w_exponent + cols, mask=cols < N, other=0)[None, :]
    acc = _apply_exponent(acc, e)
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + cols[None, :], acc, mask=m_rows & m_cols)


@triton.jit
def _exact_row(x, w_hi, w_lo, e, cols, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """One row of X·Wᵀ [BN] as FP32 arithmetic has it, Inf and NaN included: pairs would give Inf − Inf."""
    inner = tl.arange(0, BK)
    acc = tl.zeros([BN], tl.float32)
    for start in range(0, K, BK):
        m_inner = start + inner < K
        pair = (cols < N)[:, None] & m_inner[None, :]
        offsets = cols.to(tl.int64)[:, None] * K + start + inner[None, :]
        w = tl.load(w_hi + offsets, mask=pair, other=0.0).to(tl.float32)
        w += tl.load(w_lo + offsets, mask=pair, other=0.0).to(tl.float32)
        value = tl.load(x + start + inner, mask=m_inner, other=0.0)
        # An Inf of x is never multiplied by the padding of W.
        acc += tl.sum(tl.where(pair, value[None, :] * _apply_exponent(w, e[:, None]), 0.0), axis=1)
    return acc


@triton.jit
def repair_kernel(
    x, stride, nonfinite, w_hi, w_lo, w_exponent, bias, out, M, N, K,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Recompute the rows of out whose x holds an Inf or NaN. A program looks after ROWS rows, mostly in vain."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    if tl.max(tl.load(nonfinite + rows, mask=rows < M, other=0), axis=0) != 0:
        for row in range(first, tl.minimum(first + ROWS, M)):
            if tl.load(nonfinite + row) != 0:
                for start in range(0, N, BN):
                    cols = start + tl.arange(0, BN)
                    e = tl.load(w_exponent + cols, mask=cols < N, other=0)
                    o_row = tl.cast(row, tl.int64)
                    acc = _exact_row(x + o_row * stride, w_hi, w_lo, e, cols, N, K, BN, BK)
                    if BIAS:
                        acc += tl.load(bias + cols, mask=cols < N, other=0.0)
                    tl.store(out + o_row * N + cols, acc, mask=cols < N)


@triton.jit
def _half_unit(value):
    """Half a unit in the last place, with the sign: a sum to which it was added is a rounded one once truncated."""
    return (value.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True) * 5.9604644775390625e-08


@triton.jit
def _add(total, rest, part):
    """total + part in FP32, and what that sum has lost so far."""
    both = total + part
    of_part = both - total
    return both, rest + ((total - (both - of_part)) + (part - of_part))


@triton.jit
def skinny_kernel(
    x_hi, x_lo, w_hi, w_lo, parts, M, N, K, SPAN,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts [K / SPAN, M, N]: X·Wᵀ of a few rows over spans of K, before exponents: one pass over W's planes.

    The spans give every multiprocessor several programs even where N is small; they do not depend on M. Every 16 of K
    are one product of the tensor core, which truncates: the largest of the three is taken twice, at first only to learn
    its size, so that the sum can be rounded. Those sums are added with their remainders.
    """
    rows = tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]  # [BK / 16, 16]
    begin = tl.program_id(1) * SPAN
    m_rows = (rows < M)[None, :, None]
    m_cols = (cols < N)[None, None, :]
    o_x = rows.to(tl.int64)[None, :, None] * K + inner[:, None, :]
    o_w = cols.to(tl.int64)[None, None, :] * K + inner[:, :, None]
    total = tl.zeros([BK // 16, BM, BN], tl.float32)
    rest = tl.zeros([BK // 16, BM, BN], tl.float32)
    for start in range(begin, tl.minimum(begin + SPAN, K), BK):
        m_inner = start + inner < K
        m_w = m_cols & m_inner[:, :, None]
        m_x = m_rows & m_inner[:, None, :]
        b_w0 = tl.load(w_hi + o_w + start, mask=m_w, other=0.0)  # [BK / 16, 16, BN]
        b_w1 = tl.load(w_lo + o_w + start, mask=m_w, other=0.0)
        b_x0 = tl.load(x_hi + o_x + start, mask=m_x, other=0.0)  # [BK / 16, BM, 16]
        b_x1 = tl.load(x_lo + o_x + start, mask=m_x, other=0.0)
        part = tl.dot(b_x1, b_w0, input_precision="ieee", out_dtype=tl.float32)
        part = tl.dot(b_x0, b_w1, part, input_precision="ieee", out_dtype=tl.float32)
        part += _half_unit(tl.dot(b_x0, b_w0, input_precision="ieee", out_dtype=tl.float32))
        part = tl.dot(b_x0, b_w0, part, input_precision="ieee", out_dtype=tl.float32)
        total, rest = _add(total, rest, part)
    whole = tl.sum(total.to(tl.float64) + rest, axis=0).to(tl.float32)
    o_part = (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * N + cols[None, :]
    tl.store(parts + o_part, whole, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def combine_kernel(
    parts, spans, x, stride, x_exponent, nonfinite, w_hi, w_lo, w_exponent, bias, out, M, N, K,
    BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out [M, N] = the parts in order, times 2^exponents (+ bias); rows with Inf or NaN anew. A program has one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = cols < N
    w_e = tl.load(w_exponent + cols, mask=mask, other=0)
    if tl.load(nonfinite + row) != 0:
        acc = _exact_row(x + row * stride, w_hi, w_lo, w_e, cols, N, K, BN, BK)
    else:
        total = tl.zeros([BN], tl.float64)
        for span in range(spans):
            total += tl.load(parts + (span * M + row) * N + cols, mask=mask, other=0.0)
        acc = _apply_exponent(total.to(tl.float32), w_e + tl.load(x_exponent + row))
    if BIAS:
        acc += tl.load(bias + cols, mask=mask, other=0.0)
    tl.store(out + row * N + cols, acc, mask=mask)
