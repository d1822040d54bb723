"""Implementations of paged attention as data, chosen like those of dense attention (`elsa_kernels.registry`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from elsa_kernels.paged.problem import PagedOperands, PagedProblem
from elsa_kernels.registry import FallbackWarning, UnsupportedProblem, add, by_priority, named


@dataclass(frozen=True, slots=True)
class PagedImplementation:
    """`run` writes `operands.out` (and `operands.lse`). home: device types where a refusal is worth announcing."""

    name: str
    priority: int
    supports: Callable[[PagedProblem], str | None]
    run: Callable[[PagedProblem, PagedOperands], None]
    home: tuple[str, ...] = ()


_implementations: dict[str, PagedImplementation] = {}
_announced: set[tuple[str, str]] = set()


def register(implementation: PagedImplementation) -> PagedImplementation:
    return add(_implementations, implementation, "paged attention")


def implementations() -> tuple[PagedImplementation, ...]:
    """All entries, preferred first."""
    return by_priority(_implementations.values())


def explain(problem: PagedProblem) -> dict[str, str | None]:
    """For every entry, the reason why it refuses the problem, or None where it takes it."""
    return {entry.name: entry.supports(problem) for entry in implementations()}


def select(problem: PagedProblem, impl: str | None = None) -> PagedImplementation:
    """The implementation that runs `problem`: `impl` if named (strictly), else the preferred one that takes it."""
    if impl is not None:
        return named(_implementations, impl, problem, "paged")
    refusals: list[str] = []
    for entry in implementations():
        if entry.priority < 0:
            continue
        reason = entry.supports(problem)
        if reason is None:
            return entry
        refusals.append(f"{entry.name}: {reason}")
        if problem.device.type in entry.home and (entry.name, reason) not in _announced:
            _announced.add((entry.name, reason))
            warnings.warn(
                f"elsa_kernels: paged {entry.name} refused ({reason}); another form runs instead",
                FallbackWarning,
                stacklevel=4,
            )
    raise UnsupportedProblem(f"no paged implementation takes this problem ({'; '.join(refusals)})")
