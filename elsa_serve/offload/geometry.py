"""A model as the planner sees it: layers, heads, sizes, and the positions that it reaches."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from elsa_serve.errors import UsageError
from elsa_serve.offload.machine import Heads
from elsa_serve.offload.units import ALIGNMENT, aligned
from elsa_serve.offload.weights import build_meta_model, find_decoder_layers, make_layout

ROWS = 128  # query rows of a program of the device's attention; chunks begin at multiples of so many, where they may


@dataclass(frozen=True, slots=True)
class Geometry:
    """Bytes in the dtype it will run in, sizes in elements, contexts in tokens."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int  # what the model's positions reach, rope scaling included
    layer_bytes: int  # the largest decoder layer's flat buffer
    weights_bytes: int  # all decoder layers
    outside_bytes: int  # embeddings, final norm, head
    dtype: torch.dtype
    whole_context: bool = True  # every layer attends all tokens, without sinks

    @staticmethod
    def from_config(config: Any, dtype: torch.dtype) -> Geometry:
        """Computed from transformers' own model of the config, built on the meta device."""
        model = build_meta_model(copy.deepcopy(config), dtype)
        layers = find_decoder_layers(model)
        sizes = [make_layout(layer)[1] for layer in layers]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
        text = config.get_text_config()
        heads = text.num_attention_heads
        return Geometry(
            name=str(getattr(config, "name_or_path", "") or config.model_type),
            layers=len(layers),
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            ffn=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocab=text.vocab_size,
            max_context=max_context(text),
            layer_bytes=max(sizes),
            weights_bytes=sum(sizes),
            outside_bytes=outside,
            dtype=dtype,
            whole_context=not _has_windows(text) and not any(hasattr(m, "sinks") for m in model.modules()),
        )

    @property
    def attention_heads(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.head_dim)

    @property
    def head_bytes(self) -> int:
        """What a pass reads of the weights outside the layers: not the embeddings, of which it takes some rows."""
        return min(self.outside_bytes, self.vocab * self.hidden * self.dtype.itemsize)

    def kv_token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def kv_layer_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in one layer, as one block."""
        return aligned(self.kv_token_bytes() * tokens)

    def kv_bytes(self, tokens: int) -> int:
        return self.layers * self.kv_layer_bytes(tokens)

    def kv_tokens(self, nbytes: int) -> int:
        """The most tokens whose keys and values, in all layers, take no more than so many bytes."""
        return nbytes // self.layers // ALIGNMENT * ALIGNMENT // self.kv_token_bytes()

    def streamed_bytes(self, resident: int) -> int:
        """Weights of the layers that are not resident."""
        return self.weights_bytes - self.weights_bytes * resident // self.layers

    def activation_bytes(self) -> int:
        """One token's activations in one layer, each counted once: hidden states, q, k, v, the MLP's inner."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return (self.hidden + attention + self.ffn) * self.dtype.itemsize


def _has_windows(text_config: Any) -> bool:
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    return getattr(text_config, "sliding_window", None) is not None and "sliding_attention" in kinds


def max_context(text_config: Any) -> int:
    """The positions a model was made for: max_position_embeddings, stretched where its rope scaling stretches it."""
    stated = getattr(text_config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    scaled = stated
    for parameters in by_layer_type or [rope]:
        if parameters.get("rope_type") in ("linear", "dynamic", "yarn"):
            original = parameters.get("original_max_position_embeddings") or stated
            scaled = max(scaled, int(original * float(parameters.get("factor") or 1.0)))
    return scaled


def check_rope(text_config: Any, context: int) -> None:
    """Raise UsageError for a rope scaling whose frequencies change with the longest request of a pass, where it would
    act: a token's result would depend on its neighbours in the batch."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in by_layer_type or [rope]:
        kind = parameters.get("rope_type")
        original = parameters.get("original_max_position_embeddings") or text_config.max_position_embeddings
        if kind in ("dynamic", "longrope") and context > original:
            raise UsageError(
                f"rope_type {kind!r} turns every position by the longest request of a pass beyond {original} tokens: "
                f"results would depend on the batch. Pass --context {original} or less, or use rope_type "
                "yarn or linear"
            )


def whole_waves(tokens: int, heads: int, multiprocessors: int) -> int:
    """A chunk of about so many tokens, a sixteenth more or less, whose attention leaves the fewest multiprocessors idle
    at its end: that of 4,096 tokens of 40 heads takes 132 of them as long as that of 4,224 (1,280 and 1,320 programs,
    ten waves), and products gain, too."""
    about = tokens / ROWS

    def full(rows: int) -> float:  # the share of the waves' programs that there are
        waves = rows * heads / multiprocessors
        return waves / math.ceil(waves)

    near = range(math.ceil(about * 15 / 16), math.floor(about * 17 / 16) + 1)
    return ROWS * max(near, key=lambda rows: (full(rows), -abs(rows - about))) if near else tokens
