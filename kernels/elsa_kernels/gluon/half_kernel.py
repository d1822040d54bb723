"""FP16 and BF16 attention on Hopper's tensor cores, accumulated in FP32.

One TMA producer warp group; each consumer warp group owns 64 query rows. Softmax of tile i runs while the tensor cores
work: S(i+1) = Q·K is issued before P(i)·V, and the warp groups take turns in issuing (`TURNS`), so that one group's
softmax falls into the other's products.
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
    key_begin,
    key_end,
    report_broken,
    state_correction,
    tile_of_program,
    tile_range,
)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, b, head, kv_head, row0,
             first, end, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):  # fmt: skip
    """Load Q once and stream the tiles [first, end) of K and V into the ring."""
    for g in gl.static_range(GROUPS):
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, head, row0 + g * ROWS, 0], q_full, q_all.index(g))
    for t in range(first, end):
        i = t - first
        slot = i % STAGES
        free_phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(slot), free_phase)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, kv_head, t * BN, 0], k_full.index(slot), k_all.index(slot))
        mbarrier.wait(v_free.index(slot), free_phase)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [b, kv_head, t * BN, 0], v_full.index(slot), v_all.index(slot))


@gluon.jit
def _softmax(s, t, m, l, factor, lo, hi, P: gl.constexpr, DTYPE: gl.constexpr, BN: gl.constexpr, MASK: gl.constexpr):
    """Fold the logits of tile t into (m, l); returns them with P in `DTYPE` and the factor that old sums take."""
    S: gl.constexpr = s.type.layout
    if MASK:
        keys = gl.expand_dims(t * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S)), 0)
        s = gl.where((keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1)), s, NEG_INF)
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor)
        m_safe = gl.where(m_new == NEG_INF, 0.0, m_new)
    else:
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor)
        m_safe = m_new
    p = gl.exp2(s * factor - gl.expand_dims(m_safe, 1))
    alpha = gl.exp2(m - m_safe)
    l = l * alpha + gl.sum(p, axis=1)
    return m_new, l, gl.convert_layout(p.to(DTYPE), P), alpha


@gluon.jit
def _step(i, t, m, l, acc, p, q, k_all, v_all, k_full, k_free, v_full, v_free, turn, factor, lo, hi,
          D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
          GROUPS: gl.constexpr, MASK: gl.constexpr):  # fmt: skip
    """Issue S(i) and P(i−1)·V; softmax of S(i) while P(i−1)·V runs. Returns with P(i) pending."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    slot = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turn.index(GROUP), (i & 1) ^ (0 if GROUP == 0 else 1))
    k = k_all.index(slot).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q, k, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    pending = warpgroup_mma(p, v_all.index(before).reshape([BN, D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(slot), count=1)
    m, l, p_new, alpha = _softmax(s, t, m, l, factor, lo, hi, P, p.dtype, BN, MASK)
    # ptxas would hoist the wait for P·V over the softmax that is meant to hide it. A second look at a barrier that is
    # open already ends the basic block, and p_new among the dependencies keeps LLVM from sinking the softmax.
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    acc, p, p_new = warpgroup_mma_wait(0, deps=[pending, p, p_new])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O)), 1)
    return m, l, acc, p_new


@gluon.jit
def _consume(q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo, head, row0, first,
             end, kv0, kv1, q_start, window, Nq, scale, out_stride, D: gl.constexpr, BN: gl.constexpr,
             STAGES: gl.constexpr, GROUPS: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
             WINDOW: gl.constexpr, LEFT: gl.constexpr, SINKS: gl.constexpr, STATE: gl.constexpr):  # fmt: skip
    """One warp group: 64 query rows over the tiles [first, end)."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, S)
    RO: gl.constexpr = gl.SliceLayout(1, O)
    mine = row0 + ROWS * GROUP
    factor = scale * LOG2E
    rows = mine + gl.arange(0, ROWS, layout=R)
    lo = gl.maximum(key_begin(rows, q_start, window, WINDOW), kv0)
    hi = gl.minimum(key_end(rows, kv1, q_start, window, CAUSAL, WINDOW), kv1)
    _first, _end, fa, fz = tile_range(mine, gl.minimum(mine + ROWS, Nq), kv0, kv1, q_start, window, BN, CAUSAL, WINDOW)

    m = gl.full([ROWS], NEG_INF, gl.float32, R)
    l = gl.zeros([ROWS], gl.float32, R)
    if SINKS:
        m = l + gl.load(sinks + head).to(gl.float32) * LOG2E
        l = gl.where(m == NEG_INF, 0.0, 1.0)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    mbarrier.wait(q_full, 0)
    q = q_all.index(GROUP).reshape([ROWS, D])
    if end > first:
        mbarrier.wait(k_full.index(0), 0)
        k = k_all.index(0).reshape([BN, D]).permute((1, 0))
        s = warpgroup_mma(q, k, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_free.index(0), count=1)
        m, l, p, _alpha = _softmax(s, first, m, l, factor, lo, hi, P, q_all.dtype, BN, True)
        start = first + 1
        fa = gl.minimum(gl.maximum(fa, start), end)
        fz = gl.minimum(gl.maximum(fz, fa), end)
        if LEFT:
            for t in range(start, fa):
                m, l, acc, p = _step(t - first, t, m, l, acc, p, q, k_all, v_all, k_full, k_free, v_full, v_free, turn,
                                     factor, lo, hi, D, BN, STAGES, TURNS, GROUP, GROUPS, True)  # fmt: skip
            start = fa
        for t in range(start, fz):
            m, l, acc, p = _step(t - first, t, m, l, acc, p, q, k_all, v_all, k_full, k_free, v_full, v_free, turn, factor,
                                 lo, hi, D, BN, STAGES, TURNS, GROUP, GROUPS, False)  # fmt: skip
        for t in range(gl.maximum(fz, start), end):
            m, l, acc, p = _step(t - first, t, m, l, acc, p, q, k_all, v_all, k_full, k_free, v_full, v_free, turn, factor,
                                 lo, hi, D, BN, STAGES, TURNS, GROUP, GROUPS, True)  # fmt: skip
        last = end - 1 - first
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        pending = warpgroup_mma(p, v_all.index(last % STAGES).reshape([BN, D]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[pending, p])

    report_broken(todo, l, acc)
    rows_o = mine + gl.arange(0, ROWS, layout=RO)
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, O))
    offsets = gl.expand_dims(rows_o.to(gl.int64) * out_stride, 1) + gl.expand_dims(channels, 0)
    if STATE:
        m_natural, per_row = state_correction(m)
        gl.store(m_out + rows, m_natural, mask=rows < Nq)
        gl.store(s_out + rows, l * per_row, mask=rows < Nq)
    else:
        per_row = gl.where(l == 0.0, 0.0, 1.0 / l)
    value = acc * gl.expand_dims(gl.convert_layout(per_row, RO), 1)
    gl.store(out + offsets, value.to(out.dtype.element_ty), mask=gl.expand_dims(rows_o < Nq, 1))


@gluon.jit(do_not_specialize=LENGTHS)
def half_attention(q_desc, k_desc, v_desc, sinks, kv_range, out, m_out, s_out, todo, H, Hkv, heads, tiles, section, Nq, Nk,
                   q_start, window, scale, out_stride_b, out_stride_h, out_stride_n,
                   D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGS: gl.constexpr,
                   TURNS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, KV_RANGE: gl.constexpr,
                   SINKS: gl.constexpr, STATE: gl.constexpr):  # fmt: skip
    """One program: GROUPS·64 query rows of one head. Grid: heads·tiles, heads = B·H, tiles = ⌈Nq / (64·GROUPS)⌉.

    q_desc [B, H, Nq, D], k_desc and v_desc [B, Hkv, Nk, D]: TMA descriptors, FP16 or BF16; out in the same type, or
    float32 for a state, by strides; sinks [H] float32; kv_range int32 [B, 2]; m_out, s_out float32 [B, H, Nq].
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
    out += b.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    todo += (b * Hkv + kv_head) * tiles + (tiles - 1 - tile if CAUSAL else tile)
    m_out += bh.to(gl.int64) * Nq
    s_out += bh.to(gl.int64) * Nq

    q_all = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    k_all = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_all = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()

    LEFT: gl.constexpr = WINDOW or KV_RANGE
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_produce, (q_desc, k_desc, v_desc, q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, b, head, kv_head, row0,
                            first, end, BN, STAGES, GROUPS)),
                (_consume, (q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo,
                            head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, out_stride_n, D, BN, STAGES,
                            GROUPS, TURNS, 0, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo,
                            head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, out_stride_n, D, BN, STAGES,
                            GROUPS, TURNS, 1, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
            ],
            [4, 4], [REGS, REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_produce, (q_desc, k_desc, v_desc, q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, b, head, kv_head, row0,
                            first, end, BN, STAGES, GROUPS)),
                (_consume, (q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo,
                            head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, out_stride_n, D, BN, STAGES,
                            GROUPS, TURNS, 0, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo,
                            head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, out_stride_n, D, BN, STAGES,
                            GROUPS, TURNS, 1, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
                (_consume, (q_all, k_all, v_all, q_full, k_full, k_free, v_full, v_free, turn, sinks, out, m_out, s_out, todo,
                            head, row0, first, end, kv0, kv1, q_start, window, Nq, scale, out_stride_n, D, BN, STAGES,
                            GROUPS, TURNS, 2, CAUSAL, WINDOW, LEFT, SINKS, STATE)),
            ],
            [4, 4, 4], [REGS, REGS, REGS],
        )  # fmt: skip
