"""The sequences of one HTTP request on the engine, and their events on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from elsa_serve.protocol import Engine, Event, GenerationRequest, PrefillProgress, TokenEvent
from elsa_serve.stats import CancelLatency, ClientDisconnected, MetricsSink
from elsa_server.errors import ApiError


class Generation:
    """Submits requests, turns the engine's callbacks into one asynchronous stream, and aborts what is left.

    The engine calls back on its own thread; `call_soon_threadsafe` brings each event over. Everything else here runs on
    the event loop.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], metrics: MetricsSink) -> None:
        self._engine, self._requests, self._metrics = engine, requests, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._unfinished = set(range(len(requests)))
        self._submitted = 0
        self._aborted_at: float | None = None
        self._seen_prefill = self._seen_token = False
        self.on_progress: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Submit all sequences, or none: one refused aborts those before it. Raises what submit raises."""
        try:
            await asyncio.to_thread(self._submit_all)  # it reads every token id, and may wait for the engine's lock
        except BaseException:
            self._unfinished.intersection_update(range(self._submitted))
            self.abort()
            if not self._unfinished:
                self.on_end()
            raise

    def _submit_all(self) -> None:
        for index, request in enumerate(self._requests):
            self._engine.submit(request, self._callback(index))
            self._submitted += 1

    def _callback(self, index: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._arrive, index, event)
            except RuntimeError:  # the loop is closed: the server has gone, and nobody waits for this event
                if not self._loop.is_closed():
                    raise

        return on_event

    def _arrive(self, index: int, event: Event) -> None:
        self.on_progress()
        if isinstance(event, PrefillProgress):
            self._seen_prefill = True
        else:
            self._seen_token |= event.token_id is not None
            if event.finish_reason is not None:
                self._unfinished.discard(index)
                if self._aborted_at is not None:
                    self._metrics.record(CancelLatency(time.monotonic() - self._aborted_at))
        self._queue.put_nowait((index, event))
        if not self._unfinished:
            self.on_end()

    async def events(self, silence_s: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(sequence, event) as they come, to the end of the last sequence; None after each `silence_s` without any.

        Raises ApiError when the server interrupts the request.
        """
        open_sequences = len(self._requests)
        while open_sequences:
            if self._queue.empty():
                try:
                    item = await asyncio.wait_for(self._queue.get(), silence_s)
                except TimeoutError:
                    yield None
                    continue
            else:
                item = self._queue.get_nowait()
            if isinstance(item, ApiError):
                raise item
            if isinstance(item[1], TokenEvent) and item[1].finish_reason is not None:
                open_sequences -= 1
            yield item

    def abort(self) -> None:
        """Stop every sequence that has not ended, in whatever phase it is. Idempotent."""
        if self._unfinished and self._aborted_at is None:
            self._aborted_at = time.monotonic()
            for index in tuple(self._unfinished):
                self._engine.abort(self._requests[index].request_id)

    def disconnected(self) -> None:
        """The client has gone: count it under the phase it left in, and abort."""
        if self._unfinished:
            phase = "decode" if self._seen_token else "prefill" if self._seen_prefill else "queue"
            self._metrics.record(ClientDisconnected(phase))  # type: ignore[arg-type]
        self.abort()

    def interrupt(self, error: ApiError) -> None:
        """End the stream with `error` at once, even when the engine does not answer."""
        self.abort()
        self._queue.put_nowait(error)
