"""The implementation "gluon": Hopper's own form (TMA, warp specialisation, wgmma) of FP32-accurate and half attention.

Importing this package imports neither Triton nor a compiler; the first question about a Hopper device does. NOTES.md
tells what was measured on the way.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from elsa_kernels.registry import Implementation, Operands, Problem, register
from elsa_kernels.state import State

MAX_HEAD_DIM = 128  # the accumulators of more would not fit a consumer's registers
# Under this many query rows most of a program's 128 would be padding, and splitting the keys over the SMs pays more.
MIN_QUERIES = 64
GLUON = "3.6."  # Gluon is experimental: its names and signatures change from one Triton to the next
TINY = 256  # queries and keys
MAX_POSITION = 2**29  # positions, and sums of a few of them, stay within int32


@functools.cache
def _missing() -> str | None:
    """Why the compiler is not there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.import_module("triton").__version__
    if not version.startswith(GLUON):
        return f"it is written against Gluon as of Triton {GLUON}x, and this is Triton {version}"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _capability_of(device: torch.device) -> tuple[int, int]:
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def preferred(problem: Problem) -> bool:
    """The problems this form is for: only there is a refusal a fallback, and announced."""
    if problem.device.type != "cuda" or torch.version.hip or _capability_of(problem.device) != (9, 0):
        return False
    if problem.dtype == torch.float32 and problem.D <= 64 and max(problem.Nq, problem.Nk) <= TINY:
        return False  # the Triton form splits K and V within its one launch
    wanted = problem.dtype in (torch.float32, torch.float16, torch.bfloat16) and problem.precision == "fp32"
    return wanted and problem.Nq >= MIN_QUERIES


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cuda" or torch.version.hip:
        return f"it runs on NVIDIA Hopper, not on {'ROCm' if torch.version.hip else problem.device.type}"
    capability = _capability_of(problem.device)
    if capability != (9, 0):
        return f"it runs on compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}"
    if _missing():
        return _missing()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "Gluon has no interpreter (TRITON_INTERPRET=1)"
    return refuse(problem)


def refuse(problem: Problem) -> str | None:
    """What about the problem itself, the device aside, this form does not take."""
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.precision == "ieee":
        return "precision 'ieee' excludes tensor cores"
    if problem.precision == "tf32":
        return "it is FP32-accurate; precision 'tf32' asks for less"
    if problem.D > MAX_HEAD_DIM:
        return f"head dimension {problem.D} is larger than {MAX_HEAD_DIM}: its accumulators would not fit the registers"
    if problem.D % 8 and problem.dtype != torch.float32:
        return f"TMA reads rows of 16-byte multiples, and head dimension {problem.D} is no multiple of 8"
    if problem.scale < 0:
        return "the scale is negative"
    if problem.Nq < MIN_QUERIES:
        return f"{problem.Nq} query rows are fewer than {MIN_QUERIES}"
    if max(problem.Nq, problem.Nk, abs(problem.q_start)) > MAX_POSITION:
        return f"positions reach beyond {MAX_POSITION}"
    return "it does not take a bias, whose tiles have no room beside those of K and V" if problem.has_bias else None


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    from elsa_kernels.gluon import launch

    with torch.cuda.device(problem.device):
        return launch.run(problem, operands)


implementation = register(
    Implementation(
        name="gluon", priority=30, supports=supports, run=run, home=("cuda",), preferred=preferred, packs=True
    )
)
