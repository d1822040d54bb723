"""Attention over a paged KV cache: one call for prefill, chunked prefill, decode and verification in one batch.

Implementations: "triton" (kernels that read the pages), "gather" (pages copied to contiguous K and V, then dense
attention), "reference" (float64). The first that takes a problem runs.
"""

from __future__ import annotations

from elsa_kernels.paged import gather  # registers "gather" and "reference"
from elsa_kernels.paged.api import attention_paged
from elsa_kernels.paged.cache import reshape_and_cache
from elsa_kernels.paged.problem import PagedOperands, PagedProblem
from elsa_kernels.paged.registry import PagedImplementation, explain, implementations, register, select

__all__ = [
    "PagedImplementation",
    "PagedOperands",
    "PagedProblem",
    "attention_paged",
    "explain",
    "gather",
    "implementations",
    "register",
    "reshape_and_cache",
    "select",
]
