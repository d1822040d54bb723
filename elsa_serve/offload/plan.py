"""What lies where: the planner takes a geometry, budgets and rates, and returns one frozen Plan or refuses.

Order on the device: what every plan needs (layer slots, activations of a prompt chunk, hidden states), then KV, then
resident layers. A byte on the device saves a byte over PCIe a pass, whether of weights or of KV, so the order between
the two is free; KV first keeps the host's memory for weights. What does not fit goes to page-locked host memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.machine import Rates, assumed_rates
from elsa_serve.offload.units import format_size
from elsa_serve.offload.weights import ALIGNMENT, build_meta_model, find_decoder_layers, make_layout

MIN_CHUNK, MAX_CHUNK = 64, 8192  # tokens; beyond the larger, matrix products gain nothing
CHUNK_SHARE = 8  # a chunk's activations may take one part in so many of the device budget
THIRD_SLOT_SHARE = 10  # a third slot evens out the copying where three take no more than one part in so many
CUDA_CONTEXT = int(0.85 * 2**30)  # the context and kernels' code, outside torch's allocator: 0.81 GiB seen on an H200
CUBLAS_WORKSPACE = 32 << 20  # what torch gives cuBLAS on Hopper; less elsewhere
ALLOCATOR_SLACK = 10  # the caching allocator's fragmentation: one part in so many of the activations


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model as the planner sees it. Bytes in the dtype it will run in, sizes in elements, contexts in tokens."""

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
        )

    def kv_token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def kv_layer_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in one layer, as one block."""
        return _aligned(self.kv_token_bytes() * tokens)

    def kv_bytes(self, tokens: int) -> int:
        return self.layers * self.kv_layer_bytes(tokens)

    def kv_tokens(self, nbytes: int) -> int:
        """The most tokens whose keys and values, in all layers, take no more than so many bytes."""
        return nbytes // self.layers // ALIGNMENT * ALIGNMENT // self.kv_token_bytes()

    def streamed_bytes(self, resident: int) -> int:
        """Weights of the layers that are not resident."""
        return self.weights_bytes - self.weights_bytes * resident // self.layers

    def prefill_parts(self, tokens: int) -> tuple[float, float]:
        """FLOPs of one prompt: (matrix products of the decoder layers, causal attention)."""
        parameters = self.weights_bytes / self.dtype.itemsize
        return 2.0 * parameters * tokens, 2.0 * tokens**2 * self.heads * self.head_dim * self.layers

    def activation_bytes(self) -> int:
        """One token's activations in one layer, each counted once: hidden states, q, k, v, the MLP's inner."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return (self.hidden + attention + self.ffn) * self.dtype.itemsize


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Placement and prediction. Bytes, tokens, seconds.

    The two KV pools together hold `kv_tokens` tokens in all layers; at least one request of `context` tokens fits.
    `kv_gpu_tokens` are the tokens of a request of full length whose KV it keeps on the device, in every layer. Times
    are those of one request: a prompt of `context` tokens, and a token at its end.
    """

    geometry: Geometry
    device_type: str
    context: int
    batch: int
    resident_layers: tuple[int, ...]
    slots: int
    prefetch_depth: int
    chunk_tokens: int
    kv_tokens: int
    kv_gpu_bytes: int
    kv_host_bytes: int
    gpu_budget: int
    host_budget: int
    gpu_bytes: dict[str, int]  # by item, in the order of placing
    host_bytes: dict[str, int]
    rates: Rates
    ttft_s: float = 0.0
    s_per_token: float = 0.0
    bottleneck: dict[str, str] | None = None  # phase -> the pipe that sets its time
    step_bytes: dict[str, int] | None = None  # over PCIe, by phase, object and direction

    @property
    def streamed_layers(self) -> int:
        return self.geometry.layers - len(self.resident_layers)

    @property
    def kv_gpu_tokens(self) -> int:
        """Tokens of a request of full length that every layer keeps on the device."""
        return min(self.context, self.geometry.kv_tokens(self.kv_gpu_bytes))

    @property
    def kv_host_tokens(self) -> int:
        """The rest of such a request: tokens that every layer keeps in host memory."""
        return self.context - self.kv_gpu_tokens

    def kv_layer_split(self, tokens: int | None = None) -> tuple[int, int]:
        """Bytes of one layer's keys and values (on the device, in host memory) of one request of `tokens` tokens
        (None: full length), the device filled first."""
        tokens = self.context if tokens is None else tokens
        on_device, token = min(tokens, self.kv_gpu_tokens), self.geometry.kv_token_bytes()
        return on_device * token, (tokens - on_device) * token


@dataclass(frozen=True, slots=True)
class _Request:
    """What the caller asked for, None where the planner chooses."""

    geometry: Geometry
    gpu_budget: int
    host_budget: int
    batch: int
    resident: int | None
    slots: int | None
    chunk_tokens: int | None
    device_type: str
    rates: Rates


def make_plan(
    geometry: Geometry,
    *,
    gpu_budget: int,
    host_budget: int,
    context: int | None = None,
    batch: int = 1,
    resident_layers: int | None = None,
    slots: int | None = None,
    chunk_tokens: int | None = None,
    device_type: str = "cuda",
    rates: Rates | None = None,
) -> Plan:
    """Place a model. Budgets in bytes; context in tokens, prompt and output together (None: the model's maximum).

    Raises BudgetError with numbers for what cannot fit, naming the largest context that would.
    """
    for name, value, least in (
        ("context", context, 1), ("max-batch", batch, 1), ("slots", slots, 2), ("chunk-tokens", chunk_tokens, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise BudgetError(f"--{name} {value} is too small; it must be at least {least}")
    if resident_layers is not None and not 0 <= resident_layers <= geometry.layers:
        raise BudgetError(f"--resident-layers {resident_layers} is not in 0 … {geometry.layers}, the model's layers")
    if context is not None and context > geometry.max_context:
        raise BudgetError(
            f"--context {context} exceeds the model's maximum of {geometry.max_context} tokens "
            f"(max_position_embeddings with its rope scaling); use less, or set rope_scaling in config.json"
        )
    request = _Request(
        geometry,
        gpu_budget,
        host_budget,
        batch,
        resident_layers,
        slots,
        chunk_tokens,
        device_type,
        rates or assumed_rates(geometry.dtype),
    )
    wanted = context or geometry.max_context
    try:
        return _predict(_place(request, wanted))
    except BudgetError as error:
        raise BudgetError(f"{error}; {_remedy(request, wanted)}") from None


def _remedy(request: _Request, wanted: int) -> str:
    """What would fit, for the end of a refusal."""
    low, high = 0, wanted  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _place(request, middle)
            low = middle
        except BudgetError:
            high = middle
    if low:
        return f"the largest context that fits is {low} tokens: pass --context {low}, or raise the budget"
    fewer = "use fewer --resident-layers, " if request.resident else ""
    return f"no context fits: {fewer}raise the budget, or choose a smaller dtype or model"


# --- placing ------------------------------------------------------------------------------------------------------


def _place(request: _Request, context: int) -> Plan:
    """A plan without predictions, in smaller chunks where memory is tight. Raises BudgetError."""
    chunk = request.chunk_tokens or _choose_chunk(request.geometry, request.gpu_budget)
    while True:
        try:
            return _place_chunked(request, context, min(chunk, context))
        except BudgetError:
            if request.chunk_tokens or chunk <= MIN_CHUNK:
                raise
            chunk //= 2


def _place_chunked(request: _Request, context: int, chunk: int) -> Plan:
    geometry = request.geometry
    slots = request.slots or _choose_slots(geometry, request.gpu_budget)
    items = _fixed_items(request, context, chunk)
    kv_host = working = 0
    resident = request.resident or 0
    ring = slots if resident < geometry.layers else 0
    free = request.gpu_budget - sum(items.values()) - (ring + resident) * geometry.layer_bytes
    kv_gpu = wanted = geometry.kv_bytes(context) * request.batch
    if free < wanted:
        working = geometry.kv_layer_bytes(context)
        free -= working
        if free < 0:
            raise BudgetError(_device_message(request, items, ring, resident, working))
        kv_gpu = geometry.kv_bytes(geometry.kv_tokens(free))
        room = request.host_budget - geometry.streamed_bytes(resident)
        kv_host = max(0, min(wanted - kv_gpu, room // ALIGNMENT * ALIGNMENT))
        rest = geometry.kv_bytes(context - min(context, geometry.kv_tokens(kv_gpu)))  # of one request of full length
        if kv_host < rest:
            raise BudgetError(_host_message(request, resident, rest))
    free -= kv_gpu
    if request.resident is None:
        resident, free = _fill_with_layers(geometry, free, slots)
    streamed = geometry.layers - resident
    slots = slots if streamed else 0
    weights = geometry.streamed_bytes(resident)
    if weights + kv_host > request.host_budget:
        raise BudgetError(_host_message(request, resident, kv_host))
    gpu = {
        **items,
        "layer slots": slots * geometry.layer_bytes,
        "KV on its way to and from the host": working,
        "KV": kv_gpu,
        "resident layers": resident * geometry.layer_bytes,
    }
    return Plan(
        geometry=geometry,
        device_type=request.device_type,
        context=context,
        batch=request.batch,
        resident_layers=_spread(resident, geometry.layers),
        slots=slots,
        prefetch_depth=max(0, slots - 1),
        chunk_tokens=chunk,
        kv_tokens=(kv_gpu + kv_host) * context // geometry.kv_bytes(context),
        kv_gpu_bytes=kv_gpu,
        kv_host_bytes=kv_host,
        gpu_budget=request.gpu_budget,
        host_budget=request.host_budget,
        gpu_bytes=gpu,
        host_bytes={"weights of streamed layers": weights, "KV": kv_host},
        rates=request.rates,
    )


def _fixed_items(request: _Request, context: int, chunk: int) -> dict[str, int]:
    """Device bytes that do not depend on placement."""
    geometry = request.geometry
    hidden = hidden_bytes(geometry, context)
    activations = chunk_bytes(geometry, chunk, context)
    return {
        "CUDA context": CUDA_CONTEXT if request.device_type == "cuda" else 0,
        "cuBLAS workspace": CUBLAS_WORKSPACE if request.device_type == "cuda" else 0,
        "embeddings and head": geometry.outside_bytes,
        "hidden states of the prompt": hidden,
        "activations of a chunk": activations,
        "logits": request.batch * geometry.vocab * (geometry.dtype.itemsize + 8),
        "allocator slack": (hidden + activations) // ALLOCATOR_SLACK,
    }


def hidden_bytes(geometry: Geometry, context: int) -> int:
    """The prompt's hidden states twice (transformers' embedding scaling makes a copy), and rotary tables in FP32."""
    hidden = 2 * context * geometry.hidden * geometry.dtype.itemsize
    tables = context * geometry.head_dim * (2 * geometry.dtype.itemsize + 16)
    return hidden + tables


def chunk_bytes(geometry: Geometry, chunk: int, context: int) -> int:
    """Activations alive at once while a chunk passes a layer, as transformers' decoder layers make them.

    Norms run in FP32 (a copy, its square, the result) beside residual and output. Attention holds queries, their
    rotated form and two temporaries, the output and its transpose, the same for keys; FP32 attention also splits every
    operand into planes of its own size. The MLP holds gate, its activation, up and their product.
    """
    size = geometry.dtype.itemsize
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    norm = chunk * geometry.hidden * (8 + 3 * size)
    attention = chunk * size * (6 * queries + 5 * keys)
    if geometry.dtype == torch.float32:
        attention += 4 * (chunk * queries + 2 * context * keys)
    mlp = chunk * size * 4 * geometry.ffn
    return norm + max(attention, mlp)


def _choose_chunk(geometry: Geometry, gpu_budget: int) -> int:
    """The largest power of two whose own activations stay a small part of the budget."""
    chunk = MAX_CHUNK
    while chunk > MIN_CHUNK and chunk_bytes(geometry, chunk, 0) > gpu_budget // CHUNK_SHARE:
        chunk //= 2
    return chunk


def _choose_slots(geometry: Geometry, gpu_budget: int) -> int:
    return 3 if geometry.layers > 3 and 3 * geometry.layer_bytes * THIRD_SLOT_SHARE <= gpu_budget else 2


def _device_message(request: _Request, items: dict[str, int], ring: int, resident: int, working: int) -> str:
    layer = request.geometry.layer_bytes
    needed = {
        **items,
        f"{ring} layer slots": ring * layer,
        f"{resident} resident layers": resident * layer,
        "KV on its way": working,
    }
    parts = ", ".join(f"{name} {format_size(n)}" for name, n in needed.items() if n)
    return (
        f"a budget of {format_size(request.gpu_budget)} on the device (--gpu-memory) is too small: "
        f"{format_size(sum(needed.values()))} are needed at least ({parts})"
    )


def _host_message(request: _Request, resident: int, kv: int) -> str:
    weights = request.geometry.streamed_bytes(resident)
    return (
        f"a budget of {format_size(request.host_budget)} in host memory (--host-memory, or the container's limit) is "
        f"too small: {format_size(weights + kv)} are needed (weights {format_size(weights)}, KV {format_size(kv)})"
    )


def _fill_with_layers(geometry: Geometry, free: int, slots: int) -> tuple[int, int]:
    """Layers that stay on the device in what is free. When all but the ring's worth fit, the ring makes room."""
    count = min(geometry.layers, free // geometry.layer_bytes)
    if count + slots >= geometry.layers:
        return geometry.layers, free - (geometry.layers - slots) * geometry.layer_bytes
    return count, free - count * geometry.layer_bytes


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of the layers, evenly spaced, so that the copying in between is even too."""
    return tuple(i * layers // count for i in range(count)) if count else ()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# --- predicting ---------------------------------------------------------------------------------------------------


def prefill_compute_s(geometry: Geometry, tokens: int, rates: Rates) -> float:
    """Seconds in which the device computes a prompt whose weights are there."""
    products, attention = geometry.prefill_parts(tokens)
    rest = geometry.activation_bytes() * geometry.layers * tokens / rates.activations
    return products / rates.flops + attention / rates.attention_flops + rest


def _predict(plan: Plan) -> Plan:
    """Times of one request of full length: in every phase the slowest of the pipes that run beside each other."""
    geometry, rates = plan.geometry, plan.rates
    weights = geometry.streamed_bytes(len(plan.resident_layers))
    kv = geometry.kv_bytes(plan.context)
    kv_host = geometry.kv_bytes(plan.kv_host_tokens)
    prefill = {
        "copies to the device": weights / rates.h2d,
        "compute": prefill_compute_s(geometry, plan.context, rates),
        "copies to the host": kv_host / rates.d2h,
    }
    decode = {
        "copies to the device": weights / rates.h2d,
        "attention on the host": kv_host / (rates.cpu_attention_beside_h2d if weights else rates.cpu_attention),
        "device memory": (geometry.weights_bytes + geometry.outside_bytes + kv) / rates.device_memory,
        "host memory": (weights + kv_host) / rates.host_memory,
    }
    slowest = {"prefill": max(prefill, key=prefill.__getitem__), "decode": max(decode, key=decode.__getitem__)}
    return replace(
        plan,
        ttft_s=max(prefill.values()),
        s_per_token=max(decode.values()),
        bottleneck=slowest,
        step_bytes={
            "weights to the device": weights,
            "prefill: KV to the host": kv_host,
        },
    )


# --- printing -----------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The plan for people: bytes by item and tier, the tiers as a picture, the predicted times and what sets them."""
    geometry = plan.geometry
    device = "GPU" if plan.device_type == "cuda" else "device (CPU memory)"
    kv_token = format_size(geometry.kv_bytes(plan.context) / plan.context)
    lines = [
        f"{geometry.name}: {geometry.layers} layers of {format_size(geometry.layer_bytes)} in "
        f"{str(geometry.dtype).removeprefix('torch.')}, KV {kv_token} a token",
        f"context {plan.context} of {geometry.max_context} tokens; {plan.kv_tokens} tokens of KV in all, "
        f"for up to {plan.batch} requests at once",
        "",
        *_table(device, plan.gpu_bytes, plan.gpu_budget),
        *_table("host memory", plan.host_bytes, plan.host_budget),
        *_picture(plan, device),
        "",
        *_times(plan),
    ]
    return "\n".join(lines)


def _table(title: str, items: dict[str, int], budget: int) -> list[str]:
    rows = [(name, nbytes) for name, nbytes in items.items() if nbytes]
    used = sum(items.values())
    rows += [("in all", used), ("free", budget - used)]
    width = max(len(name) for name, _ in rows)
    return [f"{title}, budget {format_size(budget)}", *(f"  {n:<{width}} {format_size(b):>10}" for n, b in rows), ""]


def _picture(plan: Plan, device: str) -> list[str]:
    """One character a layer for the weights, and as many for the tokens of every layer's KV (at most 64)."""
    layers, here = plan.geometry.layers, set(plan.resident_layers)
    width = min(layers, 64)
    weights = "".join("#" if i * layers // width in here else "." for i in range(width))
    tokens = "".join("#" if i * plan.context < plan.kv_gpu_tokens * width else "." for i in range(width))
    return [
        f"# stays on the {device}, . is read from host memory every pass",
        f"  weights {weights}  {len(here)} of {layers} layers",
        f"  KV      {tokens}  {plan.kv_gpu_tokens} of {plan.context} tokens, in every layer",
    ]


def _times(plan: Plan) -> list[str]:
    slowest, moved = plan.bottleneck or {}, plan.step_bytes or {}
    ring = (
        f"{plan.slots} slots, {plan.prefetch_depth} layers ahead"
        if plan.slots
        else "not needed, all layers are resident"
    )
    copies = ", ".join(f"{name} {format_size(n)}" for name, n in moved.items() if n) or "none"
    rates = plan.rates
    return [
        f"streaming ring: {ring}; prompts pass a layer in chunks of {plan.chunk_tokens} tokens",
        f"copies a pass: {copies}",
        f"first token after {plan.context} of prompt: about {plan.ttft_s:.3g} s, set by {slowest.get('prefill')}",
        f"then about {plan.s_per_token:.3g} s a token, set by {slowest.get('decode')}",
        f"rates {rates.source}: {rates.h2d / 1e9:.3g} GB/s to the device, {rates.d2h / 1e9:.3g} GB/s to the host, "
        f"device memory {rates.device_memory / 1e9:.4g} GB/s, {rates.flops / 1e12:.3g} TFLOP/s",
    ]
