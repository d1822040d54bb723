"""FP32-accurate attention on Hopper's tensor cores: every operand an FP16 pair (hi, lo), every product three.

One TMA producer warp group streams the (hi, lo) planes of K and V; each consumer warp group owns 64 query rows.
- S = lo·hi + hi·lo + hi·hi, smallest first, the large products in chains over 64 channels that are added in FP32: the
  tensor core truncates what it adds, so the error of S grows with the length of a chain.
- P·V starts from zero in every KV tile and is merged in FP32, for the same reason.
- Scales are powers of two, so they are exact: K per tile and Q per row, undone in the exponent's multiply; P by 2^8, in
  the exponent's subtraction; V per tile. The accumulator is kept in units of the coarsest scale of V so far: a tile
  with a finer one (smaller values) folds the difference into P's, a coarser one into the factor of the old sums.
- Sums over SPAN keys are merged into those of the spans before, which wait in the output: the error of a tree of
  chains of tens, not of one chain of thousands.
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
    NEG_INF,
    ROWS,
    Call,
    Features,
    at_head,
    fill,
    fold,
    initial_sums,
    new_ring,
    own_rows,
    plan_work,
    power_of_two,
    release,
    row_bounds,
    tiles_of_group,
    wait_full,
    write_rows,
)

# P ≤ 1 is split as P·2^8: hi and lo then hold it to 2^-33 of the row's largest. Less would lose small weights of much
# larger values (2^4 did), and more the last bits of the exponential's argument.
P_EXPONENT = gl.constexpr(8)
P_UNIT = gl.constexpr(2.0**-8)
FINEST = gl.constexpr(126)  # largest exponent of a scale (see planes.py)
# How much of a finer scale P takes up, lest it lose last bits; the rest is taken from the tile's product.
MAX_FINER = gl.constexpr(2)
SPAN = gl.constexpr(8192)  # keys
CHAIN = gl.constexpr(64)  # channels that one chain of large products adds up


@gluon.jit
def _produce(planes, keys, values, work, kv, slot, BN: gl.constexpr):
    """Stream the tiles of K and V into their rings; the first lies at the planes' tile `slot`."""
    for t in range(work.first, work.end):
        fill(keys, t - work.first, planes, 0, 1, kv, (slot + t) * BN, 2)
        fill(values, t - work.first, planes, 2, 3, kv, (slot + t) * BN, 2)


@gluon.jit
def _split_query(q, q_stride, qh, ql, row0, Nq, features, D: gl.constexpr, R: gl.constexpr):
    """Q of one warp group as (hi, lo) planes in shared memory; returns 2^-e of each row, in layout R.

    A row with an Inf or NaN keeps it in hi (and NaN in lo), so its logits and its output become NaN.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(rows.to(gl.int64) * q_stride, 1) + gl.expand_dims(channels, 0)
    exist = gl.expand_dims(rows < Nq, 1)
    if D != features.WIDTH:
        exist = exist & gl.expand_dims(channels < features.WIDTH, 0)
    x = gl.load(q + offsets, mask=exist, other=0.0)
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
def _operands(plane, D: gl.constexpr, BN: gl.constexpr):
    """Q's high half as operands: all of it in shared memory, or of 128 channels the first and the last CHAIN in
    registers. Against 64 keys a product reads as many bytes of Q as of K, all that shared memory can deliver.
    """
    if D <= CHAIN:
        first = plane
        rest = plane
    else:
        S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
        A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
        first = plane.slice(0, CHAIN, 1).load(A)
        rest = plane.slice(CHAIN, CHAIN, 1).load(A)
    return first, rest


@gluon.jit
def _products(q_0, q_1, ql, k_hi, k_lo, D: gl.constexpr, BN: gl.constexpr):
    """S of one tile. The large products of all but the first CHAIN channels have an accumulator of their own."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    s = warpgroup_mma(ql, k_hi.permute((1, 0)), gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
    if D <= CHAIN:
        s = warpgroup_mma(q_0, k_lo.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_0, k_hi.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
    else:
        s = warpgroup_mma(q_0, k_lo.slice(0, CHAIN, 1).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_1, k_lo.slice(CHAIN, CHAIN, 1).permute((1, 0)), s, is_async=True)
        k_0 = k_hi.slice(0, CHAIN, 1).permute((1, 0))
        k_1 = k_hi.slice(CHAIN, CHAIN, 1).permute((1, 0))
        s = warpgroup_mma(q_0, k_0, s, is_async=True)
        more = warpgroup_mma(q_1, k_1, gl.zeros([ROWS, BN], gl.float32, S), use_acc=False, is_async=True)
        s, more = warpgroup_mma_wait(0, deps=[s, more])
        s += more
    return s


@gluon.jit
def _step(t, m, l, acc, unit, k_e, v_e, exponents, q_0, q_1, ql, keys, values, work, factor, lo, hi, positions,
          features, D: gl.constexpr, BN: gl.constexpr, MASK: gl.constexpr):  # fmt: skip
    """Merge the KV tile t into (m, l, acc). m is in units of log2; acc carries P's 2^8 and 2^unit.

    k_e, v_e: exponents of the tile's scales; those of the next tile are returned, loaded long before their use.
    """
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    i = t - work.first
    slot = i % keys.stages
    following = exponents + 2 * gl.minimum(t + 1, work.end - 1)
    k_next = gl.load(following)
    v_next = gl.load(following + 1)
    coarsest = gl.minimum(unit, v_e)
    finer = gl.minimum(v_e - coarsest, MAX_FINER)
    # In two steps, so that neither over- nor underflows where q·k does not.
    here = factor * power_of_two(-(k_e >> 1)) * power_of_two(-(k_e - (k_e >> 1)))

    wait_full(keys, i)
    s = _products(q_0, q_1, ql, keys.hi.index(slot).reshape([BN, D]), keys.lo.index(slot).reshape([BN, D]), D, BN)
    release(keys, i)

    m, l, p, decay = fold(s, m, l, here, P_EXPONENT - finer, t, lo, hi, positions, work, BN, MASK, features)
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
    decay = gl.expand_dims(gl.convert_layout(decay * power_of_two(coarsest - unit), gl.SliceLayout(1, O)), 1)
    if v_e - coarsest > MAX_FINER:
        acc = gl.fma(acc, decay, w * power_of_two(MAX_FINER - (v_e - coarsest)))
    else:
        acc = gl.fma(acc, decay, w)  # named, or the product is hoisted out of both branches and the fusion lost
    return m, l, acc, coarsest, k_next, v_next


@gluon.jit
def _skip(i, keys, values):
    """Hand back a tile that another warp group needs and this one does not."""
    wait_full(keys, i)
    release(keys, i)
    wait_full(values, i)
    release(values, i)


@gluon.jit
def _absorb(m, l, acc, unit, m_before, l_before, unit_before, mine, work, output, features, D: gl.constexpr,
            O: gl.constexpr):  # fmt: skip
    """(l, acc) with the sums of the spans before, which wait in the output's rows; none yet: unit_before > FINEST."""
    pointers, exist = own_rows(output, mine, work.Nq, D, O, features)
    before = gl.load(pointers, mask=exist & (unit_before <= FINEST), other=0.0)
    factor = gl.exp2(m_before - gl.where(m == NEG_INF, 0.0, m))
    rescale = gl.convert_layout(factor * power_of_two(unit - unit_before), gl.SliceLayout(1, O))
    return gl.fma(l_before, factor, l), gl.fma(before, gl.expand_dims(rescale, 1), acc)


@gluon.jit
def _walk(begin, end, a, m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before, mine, exponents, q_0, q_1, ql,
          keys, values, work, output, factor, lo, hi, positions, features, D: gl.constexpr, BN: gl.constexpr,
          MASK: gl.constexpr):  # fmt: skip
    """The tiles [begin, end) of a walk that began at tile a. Where a span begins, the sums before it are put aside."""
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    TILES: gl.constexpr = SPAN // BN
    for span in range(begin // TILES, (end + TILES - 1) // TILES):
        start = gl.maximum(span * TILES, begin)
        if (start == span * TILES) & (start > a):
            l_before, acc = _absorb(
                m, l, acc, unit, m_before, l_before, unit_before, mine, work, output, features, D, O
            )
            pointers, exist = own_rows(output, mine, work.Nq, D, O, features)
            gl.store(pointers, acc, mask=exist)
            m_before = m
            unit_before = unit
            l = l * 0.0
            acc = acc * 0.0
        for t in range(start, gl.minimum(span * TILES + TILES, end)):
            m, l, acc, unit, k_e, v_e = _step(t, m, l, acc, unit, k_e, v_e, exponents, q_0, q_1, ql, keys, values, work,
                                              factor, lo, hi, positions, features, D, BN, MASK)  # fmt: skip
    return m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before


@gluon.jit
def _consume(q, q_stride, exponents, scale, qh_all, ql_all, keys, values, work, output, features,
             GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """One warp group: 64 query rows over the program's tiles."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    mine = work.row0 + ROWS * GROUP
    a, z, fa, fz = tiles_of_group(mine, work, BN, features)
    begin = exponents + 2 * gl.minimum(a, gl.maximum(work.end - 1, 0))
    k_e = gl.load(begin)
    v_e = gl.load(begin + 1)
    qh = qh_all.index(GROUP)
    ql = ql_all.index(GROUP)
    factor = _split_query(q, q_stride, qh, ql, mine, work.Nq, features, D, R) * (scale * LOG2E)
    q_0, q_1 = _operands(qh, D, BN)
    rows = mine + gl.arange(0, ROWS, layout=R)
    lo, hi = row_bounds(rows, work, features)
    positions = work.q_start + rows
    m, l = initial_sums(output, work, R, features)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    unit = gl.to_tensor(FINEST)
    m_before = gl.full([ROWS], NEG_INF, gl.float32, R)
    l_before = gl.zeros([ROWS], gl.float32, R)
    unit_before = gl.to_tensor(FINEST + 1)
    for t in range(work.first, a):
        _skip(t - work.first, keys, values)
    if features.LEFT:
        m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before = _walk(
            a, fa, a, m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before, mine, exponents, q_0, q_1, ql, keys,
            values, work, output, factor, lo, hi, positions, features, D, BN, True)  # fmt: skip
    else:
        fa = a
    m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before = _walk(
        fa, fz, a, m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before, mine, exponents, q_0, q_1, ql, keys,
        values, work, output, factor, lo, hi, positions, features, D, BN, False)  # fmt: skip
    m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before = _walk(
        fz, z, a, m, l, acc, unit, k_e, v_e, m_before, l_before, unit_before, mine, exponents, q_0, q_1, ql, keys,
        values, work, output, factor, lo, hi, positions, features, D, BN, True)  # fmt: skip
    for t in range(z, work.end):
        _skip(t - work.first, keys, values)
    if unit_before <= FINEST:
        l, acc = _absorb(m, l, acc, unit, m_before, l_before, unit_before, mine, work, output, features, D, O)
    write_rows(output, mine, work.Nq, m, l, acc, P_UNIT, power_of_two(-unit), GROUP, O, features)


@gluon.jit(do_not_specialize=[*LENGTHS, "slots"])
def split_attention(q, planes, exponents, sinks, slopes, kv_range, starts_q, starts_k, out, m_out, s_out, todo,
                    slots, H, Hkv, heads, tiles, section, Nq, Nk, total, q_start, window, scale, softcap,
                    q_stride_b, q_stride_h, q_stride_n, out_stride_b, out_stride_h, out_stride_n,
                    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REGS: gl.constexpr,
                    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, KV_RANGE: gl.constexpr, VARLEN: gl.constexpr,
                    SINKS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, STATE: gl.constexpr,
                    WIDTH: gl.constexpr):  # fmt: skip
    """One program: GROUPS·64 query rows of one head. Grid: heads·tiles, heads = B·H, tiles = ⌈Nq / (64·GROUPS)⌉.

    q [B, H, Nq, WIDTH ≤ D] and out float32 by strides; planes the TMA descriptor of FP16 [4, B·Hkv, Nk, D] and
    exponents int32 [B·Hkv, slots, 2] of a `TilePlanes` of BN rows; sinks and slopes float32 [H]; kv_range int32 [B, 2];
    m_out, s_out float32 [B, H, Nq]; todo int32 [B, Hkv, tiles, H / Hkv, GROUPS]: 1 where sums are not finite.
    VARLEN: B sequences of at most Nq and Nk tokens lie one after another, `total` queries in all, and begin where
    starts_q and starts_k int32 [B + 1] say; the tensors' own B is 1 then.
    """
    features = Features(CAUSAL, WINDOW, KV_RANGE, VARLEN, SINKS, SOFTCAP, ALIBI, STATE, WIDTH)
    call = Call(H, Hkv, heads, tiles, section, Nq, Nk, total, q_start, window, softcap, slopes, kv_range, starts_q,
                starts_k)  # fmt: skip
    work, mark = plan_work(gl.program_id(0), call, BN, ROWS * GROUPS, features)
    output = at_head(work, call, out, out_stride_b, out_stride_h, out_stride_n, m_out, s_out, todo + mark, sinks)
    q += work.batch.to(gl.int64) * q_stride_b + work.head.to(gl.int64) * q_stride_h
    q += work.begin_q.to(gl.int64) * q_stride_n
    kv = work.batch * Hkv + work.kv_head
    slot = gl.to_tensor(0)
    if VARLEN:
        slot = work.begin_k // BN + work.b
    exponents += 2 * (kv.to(gl.int64) * slots + slot)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    qh = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], layout)
    ql = gl.allocate_shared_memory(gl.float16, [GROUPS, ROWS, D], layout)
    keys = new_ring(planes, STAGES, GROUPS, 2)
    values = new_ring(planes, STAGES, GROUPS, 2)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_produce, (planes, keys, values, work, kv, slot, BN)),
                (_consume, (q, q_stride_n, exponents, scale, qh, ql, keys, values, work, output, features, 0, D, BN)),
                (_consume, (q, q_stride_n, exponents, scale, qh, ql, keys, values, work, output, features, 1, D, BN)),
            ],
            [4, 4], [REGS, REGS],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_produce, (planes, keys, values, work, kv, slot, BN)),
                (_consume, (q, q_stride_n, exponents, scale, qh, ql, keys, values, work, output, features, 0, D, BN)),
                (_consume, (q, q_stride_n, exponents, scale, qh, ql, keys, values, work, output, features, 1, D, BN)),
                (_consume, (q, q_stride_n, exponents, scale, qh, ql, keys, values, work, output, features, 2, D, BN)),
            ],
            [4, 4, 4], [REGS, REGS, REGS],
        )  # fmt: skip
