"""The cache write: one program a token, its K and V rows of all heads to its slot."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_bits(x):
    """float32 x as the bits of float8_e4m3fn (uint8): to nearest, ties to even, saturated at ±448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign, a = (bits >> 24) & 0x80, tl.minimum(tl.abs(x), 448.0)
    magnitude = a.to(tl.int32, bitcast=True)
    # normal numbers: drop 20 bits of the mantissa, rounding; the exponent's bias goes from 127 to 7
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the step is 2^-9: adding 1.5·2^23 rounds a·2^9 to an integer
    small = ((a * 512.0 + 12582912.0).to(tl.int32, bitcast=True)) & 0xF
    code = tl.where(a < 0.015625, small, normal)
    return (sign | tl.where(x != x, 0x7F, code)).to(tl.uint8)


@triton.jit(do_not_specialize=["Hkv"])
def cache_kernel(
    K, V, K_CACHE, V_CACHE, SLOTS, K_SCALE, V_SCALE, skt, skh, svt, svh, ckb, ckp, ckh, cvb, cvp, cvh, Hkv,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
):  # fmt: skip
    """K, V [T, Hkv, D] to caches [blocks, PAGE, Hkv, D]; FP8 caches are given as uint8."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + row)
    if slot < 0:
        return
    block, place = slot // PAGE, slot % PAGE
    cols = tl.arange(0, BD)
    for h0 in range(0, Hkv, BH):
        heads = h0 + tl.arange(0, BH)
        inside = (heads < Hkv)[:, None] & (cols < D)[None, :]
        o_k = (row * skt + heads * skh)[:, None] + cols[None, :]
        o_v = (row * svt + heads * svh)[:, None] + cols[None, :]
        k, v = tl.load(K + o_k, mask=inside, other=0.0), tl.load(V + o_v, mask=inside, other=0.0)
        if FP8:
            k, v = k.to(tl.float32), v.to(tl.float32)
            # one scale for all heads, or one each
            if K_SCALED:
                at = heads if K_HEADS else heads * 0
                k = tl.div_rn(k, tl.broadcast_to(tl.load(K_SCALE + at, mask=heads < Hkv, other=1.0)[:, None], k.shape))
            if V_SCALED:
                at = heads if V_HEADS else heads * 0
                v = tl.div_rn(v, tl.broadcast_to(tl.load(V_SCALE + at, mask=heads < Hkv, other=1.0)[:, None], v.shape))
            k, v = e4m3_bits(k), e4m3_bits(v)
        to_k = (block * ckb + place * ckp + heads * ckh)[:, None] + cols[None, :]
        to_v = (block * cvb + place * cvp + heads * cvh)[:, None] + cols[None, :]
        tl.store(K_CACHE + to_k, k, mask=inside)
        tl.store(V_CACHE + to_v, v, mask=inside)
