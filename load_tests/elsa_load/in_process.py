"""Both sides of an A/B as engines of this process that share one copy of the weights.

For models whose weights fill most of the host's memory, where two servers cannot both hold them, and for machines
without the server's packages. One engine lives at a time and gets the whole budget; changing sides frees it and builds
the other, with a short warm-up that no metric sees. There is no HTTP in the times; /metrics is served all the same.
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
from elsa_serve.stats import EngineStarted, MetricsSink, Record

WARM_UP_TOKENS = 3  # generated, after a prompt of two chunks and one token


class Gate:
    """A sink that can be shut, so that warm-ups leave no trace."""

    def __init__(self, sink: MetricsSink) -> None:
        self.sink, self.open = sink, False

    def record(self, *stats: Record) -> None:
        if self.open:
            self.sink.record(*stats)


class Switch:
    """Holds the one live engine. `build` makes the engine of a side with the sink it is given."""

    def __init__(self, build: Callable[[str, MetricsSink], Engine], names: tuple[str, ...]) -> None:
        self._build = build
        self.metrics = {name: Metrics() for name in names}
        self._gates = {name: Gate(metrics) for name, metrics in self.metrics.items()}
        self._live: tuple[str, Engine] | None = None

    def engine(self, name: str, prompt: list[int]) -> Engine:
        """The warm engine of a side; the other side's is shut down first."""
        if self._live is not None and self._live[0] == name:
            return self._live[1]
        self.close()
        gate = self._gates[name]
        gate.open = False
        engine = self._build(name, gate)
        self._live = (name, engine)
        sampling = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        for _ in stream(engine, GenerationRequest("warm-up", prompt[: self._warm_up_size(engine)], sampling)):
            pass
        gate.open = True
        info = engine.info
        gate.record(EngineStarted(info.name, info.dtype, info.attention, info.max_context, 0.0))
        return engine

    @staticmethod
    def _warm_up_size(engine: Any) -> int:
        return 2 * engine.plan.chunk_tokens + 1

    def close(self) -> None:
        if self._live is not None:
            name, engine = self._live
            self._gates[name].open = False
            self._live = None
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


@contextmanager
def engine_sides(model: Path, options: dict[str, dict[str, Any]]) -> Iterator[dict[str, EngineSide]]:
    """Sides by name, from the options of each (`EngineOptions`); dtype, device and load format must be the same.

    The weights are loaded once, all into host memory. Yields the sides; frees everything at the end.
    """
    from elsa_serve.offload import attention as attentions
    from elsa_serve.offload.engine import OffloadEngine
    from elsa_serve.offload.loading import DTYPES
    from elsa_serve.offload.machine import choose_device, host_memory
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

    def build(name: str, sink: MetricsSink) -> Engine:
        chosen = options[name]
        # The weights are no longer part of what is free, so they are added to what may be planned with.
        host = chosen["host_memory"] or int(0.9 * host_memory().available) + weights.store.nbytes
        return OffloadEngine(model, sink=sink, weights=weights, **chosen | {"host_memory": host})

    switch = Switch(build, tuple(options))
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
