"""The CPU implementation against the float64 reference, and which of its roads a problem takes."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import CASES, Case, check

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    if case.fp32_only and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    check(case, "cpu", "cpu", dtype)
