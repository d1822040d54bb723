"""The implementation "cpu_native": C++ for few queries over a long KV, at the host's read bandwidth.

K and V are read once for all query heads of a group, converted in registers, in chunks of fixed length over all cores,
and the chunks' states are merged in a fixed tree: a row's bits do not depend on threads, batch or neighbouring rows.
The library is built with the system's C++ compiler when it is first needed.
"""

from __future__ import annotations

import functools

import torch

from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State

MAX_HEAD_DIM = 256
# Where it is chosen unasked: beyond these rows of a group the tiled form's matrix products are ahead, and below this
# many keys nothing is gained that is worth a first-use build.
FEW_ROWS = 32
LONG_KV = 512


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, not on {problem.device.type}"
    if problem.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    if problem.precision == "tf32":
        return "TF32 is a tensor-core format; on a CPU use precision fp32 or ieee"
    if problem.D % 8 or problem.D > MAX_HEAD_DIM:
        return f"head dimensions are multiples of 8 up to {MAX_HEAD_DIM}, not {problem.D}"
    if problem.has_bias:
        return "it takes no additive bias"
    return unavailable()


def preferred(problem: Problem) -> bool:
    """Whether automatic choice considers it: decode, speculation and short chunks over a long KV on a CPU."""
    rows = problem.Nq * (problem.H // problem.Hkv)
    return (
        problem.device.type == "cpu" and problem.dtype != torch.float64 and rows <= FEW_ROWS and problem.Nk >= LONG_KV
    )


@functools.cache
def unavailable() -> str | None:
    """Why the library is not to be had here, or None. Builds it if need be."""
    from elsa_kernels.cpu.native import build, library

    try:
        library.library()
    except build.BuildFailed as error:
        return str(error)
    return None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.cpu.native.library import default_pool

    state = default_pool().attend(problem, operands)
    return state if problem.return_state else state.finalize(problem.dtype)


implementation = register(
    Implementation(name="cpu_native", priority=20, supports=supports, run=run, home=("cpu",), preferred=preferred)
)
