"""FP32-accurate attention on Hopper's tensor cores: every operand an FP16 pair (hi, lo), every product three.

One TMA producer warp group streams the (hi, lo) planes of K and V; each consumer warp group owns 64 query rows.
- S = lo·hi + hi·lo + hi·hi, smallest first, in one chain over D: the tensor core adds at most 3·D products.
- P·V starts from zero in every KV tile and is merged in FP32. The tensor core truncates inside its accumulator; kept
  there over N keys that error grows like N. Per tile it does not, and the merge is the monoid's own.
- Scales are powers of two, so they are exact: K per (batch, head, channel), folded inversely into Q; Q then per row,
  undone in the exponent's multiply; P by 2^14 in the exponent's subtraction; V per channel, undone at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elsa_kernels.gluon.common import (
    LENGTHS,
    LOG2E,
    ROWS,
    Features,
    at_head,
    fill,
    fold,
    initial_sums,
    inverse_power,
    new_ring,
    plan_work,
    release,
    row_bounds,
    tiles_of_group,
    wait_full,
    write_rows,
)

P_EXPONENT = gl.constexpr(14)  # P ≤ 1 is held as P·2^14 < 65504: its lo half then keeps 11 more bits down to 2^-24
P_UNIT = gl.constexpr(16384.0)


@gluon.jit
def _produce(k_hi, k_lo, v_hi, v_lo, keys, values, work, BN: gl.constexpr):
    """Stream the tiles of K and V into their rings."""
    for t in range(work.first, work.end):
        fill(keys, t - work.first, k_hi, k_lo, work, t * BN, 2)
        fill(values, t - work.first, v_hi, v_lo, work, t * BN, 2)


@gluon.jit
def _split_query(q, q_stride, k_scale, qh, ql, row0, Nq, D: gl.constexpr, R: gl.constexpr):
    """Q·(1/K's scale) of one warp group as (hi, lo) planes in shared memory; returns 2^-e of each row, in layout R.

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
    return gl.convert_layout(down, R)


@gluon.jit
def _step(t, m, l, acc, qh, ql, keys, values, work, factor, lo, hi, D: gl.constexpr, BN: gl.constexpr,
          MASK: gl.constexpr):  # fmt: skip
    """Merge the KV tile t into (m, l, acc). m is in units of log2, l and acc carry P's 2^14."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    i = t - work.first
    slot = i % keys.stages

    wait_full(keys, i)
    k_hi = keys.hi.index(slot).reshape([BN, D]).permute((1, 0))
    k_lo = keys.lo.index(slot).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(ql, k_hi, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
    s = warpgroup_mma(qh, k_lo, s, is_async=True)
    s = warpgroup_mma(qh, k_hi, s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    release(keys, i)

    m, l, p, decay = fold(s, m, l, factor, P_EXPONENT, t, lo, hi, BN, MASK)
    p_hi = p.to(gl.float16)
    p_lo = (p - p_hi.to(gl.float32)).to(gl.float16)
    p_hi = gl.convert_layout(p_hi, P)
    p_lo = gl.convert_layout(p_lo, P)

    wait_full(values, i)
    v_hi = values.hi.index(slot).reshape([BN, D])
    v_lo = values.lo.index(slot).reshape([BN, D])
    w = warpgroup_mma(p_lo, v_hi, gl.zeros([ROWS, D], gl.float32, O), use_acc=False, is_async=True)
    w = warpgroup_mma(p_hi, v_lo, w, is_async=True)
    w = warpgroup_mma(p_hi, v_hi, w, is_async=True)
    w = warpgroup_mma_wait(0, deps=[w])
    release(values, i)
    return m, l, acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, O)), 1) + w


@gluon.jit
def _skip(i, keys, values):
    """Hand back a tile that another warp group needs and this one does not."""
    wait_full(keys, i)
    release(keys, i)
    wait_full(values, i)
    release(values, i)


@gluon.jit
def _consume(q, q_stride, k_scale, v_scale, scale, qh_all, ql_all, keys, values, work, output, features,
             GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """One warp group: 64 query rows over the program's tiles."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    mine = work.row0 + ROWS * GROUP
    qh = qh_all.index(GROUP)
    ql = ql_all.index(GROUP)
    factor = _split_query(q, q_stride, k_scale, qh, ql, mine, work.Nq, D, R) * (scale * LOG2E)
    lo, hi = row_bounds(mine + gl.arange(0, ROWS, layout=R), work, features)
    a, z, fa, fz = tiles_of_group(mine, work, BN, features)
    m, l = initial_sums(output, work, P_UNIT, R, features)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    for t in range(work.first, a):
        _skip(t - work.first, keys, values)
    if features.LEFT:
        for t in range(a, fa):
            m, l, acc = _step(t, m, l, acc, qh, ql, keys, values, work, factor, lo, hi, D, BN, True)
    else:
        fa = a
    for t in range(fa, fz):
        m, l, acc = _step(t, m, l, acc, qh, ql, keys, values, work, factor, lo, hi, D, BN, False)
    for t in range(fz, z):
        m, l, acc = _step(t, m, l, acc, qh, ql, keys, values, work, factor, lo, hi, D, BN, True)
    for t in range(z, work.end):
        _skip(t - work.first, keys, values)
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, O))
    columns = gl.expand_dims(inverse_power(gl.load(v_scale + channels)), 0)
    write_rows(output, mine, work.Nq, m, l, acc, columns, P_UNIT, O, features)


@gluon.jit(do_not_specialize=LENGTHS)
def split_attention(q, k_hi, k_lo, v_hi, v_lo, k_scale, v_scale, sinks, kv_range, out, m_out, s_out, todo,
                    H, Hkv, heads, tiles, section, Nq, Nk, q_start, window, scale,
                    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
                    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGS: gl.constexpr,
                    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, KV_RANGE: gl.constexpr, SINKS: gl.constexpr,
                    STATE: gl.constexpr):  # fmt: skip
    """One program: GROUPS·64 query rows of one head. Grid: heads·tiles, heads = B·H, tiles = ⌈Nq / (64·GROUPS)⌉.

    q [B, H, Nq, D] and out float32 by strides; k_hi … v_lo TMA descriptors of FP16 planes [B, Hkv, Nk, D]; k_scale and
    v_scale float32 [B, Hkv, D]; sinks [H]; kv_range int32 [B, 2]; m_out, s_out float32 [B, H, Nq]; todo int32
    [B, Hkv, tiles]: 1 where a tile's sums are not finite.
    """
    features = Features(CAUSAL, WINDOW, WINDOW or KV_RANGE, SINKS, STATE)
    work, mark = plan_work(
        H, Hkv, heads, tiles, section, Nq, Nk, q_start, window, kv_range, BN, ROWS * GROUPS, features, KV_RANGE
    )
    output = at_head(work, H, out, out_stride_b, out_stride_h, out_stride_n, m_out, s_out, todo + mark, sinks)
    q += work.b.to(gl.int64) * q_stride_b + work.head.to(gl.int64) * q_stride_h
    k_scale += (work.b * Hkv + work.kv_head) * D
    v_scale += (work.b * Hkv + work.kv_head) * D

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    qh = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], layout)
    ql = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], layout)
    keys = new_ring(k_hi, STAGES, GROUPS, 2)
    values = new_ring(v_hi, STAGES, GROUPS, 2)
    fence_async_shared()
    gl.static_assert(GROUPS == 2)
    gl.warp_specialize(
        [
            (_produce, (k_hi, k_lo, v_hi, v_lo, keys, values, work, BN)),
            (_consume, (q, q_stride_n, k_scale, v_scale, scale, qh, ql, keys, values, work, output, features,
                        0, D, BN)),
            (_consume, (q, q_stride_n, k_scale, v_scale, scale, qh, ql, keys, values, work, output, features,
                        1, D, BN)),
        ],
        [4, 4], [REGS, REGS],
    )  # fmt: skip
