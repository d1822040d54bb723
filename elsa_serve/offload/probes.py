"""What a layer and a pass of the engine cost beyond bytes and FLOPs, from small random models that run through it."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from elsa_serve.errors import ElsaError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.predict import Share, device_seconds
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Record, StepStats

if TYPE_CHECKING:
    from elsa_serve.offload.geometry import Geometry
    from elsa_serve.offload.measure import Sizes

WIDE = 4  # layers of the probe of a prompt's activations, of which those between the first and the last are timed
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
        wide, halves = (
            probe(hidden, WIDE, prompt, timed=True, chunk_tokens=tokens, graphs=False)
            for tokens in (prompt, prompt // 2)
        )
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
        "chunk_s": max(1e-6, halves.prompt_layer_s - wide.prompt_layer_s),
    }
    return found | {"activations": _activations(wide, replace(rates, **found), prompt, on_gpu)}


def _activations(probe: _Probe, rates: Rates, prompt: int, on_gpu: bool) -> float:
    """Bytes per second: what is left of a layer's time besides all that is counted elsewhere."""
    geometry, counted = probe.plan.geometry, replace(rates, activations=math.inf)
    rest = probe.prompt_layer_s - device_seconds(geometry, counted, [Share(0, prompt)]) / geometry.layers
    rest -= rates.graph_layer_s if on_gpu else rates.layer_s
    # Never less than a twentieth of the time: rates measured a moment apart may leave nothing of it.
    return geometry.activation_bytes() * prompt / max(rest, 0.05 * probe.prompt_layer_s)


@dataclass(frozen=True, slots=True)
class _Probe:
    plan: Any
    decode_s: float  # a pass of one token
    prompt_layer_s: float = 0.0  # of a layer that a prompt passes whole, where that was timed


class _Passes:
    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def record(self, *stats: Record) -> None:
        self.steps += [one for one in stats if isinstance(one, StepStats)]


class _LayerTimes:
    """Seconds between the ends of layers that all tokens of a prompt have passed, by the device's own clock: what
    Python takes before the first of them changes from minute to minute on a shared host."""

    def __init__(self, layers: Sequence[torch.nn.Module], prompt: int, on_gpu: bool) -> None:
        self._layers, self._prompt, self._on_gpu = len(layers), prompt, on_gpu
        self._ends: list[Any] = []
        for layer in layers:
            layer.register_forward_hook(self._passed)

    def _passed(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        if inputs[0].shape[1] != self._prompt:
            return
        if self._on_gpu:
            self._ends.append(torch.cuda.Event(enable_timing=True))
            self._ends[-1].record()
        else:
            self._ends.append(time.perf_counter())

    def median(self) -> float:
        """Of the prompts behind the first. The last layer computes one token whole; the first may wait for Python."""
        whole = self._layers - 2
        firsts = range(self._layers, len(self._ends), self._layers)
        return statistics.median(self._between(self._ends[i], self._ends[i + whole]) / whole for i in firsts)

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3 if self._on_gpu else last - first


def _probe(
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    linear: str,
    rates: Rates,
    hidden: int,
    layers: int,
    prompt: int,
    timed: bool = False,
    **options: Any,
) -> _Probe:
    """A LLaMA of this width through the engine: a prompt some times over, the last with tokens after it.

    timed: the layers of its prompts, too, which no graph may hold then.
    """
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
        times = _LayerTimes(engine.decoder_layers, prompt, device.type == "cuda") if timed else None
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
    decode = [step.duration_s for step in passes.steps if not step.prompt_tokens and step.generated_tokens == 1]
    return _Probe(engine.plan, statistics.median(decode[WARM_UP_TOKENS:]), times.median() if times else 0.0)
