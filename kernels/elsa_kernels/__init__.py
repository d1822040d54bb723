"""Exact attention kernels on the monoid (m, S, W). Imports with torch and triton alone."""

from elsa_kernels import reference
from elsa_kernels.api import attention, attention_varlen
from elsa_kernels.registry import (
    FallbackWarning,
    Implementation,
    Operands,
    Problem,
    UnsupportedProblem,
    explain,
    implementations,
    register,
    select,
)
from elsa_kernels.state import State, merge, tree_merge

# Each of these registers its implementation when imported, and none of them imports a compiler before it runs.
from elsa_kernels import cpu, cuda, gluon, triton  # isort: skip
from elsa_kernels import merging, paged  # isort: skip
from elsa_kernels.merging import merged_output  # isort: skip
from elsa_kernels.paged import attention_paged, reshape_and_cache  # isort: skip

__all__ = [
    "FallbackWarning",
    "Implementation",
    "Operands",
    "Problem",
    "State",
    "UnsupportedProblem",
    "attention",
    "attention_paged",
    "attention_varlen",
    "cpu",
    "cuda",
    "explain",
    "gluon",
    "implementations",
    "merge",
    "merged_output",
    "merging",
    "paged",
    "reference",
    "register",
    "reshape_and_cache",
    "select",
    "tree_merge",
    "triton",
]
