"""A plan for people: bytes by item and tier, the tiers as a picture, the predicted times and what sets them."""

from __future__ import annotations

from elsa_serve.offload.plan import Plan
from elsa_serve.offload.predict import DISK, ISSUE
from elsa_serve.offload.units import format_size

WIDTH = 64  # columns of the picture
# What a shared host gives one program differently from one minute to the next: of one kind of H200's, 0.043 to 0.095 s
# a pass of the first, 1.2 to 1.8 GB/s of the other.
LOOSE = {
    ISSUE: "Python, twice as fast or slow from one minute to the next on a shared host",
    DISK: "a disk that others use, too, gives a third more or less from one minute to the next",
}


def render(plan: Plan) -> str:
    """Several lines, none longer than 160 characters."""
    geometry = plan.geometry
    device = "GPU" if plan.device_type == "cuda" else "device (CPU memory)"
    kv_token = format_size(geometry.layers * geometry.kv_token_bytes())
    lines = [
        f"{geometry.name}: {geometry.layers} layers of {format_size(geometry.layer_bytes)} in "
        f"{str(geometry.dtype).removeprefix('torch.')}, KV {kv_token} a token",
        f"context {plan.context} of {geometry.max_context} tokens; {plan.kv_tokens} tokens of KV in all, "
        f"for up to {plan.batch} requests at once",
        "",
        *_table(device, plan.gpu_bytes, plan.gpu_budget),
        *_table(_host_title(plan), plan.host_bytes, plan.host_budget),
        *_disk(plan),
        *_picture(plan, device),
        "",
        *_times(plan),
    ]
    return "\n".join(lines)


def _host_title(plan: Plan) -> str:
    return "host memory, page-locked" if plan.device_type == "cuda" else "host memory"


def _table(title: str, items: dict[str, int], budget: int) -> list[str]:
    rows = [(name, nbytes) for name, nbytes in items.items() if nbytes]
    used = sum(items.values())
    rows += [("in all", used), ("free", budget - used)]
    width = max(len(name) for name, _ in rows)
    return [f"{title}, budget {format_size(budget)}", *(f"  {n:<{width}} {format_size(b):>10}" for n, b in rows), ""]


def _disk(plan: Plan) -> list[str]:
    kv = "KV, in free memory too" if plan.kv_disk_cached else "KV"
    items = {"weights read again every pass": plan.disk_bytes, kv: plan.kv_disk_bytes}
    rows = [f"  {name:<29} {format_size(nbytes):>10}" for name, nbytes in items.items() if nbytes]
    return ["disk", *rows, ""] if rows else []


def _picture(plan: Plan, device: str) -> list[str]:
    """A row for the weights, a column a layer, and one for every layer's KV, from its first token to its last."""
    layers = plan.geometry.layers
    width = min(layers, WIDTH)
    marks = dict.fromkeys(plan.resident_layers, "#") | dict.fromkeys(plan.disk_layers, "o")
    weights = "".join(marks.get(i * layers // width, ".") for i in range(width))
    ends = ((plan.kv_gpu_tokens, "#"), (plan.kv_gpu_tokens + plan.kv_host_tokens, "."), (plan.context, "o"))
    tokens = "".join(next(mark for end, mark in ends if i * plan.context < end * width) for i in range(width))
    on_host = layers - len(plan.resident_layers) - len(plan.disk_layers)
    counts = [f"{len(plan.resident_layers)} on the {device}", f"{on_host} in host memory"]
    if plan.disk_layers:
        counts.append(f"{len(plan.disk_layers)} on disk")
    return [
        f"# on the {device}   . in host memory" + ("   o on disk" if plan.disk_layers or plan.kv_disk_tokens else ""),
        f"  weights {weights}  of {layers} layers {', '.join(counts)}",
        f"  KV      {tokens}  of {plan.context} tokens {plan.kv_gpu_tokens} on the {device}, {plan.kv_host_tokens} in "
        f"host memory{f', {plan.kv_disk_tokens} on disk' if plan.kv_disk_tokens else ''}, in every layer",
    ]


def _times(plan: Plan) -> list[str]:
    ring = (
        f"{plan.slots} slots, {plan.prefetch_depth} layers ahead"
        if plan.slots
        else "not needed, all layers are resident"
    )
    rates = plan.rates
    disk = f", disk {rates.disk / 1e9:.3g} GB/s" if plan.disk_layers or plan.kv_disk_tokens else ""
    return [
        f"streaming ring: {ring}; prompts pass a layer in chunks of {plan.chunk_tokens} tokens",
        *_phase(plan, "prefill", f"first token after {plan.context} of prompt", plan.ttft_s),
        *_phase(plan, "decode", f"then a token{', from CUDA graphs' if plan.graphs else ''}", plan.s_per_token),
        f"rates {rates.source}: {rates.h2d / 1e9:.3g} GB/s to the {'GPU' if plan.device_type == 'cuda' else 'device'}, "
        f"CPU attention {rates.cpu_attention / 1e9:.3g} GB/s, both at once "
        f"{rates.h2d_beside_cpu_attention / 1e9:.3g} and {rates.cpu_attention_beside_h2d / 1e9:.3g} GB/s,",
        f"  device memory {rates.device_memory / 1e9:.4g} GB/s, products {rates.flops / 1e12:.3g} and attention "
        f"{rates.attention_flops / 1e12:.3g} TFLOP/s{disk}",
    ]


def _phase(plan: Plan, phase: str, what: str, seconds: float) -> list[str]:
    pipes = sorted((plan.pipes or {}).get(phase, {}).items(), key=lambda item: -item[1])
    slowest = (plan.bottleneck or {}).get(phase)
    loose = f": {LOOSE[slowest]}" if slowest in LOOSE else ""
    return [
        f"{what}: about {seconds:.3g} s, set by {slowest}{loose}",
        "  " + ", ".join(f"{name} {value:.3g} s" for name, value in pipes if value >= 0.01 * seconds),
    ]
