"""Both sides of an A/B as engines of this process that share one copy of the weights.

For models whose weights fill most of the host's memory, where two servers cannot both hold them, and for machines
without the server's packages. Sides that differ in nothing but their attention are one engine whose attention changes
between requests: same memory, same plan, same copies. Others are built and freed turn about, each with the whole
budget. Either way a side's first request follows a short warm-up that no metric sees. There is no HTTP in the times;
/metrics is served all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import start_http_server

from elsa_load.pages import Page
from elsa_load.records import Observation, Request
from elsa_serve.metrics import Metrics
from elsa_serve.protocol import Engine, GenerationRequest, SamplingParams, stream
from elsa_serve.stats import EngineStarted, MetricsSink, NullSink, Record

WARM_UP_TOKENS = 3  # generated, after a prompt of two chunks and one token


class Gate:
    """Passes records to one of several sinks, or to none: warm-ups leave no trace."""

    def __init__(self) -> None:
        self.sink: MetricsSink = NullSink()

    def record(self, *stats: Record) -> None:
        self.sink.record(*stats)


class Switch:
    """Holds the one live engine.

    `build` makes the engine of a side with the sink it is given. With `change`, one engine is built for all sides, and
    made a side's in place.
    """

    def __init__(
        self,
        build: Callable[[str, MetricsSink], Engine],
        names: tuple[str, ...],
        change: Callable[[Any, str], None] | None = None,
    ) -> None:
        self._build, self._change = build, change
        self.metrics = {name: Metrics() for name in names}
        self._gate = Gate()
        self._engine: Any = None
        self._side: str | None = None
        self._warm: set[str] = set()

    def engine(self, name: str, prompt: list[int]) -> Engine:
        """The warm engine of a side; the other side's is shut down first, or becomes it."""
        if self._side != name:
            self._gate.sink = NullSink()
            self._take(name)
            self._side = name
            if name not in self._warm:
                self._warm_up(prompt)
                self._warm.add(name)
            self._gate.sink = self.metrics[name]
            info = self._engine.info
            self._gate.record(EngineStarted(info.name, info.dtype, info.attention, info.max_context, 0.0))
        return self._engine

    def _take(self, name: str) -> None:
        if self._engine is None or self._change is None:
            self.close()
            self._engine = self._build(name, self._gate)
        if self._change is not None:
            self._change(self._engine, name)

    def _warm_up(self, prompt: list[int]) -> None:
        size = 2 * self._engine.plan.chunk_tokens + 1
        sampling = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        for _ in stream(self._engine, GenerationRequest("warm-up", prompt[:size], sampling)):
            pass

    def close(self) -> None:
        self._gate.sink = NullSink()
        self._side = None
        self._warm.clear()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.shutdown()


class EngineSide:
    """One side of the switch and the page of its metrics."""

    def __init__(self, name: str, switch: Switch) -> None:
        self._name, self._switch = name, switch
        self._server, self._thread = start_http_server(0, "127.0.0.1", registry=switch.metrics[name].registry)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    async def run(self, request: Request) -> Observation:
        return await asyncio.to_thread(self._run, request)

    def _run(self, request: Request) -> Observation:
        prompt: Any = request.prompt
        return observe(self._switch.engine(self._name, prompt), request)

    async def page(self) -> Page:
        return Page.parse(self._switch.metrics[self._name].exposition().decode())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def observe(engine: Engine, request: Request) -> Observation:
    """Run a request of token ids on an engine. The observation's text is the generated ids, for comparison."""
    prompt: Any = request.prompt
    sampling = SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=request.ignore_eos)
    seen = Observation(request.id, sent_s=0.0, prompt_tokens=len(prompt), exact_tokens=True)
    ids = []
    start = time.perf_counter()
    for event in stream(engine, GenerationRequest(request.id, prompt, sampling)):
        seen.e2e_s = time.perf_counter() - start
        if event.token_id is not None:
            seen.arrivals.append((seen.e2e_s, 1.0))
            ids.append(event.token_id)
        if event.finish_reason in ("cancelled", "timeout", "error"):
            seen.outcome, seen.error = "error", event.error or event.finish_reason
    seen.output_tokens = seen.chunks = len(ids)
    seen.text = " ".join(map(str, ids))
    if seen.arrivals:
        seen.ttft_s = seen.arrivals[0][0]
        seen.decode_s = seen.arrivals[-1][0] - seen.ttft_s
    return seen


def one_engine_does(options: dict[str, dict[str, Any]]) -> bool:
    """Whether the sides differ in their attention alone, and the second to see a prompt finds nothing of the first."""
    if any(one["prefix_caching"] for one in options.values()):
        return False
    rest = [{key: value for key, value in one.items() if key != "attention"} for one in options.values()]
    return all(one == rest[0] for one in rest)


@contextmanager
def engine_sides(model: Path, options: dict[str, dict[str, Any]]) -> Iterator[dict[str, EngineSide]]:
    """Sides by name, from the options of each (`EngineOptions`), which load the same weights in the same form.

    The weights are loaded once, all into host memory. Yields the sides; frees everything at the end.
    """
    from elsa_serve.offload import attention as attentions
    from elsa_serve.offload.engine import OffloadEngine
    from elsa_serve.offload.loading import DTYPES
    from elsa_serve.offload.machine import assumed_rates, choose_device, host_memory
    from elsa_serve.offload.split import split_linears
    from elsa_serve.offload.weights import load_model

    first = next(iter(options.values()))
    attentions.register()
    weights = load_model(
        model,
        dtype=DTYPES.get(first["dtype"], "auto"),  # type: ignore[arg-type]
        device=choose_device(first["device"]),
        load_format=first["load_format"],
        attn_implementation=attentions.NAME,
    )
    if first["linear"] == "elsa":
        split_linears(weights, progress=False)

    shared = one_engine_does(options)

    def build(name: str, sink: MetricsSink) -> Engine:
        # The plan of a shared engine is the last side's, the candidate's, whichever comes first.
        chosen = options[list(options)[-1] if shared else name]
        # The weights are no longer part of what is free, so they are added to what may be planned with.
        host = chosen["host_memory"] or int(0.9 * host_memory().available) + weights.store.nbytes
        # Rates are measured for what they decide; with everything decided, they would only cost seconds.
        decided = all(chosen[key] is not None for key in ("resident_layers", "slots", "chunk_tokens"))
        rates = assumed_rates(weights.dtype) if decided else None
        # Every prompt is new, so cached KV would only be moved out of the next one's way.
        fixed = {"host_memory": host, "rates": rates, "prefix_caching": False}
        return OffloadEngine(model, sink=sink, weights=weights, **chosen | fixed)

    def change(engine: Any, name: str) -> None:
        engine.use_attention(options[name]["attention"])

    switch = Switch(build, tuple(options), change if shared else None)
    sides: dict[str, EngineSide] = {}
    try:
        for name in options:
            sides[name] = EngineSide(name, switch)
        yield sides
    finally:
        switch.close()
        for side in sides.values():
            side.close()
        weights.close()
