"""A paged call, described and checked: everything that can be known without reading a tensor's contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elsa_kernels import checks

FP8 = torch.float8_e4m3fn
Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PagedProblem:
    """One paged call without its data: what an implementation decides on.

    T query tokens of B sequences, pages of `page` keys. max_seqlen_q and max_seqlen_k bound the lengths. lengths: the
    (queries, keys) of every sequence where the host knows them, else None.
    """

    T: int
    B: int
    H: int
    Hkv: int
    D: int
    page: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    precision: str
    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    max_seqlen_q: int
    max_seqlen_k: int
    has_alibi: bool = False
    has_sinks: bool = False
    lengths: Lengths | None = None

    @property
    def group(self) -> int:
        return self.H // self.Hkv


@dataclass(frozen=True, slots=True)
class PagedOperands:
    """The tensors of one paged call; `out` [T, H, D] and `lse` [T, H] float32 (or None) are written.

    k_scale and v_scale [1] or [Hkv] float32 multiply an FP8 cache. counters: int32 zeros, left as zeros; see
    `elsa_kernels.paged.decode_counters`.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    counters: torch.Tensor | None = None


def check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, like: torch.Tensor, heads: int, name: str) -> None:
    """Caches [blocks, page, Hkv, D] in the dtype of `like` (called `name` in errors) or in FP8."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} must have one shape "
            "[blocks, block_size, Hkv, D]"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (like.dtype, FP8):
        raise TypeError(
            f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype} and {name} {like.dtype}; "
            f"caches must be of {name}'s dtype or of {FP8}"
        )
    if k_cache.shape[1] < 1 or k_cache.shape[3] != like.shape[-1]:
        raise ValueError(
            f"caches of shape {list(k_cache.shape)} do not fit {name} {list(like.shape)}: [blocks, block_size, Hkv, D]"
        )
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.device != like.device:
            raise ValueError(f"{cache_name} is on {cache.device} and {name} on {like.device}; move them to one device")
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{cache_name} has stride {cache.stride(-1)} in its last dimension; it must be 1")
    checks.check_heads(heads, k_cache.shape[2])


def check_scale(
    name: str, scale: torch.Tensor | float | None, cache: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """A scale of an FP8 cache as a float32 tensor [1] or [Hkv]; None for caches that have none."""
    if cache.dtype != FP8:
        if scale is not None and not (isinstance(scale, (int, float)) and scale == 1.0):
            raise ValueError(f"{name} applies to {FP8} caches, not to {cache.dtype}; pass None")
        return None
    if scale is None:
        return None
    if not isinstance(scale, torch.Tensor):
        # a fill on the device, where a copy from the host could not be captured in a CUDA graph
        return torch.full((1,), float(scale), dtype=torch.float32, device=device)
    if scale.dtype != torch.float32 or scale.numel() not in (1, cache.shape[2]) or scale.device != device:
        raise ValueError(
            f"{name} is {scale.dtype} {list(scale.shape)} on {scale.device}; it must be float32, one number or one "
            f"for each of {cache.shape[2]} key heads, on {device}"
        )
    return scale.reshape(-1)


def check_operands(o: PagedOperands, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """Raise ValueError or TypeError, naming the value and the remedy."""
    q = o.q
    checks.check_dtype(q)
    if q.dim() != 3 or q.shape[-1] == 0:
        raise ValueError(f"q has shape {list(q.shape)}; packed queries are [tokens, heads, D]")
    if q.shape[-1] > 1 and q.stride(-1) != 1:
        raise ValueError(f"q has stride {q.stride(-1)} in its last dimension; it must be 1: call q.contiguous()")
    check_caches(o.k_cache, o.v_cache, q, q.shape[1], "q")
    B = o.seqused_k.numel()
    tables = {"cu_seqlens_q": (B + 1,), "seqused_k": (B,), "block_table": (B, o.block_table.shape[-1])}
    for name, shape in tables.items():
        tensor = getattr(o, name)
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise TypeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be int32 {list(shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; move them to one device")
    if max_seqlen_q < 0 or max_seqlen_k < 0:
        raise ValueError(f"max_seqlen_q {max_seqlen_q} and max_seqlen_k {max_seqlen_k} are lengths; give at least 0")
    for name in ("alibi_slopes", "sinks"):
        tensor = getattr(o, name)
        if tensor is None:
            continue
        checks.check_shape(name, tensor, (q.shape[1],))
        if not tensor.is_floating_point() or tensor.device != q.device:
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}; it must be floating, on {q.device}")
    if o.out.shape != q.shape or o.out.dtype != q.dtype or o.out.device != q.device or o.out.stride(-1) != 1:
        raise ValueError(
            f"out is {o.out.dtype} {list(o.out.shape)} with strides {list(o.out.stride())}; it must be {q.dtype} "
            f"{list(q.shape)} on {q.device} with a contiguous last dimension"
        )


def check_lengths(lengths: Sequence[tuple[int, int]] | None, B: int) -> Lengths | None:
    if lengths is None:
        return None
    pairs = tuple((int(n), int(k)) for n, k in lengths)
    if len(pairs) != B or min((min(pair) for pair in pairs), default=0) < 0:
        raise ValueError(f"seqlens has {len(pairs)} pairs; it must hold (queries, keys) ≥ 0 for each of {B} sequences")
    return pairs


def describe(
    o: PagedOperands,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    precision: str,
    lengths: Lengths | None,
) -> PagedProblem:
    """The problem that checked operands and resolved options make."""
    T, H, D = o.q.shape
    page, Hkv = o.k_cache.shape[1:3]
    return PagedProblem(
        T=T,
        B=o.seqused_k.numel(),
        H=H,
        Hkv=Hkv,
        D=D,
        page=page,
        dtype=o.q.dtype,
        kv_dtype=o.k_cache.dtype,
        device=o.q.device,
        precision=precision,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        # A bound beyond what the table can address is harmless.
        max_seqlen_k=min(max_seqlen_k, o.block_table.shape[1] * page),
        has_alibi=o.alibi_slopes is not None,
        has_sinks=o.sinks is not None,
        lengths=lengths,
    )
