"""Many queries over a paged KV: one program for a block of BM packed rows of one sequence and key head."""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.paged.tiles_kernel import LN2, LOG2E, dot_walk, is_broken, row_by_row


@triton.jit(do_not_specialize=["stb", "B", "T", "Hkv", "window"])
def prefill_kernel(
    Q, K, V, CU, USED, TABLE, OUT, LSE, SLOPES, SINKS, K_SCALE, V_SCALE,
    sqt, sqh, skb, skp, skh, svb, svp, svh, stb, sot, soh, B, T, Hkv, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr, ALIKE: tl.constexpr, FP8: tl.constexpr,
    MIN_ROWS: tl.constexpr, HEAD_SCALES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Sequences of more than MIN_ROWS packed rows. Grid: (blocks, an upper bound; Hkv)."""
    i_hk, block = tl.program_id(1), tl.program_id(0)
    sequences = tl.arange(0, BB)
    starts = tl.load(CU + sequences, mask=sequences < B, other=0)
    stops = tl.load(CU + sequences + 1, mask=sequences < B, other=0)
    ours = ((stops - starts) * GROUP > MIN_ROWS) & (starts < T)
    blocks = tl.where(ours, tl.cdiv((tl.minimum(stops, T) - starts) * GROUP, BM), 0)
    ends = tl.cumsum(blocks, 0)
    if block >= tl.sum(blocks, 0):
        return
    s = tl.sum((ends <= block).to(tl.int32), 0)
    # The last block of a sequence sees most keys under a causal mask: it goes first.
    in_sequence = tl.sum(tl.where(sequences == s, ends, 0), 0) - 1 - block
    q0 = tl.load(CU + s)
    n_q, n_k = tl.load(CU + s + 1) - q0, tl.load(USED + s)
    start = n_k - n_q
    row0 = in_sequence * BM
    rows, cols = row0 + tl.arange(0, BM), tl.arange(0, BD)
    i_q, i_h = q0 + rows // GROUP, i_hk * GROUP + rows % GROUP
    n_rows = tl.minimum(n_q, T - q0) * GROUP
    valid = rows < n_rows
    positions = start + rows // GROUP
    o_q = i_q.to(tl.int64) * sqt + i_h * sqh
    q = tl.load(Q + o_q[:, None] + cols[None, :], mask=valid[:, None] & (cols[None, :] < D), other=0.0)
    if MODE != "half":
        q = q.to(tl.float32)
    unit_scale = scale if SOFTCAP or ALIBI else scale * LOG2E
    v_factor = 1.0
    if SCALED:
        at = i_hk if HEAD_SCALES else 0
        unit_scale *= tl.load(K_SCALE + at)
        v_factor = tl.load(V_SCALE + at)
    factor = tl.zeros([BM], tl.float32) + unit_scale
    slopes = tl.load(SLOPES + i_h, mask=valid, other=0.0).to(tl.float32) if ALIBI else tl.zeros([BM], tl.float32)

    # [lo, hi): keys that some row sees; [full_lo, full_hi): whole tiles of keys that all rows see
    p_min = start + row0 // GROUP
    p_max = start + (tl.minimum(row0 + BM, n_q * GROUP) - 1) // GROUP
    lo, hi, full_lo, full_hi = 0, n_k, 0, n_k
    if CAUSAL:
        hi = tl.minimum(hi, p_max + 1)
        full_hi = tl.minimum(full_hi, p_min + 1)
    if WINDOW:
        lo = tl.maximum(lo, p_min - window + 1)
        full_lo = tl.maximum(full_lo, p_max - window + 1)
        hi = tl.minimum(hi, p_max + window)
        full_hi = tl.minimum(full_hi, p_min + window)
    full_lo = tl.minimum(tl.cdiv(full_lo, BN) * BN, tl.maximum(tl.cdiv(hi, BN) * BN, lo // BN * BN))
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BN * BN, full_lo)

    o_table = s.to(tl.int64) * stb
    o_k, o_v = i_hk.to(tl.int64) * skh, i_hk.to(tl.int64) * svh
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if WINDOW:
        m, l, acc = dot_walk(
            m, l, acc, q, factor, slopes, positions, lo, tl.minimum(full_lo, hi), K, V, TABLE, o_table, o_k, o_v, skb,
            skp, svb, svp, window, softcap, BM, D, BD, BN, PAGE, STAGES, MODE, ALIKE, True, FP8, CAUSAL, WINDOW,
            SOFTCAP, ALIBI,
        )  # fmt: skip
    m, l, acc = dot_walk(
        m, l, acc, q, factor, slopes, positions, full_lo, full_hi, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb,
        svp, window, softcap, BM, D, BD, BN, PAGE, STAGES, MODE, ALIKE, False, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
    )  # fmt: skip
    m, l, acc = dot_walk(
        m, l, acc, q, factor, slopes, positions, full_hi, hi, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb,
        svp, window, softcap, BM, D, BD, BN, PAGE, STAGES, MODE, ALIKE, True, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
    )  # fmt: skip
    if is_broken(l, acc) > 0:
        m, l, acc = row_by_row(
            m, l, acc, q, factor, slopes, start, row0, n_rows, lo, hi, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb,
            svp, window, softcap, GROUP, BM, D, BD, PAGE, ALIKE, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
    if HAS_SINKS:
        sinks = tl.load(SINKS + i_h, mask=valid, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(m, sinks)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2(m - anchor)
        l = l * decay + tl.exp2(sinks - anchor)
        acc *= decay[:, None]
        m = top
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None] * v_factor
    o_out = i_q.to(tl.int64) * sot + i_h * soh
    m_out = valid[:, None] & (cols[None, :] < D)
    tl.store(OUT + o_out[:, None] + cols[None, :], out.to(OUT.dtype.element_ty), mask=m_out)
    if HAS_LSE:
        tl.store(LSE + i_q.to(tl.int64) * (Hkv * GROUP) + i_h, (m + tl.log2(l)) * LN2, mask=valid)
