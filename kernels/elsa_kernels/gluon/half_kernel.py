"""FP16 and BF16 attention on Hopper's tensor cores, accumulated in FP32.

One TMA producer warp group; each consumer warp group owns 64 query rows. Softmax of tile i runs while the tensor cores
work: S(i+1) = Q·K is issued before P(i)·V, and the warp groups take turns in issuing (`TURNS`), so that one group's
softmax falls into the other's products.
"""

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
    ROWS,
    Call,
    Features,
    at_head,
    fill,
    fold,
    initial_sums,
    new_barriers,
    new_ring,
    plan_work,
    release,
    row_bounds,
    tiles_of_group,
    wait_full,
    write_rows,
)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_all, q_full, keys, values, work, GROUPS: gl.constexpr, BN: gl.constexpr):
    """Load Q once and stream the tiles of K and V into their rings."""
    for g in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(0), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc,
            [work.batch, work.head, work.begin_q + work.row0 + g * ROWS, 0],
            q_full.index(0),
            q_all.index(g),
        )
    for t in range(work.first, work.end):
        key = work.begin_k + t * BN
        fill(keys, t - work.first, k_desc, work.batch, work.batch, work.kv_head, key, 1)
        fill(values, t - work.first, v_desc, work.batch, work.batch, work.kv_head, key, 1)


@gluon.jit
def _issue_products(q, keys, i, S: gl.constexpr, BN: gl.constexpr, D: gl.constexpr):
    """S of the ring's i-th tile, asynchronously."""
    k = keys.hi.index(i % keys.stages).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)


@gluon.jit
def _step(t, m, l, acc, p, q, keys, values, turn, work, factor, lo, hi, positions, features, GROUP: gl.constexpr,
          GROUPS: gl.constexpr, TURNS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
          MASK: gl.constexpr):  # fmt: skip
    """Issue S(i) and P(i−1)·V; softmax of S(i) while P(i−1)·V runs. Returns with P(i) pending."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    i = t - work.first
    wait_full(keys, i)
    if TURNS:
        mbarrier.wait(turn.index(GROUP), (i & 1) ^ (0 if GROUP == 0 else 1))
    s = _issue_products(q, keys, i, S, BN, D)
    wait_full(values, i - 1)
    v = values.hi.index((i - 1) % values.stages).reshape([BN, D])
    pending = warpgroup_mma(p, v, acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    release(keys, i)
    m, l, p_new, decay = fold(s, m, l, factor, None, t, lo, hi, positions, work, BN, MASK, features)
    p_new = gl.convert_layout(p_new.to(p.dtype), P)
    # ptxas would hoist the wait for P·V over the softmax that is meant to hide it. A second look at a barrier that is
    # open already ends the basic block, and p_new among the dependencies keeps LLVM from sinking the softmax.
    wait_full(values, i - 1)
    acc, p, p_new = warpgroup_mma_wait(0, deps=[pending, p, p_new])
    release(values, i - 1)
    return m, l, acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, O)), 1), p_new


@gluon.jit
def _consume(scale, q_all, q_full, keys, values, turn, work, output, features, GROUP: gl.constexpr,
             GROUPS: gl.constexpr, TURNS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """One warp group: 64 query rows over the program's tiles."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, S)
    mine = work.row0 + ROWS * GROUP
    factor = gl.full([ROWS], 0.0, gl.float32, R) + scale * LOG2E
    rows = mine + gl.arange(0, ROWS, layout=R)
    lo, hi = row_bounds(rows, work, features)
    positions = work.q_start + rows
    _a, _z, fa, fz = tiles_of_group(mine, work, BN, features)
    m, l = initial_sums(output, work, R, features)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    mbarrier.wait(q_full.index(0), 0)
    q = q_all.index(GROUP).reshape([ROWS, D])
    if work.end > work.first:
        wait_full(keys, 0)
        s = _issue_products(q, keys, 0, S, BN, D)
        s = warpgroup_mma_wait(0, deps=[s])
        release(keys, 0)
        m, l, p32, _decay = fold(s, m, l, factor, None, work.first, lo, hi, positions, work, BN, True, features)
        p = gl.convert_layout(p32.to(q_all.dtype), P)
        start = work.first + 1
        fa = gl.maximum(fa, start)
        fz = gl.maximum(fz, fa)
        if features.LEFT:
            for t in range(start, fa):
                m, l, acc, p = _step(t, m, l, acc, p, q, keys, values, turn, work, factor, lo, hi, positions, features,
                                     GROUP, GROUPS, TURNS, D, BN, True)  # fmt: skip
            start = fa
        for t in range(start, fz):
            m, l, acc, p = _step(t, m, l, acc, p, q, keys, values, turn, work, factor, lo, hi, positions, features,
                                 GROUP, GROUPS, TURNS, D, BN, False)  # fmt: skip
        for t in range(gl.maximum(fz, start), work.end):
            m, l, acc, p = _step(t, m, l, acc, p, q, keys, values, turn, work, factor, lo, hi, positions, features,
                                 GROUP, GROUPS, TURNS, D, BN, True)  # fmt: skip
        last = work.end - 1 - work.first
        wait_full(values, last)
        pending = warpgroup_mma(p, values.hi.index(last % values.stages).reshape([BN, D]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[pending, p])
    write_rows(output, mine, work.Nq, m, l, acc, 1.0, 1.0, GROUP, O, features)


@gluon.jit(do_not_specialize=LENGTHS)
def half_attention(q_desc, k_desc, v_desc, sinks, slopes, kv_range, starts_q, starts_k, out, m_out, s_out, todo,
                   H, Hkv, heads, tiles, section, Nq, Nk, total, q_start, window, scale, softcap,
                   out_stride_b, out_stride_h, out_stride_n,
                   D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGS: gl.constexpr,
                   TURNS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, KV_RANGE: gl.constexpr,
                   VARLEN: gl.constexpr, SINKS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
                   STATE: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """One program: GROUPS·64 query rows of one head. Grid: heads·tiles, heads = B·H, tiles = ⌈Nq / (64·GROUPS)⌉.

    Heads have WIDTH ≤ D channels; TMA reads zeros beyond. q_desc [B, H, Nq, WIDTH], k_desc and v_desc [B, Hkv, Nk,
    WIDTH]: TMA descriptors, FP16 or BF16; out in the same type, or float32 for a state, by strides; the rest as for
    `split_attention`.
    """
    features = Features(CAUSAL, WINDOW, KV_RANGE, VARLEN, SINKS, SOFTCAP, ALIBI, STATE, WIDTH)
    call = Call(H, Hkv, heads, tiles, section, Nq, Nk, total, q_start, window, softcap, slopes, kv_range, starts_q,
                starts_k)  # fmt: skip
    work, mark = plan_work(gl.program_id(0), call, BN, ROWS * GROUPS, features)
    output = at_head(work, call, out, out_stride_b, out_stride_h, out_stride_n, m_out, s_out, todo + mark, sinks)
    q_all = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    q_full = new_barriers(1, GROUPS)
    keys = new_ring(k_desc, STAGES, GROUPS, 1)
    values = new_ring(v_desc, STAGES, GROUPS, 1)
    turn = new_barriers(GROUPS, 1)
    fence_async_shared()
    gl.static_assert(GROUPS == 2)
    gl.warp_specialize(
        [
            (_produce, (q_desc, k_desc, v_desc, q_all, q_full, keys, values, work, GROUPS, BN)),
            (_consume, (scale, q_all, q_full, keys, values, turn, work, output, features, 0, GROUPS, TURNS, D, BN)),
            (_consume, (scale, q_all, q_full, keys, values, turn, work, output, features, 1, GROUPS, TURNS, D, BN)),
        ],
        [4, 4], [REGS, REGS],
    )  # fmt: skip
