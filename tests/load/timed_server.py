"""Our HTTP server over an engine of fixed timings: `python timed_server.py PORT PREFILL_S_PER_TOKEN DECODE_S SLOWDOWN`.

The engine takes one request at a time, waits PREFILL_S_PER_TOKEN × SLOWDOWN for every prompt token and DECODE_S ×
SLOWDOWN for every token after the first, and reports its times as the real one does. SLOWDOWN 1.2 plants 20 %.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from elsa_server.cli import bind
from elsa_server.running import make_server
from elsa_server.settings import Settings

from elsa_serve.metrics import Metrics
from elsa_serve.protocol import EngineStats, Event, GenerationRequest, ModelInfo, TokenEvent
from elsa_serve.stats import EngineStarted, Gauges, MetricsSink, RequestFinished, RequestReceived, StepStats


class BytesTokenizer:
    eos_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(i % 256 for i in token_ids).decode(errors="replace")

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        return self.encode("".join(message["content"] for message in conversation))


class TimedEngine:
    def __init__(self, prefill_s: float, decode_s: float, sink: MetricsSink) -> None:
        self.info = ModelInfo("timed", 1 << 20, vocab_size=1 << 20, created=1, dtype="float32", attention="elsa")
        self.tokenizer = BytesTokenizer()
        self.prefill_s, self.decode_s, self.sink = prefill_s, decode_s, sink
        self.turn, self.waiting = threading.Lock(), 0
        self.aborted: set[str] = set()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        self.sink.record(RequestReceived(request.endpoint))
        self._count(1)
        threading.Thread(target=self._run, args=(request, on_event), daemon=True).start()

    def _count(self, change: int) -> None:
        self.waiting += change
        self.sink.record(Gauges(0, self.waiting, 0, 0))

    def _run(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        arrival = time.perf_counter()
        with self.turn:
            start = first = time.perf_counter()
            moment, made = start, 0
            prompt = request.prompt_token_ids
            for made in range(1, request.sampling.max_tokens + 1):
                moment += self.decode_s if made > 1 else self.prefill_s * len(prompt)
                time.sleep(max(0.0, moment - time.perf_counter()))
                if request.request_id in self.aborted:
                    break
                first = time.perf_counter() if made == 1 else first
                phase: Any = "prefill" if made == 1 else "decode"
                self.sink.record(StepStats(phase, 0.001, len(prompt) if made == 1 else 0, 1, "elsa"))
                on_event(TokenEvent(request.request_id, 97 + made % 26, chr(97 + (len(prompt) + made) % 26)))
            end = time.perf_counter()
        outcome: Any = "cancelled" if request.request_id in self.aborted else "length"
        times = (start - arrival, first - start, end - first, first - arrival, end - arrival)
        self._count(-1)
        self.sink.record(RequestFinished(request.endpoint, outcome, len(prompt), made, *times))
        on_event(TokenEvent(request.request_id, None, finish_reason=outcome))

    def abort(self, request_id: str) -> bool:
        self.aborted.add(request_id)
        return True

    def stats(self) -> EngineStats:
        return EngineStats("ready", self.waiting, 0, 0, {}, {}, None)

    def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        return None


def main(port: int, prefill_s: float, decode_s: float, slowdown: float) -> None:
    metrics = Metrics()
    engine = TimedEngine(prefill_s * slowdown, decode_s * slowdown, metrics)
    metrics.record(EngineStarted("timed", "float32", "elsa", 1 << 20, 0.0))
    with bind("127.0.0.1", port) as listener:
        make_server(engine, Settings(), metrics).run(sockets=[listener])


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
