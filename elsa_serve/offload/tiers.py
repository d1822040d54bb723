"""A layer's attention over KV that spans the tiers: every key is attended once, where that is cheapest, and exactly.

Each request takes one of three roads through a pass:
- resident: all its tokens lie on the device, new ones included;
- in place: the device attends its tokens and the host's cores theirs, at the same time; the two states are merged;
- over the device: the host's tokens are copied into a working buffer, once a layer. Prompts take it (nothing is to
  be copied for them), and more new tokens over a prefix than the host's arithmetic keeps up with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from elsa_kernels import State, merged_output
from elsa_kernels.elementwise import copy_heads

from elsa_serve.offload.attention import Attend, AttendState, AttentionOptions
from elsa_serve.offload.in_place import HostShare, InPlace
from elsa_serve.offload.kv import RequestKV, Span, Tier
from elsa_serve.offload.streams import Streams
from elsa_serve.offload.working import Visit, WorkingKV, write_mapped
from elsa_serve.stats import HostAttention

Road = Literal["resident", "in place", "over the device"]
STATE_ROWS = 1024  # query rows whose float32 states over several spans are alive at once


class Rows(Protocol):
    """Tokens of one request in a pass: what `Part` offers."""

    kv: RequestKV
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one request in one chunk of one layer: q [1, H, n, D], k and v [1, Hkv, n, D], the first at position
    `first`. `final`: the request's last rows in this layer."""

    kv: RequestKV
    first: int
    final: bool
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def last(self) -> int:
        return self.first + self.q.shape[2]


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
    ) -> None:
        """Without `in_place` or `attend_state`, KV on the host is always brought to the device."""
        self._working, self._in_place, self._streams = working, in_place, streams
        self._attend, self._attend_state = attend, attend_state
        self._limit = limit
        self._roads: dict[int, Road] = {}

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

    def begin(self, parts: Sequence[Rows], layers: int) -> None:
        self._roads = {id(part.kv): self.road(part.kv, len(part.tokens)) for part in parts}
        moved = [part.kv for part in parts if self._roads[id(part.kv)] == "over the device"]
        self._working.begin([Visit(kv, layer) for layer in range(layers) for kv in moved])

    def attend(self, layer: int, pieces: Sequence[Piece], options: AttentionOptions) -> list[torch.Tensor]:
        """Store the pieces' keys and values and attend; [1, H, n, D] for each."""
        shares = {
            i: self._stage(layer, piece, options)
            for i, piece in enumerate(pieces)
            if self._roads[id(piece.kv)] == "in place"
        }
        staged = [share for found in shares.values() for share in found]
        event = self._in_place.launch(staged) if staged and self._in_place else None
        # While the host is at work: everything that is the device's alone.
        results = [
            self._device_state(layer, piece, options) if i in shares else self._whole(layer, piece, options)
            for i, piece in enumerate(pieces)
        ]
        if event is not None:
            self._streams.wait(event)
        return [
            self._finish(result, shares.get(i, ()), piece) for i, (result, piece) in enumerate(zip(results, pieces))
        ]

    def _whole(self, layer: int, piece: Piece, options: AttentionOptions) -> torch.Tensor:
        """Attention over keys that are all on the device."""
        kv, last = piece.kv, piece.last
        if self._roads[id(kv)] == "resident":
            _store(layer, piece)
            if kv.spans[0].last >= last:
                block = kv.spans[0].extent.layers[layer]
            elif self._attend_state is not None:
                return self._device_state_in_rows(layer, piece, options)
            else:
                spans = kv.spans_of(0, last)
                block = torch.cat([span.extent.layers[layer][:, :, span.within(0, last)] for span in spans], 2)
            return self._attend(piece.q, block[None, 0, :, :last], block[None, 1, :, :last], options)
        block = self._working.write(kv, layer, piece.first, piece.k, piece.v)
        out = self._attend(piece.q, block[None, 0, :, :last], block[None, 1, :, :last], options)
        if piece.final:
            self._working.give()
        return out

    def _stage(self, layer: int, piece: Piece, options: AttentionOptions) -> list[HostShare]:
        """Store the piece, each token in its tier, and hand its queries to the host, for each of its spans there."""
        assert self._in_place is not None
        _store(layer, piece)
        sinks = None if self._seen(piece, options, "gpu") else options.sinks
        shares = []
        for span in self._seen(piece, options, "host"):
            keys = span.extent.layers[layer][:, :, span.within(0, piece.last)]
            shares.append(self._in_place.stage(piece.q, keys, piece.first - span.first, options, sinks))
            sinks = None
        return shares

    def _device_state(self, layer: int, piece: Piece, options: AttentionOptions) -> State | None:
        """The piece's state over the tokens on the device; None where none of them is seen."""
        states = self._device_states(layer, piece, options)
        return functools.reduce(State.merge, states) if states else None

    def _device_states(self, layer: int, piece: Piece, options: AttentionOptions) -> list[State]:
        """The same, span by span."""
        assert self._attend_state is not None
        states: list[State] = []
        for span in self._seen(piece, options, "gpu"):
            block = span.extent.layers[layer][:, :, span.within(0, piece.last)]
            start = piece.first - span.first
            states.append(self._attend_state(piece.q, block[None, 0], block[None, 1], options, start))
            options = replace(options, sinks=None)  # they join once in all
        return states

    def _device_state_in_rows(self, layer: int, piece: Piece, options: AttentionOptions) -> torch.Tensor:
        """Attention over several spans on the device, few rows at a time, because states are in float32."""
        outs = []
        for low in range(0, piece.q.shape[2], STATE_ROWS):
            rows = slice(low, low + STATE_ROWS)
            part = replace(piece, first=piece.first + low, q=piece.q[:, :, rows])
            outs.append(_merged(self._device_states(layer, part, options), piece.q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    @staticmethod
    def _seen(piece: Piece, options: AttentionOptions, tier: Tier) -> list[Span]:
        """The spans of a tier with tokens that some row sees. Sinks join on the device if there are any, else on the
        host: once in all."""
        oldest = 0 if options.window is None else max(0, piece.first - options.window + 1)
        return list(piece.kv.spans_of(oldest, piece.last, tier))

    def _finish(self, result: torch.Tensor | State | None, shares: Sequence[HostShare], piece: Piece) -> torch.Tensor:
        """Merge in a fixed order: the device's tokens, then the host's."""
        if isinstance(result, torch.Tensor):
            return result
        return _merged([*([result] if result is not None else []), *(share.state for share in shares)], piece.q.dtype)

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


def _merged(states: Sequence[State], dtype: torch.dtype) -> torch.Tensor:
    """One output of one or more states, merged in their order."""
    if len(states) == 1:
        return states[0].finalize(dtype)
    return merged_output(functools.reduce(State.merge, states[:-1]), states[-1], dtype)


def _store(layer: int, piece: Piece) -> None:
    """Put the piece's keys and values where its tokens belong."""
    for span in piece.kv.spans_of(piece.first, piece.last):
        places, low = span.within(piece.first, piece.last), max(span.first - piece.first, 0)
        rows = slice(low, low + places.stop - places.start)
        for part, new in enumerate((piece.k, piece.v)):
            if span.extent.tier == "gpu":
                copy_heads(span.extent.layers[layer][part, :, places], new[0, :, rows])
            else:
                write_mapped(span.extent.mapped[layer][part, :, places], new[0, :, rows])
