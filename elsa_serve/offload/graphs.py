"""Decode passes in CUDA graphs, where all layers and all KV of a pass lie on the device.

Such a pass reads every byte once and is over within milliseconds, but Python takes longer than that to issue its
kernels. From one token to the next only token ids and positions change, and the paged attention reads lengths from the
device: so a pass that comes again, with the same requests' memory, is captured once and from then on replayed.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from elsa_kernels import State, attention, attention_paged, merged_output, reshape_and_cache
from elsa_kernels.paged import decode_counters

from elsa_serve.offload.attention import AttentionOptions, ChunkAttention
from elsa_serve.offload.kv import RequestKV, Span

PAGE = 16  # keys; the attention sees an extent as pages of so many, one behind the other
KEPT = 8  # graphs, the latest used

# ids and positions [1, B] int64 and the attention of the pass -> logits [B, V], all on the device
Forward = Callable[[torch.Tensor, torch.Tensor, ChunkAttention], torch.Tensor]
Result = TypeVar("Result")
Key = tuple[tuple[tuple[int, ...], ...], ...]  # request by request, span by span

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """One request's share of a pass: what `Part` offers."""

    kv: RequestKV
    tokens: Sequence[int]
    rows: int


class DecodeGraphs:
    """Captures and replays decode passes. Belongs to the engine's thread."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self.usable = True  # with the attention in use
        self._in_spans = True  # also where KV lies in several spans
        self._kept: OrderedDict[Key, _Captured] = OrderedDict()
        self._last: Key | None = None
        self._capturing = Capturing(device)

    def logits(self, parts: Sequence[Rows]) -> torch.Tensor | None:
        """Logits [parts, V] of a pass of one token each, on the device, until the next call; None where the pass is not
        one for a graph, or was not one before: a graph costs as much as two passes."""
        spans = _spans(parts) if self.usable else None
        if spans is None or (not self._in_spans and any(len(own) > 1 for own in spans)):
            return None
        key = tuple(tuple(_place(span) for span in own) for own in spans)
        known, self._last = key in self._kept or key == self._last, key
        if not known:
            return None
        numbers = torch.tensor([[part.tokens[0] for part in parts], [part.kv.length for part in parts]])
        if key not in self._kept:
            found = self._captured(spans, numbers.to(self._device))
            if found is None:
                return None
            self._kept[key] = found
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key].run(numbers)

    def _captured(self, spans: Sequence[Sequence[Span]], inputs: torch.Tensor) -> _Captured | None:
        attend = GraphAttention(spans, self._device)

        def issue() -> torch.Tensor:
            attend.place(inputs[1])
            return self._forward(inputs[:1], inputs[1:], attend)

        try:
            replay, logits = self._capturing(issue)
        except NotImplementedError as error:
            self._in_spans = False
            logger.warning("decode passes of requests that have grown are issued anew each time: %s", error)
            return None
        except RuntimeError as error:  # out of memory, or an operation that waits for the device
            self.usable = False
            self.close()
            logger.warning("decode passes are issued anew each time, because no CUDA graph can hold one: %s", error)
            return None
        return _Captured(replay, inputs, logits, attend)

    def close(self) -> None:
        """Forget all graphs and free their memory."""
        self._kept.clear()
        self._last = None


def _spans(parts: Sequence[Rows]) -> list[list[Span]] | None:
    """The spans that hold each part's tokens, the new one's included; None where a graph cannot hold the pass: with
    more than one token of a request, KV elsewhere than on the device, or KV of several requests read once for all."""
    found = [list(part.kv.spans_of(0, part.kv.length + 1)) for part in parts]
    extents = [span.extent for own in found for span in own]
    if len({id(extent) for extent in extents}) < len(extents) or not all(extent.on_device for extent in extents):
        return None
    return found if all(len(part.tokens) == part.rows == 1 for part in parts) else None


def _place(span: Span) -> tuple[int, ...]:
    """Where a span's tokens lie: the same for another request that has the same memory."""
    return (span.first, span.tokens, span.extent.capacity, *(block.offset for block in span.extent.blocks))


@dataclass(eq=False, slots=True)
class _Captured:
    """A pass to be replayed. inputs [2, B] int64 (ids, positions) and logits [B, V] are the graph's own memory."""

    replay: Callable[[], None]
    inputs: torch.Tensor
    logits: torch.Tensor
    attend: GraphAttention  # whose tensors the graph reads

    def run(self, numbers: torch.Tensor) -> torch.Tensor:
        self.inputs.copy_(numbers)
        self.replay()
        return self.logits


class Capturing:
    """Turns what a function issues into a graph. Its graphs share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

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
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                result = issue()
        return graph.replay, result


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
