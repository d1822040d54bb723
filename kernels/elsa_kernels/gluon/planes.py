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
    likewise v. Packed sequences: B = 1, and each has tiles of its own, filled up with zeros: tile t of sequence s,
    whose keys begin at key b, is the (b // rows + s + t)-th.
    """

    planes: torch.Tensor
    exponents: torch.Tensor
    rows: int


@triton.jit(do_not_specialize=["Hkv", "N", "heads", "tiles"])
def split_tiles_kernel(
    K, V, PLANES, EXPONENTS, RANGES, STARTS, skb, skh, skn, svb, svh, svn, Hkv, N, heads, tiles,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, HAS_RANGES: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One tile of K or of V. Grid: tiles of the longest sequence, B·Hkv, 2. `heads`: how many a plane has."""
    tile, is_v = tl.program_id(0), tl.program_id(2)
    i_bh = tl.program_id(1).to(tl.int64)
    b, h = i_bh // Hkv, i_bh % Hkv
    i_head, slot = i_bh, tile  # of the planes and the exponents
    room = N  # rows of a plane's head
    o_k, o_v = b * skb, b * svb
    if VARLEN:
        i_head, begin = h, tl.load(STARTS + b)
        N = tl.minimum(tl.load(STARTS + b + 1) - begin, N)
        slot += begin // ROWS + b.to(tl.int32)
        room = tiles * ROWS
        o_k, o_v = tl.cast(begin, tl.int64) * skn, tl.cast(begin, tl.int64) * svn
    if tile * ROWS < N:
        rows = tile * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BD)
        inside = rows < N
        exists = inside
        if HAS_RANGES:
            exists &= (rows >= tl.load(RANGES + 2 * b)) & (rows < tl.load(RANGES + 2 * b + 1))
        if is_v == 0:
            X, stride_n = K + o_k + h * skh, skn
        else:
            X, stride_n = V + o_v + h * svh, svn
        offsets = rows.to(tl.int64)[:, None] * stride_n + cols[None, :]
        x = tl.load(X + offsets, mask=exists[:, None] & (cols[None, :] < D), other=0.0)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.max(tl.where(bits < 0x7F800000, bits, 0), 1), 0)
        # The largest finite value becomes 2^14 … 2^15. A tile of zeros takes the largest exponent: it asks for no
        # range.
        e = tl.minimum(-((largest >> 23) - 127 - TARGET), MAX_EXPONENT)
        tl.store(EXPONENTS + (i_head * tiles + slot) * 2 + is_v, e)
        hi, lo = split_pair(x * power_of_two(e))
        rows = slot * ROWS + tl.arange(0, ROWS)
        o_hi = ((2 * is_v * heads + i_head) * room + rows.to(tl.int64))[:, None] * BD + cols[None, :]
        o_lo = o_hi + heads.to(tl.int64) * room * BD
        tl.store(PLANES + o_hi, hi, mask=(rows < room)[:, None])
        tl.store(PLANES + o_lo, lo, mask=(rows < room)[:, None])


def split_tiles(
    k: torch.Tensor,
    v: torch.Tensor,
    rows: int,
    width: int,
    kv_range: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    longest: int | None = None,
) -> TilePlanes:
    """Split k and v [B, Hkv, Nk, D] float32 (last dimension contiguous) by tiles of `rows` keys.

    width ≥ D: channels of the planes. kv_range [B, 2] int32: the half-open range of keys that exist. starts int32
    [S + 1]: k and v [1, Hkv, tokens, D] hold S sequences of at most `longest` keys.
    """
    B, Hkv, total, D = k.shape
    sequences, N, room, tiles = B, total, total, triton.cdiv(total, rows)
    if starts is not None:
        sequences, N = starts.numel() - 1, longest or total
        tiles = total // rows + sequences
        room = tiles * rows
    planes = torch.empty((4, B * Hkv, room, width), dtype=torch.float16, device=k.device)
    exponents = torch.empty((B * Hkv, tiles, 2), dtype=torch.int32, device=k.device)
    split_tiles_kernel[(triton.cdiv(N, rows), sequences * Hkv, 2)](
        k, v, planes, exponents, None if kv_range is None else kv_range.contiguous(), starts,
        *k.stride()[:3], *v.stride()[:3], Hkv=Hkv, N=N, heads=B * Hkv, tiles=tiles, D=D, BD=width,
        ROWS=rows, HAS_RANGES=kv_range is not None, VARLEN=starts is not None, num_warps=8,
    )  # fmt: skip
    return TilePlanes(planes, exponents, rows)
