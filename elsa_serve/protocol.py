"""What a server needs of an engine: submit a request, receive its token events, abort it, read stats.

`elsa_serve.offload.engine.OffloadEngine` implements `Engine`; so does the fake of the server's tests. Events arrive by
callback on the engine's own thread and must not block; `stream` turns them into an iterator for synchronous callers.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from elsa_serve.errors import UsageError

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
EngineState = Literal["loading", "ready", "draining", "stalled", "failed"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off.

    `logit_bias` holds (token id, number added to its logit). `presence_penalty` is taken off the logit of every token
    generated before, `frequency_penalty` as often as it was; `repetition_penalty` divides positive logits of tokens in
    prompt and output, and multiplies negative ones. `stop_token_ids` end the text like the end-of-sequence ids, under
    `ignore_eos` too.

    `logprobs` asks for the chosen token's log-probability and those of that many best alternatives (0: the chosen
    one only). They are of the model's own distribution, before all of the above.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises UsageError for a value that cannot be sampled with."""
        for name, fits, remedy in (
            ("max_tokens", self.max_tokens >= 1, "at least 1 is needed"),
            ("temperature", 0 <= self.temperature < math.inf, "choose 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "choose more than 0, at most 1 (off)"),
            ("top_k", self.top_k >= 0, "choose 0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "choose 0 (off) to 1"),
            ("stop", all(self.stop), "an empty text would end every answer at once"),
            ("min_tokens", self.min_tokens >= 0, "choose 0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "choose more than 0; 1 is off"),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}: {remedy}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to continue. `deadline_s` bounds its whole life in seconds, queueing included."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    endpoint: str = "generate"
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, or the end of a request.

    `text` is what became printable with this token: empty while a multi-byte character is incomplete or a possible
    stop string is held back, and more than the token's own text when held text is released. A token that ends the text
    (end of sequence, `stop_token_ids`) has no text of its own and no log-probability. The last event of a request
    carries `finish_reason`; its `token_id` is None when it brings no token (cancelled, timeout, error).
    `cached_tokens`, of the last event alone, are those of the prompt that were found computed.
    """

    request_id: str
    token_id: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far the prompt of a request has come: layers × tokens done, of all (both in tokens, scaled by layers)."""

    request_id: str
    processed_tokens: int
    total_tokens: int


Event = TokenEvent | PrefillProgress


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    max_context: int  # tokens, prompt and output together
    vocab_size: int
    created: int  # seconds since the epoch
    dtype: str
    attention: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, cheap to take from any thread. Bytes and seconds; tiers are gpu and host."""

    state: EngineState
    running: int
    waiting: int
    pending_prefill_tokens: int
    kv_used_bytes: dict[str, int]
    kv_capacity_bytes: dict[str, int]
    last_step_monotonic: float | None  # time.monotonic() at the end of the last step, None before the first
    detail: str = ""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the server and the engine use."""

    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


class Engine(Protocol):
    """Thread-safe: every method may be called from any thread."""

    info: ModelInfo
    tokenizer: Tokenizer

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queue a request. Raises ContextTooLong, QueueFull, EngineDraining or EngineFailed (see elsa_serve.errors)."""
        ...

    def abort(self, request_id: str) -> bool:
        """Stop a request; its last event has finish_reason "cancelled". False if it is unknown or already finished."""
        ...

    def stats(self) -> EngineStats: ...

    def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for that long, cancel the rest, free everything. Idempotent."""
        ...


def stream(
    engine: Engine, request: GenerationRequest, on_progress: Callable[[PrefillProgress], None] = lambda _: None
) -> Iterator[TokenEvent]:
    """Submit and iterate the token events, to the one with a finish_reason. Closing the iterator early aborts.

    `on_progress` takes the events of the prompt, on the caller's thread.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    finished = False
    try:
        while not finished:
            event = events.get()
            if isinstance(event, TokenEvent):
                finished = event.finish_reason is not None
                yield event
            else:
                on_progress(event)
    finally:
        if not finished:
            engine.abort(request.request_id)
