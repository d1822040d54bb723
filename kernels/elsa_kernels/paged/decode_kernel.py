"""Few queries over a long paged KV, in one launch: fixed splits over all SMs, merged in a fixed tree by who comes last.

The keys of a sequence are cut into chunks of CHUNK keys, counted from key 0; FAN chunks are a node. A unit of work is a
chunk for one key head and all queries under it. Its state (m, l, W) goes to memory; the program that completes a node,
as an integer counter tells it, merges the node's states in their order, and the one that completes the last node merges
the nodes. Who that is changes from run to run, what is computed does not: bits depend on the sequence alone. NODES is
for calls whose chunks would need much memory: a unit is a node, and its program keeps the states of the chunks in FAN
slots of its own and merges them in the same way.

FORM "lanes": FP32 products without tensor cores, for single rows (`lanes_walk`). FORM "dot": tensor-core tiles of
BM rows. Sequences whose packed rows lie outside (MIN_ROWS, MAX_ROWS] are left to other launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.paged.tiles_kernel import LN2, LOG2E, dot_walk, is_broken, lanes_walk, row_by_row


@triton.jit
def merge_states(PM, PL, PW, slot0, Hkv, first, n0, n1, rows, STEP: tl.constexpr, ROWS: tl.constexpr,
                 RB: tl.constexpr, BD: tl.constexpr, FAN: tl.constexpr):  # fmt: skip
    """States of `rows` [RB] over the nodes n0 … n1, of STEP chunks each; the sequence's chunk `first` lies at slot0."""
    cols, fan = tl.arange(0, BD), tl.arange(0, FAN)
    m = tl.full([RB], float("-inf"), tl.float32)
    l = tl.zeros([RB], tl.float32)
    acc = tl.zeros([RB, BD], tl.float32)
    for c0 in range(n0, n1, FAN):
        c = c0 + fan
        there = c < n1
        slot = slot0 + (tl.maximum(c * STEP, first) - first).to(tl.int64) * Hkv
        at = (slot * ROWS)[:, None] + rows[None, :]
        # Other programs wrote them: read from the L2 cache.
        m_c = tl.load(PM + at, mask=there[:, None], other=float("-inf"), cache_modifier=".cg")
        l_c = tl.load(PL + at, mask=there[:, None], other=0.0, cache_modifier=".cg")
        o_w = (at * BD)[:, :, None] + cols[None, None, :]
        w_c = tl.load(PW + o_w, mask=there[:, None, None], other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(m_c, 0))
        anchor = tl.where(top == float("-inf"), 0.0, top)
        weight, decay = tl.exp2(m_c - anchor[None, :]), tl.exp2(m - anchor)
        l = l * decay + tl.sum(weight * l_c, 0)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * w_c, 0)
        m = top
    return m, l, acc


@triton.jit
def finish(m, l, acc, rows, OUT, LSE, SINKS, v_factor, q0, n_rows, i_hk, H, sot, soh, GROUP: tl.constexpr,
           D: tl.constexpr, BD: tl.constexpr, HAS_LSE: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """Join the sinks, once, and write output and logsumexp of packed `rows`."""
    cols = tl.arange(0, BD)
    valid = rows < n_rows
    i_q, head = q0 + rows // GROUP, i_hk * GROUP + rows % GROUP
    if HAS_SINKS:
        sink = tl.load(SINKS + head, mask=valid, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2(m - anchor)
        l = l * decay + tl.exp2(sink - anchor)
        acc *= decay[:, None]
        m = top
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None] * v_factor
    o_out = i_q.to(tl.int64) * sot + head * soh
    m_out = valid[:, None] & (cols[None, :] < D)
    tl.store(OUT + o_out[:, None] + cols[None, :], out.to(OUT.dtype.element_ty), mask=m_out)
    if HAS_LSE:
        tl.store(LSE + i_q.to(tl.int64) * H + head, (m + tl.log2(l)) * LN2, mask=valid)


@triton.jit
def sequence_units(CU, USED, s, inside, T, window, GROUP: tl.constexpr, CHUNK: tl.constexpr, FAN: tl.constexpr,
                   MIN_ROWS: tl.constexpr, MAX_ROWS: tl.constexpr, WINDOW: tl.constexpr,
                   NODES: tl.constexpr):  # fmt: skip
    """First row of q, queries, keys, first chunk, chunks and units of sequences s; no units where they are not ours."""
    q0 = tl.load(CU + s, mask=inside, other=0)
    n_q = tl.load(CU + s + 1, mask=inside, other=0) - q0
    n_k = tl.load(USED + s, mask=inside, other=0)
    ours = inside & (n_q * GROUP > MIN_ROWS) & (n_q * GROUP <= MAX_ROWS) & (q0 < T)
    first = tl.zeros_like(n_k)
    if WINDOW:
        first = tl.maximum(n_k - n_q - window + 1, 0) // CHUNK
        first = tl.minimum(first, tl.maximum(n_k - 1, 0) // CHUNK)
    chunks = tl.maximum(tl.cdiv(n_k, CHUNK) - first, 1)
    units = chunks
    if NODES:
        units = (first + chunks - 1) // FAN - first // FAN + 1
    return q0, n_q, n_k, first, chunks, tl.where(ours, units, 0)


@triton.jit
def chunk_state(
    q, scale, slopes, start, lo, end, n_rows, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp, window, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr, FORM: tl.constexpr, MODE: tl.constexpr, ALIKE: tl.constexpr, FP8: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """m, l [ROWS] and acc [ROWS, BD] of rows q [ROWS, BD] over the keys lo … end of a chunk."""
    rows = tl.arange(0, ROWS)
    if FORM == "lanes":
        m_r, l_r, acc_r = lanes_walk(
            tl.sum(q.to(tl.float32), 0), scale, tl.sum(slopes, 0), start, lo, end, K, V, TABLE, o_table, o_k, o_v,
            skb, skp, svb, svp, window, softcap, D, BD, BN, PAGE, STAGES, ALIKE, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
        m, l, acc = tl.zeros([1], tl.float32) + m_r, tl.zeros([1], tl.float32) + l_r, acc_r[None, :]
    else:
        factor = tl.zeros([ROWS], tl.float32) + scale
        if MODE != "half":
            q = q.to(tl.float32)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BD], tl.float32)
        whole = lo  # keys before it are in whole tiles that all rows see
        if not WINDOW:
            whole = tl.minimum(end, start + 1) if CAUSAL else end
            whole = tl.maximum(whole // BN * BN, lo)
            m, l, acc = dot_walk(
                m, l, acc, q, factor, slopes, start + rows // GROUP, lo, whole, K, V, TABLE, o_table, o_k, o_v, skb,
                skp, svb, svp, window, softcap, ROWS, D, BD, BN, PAGE, STAGES, MODE, ALIKE, False, FP8, CAUSAL,
                WINDOW, SOFTCAP, ALIBI,
            )  # fmt: skip
        m, l, acc = dot_walk(
            m, l, acc, q, factor, slopes, start + rows // GROUP, whole, end, K, V, TABLE, o_table, o_k, o_v, skb,
            skp, svb, svp, window, softcap, ROWS, D, BD, BN, PAGE, STAGES if WINDOW else 1, MODE, ALIKE, True, FP8,
            CAUSAL, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
        if is_broken(l, acc) > 0:
            m, l, acc = row_by_row(
                m, l, acc, q, factor, slopes, start, 0, n_rows, lo, end, K, V, TABLE, o_table, o_k, o_v, skb, skp,
                svb, svp, window, softcap, GROUP, ROWS, D, BD, PAGE, ALIKE, FP8, CAUSAL, WINDOW, SOFTCAP, ALIBI,
            )  # fmt: skip
    return m, l, acc


@triton.jit
def put_state(PM, PL, PW, slot, rows, m, l, acc, ROWS: tl.constexpr, BD: tl.constexpr):
    tl.store(PM + slot * ROWS + rows, m)
    tl.store(PL + slot * ROWS + rows, l)
    tl.store(PW + (slot * ROWS + rows)[:, None] * BD + tl.arange(0, BD)[None, :], acc)


@triton.jit(do_not_specialize=["B", "T", "Hkv", "window", "top0"])
def decode_kernel(
    Q, K, V, CU, USED, TABLE, OUT, LSE, PM, PL, PW, COUNT, SLOPES, SINKS, K_SCALE, V_SCALE,
    sqt, sqh, skb, skp, skh, svb, svp, svh, stb, sot, soh, B, T, Hkv, window, top0, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, FAN: tl.constexpr, RB: tl.constexpr, STAGES: tl.constexpr,
    FORM: tl.constexpr, MODE: tl.constexpr, ALIKE: tl.constexpr, FP8: tl.constexpr, MIN_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr, NODES: tl.constexpr, HEAD_SCALES: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """All units in turn, unit i for program i % programs. States PM, PL [slots, ROWS], PW [slots, ROWS, BD].

    With NODES every program has FAN slots of its own, and a slot a unit comes after those.
    """
    H = Hkv * GROUP
    sequences = tl.arange(0, BB)
    _, _, _, _, _, counts = sequence_units(
        CU, USED, sequences, sequences < B, T, window, GROUP, CHUNK, FAN, MIN_ROWS, MAX_ROWS, WINDOW, NODES
    )
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0) * Hkv
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BD)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        i_hk, unit = item % Hkv, item // Hkv
        s = tl.sum((ends <= unit).to(tl.int32), 0)
        unit0 = tl.sum(tl.where(sequences < s, counts, 0), 0)
        q0, n_q, n_k, first, chunks, _units = sequence_units(
            CU, USED, s, s < B, T, window, GROUP, CHUNK, FAN, MIN_ROWS, MAX_ROWS, WINDOW, NODES
        )
        start = n_k - n_q  # position of the first query
        n_rows = tl.minimum(n_q, T - q0) * GROUP
        i_q, i_h = q0 + rows // GROUP, i_hk * GROUP + rows % GROUP
        o_q = i_q.to(tl.int64) * sqt + i_h * sqh
        valid = rows < n_rows
        q = tl.load(Q + o_q[:, None] + cols[None, :], mask=valid[:, None] & (cols[None, :] < D), other=0.0)
        unit_scale = scale if SOFTCAP or ALIBI else scale * LOG2E
        v_factor = 1.0
        if SCALED:
            at = i_hk if HEAD_SCALES else 0
            unit_scale *= tl.load(K_SCALE + at)
            v_factor = tl.load(V_SCALE + at)
        slopes = tl.zeros([ROWS], tl.float32)
        if ALIBI:
            slopes = tl.load(SLOPES + i_h, mask=valid, other=0.0).to(tl.float32)
        o_table = s.to(tl.int64) * stb
        o_k, o_v = i_hk.to(tl.int64) * skh, i_hk.to(tl.int64) * svh
        nodes0, nodes1 = first // FAN, (first + chunks - 1) // FAN + 1
        slot0 = unit0.to(tl.int64) * Hkv + i_hk  # of the sequence's first unit
        if NODES:
            node = nodes0 + unit - unit0
            slot0 += tl.num_programs(0) * FAN
        else:
            node = (first + unit - unit0) // FAN
        n0, n1 = tl.maximum(node * FAN, first), tl.minimum(node * FAN + FAN, first + chunks)
        complete = chunks > 1  # whether this program merges the node
        if NODES:
            # chunks' states lie one after another, nodes' Hkv apart
            node_slot, top_slot, top_first = slot0 + (node - nodes0) * Hkv, slot0, nodes0
            own, step = tl.program_id(0).to(tl.int64) * FAN, 1
            for chunk in range(n0, n1):
                lo, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n_k)
                m, l, acc = chunk_state(
                    q, unit_scale, slopes, start, lo, end, n_rows, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp,
                    window, softcap, GROUP, ROWS, D, BD, BN, PAGE, STAGES, FORM, MODE, ALIKE, FP8, CAUSAL, WINDOW,
                    SOFTCAP, ALIBI,
                )  # fmt: skip
                if chunks == 1:
                    finish(m, l, acc, rows, OUT, LSE, SINKS, v_factor, q0, n_rows, i_hk, H, sot, soh, GROUP, D, BD,
                           HAS_LSE, HAS_SINKS)  # fmt: skip
                else:
                    put_state(PM, PL, PW, own + chunk - n0, rows, m, l, acc, ROWS, BD)
            tl.debug_barrier()
        else:
            node_slot, top_slot, top_first = slot0 + (n0 - first).to(tl.int64) * Hkv, slot0, first
            own, step = node_slot, Hkv
            chunk = first + unit - unit0
            lo, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n_k)
            m, l, acc = chunk_state(
                q, unit_scale, slopes, start, lo, end, n_rows, K, V, TABLE, o_table, o_k, o_v, skb, skp, svb, svp,
                window, softcap, GROUP, ROWS, D, BD, BN, PAGE, STAGES, FORM, MODE, ALIKE, FP8, CAUSAL, WINDOW,
                SOFTCAP, ALIBI,
            )  # fmt: skip
            if chunks == 1:
                finish(m, l, acc, rows, OUT, LSE, SINKS, v_factor, q0, n_rows, i_hk, H, sot, soh, GROUP, D, BD,
                       HAS_LSE, HAS_SINKS)  # fmt: skip
            else:
                put_state(PM, PL, PW, slot0 + (chunk - first).to(tl.int64) * Hkv, rows, m, l, acc, ROWS, BD)
                tl.debug_barrier()  # all of the program's stores before its count
                complete = tl.atomic_add(COUNT + node_slot, 1, sem="acq_rel") == n1 - n0 - 1
                if complete:
                    tl.store(COUNT + node_slot, 0)
        if complete:
            if nodes1 - nodes0 == 1:
                for r0 in range(0, n_rows, RB):
                    block = r0 + tl.arange(0, RB)
                    m_b, l_b, w_b = merge_states(PM, PL, PW, own, step, n0, n0, n1, block, 1, ROWS, RB, BD, FAN)
                    finish(m_b, l_b, w_b, block, OUT, LSE, SINKS, v_factor, q0, n_rows, i_hk, H, sot, soh, GROUP,
                           D, BD, HAS_LSE, HAS_SINKS)  # fmt: skip
            else:
                for r0 in range(0, n_rows, RB):
                    block = r0 + tl.arange(0, RB)
                    m_b, l_b, w_b = merge_states(PM, PL, PW, own, step, n0, n0, n1, block, 1, ROWS, RB, BD, FAN)
                    tl.debug_barrier()  # everyone has read the slot that is written next
                    put_state(PM, PL, PW, node_slot, block, m_b, l_b, w_b, ROWS, BD)
                tl.debug_barrier()
                top = COUNT + top0.to(tl.int64) + s * Hkv + i_hk
                if tl.atomic_add(top, 1, sem="acq_rel") == nodes1 - nodes0 - 1:
                    tl.store(top, 0)
                    for r0 in range(0, n_rows, RB):
                        block = r0 + tl.arange(0, RB)
                        m_b, l_b, w_b = merge_states(
                            PM, PL, PW, top_slot, Hkv, top_first, nodes0, nodes1, block, 1 if NODES else FAN, ROWS, RB,
                            BD, FAN,
                        )  # fmt: skip
                        finish(m_b, l_b, w_b, block, OUT, LSE, SINKS, v_factor, q0, n_rows, i_hk, H, sot, soh, GROUP,
                               D, BD, HAS_LSE, HAS_SINKS)  # fmt: skip
        if NODES:
            tl.debug_barrier()  # everyone has read the program's own slots
