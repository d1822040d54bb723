"""What a layer and a pass of the engine cost beyond bytes and FLOPs, from small random models that run through it."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from elsa_serve.errors import ElsaError
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.predict import Share, device_seconds, whole_layers
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Record, StepStats

if TYPE_CHECKING:
    from elsa_serve.offload.measure import Sizes

WIDE = 4  # layers of the probe of a prompt's activations, all but the last of which its tokens pass whole
PROMPTS = 3  # that a probe is timed over, and DECODES passes
SHALLOW, DEEP = 2, 10  # layers of the other probes: their difference is a layer's issue, the rest is the pass's
SHORT = 64  # tokens of their prompts
DECODES = 12
WARM_UP_TOKENS = 3  # until a decode pass is replayed from its graph

logger = logging.getLogger(__name__)


def engine_rates(
    device: torch.device, dtype: torch.dtype, attention: str, linear: str, sizes: Sizes, rates: Rates
) -> dict[str, float]:
    """What a layer and a pass cost beyond bytes and FLOPs, from small models whose layers are all resident."""
    hidden, prompt, on_gpu = sizes.probe_hidden, sizes.probe_prompt, device.type == "cuda"

    def probe(hidden: int, layers: int, prompt: int, **options: Any) -> _Probe:
        return _probe(device, dtype, attention, linear, rates, hidden, layers, prompt, **options)

    try:
        wide = probe(hidden, WIDE, prompt, chunk_tokens=prompt)
        halves = probe(hidden, WIDE, prompt, chunk_tokens=prompt // 2)
        deep, flat = (probe(hidden // 4, layers, SHORT, graphs=False) for layers in (DEEP, SHALLOW))
        deep_graph, flat_graph = deep, flat
        if on_gpu:
            deep_graph, flat_graph = (probe(hidden // 4, layers, SHORT) for layers in (DEEP, SHALLOW))
    except (ElsaError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("the engine's own share of a pass cannot be measured (%s): it is assumed", error)
        return {}
    layer_s = max(1e-6, (deep.decode_s - flat.decode_s) / (DEEP - SHALLOW))
    graph_layer_s = max(1e-6, (deep_graph.decode_s - flat_graph.decode_s) / (DEEP - SHALLOW))
    geometry = wide.plan.geometry
    free = replace(rates, activations=math.inf)
    rest = wide.prefill_s - device_seconds(geometry, free, [Share(0, prompt)], on_gpu)
    activations = geometry.activation_bytes() * whole_layers(geometry, prompt, on_gpu) * prompt
    read = flat_graph.plan.geometry.layer_bytes / rates.device_memory
    return {
        "layer_s": layer_s,
        "pass_s": max(1e-6, flat.decode_s - SHALLOW * layer_s),
        "graph_layer_s": max(1e-6, graph_layer_s - read),
        "graph_pass_s": max(1e-6, flat_graph.decode_s - SHALLOW * graph_layer_s),
        "chunk_s": max(1e-6, (halves.prefill_s - wide.prefill_s) / WIDE),
        # Never less than a twentieth of the prefill: rates measured a moment apart may leave nothing of it.
        "activations": activations / max(rest, 0.05 * wide.prefill_s),
    }


@dataclass(frozen=True, slots=True)
class _Probe:
    plan: Any
    prefill_s: float
    decode_s: float  # a pass of one token


class _Passes:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def record(self, *stats: Record) -> None:
        self.steps += [one for one in stats if isinstance(one, StepStats)]


def _probe(
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    linear: str,
    rates: Rates,
    hidden: int,
    layers: int,
    prompt: int,
    **options: Any,
) -> _Probe:
    """A LLaMA of this width through the engine: a prompt some times over, the last with tokens after it."""
    from transformers import LlamaConfig

    from elsa_serve.offload.engine import OffloadEngine

    dim = min(128, max(8, hidden // 8))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, vocab_size=1024,
        num_attention_heads=hidden // dim, num_key_value_heads=hidden // dim, max_position_embeddings=1 << 17,
    )  # fmt: skip
    passes = _Passes()
    with tempfile.TemporaryDirectory(prefix="elsa-probe-") as folder:
        config.save_pretrained(folder)
        engine = OffloadEngine(
            folder, sink=passes, device=device, dtype=dtype, attention=attention, linear=linear, rates=rates,
            context=prompt + WARM_UP_TOKENS + DECODES + 2, max_batch=1, resident_layers=layers, load_format="dummy",
            prefix_caching=False, num_speculative_tokens=0, prefill_round_tokens=prompt, progress=False, **options,
        )  # fmt: skip
        try:
            # One to warm up; in the last, passes that warm decoding up, and those that are timed.
            for seed, count in enumerate((2, *[1] * (PROMPTS - 1), 1 + WARM_UP_TOKENS + DECODES)):
                tokens = torch.randint(1024, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
                sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
                if seed == 1:
                    passes.steps.clear()
                for _ in stream(engine, GenerationRequest(f"probe-{seed}", tokens, sampling)):
                    pass
        finally:
            engine.shutdown()
    prefill = [step.duration_s for step in passes.steps if step.prompt_tokens]
    decode = [step.duration_s for step in passes.steps if not step.prompt_tokens and step.generated_tokens == 1]
    return _Probe(engine.plan, statistics.median(prefill), statistics.median(decode[WARM_UP_TOKENS:]))
