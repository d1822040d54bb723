"""Where the server stands between its start and its end: loading, ready, draining, stalled, failed."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from elsa_serve.errors import ElsaError
from elsa_serve.protocol import Engine, EngineState
from elsa_serve.stats import MetricsSink, ServerState
from elsa_server.errors import ApiError, retry_after
from elsa_server.generation import Generation
from elsa_server.settings import Settings

logger = logging.getLogger("elsa_server")

LOADING_RETRY_S = 5.0


class Lifecycle:
    """Owns the engine (or the future of one that still loads) and knows every open request.

    Not thread-safe: belongs to the event loop's thread, but for `engine_future`, which a loader completes.
    """

    def __init__(self, engine: Engine | Future[Engine], settings: Settings, metrics: MetricsSink) -> None:
        self.settings, self.metrics = settings, metrics
        if isinstance(engine, Future):
            self.engine_future = engine
        else:
            self.engine_future = Future()
            self.engine_future.set_result(engine)
        self.open_requests = 0
        self.generations: set[Generation] = set()
        self._busy_since = 0.0  # monotonic: when the first of the running generations was submitted
        self._last_event = 0.0
        self._drain_until: float | None = None

    # The engine, and whether it may be asked

    def engine(self) -> Engine:
        """The engine, when it accepts requests. Raises ApiError 503 with Retry-After while it does not."""
        state, detail = self.health()
        if state == "ready" or state == "stalled":  # a stalled engine may recover, and its queue is still bounded
            return self.engine_future.result()
        raise self.unavailable(state, detail)

    def loaded_engine(self) -> Engine | None:
        future = self.engine_future
        return future.result() if future.done() and future.exception() is None else None

    def unavailable(self, state: EngineState, detail: str) -> ApiError:
        wait = self.drain_left() + 1 if state == "draining" else LOADING_RETRY_S
        reason = "draining" if state == "draining" else "queue_full"
        return ApiError(503, detail, code=state, headers=retry_after(wait), reason=reason)  # type: ignore[arg-type]

    def health(self) -> tuple[EngineState, str]:
        """The state and a sentence on it. Costs one look at the engine's counters: no probe request is made."""
        if self._drain_until is not None:
            return "draining", f"The server is shutting down; {self.open_requests} requests are still open."
        if not self.engine_future.done():
            return "loading", "The model is still loading."
        error = self.engine_future.exception()
        if error is not None:
            return "failed", str(error) if isinstance(error, ElsaError) else "The engine failed to start."
        stats = self.engine_future.result().stats()
        if stats.state != "ready":
            return stats.state, stats.detail or f"The engine is {stats.state}."
        silent = time.monotonic() - max(stats.last_step_monotonic or 0.0, self._last_event, self._busy_since)
        if self.generations and silent > self.settings.stall_timeout_s:
            return (
                "stalled",
                f"{len(self.generations)} requests are open and the engine has been silent for {silent:.0f} s.",
            )
        return "ready", "ready"

    def record_state(self) -> None:
        """Tell the metrics what /readyz would answer; called when somebody looks at them."""
        self.metrics.record(ServerState(self.health()[0], self.open_requests))

    # Open requests

    def generation_started(self, generation: Generation) -> None:
        if not self.generations:
            self._busy_since = time.monotonic()
        self.generations.add(generation)

    def progressed(self) -> None:
        self._last_event = time.monotonic()

    def generation_ended(self, generation: Generation) -> None:
        self.generations.discard(generation)

    # The end

    def begin_drain(self) -> None:
        """From now on new requests are refused; a second call ends the patience for the open ones."""
        now = time.monotonic()
        again = self._drain_until is not None
        self._drain_until = now if again else now + self.settings.drain_timeout_s
        logger.info("draining: %d requests open, waiting up to %.0f s", self.open_requests, self.drain_left())

    def drain_left(self) -> float:
        return max(0.0, (self._drain_until or 0.0) - time.monotonic())

    def drained(self) -> bool:
        """Whether a drain was asked for and is over: nothing open, or out of time."""
        return self._drain_until is not None and (self.open_requests == 0 or self.drain_left() == 0)

    def interrupt_all(self) -> None:
        """End what is still running with an error its clients understand."""
        for generation in tuple(self.generations):
            message = "The server is shutting down and the answer is incomplete."
            generation.interrupt(ApiError(503, message, code="draining", headers=retry_after(LOADING_RETRY_S)))
