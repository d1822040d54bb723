"""The monoid of exact attention: a query's attention over any set of keys is a triple (m, S, W).

`merge` is associative, `State.identity` is its neutral element, and the output is W / S. Tiles, splits of one GPU, GPU
and host memory, ranks and cached prefixes are all merged by this one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Attention of some queries over some set of keys.

    m [B, H, Nq]: running max of the logits s, natural units; S [B, H, Nq]: Σ exp(s − m); W [B, H, Nq, D]:
    Σ exp(s − m)·v. float32, or float64 in tests; any leading shape will do as long as the three agree. A row without
    visible keys is the identity (−∞, 0, 0): output 0, logsumexp −∞. A NaN logit makes its row NaN.
    """

    m: torch.Tensor
    S: torch.Tensor
    W: torch.Tensor

    @classmethod
    def identity(
        cls,
        shape: Sequence[int],
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> State:
        """The state over no key at all; `shape` is that of m, usually (B, H, Nq)."""
        shape = tuple(shape)
        return cls(
            torch.full(shape, NEG_INF, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros((*shape, head_dim), dtype=dtype, device=device),
        )

    @classmethod
    def from_logits(cls, logits: torch.Tensor, values: torch.Tensor) -> State:
        """The state of logits [..., Nq, Nk] (−∞ masks, natural units) over values [..., Nk, D], in their dtype.

        A masked key contributes nothing, even where its value is infinite or NaN.
        """
        if logits.shape[-1] == 0:
            shape = torch.broadcast_shapes(logits.shape[:-2], values.shape[:-2])
            return cls.identity((*shape, logits.shape[-2]), values.shape[-1], dtype=logits.dtype, device=logits.device)
        m = logits.amax(-1)
        p = torch.exp(logits - _anchor(m).unsqueeze(-1))
        W = p @ values
        if not bool(W.isfinite().all()):
            W = _weighted_sum_skipping_masked(logits, p, values)
        return cls(m, p.sum(-1), W)

    @classmethod
    def from_output(cls, out: torch.Tensor, lse: torch.Tensor) -> State:
        """The inverse of (`finalize`, `logsumexp`): out [B, H, Nq, D] and lse [B, H, Nq], natural logarithm.

        Rows with lse = −∞ become the identity, whatever `out` holds there. The state has lse's dtype.
        """
        empty = lse == NEG_INF
        W = torch.where(empty.unsqueeze(-1), 0.0, out.to(lse.dtype))
        return cls(lse, torch.where(empty, 0.0, torch.ones_like(lse)), W)

    @classmethod
    def from_sinks(
        cls, sinks: torch.Tensor, shape: Sequence[int], head_dim: int, *, dtype: torch.dtype = torch.float32
    ) -> State:
        """The state (sink, 1, 0) of attention sinks [H], broadcast to `shape` = (..., H, Nq). A sink of −∞ is none."""
        shape = tuple(shape)
        m = sinks.to(dtype).unsqueeze(-1).expand(shape).contiguous()
        S = torch.where(m == NEG_INF, 0.0, torch.ones_like(m))
        return cls(m, S, torch.zeros((*shape, head_dim), dtype=dtype, device=sinks.device))

    def merge(self, other: State) -> State:
        """The state over the union of two disjoint sets of keys. Identity in, the other side out, bit for bit."""
        m = torch.maximum(self.m, other.m)  # propagates NaN
        a, b = _rescale(self.m, m), _rescale(other.m, m)
        return State(m, self.S * a + other.S * b, self.W * a.unsqueeze(-1) + other.W * b.unsqueeze(-1))

    def finalize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The attention output W / S [B, H, Nq, D] in `dtype` (default: the state's own); zero rows where S is 0."""
        S = self.S.unsqueeze(-1)
        out = torch.where(S == 0, 0.0, self.W / S)
        return out if dtype is None else out.to(dtype)

    def logsumexp(self) -> torch.Tensor:
        """log Σ exp(s) [B, H, Nq], natural logarithm; −∞ for a row without visible keys."""
        return self.m + torch.log(self.S)

    def to(self, target: torch.dtype | torch.device | str) -> State:
        """The same state in another dtype or on another device."""
        return State(self.m.to(target), self.S.to(target), self.W.to(target))


def merge(a: State, b: State) -> State:
    return a.merge(b)


def tree_merge(states: Sequence[State]) -> State:
    """Merge states in the order of their keys, in a fixed binary tree by position.

    Neighbours 2i and 2i+1 merge first, then their parents, so the result depends on the list alone and never on who
    computed which part when, and its error grows like log(len(states)).
    """
    if not states:
        raise ValueError("tree_merge needs at least one state; use State.identity for an empty set of keys")
    level = list(states)
    while len(level) > 1:
        pairs = [level[i].merge(level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _anchor(m: torch.Tensor) -> torch.Tensor:
    """What to subtract from logits before exp: m, or 0 where nothing is visible, since −∞ − (−∞) is NaN."""
    return torch.where(m == NEG_INF, 0.0, m)


def _rescale(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.where(old == NEG_INF, 0.0, torch.exp(old - new))


def _weighted_sum_skipping_masked(logits: torch.Tensor, p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """p @ values, but a key with logit −∞ adds nothing where its value is not finite (0·∞ and 0·NaN are NaN)."""
    visible = (logits != NEG_INF).to(p.dtype)
    W = p @ torch.where(values.isfinite(), values, 0.0)
    for special in (float("inf"), NEG_INF):
        reached = visible @ (values == special).to(p.dtype)
        W = torch.where(reached > 0, W + special, W)
    return torch.where(visible @ values.isnan().to(p.dtype) > 0, float("nan"), W)
