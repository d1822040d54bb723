"""K and V as FP16 pairs under one power-of-two scale per tile of keys: what `split_kernel` multiplies.

A tile is split in one pass over its FP32 values, without looking at any other tile, so a cache can be kept in this form
as it grows. Within a tile every value keeps 22 bits as long as it is no smaller than 2^-17 of the tile's largest, and
an absolute 2^-40 of that largest below. Keys outside `kv_range` are held as zeros, whatever lies there, so neither
their values nor their number can change a bit of what is visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elsa_kernels.triton.split import MAX_EXPONENT, TARGET, power_of_two, split_pair


@dataclass(frozen=True, slots=True)
class TilePlanes:
    """planes [4, B·Hkv, Nk, width] float16: k_hi, k_lo, v_hi, v_lo; exponents [B·Hkv, tiles, 2] int32, of K and of V.

    Channels past the head's are zeros. k·2^e = k_hi + k_lo with the exponent e of the key's tile of `rows` keys;
    likewise v.
    """

    planes: torch.Tensor
    exponents: torch.Tensor
    rows: int


@triton.jit(do_not_specialize=["Hkv", "N", "heads", "tiles"])
def split_tiles_kernel(
    K, V, PLANES, EXPONENTS, RANGES, skb, skh, skn, svb, svh, svn, Hkv, N, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """One tile of K or of V. Grid: tiles, B·Hkv, 2."""
    tile, is_v = tl.program_id(0), tl.program_id(2)
    i_bh = tl.program_id(1).to(tl.int64)
    b, h = i_bh // Hkv, i_bh % Hkv
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    inside = rows < N
    exists = inside
    if HAS_RANGES:
        exists &= (rows >= tl.load(RANGES + 2 * b)) & (rows < tl.load(RANGES + 2 * b + 1))
    if is_v == 0:
        X, stride_n = K + b * skb + h * skh, skn
    else:
        X, stride_n = V + b * svb + h * svh, svn
    x = tl.load(
        X + rows.to(tl.int64)[:, None] * stride_n + cols[None, :], mask=exists[:, None] & (cols[None, :] < D), other=0.0
    )
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(tl.where(bits < 0x7F800000, bits, 0), 1), 0)
    # The largest finite value becomes 2^14 … 2^15. A tile of zeros takes the largest exponent: it asks for no range.
    e = tl.minimum(-((largest >> 23) - 127 - TARGET), MAX_EXPONENT)
    tl.store(EXPONENTS + (i_bh * tiles + tile) * 2 + is_v, e)
    hi, lo = split_pair(x * power_of_two(e))
    o_hi = ((2 * is_v * heads + i_bh) * N + rows.to(tl.int64))[:, None] * BD + cols[None, :]
    o_lo = o_hi + heads.to(tl.int64) * N * BD
    tl.store(PLANES + o_hi, hi, mask=inside[:, None])
    tl.store(PLANES + o_lo, lo, mask=inside[:, None])


def split_tiles(
    k: torch.Tensor, v: torch.Tensor, rows: int, width: int, kv_range: torch.Tensor | None = None
) -> TilePlanes:
    """Split k and v [B, Hkv, Nk, D] float32 (last dimension contiguous) by tiles of `rows` keys.

    width ≥ D: channels of the planes. kv_range [B, 2] int32: the half-open range of keys that exist.
    """
    B, Hkv, N, D = k.shape
    tiles = triton.cdiv(N, rows)
    planes = torch.empty((4, B * Hkv, N, width), dtype=torch.float16, device=k.device)
    exponents = torch.empty((B * Hkv, tiles, 2), dtype=torch.int32, device=k.device)
    split_tiles_kernel[(tiles, B * Hkv, 2)](
        k, v, planes, exponents, None if kv_range is None else kv_range.contiguous(), *k.stride()[:3], *v.stride()[:3],
        Hkv=Hkv, N=N, heads=B * Hkv, tiles=tiles, D=D, BD=width, ROWS=rows,
        HAS_RANGES=kv_range is not None, num_warps=8,
    )  # fmt: skip
    return TilePlanes(planes, exponents, rows)
