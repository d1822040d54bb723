"""An engine of a few dozen lines for the server's tests: it answers with the words of the prompt, in order.

A token is a word with the space before it, so texts are easy to foresee. Words of the prompt steer it: `slow` makes
every token take 20 ms, `cached` makes all of the prompt but one word count as found in a cache, `hang` reports progress
and never gives a token, `fail` ends with an error after two tokens.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from elsa_serve.errors import EngineDraining, QueueFull
from elsa_serve.protocol import (
    EngineStats,
    Event,
    GenerationRequest,
    ModelInfo,
    PrefillProgress,
    TokenEvent,
    TokenLogprob,
)
from elsa_serve.stats import Gauges, MetricsSink, NullSink, RequestFinished, RequestReceived, RequestRejected, StepStats

OUTCOMES: dict[str, Any] = {"stop": "ok", "error": "server_error"}


class WordTokenizer:
    """Ids in order of first sight. Thread-safe."""

    eos_token_id: int | None = 0

    def __init__(self) -> None:
        self.words, self.ids, self.lock = ["<eos>"], {"<eos>": 0}, threading.Lock()
        self.encoded_chars = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        with self.lock:
            self.encoded_chars += len(text)
            for word in (words := re.findall(r"\s*\S+|\s+$", text)):
                if self.ids.setdefault(word, len(self.words)) == len(self.words):
                    self.words.append(word)
            return [self.ids[word] for word in words]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[i] if i < len(self.words) else f" <{i}>" for i in token_ids)

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> Any:
        """The messages' words, then variables as words; `goes-on` and `closed` where it does not open an answer."""
        if not any(message["role"] == "user" for message in conversation):
            raise ValueError("there must be a user message")
        words = [message["content"] for message in conversation] + [f"{k}={v}" for k, v in variables.items()]
        words += ["goes-on"] * continue_final_message + ["closed"] * (not add_generation_prompt)
        return " ".join(words)


class FakeEngine:
    def __init__(self, *, max_context: int = 1000, max_running: int = 100, sink: MetricsSink | None = None) -> None:
        self.info = ModelInfo("fake", max_context, vocab_size=10**6, created=1, dtype="float32", attention="elsa")
        self.tokenizer = WordTokenizer()
        self.sink, self.max_running = sink or NullSink(), max_running
        self.requests: list[GenerationRequest] = []
        self.live: dict[str, threading.Event] = {}
        self.state: Any = "ready"
        self.last_step: float | None = None
        self.lock = threading.RLock()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        with self.lock:
            if self.state == "draining" or len(self.live) >= self.max_running:
                draining = self.state == "draining"
                self.sink.record(RequestRejected(request.endpoint, "draining" if draining else "queue_full"))
                raise EngineDraining("shutting down") if draining else QueueFull("the queue is full", retry_after_s=0.4)
            self.live[request.request_id] = threading.Event()
            self.requests.append(request)
            self.sink.record(RequestReceived(request.endpoint))
            self._gauges()
        threading.Thread(target=self._run, args=(request, on_event), daemon=True).start()

    def _run(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        start, aborted, sampling = time.monotonic(), self.live[request.request_id], request.sampling
        words = self.tokenizer.decode(request.prompt_token_ids).split()
        size = len(words)
        on_event(PrefillProgress(request.request_id, size // 2, size))
        on_event(PrefillProgress(request.request_id, size, size))
        reason, error, count = "stop", None, 0
        if "hang" in words:
            ended = aborted.wait(request.deadline_s)
            reason = "cancelled" if ended else "timeout"
        else:
            for count, word in enumerate(words[: sampling.max_tokens], 1):
                if aborted.wait(0.02 if "slow" in words else 0):
                    reason, count = "cancelled", count - 1
                    break
                if "fail" in words and count == 3:
                    reason, error = "error", "RuntimeError: /secret/path"
                    break
                on_event(self._token(request, " " + word))
            else:
                reason = "length" if size >= sampling.max_tokens else "stop"
        self._finish(request, start, count, reason)
        found = size - 1 if "cached" in words else 0
        last = TokenEvent(request.request_id, None, finish_reason=reason, error=error, cached_tokens=found)  # type: ignore[arg-type]
        on_event(last)

    def _token(self, request: GenerationRequest, word: str) -> TokenEvent:
        (token,) = self.tokenizer.encode(word)
        wanted = request.sampling.logprobs
        chosen = None if wanted is None else TokenLogprob(token, word, -0.5)
        top = tuple(TokenLogprob(i, f" alt{i}", -1.0 - i) for i in range(wanted or 0))
        self.last_step = time.monotonic()
        self.sink.record(StepStats("decode", 0.001, 0, 1, "elsa"))
        return TokenEvent(request.request_id, token, word, chosen, top)

    def _finish(self, request: GenerationRequest, start: float, count: int, reason: str) -> None:
        with self.lock:
            del self.live[request.request_id]
            seconds = time.monotonic() - start
            outcome = OUTCOMES.get(reason, reason)
            tokens = len(request.prompt_token_ids)
            self.sink.record(RequestFinished(request.endpoint, outcome, tokens, count, 0, 0, seconds, 0, seconds))
            self._gauges()

    def _gauges(self) -> None:
        self.sink.record(Gauges(0, len(self.live), 0, 0, {"gpu": 1}, {"gpu": 2}))

    def abort(self, request_id: str) -> bool:
        aborted = self.live.get(request_id)
        if aborted is None:
            return False
        aborted.set()
        return True

    def stats(self) -> EngineStats:
        return EngineStats(self.state, len(self.live), 0, 0, {}, {}, self.last_step)

    def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        self.state = "draining"
        for aborted in tuple(self.live.values()):
            aborted.set()
