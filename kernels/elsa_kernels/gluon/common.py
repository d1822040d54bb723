"""What both Hopper kernels share: which tile a program works on, which keys its rows see, the TMA loads and the output.

Positions: query row i sits at key position `q_start + i` and sees the half-open range [lo_i, hi_i) of keys, both
monotone in i. Every mask of this package's contract that depends on positions alone (causal, window, `kv_range`, the
tail of K) is such a range, so one pair of bounds per row replaces a mask per feature.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
NEG_INF = gl.constexpr(float("-inf"))
ROWS = gl.constexpr(64)  # query rows of one consumer warp group: the M of one wgmma
LN2 = gl.constexpr(0.6931471805599453)
# Lengths change from call to call: none of them may become part of a compiled variant.
LENGTHS = ["H", "Hkv", "heads", "tiles", "section", "Nq", "Nk", "q_start", "window"]


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
    hi_least = gl.maximum(gl.minimum(key_end(row0, kv1, q_start, window, CAUSAL, WINDOW), kv1), 0)
    hi_most = gl.maximum(gl.minimum(key_end(row1 - 1, kv1, q_start, window, CAUSAL, WINDOW), kv1), 0)
    first = lo_least // BN
    end = gl.maximum((hi_most + BN - 1) // BN, first)
    if hi_most <= lo_least:
        end = first
    full_first = gl.minimum(gl.maximum((lo_most + BN - 1) // BN, first), end)
    full_end = gl.minimum(gl.maximum(hi_least // BN, full_first), end)
    return first, end, full_first, full_end


@gluon.jit
def state_correction(m):
    """The running max from log2 to natural units, and the factor that sums taken against the former need.

    m·ln2 rounds; a state is merged by exp(m), so that rounding would weigh whole states by up to |m|·2^-24. The factor
    2^(m − m_natural·log2e) puts it back, with log2e in two parts.
    """
    empty = m == float("-inf")
    m_natural = m * LN2
    safe = gl.where(empty, 0.0, m_natural)
    rest = gl.fma(safe, gl.full_like(safe, -1.4426950216293335), gl.where(empty, 0.0, m))
    rest = gl.fma(safe, gl.full_like(safe, -1.9259629911266175e-8), rest)
    return m_natural, gl.exp2(rest)


@gluon.jit
def inverse_power(x):
    """1 / x, exactly, for x = 2^e with −126 ≤ e ≤ 126."""
    return ((254 << 23) - x.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.jit
def report_broken(todo, l, acc):
    """Mark the program's tile for the careful second pass if any of its sums is not finite."""
    worst = gl.max(((l - l) != 0.0).to(gl.int32), axis=0)
    worst = gl.maximum(worst, gl.max(gl.max(((acc - acc) != 0.0).to(gl.int32), axis=1), axis=0))
    gl.store(todo, 1, mask=worst != 0)
