"""Attention over a paged KV cache: one call for prefill, chunked prefill, decode and verification in one batch.

Implementations: "triton" (kernels that read the pages), "gather" (pages copied to contiguous K and V, then dense
attention), "reference" (float64). The first that takes a problem runs.
"""

from __future__ import annotations

from elsa_kernels.paged import gather, kernels  # register "gather", "reference" and "triton"
from elsa_kernels.paged.api import attention_paged
from elsa_kernels.paged.cache import reshape_and_cache
from elsa_kernels.paged.kernels import decode_counters
from elsa_kernels.paged.problem import PagedOperands, PagedProblem
from elsa_kernels.paged.registry import PagedImplementation, explain, implementations, register, select

__all__ = [
    "PagedImplementation",
    "PagedOperands",
    "PagedProblem",
    "attention_paged",
    "decode_counters",
    "explain",
    "gather",
    "implementations",
    "kernels",
    "register",
    "reshape_and_cache",
    "select",
]
