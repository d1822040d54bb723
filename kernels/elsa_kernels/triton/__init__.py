"""The implementation "triton": one portable kernel for CUDA and ROCm GPUs, and for Triton's interpreter on CPU tensors.

Importing this package imports neither Triton nor a compiler; the first call does.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State

MAX_HEAD_DIM = 256


@functools.cache
def _available() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def supports(problem: Problem) -> str | None:
    return refuse(problem.device, problem.dtype, problem.D, problem.precision)


def refuse(device: torch.device, dtype: torch.dtype, head_dim: int, precision: str) -> str | None:
    """Why a Triton kernel of attention, dense or paged, does not take such operands on the device, or None."""
    if not _available():
        return "Triton is not installed"
    if not runs_on(device):
        return f"it runs on CUDA and ROCm devices, not on {device.type} (unless TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "float64 is for CPU tensors"
    if head_dim > MAX_HEAD_DIM:
        return f"head dimension {head_dim} is larger than {MAX_HEAD_DIM}"
    return refuse_device(device, dtype, precision)


def runs_on(device: torch.device) -> bool:
    """Whether Triton compiles for the device, or its interpreter stands in."""
    return _available() and (device.type == "cuda" or (device.type == "cpu" and _interpreting()))


def refuse_device(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """Why Triton's products of that dtype and precision are not to be had on the device, or None."""
    if device.type == "cpu":
        # create_dot of the interpreter multiplies the bits of bfloat16 numbers as integers (Triton 3.6).
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if torch.version.hip:
        return None
    index = device.index
    capability = _capability(torch.cuda.current_device() if index is None else index)
    if capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is older than 7.5"
    if capability < (8, 0) and (dtype == torch.bfloat16 or precision == "tf32"):
        return f"compute capability {capability[0]}.{capability[1]} has neither bfloat16 nor TF32"
    return None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.triton import launch

    return launch.run(problem, operands)


implementation = register(
    Implementation(name="triton", priority=20, supports=supports, run=run, home=("cuda",), packs=True)
)
