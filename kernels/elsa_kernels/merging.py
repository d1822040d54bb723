"""The output over several sets of keys whose states lie on one device, in one kernel where there is one.

Some states may lie in page-locked host memory that the device addresses: the kernel reads them through PCIe, once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from elsa_kernels import triton as triton_form
from elsa_kernels.state import State


def merged_output(states: Sequence[State], dtype: torch.dtype) -> torch.Tensor:
    """The states merged in their order, then `finalize(dtype)`: [B, H, Nq, D], contiguous. At least one state, all of
    one shape."""
    float32 = all(x.dtype == torch.float32 for state in states for x in (state.m, state.S, state.W))
    if not float32 or not triton_form.runs_on(states[0].m.device):
        return functools.reduce(State.merge, states).finalize(dtype).contiguous()
    from elsa_kernels.triton.launch import joined_output

    return joined_output(states, dtype)
