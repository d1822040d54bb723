"""What a layer and a pass of the engine cost beyond bytes and FLOPs, from small random models that run through it."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from elsa_serve.errors import ElsaError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.predict import Share, device_seconds, small_seconds, whole_layers
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Record, StepStats

if TYPE_CHECKING:
    from elsa_serve.offload.measure import Sizes
    from elsa_serve.offload.plan import Geometry

WIDE = 4  # layers of the probe of a prompt's activations, all but the last of which its tokens pass whole
PROMPTS = 3  # that a probe is timed over, and DECODES passes
SHALLOW, DEEP = 2, 10  # layers of the other probes: their difference is a layer's issue, the rest is the pass's
SHORT = 64  # tokens of their prompts, on a CPU
LONG = 1024  # on a GPU: so many keys are attended by as many kernels as any larger number
DECODES = 12
WARM_UP_TOKENS = 3  # until a decode pass is replayed from its graph

logger = logging.getLogger(__name__)


def engine_rates(
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    linear: str,
    sizes: Sizes,
    rates: Rates,
    counted: Callable[[Geometry, int], float],
) -> dict[str, float]:
    """What a layer and a pass cost beyond bytes and FLOPs, from small models whose layers are all resident.

    `counted`: the seconds that a layer's products and attention of one query over so many keys take in a graph. Such
    small ones take longer than their bytes at the rates of large ones, and of a large layer are not the rest.
    """
    hidden, prompt, on_gpu = sizes.probe_hidden, sizes.probe_prompt, device.type == "cuda"
    short = LONG if on_gpu else SHORT

    def probe(hidden: int, layers: int, prompt: int, attention: str = attention, **options: Any) -> _Probe:
        return _probe(device, dtype, attention, linear, rates, hidden, layers, prompt, **options)

    try:
        wide = probe(hidden, WIDE, prompt, chunk_tokens=prompt)
        halves = probe(hidden, WIDE, prompt, chunk_tokens=prompt // 2)
        deep, flat = (probe(hidden // 4, layers, short, graphs=False) for layers in (DEEP, SHALLOW))
        deep_graph, flat_graph = deep, flat
        if on_gpu:
            # The small kernels are the same with any attention; what no graph holds would be timed with its issue.
            name = attention if attention in attentions.IN_GRAPHS else "elsa"
            deep_graph, flat_graph = (probe(hidden // 4, layers, short, name) for layers in (DEEP, SHALLOW))
        known = counted(flat_graph.plan.geometry, short)
    except (ElsaError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("the engine's own share of a pass cannot be measured (%s): it is assumed", error)
        return {}
    layer_s = max(1e-6, (deep.decode_s - flat.decode_s) / (DEEP - SHALLOW))
    in_graph = (deep_graph.decode_s - flat_graph.decode_s) / (DEEP - SHALLOW)
    found: dict[str, Any] = {
        "layer_s": layer_s,
        "pass_s": max(1e-6, flat.decode_s - SHALLOW * layer_s),
        "graph_layer_s": max(1e-6, in_graph - known),
        "graph_pass_s": max(1e-6, flat_graph.decode_s - SHALLOW * in_graph),
        "chunk_s": max(1e-6, (halves.prefill_s - wide.prefill_s) / WIDE),
    }
    return found | {"activations": _activations(wide, replace(rates, **found), prompt, on_gpu)}


def _activations(probe: _Probe, rates: Rates, prompt: int, on_gpu: bool) -> float:
    """Bytes per second: what is left of a prompt's time besides all that is counted elsewhere. A long prompt has some
    fifty times the activations of the probe's, so what is not theirs must not be taken for it."""
    geometry = probe.plan.geometry
    rest = probe.prefill_s - device_seconds(geometry, replace(rates, activations=math.inf), [Share(0, prompt)], on_gpu)
    rest -= rates.pass_s + (small_seconds(geometry.layers, rates, 1) if on_gpu else geometry.layers * rates.layer_s)
    # Never less than a twentieth of the prefill: rates measured a moment apart may leave nothing of it.
    nbytes = geometry.activation_bytes() * whole_layers(geometry, prompt, on_gpu) * prompt
    return nbytes / max(rest, 0.05 * probe.prefill_s)


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
