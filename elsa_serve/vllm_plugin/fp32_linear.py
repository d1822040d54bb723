"""FP32-accurate linear layers in vLLM: `vllm serve MODEL --dtype float32 --quantization elsa_fp32`.

vLLM's own seam for weights in another form: a quantisation method (`register_quantization_config`, documented for code
outside vLLM). It quantises nothing: every linear layer's FP32 weight becomes two FP16 planes in the same bytes, once,
after loading, and is multiplied on tensor cores (`elsa_kernels.linear`) with errors at or under those of FP32.
Embeddings and the output layer stay vLLM's own. The checkpoint stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from elsa_kernels.linear import SplitMatrix, linear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from elsa_serve.fp32_linear import write_planes

NAME = "elsa_fp32"
# `linear` has forms for few rows, some, and many; Triton compiles apart what is a multiple of 16.
ROWS_OF_FORMS = (1, 31, 32, 255, 256)


class SplitLinearMethod(UnquantizedLinearMethod):
    """Weights are made and loaded as vLLM makes and loads FP32 ones, then split in place."""

    # Splitting twice would split planes: vLLM must hand over weights as they were in the checkpoint.
    supports_pre_processed_weights = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight: Any = layer.weight
        try:
            exponent = write_planes(weight.data, weight.device)
        except ValueError as error:
            name = getattr(layer, "prefix", "") or type(layer).__name__
            raise ValueError(f"{name}: {error}; serve this model without --quantization {NAME}") from None
        planes = weight.data.view(torch.float16).view(2, *weight.shape)  # in the weight's own memory
        known: Any = getattr(layer, "elsa_exponent", None)
        if known is not None and known.device == exponent.device:
            exponent = known.copy_(exponent)  # weights loaded anew: CUDA graphs hold the address
        layer.register_buffer("elsa_planes", planes, persistent=False)
        layer.register_buffer("elsa_exponent", exponent, persistent=False)
        if weight.is_cuda:
            for rows in ROWS_OF_FORMS:  # compiled now rather than while a request waits
                self.apply(layer, weight.new_zeros(rows, weight.shape[1]))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        planes: Any = layer.elsa_planes
        exponent: Any = layer.elsa_exponent
        # A split weight is finite, which `write_planes` has checked: nothing reads its `nonfinite`.
        return linear(x, SplitMatrix(planes[0], planes[1], exponent, exponent), bias)


@register_quantization_config(NAME)
class ElsaFp32Config(QuantizationConfig):
    """Chosen by name; takes no settings and no file."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ElsaFp32Config:
        raise ValueError(
            f"--quantization {NAME} is for checkpoints in floating point, and this one says quantization_config: "
            f"{config}; serve it without"
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> SplitLinearMethod | None:
        return SplitLinearMethod() if isinstance(layer, LinearBase) else None
