"""The implementation "cuda_ieee": FP32 attention on CUDA cores alone, in CUDA C++ compiled by NVRTC at first use.

For precision "ieee", and for "fp32" on GPUs too old for the tensor-core forms. NOTES.md tells what was measured.
Importing this package imports no compiler; the first call does.
"""

from __future__ import annotations

import functools
import logging

import torch

from elsa_kernels.cuda import tiles
from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State

logger = logging.getLogger(__name__)

MAX_LENGTH = 1 << 29  # sums of two positions stay under 2³¹
TENSOR_CORES_FROM = (7, 5)  # the oldest GPU on which a tensor-core form of "fp32" runs


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cuda" or torch.version.hip:
        return "it runs on CUDA devices"
    if problem.dtype != torch.float32:
        return f"it takes float32 tensors, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.D > tiles.MAX_HEAD_DIM:
        return f"head dimension {problem.D} is larger than {tiles.MAX_HEAD_DIM}"
    if max(problem.Nq, problem.Nk, abs(problem.q_start)) > MAX_LENGTH:
        return f"a sequence is longer than {MAX_LENGTH}"
    index = problem.device.index
    return _refuse_device(torch.cuda.current_device() if index is None else index, problem.precision, problem.D)


def _refuse_device(index: int, precision: str, head_dim: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if precision == "tf32" or (precision == "fp32" and capability >= TENSOR_CORES_FROM):
        return f"it computes at precision 'ieee', without tensor cores, not {precision!r}"
    return _refuse_compiler(*capability) or _refuse_memory(index, head_dim)


@functools.cache
def _refuse_compiler(major: int, minor: int) -> str | None:
    from elsa_kernels.cuda import nvrtc

    reason = nvrtc.refusal(major, minor)
    if reason is not None:
        logger.warning("cuda_ieee is not available: %s", reason)
    return reason


@functools.cache
def _refuse_memory(index: int, head_dim: int) -> str | None:
    from elsa_kernels.cuda import ieee

    limit = ieee.shared_limit(index)
    if tiles.choose(head_dim, limit) is None:
        return f"no tile of head dimension {head_dim} fits {limit} bytes of shared memory"
    return None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.cuda import ieee

    return ieee.run(problem, operands)


implementation = register(Implementation(name="cuda_ieee", priority=25, supports=supports, run=run))
