"""Tiny random models of several families, as checkpoint directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.weights import ModelWeights

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: LlamaConfig(**SHAPE, **kw),
    "qwen3": lambda **kw: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True, **kw),
    "gemma2": lambda **kw: Gemma2Config(**SHAPE, head_dim=16, sliding_window=8, **kw),
}


def make_config(family: str, layers: int = 5, **kwargs: Any) -> Any:
    return FAMILIES[family](num_hidden_layers=layers, **kwargs)


def make_model(family: str, layers: int = 5, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model with random weights whose scale is large enough for mistakes to show."""
    torch.manual_seed(7)
    config = make_config(family, layers, initializer_range=0.2, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def save(model: Any, directory: Path, shard: str = "50GB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


@contextmanager
def streamed(weights: ModelWeights, ring: WeightStream) -> Iterator[None]:
    """Run every decoder layer of the model inside `ring.layer`."""
    forwards = [layer.forward for layer in weights.decoder_layers]

    def wrap(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with ring.layer(index):
                return forwards[index](*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for index, layer in enumerate(weights.decoder_layers):
            layer.forward = wrap(index)
            stack.callback(delattr, layer, "forward")
        yield


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits
