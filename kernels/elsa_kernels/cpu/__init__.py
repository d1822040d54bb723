"""The implementation "cpu": correct on every machine for every feature.

Plain problems run on PyTorch's fused kernel (fused.py), the others on tiles of torch operations (tiled.py).
"""

from __future__ import annotations

import torch

from elsa_kernels.cpu import native
from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, not on {problem.device.type}"
    if problem.precision == "tf32":
        return "TF32 is a tensor-core format; on a CPU use precision fp32 or ieee"
    return None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.cpu import fused, tiled

    road = fused if fused.takes(problem) else tiled
    state = road.attend(problem, operands)
    if not bool(state.W.isfinite().all()):
        state = tiled.attend(problem, operands, careful=True)
    if operands.sinks is not None:
        state = state.merge(State.from_sinks(operands.sinks, state.m.shape, problem.D, dtype=state.m.dtype))
    return state if problem.return_state else state.finalize(problem.dtype)


implementation = register(Implementation(name="cpu", priority=10, supports=supports, run=run, home=("cpu",)))

__all__ = ["implementation", "native", "run", "supports"]
