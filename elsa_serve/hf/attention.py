"""The attention functions that transformers calls in each layer: `elsa`, and `elsa_or_sdpa`, which may fall back."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import elsa_kernels
import torch
from elsa_kernels.registry import FallbackWarning, UnsupportedProblem
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from elsa_serve.errors import UsageError
from elsa_serve.hf.masks import StructuredMask, additive

_announced: set[str] = set()


class Visible(NamedTuple):
    """What queries see, in the words of `elsa_kernels.attention`."""

    causal: bool
    window: int | None
    q_start: int | None
    kv_range: torch.Tensor | None
    bias: torch.Tensor | None


def elsa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attn_implementation="elsa"`: exact attention by `elsa_kernels`, strict about what it cannot do.

    query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]; attention_mask as made by `elsa_mask`, or any
    dense boolean or additive [B|1, H|1, Nq|1, Nk], or None: then `is_causal` (or the module's) with the last query at
    the last key. position_bias [B|1, H|1, Nq|1, Nk] is added to the logits, s_aux [H] are attention sinks. Returns
    [B, Nq, H, Dv] in query's dtype, and None for the attention weights, which are never formed.

    Raises UsageError for attention weights, dropout and training (the kernels are forward-only; outside training mode
    the forward runs and `backward` raises), and UnsupportedProblem where no kernel takes the shapes.
    """
    reason = _refusal(module, (query, key, value), dropout, kwargs)
    if reason is not None:
        raise UsageError(reason)
    visible = _visible(module, query, key, attention_mask, is_causal, sliding_window, position_bias, kwargs)
    out = _run(query, key, value, visible, scaling, softcap, s_aux)
    if out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(_no_backward)
    return out.transpose(1, 2).contiguous(), None


def elsa_or_sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attn_implementation="elsa_or_sdpa"`: as `elsa`, but SDPA runs where elsa refuses, said once per reason.

    SDPA runs in training, with dropout, and for shapes no kernel takes. It knows neither softcap nor sinks, and it
    returns no attention weights: there the refusal stands.
    """
    reason = _refusal(module, (query, key, value), dropout, kwargs)
    if reason is None:
        try:
            return elsa_attention(
                module, query, key, value, attention_mask, dropout=dropout, softcap=softcap, s_aux=s_aux, **kwargs
            )
        except UnsupportedProblem as problem:
            reason = str(problem)
    if softcap is not None or s_aux is not None or kwargs.get("output_attentions"):
        raise UsageError(f'{reason} (SDPA cannot stand in here; load the model with attn_implementation="eager")')
    if reason not in _announced and not torch.compiler.is_compiling():
        _announced.add(reason)
        warnings.warn(f"elsa_or_sdpa: sdpa runs instead of elsa: {reason}", FallbackWarning, stacklevel=2)
    if isinstance(attention_mask, StructuredMask):
        attention_mask = attention_mask.seen()
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **kwargs)


def _refusal(module: nn.Module, operands: tuple[torch.Tensor, ...], dropout: float, kwargs: dict) -> str | None:
    """Why elsa does not run this call, with the remedy, or None."""
    if kwargs.get("output_attentions"):
        return (
            "elsa attention never forms the attention weights that output_attentions=True asks for; "
            'use attn_implementation="eager" for them'
        )
    if dropout > 0:
        return (
            f"elsa attention is for inference and has no dropout (got {dropout}); call model.eval(), "
            'or train with attn_implementation="sdpa" or "elsa_or_sdpa"'
        )
    if module.training and torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return (
            "elsa attention has no backward pass, and this model is in training mode with gradients; call model.eval() "
            'under torch.no_grad() for inference, or train with attn_implementation="sdpa" or "elsa_or_sdpa"'
        )
    return None


def _no_backward(gradient: torch.Tensor) -> None:
    raise UsageError(
        "elsa attention has no backward pass; run the forward under torch.no_grad() if no gradient is wanted, "
        'or train with attn_implementation="sdpa" or "elsa_or_sdpa"'
    )


def _visible(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    position_bias: torch.Tensor | None,
    kwargs: dict,
) -> Visible:
    if mask is not None and not isinstance(mask, StructuredMask):
        return Visible(False, None, None, None, _dense_bias(mask, query, key, position_bias))
    if kwargs.get("cu_seq_lens_q") is not None:
        raise UsageError(
            "elsa attention got cu_seq_lens_q with a mask that does not separate the packed sequences; pass "
            "position_ids that start again at 0 in each sequence, without attention_mask and with use_cache=False"
        )
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if sliding_window is not None and not causal:
            raise UsageError("elsa attention needs a mask for bidirectional sliding windows; this model passed none")
        return Visible(causal, sliding_window, None, None, position_bias)
    if mask.shape[2:] != (query.shape[2], key.shape[2]) or mask.shape[0] != query.shape[0]:
        raise UsageError(
            f"elsa attention got a mask for [B, Nq, Nk] = [{mask.shape[0]}, {mask.shape[2]}, {mask.shape[3]}] but "
            f"[{query.shape[0]}, {query.shape[2]}, {key.shape[2]}] in layer {getattr(module, 'layer_idx', '?')}; "
            "build the mask from the same cache as the layer's"
        )
    return Visible(mask.causal, mask.window, mask.q_start, mask.kv_range, position_bias)


def _dense_bias(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, position_bias: torch.Tensor | None
) -> torch.Tensor:
    if mask.ndim != 4 or mask.shape[-1] != key.shape[2] or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise UsageError(
            f"elsa attention takes a boolean or additive mask [B, 1, {query.shape[2]}, {key.shape[2]}] in its layers, "
            f"not {mask.dtype} {tuple(mask.shape)}; pass the 2D padding mask to the model, not to the layer"
        )
    bias = additive(mask, query.dtype) if mask.dtype == torch.bool else mask
    return bias if position_bias is None else bias + position_bias


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: Visible,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[B, H, Nq, Dv]. Head dimensions of queries and values may differ (latent attention): the smaller is padded."""
    D, Dv = query.shape[-1], value.shape[-1]
    if Dv != D:
        scale = D**-0.5 if scale is None else scale  # of the unpadded dimension
        query, key, value = (nn.functional.pad(x, (0, max(D, Dv) - x.shape[-1])) for x in (query, key, value))
    if sinks is not None and sinks.dtype != torch.float64:
        sinks = sinks.float()
    out = elsa_kernels.attention(query, key, value, **visible._asdict(), scale=scale, softcap=softcap, sinks=sinks)
    return out[..., :Dv]
