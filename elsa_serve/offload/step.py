"""One pass over the layers: a packed batch through transformers' own model, layer by layer, chunk by chunk.

The outer forward of the model stays untouched. Each decoder layer's `forward` is replaced by one that binds the
layer's streamed weights and sends the packed tokens through in chunks, so that activations stay bounded whatever the
prompt's length, and all tokens pass layer l before any passes layer l + 1.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from elsa_serve.offload.attention import AttentionOptions, ChunkAttention, attending
from elsa_serve.offload.fused import FusedForward
from elsa_serve.offload.geometry import ROWS
from elsa_serve.offload.graphs import DecodeGraphs, PaddedRows
from elsa_serve.offload.host import Staging
from elsa_serve.offload.kv import RequestKV
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.streams import Event, Streams
from elsa_serve.offload.tiers import Piece, Tiers

# Chunks that the host may issue ahead of the device: enough to keep it busy, few enough that a cancelled request stops
# soon and that reported progress is real.
RUN_AHEAD = 4
SHORT_TOKENS = 32  # parts up to this long share a chunk: the tokens of a decode pass, drafted ones included


class PassAbandoned(Exception):
    """Every request of the pass was given up."""


@dataclass(eq=False, slots=True)
class Part:
    """One request's share of a pass: `tokens` after those its KV holds. `given_up` may turn true during the pass.

    `rows` of its last tokens need logits: none of an unfinished prompt, several where drafted tokens are verified.
    """

    kv: RequestKV
    tokens: Sequence[int]
    rows: int = 1
    given_up: Callable[[], bool] = lambda: False
    on_progress: Callable[[int], None] | None = None  # layers × tokens done, of this part


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [low, high) of a chunk: tokens `start` … of a part (positions `part.kv.length + start` …)."""

    part: Part
    low: int
    high: int
    start: int
    final: bool  # the part's last tokens

    @property
    def wanted(self) -> int:
        """Of how many of its rows, the last ones, logits are wanted."""
        before = len(self.part.tokens) - self.part.rows  # tokens of the part that none are wanted of
        return max(0, self.start + self.high - self.low - max(self.start, before))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [low, high) of the packed batch that pass a layer together. Those behind the last segment are nobody's."""

    low: int
    high: int
    segments: tuple[Segment, ...]

    @property
    def whole(self) -> bool:
        """Whether all rows are one part's."""
        return len(self.segments) == 1 and self.segments[0].high == self.high - self.low

    @property
    def wanted(self) -> int:
        """So many of the last rows include all of which logits are wanted."""
        return self.segments[0].wanted if self.whole else self.high - self.low

    def given_up(self) -> bool:
        return all(segment.part.given_up() for segment in self.segments)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A pass's metadata, built once. `wanted` are the packed rows whose logits are wanted, part by part, and perhaps
    the last of them some times more."""

    parts: tuple[Part, ...]
    chunks: tuple[Chunk, ...]
    token_ids: torch.Tensor  # [rows] int32, on the CPU, like the positions
    positions: torch.Tensor
    wanted: list[int]

    @staticmethod
    def build(parts: Sequence[Part], chunk_tokens: int, multiple: int = 1) -> StepPlan:
        """Short parts (decode) come first and share chunks; each longer part is chunked by itself, in order. Chunks of
        short parts, and the wanted rows, are filled up to a multiple of so many."""
        ordered = sorted(parts, key=lambda part: len(part.tokens) > SHORT_TOKENS)
        # No lists of a long prompt's tokens and positions: they take 10 ms, in which the device waits.
        token_ids: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        chunks: list[Chunk] = []
        wanted: list[int] = []
        shared: list[Segment] = []
        low = row = 0

        def cut(unit: int = 1) -> None:
            nonlocal low, row, shared
            filled = row + -(row - low) % unit
            for rows in (token_ids, positions):
                rows.append(torch.zeros(filled - row, dtype=torch.int32))
            chunks.append(Chunk(low, filled, tuple(shared)))
            low, row, shared = filled, filled, []

        for part in ordered:
            total = len(part.tokens)
            # All but the first are whole: of those the size is chosen, and while the last is computed, KV for the next
            # layer comes.
            rest = (total - 1) % chunk_tokens + 1
            first = min(chunk_tokens, -(-rest // ROWS) * ROWS)
            short = total <= SHORT_TOKENS
            if shared and not (short and row + min(total, chunk_tokens) - low <= chunk_tokens):
                cut(multiple)
            token_ids.append(torch.frombuffer(array("i", part.tokens), dtype=torch.int32))
            positions.append(torch.arange(part.kv.length, part.kv.length + total, dtype=torch.int32))
            start = 0
            for end in (*range(first, total, chunk_tokens), total):
                shared.append(Segment(part, row - low, row - low + end - start, start, end == total))
                row, start = row + end - start, end
                if not short or end < total:
                    cut()
            wanted += range(row - part.rows, row)
        if shared:
            cut(multiple)
        wanted += wanted[-1:] * (-len(wanted) % multiple)
        return StepPlan(tuple(ordered), tuple(chunks), torch.cat(token_ids), torch.cat(positions), wanted)


@dataclass(slots=True)
class _Running:
    plan: StepPlan
    issued: deque[tuple[Event, Chunk]] = field(default_factory=deque)
    done: dict[int, int] = field(default_factory=dict)  # id(part) -> layers × tokens


class PassRunner:
    """Runs passes over a loaded model. One at a time, on one thread."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        weights: WeightStream,
        tiers: Tiers,
        streams: Streams,
        *,
        chunk_tokens: int,
        graphs: bool = False,
        multiple: int = 1,
    ) -> None:
        """`graphs`: decode passes may be replayed from CUDA graphs. `multiple`: of which the rows of chunks of short
        parts are (`plan.row_multiple`)."""
        self._model, self._layers = model, list(layers)
        self._weights, self._tiers, self._streams = weights, tiers, streams
        self.chunk_tokens, self._multiple = chunk_tokens, multiple
        # Called before each chunk of each layer: the engine's heartbeat, and its look at cancellations.
        self.poll: Callable[[], None] = lambda: None
        self._running: _Running | None = None
        self.graphs = DecodeGraphs(self._issue, streams.device, weights, tiers, self._look) if graphs else None
        self._issuing: ChunkAttention | None = None  # of a pass that is issued for a graph
        self._inputs = Staging(pin=streams.device.type == "cuda")
        for index, layer in enumerate(self._layers):
            layer.forward = _LayerForward(self, index, layer.forward)

    def run(self, parts: Sequence[Part]) -> dict[int, torch.Tensor]:
        """One pass. Returns logits [part.rows, V] (float32, CPU) by id(part) and advances each part's KV length.

        Parts given up on the way are left out and keep their length. Raises PassAbandoned when none is left. After any
        exception the KV of all parts is as before the pass.
        """
        plan = StepPlan.build(parts, self.chunk_tokens, self._multiple)
        self._running = _Running(plan)
        try:
            with torch.inference_mode():
                rows = self._replayed(plan)
                if rows is None:
                    self._tiers.begin(plan.parts, len(self._layers))
                    rows = self._forward(plan).float().cpu()
                    self._tiers.end()
        except BaseException:
            self._recover()
            raise
        finally:
            self._running = None
        results = {}
        for part, logits in zip(plan.parts, rows.split([part.rows for part in plan.parts])):
            if not part.given_up():
                part.kv.length += len(part.tokens)
                results[id(part)] = logits
        return results

    def _recover(self) -> None:
        if self.graphs is not None:
            self.graphs.abandon()
        self._weights.rewind()
        self._tiers.abandon()

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        """Logits [wanted rows, V] on the device."""
        # The device reads them where they are: a copy would wait for the layer's weights that are on their way.
        self._inputs.reset()
        self._inputs.trim()
        here, mapped = self._inputs.take((2, len(plan.token_ids)), torch.int32)
        torch.stack((plan.token_ids, plan.positions), out=here)
        ids, positions = mapped.to(torch.int64).split(1)
        return self._logits(ids, positions)[: sum(part.rows for part in plan.parts)]

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]

    def _replayed(self, plan: StepPlan) -> torch.Tensor | None:
        """Logits [parts, V] (float32, CPU) of a pass that is replayed from a graph; None where it is not."""
        if self.graphs is None or len(plan.chunks) > 1 or any(len(part.tokens) > 1 for part in plan.parts):
            return None
        rows = PaddedRows(plan.token_ids, plan.positions, _ChunkAttention(self._tiers, plan.chunks[0], every=True))
        logits = self.graphs.logits(plan.parts, rows)
        if logits is None:
            return None
        found = logits.float().cpu()
        self._weights.rewind()
        self.graphs.end()
        return found

    def _look(self) -> None:
        """Between the graphs of a pass."""
        self.poll()
        if self._running is not None and all(part.given_up() for part in self._running.plan.parts):
            raise PassAbandoned

    def _issue(self, ids: torch.Tensor, positions: torch.Tensor, attend: ChunkAttention) -> torch.Tensor:
        """The forward of a graph: nothing in it waits for the device or looks at it."""
        self._issuing = attend
        try:
            return self._logits(ids, positions)
        finally:
            self._issuing = None

    def layer(
        self, index: int, inner: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Send hidden [1, T, hidden] through layer `index`, in place; the last one returns the wanted rows alone."""
        if self._issuing is not None and self.graphs is not None:
            self.graphs.cut(index)
            with self._weights.issued(index), attending(self._issuing):
                output = inner(hidden, **kwargs)
            return output[0] if isinstance(output, tuple) else output
        running = self._running
        if running is None:
            raise RuntimeError("the model's layers run only inside a pass of the engine")
        plan = running.plan
        with self._weights.layer(index):
            for chunk in plan.chunks:
                self.poll()
                if chunk.given_up():
                    if all(part.given_up() for part in plan.parts):
                        raise PassAbandoned
                    continue
                self._chunk(index, inner, hidden, kwargs, chunk)
                self._pace(running, chunk)
        if index == len(self._layers) - 1:
            self._pace(running, None)
            return hidden[:, plan.wanted]
        return hidden

    def _chunk(
        self, index: int, inner: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any], chunk: Chunk
    ) -> None:
        total = hidden.shape[1]
        rows = slice(chunk.low, chunk.high)
        own = hidden[:, rows]
        kwargs = {name: _rows(value, rows, total) for name, value in kwargs.items()}
        if index == len(self._layers) - 1 and isinstance(inner, FusedForward):
            kwargs["wanted"] = chunk.wanted  # the last layer's other rows are nobody's input
        with attending(_ChunkAttention(self._tiers, chunk)):
            output = inner(own, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if output is not own:  # a fused layer works in place
            own.copy_(output)

    def _pace(self, running: _Running, chunk: Chunk | None) -> None:
        """Note an issued chunk and wait for an early one; None waits for all."""
        if chunk is not None:
            running.issued.append((self._streams.record(), chunk))
        while len(running.issued) > (RUN_AHEAD if chunk is not None else 0):
            event, computed = running.issued.popleft()
            event.synchronize()
            for segment in computed.segments:
                part = segment.part
                if part.on_progress is not None:
                    running.done[id(part)] = running.done.get(id(part), 0) + segment.high - segment.low
                    part.on_progress(running.done[id(part)])

    def close(self) -> None:
        """Give the layers their own forward back, and the memory of a pass's inputs."""
        for layer in self._layers:
            if isinstance(layer.forward, _LayerForward):
                del layer.forward
        self._layers = []
        if self.graphs is not None:
            self.graphs.close()
        self._inputs.close()


class _LayerForward:
    """What a decoder layer's `forward` becomes."""

    def __init__(self, runner: PassRunner, index: int, inner: Callable[..., Any]) -> None:
        self._runner, self._index, self._inner = runner, index, inner

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._runner.layer(self._index, self._inner, hidden_states, kwargs)


class _ChunkAttention:
    """Stores a chunk's KV and attends request by request. Rows of requests given up are left as they come, unless
    `every` request is to be attended, whatever becomes of it."""

    def __init__(self, tiers: Tiers, chunk: Chunk, every: bool = False) -> None:
        self._tiers, self._chunk_of, self._every = tiers, chunk, every

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Queries of fewer than the chunk's tokens are of its only segment's last ones. Nobody's rows get zeros."""
        segments = [one for one in self._chunk_of.segments if self._every or not one.part.given_up()]
        pieces = [_piece(segment, q, k, v) for segment in segments]
        outs = [out.transpose(1, 2) for out in self._tiers.attend(layer, pieces, options)]
        if self._chunk_of.whole and outs:
            return outs[0]
        result = q.new_zeros(1, q.shape[2], q.shape[1], q.shape[3])
        for segment, out in zip(segments, outs):
            result[:, segment.low : segment.high] = out
        return result


def _piece(segment: Segment, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Piece:
    kv = segment.part.kv
    rows = slice(segment.low, segment.high)
    return Piece(kv, kv.length + segment.start, segment.final, q[:, :, rows], k[:, :, rows], v[:, :, rows])


def _rows(value: Any, rows: slice, total: int) -> Any:
    """The chunk's rows of whatever is per token ([1, T, …]) in a layer's arguments; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value[:, rows] if value.ndim >= 2 and value.shape[:2] == (1, total) else value
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, rows, total) for item in value)
    if isinstance(value, dict):
        return {name: _rows(item, rows, total) for name, item in value.items()}
    return value


class Throttle:
    """Lets a call through at most every `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, -float("inf")

    def ready(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
