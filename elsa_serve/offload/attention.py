"""The seam between transformers' attention modules and the engine's KV.

The model runs with `attn_implementation="elsa_offload"`: its attention modules hand over the queries, keys and values
of this chunk's new tokens alone, packed as [1, H, T, D]. The pass that is running (a context variable) knows which
rows belong to which request, stores their KV, and attends request by request with `elsa_kernels` or with torch's SDPA,
so that the attention alone can be swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from elsa_kernels import State
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from elsa_serve.errors import UsageError

NAME = "elsa_offload"
SDPA_MASK_ROWS = 1024  # query rows a time where a mask must be written out, so that it stays small

AttentionBackend = Literal["elsa", "sdpa"]


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of its attention besides causality. sinks: [H] logits."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


# q [1, H, n, D], k and v [1, Hkv, p + n, D], causal and aligned to the bottom right -> [1, H, n, D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions], torch.Tensor]

# q [1, H, n, D], query i at position `q_start` + i of k and v [1, Hkv, N, D], causal -> the state over those keys
AttendState = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionOptions, int], State]


class ChunkAttention(Protocol):
    """What the running pass does with a chunk's keys and values [1, Hkv, T, D] and the queries of its last tokens, of
    all or fewer, [1, H, n, D] in, [1, n, H, D] out."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor: ...


_chunk: ContextVar[ChunkAttention | None] = ContextVar("elsa_offload_chunk", default=None)


@contextmanager
def attending(chunk: ChunkAttention) -> Iterator[None]:
    token = _chunk.set(chunk)
    try:
        yield
    finally:
        _chunk.reset(token)


def current_attention() -> ChunkAttention:
    """What attends in the pass that is running."""
    chunk = _chunk.get()
    if chunk is None:
        raise RuntimeError(f"attn_implementation={NAME!r} works only inside the offload engine")
    return chunk


def refuse_mask(module: torch.nn.Module, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None:
        raise UsageError(f"{type(module).__name__} builds an attention mask of its own, which offloading cannot honour")


def offload_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [1, H, T, D], k and v [1, Hkv, T, D] of the chunk's new tokens."""
    chunk = current_attention()
    refuse_mask(module, attention_mask)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    return chunk(int(module.layer_idx), query, key, value, options), None  # type: ignore[arg-type]


def register() -> None:
    """Make the implementation known to transformers. No mask function is registered, so models build no mask."""
    AttentionInterface.register(NAME, offload_attention)


def elsa_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    import elsa_kernels

    sinks = options.sinks.float() if options.sinks is not None else None
    return elsa_kernels.attention(
        q, k, v, causal=True, scale=options.scale, window=options.window, softcap=options.softcap, sinks=sinks
    )


def elsa_attend_state(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, q_start: int
) -> State:
    import elsa_kernels

    return elsa_kernels.attention(
        q, k, v, causal=True, scale=options.scale, window=options.window, softcap=options.softcap,
        sinks=options.sinks.float() if options.sinks is not None else None, q_start=q_start, return_state=True,
    )  # fmt: skip


def sdpa_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """torch's SDPA. On CUDA its flash kernel or, in FP32, the memory-efficient one, never one that writes scores out.

    cuDNN's is left out: it plans anew, for about 10 ms, whenever the length of the KV changes, which is every token.
    """
    if options.softcap is not None or options.sinks is not None:
        raise UsageError('torch\'s SDPA has no softcap and no sinks: this model needs attention="elsa"')
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if q.device.type == "cuda":
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return _sdpa_causal(q, k, v, options)
    return _sdpa_causal(q, k, v, options)


def _sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    new, total = q.shape[2], k.shape[2]
    if options.window is not None and options.window < total:
        return _sdpa_window(q, k, v, options.scale, options.window)
    if new == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=options.scale)
    if new == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale)
    if q.device.type == "cuda":
        bias = causal_lower_right(new, total)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options.scale)
    return _sdpa_window(q, k, v, options.scale, total)


def _sdpa_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Row chunks with written-out masks, over the keys that the chunk's rows can see."""
    past = k.shape[2] - q.shape[2]
    parts = []
    for start in range(0, q.shape[2], SDPA_MASK_ROWS):
        rows = q[:, :, start : start + SDPA_MASK_ROWS]
        first, last = past + start, past + start + rows.shape[2]  # positions of the rows, half-open
        low = max(0, first - window + 1)
        i = torch.arange(first, last, device=q.device)[:, None]
        j = torch.arange(low, last, device=q.device)[None, :]
        mask = (j <= i) & (j > i - window)
        parts.append(
            F.scaled_dot_product_attention(rows, k[:, :, low:last], v[:, :, low:last], attn_mask=mask, scale=scale)
        )
    return torch.cat(parts, 2)


ATTEND: dict[str, Attend] = {"elsa": elsa_attend, "sdpa": sdpa_attend}
# torch's SDPA returns no state to merge: with it, KV on the host is brought to the device.
ATTEND_STATE: dict[str, AttendState] = {"elsa": elsa_attend_state}
# Those that may decode from CUDA graphs, by `attention_paged`, which reads lengths from the device.
IN_GRAPHS = frozenset({"elsa"})


def check_model(config: Any, attention: str) -> None:
    """Raise UsageError for models whose attention the engine cannot run exactly, naming the reason."""
    name = getattr(config, "model_type", type(config).__name__)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UsageError(f"model type {name!r} has layers of type {', '.join(sorted(kinds))}, which are not supported")
    for field, what in (
        ("kv_lora_rank", "latent attention (MLA)"),
        ("num_kv_shared_layers", "layers that share their KV"),
        ("use_bidirectional_attention", "bidirectional attention"),
    ):
        if getattr(config, field, None):
            raise UsageError(f"model type {name!r} uses {what}, which is not supported")
    if attention not in ATTEND:
        raise UsageError(f"unknown attention {attention!r}; known: {', '.join(ATTEND)}")
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        raise UsageError(
            f"model type {name!r} caps its attention logits, which torch's SDPA cannot: use --attention elsa"
        )
