"""Who is in the next pass: first come, first served; requests join and leave between passes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from elsa_serve.errors import QueueFull
from elsa_serve.offload.kv import KVPool, RequestKV
from elsa_serve.offload.output import OutputText
from elsa_serve.offload.sampling import Sampler
from elsa_serve.protocol import Event, GenerationRequest

Ending = Literal["cancelled", "timeout"]


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine. Times are of time.monotonic()."""

    request: GenerationRequest
    on_event: Callable[[Event], None]
    sampler: Sampler
    output: OutputText
    received: float
    cancelled: bool = False  # set from any thread
    kv: RequestKV | None = None  # None while waiting
    generated: list[int] = field(default_factory=list)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def capacity(self) -> int:
        """Tokens its KV must hold: the last token that it generates is never fed back."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens - 1

    @property
    def prefilling(self) -> bool:
        return not self.generated

    def next_tokens(self) -> list[int]:
        """What the next pass feeds: the prompt, then the last token."""
        return [self.generated[-1]] if self.generated else list(self.request.prompt_token_ids)

    def ending(self) -> Ending | None:
        """Why the request should stop now, if it should."""
        if self.cancelled:
            return "cancelled"
        limit = self.request.deadline_s
        return "timeout" if limit is not None and time.monotonic() - self.received > limit else None

    def given_up(self) -> bool:
        return self.ending() is not None


class Scheduler:
    """The waiting queue and the running set. Thread-safe; only the engine's thread moves sequences on."""

    def __init__(self, pool: KVPool, *, max_batch: int, max_queue: int, pass_tokens: int) -> None:
        """`pass_tokens` bounds the prompt tokens that share a pass; a longer prompt has a pass of its own."""
        self._pool = pool
        self._max_batch, self._max_queue, self._pass_tokens = max_batch, max_queue, pass_tokens
        self._lock = threading.RLock()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._seconds_per_request: float | None = None
        self._last_end: float | None = None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, with the time one place takes to come free, as measured."""
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait, and the queue holds {self._max_queue}: try again later",
                    retry_after_s=self.retry_after_s(),
                )
            self._by_id[sequence.request.request_id] = sequence
            self._waiting.append(sequence)

    def __contains__(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._by_id

    def cancel(self, request_id: str) -> bool:
        with self._lock:
            sequence = self._by_id.get(request_id)
            if sequence is not None:
                sequence.cancelled = True
            return sequence is not None

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into the running set, in order, as far as batch, pass and KV memory allow.

        The head of the queue blocks those behind it, so a long prompt is never overtaken for ever.
        """
        admitted: list[Sequence] = []
        with self._lock:
            tokens = 0
            while self._waiting and len(self._running) < self._max_batch:
                head = self._waiting[0]
                size = len(head.request.prompt_token_ids)
                if admitted and tokens + size > self._pass_tokens:
                    break
                kv = self._pool.allocate(head.capacity)
                if kv is None:
                    break
                head.kv, head.admitted = kv, time.monotonic()
                tokens += size
                self._running.append(self._waiting.popleft())
                admitted.append(head)
        return admitted

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its KV back."""
        with self._lock:
            if sequence in self._running:
                self._running.remove(sequence)
                self._measure()
            else:
                self._waiting.remove(sequence)
            del self._by_id[sequence.request.request_id]
            if sequence.kv is not None:
                self._pool.free(sequence.kv)
                sequence.kv = None

    def _measure(self) -> None:
        """The smoothed time between two ends while the engine was busy."""
        now = time.monotonic()
        if self._last_end is not None:
            gap = now - self._last_end
            old = self._seconds_per_request
            self._seconds_per_request = gap if old is None else 0.8 * old + 0.2 * gap
        # The gap to the next end says something about the engine's speed only while it has work.
        self._last_end = now if self._running or self._waiting else None

    def retry_after_s(self) -> float:
        return max(1.0, self._seconds_per_request or 1.0)

    def waiting(self) -> list[Sequence]:
        with self._lock:
            return list(self._waiting)

    def running(self) -> list[Sequence]:
        with self._lock:
            return list(self._running)

    def idle(self) -> bool:
        with self._lock:
            return not self._by_id

    def counts(self) -> tuple[int, int, int]:
        """(running in prefill, running in decode, waiting), taken together."""
        with self._lock:
            prefill = sum(sequence.prefilling for sequence in self._running)
            return prefill, len(self._running) - prefill, len(self._waiting)

    def pending_prefill_tokens(self) -> int:
        """Prompt tokens of waiting and prefilling sequences."""
        with self._lock:
            pending = [*self._waiting, *(s for s in self._running if s.prefilling)]
            return sum(len(s.request.prompt_token_ids) for s in pending)
