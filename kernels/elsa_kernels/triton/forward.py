"""The forward kernel: one program per block of query rows, walking KV tiles in a fixed order.

The query heads of a key head's group are packed: row r of a group is query r // GROUP under head r % GROUP, so a KV
tile is read once for all of them. Logits are in base-2 units from the multiplication by scale·log2(e) on. MODE says
how products are made: "split" (FP32 as FP16 pairs, see split.py), "half" (FP16 or BF16 operands), "ieee" or "tf32"
(FP32 operands); "inline" is "split" with K and V split by the program itself, tile by tile, which pays where few
programs read a key. In both, each KV tile's PV starts from zero and is added in FP32: the tensor core's accumulator
rounds toward zero, which over thousands of keys would cost two digits.

Keys at the edge of what a row may see: a tile's product multiplies masked weights (0) by whatever value lies there,
and 0·∞ and 0·NaN are NaN. A program whose result is not finite therefore marks itself in TODO, and `careful_kernel`
computes its rows again with exact FP32 products that leave masked keys out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.triton.split import MAX_EXPONENT, TARGET, exponent, load_order, power_of_two, split_pair

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# log2(e) = LOG2E_HI + LOG2E_LO, both float32
LOG2E_HI = tl.constexpr(1.4426950216293335)
LOG2E_LO = tl.constexpr(1.925962991126618e-08)
TINY = tl.constexpr(2.0**-126)  # a factor of logits is no smaller, lest −∞ times it be NaN
# P is split as P·2^14, so that its low half stays in FP16's range.
P_UNIT = tl.constexpr(16384.0)
# Sums over so many keys are merged into those before, which wait in the output: a tree's error, not a long chain's.
SPAN = tl.constexpr(4096)


@triton.jit
def tanh(x):
    """tanh in float32 to 2e-7 relative: a polynomial near 0, where 1 − 2/(e^2x + 1) cancels."""
    z = x * x
    p = 0.0021429616 * z - 0.0081773978
    p = p * z + 0.0217007026
    p = p * z - 0.0539467633
    p = p * z + 0.1333320588
    p = p * z - 0.3333333135
    near = x + x * z * p
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def key_exponents(KS, o_scale, cols, D: tl.constexpr, BD: tl.constexpr):
    """Exponents of K's channel scales, [BD] from `cols` on."""
    return exponent(tl.load(KS + o_scale + cols, mask=cols < D, other=1.0))


@triton.jit
def row_exponents(q, k_exponent):
    """The largest exponent of each row of q [BM, BD] once K's inverse scales are on it; −1000 for a row of zeros."""
    return tl.max(tl.maximum(exponent(q) - k_exponent[None, :], -1000), 1)


@triton.jit
def split_queries(q, k_exponent, largest):
    """q [BM, BD] float32 as (hi, lo) under K's inverse channel scales and a power of two per row.

    Returns hi, lo and factor [BM], which turns hi·k_hi + … into q·k. The powers are applied in two equal steps, so
    that no intermediate over- or underflows where the product of query and key does not.
    """
    undo = tl.where(largest == -1000, 0, tl.minimum(tl.maximum(largest - TARGET, -252), 252))
    row_a, row_b = undo >> 1, undo - (undo >> 1)
    col_a, col_b = k_exponent >> 1, k_exponent - (k_exponent >> 1)
    q *= power_of_two(-row_a)[:, None] * power_of_two(-col_a)[None, :]
    q *= power_of_two(-row_b)[:, None] * power_of_two(-col_b)[None, :]
    hi, lo = split_pair(q)
    return hi, lo, power_of_two(row_a), power_of_two(row_b)


@triton.jit
def larger(a, b):
    return tl.maximum(tl.abs(a), tl.abs(b))


@triton.jit
def split_rows(q):
    """q [BM, BD] float32 as (hi, lo) under a power of two per row, and two factors that undo it (see split_queries)."""
    largest = tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) >> 23
    undo = largest - 127 - TARGET
    a, b = undo >> 1, undo - (undo >> 1)
    hi, lo = split_pair(q * power_of_two(-a)[:, None] * power_of_two(-b)[:, None])
    return hi, lo, power_of_two(a), power_of_two(b)


@triton.jit
def split_tile(x):
    """A tile of float32 as (hi, lo) of x·2^e, and e: its largest value becomes 2^14 … 2^15.

    Of a tile with an infinity nothing but NaN is left: whatever sees a part of it is computed again, carefully.
    """
    largest = tl.abs(tl.reduce(x, None, larger)).to(tl.int32, bitcast=True)
    e = tl.minimum(-((largest >> 23) - 127 - TARGET), MAX_EXPONENT)
    hi, lo = split_pair(x * tl.where(largest < 0x7F800000, power_of_two(e), float("nan")))
    return hi, lo, e


@triton.jit
def load_tile(X, offsets, inside, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(X + offsets, mask=inside, other=0.0)
    else:
        x = tl.load(X + offsets)
    return x


@triton.jit
def products(
    q0, q1, q2, q3, K0, K1, o_k, inside, inside_2, MASKED: tl.constexpr, MODE: tl.constexpr, HALF: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """(q·k of a tile [BM, BN] in float32, what to multiply it by). K is read transposed, [HALF or BD, BN].

    The tensor core truncates what it adds, so S errs with the length of its chains: from 128 channels on the second
    half (q2 and q3 are hi and lo there) has an accumulator of its own.
    """
    undo = 1.0
    k0 = load_tile(K0, o_k, inside, MASKED)
    if MODE == "split":
        k1 = load_tile(K1, o_k, inside, MASKED)
        t = tl.dot(q1, k0, input_precision="ieee")
        t = tl.dot(q0, k1, t, input_precision="ieee")
        t = tl.dot(q0, k0, t, input_precision="ieee")
        if HALF != BD:
            # A sum with a product that starts from zero would be folded into one chain again.
            k2 = load_tile(K0 + HALF, o_k, inside_2, MASKED)
            k3 = load_tile(K1 + HALF, o_k, inside_2, MASKED)
            more = tl.dot(q3, k2, input_precision="ieee")
            more = tl.dot(q2, k3, more, input_precision="ieee")
            more = tl.dot(q2, k2, more, input_precision="ieee")
            t += more
    elif MODE == "inline":
        k0, k1, e = split_tile(k0)
        t = tl.dot(q1, k0, input_precision="ieee")
        t = tl.dot(q0, k1, t, input_precision="ieee")
        t = tl.dot(q0, k0, t, input_precision="ieee")
        undo = power_of_two(-e)
    elif MODE == "half":
        t = tl.dot(q0, k0, input_precision="ieee")
    else:
        t = tl.dot(q0, k0.to(tl.float32), input_precision=MODE)
    return t, undo


@triton.jit
def weigh(acc, p, V0, V1, o_v, inside, MASKED: tl.constexpr, MODE: tl.constexpr):
    """acc + p·v of a tile [BM, BD] in float32; with split values acc carries P_UNIT."""
    v0 = load_tile(V0, o_v, inside, MASKED)
    if MODE == "split":
        v1 = load_tile(V1, o_v, inside, MASKED)
        p0, p1 = split_pair(p * P_UNIT)
        t = tl.dot(p1, v0, input_precision="ieee")
        t = tl.dot(p0, v1, t, input_precision="ieee")
        t = tl.dot(p0, v0, t, input_precision="ieee")
        acc += t
    elif MODE == "half":
        acc = tl.dot(p.to(v0.dtype), v0, acc, input_precision="ieee")
    else:
        acc += tl.dot(p, v0.to(tl.float32), input_precision=MODE)
    return acc


@triton.jit
def weigh_inline(acc, p, v):
    """acc + P_UNIT·p·v of a tile of float32 values, split here."""
    v0, v1, e = split_tile(v)
    p0, p1 = split_pair(p * P_UNIT)
    t = tl.dot(p1, v0, input_precision="ieee")
    t = tl.dot(p0, v1, t, input_precision="ieee")
    t = tl.dot(p0, v0, t, input_precision="ieee")
    return acc + t * power_of_two(-e)


@triton.jit
def weigh_carefully(acc, p, s, V0, o_v, inside):
    """acc + p·v where a key with logit −∞ adds nothing, whatever its value."""
    v = tl.load(V0 + o_v, mask=inside, other=0.0).to(tl.float32)
    finite = (v - v) == 0.0
    acc += tl.dot(p, tl.where(finite, v, 0.0), input_precision="ieee")
    if tl.max(tl.max((~finite).to(tl.int32), 1), 0) > 0:
        seen = (s != float("-inf")).to(tl.float32)
        inf = float("inf")
        above = tl.dot(seen, (v == inf).to(tl.float32), input_precision="ieee")
        acc = tl.where(above > 0, acc + inf, acc)
        below = tl.dot(seen, (v == -inf).to(tl.float32), input_precision="ieee")
        acc = tl.where(below > 0, acc - inf, acc)
        nan = tl.dot(seen, (v != v).to(tl.float32), input_precision="ieee")
        acc = tl.where(nan > 0, float("nan"), acc)
    return acc


@triton.jit
def walk(
    acc, l, m, q0, q1, q2, q3, factor, positions, o_bias, slopes, K0, K1, V0, V1, BIAS, o_kv_k, o_kv_v,
    skn, svn, sbj, lo, hi, first, end, window, softcap,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, CAREFUL: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANGES: tl.constexpr,
):  # fmt: skip
    """Merge the KV tiles [lo, hi) into (m, l, acc), lo being a multiple of BN. MASKED tiles may be seen in part."""
    cols = tl.arange(0, BD)
    HALF: tl.constexpr = BD // 2 if MODE == "split" and BD >= 128 else BD
    channels = tl.arange(0, HALF)
    # Within a tile offsets fit 32 bits (the launcher sees to it); only the tile's own place needs 64.
    in_tile = tl.arange(0, BN)
    r_k = in_tile[None, :] * skn + channels[:, None]
    r_v = in_tile[:, None] * svn + cols[None, :]
    for j0 in range(lo, hi, BN):
        keys = j0 + in_tile
        o_k = o_kv_k + tl.cast(j0, tl.int64) * skn
        o_v = o_kv_v + tl.cast(j0, tl.int64) * svn
        exists = keys < end
        if WINDOW or HAS_RANGES:
            exists &= keys >= first
        in_k, in_k2, in_v = exists[None, :], exists[None, :], exists[:, None]
        if BD != D:
            in_k2 = in_k & (channels[:, None] + HALF < D)
            in_k, in_v = in_k & (channels[:, None] < D), in_v & (cols[None, :] < D)
        PARTIAL: tl.constexpr = MASKED or BD != D
        if MODE == "inline":  # on its way while S is computed
            v = load_tile(V0 + o_v, r_v, in_v, PARTIAL)
        s, undo = products(
            q0, q1, q2, q3, K0 + o_k, K1 + o_k if MODE == "split" else K0, r_k, in_k, in_k2, PARTIAL, MODE, HALF, BD
        )
        turn = tl.maximum(factor * undo, TINY) if MODE == "inline" else factor
        # With the scale in the exponent's multiply-add half precision has a shorter loop and is a tenth slower (H200).
        SCALED: tl.constexpr = MODE == "half" or SOFTCAP or ALIBI or HAS_BIAS
        if SCALED:
            s *= turn[:, None]
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if ALIBI:
            s += slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
        if HAS_BIAS:
            s += tl.load(BIAS + o_bias[:, None] + keys[None, :] * sbj, mask=exists[None, :], other=0.0).to(tl.float32)
        if SOFTCAP or ALIBI or HAS_BIAS:
            s *= LOG2E
        if MASKED:
            seen = tl.broadcast_to(exists[None, :], s.shape)
            if CAUSAL:
                seen &= keys[None, :] <= positions[:, None]
            if WINDOW:
                seen &= (keys[None, :] > positions[:, None] - window) & (keys[None, :] < positions[:, None] + window)
            s = tl.where(seen, s, float("-inf"))
        top = tl.max(s, 1)
        if not SCALED:
            top *= turn
        m_new = tl.maximum(m, top)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - anchor)
        if SCALED:
            p = tl.exp2(s - anchor[:, None])
        else:
            p = tl.exp2(tl.fma(s, tl.broadcast_to(turn[:, None], s.shape), tl.broadcast_to(-anchor[:, None], s.shape)))
        l = l * decay + tl.sum(p, 1)
        acc *= decay[:, None]
        if CAREFUL:
            acc = weigh_carefully(acc, p, s, V0 + o_v, r_v, in_v)
        elif MODE == "inline":
            acc = weigh_inline(acc, p, v)
        else:
            acc = weigh(acc, p, V0 + o_v, V1 + o_v if MODE == "split" else V0, r_v, in_v, PARTIAL, MODE)
        m = m_new
    return acc, l, m


@triton.jit
def absorb(OUT, o_line, valid, waiting, m_before, l_before, m, l, acc, D: tl.constexpr, BD: tl.constexpr):
    """(l, acc) with the sums of the spans before, whose W waits in the output; `waiting` says whether there are any."""
    tl.debug_barrier()  # what other threads of this program wrote
    cols = tl.arange(0, BD)
    there = valid[:, None] & (cols[None, :] < D) & (waiting > 0)
    before = tl.load(OUT + o_line[:, None] * D + cols[None, :], mask=there, other=0.0)
    factor = tl.exp2(m_before - tl.where(m == float("-inf"), 0.0, m))
    return l_before * factor + l, before * factor[:, None] + acc


@triton.jit
def attend_rows(
    row0, i_b, i_hk, i_chunk, first_chunk,
    Q, K0, K1, KS, KO, V0, V1, VS, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
    B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    MODE: tl.constexpr, CAREFUL: tl.constexpr, STATE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_RANGES: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Attention of BM packed rows from row0 on; writes them and returns whether any of them is not finite.

    VARLEN: i_b is one of several sequences whose tokens lie one after another, `total` queries in all; CUQ and CUK say
    where. Nq and Nk are upper bounds of their lengths then.
    """
    begin_q, begin_k = 0, 0
    if VARLEN:
        begin_q, begin_k = tl.load(CUQ + i_b), tl.load(CUK + i_b)
        Nq = tl.minimum(tl.load(CUQ + i_b + 1) - begin_q, Nq)
        Nk = tl.minimum(tl.load(CUK + i_b + 1) - begin_k, Nk)
        q_start = Nk - Nq
    rows = row0 + tl.arange(0, BM)
    cols = tl.arange(0, BD)
    i_q, i_h = rows // GROUP, i_hk * GROUP + rows % GROUP
    valid = rows < Nq * GROUP
    positions = q_start + i_q
    i_b64, i_hk64 = i_b.to(tl.int64), i_hk.to(tl.int64)
    o_q = i_b64 * sqb + i_h.to(tl.int64) * sqh + i_q.to(tl.int64) * sqn
    if VARLEN:
        o_q = i_h.to(tl.int64) * sqh + (begin_q + i_q).to(tl.int64) * sqn
    BASE2: tl.constexpr = not (SOFTCAP or ALIBI or HAS_BIAS)
    unit = scale * LOG2E if BASE2 else scale
    SCALED: tl.constexpr = MODE == "half" or not BASE2  # before the maximum is taken: see walk
    if not SCALED:
        # The scale's sign, or its being 0, goes into Q: the largest product is then the largest logit, and −∞ stays −∞.
        sign = tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0))
        unit = tl.abs(unit)
    o_scale = (i_b64 * Hkv + i_hk64) * D
    SPLIT: tl.constexpr = MODE == "split" or MODE == "inline"
    HALF: tl.constexpr = BD // 2 if MODE == "split" and BD >= 128 else BD
    channels = tl.arange(0, HALF)
    o_c = load_order(KO + o_scale, channels, D) if MODE == "split" else channels
    q = tl.load(Q + o_q[:, None] + o_c[None, :], mask=valid[:, None] & (channels[None, :] < D), other=0.0)
    if not SCALED:
        q = (q * sign).to(q.dtype)
    if MODE == "inline":
        q0, q1, row_a, row_b = split_rows(q)
        q2, q3 = q0, q1
        factor = unit * row_a * row_b
    elif MODE == "split":
        e_k = key_exponents(KS, o_scale, channels, D, HALF)
        largest = row_exponents(q, e_k)
        if HALF != BD:
            beyond = channels + HALF
            o_c = load_order(KO + o_scale, beyond, D)
            qb = tl.load(Q + o_q[:, None] + o_c[None, :], mask=valid[:, None] & (beyond[None, :] < D), other=0.0)
            if not SCALED:
                qb *= sign
            e_kb = key_exponents(KS, o_scale, beyond, D, HALF)
            largest = tl.maximum(largest, row_exponents(qb, e_kb))
            q2, q3, _, _ = split_queries(qb, e_kb, largest)
        q0, q1, row_a, row_b = split_queries(q, e_k, largest)
        if HALF == BD:
            q2, q3 = q0, q1
        factor = unit * row_a * row_b
    else:
        q0 = q if MODE == "half" else q.to(tl.float32)
        q1, q2, q3 = q0, q0, q0
        factor = tl.zeros([BM], tl.float32) + unit

    if not SCALED:
        factor = tl.maximum(factor, TINY)
    first, end = 0, Nk
    if HAS_RANGES:
        first = tl.maximum(tl.load(RANGES + i_b64 * 2), 0)
        end = tl.minimum(tl.load(RANGES + i_b64 * 2 + 1), Nk)
    if CHUNK > 0:
        first = tl.maximum(first, (first_chunk + i_chunk) * CHUNK)
        end = tl.minimum(end, (first_chunk + i_chunk + 1) * CHUNK)
    if VARLEN:
        end = tl.where(row0 < Nq * GROUP, end, 0)  # a block past the end of its sequence has nothing to do
    p_min = q_start + row0 // GROUP
    p_max = q_start + (tl.minimum(row0 + BM, Nq * GROUP) - 1) // GROUP
    lo, hi, full_lo, full_hi = first, end, first, end  # [lo, hi) some row sees, [full_lo, full_hi) all rows see
    if CAUSAL:
        hi = tl.minimum(hi, p_max + 1)
        full_hi = tl.minimum(full_hi, p_min + 1)
    if WINDOW:
        lo = tl.maximum(lo, p_min - window + 1)
        full_lo = tl.maximum(full_lo, p_max - window + 1)
        hi = tl.minimum(hi, p_max + window)
        full_hi = tl.minimum(full_hi, p_min + window)
    lo = lo // BN * BN
    full_lo = tl.minimum(tl.cdiv(full_lo, BN) * BN, tl.maximum(tl.cdiv(hi, BN) * BN, lo))
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BN * BN, full_lo)

    slopes = tl.load(SLOPES + i_h, mask=valid, other=0.0).to(tl.float32) if ALIBI else factor
    o_bias = i_b64 * sbb + i_h.to(tl.int64) * sbh + tl.where(valid, i_q, 0).to(tl.int64) * sbn
    if VARLEN:
        o_first = tl.cast(begin_k, tl.int64)
        o_kv_k, o_kv_v = o_first * skn + i_hk64 * skh, o_first * svn + i_hk64 * svh
        o_row = (i_chunk.to(tl.int64) * (Hkv * GROUP) + i_h) * total + begin_q + i_q
    else:
        o_kv_k, o_kv_v = i_b64 * skb + i_hk64 * skh, i_b64 * svb + i_hk64 * svh
        o_row = ((i_chunk.to(tl.int64) * B + i_b) * (Hkv * GROUP) + i_h) * Nq + i_q
    o_line = o_row  # of OUT: heads before tokens, but for the output of packed sequences
    if VARLEN and not STATE:
        o_line = (begin_q + i_q).to(tl.int64) * (Hkv * GROUP) + i_h
    LONG: tl.constexpr = CHUNK == 0 and MODE != "inline"
    SPANS: tl.constexpr = LONG and not CAREFUL and OUT.dtype.element_ty == tl.float32
    acc = tl.zeros([BM, BD], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    if WINDOW or HAS_RANGES:
        acc, l, m = walk(
            acc, l, m, q0, q1, q2, q3, factor, positions, o_bias, slopes, K0, K1, V0, V1, BIAS, o_kv_k, o_kv_v,
            skn, svn, sbj, lo, full_lo, first, end, window, softcap,
            D, BD, BN, MODE, CAREFUL, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_RANGES,
        )  # fmt: skip
    if SPANS:
        waiting = 0
        # Values of their own: of two names for one value the compiler takes the second for unchanged.
        m_before = tl.full([BM], float("-inf"), tl.float32)
        l_before = tl.zeros([BM], tl.float32)
        for span in range(full_lo // SPAN, tl.cdiv(full_hi, SPAN)):
            start = tl.maximum(full_lo, span * SPAN)
            if (start == span * SPAN) & (start > lo):
                l_before, acc = absorb(OUT, o_line, valid, waiting, m_before, l_before, m, l, acc, D, BD)
                tl.store(OUT + o_line[:, None] * D + cols[None, :], acc, mask=valid[:, None] & (cols[None, :] < D))
                m_before = m
                waiting += 1
                l *= 0.0
                acc *= 0.0
            acc, l, m = walk(
                acc, l, m, q0, q1, q2, q3, factor, positions, o_bias, slopes, K0, K1, V0, V1, BIAS, o_kv_k, o_kv_v,
                skn, svn, sbj, start, tl.minimum(full_hi, span * SPAN + SPAN), first, end, window, softcap,
                D, BD, BN, MODE, CAREFUL, False, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_RANGES,
            )  # fmt: skip
    else:
        acc, l, m = walk(
            acc, l, m, q0, q1, q2, q3, factor, positions, o_bias, slopes, K0, K1, V0, V1, BIAS, o_kv_k, o_kv_v,
            skn, svn, sbj, full_lo, full_hi, first, end, window, softcap,
            D, BD, BN, MODE, CAREFUL, False, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_RANGES,
        )  # fmt: skip
    acc, l, m = walk(
        acc, l, m, q0, q1, q2, q3, factor, positions, o_bias, slopes, K0, K1, V0, V1, BIAS, o_kv_k, o_kv_v,
        skn, svn, sbj, full_hi, hi, first, end, window, softcap,
        D, BD, BN, MODE, CAREFUL, True, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_RANGES,
    )  # fmt: skip

    if SPANS:  # noqa: SIM102 (decided at compile time, and with it whether `waiting` exists)
        if waiting > 0:
            l, acc = absorb(OUT, o_line, valid, waiting, m_before, l_before, m, l, acc, D, BD)
    broken = ((l - l) != 0.0).to(tl.int32) | tl.max(((acc - acc) != 0.0).to(tl.int32), 1)
    if HAS_SINKS:
        sinks = tl.load(SINKS + i_h, mask=valid, other=float("-inf")).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sinks)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp2(m - anchor)
        l = l * decay + tl.exp2(sinks - anchor)
        acc *= decay[:, None]
        m = m_new
    o_out = o_line[:, None] * D + cols[None, :]
    m_q = valid[:, None] & (cols[None, :] < D)
    if SPLIT:
        acc *= 1.0 / P_UNIT
    if MODE == "split":
        undo = 1.0 / tl.load(VS + o_scale + cols, mask=cols < D, other=1.0)
    if STATE:
        # m_nat is m·ln 2 rounded; what the rounding changed goes into S and W, so that the triple stays consistent.
        some = tl.where(m == float("-inf"), 0.0, m)
        m_nat = some * LN2
        slip = tl.fma(-m_nat, LOG2E_HI, some) - m_nat * LOG2E_LO
        repair = tl.exp2(slip)
        l *= repair
        acc *= repair[:, None]
        if MODE == "split":
            acc *= undo[None, :]
        tl.store(M + o_row, tl.where(l == l, m * LN2, float("nan")), mask=valid)
        tl.store(S + o_row, l, mask=valid)
        tl.store(OUT + o_out, acc, mask=m_q)
    else:
        out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        if MODE == "split":
            out *= undo[None, :]
        tl.store(OUT + o_out, out.to(OUT.dtype.element_ty), mask=m_q)
    return tl.max(broken, 0)


@triton.jit
def attend_block_carefully(
    block, i_b, i_hk, i_chunk, first_chunk, Q, K0, V0, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
    B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PART: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, STATE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_RANGES: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """The BM rows of a block by exact FP32 products, PART at a time, leaving out masked keys whatever their values."""
    for row0 in range(block * BM, tl.minimum(block * BM + BM, Nq * GROUP), PART):
        attend_rows(
            row0, i_b, i_hk, i_chunk, first_chunk,
            Q, K0, K0, K0, K0, V0, V0, V0, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
            sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
            B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
            GROUP, D, BD, PART, BN, CHUNK, "ieee", True, STATE, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS,
            HAS_SINKS, HAS_RANGES, VARLEN,
        )  # fmt: skip


@triton.jit
def locate(n_blocks, Hkv, B, CAUSAL: tl.constexpr):
    """Block of rows, batch element, key head and chunk of this program; with causal masks the longest blocks first."""
    pid = tl.program_id(0)
    block, rest = pid % n_blocks, pid // n_blocks
    if CAUSAL:
        block = n_blocks - 1 - block
    i_hk, rest = rest % Hkv, rest // Hkv
    return pid, block, rest % B, i_hk, rest // B


# Lengths change with every token: none of them may become part of a compiled variant.
_LENGTHS = ["B", "Hkv", "Nq", "Nk", "total", "q_start", "window", "n_blocks", "first_chunk"]


@triton.jit(do_not_specialize=_LENGTHS)
def forward_kernel(
    Q, K0, K1, KS, KO, V0, V1, VS, OUT, M, S, TODO, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
    B, Hkv, Nq, Nk, total, q_start, window, scale, softcap, n_blocks, first_chunk,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    MODE: tl.constexpr, STATE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_RANGES: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Every block of BM packed rows, over all keys (CHUNK = 0) or chunk by chunk of CHUNK keys; TODO [programs]."""
    pid, block, i_b, i_hk, i_chunk = locate(n_blocks, Hkv, B, CAUSAL)
    broken = attend_rows(
        block * BM, i_b, i_hk, i_chunk, first_chunk,
        Q, K0, K1, KS, KO, V0, V1, VS, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
        sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
        B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
        GROUP, D, BD, BM, BN, CHUNK, MODE, False, STATE, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_SINKS,
        HAS_RANGES, VARLEN,
    )  # fmt: skip
    if MODE == "inline":  # K and V are at hand as they are: no second launch
        if broken != 0:
            tl.debug_barrier()  # the rows are about to be written again, by other threads
            attend_block_carefully(
                block, i_b, i_hk, i_chunk, first_chunk, Q, K0, V0, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
                sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
                B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
                GROUP, D, BD, BM, 16, 16, CHUNK, STATE, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_SINKS, HAS_RANGES,
                VARLEN,
            )  # fmt: skip
    else:
        tl.store(TODO + pid, broken)


@triton.jit(do_not_specialize=_LENGTHS)
def careful_kernel(
    Q, K0, V0, OUT, M, S, TODO, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
    B, Hkv, Nq, Nk, total, q_start, window, scale, softcap, n_blocks, first_chunk,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PART: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, STATE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_RANGES: tl.constexpr,
    VARLEN: tl.constexpr,
    MARKS: tl.constexpr, BMARKS: tl.constexpr,
):  # fmt: skip
    """The blocks of which one of the MARKS in TODO [programs, MARKS] is set, again; other programs leave at once."""
    pid, block, i_b, i_hk, i_chunk = locate(n_blocks, Hkv, B, CAUSAL)
    if MARKS == 1:
        marked = tl.load(TODO + pid)
    else:
        i_mark = tl.arange(0, BMARKS)
        marked = tl.max(tl.load(TODO + pid * MARKS + i_mark, mask=i_mark < MARKS, other=0), 0)
    if marked != 0:
        attend_block_carefully(
            block, i_b, i_hk, i_chunk, first_chunk, Q, K0, V0, OUT, M, S, BIAS, SLOPES, SINKS, RANGES, CUQ, CUK,
            sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, sbj,
            B, Hkv, Nq, Nk, total, q_start, window, scale, softcap,
            GROUP, D, BD, BM, PART, BN, CHUNK, STATE, CAUSAL, WINDOW, SOFTCAP, ALIBI, HAS_BIAS, HAS_SINKS, HAS_RANGES,
            VARLEN,
        )  # fmt: skip
