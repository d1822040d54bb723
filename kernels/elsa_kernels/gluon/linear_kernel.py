"""FP32-accurate C = X·Wᵀ on Hopper's tensor cores, from operands split into FP16 pairs (hi, lo).

One TMA producer warp group, and consumer warp groups of 64 rows each. Every BK of K is three products from zero,
smallest first, and is then added to an FP32 accumulator outside the tensor core, which truncates inside its own:
left there over K = 13824 the error is 6e-6 on N(0, 1) data and 3e-5 on positive data, promoted it is that of a short
FP32 sum. While one consumer adds, the other keeps the tensor core busy.
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

ROWS = gl.constexpr(64)  # rows of X of one consumer: the M of one wgmma
CONSUMERS = gl.constexpr(2)


@gluon.jit
def _tile(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """(m, n) of a tile: GROUP rows of tiles are walked column by column, so that W's tiles are reused from L2."""
    per_group = GROUP * tiles_n
    first = (index // per_group) * GROUP
    height = gl.minimum(GROUP, tiles_m - first)
    within = index % per_group
    return first + within % height, within // height


@gluon.jit
def _power_of_two(e):
    """2^e in FP32 for e ≤ 127; below 2^-126, whose square turns every sum here to 0, it stays 2^-126."""
    return ((gl.maximum(e, -126) + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _produce(x_hi, x_lo, w_hi, w_lo, xh, xl, wh, wl, full, free, tiles_m, tiles_n, steps,
             BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    BYTES: gl.constexpr = 2 * 2 * (CONSUMERS * ROWS + BN) * BK
    i = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(index, tiles_m, tiles_n, GROUP)
        for step in range(steps):
            slot = i % STAGES
            mbarrier.wait(free.index(slot), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            for c in gl.static_range(CONSUMERS):
                row = (m * CONSUMERS + c) * ROWS
                tma.async_copy_global_to_shared(
                    x_hi, [row, step * BK], full.index(slot), xh.index(slot * CONSUMERS + c)
                )
                tma.async_copy_global_to_shared(
                    x_lo, [row, step * BK], full.index(slot), xl.index(slot * CONSUMERS + c)
                )
            tma.async_copy_global_to_shared(w_hi, [n * BN, step * BK], full.index(slot), wh.index(slot))
            tma.async_copy_global_to_shared(w_lo, [n * BN, step * BK], full.index(slot), wl.index(slot))
            i += 1


@gluon.jit
def _consume(xh, xl, wh, wl, full, free, out, x_exponent, w_exponent, bias, M, N, tiles_m, tiles_n, steps,
             C: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
             BIAS: gl.constexpr):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    i = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(index, tiles_m, tiles_n, GROUP)
        acc = gl.zeros([ROWS, BN], gl.float32, ACC)
        for _ in range(steps):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), (i // STAGES) & 1)
            x0 = xh.index(slot * CONSUMERS + C)
            x1 = xl.index(slot * CONSUMERS + C)
            w0 = wh.index(slot).permute((1, 0))
            w1 = wl.index(slot).permute((1, 0))
            part = warpgroup_mma(x1, w0, gl.zeros([ROWS, BN], gl.float32, ACC), use_acc=False, is_async=True)
            part = warpgroup_mma(x0, w1, part, is_async=True)
            part = warpgroup_mma(x0, w0, part, is_async=True)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(slot), count=1)
            acc += part
            i += 1
        rows = (m * CONSUMERS + C) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        cols = n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
        # The exponents' sum, applied in two exact halves: neither half overflows where the result does not.
        e = gl.expand_dims(gl.load(x_exponent + rows, mask=rows < M, other=0), 1)
        e = e + gl.expand_dims(gl.load(w_exponent + cols, mask=cols < N, other=0), 0)
        half = e >> 1
        acc = acc * _power_of_two(half)
        acc = acc * _power_of_two(e - half)
        if BIAS:
            acc = acc + gl.expand_dims(gl.load(bias + cols, mask=cols < N, other=0.0), 0)
        offsets = gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(cols, 0)
        gl.store(out + offsets, acc, mask=gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < N, 0))


@gluon.jit
def linear_kernel(x_hi, x_lo, w_hi, w_lo, out, x_exponent, w_exponent, bias, M, N, K,
                  BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
                  REGISTERS: gl.constexpr):  # fmt: skip
    """out [M, N] = (x_hi + x_lo) [M, K] · (w_hi + w_lo) [N, K]ᵀ · 2^(x_exponent [M] + w_exponent [N]) (+ bias [N])."""
    tiles_m = gl.cdiv(M, CONSUMERS * ROWS)
    tiles_n = gl.cdiv(N, BN)
    steps = gl.cdiv(K, BK)
    xh = gl.allocate_shared_memory(gl.float16, [STAGES * CONSUMERS, ROWS, BK], x_hi.layout)
    xl = gl.allocate_shared_memory(gl.float16, [STAGES * CONSUMERS, ROWS, BK], x_hi.layout)
    wh = gl.allocate_shared_memory(gl.float16, [STAGES, BN, BK], w_hi.layout)
    wl = gl.allocate_shared_memory(gl.float16, [STAGES, BN, BK], w_hi.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=CONSUMERS)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize([
        (_produce, (x_hi, x_lo, w_hi, w_lo, xh, xl, wh, wl, full, free, tiles_m, tiles_n, steps,
                    BN, BK, STAGES, GROUP)),
        (_consume, (xh, xl, wh, wl, full, free, out, x_exponent, w_exponent, bias, M, N, tiles_m, tiles_n, steps,
                    0, BN, STAGES, GROUP, BIAS)),
        (_consume, (xh, xl, wh, wl, full, free, out, x_exponent, w_exponent, bias, M, N, tiles_m, tiles_n, steps,
                    1, BN, STAGES, GROUP, BIAS)),
    ], [4, 4], [REGISTERS, REGISTERS])
    # fmt: on
