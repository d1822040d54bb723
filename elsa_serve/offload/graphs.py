"""Decode passes in CUDA graphs: those that take the device and the host less time than Python takes to issue them.

From one token to the next only token ids and positions change. So a pass that comes again, with the same requests'
memory, is captured once and from then on replayed. Two kinds of passes are:
- All layers and all KV lie on the device. The paged attention reads lengths from there.
- The newest tokens' KV lies in host memory, and the host attends it in place: graphs may call it (`in_place`), and
  what it attends grows between two replays. Such a pass is issued as it would be without graphs, its rows filled up
  alike, so a token's bits do not depend on whether its pass was replayed.

Where layers are streamed, each of those is a graph of its own, which is replayed between the arrival of its weights and
the release of their slot, and what lies between two of them is another.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from elsa_kernels import State, attention, attention_paged, merged_output, reshape_and_cache
from elsa_kernels.paged import decode_counters

from elsa_serve.offload.attention import AttentionOptions, ChunkAttention
from elsa_serve.offload.in_place import RepeatedCalls
from elsa_serve.offload.kv import RequestKV, Span
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.tiers import Tiers

PAGE = 16  # keys; the attention sees an extent as pages of so many, one behind the other
KEPT = 8  # graphs, the latest used

# ids and positions [1, B] int64 and the attention of the pass -> logits [B, V], all on the device
Forward = Callable[[torch.Tensor, torch.Tensor, ChunkAttention], torch.Tensor]
Result = TypeVar("Result")
Key = tuple[tuple[tuple[int | str, ...], ...], ...]  # request by request, span by span

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """One request's share of a pass: what `Part` offers."""

    kv: RequestKV
    tokens: Sequence[int]
    rows: int


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """A pass as it is issued without graphs: [rows] int32 on the CPU, those of the parts first, and their attention."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: ChunkAttention


class DecodeGraphs:
    """Captures and replays decode passes. Belongs to the engine's thread.

    `between`: called before each of a pass's graphs; what it raises ends the pass.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        weights: WeightStream,
        tiers: Tiers,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._forward, self._device = forward, device
        self._weights, self._tiers, self._between = weights, tiers, between
        self.usable = True  # with the attention in use
        self._in_spans = True  # also where KV lies in several spans
        self._in_place = True  # also where KV lies in host memory
        self._kept: OrderedDict[tuple[Key, int], _Captured] = OrderedDict()
        self._last: Key | None = None
        self._running: _Captured | None = None
        self._capturing = Capturing(device, self._around)

    def logits(self, parts: Sequence[Rows], chunk: PaddedRows) -> torch.Tensor | None:
        """Logits [parts, V] of a pass of one token each, on the device, until the next call; None where the pass is not
        one for a graph, or was not one before: a graph costs as much as two passes. `end` must follow, once they have
        been read. `chunk`: the same rows as they are issued without graphs."""
        key = self._key(parts) if self.usable else None
        if key is None:
            return None
        whole = key, self._weights.first_slot
        known, self._last = whole in self._kept or key == self._last, key
        if not known:
            return None
        if whole not in self._kept:
            found = self._captured(parts, chunk)
            if found is None:
                return None
            self._kept[whole] = found
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(whole)
        self._running = self._kept[whole]
        return self._running.run([(part.tokens[0], part.kv.length) for part in parts])

    def end(self) -> None:
        """Behind a pass whose logits have been read. Raises what went wrong on the host."""
        running, self._running = self._running, None
        if running is not None and running.calls is not None:
            running.calls.end()

    def abandon(self) -> None:
        """A replay was cut short: wait for what is under way, so that memory may be freed."""
        if self._running is not None:
            self._running = None
            self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def cut(self, index: int) -> None:
        """Layer `index` is issued next."""
        self._capturing.cut(index if self._weights.streamed(index) else None)

    def _key(self, parts: Sequence[Rows]) -> Key | None:
        """Where the pass's KV lies, if a graph may hold it."""
        if not all(len(part.tokens) == part.rows == 1 for part in parts):
            return None
        spans = _spans(parts)
        if all(span.extent.on_device for own in spans for span in own):
            extents = [id(span.extent) for own in spans for span in own]
            shared = len(set(extents)) < len(extents)  # KV of several requests that is read once for all
            grown = any(len(own) > 1 for own in spans)
            if shared or (grown and not self._in_spans) or not self._weights.all_resident:
                return None
        elif not (self._in_place and self._tiers.repeatable(parts)):
            return None
        return tuple(tuple(_place(span) for span in own) for own in spans)

    def _captured(self, parts: Sequence[Rows], chunk: PaddedRows) -> _Captured | None:
        spans = _spans(parts)
        on_device = all(span.extent.on_device for own in spans for span in own)
        try:
            return self._capture_device(parts, spans) if on_device else self._capture_in_place(parts, spans, chunk)
        except NotImplementedError as error:
            self._wait()  # what was issued first still uses what goes with it
            self._in_spans, self._in_place = self._in_spans and not on_device, self._in_place and on_device
            what = "have grown" if on_device else "the host attends"
            logger.warning("decode passes of requests that %s are issued anew each time: %s", what, error)
        except RuntimeError as error:  # out of memory, or an operation that waits for the device
            self._wait()
            self.usable = False
            self.close()
            logger.warning("decode passes are issued anew each time, because no CUDA graph can hold one: %s", error)
        return None

    def _capture_device(self, parts: Sequence[Rows], spans: Sequence[Sequence[Span]]) -> _Captured:
        attend = GraphAttention(spans, self._device)
        inputs = torch.tensor([[part.tokens[0] for part in parts], [part.kv.length for part in parts]])
        inputs = inputs.to(self._device)

        def issue() -> torch.Tensor:
            attend.place(inputs[1])
            return self._forward(inputs[:1], inputs[1:], attend)

        replay, logits = self._capturing(issue)
        return _Captured(replay, inputs, logits, attend)

    def _capture_in_place(self, parts: Sequence[Rows], spans: Sequence[Sequence[Span]], chunk: PaddedRows) -> _Captured:
        """`chunk` tells how the rows are filled up: those behind the parts' are nobody's."""
        calls = self._tiers.new_calls()
        inputs = torch.stack((chunk.token_ids, chunk.positions)).to(self._device, torch.int64)
        first = torch.tensor([own[-1].first for own in spans], device=self._device)

        def issue() -> torch.Tensor:
            with self._tiers.repeating(calls, inputs[1, : len(parts)] - first):
                return self._forward(inputs[:1], inputs[1:], chunk.attention)[: len(parts)]

        self._tiers.begin(parts, 0)  # nothing is brought to the device, in no layer
        replay, logits = self._capturing(issue)
        self._tiers.end()
        return _Captured(replay, inputs, logits, first, calls)

    def _around(self, index: int | None) -> AbstractContextManager[None]:
        """Of a graph: the streamed layer's that it computes, or what lies between two."""
        self._between()
        return nullcontext() if index is None else self._weights.replayed(index)

    def close(self) -> None:
        """Forget all graphs and free their memory."""
        self._kept.clear()
        self._last = self._running = None


def _spans(parts: Sequence[Rows]) -> list[list[Span]]:
    """The spans that hold each part's tokens, the new one's included."""
    return [list(part.kv.spans_of(0, part.kv.length + 1)) for part in parts]


def _place(span: Span) -> tuple[int | str, ...]:
    """Where a span's tokens lie: the same for another request that has the same memory."""
    extent = span.extent
    return (extent.tier, span.first, span.tokens, extent.capacity, *(block.offset for block in extent.blocks))


@dataclass(eq=False, slots=True)
class _Captured:
    """A pass to be replayed. inputs [2, rows] int64 (ids, positions), the first of them the parts', and logits
    [parts, V] are the graphs' own memory."""

    replay: Callable[[], None]
    inputs: torch.Tensor
    logits: torch.Tensor
    keep: object  # other tensors that the graphs read
    calls: RepeatedCalls | None = None

    def run(self, numbers: Sequence[tuple[int, int]]) -> torch.Tensor:
        """numbers: each part's new token, and its position."""
        self.inputs[:, : len(numbers)].copy_(torch.tensor(numbers).T)
        if self.calls is not None:
            self.calls.place([position for _, position in numbers])
        self.replay()
        return self.logits


class Capturing:
    """Turns what a function issues into graphs, one if it never calls `cut`. Graphs share one pool of memory: they run
    one after the other. Each is replayed inside `around` of what `cut` was last given."""

    def __init__(
        self, device: torch.device, around: Callable[[int | None], AbstractContextManager[None]] | None = None
    ) -> None:
        self._device = device
        self._around = around or (lambda _: nullcontext())
        self._pool: Any = None
        self._made: list[tuple[int | None, torch.cuda.CUDAGraph]] | None = None  # while they are captured

    def __call__(self, issue: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(replay, what the function returned). Raises RuntimeError for what cannot be captured."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream, busy = _capture_stream(self._device)
        current = torch.cuda.current_stream(self._device)
        with busy:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                issue()  # kernels are built and libraries take their memory, which no capture allows
            current.wait_stream(stream)
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            with torch.cuda.stream(stream):
                made, result = self._capture(issue)

        def replay() -> None:
            for index, graph in made:
                with self._around(index):
                    graph.replay()

        return replay, result

    def _capture(self, issue: Callable[[], Result]) -> tuple[list[tuple[int | None, torch.cuda.CUDAGraph]], Result]:
        self._made = []
        self._begin(None)
        try:
            result = issue()
        finally:
            made, self._made = self._made, None
            made[-1][1].capture_end()
        return made, result

    def _begin(self, index: int | None) -> None:
        assert self._made is not None
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._made.append((index, graph))

    def cut(self, index: int | None) -> None:
        """What is issued from here on belongs to `index`: a graph of its own, unless it is None as before."""
        if self._made is None or (index is None and self._made[-1][0] is None):
            return
        self._made[-1][1].capture_end()
        self._begin(index)


@functools.cache
def _capture_stream(device: torch.device) -> tuple[torch.cuda.Stream, threading.Lock]:
    """The stream of all captures of this process, one at a time: cuBLAS takes 32 MiB for each stream that it has seen,
    and keeps them, so that an engine would miss those of every probe that measured its rates."""
    return torch.cuda.Stream(device), threading.Lock()


class GraphAttention:
    """Attention of one token of each request. The requests' last spans grow: how many of their tokens there are is read
    on the device. The spans before them are full."""

    def __init__(self, spans: Sequence[Sequence[Span]], device: torch.device) -> None:
        self._full = [own[:-1] for own in spans]
        self._growing = [own[-1].extent for own in spans]
        self._pages = [[_pages(layer) for layer in extent.layers] for extent in self._growing]
        self._first = torch.tensor([own[-1].first for own in spans], device=device)
        longest, count = max(extent.capacity for extent in self._growing), len(spans)
        self._slots = torch.zeros(count, dtype=torch.int64, device=device)  # the new tokens' places
        self._used = torch.zeros(count, dtype=torch.int32, device=device)  # tokens, the new ones included
        self._ranges = torch.zeros(count, 2, dtype=torch.int32, device=device)  # from the first to the last of them
        self._rows = torch.tensor([0, 1], dtype=torch.int32, device=device)
        self._table = torch.arange(-(-longest // PAGE), dtype=torch.int32, device=device)[None]
        self._counters = decode_counters(1, self._growing[0].layers[0].shape[1], longest, device)

    def place(self, positions: torch.Tensor) -> None:
        """positions [B] int64 of the new tokens."""
        torch.sub(positions, self._first, out=self._slots)
        self._used.copy_(self._slots + 1)
        self._ranges[:, 1].copy_(self._used)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [B, heads, D]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for i, pages in enumerate(self._pages):
            row = slice(i, i + 1)
            reshape_and_cache(k[row], v[row], *pages[layer], self._slots[row])
            if self._full[i]:
                out[row] = self._merged(layer, i, q[row], options)
            else:
                self._alone(layer, i, q[row], out[row], options)
        return out[None]

    def _alone(self, layer: int, i: int, q: torch.Tensor, out: torch.Tensor, options: AttentionOptions) -> None:
        keys, values = self._pages[i][layer]
        attention_paged(
            q, keys, values, self._rows, self._used[i : i + 1], self._table[:, : keys.shape[0]], max_seqlen_q=1,
            max_seqlen_k=self._growing[i].capacity, scale=options.scale, window=options.window,
            softcap=options.softcap, sinks=options.sinks.float() if options.sinks is not None else None, out=out,
            counters=self._counters,
        )  # fmt: skip

    def _merged(self, layer: int, i: int, q: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """q [1, H, D] over several spans: a state of each."""
        if options.window is not None or options.sinks is not None:
            raise NotImplementedError("sliding windows and sinks are in no CUDA graph where KV lies in several spans")

        def state(block: torch.Tensor, tokens: torch.Tensor | None = None) -> State:
            return attention(
                q[:, :, None], block[None, 0], block[None, 1], scale=options.scale, softcap=options.softcap,
                kv_range=tokens, return_state=True,
            )  # fmt: skip

        states = [state(span.extent.layers[layer][:, :, : span.tokens]) for span in self._full[i]]
        states.append(state(self._growing[i].layers[layer], self._ranges[i : i + 1]))
        return merged_output(states, q.dtype)[:, :, 0]


def _pages(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, Hkv, N, D] of an extent's layer as pages [⌈N / PAGE⌉, PAGE, Hkv, D] each; the last page may
    end up to PAGE − 1 tokens behind the layer, which nothing reads or writes (`slack_bytes`)."""
    _, heads, tokens, dim = layer.shape
    shape, strides = (-(-tokens // PAGE), PAGE, heads, dim), (PAGE * dim, dim, tokens * dim, 1)
    keys, values = (part.as_strided(shape, strides) for part in layer)
    return keys, values


def slack_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """What a pool must have behind its last byte for `_pages`."""
    return PAGE * head_dim * dtype.itemsize
