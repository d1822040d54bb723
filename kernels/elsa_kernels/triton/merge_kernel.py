"""States of several sets of keys become one: those of a row's chunks, and those that lie in several tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from elsa_kernels.triton.forward import LOG2E


@triton.jit
def join_state(m, l, w, M, S, W, place, cols, D: tl.constexpr):
    """(m, l, w) of a row, merged with its state that lies at `place` of M and S, as State.merge has it."""
    m_more, l_more = tl.load(M + place), tl.load(S + place)
    w_more = tl.load(W + place * D + cols, mask=cols < D, other=0.0)
    top = tl.maximum(m, m_more, propagate_nan=tl.PropagateNan.ALL)
    a = tl.where(m == float("-inf"), 0.0, tl.exp(m - top))
    b = tl.where(m_more == float("-inf"), 0.0, tl.exp(m_more - top))
    return top, l * a + l_more * b, w * a + w_more * b


# A part of a state begins anywhere: no variant for each way in which its scalars may be aligned.
@triton.jit(
    do_not_specialize=["Nq", "sh0", "sh1", "sh2", "sh3"],
    do_not_specialize_on_alignment=["M0", "S0", "M1", "S1", "M2", "S2", "M3", "S3"],
)
def join_states_kernel(
    M0, S0, W0, M1, S1, W1, M2, S2, W2, M3, S3, W3, M_OUT, S_OUT, OUT, Nq, sh0, sh1, sh2, sh3,
    COUNT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The output, or the state, of a row over COUNT sets of keys, from its states in their order. One program a row: of
    head h and query n at h·sh + n of M and S, and D times that of W."""
    row = tl.program_id(0).to(tl.int64)
    head, n = row // Nq, row % Nq
    cols = tl.arange(0, BD)
    place = head * sh0 + n
    m, l = tl.load(M0 + place), tl.load(S0 + place)
    w = tl.load(W0 + place * D + cols, mask=cols < D, other=0.0)
    if COUNT > 1:
        m, l, w = join_state(m, l, w, M1, S1, W1, head * sh1 + n, cols, D)
    if COUNT > 2:
        m, l, w = join_state(m, l, w, M2, S2, W2, head * sh2 + n, cols, D)
    if COUNT > 3:
        m, l, w = join_state(m, l, w, M3, S3, W3, head * sh3 + n, cols, D)
    if STATE:
        tl.store(M_OUT + row, m)
        tl.store(S_OUT + row, l)
    else:
        w = tl.where(l == 0.0, 0.0, w / tl.where(l == 0.0, 1.0, l))
    tl.store(OUT + row * D + cols, w.to(OUT.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["chunks", "rows", "Nq", "H"])
def merge_kernel(
    M, S, W, SINKS, M_OUT, S_OUT, OUT, chunks, rows, Nq, H,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, STATE: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the states of a row's chunks, M and S [chunks, rows], W [chunks, rows, D], in a fixed tree by position."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BD)
    m = float("-inf")
    l = 0.0
    acc = tl.zeros([BD], tl.float32)
    if HAS_SINKS:
        m = tl.load(SINKS + (row // Nq) % H).to(tl.float32)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    for c0 in range(0, chunks, BC):
        c = c0 + tl.arange(0, BC)
        o_c = c.to(tl.int64) * rows + row
        m_c = tl.load(M + o_c, mask=c < chunks, other=float("-inf"))
        l_c = tl.load(S + o_c, mask=c < chunks, other=0.0)
        w_c = tl.load(W + o_c[:, None] * D + cols[None, :], mask=(c < chunks)[:, None] & (cols[None, :] < D), other=0.0)
        m_new = tl.maximum(m, tl.max(m_c, 0))
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2((m_c - anchor) * LOG2E)
        decay = tl.exp2((m - anchor) * LOG2E)
        l = l * decay + tl.sum(weight * l_c, 0)
        acc = acc * decay + tl.sum(weight[:, None] * w_c, 0)
        m = m_new
    o_out = row * D + cols
    if STATE:
        tl.store(M_OUT + row, tl.where(l == l, m, float("nan")))
        tl.store(S_OUT + row, l)
        tl.store(OUT + o_out, acc, mask=cols < D)
    else:
        out = acc / tl.where(l == 0.0, 1.0, l)
        tl.store(OUT + o_out, out.to(OUT.dtype.element_ty), mask=cols < D)
