"""The implementation "cpu": correct on every machine for every feature, and tiled so that matrix products dominate."""

from __future__ import annotations

import torch

from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, not on {problem.device.type}"
    if problem.precision == "tf32":
        return "TF32 is a tensor-core format; on a CPU use precision fp32 or ieee"
    return None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.cpu import tiled

    state = tiled.attend(problem, operands)
    return state if problem.return_state else state.finalize(problem.dtype)


implementation = register(Implementation(name="cpu", priority=10, supports=supports, run=run, home=("cpu",)))
