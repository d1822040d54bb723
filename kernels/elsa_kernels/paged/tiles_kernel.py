"""What the paged kernels share: a tile of keys through the block table, logits and masks, the walk row by row.

Logits are in base-2 units once scaled by log2(e). A sequence's queries are packed with the heads of a key head's group:
row r is query r // GROUP under head r % GROUP, at key position `start + r // GROUP`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.triton.forward import LN2, LOG2E, tanh

__all__ = ["LN2", "LOG2E", "dot_walk", "is_broken", "lanes_walk", "row_by_row"]


@triton.jit
def widen(x, FP8: tl.constexpr):
    """A loaded tile of an FP8 cache as numbers: "native" converts in hardware, "bits" through float16's bits."""
    if FP8 == "native":
        y = x.to(tl.float16)
    elif FP8 == "bits":
        # e4m3 and float16 differ in the exponent's bias (7, 15) and in the mantissa's length (3, 10).
        wide = x.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        y = (bits.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
        y = tl.where((wide & 0x7F) == 0x7F, float("nan"), y)
    else:
        y = x
    return y


@triton.jit
def pages_of(TABLE, o_table, j0, end, BN: tl.constexpr, PAGE: tl.constexpr):
    """The pages of the keys j0 … j0 + BN of a sequence; 0 for those from `end` on."""
    lane = tl.arange(0, BN)
    # j0 is a multiple of BN: written so, what does not depend on it is the same in every turn of a loop
    at = j0 // PAGE + lane // PAGE if BN % PAGE == 0 else (j0 + lane) // PAGE
    return tl.load(TABLE + o_table + at, mask=j0 + lane < end, other=0)


@triton.jit
def places_of(page, j0, s_block, s_place, t_block, t_place, BN: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr):
    """Where keys j0 … j0 + BN on their pages begin in two caches, in elements. ALIKE: those have the same strides."""
    lane = tl.arange(0, BN)
    place = lane % PAGE if BN % PAGE == 0 else (j0 + lane) % PAGE
    first = page.to(tl.int64) * s_block + place * s_place
    if ALIKE:
        return first, first
    return first, page.to(tl.int64) * t_block + place * t_place


@triton.jit
def logits(s, keys, positions, slopes, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Softcap and ALiBi on scaled products; then to base-2 units, unless the scale had log2(e) in it already."""
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    if ALIBI:
        s += slopes * (keys - positions).to(tl.float32)
    if SOFTCAP or ALIBI:
        s *= LOG2E
    return s


@triton.jit
def visible(keys, positions, first, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    seen = (keys >= first) & (keys < end)
    if CAUSAL:
        seen &= keys <= positions
    if WINDOW:
        seen &= (keys > positions - window) & (keys < positions + window)
    return seen


@triton.jit
def lanes_loop(
    m, l, acc, q, factor, slope, position, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
    ALIKE: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Merge the keys [lo, end) into m, l [BN], acc [BN, BD]. Without MASKED both are multiples of BN."""
    lane, cols = tl.arange(0, BN), tl.arange(0, BD)
    page = pages_of(TABLE, o_table, lo // BN * BN, end, BN, PAGE)
    for j0 in tl.range(lo // BN * BN, end, BN, num_stages=STAGES):
        keys = j0 + lane
        seen = (keys >= lo) & (keys < end)
        at_k, at_v = places_of(page, j0, skb, skp, svb, svp, BN, PAGE, ALIKE)
        page = pages_of(TABLE, o_table, j0 + BN, end, BN, PAGE)  # a turn ahead of what lies on them
        k_at, v_at = K + o_k + (at_k[:, None] + cols[None, :]), V + o_v + (at_v[:, None] + cols[None, :])
        if MASKED or BD != D:
            inside = seen[:, None] & (cols[None, :] < D)
            k, v = tl.load(k_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
        s = tl.sum(q[None, :] * widen(k, FP8).to(tl.float32), 1) * factor
        s = logits(s, keys, position, slope, softcap, SOFTCAP, ALIBI)
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, s)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay, p = tl.exp2(m - anchor), tl.exp2(s - anchor)
        l = l * decay + p
        heard = tl.where((s != float("-inf"))[:, None], widen(v, FP8).to(tl.float32), 0.0)
        acc = acc * decay[:, None] + p[:, None] * heard
        m = m_new
    return m, l, acc


@triton.jit
def lanes_walk(
    q, factor, slope, position, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
    ALIKE: tl.constexpr, FP8: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):  # fmt: skip
    """One row q [BD] at its position over the keys [lo, end), all products in FP32 without tensor cores.

    Every one of BN lanes keeps a state of its own over the keys that fall to it, so that within the loop nothing is
    exchanged between warps. A key with logit −∞ adds nothing, whatever its value. Returns m, l, acc [BD].
    """
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOW:
        lo = tl.maximum(lo, position - window + 1)
        end = tl.minimum(end, position + window)
    m = tl.full([BN], float("-inf"), tl.float32)
    l = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, BD], tl.float32)
    whole = lo  # keys before it are in whole tiles
    if not WINDOW:
        whole = tl.maximum(end // BN * BN, lo)
        m, l, acc = lanes_loop(
            m, l, acc, q, factor, slope, position, lo, whole, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp,
            softcap, D, BD, BN, PAGE, STAGES, ALIKE, False, FP8, SOFTCAP, ALIBI,
        )  # fmt: skip
    m, l, acc = lanes_loop(
        m, l, acc, q, factor, slope, position, whole, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, softcap,
        D, BD, BN, PAGE, STAGES if WINDOW else 1, ALIKE, True, FP8, SOFTCAP, ALIBI,
    )  # fmt: skip
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    return top, tl.sum(l * weight, 0), tl.sum(acc * weight[:, None], 0)


@triton.jit
def dot_walk(
    m, l, acc, q, factor, slopes, positions, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window,
    softcap, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr, ALIKE: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Merge the keys [lo, end), in tiles of BN, into m, l [BM], acc [BM, BD] of the rows q [BM, BD].

    MODE: "half" for FP16 and BF16 operands, else how FP32 ones are multiplied. Without MASKED every row sees all the
    keys, and lo and end are multiples of BN.
    """
    PRECISION: tl.constexpr = "ieee" if MODE == "half" else MODE
    lane, cols = tl.arange(0, BN), tl.arange(0, BD)
    page = pages_of(TABLE, o_table, lo // BN * BN, end, BN, PAGE)
    for j0 in tl.range(lo // BN * BN, end, BN, num_stages=STAGES):
        keys = j0 + lane
        exists = (keys >= lo) & (keys < end)
        at_k, at_v = places_of(page, j0, skb, skp, svb, svp, BN, PAGE, ALIKE)
        page = pages_of(TABLE, o_table, j0 + BN, end, BN, PAGE)  # a turn ahead of what lies on them
        k_at, v_at = K + o_k + (at_k[:, None] + cols[None, :]), V + o_v + (at_v[:, None] + cols[None, :])
        if MASKED or BD != D:
            inside = exists[:, None] & (cols[None, :] < D)
            k, v = tl.load(k_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
        k, v = widen(k, FP8).to(q.dtype), widen(v, FP8).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[:, None]
        s = logits(s, keys[None, :], positions[:, None], slopes[:, None], softcap, SOFTCAP, ALIBI)
        if MASKED:
            seen = visible(keys[None, :], positions[:, None], lo, end, window, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay, p = tl.exp2(m - anchor), tl.exp2(s - anchor[:, None])
        l = l * decay + tl.sum(p, 1)
        if MODE == "half":
            acc = tl.dot(p.to(q.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        else:  # from zero, and added in FP32: the accumulator of some tensor cores rounds toward zero
            acc = acc * decay[:, None] + tl.dot(p, v, input_precision=PRECISION)
        m = m_new
    return m, l, acc


@triton.jit
def row_by_row(
    m, l, acc, q, factor, slopes, start, row0, n_rows, lo, end,
    K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window, softcap,
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr,
    FP8: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Again, exactly: in a tile's product a masked weight 0 meets ∞ and NaN, here hidden keys are left out."""
    rows = tl.arange(0, BM)
    for r in range(tl.minimum(n_rows - row0, BM)):
        mine = rows == r
        q_r = tl.sum(tl.where(mine[:, None], q.to(tl.float32), 0.0), 0)
        factor_r = tl.sum(tl.where(mine, factor, 0.0), 0)
        slope_r = tl.sum(tl.where(mine, slopes, 0.0), 0)
        m_r, l_r, acc_r = lanes_walk(
            q_r, factor_r, slope_r, start + (row0 + r) // GROUP, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb,
            svp, window, softcap, D, BD, 16, PAGE, 1, ALIKE, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
        m, l = tl.where(mine, m_r, m), tl.where(mine, l_r, l)
        acc = tl.where(mine[:, None], acc_r[None, :], acc)
    return m, l, acc


@triton.jit
def is_broken(l, acc):
    """1 where a row is not finite: what a hidden key's ∞ or NaN may have done, or the inputs themselves."""
    return tl.max(((l - l) != 0.0).to(tl.int32) | tl.max(((acc - acc) != 0.0).to(tl.int32), 1), 0)
