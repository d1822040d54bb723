"""The paged kernels compile for GPUs that are not here, and keep to what those have."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import aot, paged_aot
from tests.kernels.test_triton_aot import SHARED

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("target", "form", "dtype", "group", "kv", "features"),
    [
        ("sm_75", "lanes", torch.float32, 1, None, paged_aot.PLAIN),
        ("sm_75", "dot16", torch.float16, 16, None, paged_aot.PLAIN),
        ("sm_80", "dot16", torch.bfloat16, 4, None, paged_aot.PLAIN),
        ("sm_80", "lanes", torch.float16, 1, FP8, paged_aot.EVERYTHING),
        ("sm_90", "lanes", torch.float32, 1, None, paged_aot.PLAIN),
        ("sm_90", "dot16", torch.float16, 4, FP8, paged_aot.EVERYTHING),
        ("sm_90", "prefill", torch.float16, 4, None, paged_aot.PLAIN),
        ("gfx942", "dot16", torch.float16, 4, None, paged_aot.EVERYTHING),
        ("gfx942", "dot64", torch.float32, 1, None, paged_aot.PLAIN),
    ],
)
def test_compiles_and_fits(target, form, dtype, group, kv, features) -> None:
    compiled = paged_aot.variant(target, form, paged_aot.problem(dtype, group, 128, kv), features)
    assert compiled.metadata.shared <= SHARED[target]


def test_exact_decode_touches_no_tensor_core_and_reads_16_bytes_at_a_time() -> None:
    compiled = paged_aot.variant("sm_90", "lanes", paged_aot.problem(torch.float32, 1, 128), paged_aot.PLAIN)
    lines = aot.machine_code(compiled).splitlines()
    assert not [line for line in lines if re.search(r"\b[HQI]G?MMA\b", line)]
    assert [line for line in lines if re.search(r"\bLD(G|GSTS)\b.*\.128\b", line)]
    assert aot.resources(compiled)["stack"] <= 32  # a pointer or two that waits for the merge
