"""What is sent and what comes back: plain records that go to JSON and return from it unchanged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Prompt = str | list[int] | list[dict[str, str]]  # text, token ids, or the messages of a chat
Outcome = Literal["ok", "cancelled", "rejected", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One call, fixed before the run starts. Times are seconds.

    `at_s`: when an open scenario sends it, since the start of the run; None: when a closed one has room. Requests of a
    `session` run one after the other, by `turn`. `cancel_after_s`: the client hangs up that long after sending.
    `expected` is a text that a right answer holds.
    """

    id: str
    prompt: Prompt
    prompt_tokens: int
    max_tokens: int
    at_s: float | None = None
    session: int | None = None
    turn: int = 0
    cancel_after_s: float | None = None
    expected: str | None = None
    ignore_eos: bool = False

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)

    def body(self, model: str, *, logprobs: bool = False, continuous_usage: bool = False) -> dict[str, Any]:
        """The JSON of a streamed call, greedy. `ignore_eos`, known to vLLM and to us, is sent only where it is set."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if continuous_usage:
            body["stream_options"]["continuous_usage_stats"] = True
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.is_chat:
            return body | {"messages": self.prompt} | ({"logprobs": True} if logprobs else {})
        return body | {"prompt": self.prompt} | ({"logprobs": 0} if logprobs else {})


@dataclass(slots=True)
class Observation:
    """What became of a request. `sent_s` counts from the start of the run, the other times from the sending.

    `arrivals` holds (seconds, tokens) of every network event that brought tokens: tokens are fractions where the
    endpoint tells only how many there were in all (`exact_tokens` False). `attempts` counts retries too.
    """

    id: str
    sent_s: float
    outcome: Outcome = "ok"
    due_s: float | None = None
    status: int | None = None
    error: str | None = None
    ttft_s: float | None = None
    decode_s: float | None = None
    e2e_s: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int = 0
    chunks: int = 0
    exact_tokens: bool = False
    text: str = ""
    right: bool | None = None
    attempts: int = 1
    arrivals: list[tuple[float, float]] = field(default_factory=list)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first arrival; None with a single arrival."""
        tokens = sum(count for _, count in self.arrivals[1:])
        return self.decode_s / tokens if self.decode_s is not None and tokens else None

    def token_gaps(self) -> list[tuple[float, float]]:
        """(seconds a token, tokens): a chunk of k tokens after a silence of s seconds gives k latencies of s / k."""
        pairs = zip(self.arrivals, self.arrivals[1:])
        return [((after - before) / count, count) for (before, _), (after, count) in pairs]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
