"""A streaming client for any OpenAI-compatible endpoint that measures tokens, not chunks.

How many tokens a chunk carries is known in one of three ways (`counting`):

- "usage" (any endpoint): the final usage gives the total. As many chunks as tokens means one each, exactly; otherwise
  the total is spread evenly over the chunks, and the observation says `exact_tokens: false`.
- "logprobs": the endpoint lists the tokens of every chunk. Exact, at the price of computing log-probabilities.
- "continuous": `stream_options.continuous_usage_stats`, a vLLM extension: every chunk carries the count so far.

A time is taken when bytes arrive, before anything is parsed; bodies are encoded before the clock starts.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx

from elsa_load.records import Observation, Request
from elsa_load.sse import DONE, EventParser
from elsa_serve.errors import UsageError

Counting = Literal["usage", "logprobs", "continuous"]
OVERLOADED = (429, 503)
ERROR_CHARS = 300
SMALLEST_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go: `url` without /v1. `model` None: the first one the endpoint lists."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Prepared:
    """A request whose body is bytes already."""

    request: Request
    path: str
    body: bytes


class Client:
    """Use as an async context manager. `timeout_s` bounds the silence between two reads; None waits for ever.

    `patience_s`: how long a refused request (429, 503, no connection) is tried again; 0 reports the refusal.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        counting: Counting = "usage",
        timeout_s: float | None = None,
        patience_s: float = 0.0,
    ) -> None:
        self.endpoint, self.counting, self.patience_s = endpoint, counting, patience_s
        self.model = endpoint.model
        # No limit of connections: an open scenario must not queue in its own client. No proxy of the environment.
        self._http = httpx.AsyncClient(
            base_url=endpoint.url,
            headers=endpoint.headers(),
            timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        if self.model is None:
            self.model = await self._first_model()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None):
        await self._http.aclose()

    async def _first_model(self) -> str:
        answer = await self.get_json("/v1/models")
        try:
            return answer["data"][0]["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(f"{self.endpoint.url}/v1/models lists no model: name one with --model") from error

    async def get_json(self, path: str) -> Any:
        return self._json(path, await self._ask("GET", path))

    async def post_json(self, path: str, body: dict[str, Any]) -> Any:
        return self._json(path, await self._ask("POST", path, json=body))

    async def get_text(self, path: str) -> str:
        return (await self._ask("GET", path)).text

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise UsageError(f"{self.endpoint.url}{path}: {described(error)}; is the server up?") from error
        if response.status_code != 200:
            raise UsageError(
                f"{self.endpoint.url}{path} answered {response.status_code}: {response.text[:ERROR_CHARS]}"
            )
        return response

    def _json(self, path: str, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise UsageError(f"{self.endpoint.url}{path} did not answer with JSON") from error

    def prepare(self, request: Request) -> Prepared:
        assert self.model is not None, "enter the client first"
        body = request.body(
            self.model, logprobs=self.counting == "logprobs", continuous_usage=self.counting == "continuous"
        )
        path = "/v1/chat/completions" if request.is_chat else "/v1/completions"
        return Prepared(request, path, json.dumps(body, separators=(",", ":")).encode())

    async def send(self, prepared: Prepared, epoch: float) -> Observation:
        """Run one request to its end; failures are in the observation. `epoch`: perf_counter() when the run began."""
        first = time.perf_counter()
        attempts = 0
        while True:
            attempts += 1
            seen, retry_after_s = await self._attempt(prepared, epoch)
            refused = seen.outcome == "rejected" or (seen.outcome == "error" and seen.status is None)
            left = self.patience_s - (time.perf_counter() - first)
            if not refused or left <= 0:
                break
            await asyncio.sleep(min(max(retry_after_s, SMALLEST_RETRY_S), left))
        waited = seen.sent_s - (first - epoch)  # what earlier attempts cost is part of the latency
        seen.sent_s -= waited
        seen.e2e_s += waited
        seen.ttft_s = seen.ttft_s + waited if seen.ttft_s is not None else None
        seen.arrivals = [(at + waited, tokens) for at, tokens in seen.arrivals]
        seen.attempts, seen.due_s = attempts, prepared.request.at_s
        return seen

    async def _attempt(self, prepared: Prepared, epoch: float) -> tuple[Observation, float]:
        start = time.perf_counter()
        seen = Observation(prepared.request.id, sent_s=start - epoch)
        reading = Reading(self.counting, start)
        retry_after_s = 0.0
        try:
            async with asyncio.timeout(prepared.request.cancel_after_s):
                retry_after_s = await self._stream(prepared, seen, reading)
        except TimeoutError:
            seen.outcome = "cancelled"
        except httpx.TimeoutException as error:
            seen.outcome, seen.error = "timeout", described(error)
        except (httpx.HTTPError, ValueError) as error:
            seen.outcome, seen.error = "error", described(error)
        seen.e2e_s = time.perf_counter() - start
        reading.finish(seen)
        if prepared.request.expected is not None and seen.outcome == "ok":
            seen.right = prepared.request.expected in seen.text
        return seen, retry_after_s

    async def _stream(self, prepared: Prepared, seen: Observation, reading: Reading) -> float:
        """Read the answer into `reading`. Returns what Retry-After asked for, in seconds."""
        headers = {"Content-Type": "application/json"}
        async with self._http.stream("POST", prepared.path, content=prepared.body, headers=headers) as response:
            seen.status = response.status_code
            if response.status_code != 200:
                message = (await response.aread()).decode(errors="replace")[:ERROR_CHARS]
                seen.outcome = "rejected" if response.status_code in OVERLOADED else "error"
                seen.error = message
                return seconds_of(response.headers.get("retry-after"))
            parser = EventParser()
            async for chunk in response.aiter_raw():
                now = time.perf_counter()
                for event in parser.feed(chunk):
                    reading.take(now, event)
        return 0.0


@dataclass(slots=True)
class Reading:
    """One answer as it comes in."""

    counting: Counting
    start: float
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished_at: float | None = None
    counted: int = 0
    usage: dict[str, Any] | None = None
    error: str | None = None
    done: bool = False

    def take(self, now: float, event: bytes) -> None:
        if event == DONE:
            self.done = True
            return
        payload = json.loads(event)
        if payload.get("error"):
            self.error = json.dumps(payload["error"])[:ERROR_CHARS]
            return
        usage = payload.get("usage") or {}
        self.usage = usage or self.usage
        choice: dict[str, Any] = next(iter(payload.get("choices") or ()), {})
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        tokens = self._tokens(choice, usage, text)
        at = now - self.start
        if text:
            self.pieces.append(text)
        if tokens:
            self.arrivals.append((at, tokens))
            self.counted += tokens
        if choice.get("finish_reason"):
            self.finished_at = at

    def _tokens(self, choice: dict[str, Any], usage: dict[str, Any], text: str) -> int:
        if self.counting == "continuous":
            return max(0, usage.get("completion_tokens", self.counted) - self.counted)
        if self.counting == "logprobs":
            logprobs = choice.get("logprobs") or {}
            return len(logprobs.get("tokens") or logprobs.get("content") or ())
        return 1 if text else 0

    def finish(self, seen: Observation) -> None:
        """Fill in the observation."""
        total = (self.usage or {}).get("completion_tokens", self.counted)
        seen.prompt_tokens = (self.usage or {}).get("prompt_tokens")
        seen.text, seen.chunks = "".join(self.pieces), len(self.arrivals)
        if total > self.counted and self.finished_at is not None:
            # Tokens without text (the end of text, or half a character) come at the latest with the finish.
            last = self.arrivals[-1][0] if self.arrivals else None
            if last is None or self.finished_at > last:
                self.arrivals.append((self.finished_at, total - self.counted if self.counting != "usage" else 1))
                self.counted = int(sum(count for _, count in self.arrivals))
        seen.exact_tokens = bool(self.arrivals) and self.counted == total
        if self.arrivals and not seen.exact_tokens and total:
            share = total / len(self.arrivals)
            self.arrivals = [(at, share) for at, _ in self.arrivals]
        seen.output_tokens, seen.arrivals = total, self.arrivals
        if self.arrivals:
            seen.ttft_s = self.arrivals[0][0]
            seen.decode_s = self.arrivals[-1][0] - seen.ttft_s
        if seen.outcome == "ok" and self.error is not None:
            seen.outcome, seen.error = "error", self.error
        elif seen.outcome == "ok" and self.finished_at is None:
            seen.outcome, seen.error = "error", "the stream ended without a finish_reason"


def seconds_of(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # an HTTP date: try again soon
        return 0.0


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_CHARS]
