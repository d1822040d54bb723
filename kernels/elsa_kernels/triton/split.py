"""FP32 tensors as pairs of FP16 planes (hi, lo) under power-of-two scales: what tensor cores multiply at FP32 accuracy.

x·s = hi + lo up to 2^-23 of x, or 2^-40 of the channel's largest value where that is more; s is the power of two that
brings that value into [2^14, 2^15). One scale per (batch, key head, channel): an outlier channel costs the others
nothing. For K the inverse is folded into the query's own scale, for V it is undone per output column. Multiplying by a
power of two is exact, so the planes hold every FP32 input, subnormals included. Infinities and NaN are left out of the
choice of scale, and come through as hi = ±∞ or NaN and lo = NaN: whatever they touch turns NaN, which the forward
kernel detects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Largest magnitude of a scaled value is below 2^(TARGET + 1): half of what FP16 holds.
TARGET = tl.constexpr(14)
MAX_EXPONENT = tl.constexpr(126)  # of a scale, so that it and its inverse are normal FP32 numbers
_ROWS = 64  # of a tile
_AMAX_TILES = 8  # tiles whose maxima one program reduces before its atomics, where there are many tiles
_MANY_KEYS = 4096
# Keys by which channels of K are judged, and exponents by which one has to stand out to be moved: see _order_kernel.
_SAMPLE = 32
_OUTLIER = tl.constexpr(3)


@dataclass(frozen=True, slots=True)
class Planes:
    """K and V as FP16 pairs. Planes [B, Hkv, Nk, D] float16, contiguous; scales [B, Hkv, D] float32, powers of two.

    k·k_scale = k_hi + k_lo, and likewise v (scales broadcast over the keys). Channel c of k_hi, k_lo and k_scale is
    channel order[…, c] of k; order [B, Hkv, D] int32.
    """

    order: torch.Tensor
    k_hi: torch.Tensor
    k_lo: torch.Tensor
    k_scale: torch.Tensor
    v_hi: torch.Tensor
    v_lo: torch.Tensor
    v_scale: torch.Tensor


@triton.jit
def exponent(x):
    """floor(log2|x|) as int32 for normal x, −127 for subnormal x, −1024 for zero, infinities and NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    counts = (bits > 0) & (bits < 0x7F800000)
    return tl.where(counts, (bits >> 23) - 127, -1024)


@triton.jit
def power_of_two(e):
    """2^e as float32, for −126 ≤ e ≤ 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_pair(x):
    """x (float32, |x| < 65504) as float16 (hi, lo); hi + lo is off by at most 2^-23·|x| or 2^-25, whichever is more."""
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _column_amax(
    X, base, stride_n, row0, N, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    cols = tl.arange(0, BD)
    largest = tl.zeros([BD], tl.int32)
    for t in range(TILES):
        rows = row0 + t * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (cols[None, :] < D)
        x = tl.load(X + base + rows.to(tl.int64)[:, None] * stride_n + cols[None, :], mask=inside, other=0.0)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.where(bits < 0x7F800000, bits, 0)
        largest = tl.maximum(largest, tl.max(bits, 0))
    return largest


@triton.jit
def _extent(CUK, b, N, VARLEN: tl.constexpr):
    """(first key, number of keys) of sequence b, where several lie one after another; N bounds their lengths."""
    begin = b * 0
    if VARLEN:
        begin = tl.load(CUK + b).to(tl.int64)
        N = tl.minimum((tl.load(CUK + b + 1) - begin).to(tl.int32), N)
    return begin, N


@triton.jit
def _write_order(
    K, ORDER, RANGES, b, base, skn, end, D: tl.constexpr, BD: tl.constexpr, SAMPLE: tl.constexpr,
    HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """The order of K's channels in its planes: those far larger than most go last, with their neighbours in fours.

    A product's accumulator truncates whatever it holds at the last bit of the largest product of a step, so what comes
    after large ones costs digits. The first keys of the sequence tell, and they alone, so that bits depend neither on
    the batch nor on later keys. Large is what it is in cuda/attention_ieee.cu.
    """
    cols = tl.arange(0, BD)
    if D % 4 != 0:
        tl.store(ORDER + cols, cols, mask=cols < D)
    else:
        first = 0
        if HAS_RANGES:
            first = tl.maximum(tl.load(RANGES + 2 * b), 0)
            end = tl.minimum(tl.load(RANGES + 2 * b + 1), end)
        rows = first + tl.arange(0, SAMPLE)
        inside = (rows[:, None] < end) & (cols[None, :] < D)
        x = tl.load(K + base + rows.to(tl.int64)[:, None] * skn + cols[None, :], mask=inside, other=0.0)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        own = tl.max(tl.where(bits < 0x7F800000, bits, 0), 0) >> 23
        lower = tl.sum(((own[:, None] + _OUTLIER <= own[None, :]) & (cols[:, None] < D)).to(tl.int32), 0)
        large = ((2 * lower >= D) & (cols < D)).to(tl.int32)
        fours = tl.arange(0, BD // 4)
        large = tl.max(tl.reshape(large, [BD // 4, 4]), 1)
        before = tl.cumsum(large, 0) - large
        place = tl.where(large != 0, D // 4 - tl.sum(large, 0) + before, fours - before)
        one = tl.arange(0, 4)[None, :]
        there = (fours < D // 4)[:, None]
        tl.store(ORDER + place[:, None] * 4 + one, fours[:, None] * 4 + one, mask=there)


@triton.jit
def load_order(ORDER, cols, D: tl.constexpr):
    """The channels that K's planes have at `cols`: in fours, which are loaded at once."""
    channels = tl.load(ORDER + cols, mask=cols < D, other=0)
    return tl.max_contiguous(tl.multiple_of(channels, 4), 4)


@triton.jit
def _amax_kernel(
    K, V, KMAX, VMAX, ORDER, RANGES, CUK, skb, skh, skn, svb, svh, svn, Hkv, N,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SAMPLE: tl.constexpr,
    HAS_RANGES: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Largest finite |k| and |v| per (batch, head, channel), as the bits of a non-negative float (they order alike).

    A program has some rows of K or of V; the last one of a head writes the order of K's channels instead.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    b, h = i_bh // Hkv, i_bh % Hkv
    row0 = tl.program_id(0) // 2 * (ROWS * TILES)
    cols = tl.arange(0, BD)
    begin, N = _extent(CUK, b, N, VARLEN)
    o_k, o_v = b * skb, b * svb
    if VARLEN:
        o_k, o_v = begin * skn, begin * svn
    o_k += h * skh
    # A maximum does not depend on the order of its atomics.
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _write_order(K, ORDER + i_bh * D, RANGES, b, o_k, skn, N, D, BD, SAMPLE, HAS_RANGES)
    elif tl.program_id(0) % 2 == 0:
        largest = _column_amax(K, o_k, skn, row0, N, D, BD, ROWS, TILES)
        tl.atomic_max(KMAX + i_bh * D + cols, largest, mask=cols < D)
    else:
        largest = _column_amax(V, o_v + h * svh, svn, row0, N, D, BD, ROWS, TILES)
        tl.atomic_max(VMAX + i_bh * D + cols, largest, mask=cols < D)


@triton.jit
def _channel_scale(MAX, i_bh, channels, D: tl.constexpr, BD: tl.constexpr):
    largest = tl.load(MAX + i_bh * D + channels, mask=tl.arange(0, BD) < D, other=0)
    e = -((largest >> 23) - 127 - TARGET)
    return power_of_two(tl.where(largest > 0, tl.minimum(e, MAX_EXPONENT), 0))


@triton.jit
def _write_planes(
    X, HI, LO, channels, scale, base, stride_n, plane, row0, N, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    cols = tl.arange(0, BD)
    rows = row0 + tl.arange(0, ROWS)
    inside = (rows[:, None] < N) & (cols[None, :] < D)
    x = tl.load(X + base + rows.to(tl.int64)[:, None] * stride_n + channels[None, :], mask=inside, other=0.0)
    hi, lo = split_pair(x * scale[None, :])
    o_plane = (plane + rows.to(tl.int64))[:, None] * D + cols[None, :]
    tl.store(HI + o_plane, hi, mask=inside)
    tl.store(LO + o_plane, lo, mask=inside)


@triton.jit
def _split_kernel(
    K, V, KMAX, VMAX, ORDER, CUK, K_HI, K_LO, K_SCALE, V_HI, V_LO, V_SCALE, skb, skh, skn, svb, svh, svn, Hkv, N, total,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """A program writes the planes of some rows of K or of V."""
    i_bh = tl.program_id(1).to(tl.int64)
    b, h = i_bh // Hkv, i_bh % Hkv
    row0 = tl.program_id(0) // 2 * ROWS
    cols = tl.arange(0, BD)
    begin, N = _extent(CUK, b, N, VARLEN)
    o_k, o_v, plane = b * skb, b * svb, i_bh * N
    if VARLEN:
        o_k, o_v, plane = begin * skn, begin * svn, h * total + begin
    if tl.program_id(0) % 2 == 0:
        channels = load_order(ORDER + i_bh * D, cols, D)
        scale = _channel_scale(KMAX, i_bh, channels, D, BD)
        _write_planes(K, K_HI, K_LO, channels, scale, o_k + h * skh, skn, plane, row0, N, D, BD, ROWS)
        if row0 == 0:
            tl.store(K_SCALE + i_bh * D + cols, scale, mask=cols < D)
    else:
        scale = _channel_scale(VMAX, i_bh, cols, D, BD)
        _write_planes(V, V_HI, V_LO, cols, scale, o_v + h * svh, svn, plane, row0, N, D, BD, ROWS)
        if row0 == 0:
            tl.store(V_SCALE + i_bh * D + cols, scale, mask=cols < D)


def split_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_range: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    longest: int | None = None,
) -> Planes:
    """Split k and v [B, Hkv, Nk, D] float32 (last dimension contiguous, Nk ≥ 1) into planes: one read for the scales,
    one read and one write for the planes.

    kv_range [B, 2] int32: the keys that exist, the first of which tell the order of K's channels. cu_seqlens int32
    [S + 1]: k and v [1, Hkv, tokens, D] hold S sequences of at most `longest` keys, each with scales and an order
    [S, Hkv, D] of its own.
    """
    rows, Hkv, total, D = k.shape
    packed = cu_seqlens is not None
    B, N = (rows, total) if cu_seqlens is None else (cu_seqlens.numel() - 1, longest or total)
    BD = triton.next_power_of_2(D)
    k_hi, k_lo, v_hi, v_lo = (
        torch.empty((rows, Hkv, total, D), dtype=torch.float16, device=k.device) for _ in range(4)
    )
    k_scale, v_scale = (torch.empty((B, Hkv, D), dtype=torch.float32, device=k.device) for _ in range(2))
    order = torch.empty((B, Hkv, D), dtype=torch.int32, device=k.device)
    planes = Planes(order, k_hi, k_lo, k_scale, v_hi, v_lo, v_scale)
    amax = torch.zeros((2, B, Hkv, D), dtype=torch.int32, device=k.device)
    strides = (*k.stride()[:3], *v.stride()[:3])
    per_program = _AMAX_TILES if N > _MANY_KEYS else 1  # a maximum is the same however it is cut
    _amax_kernel[(2 * triton.cdiv(N, _ROWS * per_program) + 1, B * Hkv)](
        k, v, amax[0], amax[1], order, kv_range, cu_seqlens, *strides, Hkv, N,
        D=D, BD=BD, ROWS=_ROWS, TILES=per_program, SAMPLE=_SAMPLE, HAS_RANGES=kv_range is not None, VARLEN=packed,
    )  # fmt: skip
    _split_kernel[(2 * triton.cdiv(N, _ROWS), B * Hkv)](
        k, v, amax[0], amax[1], order, cu_seqlens,
        k_hi, k_lo, k_scale, v_hi, v_lo, v_scale,
        *strides, Hkv, N, total, D=D, BD=BD, ROWS=_ROWS, VARLEN=packed,
    )  # fmt: skip
    return planes
