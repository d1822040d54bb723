"""A layer's attention over KV that spans the tiers: every key is attended once, where that is cheapest, and exactly.

Each request takes one of three roads through a pass:
- resident: all its tokens lie on the device, new ones included;
- in place: the device attends its tokens and the host's cores theirs, at the same time; the two states are merged;
- over the device: the host's tokens are copied into a working buffer, once a layer. Prompts take it (nothing is to
  be copied for them), and more new tokens over a prefix than the host's arithmetic keeps up with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from elsa_kernels import State, merged_output
from elsa_kernels.elementwise import copy_heads

from elsa_serve.offload.attention import Attend, AttendState, AttentionOptions
from elsa_serve.offload.in_place import Grows, HostShare, InPlace, RepeatedCalls
from elsa_serve.offload.kv import Extent, RequestKV, Span
from elsa_serve.offload.streams import Streams
from elsa_serve.offload.working import Visit, WorkingKV, write_mapped
from elsa_serve.stats import HostAttention

Road = Literal["resident", "in place", "over the device"]
SHARED_ROWS = 64  # pieces of so few rows are computed together where they share KV
LONG_RUN = 64 << 10  # bytes of a head from which heads are copied to a file one by one
KEY_TILE = 32  # keys: every tile of the device's attention is of a multiple
STATE_ROWS = 1024  # query rows whose float32 states over several spans are alive at once


class Rows(Protocol):
    """Tokens of one request in a pass: what `Part` offers."""

    kv: RequestKV
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one request in one chunk of one layer: k and v [1, Hkv, n, D], the first at position `first`, and
    q [1, H, m, D] of the last m of them, whose attention is wanted. `final`: the request's last ones in this layer."""

    kv: RequestKV
    first: int
    final: bool
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def last(self) -> int:
        return self.first + self.k.shape[2]

    @property
    def rows(self) -> int:
        return self.q.shape[2]

    @property
    def first_row(self) -> int:
        """The first query's position."""
        return self.last - self.rows

    def some(self, low: int, high: int) -> Piece:
        """Rows [low, high) alone, and the tokens up to them."""
        tokens = self.k.shape[2] - self.rows + high
        return replace(self, q=self.q[:, :, low:high], k=self.k[:, :, :tokens], v=self.v[:, :, :tokens])


@dataclass(frozen=True, slots=True)
class _Job:
    """Tokens [low, high) of an extent, attended by the rows of one or more pieces; the first row is at `q_start`."""

    extent: Extent
    low: int
    high: int
    q_start: int
    pieces: tuple[int, ...]


class Tiers:
    """Stores a pass's KV and attends to it. Belongs to the engine's thread.

    `begin` announces the parts of a pass, `attend` computes one layer of a chunk, `end` waits until all KV is home.
    `limit(kv)` is the number of new tokens up to which a request stays in place.
    """

    def __init__(
        self,
        working: WorkingKV,
        in_place: InPlace | None,
        streams: Streams,
        attend: Attend,
        attend_state: AttendState | None,
        limit: Callable[[RequestKV], int],
        alike: int | None = None,
    ) -> None:
        """Without `in_place` or `attend_state`, KV on the host is always brought to the device. `alike`: queries up to
        which the device's attention gives each the bits that it would get alone; few others take several calls."""
        self._working, self._in_place, self._streams = working, in_place, streams
        self._attend, self._attend_state = attend, attend_state
        self._limit, self._alike = limit, alike
        self._roads: dict[int, Road] = {}
        self._places: torch.Tensor | None = None  # of a repeated pass's new tokens in their extents: [pieces] int64

    def use(self, attend: Attend, attend_state: AttendState | None) -> None:
        """Other kernels from the next pass on."""
        self._attend, self._attend_state = attend, attend_state

    def road(self, kv: RequestKV, new: int) -> Road:
        """The road of `new` tokens after those that `kv` holds."""
        if not kv.host_tokens(kv.length + new):
            return "resident"
        if self._in_place is not None and self._attend_state is not None and new <= self._limit(kv):
            return "in place"
        return "over the device"

    def without_moving(self, kv: RequestKV, new: int) -> int:
        """How many of `new` tokens can be computed together before KV is moved that one token alone leaves in place."""
        if self.road(kv, 1) == "over the device" or self.road(kv, new) != "over the device":
            return new
        return max(1, min(new, self._limit(kv)))

    def begin(self, parts: Sequence[Rows], layers: int) -> None:
        self._roads = {id(part.kv): self.road(part.kv, len(part.tokens)) for part in parts}
        moved = [part.kv for part in parts if self._roads[id(part.kv)] == "over the device"]
        self._working.begin([Visit(kv, layer) for layer in range(layers) for kv in moved])

    def repeatable(self, parts: Sequence[Rows]) -> bool:
        """Whether a pass of these differs from the next one only in where the new tokens lie, and in how many tokens
        the extents hold that the host attends: one new token each, in host memory, attended in place."""
        return all(
            len(part.tokens) == 1
            and self.road(part.kv, 1) == "in place"
            and {span.extent.tier for span in part.kv.spans_of(0, part.kv.length)} <= {"gpu", "host"}
            and next(iter(part.kv.spans_of(part.kv.length, part.kv.length + 1))).extent.tier == "host"
            for part in parts
        )

    def new_calls(self) -> RepeatedCalls:
        assert self._in_place is not None
        return RepeatedCalls(self._in_place)

    @contextmanager
    def repeating(self, calls: RepeatedCalls, places: torch.Tensor) -> Iterator[None]:
        """Inside, `attend` issues a pass that is repeated with other `places`: where, in the extent that holds it, each
        piece's new token goes. Raises NotImplementedError for what cannot be repeated."""
        assert self._in_place is not None
        with self._in_place.repeating(calls):
            self._places = places
            try:
                yield
            finally:
                self._places = None

    def attend(self, layer: int, pieces: Sequence[Piece], options: AttentionOptions) -> list[torch.Tensor]:
        """Store the pieces' keys and values and attend; what each of the queries gets, in their shape."""
        parts = {i: piece for i, piece in enumerate(pieces) if piece.rows and self._in_parts(piece)}
        if self._places is not None and (options.window is not None or options.sinks is not None):
            raise NotImplementedError("sliding windows and sinks are in no CUDA graph where KV lies in host memory")
        for i, piece in parts.items():
            if self._places is None:
                _store(layer, piece)
            else:
                _store_at(layer, piece, self._places[i : i + 1])
        here, there = (self._jobs(parts, options, on_device) for on_device in (True, False))
        sunk: set[int] = set()  # pieces whose sinks have joined: once in all, on the device where it sees any token
        sinks = [self._sinks(job, options, sunk) for job in (*here, *there)]
        shares = [self._stage(layer, job, parts, s) for job, s in zip(there, sinks[len(here) :])]
        call = self._in_place.launch(shares, self._streams.record()) if shares and self._in_place else None
        # While the host is at work: everything that is the device's alone.
        states = [self._device_state(layer, job, parts, s) for job, s in zip(here, sinks)]
        outs = {i: self._whole(layer, piece, options) for i, piece in enumerate(pieces) if i not in parts}
        if call is not None:
            self._streams.wait(call)
        found: dict[int, list[State]] = {i: [] for i in parts}
        for job, state in (*zip(here, states), *((job, share.state) for job, share in zip(there, shares))):
            for i, part in zip(job.pieces, _of_each(state, [parts[i] for i in job.pieces])):
                found[i].append(part)
        outs |= {i: merged_output(found[i], piece.q.dtype) for i, piece in parts.items()}
        return [outs[i] for i in range(len(pieces))]

    def _in_parts(self, piece: Piece) -> bool:
        """Whether the piece's attention is merged from states over spans: in place, and of few rows over several spans,
        or over one that other requests share."""
        road, spans = self._roads[id(piece.kv)], piece.kv.spans
        if road != "resident" or self._attend_state is None:
            return road == "in place"
        return piece.rows <= SHARED_ROWS and (spans[0].last < piece.last or spans[0].extent.users > 1)

    def _jobs(self, pieces: dict[int, Piece], options: AttentionOptions, on_device: bool) -> list[_Job]:
        """What is to be attended on the device, or on the host. What several pieces share, and all their rows see
        whole, is read once for all of them: the beginning of the extent that each of them has."""
        holders: dict[int, list[tuple[int, Span]]] = {}
        for i, piece in pieces.items():
            oldest = 0 if options.window is None else max(0, piece.first_row - options.window + 1)
            for span in piece.kv.spans_of(oldest, piece.last, on_device):
                holders.setdefault(id(span.extent), []).append((i, span))
        jobs: list[_Job] = []
        for found in holders.values():
            common = min(min(span.tokens, pieces[i].first_row - span.first) for i, span in found)
            together = len(found) > 1 and common > 0 and options.window is None and options.sinks is None
            if together:
                jobs.append(_Job(found[0][1].extent, 0, common, common, tuple(i for i, _ in found)))
            low = common if together else 0
            for i, span in found:
                high = span.within(0, pieces[i].last).stop
                if high > low:
                    jobs.append(_Job(span.extent, low, high, pieces[i].first_row - span.first - low, (i,)))
        return jobs

    @staticmethod
    def _sinks(job: _Job, options: AttentionOptions, sunk: set[int]) -> AttentionOptions:
        first = not sunk & set(job.pieces)
        sunk |= set(job.pieces)
        return options if first else replace(options, sinks=None)

    def _whole(self, layer: int, piece: Piece, options: AttentionOptions) -> torch.Tensor:
        """Attention over keys that are all on the device, if any is wanted."""
        kv, last = piece.kv, piece.last
        if self._roads[id(kv)] != "over the device":
            _store(layer, piece)
            if not piece.rows:
                return piece.q
            if kv.spans[0].last >= last:
                block = kv.spans[0].extent.layers[layer]
            elif self._attend_state is not None:
                return self._in_rows(layer, piece, options)
            else:
                spans = kv.spans_of(0, last)
                block = torch.cat([span.extent.layers[layer][:, :, span.within(0, last)] for span in spans], 2)
            outs = [
                self._attend(piece.q[:, :, rows], *_keys_and_values(block, last - piece.rows + rows.stop), options)
                for rows in self._alone(piece.rows, piece.first_row)
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        block = self._working.write(kv, layer, piece.first, piece.k, piece.v)
        out = piece.q
        if piece.rows:
            out = self._attend(piece.q, *_keys_and_values(block, last), options)
        if piece.final:
            self._working.give()
        return out

    def _stage(self, layer: int, job: _Job, pieces: dict[int, Piece], options: AttentionOptions) -> HostShare:
        """Hand a job's queries to the host."""
        assert self._in_place is not None
        keys = job.extent.layers[layer][:, :, job.low : job.high]
        grows = None
        if job.q_start == job.high - job.low - 1:  # its last key is the row's own
            grows = Grows(job.pieces[0], pieces[job.pieces[0]].first_row - job.q_start)
        return self._in_place.stage(_queries(job, pieces), keys, job.q_start, options, options.sinks, grows)

    def _device_state(self, layer: int, job: _Job, pieces: dict[int, Piece], options: AttentionOptions) -> State:
        assert self._attend_state is not None
        keys, values = _keys_and_values(job.extent.layers[layer][:, :, job.low : job.high])
        q = _queries(job, pieces)
        states = [
            self._attend_state(q[:, :, rows], keys, values, options, job.q_start + rows.start)
            for rows in self._alone(q.shape[2], job.q_start if job.q_start < keys.shape[2] else None)
        ]
        if len(states) == 1:
            return states[0]
        return State(*(torch.cat([getattr(state, part) for state in states], 2) for part in ("m", "S", "W")))

    def _alone(self, rows: int, first: int | None) -> list[slice]:
        """Ranges of so many rows that are attended in calls of their own. The first row is at key `first`, None where
        all see every key: a tile of keys that only some rows of a call see whole is summed otherwise."""
        if self._alike is None or rows > SHARED_ROWS:
            return [slice(0, rows)]
        ranges, low = [], 0
        for row in range(1, rows + 1):
            edge = first is not None and (first + row + 1) % KEY_TILE == 0
            if row == rows or row - low == self._alike or edge:
                ranges.append(slice(low, row))
                low = row
        return ranges

    def _in_rows(self, layer: int, piece: Piece, options: AttentionOptions) -> torch.Tensor:
        """Attention over several spans on the device, some rows at a time, because states are in float32."""
        outs = []
        for low in range(0, piece.rows, STATE_ROWS):
            part = {0: piece.some(low, min(low + STATE_ROWS, piece.rows))}
            sunk: set[int] = set()
            jobs = self._jobs(part, options, on_device=True)
            states = [self._device_state(layer, job, part, self._sinks(job, options, sunk)) for job in jobs]
            outs.append(merged_output(states, piece.q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def end(self) -> None:
        """Block until the tiers hold everything the pass computed. Raises what went wrong on the host."""
        self._working.end()
        if self._in_place is not None:
            self._in_place.end()

    def abandon(self) -> None:
        """A pass was cut short: wait for what is under way, so that blocks may be freed. Nothing new is kept."""
        self._working.abandon()
        if self._in_place is not None:
            self._in_place.abandon()

    def drain(self) -> HostAttention | None:
        """What the host attended since the last call."""
        return self._in_place.drain() if self._in_place is not None else None

    def close(self) -> None:
        self._working.close()
        if self._in_place is not None:
            self._in_place.close()


def _keys_and_values(block: torch.Tensor, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `tokens` of a layer's block [2, Hkv, N, D], all by default, as k and v [1, Hkv, tokens, D]."""
    return block[None, 0, :, :tokens], block[None, 1, :, :tokens]


def _queries(job: _Job, pieces: dict[int, Piece]) -> torch.Tensor:
    queries = [pieces[i].q for i in job.pieces]
    return queries[0] if len(queries) == 1 else torch.cat(queries, 2)


def _of_each(state: State, pieces: Sequence[Piece]) -> list[State]:
    """A job's state, piece by piece."""
    if len(pieces) == 1:
        return [state]
    sizes = [piece.rows for piece in pieces]
    return [State(*parts) for parts in zip(*(t.split(sizes, 2) for t in (state.m, state.S, state.W)))]


def _write_file(places: torch.Tensor, new: torch.Tensor) -> None:
    """Copy keys or values [Hkv, n, D] into a file's pages, which no kernel writes: Python waits. What is long goes head
    by head, each a run of its own; one copy of all would first put them together in memory that is new every time."""
    if new[0].nbytes < LONG_RUN:
        places.copy_(new)
        return
    for place, run in zip(places, new):
        place.copy_(run)


def _store_at(layer: int, piece: Piece, place: torch.Tensor) -> None:
    """Put a piece's one token into the extent that holds it, in host memory, at `place` [1] int64."""
    (span,) = piece.kv.spans_of(piece.first, piece.last)
    for part, new in zip(span.extent.mapped[layer], (piece.k, piece.v)):
        part.index_copy_(1, place, new[0])


def _store(layer: int, piece: Piece) -> None:
    """Put the piece's keys and values where its tokens belong."""
    for span in piece.kv.spans_of(piece.first, piece.last):
        places, low = span.within(piece.first, piece.last), max(span.first - piece.first, 0)
        rows = slice(low, low + places.stop - places.start)
        for part, new in enumerate((piece.k, piece.v)):
            if span.extent.on_device:
                copy_heads(span.extent.layers[layer][part, :, places], new[0, :, rows])
            elif span.extent.tier == "disk":
                _write_file(span.extent.layers[layer][part, :, places], new[0, :, rows])
            else:
                write_mapped(span.extent.mapped[layer][part, :, places], new[0, :, rows])
