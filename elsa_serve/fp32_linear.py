"""FP32-accurate linear layers at tensor-core speed inside transformers' models: `elsa_kernels.linear` behind nn.Linear.

`SplitLinear` keeps its weight as two FP16 planes in the very bytes of the FP32 matrix (the hi plane, then the lo
plane), so that a split weight lies in the same buffers and streams over the same lanes as an unsplit one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from elsa_kernels.linear import SplitMatrix, linear, split_weight
from torch import nn


def write_planes(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Split weight [N, K] float32 in place, its bytes become the planes, computing on `device`.

    Returns the exponents [N] int32 there. Raises ValueError naming the first row that holds Inf or NaN; the weight is
    then unchanged.
    """
    split = split_weight(weight.to(device))
    planes = weight.view(torch.float16).view(2, *weight.shape)
    planes[0].copy_(split.hi)
    planes[1].copy_(split.lo)
    return split.exponent


class SplitLinear(nn.Module):
    """y = x·Wᵀ + b of an nn.Linear whose `weight` holds the planes that `write_planes` wrote, with their `exponent`."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self.exponent: torch.Tensor | None = None  # [N] int32, on the device where the layer runs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.exponent is None:
            raise RuntimeError("the weight of this SplitLinear has not been split")
        planes = self.weight.view(torch.float16).view(2, self.out_features, self.in_features)
        # A split weight is finite, which `write_planes` has checked: nothing reads its `nonfinite`.
        return linear(x, SplitMatrix(planes[0], planes[1], self.exponent, self.exponent), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def replace_linears(module: nn.Module) -> dict[str, SplitLinear]:
    """Put a SplitLinear in the place of every float32 nn.Linear below `module`; weights are not touched yet."""
    replaced = {}
    for name, parent, leaf, child in list(_linears(module)):
        new = SplitLinear(child)
        parent._modules[leaf] = new
        replaced[name] = new
    return replaced


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    for parent_name, parent in module.named_modules():
        for leaf, child in parent._modules.items():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                yield f"{parent_name}.{leaf}".lstrip("."), parent, leaf, child


class _Accelerated(nn.Module):
    """An nn.Linear of a model on a GPU, with its split weight beside it."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.original = of
        self._split = split_weight(of.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.original.weight.requires_grad):
            raise RuntimeError("FP32-accurate linear layers are forward-only: use torch.no_grad() or inference_mode()")
        return linear(x, self._split, self.original.bias)


@contextmanager
def use_fp32_linear(model: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """Run every float32 nn.Linear of `model` on tensor cores, FP32-accurately; torch's layers are back afterwards.

        with use_fp32_linear(model), torch.inference_mode():
            model.generate(**inputs)

    The split weights cost the weights' bytes once more while the context lasts. `enabled=False` changes nothing: a
    switch for comparisons. Raises ValueError naming the layer whose weight holds Inf or NaN, and for a model without a
    float32 nn.Linear, as transformers loads it from a 16-bit checkpoint.
    """
    found = list(_linears(model)) if enabled else []
    if enabled and not found:
        dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
        raise ValueError(
            f"{type(model).__name__} has no float32 nn.Linear, its parameters are {dtypes or 'none'}: load the model "
            "with dtype=torch.float32"
        )
    replaced: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        for name, parent, leaf, child in found:
            try:
                parent._modules[leaf] = _Accelerated(child)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            replaced.append((parent, leaf, child))
        yield model
    finally:
        for parent, leaf, child in replaced:
            parent._modules[leaf] = child
