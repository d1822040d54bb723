"""What the paged kernels share: a tile of keys through the block table, logits and masks, the walk row by row.

Logits are in base-2 units once scaled by log2(e). A sequence's queries are packed with the heads of a key head's group:
row r is query r // GROUP under head r % GROUP, at key position `start + r // GROUP`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.triton.forward import LN2, LOG2E, tanh

__all__ = ["LN2", "LOG2E", "dot_walk", "is_broken", "lanes_walk", "merge_lanes", "row_by_row"]


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
def pages_of(TABLE, o_table, keys, exists, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """The page of each of `keys`, int64."""
    if MASKED:
        return tl.load(TABLE + o_table + keys // PAGE, mask=exists, other=0).to(tl.int64)
    return tl.load(TABLE + o_table + keys // PAGE).to(tl.int64)


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
def lanes_walk(
    q, factor, slopes, position, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window, softcap,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Rows q [R, BD] at one position over the keys [lo, end), all products in FP32 without tensor cores.

    Every one of BN lanes keeps a state of its own over the keys that fall to it, so that within the loop nothing is
    exchanged between warps. A key with logit −∞ adds nothing, whatever its value. Returns m, l [R, BN],
    acc [R, BN, BD] for `merge_lanes`.
    """
    lane, cols = tl.arange(0, BN), tl.arange(0, BD)
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOW:
        lo = tl.maximum(lo, position - window + 1)
        end = tl.minimum(end, position + window)
    m = tl.full([R, BN], float("-inf"), tl.float32)
    l = tl.zeros([R, BN], tl.float32)
    acc = tl.zeros([R, BN, BD], tl.float32)
    for j0 in tl.range(lo // BN * BN, end, BN, num_stages=STAGES):
        keys = j0 + lane
        seen = (keys >= lo) & (keys < end)
        inside = seen[:, None] & (cols[None, :] < D) if BD != D else seen[:, None]
        page, place = pages_of(TABLE, o_table, keys, seen, PAGE, True), keys % PAGE
        at_k, at_v = o_k + page * skb + place * skp, o_v + page * svb + place * svp
        k = widen(tl.load(K + at_k[:, None] + cols[None, :], mask=inside, other=0.0), FP8).to(tl.float32)
        v = widen(tl.load(V + at_v[:, None] + cols[None, :], mask=inside, other=0.0), FP8).to(tl.float32)
        s = tl.sum(q[:, None, :] * k[None, :, :], 2) * factor
        s = logits(s, keys[None, :], position, slopes, softcap, SOFTCAP, ALIBI)
        s = tl.where(seen[None, :], s, float("-inf"))
        m_new = tl.maximum(m, s)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay, p = tl.exp2(m - anchor), tl.exp2(s - anchor)
        l = l * decay + p
        heard = tl.where((s != float("-inf"))[:, :, None], v[None, :, :], 0.0)
        acc = acc * decay[:, :, None] + p[:, :, None] * heard
        m = m_new
    return m, l, acc


@triton.jit
def merge_lanes(m, l, acc):
    """The state of each row over all lanes: m, l [R], acc [R, BD]."""
    top = tl.max(m, 1)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m - anchor[:, None])
    return top, tl.sum(l * weight, 1), tl.sum(acc * weight[:, :, None], 1)


@triton.jit
def dot_walk(
    m, l, acc, q, factor, slopes, positions, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window,
    softcap, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Merge the keys [lo, end), in tiles of BN, into m, l [BM], acc [BM, BD] of the rows q [BM, BD].

    MODE: "half" for FP16 and BF16 operands, else how FP32 ones are multiplied. Without MASKED every row sees all the
    keys, and lo and end are multiples of BN.
    """
    PRECISION: tl.constexpr = "ieee" if MODE == "half" else MODE
    lane, cols = tl.arange(0, BN), tl.arange(0, BD)
    for j0 in tl.range(lo // BN * BN, end, BN, num_stages=STAGES):
        keys = j0 + lane
        exists = (keys >= lo) & (keys < end)
        inside = exists[:, None] & (cols[None, :] < D) if BD != D else exists[:, None]
        page, place = pages_of(TABLE, o_table, keys, exists, PAGE, MASKED), keys % PAGE
        at_k, at_v = o_k + page * skb + place * skp, o_v + page * svb + place * svp
        if MASKED or BD != D:
            k = tl.load(K + at_k[:, None] + cols[None, :], mask=inside, other=0.0)
            v = tl.load(V + at_v[:, None] + cols[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(K + at_k[:, None] + cols[None, :])
            v = tl.load(V + at_v[:, None] + cols[None, :])
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
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Again, exactly: in a tile's product a masked weight 0 meets ∞ and NaN, here hidden keys are left out."""
    rows = tl.arange(0, BM)
    for r in range(tl.minimum(n_rows - row0, BM)):
        mine = rows == r
        q_r = tl.sum(tl.where(mine[:, None], q.to(tl.float32), 0.0), 0)
        factor_r = tl.sum(tl.where(mine, factor, 0.0), 0)
        slope_r = tl.sum(tl.where(mine, slopes, 0.0), 0)
        m_r, l_r, acc_r = lanes_walk(
            q_r[None, :], factor_r, slope_r, start + (row0 + r) // GROUP, lo, end, K, V, TABLE, o_table, o_k, o_v, skb,
            skp, svb, svp, window, softcap, 1, D, BD, 16, PAGE, 1, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
        m_r, l_r, acc_r = merge_lanes(m_r, l_r, acc_r)
        m = tl.where(mine, tl.broadcast_to(m_r, (BM,)), m)
        l = tl.where(mine, tl.broadcast_to(l_r, (BM,)), l)
        acc = tl.where(mine[:, None], tl.broadcast_to(acc_r, (BM, BD)), acc)
    return m, l, acc


@triton.jit
def is_broken(l, acc):
    """1 where a row is not finite: what a hidden key's ∞ or NaN may have done, or the inputs themselves."""
    return tl.max(((l - l) != 0.0).to(tl.int32) | tl.max(((acc - acc) != 0.0).to(tl.int32), 1), 0)
