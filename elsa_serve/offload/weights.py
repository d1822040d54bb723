"""A checkpoint as transformers' own model on the meta device, each decoder layer's weights in one flat host buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

LoadFormat = Literal["auto", "safetensors", "dummy"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a parameter lies in its layer's flat buffer. `offset` in bytes, a multiple of ALIGNMENT."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


Layout = Mapping[str, TensorSpec]  # by the parameter's name inside its layer, such as "self_attn.q_proj.weight"


class LayerStore:
    """The decoder layers' weights on the host: one flat uint8 tensor a layer, page-locked where there is a GPU."""

    layers: Sequence[torch.Tensor]
    layouts: Sequence[Layout]

    @property
    def nbytes(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """Unlock and free the buffers. Idempotent."""


class ModelWeights:
    """A model whose decoder layers lie in host memory (parameters on meta) and whose rest lies on `device`."""

    model: nn.Module  # transformers' CausalLM
    config: Any
    decoder_layers: Sequence[nn.Module]
    store: LayerStore
    device: torch.device
    dtype: torch.dtype
    device_nbytes: int  # embeddings, final norm, head, buffers

    def close(self) -> None: ...


def load_model(
    source: Path | str,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    load_format: LoadFormat = "auto",
    attn_implementation: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ModelWeights:
    """Load a Hugging Face checkpoint directory. Raises CheckpointError naming the value and the remedy."""
    raise NotImplementedError
