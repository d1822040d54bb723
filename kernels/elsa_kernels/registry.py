"""Attention implementations as data: each entry says what it supports and why not.

Automatic choice walks the entries by priority and falls back, announcing each fallback once per cause. An explicit
choice (`impl="name"`) never falls back: it raises `UnsupportedProblem` with the entry's reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from elsa_kernels.state import State

PRECISIONS = ("ieee", "fp32", "tf32")


class UnsupportedProblem(ValueError):
    """No implementation, or not the one that was asked for, takes this problem; the message says why."""


class FallbackWarning(UserWarning):
    """A preferred implementation for this device refused the problem and another one runs instead."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention call, without its data: what `supports` decides on.

    Query i sits at key position `q_start + i`. With `causal`, it sees keys up to its own position; with `window = w`,
    only keys less than w positions away. Logits are `softcap·tanh(scale·q·k / softcap)` (where softcap is given), then
    `+ slope·(j − i)` (ALiBi), then `+ bias`; keys outside `kv_range` are masked.

    `packed`: B sequences lie one after another in q [1, H, tokens, D], k and v, each bottom-right aligned (`q_start`
    means nothing then); Nq and Nk bound their lengths.
    """

    B: int
    H: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    dtype: torch.dtype
    device: torch.device
    precision: str
    causal: bool
    scale: float
    q_start: int
    window: int | None = None
    softcap: float | None = None
    has_alibi: bool = False
    has_bias: bool = False
    has_sinks: bool = False
    has_kv_range: bool = False
    return_state: bool = False
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of one call.

    q [B, H, Nq, D], k and v [B, Hkv, Nk, D] (any strides with a contiguous last dimension); alibi_slopes [H] float32;
    bias [B|1, H|1, Nq|1, Nk] floating, −∞ masks; sinks [H] float32 logits; kv_range [B, 2] int32, the half-open range
    of keys that exist for each batch element. cu_seqlens_q, cu_seqlens_k [B + 1] int32: where packed sequences begin.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    kv_range: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Implementation:
    """A registered kernel. `run` returns a `State` when `problem.return_state`, else the output in q's dtype."""

    name: str
    priority: int
    supports: Callable[[Problem], str | None]
    run: Callable[[Problem, Operands], torch.Tensor | State]
    # Device types for which a refusal is worth announcing: a CUDA kernel refusing a CPU tensor is not news.
    home: tuple[str, ...] = ()
    # Where given and False, automatic choice passes the entry by without a word; a choice by name still reaches it.
    preferred: Callable[[Problem], bool] | None = None
    packs: bool = False  # takes packed sequences as one problem; else they come to it one by one


# --- what registries of every kind of problem share ---------------------------------------------------------------

P = TypeVar("P", contravariant=True)


class Entry(Protocol[P]):
    """What a registry asks of an implementation of problems of type P."""

    @property
    def name(self) -> str: ...

    @property
    def priority(self) -> int: ...

    @property
    def supports(self) -> Callable[[P], str | None]: ...


E = TypeVar("E", bound=Entry)


def add(entries: dict[str, E], entry: E, kind: str) -> E:
    if entry.name in entries:
        raise ValueError(f"{kind} implementation {entry.name!r} is registered twice")
    entries[entry.name] = entry
    return entry


def by_priority(entries: Iterable[E]) -> tuple[E, ...]:
    return tuple(sorted(entries, key=lambda e: -e.priority))


def named(entries: dict[str, E], impl: str, problem: object, kind: str) -> E:
    """The entry of that name. Raises UnsupportedProblem where there is none, or where it refuses the problem."""
    entry = entries.get(impl)
    if entry is None:
        raise UnsupportedProblem(f"unknown {kind} implementation {impl!r}; known: {', '.join(entries)}")
    reason = entry.supports(problem)
    if reason is not None:
        raise UnsupportedProblem(f"{kind} implementation {impl!r} does not take this problem: {reason}")
    return entry


# --- dense attention ----------------------------------------------------------------------------------------------

_implementations: dict[str, Implementation] = {}
_announced: set[tuple[str, str]] = set()


def register(implementation: Implementation) -> Implementation:
    return add(_implementations, implementation, "attention")


def implementations() -> tuple[Implementation, ...]:
    """All entries, preferred first."""
    return by_priority(_implementations.values())


def explain(problem: Problem) -> dict[str, str | None]:
    """For every entry, the reason why it refuses the problem, or None where it takes it."""
    return {entry.name: entry.supports(problem) for entry in implementations()}


def select(problem: Problem, impl: str | None = None) -> Implementation:
    """The implementation that runs `problem`: `impl` if named (strictly), else the preferred one that takes it."""
    if impl is not None:
        return named(_implementations, impl, problem, "attention")
    refusals: list[tuple[Implementation, str]] = []
    for entry in implementations():
        if entry.preferred is not None and not entry.preferred(problem):
            continue
        reason = entry.supports(problem)
        if reason is None:
            _announce(refusals, entry, problem)
            return entry
        refusals.append((entry, reason))
    causes = "; ".join(f"{e.name}: {reason}" for e, reason in refusals)
    raise UnsupportedProblem(f"no attention implementation takes this problem ({causes})")


def _announce(refusals: list[tuple[Implementation, str]], chosen: Implementation, problem: Problem) -> None:
    for entry, reason in refusals:
        if problem.device.type in entry.home and (entry.name, reason) not in _announced:
            _announced.add((entry.name, reason))
            warnings.warn(
                f"elsa_kernels: {entry.name} refused ({reason}); {chosen.name} runs instead",
                FallbackWarning,
                stacklevel=4,
            )
