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
from elsa_serve.offload.geometry import Geometry, whole_waves
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.predict import Share, device_seconds
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Steps

if TYPE_CHECKING:
    from elsa_serve.offload.measure import Sizes

WIDE = 4  # layers of the probe of a prompt's activations, of which those between the first and the last are timed
PROMPTS = 3  # that a probe is timed over, behind one to warm up, and DECODES passes, or ISSUED
# Of prompts in one chunk and in two, behind one of either to warm up: a device that slows down as it warms takes the
# same of both.
TURNS = (1, 2, 1, 2, 2, 1, 2, 1, 1, 2)
DEEP = 10  # layers of the other probes; from graphs, which have no hooks, beside one of SHALLOW layers
SHALLOW = 2
SHORT = 64  # tokens of their prompts, on a CPU
LONG = 1024  # on a GPU: so many keys are attended by as many kernels as any larger number
DECODES = 12
# Where Python is timed: a second or more of it. A core of a shared host runs it 1.5 to 2 times slower for some tenths.
ISSUED = 120
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
    if on_gpu:  # both halves as chunks are planned
        prompt = 2 * whole_waves(prompt // 2, hidden // _head_dim(hidden), rates.multiprocessors)

    def probe(hidden: int, layers: int, prompt: int, attention: str = attention, **options: Any) -> _Probe:
        return _probe(device, dtype, attention, linear, rates, hidden, layers, prompt, **options)

    try:
        wide = probe(hidden, WIDE, prompt, decodes=0, halves=True, graphs=False)
        deep = probe(hidden // 4, DEEP, short, decodes=ISSUED, graphs=False)
        graph_layer_s, graph_pass_s = deep.decode_layer_s, deep.decode_rest_s
        if on_gpu:
            # The small kernels are the same with any attention; what no graph holds would be timed with its issue.
            name = attention if attention in attentions.IN_GRAPHS else "elsa"
            deep_graph, flat_graph = (probe(hidden // 4, layers, short, name) for layers in (DEEP, SHALLOW))
            graph_layer_s = (deep_graph.decode_s - flat_graph.decode_s) / (DEEP - SHALLOW)
            graph_pass_s = flat_graph.decode_s - SHALLOW * graph_layer_s
        known = counted(deep.plan.geometry, short)
    except (ElsaError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("the engine's own share of a pass cannot be measured (%s): it is assumed", error)
        return {}
    found: dict[str, Any] = {
        "layer_s": deep.decode_layer_s,
        "pass_s": deep.decode_rest_s,
        "graph_layer_s": graph_layer_s - known,
        "graph_pass_s": graph_pass_s,
        "chunk_s": wide.half_s,
    }
    found = {name: max(1e-6, seconds) for name, seconds in found.items()}
    return found | {"activations": _activations(wide, replace(rates, **found), prompt, on_gpu)}


def _activations(probe: _Probe, rates: Rates, prompt: int, on_gpu: bool) -> float:
    """Bytes per second: what is left of a layer's time besides all that is counted elsewhere."""
    geometry, counted = probe.plan.geometry, replace(rates, activations=math.inf)
    rest = probe.prompt_layer_s - device_seconds(geometry, counted, [Share(0, prompt)]) / geometry.layers
    rest -= rates.graph_layer_s if on_gpu else rates.layer_s
    # Never less than a twentieth of the time: rates measured a moment apart may leave nothing of it.
    return geometry.activation_bytes() * prompt / max(rest, 0.05 * probe.prompt_layer_s)


def _head_dim(hidden: int) -> int:
    return min(128, max(8, hidden // 8))


@dataclass(frozen=True, slots=True)
class _Probe:
    plan: Any
    prompt_layer_s: float = math.nan  # of a layer that a prompt passes whole; where graphs are, layers are not timed
    half_s: float = math.nan  # what it takes more where the prompt passes in halves
    decode_s: float = math.nan  # of a pass of one token
    decode_layer_s: float = math.nan  # of a layer's issue in it
    decode_rest_s: float = math.nan  # of such a pass without its layers


class _LayerTimes:
    """Seconds from the first layer's end to that of the last but one, pass by pass, as one layer's.

    Of a prompt by the device's own clock: what Python takes before the first layer changes from minute to minute on a
    shared host. Of other passes by the host's, which is Python's share. The last layer waits for the device, and
    computes one token alone.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], prompt: int, on_gpu: bool) -> None:
        self._layers, self._prompt, self._on_gpu = len(layers), prompt, on_gpu
        self._prompt_ends: list[Any] = []
        self._decode_ends: list[Any] = []
        for layer in layers:
            layer.register_forward_hook(self._passed)

    def _passed(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        if inputs[0].shape[1] != self._prompt:
            self._decode_ends.append(time.perf_counter())
        elif self._on_gpu:
            self._prompt_ends.append(torch.cuda.Event(enable_timing=True))
            self._prompt_ends[-1].record()
        else:
            self._prompt_ends.append(time.perf_counter())

    def prompts(self) -> list[float]:
        return self._per_layer(self._prompt_ends)

    def decodes(self) -> list[float]:
        return self._per_layer(self._decode_ends)

    def _per_layer(self, ends: Sequence[Any]) -> list[float]:
        between = self._layers - 2
        firsts = range(0, len(ends), self._layers)
        return [_elapsed(ends[i], ends[i + between]) / between for i in firsts]


def _elapsed(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3


def _probe(
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    linear: str,
    rates: Rates,
    hidden: int,
    layers: int,
    prompt: int,
    decodes: int = DECODES,
    halves: bool = False,
    graphs: bool = True,
    **options: Any,
) -> _Probe:
    """A LLaMA of this width through the engine: a prompt some times over, the last with tokens after it.

    `halves`: also in two chunks, taking turns.
    """
    from transformers import LlamaConfig

    from elsa_serve.offload.engine import OffloadEngine

    dim = _head_dim(hidden)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, vocab_size=1024,
        num_attention_heads=hidden // dim, num_key_value_heads=hidden // dim, max_position_embeddings=1 << 17,
    )  # fmt: skip
    steps = Steps()
    warm = WARM_UP_TOKENS + decodes if decodes else 0
    turns = TURNS if halves else (1,) * (1 + PROMPTS)  # chunks of each prompt
    with tempfile.TemporaryDirectory(prefix="elsa-probe-") as folder:
        config.save_pretrained(folder)
        engine = OffloadEngine(
            folder, sink=steps, device=device, dtype=dtype, attention=attention, linear=linear, rates=rates,
            context=prompt + warm + 2, max_batch=1, resident_layers=layers, load_format="dummy",
            prefix_caching=False, num_speculative_tokens=0, prefill_round_tokens=prompt, progress=False,
            graphs=graphs, chunk_tokens=prompt if halves else None, **options,
        )  # fmt: skip
        times = _LayerTimes(engine.decoder_layers, prompt, device.type == "cuda") if not graphs else None
        try:
            # One to warm up; in the last, passes that warm decoding up, and those that are timed.
            for seed, count in enumerate((1 + min(1, decodes), *[1] * (len(turns) - 2), 1 + warm)):
                if halves:
                    engine.use_chunks(prompt // turns[seed])
                tokens = torch.randint(1024, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
                sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
                for _ in stream(engine, GenerationRequest(f"probe-{seed}", tokens, sampling)):
                    pass
        finally:
            engine.shutdown()
    found = {}
    if decodes:
        passes = [one.duration_s for one in steps.passes if not one.prompt_tokens and one.generated_tokens == 1]
        passes = passes[-decodes:]
        found["decode_s"] = statistics.median(passes)
    if times is not None:
        whole_s, half_s = ([s for s, n in zip(times.prompts(), turns) if n == chunks][1:] for chunks in (1, 2))
        found["prompt_layer_s"] = statistics.median(whole_s)
        if halves:
            found["half_s"] = statistics.fmean(half_s) - statistics.fmean(whole_s)
        if decodes:
            a_layer = times.decodes()[-decodes:]
            found["decode_layer_s"] = statistics.median(a_layer)
            found["decode_rest_s"] = statistics.median(s - layers * one for s, one in zip(passes, a_layer))
    return _Probe(engine.plan, **found)
