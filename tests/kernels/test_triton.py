"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1.

`test_triton_interpreter.py` runs this file in a process of its own, since the switch is read when Triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.cases import CASES, Case, check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
pytestmark = (
    # NumPy's own warnings about the arithmetic it was asked to interpret
    [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
    if INTERPRETED
    else [pytest.mark.gpu]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32(case: Case) -> None:
    check(case, "triton", DEVICE, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.fp32_only], ids=lambda case: case.name)
def test_half(case: Case, dtype: torch.dtype) -> None:
    check(case, "triton", DEVICE, dtype)
