"""The device's memory budget, enforced and reported, and the arithmetic it may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.units import format_size


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. Zeros on a machine without a GPU, where the budget is not enforced."""

    budget: int  # what torch's allocator may reserve
    peak_allocated: int
    peak_reserved: int
    device_used: int  # everything in use on the device now, the driver's context and other processes included


def require_exact_matmul() -> None:
    """FP32 matrix products in FP32: no TF32, no reduced passes."""
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        raise RuntimeError("TF32 is still allowed for float32 matrix products; the engine needs it off")


def indexed(device: torch.device) -> torch.device:
    """The device with its index, which torch's memory limits want: "cuda" is the current CUDA device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def limit_memory(device: torch.device, nbytes: int) -> None:
    """Make torch's allocator refuse to reserve more than `nbytes` on a CUDA device."""
    if device.type != "cuda":
        return
    _, total = torch.cuda.mem_get_info(device)
    if nbytes > total:
        raise BudgetError(f"the device has {format_size(total)}, less than the {format_size(nbytes)} asked for")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(nbytes / total, indexed(device))
    torch.cuda.reset_peak_memory_stats(device)


def unlimit_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, indexed(device))


def device_memory(device: torch.device, budget: int) -> DeviceMemory:
    if device.type != "cuda":
        return DeviceMemory(0, 0, 0, 0)
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return DeviceMemory(budget, allocated, reserved, total - free)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)


def device_works(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access CUDA fails every later call."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
