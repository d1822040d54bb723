"""The implementation "triton": kernels that read the pages, for CUDA and ROCm GPUs and Triton's interpreter."""

from __future__ import annotations

import torch

from elsa_kernels import triton as dense
from elsa_kernels.paged.problem import PagedOperands, PagedProblem
from elsa_kernels.paged.registry import PagedImplementation, register


def supports(problem: PagedProblem) -> str | None:
    return dense.refuse(problem.device, problem.dtype, problem.D, problem.precision)


def run(problem: PagedProblem, operands: PagedOperands) -> None:
    from elsa_kernels.paged import launch

    launch.run(problem, operands)


def interpreted(x: torch.Tensor) -> bool:
    """Whether x lies on a CPU and the kernels run there too, in Triton's interpreter."""
    return x.device.type == "cpu" and dense._interpreting() and x.dtype != torch.float64


def write_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """The cache write as a kernel."""
    from elsa_kernels.paged import launch

    if k.device.type == "cuda":
        with torch.cuda.device(k.device):
            launch.write_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    else:
        launch.write_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def decode_counters(B: int, Hkv: int, max_seqlen_k: int, device: torch.device | str) -> torch.Tensor:
    """Zeros for `attention_paged(counters=…)`: up to B sequences, Hkv key heads, up to max_seqlen_k keys.

    Every call leaves them zero. Calls that may run at the same time need counters of their own.
    """
    from elsa_kernels.paged.launch import counters_needed

    return torch.zeros(counters_needed(B, Hkv, max_seqlen_k), dtype=torch.int32, device=device)


implementation = register(PagedImplementation(name="triton", priority=20, supports=supports, run=run, home=("cuda",)))
