"""Facts about CUDA and ROCm devices that launchers ask for in every call, each looked up once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def architecture(index: int) -> str:
    """Of a CUDA or ROCm device: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory a block may ask for."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
