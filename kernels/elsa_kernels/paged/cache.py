"""Writing keys and values into the pages of a cache."""

from __future__ import annotations

import torch

from elsa_kernels.paged import kernels
from elsa_kernels.paged.problem import FP8, check_caches, check_scale

FP8_MAX = 448.0


def reshape_and_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
) -> None:
    """Write k, v [T, Hkv, D] to slots of caches [blocks, block_size, Hkv, D], in place.

    slot_mapping [N ≤ T] int64: row i goes to page slot // block_size, place slot % block_size; a negative slot is
    skipped, as are rows beyond N (padding). Slots must differ. Caches have k's dtype or float8_e4m3fn; into those k is
    written as round(k / k_scale), saturated at ±448, k_scale being one float32 number or one for each key head.
    Raises ValueError or TypeError.
    """
    if k.dim() != 3 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k {k.dtype} {list(k.shape)} and v {v.dtype} {list(v.shape)} must be alike: [T, Hkv, D]")
    check_caches(k_cache, v_cache, k, k.shape[1], "k")
    if k.shape[1] != k_cache.shape[2]:
        raise ValueError(f"k has {k.shape[1]} heads and the caches {k_cache.shape[2]}")
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1 or slot_mapping.shape[0] > k.shape[0]:
        raise TypeError(
            f"slot_mapping is {slot_mapping.dtype} {list(slot_mapping.shape)}; it must be int64, at most [{k.shape[0]}]"
        )
    scales = [check_scale(n, s, k_cache, k.device) for n, s in (("k_scale", k_scale), ("v_scale", v_scale))]
    _cache_op(k, v, k_cache, v_cache, slot_mapping, *scales)


@torch.library.custom_op("elsa::reshape_and_cache", mutates_args=("k_cache", "v_cache"))
def _cache_op(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    if slot_mapping.shape[0] == 0:
        return
    if k.device.type == "cuda" or kernels.interpreted(k):
        kernels.write_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    write_indexed(k, k_cache, slot_mapping, k_scale)
    write_indexed(v, v_cache, slot_mapping, v_scale)


@_cache_op.register_fake
def _(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
    return None


def write_indexed(x: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
    """The form in torch operations, for CPU tensors."""
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots, rows = slot_mapping[kept], x[: slot_mapping.shape[0]][kept]
    page = cache.shape[1]
    if cache.dtype == FP8:
        wide = rows.float()
        if scale is not None:
            wide = wide / scale.view(1, -1, 1)
        rows = wide.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache[slots // page, slots % page] = rows
