"""A layer's attention over KV that spans the tiers: every key is attended once, where that is cheapest, and exactly.

Each request takes one of three roads through a pass:
- resident: all its tokens lie on the device, new ones included;
- in place: the device attends its tokens and the host's cores theirs, at the same time; the two states are merged;
- over the device: the host's tokens are copied into a working buffer, once a layer. Prompts take it (nothing is to
  be copied for them), and more new tokens over a prefix than the host's arithmetic keeps up with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from elsa_kernels import State, merged_output

from elsa_serve.offload.attention import Attend, AttendState, AttentionOptions
from elsa_serve.offload.in_place import HostShare, InPlace
from elsa_serve.offload.kv import RequestKV
from elsa_serve.offload.streams import Streams
from elsa_serve.offload.working import Visit, WorkingKV, write_mapped
from elsa_serve.stats import HostAttention

Road = Literal["resident", "in place", "over the device"]


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
        if kv.length + new <= kv.split:
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
        shares: dict[int, HostShare] = {}
        for i, piece in enumerate(pieces):
            if self._roads[id(piece.kv)] == "in place":
                shares[i] = self._stage(layer, piece, options)
        event = self._in_place.launch(list(shares.values())) if shares and self._in_place else None
        # While the host is at work: everything that is the device's alone.
        results: list[torch.Tensor | State | None] = [
            self._device_state(layer, piece, options) if i in shares else self._whole(layer, piece, options)
            for i, piece in enumerate(pieces)
        ]
        if event is not None:
            self._streams.wait(event)
        return [self._finish(result, shares.get(i), piece) for i, (result, piece) in enumerate(zip(results, pieces))]

    def _whole(self, layer: int, piece: Piece, options: AttentionOptions) -> torch.Tensor:
        """Attention over keys that are all on the device."""
        kv, last = piece.kv, piece.last
        resident = self._roads[id(kv)] == "resident"
        if resident:
            block = kv.layers[layer].gpu
            _store(block, piece.first, piece.k, piece.v)
        else:
            block = self._working.write(kv, layer, piece.first, piece.k, piece.v)
        out = self._attend(piece.q, block[None, 0, :, :last], block[None, 1, :, :last], options)
        if piece.final and not resident:
            self._working.give()
        return out

    def _stage(self, layer: int, piece: Piece, options: AttentionOptions) -> HostShare:
        """Store the piece, each token in its tier, and hand its queries to the host."""
        assert self._in_place is not None
        kv, home, last = piece.kv, piece.kv.layers[layer], piece.last
        cut = min(max(kv.split - piece.first, 0), piece.q.shape[2])  # so many of the new tokens go to the device
        if cut:
            _store(home.gpu, piece.first, piece.k[:, :, :cut], piece.v[:, :, :cut])
        low = max(piece.first, kv.split) - kv.split
        for part, new in enumerate((piece.k, piece.v)):
            write_mapped(home.mapped[part, :, low : last - kv.split], new[0, :, cut:])
        sinks = None if self._sees_device(piece, options) else options.sinks
        return self._in_place.stage(piece.q, home.host[:, :, : last - kv.split], piece.first - kv.split, options, sinks)

    def _device_state(self, layer: int, piece: Piece, options: AttentionOptions) -> State | None:
        """The piece's state over the tokens on the device; None where none of them is seen."""
        assert self._attend_state is not None
        if not self._sees_device(piece, options):
            return None
        here = min(piece.kv.split, piece.last)
        block = piece.kv.layers[layer].gpu
        return self._attend_state(piece.q, block[None, 0, :, :here], block[None, 1, :, :here], options, piece.first)

    @staticmethod
    def _sees_device(piece: Piece, options: AttentionOptions) -> bool:
        """Whether some row sees a token on the device. Sinks then join there, else on the host: once in all."""
        oldest = 0 if options.window is None else piece.first - options.window + 1
        return min(piece.kv.split, piece.last) > max(0, oldest)

    def _finish(self, result: torch.Tensor | State | None, share: HostShare | None, piece: Piece) -> torch.Tensor:
        """Merge in the order of the keys: the device's tokens, then the host's."""
        if isinstance(result, torch.Tensor):
            return result
        assert share is not None
        if result is None:
            return share.state.finalize(piece.q.dtype)
        return merged_output(result, share.state, piece.q.dtype)

    def end(self) -> None:
        """Block until the tiers hold everything the pass computed. Raises what went wrong on the host."""
        self._working.end()
        if self._in_place is not None:
            self._in_place.end()

    def abandon(self) -> None:
        """A pass was cut short: wait for what is under way, so that blocks may be freed. Nothing new is kept."""
        self._working.end()
        if self._in_place is not None:
            self._in_place.abandon()

    def drain(self) -> HostAttention | None:
        """What the host attended since the last call."""
        return self._in_place.drain() if self._in_place is not None else None

    def close(self) -> None:
        self._working.close()
        if self._in_place is not None:
            self._in_place.close()


def _store(block: torch.Tensor, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
    last = first + k.shape[2]
    block[0, :, first:last] = k[0]
    block[1, :, first:last] = v[0]
