"""Tiled attention in torch operations: matrix products of a tile, and the monoid's merge from KV tile to KV tile.

Tiles lie at fixed positions (multiples of the tile length, counted from key 0), so a row's result does not depend on
the batch it came in. Key heads are never expanded: a group's query heads become rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import NEG_INF, State

TILE_ROWS = 256  # query rows of a tile, the heads of a group together
TILE_KEYS = 512
# Logits held at once, in elements: few enough that the passes over them stay in a core's cache.
TILE_ELEMENTS = 512 * 1024
# With this few rows the product is bound by reading KV: longer tiles, fewer Python steps.
DECODE_ROWS = 16
DECODE_KEYS = 8192


@dataclass(frozen=True, slots=True)
class Tile:
    """One block of queries [i0, i1) of some key heads of one batch element, and the masks that apply to it."""

    batch: int
    heads: slice  # of the key heads
    i0: int
    i1: int


def attend(problem: Problem, operands: Operands, *, careful: bool = False) -> State:
    """The state of every row without sinks, in float32 (float64 for float64 inputs).

    0·∞ and 0·NaN in a tile's product carry a masked key's value into rows that do not see it; `careful` leaves such
    keys out, for several times the price.
    """
    dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    B, H, Nq, D = problem.B, problem.H, problem.Nq, problem.D
    m = torch.empty((B, H, Nq), dtype=dtype)
    S, W = torch.empty_like(m), torch.empty((B, H, Nq, D), dtype=dtype)
    group = H // problem.Hkv
    ranges = _key_ranges(problem, operands.kv_range)
    for tile in _tiles(problem):
        part = _attend_tile(problem, operands, tile, ranges[tile.batch], dtype, careful)
        heads = slice(tile.heads.start * group, tile.heads.stop * group)
        where = (tile.batch, heads, slice(tile.i0, tile.i1))
        m[where], S[where], W[where] = part.m, part.S, part.W
    return State(m, S, W)


def _key_ranges(problem: Problem, kv_range: torch.Tensor | None) -> list[tuple[int, int]]:
    if kv_range is None:
        return [(0, problem.Nk)] * problem.B
    return [(max(0, first), min(problem.Nk, end)) for first, end in kv_range.tolist()]


def _tiles(problem: Problem) -> Iterator[Tile]:
    group = problem.H // problem.Hkv
    rows = max(1, min(problem.Nq, TILE_ROWS // group))
    keys = min(problem.Nk, tile_keys(rows * group))
    heads = max(1, min(problem.Hkv, TILE_ELEMENTS // (rows * group * keys)))
    for b in range(problem.B):
        for h in range(0, problem.Hkv, heads):
            for i in range(0, problem.Nq, rows):
                yield Tile(b, slice(h, min(h + heads, problem.Hkv)), i, min(i + rows, problem.Nq))


def tile_keys(rows: int) -> int:
    return DECODE_KEYS if rows <= DECODE_ROWS else TILE_KEYS


def _attend_tile(
    problem: Problem, operands: Operands, tile: Tile, key_range: tuple[int, int], dtype: torch.dtype, careful: bool
) -> State:
    """Walk the KV tiles that some query of `tile` sees, merging one after the other."""
    group, D = problem.H // problem.Hkv, problem.D
    n_heads, n_rows = tile.heads.stop - tile.heads.start, tile.i1 - tile.i0
    q = operands.q[tile.batch].unflatten(0, (problem.Hkv, group))[tile.heads, :, tile.i0 : tile.i1]
    q = q.reshape(n_heads, group * n_rows, D).to(dtype)
    m = torch.full((n_heads, group * n_rows, 1), NEG_INF, dtype=dtype)
    S = torch.zeros_like(m)
    W = torch.zeros((n_heads, group * n_rows, D), dtype=dtype)
    first, end = _reach(problem, tile, key_range)
    step = tile_keys(group * n_rows)
    for j0 in range(first - first % step, end, step):
        j0, j1 = max(j0, first), min(j0 + step, end)
        k = operands.k[tile.batch, tile.heads, j0:j1].to(dtype)
        v = operands.v[tile.batch, tile.heads, j0:j1].to(dtype)
        logits = torch.baddbmm(W.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=problem.scale)
        logits = _modify(problem, operands, tile, logits.unflatten(1, (group, n_rows)), j0, j1).flatten(1, 2)
        m_new = torch.maximum(m, logits.amax(-1, keepdim=True))
        if careful:
            part = State.from_logits(logits, v)
            merged = State(m[..., 0], S[..., 0], W).merge(part)
            m, S, W = merged.m.unsqueeze(-1), merged.S.unsqueeze(-1), merged.W
            continue
        anchor = torch.where(m_new == NEG_INF, 0.0, m_new)
        p = logits.sub_(anchor).exp_()
        decay = torch.where(m == NEG_INF, 0.0, torch.exp(m - anchor))
        S = S.mul_(decay).add_(p.sum(-1, keepdim=True))
        W = W.mul_(decay).baddbmm_(p, v)
        m = m_new
    shape = (n_heads * group, n_rows)
    return State(m.view(shape), S.view(shape), W.view(*shape, D))


def _reach(problem: Problem, tile: Tile, key_range: tuple[int, int]) -> tuple[int, int]:
    """The half-open range of keys that any query of the tile sees; empty ranges are (0, 0)."""
    first, end = key_range
    lowest, highest = problem.q_start + tile.i0, problem.q_start + tile.i1 - 1
    if problem.causal:
        end = min(end, highest + 1)
    if problem.window is not None:
        first = max(first, lowest - problem.window + 1)
        end = min(end, highest + problem.window)
    return (first, end) if first < end else (0, 0)


def _modify(problem: Problem, operands: Operands, tile: Tile, logits: torch.Tensor, j0: int, j1: int) -> torch.Tensor:
    """Apply softcap, ALiBi, bias and masks to logits [heads, group, rows, keys j0…j1], in place where possible."""
    dtype = logits.dtype
    group = logits.shape[1]
    if problem.softcap is not None:
        logits = logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
    positions = torch.arange(problem.q_start + tile.i0, problem.q_start + tile.i1)
    keys = torch.arange(j0, j1)
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.to(dtype).unflatten(0, (-1, group))[tile.heads]
        logits += slopes[..., None, None] * (keys - positions.unsqueeze(-1)).to(dtype)
    if operands.bias is not None:
        logits += _bias_tile(operands.bias, tile, group, j0, j1).to(dtype)
    inside = True
    if problem.causal:
        inside = j1 - 1 <= problem.q_start + tile.i0
    if problem.window is not None:
        reach = max(problem.q_start + tile.i1 - 1 - j0, j1 - 1 - problem.q_start - tile.i0)
        inside = inside and reach < problem.window
    if not inside:
        distance = positions.unsqueeze(-1) - keys
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if problem.causal:
            hidden |= distance < 0
        if problem.window is not None:
            hidden |= distance.abs() >= problem.window
        logits = logits.masked_fill_(hidden, NEG_INF)
    return logits


def _bias_tile(bias: torch.Tensor, tile: Tile, group: int, j0: int, j1: int) -> torch.Tensor:
    """The part of bias [B|1, H|1, Nq|1, Nk] for a tile, shaped to broadcast over [heads, group, rows, keys]."""
    part = bias[tile.batch if bias.shape[0] > 1 else 0, :, :, j0:j1]
    if bias.shape[2] > 1:
        part = part[:, tile.i0 : tile.i1]
    if bias.shape[1] == 1:
        return part.unsqueeze(0)
    return part.unflatten(0, (-1, group))[tile.heads]
