"""Rates of the device's own work: matrix products and attention, for a moment and where they last."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from elsa_serve.offload import attention as attentions
from elsa_serve.offload.graphs import PAGE, Capturing, GraphAttention
from elsa_serve.offload.kv import Extent, Span
from elsa_serve.offload.machine import Heads
from elsa_serve.offload.timing import repeated, seconds, sustained

if TYPE_CHECKING:
    from elsa_serve.offload.geometry import Geometry
    from elsa_serve.offload.measure import Sizes

ROWS, WEIGHTS = 48, 3  # products of one row in a timed run, and matrices that they take in turn
LAYERS = 8  # whose products are timed in turn: together more than a cache holds
QUERIES = 8  # calls of attention of one query in a timed run

logger = logging.getLogger(__name__)


def compute_rates(
    device: torch.device, dtype: torch.dtype, attention: str, linear: str, heads: Heads, sizes: Sizes
) -> tuple[dict[str, float], dict[str, float]]:
    """The device's products and its attention, on random numbers: constants draw less power. As fast as they are for a
    moment, and what differs where they last."""
    on_gpu = device.type == "cuda"
    issued = functools.partial(as_a_graph, device) if on_gpu else (lambda work: work)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    tokens, keys = sizes.attention, sizes.copy // heads.token_bytes(dtype)
    weights = sizes.product[1] * sizes.product[2] * dtype.itemsize
    one = _attention(attention, 1, keys, heads, options)
    in_graph = _paged_attention(keys, heads, options) if attention in attentions.IN_GRAPHS else one
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "flops": (2.0 * math.prod(sizes.product), _product(linear, sizes.product, options)),
        "attention_flops": (
            2.0 * heads.queries * heads.dim * tokens**2,
            _attention(attention, tokens, tokens, heads, options),
        ),
        "device_memory": (1.0 * ROWS * weights, issued(_products_of_one_row(linear, sizes.product, options))),
        "device_attention": (1.0 * QUERIES * keys * heads.token_bytes(dtype), issued(repeated(one, QUERIES))),
        "graph_attention": (1.0 * QUERIES * keys * heads.token_bytes(dtype), issued(repeated(in_graph, QUERIES))),
    }
    brief = {name: amount / seconds(call, on_gpu) for name, (amount, call) in work.items()}
    lasting = {name: work[name][0] / sustained(work[name][1]) for name in ("flops", "attention_flops") if on_gpu}
    del work, one, in_graph  # with the graphs' memory
    if on_gpu:
        torch.cuda.empty_cache()
    return brief, lasting


def _product(linear: str, shape: tuple[int, int, int], options: dict[str, Any]) -> Callable[[], object]:
    m, k, n = shape
    left, right = torch.randn(m, k, **options), torch.randn(n, k, **options)
    if linear == "elsa":
        from elsa_kernels.linear import linear as split_linear
        from elsa_kernels.linear import split_weight

        planes = split_weight(right)
        return lambda: split_linear(left, planes)
    return lambda: torch.nn.functional.linear(left, right)


def _products_of_one_row(linear: str, shape: tuple[int, int, int], options: dict[str, Any]) -> Callable[[], object]:
    """ROWS products of one row, whose weights are not in the cache when their turn comes."""
    _, k, n = shape
    calls = [_product(linear, (1, k, n), options) for _ in range(WEIGHTS)]
    return lambda: [calls[i % WEIGHTS]() for i in range(ROWS)]


def layer_seconds(device: torch.device, dtype: torch.dtype, linear: str, geometry: Geometry, keys: int) -> float:
    """Of one layer's products of one row, as the engine makes them, and attention over so many keys; in a graph where
    that can be."""
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    heads, hidden, ffn = geometry.attention_heads, geometry.hidden, geometry.ffn
    inner, keys_and_values = heads.queries * heads.dim, [heads.keys * heads.dim] * 2
    into, gates = [inner, *keys_and_values], [ffn] * 2
    if on_gpu and linear == "torch":  # fused: what has the same input is one product
        into, gates = [sum(into)], [sum(gates)]
    shapes = [*((hidden, n) for n in into), (inner, hidden), *((hidden, n) for n in gates), (ffn, hidden)]
    layers = [[_product(linear, (1, *shape), options) for shape in shapes] for _ in range(LAYERS)]
    attend = _paged_attention(keys, heads, options)

    def work() -> None:
        for products in layers:
            for product in products:
                product()
            attend()

    return seconds(as_a_graph(device, work) if on_gpu else work, on_gpu) / LAYERS


def _attention(name: str, queries: int, keys: int, heads: Heads, options: dict[str, Any]) -> Callable[[], object]:
    q = torch.randn(1, heads.queries, queries, heads.dim, **options)
    k, v = (torch.randn(1, heads.keys, keys, heads.dim, **options) for _ in range(2))
    attend, asked = attentions.ATTEND[name], attentions.AttentionOptions(heads.dim**-0.5)
    return lambda: attend(q, k, v, asked)


def _paged_attention(keys: int, heads: Heads, options: dict[str, Any]) -> Callable[[], object]:
    """Attention of one query as a graph of a decode pass holds it."""
    layer = torch.randn(2, heads.keys, keys // PAGE * PAGE, heads.dim, **options)
    span = Span(Extent("gpu", layer.shape[2], [layer], [layer], []), 0, layer.shape[2])
    attend = GraphAttention([[span]], layer.device)
    attend.place(torch.tensor([layer.shape[2] - 1], device=layer.device))
    q = torch.randn(1, heads.queries, 1, heads.dim, **options)
    new = layer[None, 0, :, :1]
    asked = attentions.AttentionOptions(heads.dim**-0.5)
    return lambda: attend(0, q, new, new, asked)


def as_a_graph(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph, where it can be captured: a query's attention is over before Python has issued it."""
    capturing = Capturing(device)
    try:
        replay, result = capturing(work)
    except RuntimeError as error:
        logger.info("no CUDA graph holds what is to be timed, which includes its issue then: %s", error)
        return work
    held = work, result, capturing  # a graph reads what `work` refers to, and keeps none of it alive

    def again() -> object:
        replay()
        return held

    return again
