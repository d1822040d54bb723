"""What lies where: the planner takes a geometry, budgets and bandwidths, and returns one frozen Plan or refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rates:
    """Bandwidths in bytes/s and compute in FLOP/s, measured on this machine or assumed."""

    h2d: float = 50e9
    d2h: float = 50e9
    device_memory: float = 3.0e12
    host_memory: float = 100e9
    flops: float = 500e12
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int  # tokens, rope scaling included
    layer_bytes: int  # the largest decoder layer's flat buffer
    weights_bytes: int  # all decoder layers
    outside_bytes: int  # embeddings, final norm, head
    dtype_bytes: int

    @staticmethod
    def from_config(config: Any, dtype: torch.dtype) -> Geometry:
        raise NotImplementedError

    def kv_bytes_per_token_layer(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    geometry: Geometry
    context: int
    batch: int
    resident_layers: tuple[int, ...]
    slots: int
    prefetch_depth: int
    chunk_tokens: int
    kv_gpu_layers: tuple[int, ...]  # layers whose KV lies in the GPU pool; the other layers' lies in the host pool
    kv_gpu_bytes: int
    kv_host_bytes: int
    gpu_budget: int
    host_budget: int
    gpu_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: dict[str, int] = field(default_factory=dict)
    ttft_s: float = 0.0
    s_per_token: float = 0.0
    bottleneck: dict[str, str] = field(default_factory=dict)  # phase -> pipe
    step_bytes: dict[str, int] = field(default_factory=dict)


def make_plan(
    geometry: Geometry,
    *,
    gpu_budget: int,
    host_budget: int | None,
    context: int | None,
    batch: int,
    resident_layers: int | None = None,
    slots: int | None = None,
    chunk_tokens: int | None = None,
    device_type: str = "cuda",
    rates: Rates | None = None,
) -> Plan:
    """Budgets in bytes; context in tokens, prompt and output together. Raises BudgetError with numbers."""
    raise NotImplementedError


def render(plan: Plan) -> str:
    raise NotImplementedError
