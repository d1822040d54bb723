"""FP32-accurate linear layers for the engine: every decoder layer's matrices split once, in the buffers they lie in.

The planes take the bytes of the FP32 matrix, so layouts, copies and plans stay as they are. The exponents (4 bytes a
row) stay on the device.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from elsa_serve.errors import CheckpointError, UsageError
from elsa_serve.fp32_linear import replace_linears, write_planes
from elsa_serve.offload.weights import ModelWeights

CHOICES = ("torch", "elsa")


def check_linear(choice: str, dtype: torch.dtype) -> None:
    """Raises UsageError for an unknown choice, or one that does not suit the dtype."""
    if choice not in CHOICES:
        raise UsageError(f"unknown linear layers {choice!r}; choose {' or '.join(CHOICES)}")
    if choice == "elsa" and dtype != torch.float32:
        raise UsageError(
            f"--linear elsa is for float32, and the model runs in {str(dtype).removeprefix('torch.')}: "
            "add --dtype float32, or leave --linear out"
        )


def split_linears(weights: ModelWeights, progress: bool = True) -> None:
    """Split every linear layer's weight inside the decoder layers, in place. Raises CheckpointError for Inf or NaN."""
    bar = tqdm(total=weights.store.nbytes, unit="B", unit_scale=True, desc="splitting weights", disable=not progress)
    with bar:
        for index, layer in enumerate(weights.decoder_layers):
            views = weights.store.views(index)
            for name, linear in replace_linears(layer).items():
                weight = views[f"{name}.weight"]
                try:
                    linear.exponent = write_planes(weight, weights.device)
                except ValueError as error:
                    raise CheckpointError(f"layer {index}, {name}: {error}; use --linear torch") from error
                bar.update(weight.numel() * weight.element_size())
