"""Our HTTP server over an engine of fixed timings: `timed_server.py PREFILL_S_PER_TOKEN DECODE_S PORT:SLOWDOWN …`.

The engine takes one request at a time, waits PREFILL_S_PER_TOKEN × SLOWDOWN for every prompt token and DECODE_S ×
SLOWDOWN for every token after the first, and reports its times as the real one does. SLOWDOWN 1.2 plants 20 %.

Several PORT:SLOWDOWN are several servers in one process. On a busy machine two processes of one program do not get the
same share of it, as long as they live, and a null comparison of them would find that.
"""

from __future__ import annotations

import socket
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
        text = "".join(message["content"] for message in conversation)
        return self.encode(text) if kwargs.get("tokenize", True) else text


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


def serve(listener: socket.socket, prefill_s: float, decode_s: float) -> None:
    metrics = Metrics()
    engine = TimedEngine(prefill_s, decode_s, metrics)
    metrics.record(EngineStarted("timed", "float32", "elsa", 1 << 20, 0.0))
    with listener:
        make_server(engine, Settings(drain_timeout_s=1.0), metrics).run(sockets=[listener])


def main(prefill_s: float, decode_s: float, servers: list[tuple[int, float]]) -> None:
    """The first server has the main thread, which signals come to; the others end with it."""
    # All ports listen before the first server says that it is ready.
    calls = [(bind("127.0.0.1", port), prefill_s * slowdown, decode_s * slowdown) for port, slowdown in servers]
    for call in calls[1:]:
        threading.Thread(target=serve, args=call, daemon=True).start()
    serve(*calls[0])


if __name__ == "__main__":
    pairs = [word.split(":") for word in sys.argv[3:]]
    main(float(sys.argv[1]), float(sys.argv[2]), [(int(port), float(slowdown)) for port, slowdown in pairs])
