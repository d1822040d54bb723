"""FP32-accurate attention on Hopper's tensor cores: every operand an FP16 pair (hi, lo), every product three.

One TMA producer warp group streams the (hi, lo) planes of K and V; each consumer warp group owns 64 query rows.
- S = lo·hi + hi·lo + hi·hi, smallest first, in one chain over D: the tensor core adds at most 3·D products.
- P·V starts from zero in every KV tile and is merged in FP32. The tensor core truncates inside its accumulator; kept
  there over N keys that error grows like N. Per tile it does not, and the merge is the monoid's own.
- Scales are powers of two, so they are exact: K per (batch, head, channel), folded inversely into Q; Q then per row,
  undone in the exponent's multiply; P by 2^14 in the exponent's subtraction; V per channel, undone at the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elsa_kernels.gluon.common import (
    LENGTHS,
    LOG2E,
    NEG_INF,
    ROWS,
    inverse_power,
    key_begin,
    key_end,
    report_broken,
    state_correction,
    tile_of_program,
    tile_range,
)

P_EXPONENT = gl.constexpr(14)  # P ≤ 1 is held as P·2^14 < 65504: its lo half then keeps 11 more bits down to 2^-24


@gluon.jit
def _produce(
    k_hi,
    k_lo,
    v_hi,
    v_lo,
    kh,
    kl,
    vh,
    vl,
    k_full,
    k_free,
    v_full,
    v_free,
    b,
    kv_head,
    first,
    end,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Stream the tiles [first, end) of K and V into the ring."""
    for t in range(first, end):
        i = t - first
        slot = i % STAGES
        free_phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(slot), free_phase)
        mbarrier.expect(k_full.index(slot), 2 * k_hi.block_type.nbytes)
        tma.async_copy_global_to_shared(k_hi, [b, kv_head, t * BN, 0], k_full.index(slot), kh.index(slot))
        tma.async_copy_global_to_shared(k_lo, [b, kv_head, t * BN, 0], k_full.index(slot), kl.index(slot))
        mbarrier.wait(v_free.index(slot), free_phase)
        mbarrier.expect(v_full.index(slot), 2 * v_hi.block_type.nbytes)
        tma.async_copy_global_to_shared(v_hi, [b, kv_head, t * BN, 0], v_full.index(slot), vh.index(slot))
        tma.async_copy_global_to_shared(v_lo, [b, kv_head, t * BN, 0], v_full.index(slot), vl.index(slot))


@gluon.jit
def _split_query(q, k_scale, qh, ql, row0, Nq, q_stride, D: gl.constexpr, OUT: gl.constexpr):
    """Q·(1/K's scale) of one warp group as (hi, lo) planes in shared memory; returns 2^-e of each row, in layout OUT.

    A row with an Inf or NaN keeps it in hi (and NaN in lo), so its logits and its output become NaN.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(rows.to(gl.int64) * q_stride, 1) + gl.expand_dims(channels, 0)
    x = gl.load(q + offsets, mask=gl.expand_dims(rows < Nq, 1), other=0.0)
    x = x * gl.expand_dims(inverse_power(gl.load(k_scale + channels)), 0)
    largest = gl.max(gl.maximum(x, -x), axis=1)
    # The row's exponent from the float's bits. Its largest value becomes 2^14 … 2^15; below 2^-112 the scale stays.
    e = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 15)
    up = ((268 - e) << 23).to(gl.float32, bitcast=True)
    down = ((e - 14) << 23).to(gl.float32, bitcast=True)
    x = x * gl.expand_dims(up, 1)
    hi = x.to(gl.float16)
    qh.store(hi)
    ql.store((x - hi.to(gl.float32)).to(gl.float16))
    fence_async_shared()
    return gl.convert_layout(down, OUT)


@gluon.jit
def _step(i, t, m, l, acc, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full, v_free, scale, lo, hi,
          D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr):  # fmt: skip
    """Merge the KV tile t into (m, l, acc). m is in units of log2, l and acc carry P's 2^14."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    slot = i % STAGES
    phase = (i // STAGES) & 1

    mbarrier.wait(k_full.index(slot), phase)
    k_hi = kh.index(slot).reshape([BN, D]).permute((1, 0))
    k_lo = kl.index(slot).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(ql, k_hi, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
    s = warpgroup_mma(qh, k_lo, s, is_async=True)
    s = warpgroup_mma(qh, k_hi, s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(slot), count=1)

    if MASK:
        keys = gl.expand_dims(t * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S)), 0)
        s = gl.where((keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1)), s, NEG_INF)
        m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
        # A row that has seen no key yet: any finite stand-in gives exp2(-inf) = 0 instead of NaN.
        m_safe = gl.where(m_new == NEG_INF, 0.0, m_new)
    else:
        m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
        m_safe = m_new
    p = gl.exp2(s * gl.expand_dims(scale, 1) - gl.expand_dims(m_safe - P_EXPONENT, 1))
    alpha = gl.exp2(m - m_safe)
    l = l * alpha + gl.sum(p, axis=1)
    p_hi = p.to(gl.float16)
    p_lo = (p - p_hi.to(gl.float32)).to(gl.float16)
    p_hi = gl.convert_layout(p_hi, P)
    p_lo = gl.convert_layout(p_lo, P)
    alpha_o = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O)), 1)

    mbarrier.wait(v_full.index(slot), phase)
    v_hi = vh.index(slot).reshape([BN, D])
    v_lo = vl.index(slot).reshape([BN, D])
    w = warpgroup_mma(p_lo, v_hi, gl.zeros([ROWS, D], gl.float32, O), use_acc=False, is_async=True)
    w = warpgroup_mma(p_hi, v_lo, w, is_async=True)
    w = warpgroup_mma(p_hi, v_hi, w, is_async=True)
    w = warpgroup_mma_wait(0, deps=[w])
    mbarrier.arrive(v_free.index(slot), count=1)
    return m_new, l, acc * alpha_o + w


@gluon.jit
def _skip(i, k_full, k_free, v_full, v_free, STAGES: gl.constexpr):
    """Hand back a tile that the other warp group needs and this one does not."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.arrive(k_free.index(slot), count=1)
    mbarrier.wait(v_full.index(slot), phase)
    mbarrier.arrive(v_free.index(slot), count=1)


@gluon.jit
def _consume(q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh_all, ql_all, kh, kl, vh, vl, k_full, k_free, v_full, v_free,
             head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride, out_stride,
             D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
             WINDOW: gl.constexpr, LEFT: gl.constexpr, SINKS: gl.constexpr, STATE: gl.constexpr):  # fmt: skip
    """One warp group: 64 query rows over the tiles [first, end)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    RO: gl.constexpr = gl.SliceLayout(1, O)
    mine = row0 + ROWS * GROUP
    qh = qh_all.index(GROUP)
    ql = ql_all.index(GROUP)
    down = _split_query(q, k_scale, qh, ql, mine, Nq, q_stride, D, R)
    factor = down * (scale * LOG2E)

    rows = mine + gl.arange(0, ROWS, layout=R)
    lo = gl.maximum(key_begin(rows, q_start, window, WINDOW), kv0)
    hi = gl.minimum(key_end(rows, kv1, q_start, window, CAUSAL, WINDOW), kv1)
    a, z, fa, fz = tile_range(mine, gl.minimum(mine + ROWS, Nq), kv0, kv1, q_start, window, BN, CAUSAL, WINDOW)
    a = gl.minimum(gl.maximum(a, first), end)
    z = gl.minimum(gl.maximum(z, a), end)
    fa = gl.minimum(gl.maximum(fa, a), z)
    fz = gl.minimum(gl.maximum(fz, fa), z)

    m = gl.full([ROWS], NEG_INF, gl.float32, R)
    l = gl.zeros([ROWS], gl.float32, R)
    if SINKS:
        sink = gl.load(sinks + head).to(gl.float32) * LOG2E
        m = l + sink
        l = gl.where(m == NEG_INF, 0.0, l + 16384.0)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    for t in range(first, a):
        _skip(t - first, k_full, k_free, v_full, v_free, STAGES)
    if LEFT:
        for t in range(a, fa):
            m, l, acc = _step(t - first, t, m, l, acc, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full, v_free, factor,
                              lo, hi, D, BN, STAGES, True)  # fmt: skip
    else:
        fa = a
    for t in range(fa, fz):
        m, l, acc = _step(t - first, t, m, l, acc, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full, v_free, factor, lo,
                          hi, D, BN, STAGES, False)  # fmt: skip
    for t in range(fz, z):
        m, l, acc = _step(t - first, t, m, l, acc, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full, v_free, factor, lo,
                          hi, D, BN, STAGES, True)  # fmt: skip
    for t in range(z, end):
        _skip(t - first, k_full, k_free, v_full, v_free, STAGES)

    report_broken(todo, l, acc)
    rows_o = mine + gl.arange(0, ROWS, layout=RO)
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, O))
    valid = gl.expand_dims(rows_o < Nq, 1)
    offsets = gl.expand_dims(rows_o.to(gl.int64) * out_stride, 1) + gl.expand_dims(channels, 0)
    undo = gl.expand_dims(inverse_power(gl.load(v_scale + channels)), 0)
    if STATE:
        m_natural, correction = state_correction(m)
        correction = correction * 0.00006103515625  # 2^-14: P's scale
        gl.store(m_out + rows, m_natural, mask=rows < Nq)
        gl.store(s_out + rows, l * correction, mask=rows < Nq)
        per_row = gl.convert_layout(correction, RO)
    else:
        per_row = gl.convert_layout(gl.where(l == 0.0, 0.0, 1.0 / l), RO)
    gl.store(out + offsets, acc * gl.expand_dims(per_row, 1) * undo, mask=valid)


@gluon.jit(do_not_specialize=LENGTHS)
def split_attention(q, k_hi, k_lo, v_hi, v_lo, k_scale, v_scale, sinks, kv_range, out, m_out, s_out, todo,
                    H, Hkv, heads, tiles, section, Nq, Nk, q_start, window, scale,
                    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
                    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGS: gl.constexpr,
                    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, KV_RANGE: gl.constexpr, SINKS: gl.constexpr,
                    STATE: gl.constexpr):  # fmt: skip
    """One program: GROUPS·64 query rows of one head. Grid: heads·tiles, heads = B·H, tiles = ⌈Nq / (64·GROUPS)⌉.

    q [B, H, Nq, D] and out float32 by strides; k_hi … v_lo TMA descriptors of FP16 planes [B, Hkv, Nk, D]; k_scale and
    v_scale float32 [B, Hkv, D]; sinks [H]; kv_range int32 [B, 2]; m_out, s_out float32 [B, H, Nq].
    """
    bh, tile = tile_of_program(gl.program_id(0), heads, tiles, section)
    b = bh // H
    head = bh % H
    kv_head = head // (H // Hkv)
    row0 = tile * (ROWS * GROUPS)
    kv0 = 0
    kv1 = Nk
    if KV_RANGE:
        kv0 = gl.maximum(gl.load(kv_range + 2 * b), 0)
        kv1 = gl.minimum(gl.load(kv_range + 2 * b + 1), Nk)
    row1 = gl.minimum(row0 + ROWS * GROUPS, Nq)
    first, end, _, _ = tile_range(row0, row1, kv0, kv1, q_start, window, BN, CAUSAL, WINDOW)

    q += b.to(gl.int64) * q_stride_b + head.to(gl.int64) * q_stride_h
    out += b.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    todo += (b * Hkv + kv_head) * tiles + (tiles - 1 - tile if CAUSAL else tile)
    m_out += bh.to(gl.int64) * Nq
    s_out += bh.to(gl.int64) * Nq
    k_scale += (b * Hkv + kv_head) * D
    v_scale += (b * Hkv + kv_head) * D

    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    qh = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], q_layout)
    ql = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], q_layout)
    kh = gl.allocate_shared_memory(gl.float16, [STAGES, 1, 1, BN, D], k_hi.layout)
    kl = gl.allocate_shared_memory(gl.float16, [STAGES, 1, 1, BN, D], k_hi.layout)
    vh = gl.allocate_shared_memory(gl.float16, [STAGES, 1, 1, BN, D], k_hi.layout)
    vl = gl.allocate_shared_memory(gl.float16, [STAGES, 1, 1, BN, D], k_hi.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()

    LEFT: gl.constexpr = WINDOW or KV_RANGE
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_produce, (k_hi, k_lo, v_hi, v_lo, kh, kl, vh, vl, k_full, k_free, v_full, v_free, b, kv_head, first, end, BN, STAGES)),
                (_consume, (q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full,
                            v_free, head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride_n, out_stride_n,
                            D, BN, STAGES, 0, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full,
                            v_free, head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride_n, out_stride_n,
                            D, BN, STAGES, 1, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
            ],
            [4, 4], [REGS, REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_produce, (k_hi, k_lo, v_hi, v_lo, kh, kl, vh, vl, k_full, k_free, v_full, v_free, b, kv_head, first, end, BN, STAGES)),
                (_consume, (q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full,
                            v_free, head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride_n, out_stride_n,
                            D, BN, STAGES, 0, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full,
                            v_free, head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride_n, out_stride_n,
                            D, BN, STAGES, 1, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q, k_scale, v_scale, sinks, out, m_out, s_out, todo, qh, ql, kh, kl, vh, vl, k_full, k_free, v_full,
                            v_free, head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, q_stride_n, out_stride_n,
                            D, BN, STAGES, 2, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
            ],
            [4, 4, 4], [REGS, REGS, REGS],
        )  # fmt: skip
