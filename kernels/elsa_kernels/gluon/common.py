"""What both Hopper kernels share: a program's work, its rings of KV tiles, which keys its rows see, and its output.

Positions: query row i sits at key position `q_start + i` and sees the half-open range [lo_i, hi_i) of keys, both
monotone in i. Every mask of this package's contract that depends on positions alone (causal, window, `kv_range`, the
tail of K) is such a range, so one pair of bounds per row replaces a mask per feature.
"""

# No `from __future__ import annotations` here: aggregates read their fields' types from the annotations.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

try:
    from triton.language.core import aggregate
except ImportError:  # its name in Triton 3.6
    from triton.language.core import _aggregate as aggregate

LOG2E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))
ROWS = gl.constexpr(64)  # query rows of one consumer warp group: the M of one wgmma
LN2 = gl.constexpr(0.6931471805599453)
# Lengths change from call to call: none of them may become part of a compiled variant.
LENGTHS = ["H", "Hkv", "heads", "tiles", "section", "Nq", "Nk", "total", "q_start", "window"]


@aggregate
class Features:
    """What a variant is compiled for. LEFT: rows may begin after key 0. WIDTH: channels of a head."""

    CAUSAL: gl.constexpr
    WINDOW: gl.constexpr
    KV_RANGE: gl.constexpr
    VARLEN: gl.constexpr
    LEFT: gl.constexpr
    SINKS: gl.constexpr
    SOFTCAP: gl.constexpr
    ALIBI: gl.constexpr
    STATE: gl.constexpr
    WIDTH: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, CAUSAL, WINDOW, KV_RANGE, VARLEN, SINKS, SOFTCAP, ALIBI, STATE, WIDTH):
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.WINDOW = gl.constexpr(WINDOW)
        self.KV_RANGE = gl.constexpr(KV_RANGE)
        self.VARLEN = gl.constexpr(VARLEN)
        self.LEFT = gl.constexpr(WINDOW or KV_RANGE)
        self.SINKS = gl.constexpr(SINKS)
        self.SOFTCAP = gl.constexpr(SOFTCAP)
        self.ALIBI = gl.constexpr(ALIBI)
        self.STATE = gl.constexpr(STATE)
        self.WIDTH = gl.constexpr(WIDTH)


@aggregate
class Call:
    """What all programs of a launch are given: see `split_attention`."""

    H: gl.tensor
    Hkv: gl.tensor
    heads: gl.tensor
    tiles: gl.tensor
    section: gl.tensor
    Nq: gl.tensor
    Nk: gl.tensor
    total: gl.tensor
    q_start: gl.tensor
    window: gl.tensor
    softcap: gl.tensor
    slopes: gl.tensor
    kv_range: gl.tensor
    starts_q: gl.tensor
    starts_k: gl.tensor

    @gluon.constexpr_function
    def __init__(self, H, Hkv, heads, tiles, section, Nq, Nk, total, q_start, window, softcap, slopes, kv_range,
                 starts_q, starts_k):  # fmt: skip
        self.H = H
        self.Hkv = Hkv
        self.heads = heads
        self.tiles = tiles
        self.section = section
        self.Nq = Nq
        self.Nk = Nk
        self.total = total
        self.q_start = q_start
        self.window = window
        self.softcap = softcap
        self.slopes = slopes
        self.kv_range = kv_range
        self.starts_q = starts_q
        self.starts_k = starts_k


@aggregate
class Work:
    """One program's share: rows from row0 on of one head, over the KV tiles [first, end) and the keys [kv0, kv1).

    Rows and keys count from the sequence's own first, which lie at begin_q and begin_k of batch element `batch` in
    memory. softcap and slope (ALiBi's, of this head) in units of log2.
    """

    b: gl.tensor
    batch: gl.tensor
    begin_q: gl.tensor
    begin_k: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    row0: gl.tensor
    first: gl.tensor
    end: gl.tensor
    kv0: gl.tensor
    kv1: gl.tensor
    q_start: gl.tensor
    window: gl.tensor
    Nq: gl.tensor
    softcap: gl.tensor
    slope: gl.tensor

    @gluon.constexpr_function
    def __init__(self, b, batch, begin_q, begin_k, head, kv_head, row0, first, end, kv0, kv1, q_start, window, Nq,
                 softcap, slope):  # fmt: skip
        self.b = b
        self.batch = batch
        self.begin_q = begin_q
        self.begin_k = begin_k
        self.head = head
        self.kv_head = kv_head
        self.row0 = row0
        self.first = first
        self.end = end
        self.kv0 = kv0
        self.kv1 = kv1
        self.q_start = q_start
        self.window = window
        self.Nq = Nq
        self.softcap = softcap
        self.slope = slope


@aggregate
class Output:
    """Where results go, at this head's first row: out by its row stride, m and s, and the tile's marks (`todo`)."""

    out: gl.tensor
    m: gl.tensor
    s: gl.tensor
    todo: gl.tensor
    stride: gl.tensor
    sinks: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out, m, s, todo, stride, sinks):
        self.out = out
        self.m = m
        self.s = s
        self.todo = todo
        self.stride = stride
        self.sinks = sinks


@aggregate
class Ring:
    """KV tiles in flight: [stages, 1, 1, BN, D] in shared memory, a barrier per slot for filled and one for free.

    With FP16 pairs a slot holds a tile of each plane; otherwise `lo` is `hi` again.
    """

    hi: gl.shared_memory_descriptor
    lo: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    stages: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, hi, lo, full, free, stages):
        self.hi = hi
        self.lo = lo
        self.full = full
        self.free = free
        self.stages = gl.constexpr(stages)


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def new_ring(desc, STAGES: gl.constexpr, GROUPS: gl.constexpr, PLANES: gl.constexpr):
    hi = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, desc.block_shape[2], desc.block_shape[3]], desc.layout)
    lo = hi
    if PLANES == 2:
        lo = gl.allocate_shared_memory(
            desc.dtype, [STAGES, 1, 1, desc.block_shape[2], desc.block_shape[3]], desc.layout
        )
    return Ring(hi, lo, new_barriers(STAGES, 1), new_barriers(STAGES, GROUPS), STAGES)


@gluon.jit
def fill(ring, i, desc, hi_index, lo_index, head, key, PLANES: gl.constexpr):
    """Producer: load the ring's i-th tile, which begins at `key`, once its slot is free.

    desc is [planes or batch, heads, keys, D]; hi_index and lo_index say where along its first dimension.
    """
    slot = i % ring.stages
    mbarrier.wait(ring.free.index(slot), ((i // ring.stages) & 1) ^ 1)
    bar = ring.full.index(slot)
    mbarrier.expect(bar, PLANES * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [hi_index, head, key, 0], bar, ring.hi.index(slot))
    if PLANES == 2:
        tma.async_copy_global_to_shared(desc, [lo_index, head, key, 0], bar, ring.lo.index(slot))


@gluon.jit
def wait_full(ring, i):
    mbarrier.wait(ring.full.index(i % ring.stages), (i // ring.stages) & 1)


@gluon.jit
def release(ring, i):
    mbarrier.arrive(ring.free.index(i % ring.stages), count=1)


@gluon.jit
def tile_of_program(pid, heads, tiles, section):
    """(head, tile) of a program. `section` heads share the chip at a time; within a section the last tile goes first.

    Programs start in order of their index, and with a causal mask the last tile has the most keys: heaviest first
    keeps the SMs' loads even at the end without a scheduler of our own. A section bounds the K and V that live in L2.
    """
    per_section = section * tiles
    first = (pid // per_section) * section
    width = gl.minimum(section, heads - first)
    within = pid % per_section
    return first + within % width, tiles - 1 - within // width


@gluon.jit
def key_end(row, Nk, q_start, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """One past the last key that a row (a scalar or a vector) may see, before `kv_range`."""
    if CAUSAL:
        end = gl.minimum(q_start + row + 1, Nk)
    elif WINDOW:
        end = gl.minimum(q_start + row + window, Nk)
    else:
        end = row * 0 + Nk
    return end


@gluon.jit
def key_begin(row, q_start, window, WINDOW: gl.constexpr):
    """The first key that a row may see, before `kv_range`."""
    if WINDOW:
        begin = gl.maximum(q_start + row - window + 1, 0)
    else:
        begin = row * 0
    return begin


@gluon.jit
def tile_range(row0, row1, kv0, kv1, q_start, window, BN: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """KV tiles of the rows [row0, row1): first and end of those touched, first and end of those that need no mask.

    first ≤ full_first ≤ full_end ≤ end always holds; no key at all gives first == end.
    """
    lo_least = gl.maximum(key_begin(row0, q_start, window, WINDOW), kv0)
    lo_most = gl.maximum(key_begin(row1 - 1, q_start, window, WINDOW), kv0)
    hi_least = gl.maximum(key_end(row0, kv1, q_start, window, CAUSAL, WINDOW), 0)
    hi_most = gl.maximum(key_end(row1 - 1, kv1, q_start, window, CAUSAL, WINDOW), 0)
    first = lo_least // BN
    end = gl.maximum((hi_most + BN - 1) // BN, first)
    if hi_most <= lo_least:
        end = first
    full_first = gl.minimum(gl.maximum((lo_most + BN - 1) // BN, first), end)
    full_end = gl.minimum(gl.maximum(hi_least // BN, full_first), end)
    return first, end, full_first, full_end


@gluon.jit
def plan_work(item, call, BN: gl.constexpr, TILE: gl.constexpr, features):
    """The work of one item (a tile of TILE rows of a head), and where its first mark lies: by the Triton form's order
    of programs, then by query head of the key head, then by warp group.
    """
    bh, tile = tile_of_program(item, call.heads, call.tiles, call.section)
    b = bh // call.H
    head = bh % call.H
    group = call.H // call.Hkv
    kv_head = head // group
    row0 = tile * TILE
    batch = b
    begin_q = gl.to_tensor(0)
    begin_k = gl.to_tensor(0)
    Nq = call.Nq
    Nk = call.Nk
    q_start = call.q_start
    if features.VARLEN:
        batch = begin_q
        begin_q = gl.load(call.starts_q + b)
        begin_k = gl.load(call.starts_k + b)
        Nq = gl.minimum(gl.load(call.starts_q + b + 1) - begin_q, Nq)
        Nk = gl.minimum(gl.load(call.starts_k + b + 1) - begin_k, Nk)
        q_start = Nk - Nq
    kv0 = gl.to_tensor(0)
    kv1 = Nk
    if features.KV_RANGE:
        kv0 = gl.maximum(gl.load(call.kv_range + 2 * b), 0)
        kv1 = gl.minimum(gl.load(call.kv_range + 2 * b + 1), Nk)
    row1 = gl.minimum(row0 + TILE, Nq)
    first, end, _, _ = tile_range(row0, row1, kv0, kv1, q_start, call.window, BN, features.CAUSAL, features.WINDOW)
    if features.VARLEN:  # a tile past the end of its sequence has nothing to do
        first = gl.where(row0 < Nq, first, 0)
        end = gl.where(row0 < Nq, end, 0)
    block = (b * call.Hkv + kv_head) * call.tiles + (call.tiles - 1 - tile if features.CAUSAL else tile)
    mark = (block * group + head % group) * (TILE // ROWS)
    slope = call.softcap
    if features.ALIBI:
        slope = gl.load(call.slopes + head) * LOG2E
    work = Work(b, batch, begin_q, begin_k, head, kv_head, row0, first, end, kv0, kv1, q_start, call.window, Nq,
                call.softcap * LOG2E, slope)  # fmt: skip
    return work, mark


@gluon.jit
def at_head(work, call, out, stride_b, stride_h, stride_n, m_out, s_out, todo, sinks):
    out += work.batch.to(gl.int64) * stride_b + work.head.to(gl.int64) * stride_h
    out += work.begin_q.to(gl.int64) * stride_n
    row = (work.batch * call.H + work.head).to(gl.int64) * call.total + work.begin_q
    return Output(out, m_out + row, s_out + row, todo, stride_n.to(gl.int64), sinks)


@gluon.jit
def row_bounds(rows, work, features):
    """[lo, hi): the keys that each row sees."""
    lo = gl.maximum(key_begin(rows, work.q_start, work.window, features.WINDOW), work.kv0)
    return lo, key_end(rows, work.kv1, work.q_start, work.window, features.CAUSAL, features.WINDOW)


@gluon.jit
def tiles_of_group(mine, work, BN: gl.constexpr, features):
    """`tile_range` of one warp group's rows, clamped to its program's tiles."""
    row1 = gl.minimum(mine + ROWS, work.Nq)
    a, z, fa, fz = tile_range(
        mine, row1, work.kv0, work.kv1, work.q_start, work.window, BN, features.CAUSAL, features.WINDOW
    )
    a = gl.minimum(gl.maximum(a, work.first), work.end)
    z = gl.minimum(gl.maximum(z, a), work.end)
    fa = gl.minimum(gl.maximum(fa, a), z)
    return a, z, fa, gl.minimum(gl.maximum(fz, fa), z)


@gluon.jit
def initial_sums(output, work, R: gl.constexpr, features):
    """(m in log2 units, l) of no key at all, or of the head's sink, whose weight is 1."""
    l = gl.zeros([ROWS], gl.float32, R)
    m = gl.full([ROWS], NEG_INF, gl.float32, R)
    if features.SINKS:
        m = l + gl.load(output.sinks + work.head).to(gl.float32) * LOG2E
        l = gl.where(m == NEG_INF, 0.0, l + 1.0)
    return m, l


@gluon.jit
def tanh(x):
    """tanh in float32 to 2e-7 relative: a polynomial near 0, where 1 − 2/(e^2x + 1) cancels."""
    z = x * x
    p = 0.0021429616 * z - 0.0081773978
    p = p * z + 0.0217007026
    p = p * z - 0.0539467633
    p = p * z + 0.1333320588
    p = p * z - 0.3333333135
    size = gl.maximum(x, -x)
    far = 1.0 - 2.0 / (gl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return gl.where(size < 0.625, x + x * z * p, gl.where(x < 0.0, -far, far))


@gluon.jit
def fold(s, m, l, factor, lift, t, lo, hi, positions, work, BN: gl.constexpr, MASK: gl.constexpr, features):
    """Fold the products s = q·k of tile t into (m, l); returns them with P and the factor that old sums take.

    factor, one per row, turns s into logits in log2 units. P ≤ 1, or P·2^lift: raised in the exponential's argument,
    which saves a multiplication an element; what that argument loses in its last bits grows with lift.
    """
    S: gl.constexpr = s.type.layout
    keys = gl.expand_dims(t * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, S)), 0)
    if features.SOFTCAP or features.ALIBI:
        s = s * gl.expand_dims(factor, 1)
        if features.SOFTCAP:
            s = work.softcap * tanh(s / work.softcap)
        if features.ALIBI:
            s = s + work.slope * (keys - gl.expand_dims(positions, 1)).to(gl.float32)
        factor = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, S))
    if MASK:
        s = gl.where((keys >= gl.expand_dims(lo, 1)) & (keys < gl.expand_dims(hi, 1)), s, NEG_INF)
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor)
        # A row that has seen no key yet: any finite stand-in gives exp2(-inf) = 0 instead of NaN.
        anchor = gl.where(m_new == NEG_INF, 0.0, m_new)
    else:
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor)
        anchor = m_new
    decay = gl.exp2(m - anchor)
    if lift is None:
        p = gl.exp2(s * gl.expand_dims(factor, 1) - gl.expand_dims(anchor, 1))
        l = gl.fma(l, decay, gl.sum(p, axis=1))
    else:
        p = gl.exp2(s * gl.expand_dims(factor, 1) - gl.expand_dims(anchor - lift.to(gl.float32), 1))
        l = gl.fma(l, decay, gl.sum(p, axis=1) * power_of_two(-lift))
    return m_new, l, p, decay


@gluon.jit
def power_of_two(e):
    """2^e as float32 for −127 < e ≤ 127; 0 below."""
    return (gl.maximum(e + 127, 0) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def state_correction(m):
    """The running max from log2 to natural units, and the factor that sums taken against the former need.

    m·ln2 rounds; a state is merged by exp(m), so that rounding would weigh whole states by up to |m|·2^-24. The factor
    2^(m − m_natural·log2e) puts it back, with log2e in two parts.
    """
    empty = m == NEG_INF
    m_natural = m * LN2
    safe = gl.where(empty, 0.0, m_natural)
    rest = gl.fma(safe, gl.full_like(safe, -1.4426950216293335), gl.where(empty, 0.0, m))
    rest = gl.fma(safe, gl.full_like(safe, -1.9259629911266175e-8), rest)
    return m_natural, gl.exp2(rest)


@gluon.jit
def own_rows(output, mine, Nq, D: gl.constexpr, O: gl.constexpr, features):
    """Pointers to a warp group's rows of the output in the accumulator's layout, and which of them exist."""
    rows = mine + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, O))
    exist = gl.expand_dims(rows < Nq, 1)
    if D != features.WIDTH:
        exist = exist & gl.expand_dims(channels < features.WIDTH, 0)
    offsets = gl.expand_dims(rows.to(gl.int64) * output.stride, 1) + gl.expand_dims(channels, 0)
    return output.out + offsets, exist


@gluon.jit
def write_rows(output, mine, Nq, m, l, acc, unit, undo, GROUP: gl.constexpr, O: gl.constexpr, features):
    """Write a warp group's rows: acc / l, or the state. acc carries 1 / (unit·undo), two powers of two.

    The group's mark says whether a row's sums are not finite: then the careful second pass does them again.
    """
    broken = gl.max(((l - l) != 0.0).to(gl.int32), axis=0)
    broken = gl.maximum(broken, gl.max(gl.max(((acc - acc) != 0.0).to(gl.int32), axis=1), axis=0))
    gl.store(output.todo + GROUP, broken)
    D: gl.constexpr = acc.shape[1]
    if features.STATE:
        rows = mine + gl.arange(0, ROWS, layout=l.type.layout)
        m_natural, per_row = state_correction(m)
        gl.store(output.m + rows, m_natural, mask=rows < Nq)
        gl.store(output.s + rows, l * per_row, mask=rows < Nq)
    else:
        per_row = gl.where(l == 0.0, 0.0, 1.0 / l)
    per_row = gl.expand_dims(gl.convert_layout(per_row * unit, gl.SliceLayout(1, O)), 1)
    pointers, exist = own_rows(output, mine, Nq, D, O, features)
    gl.store(pointers, (acc * per_row * undo).to(output.out.dtype.element_ty), mask=exist)
