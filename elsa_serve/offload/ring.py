"""The weights' way to the device: resident layers once, the others through a ring of slots, ahead of the compute.

    stream = WeightStream(weights, resident=plan.resident_layers, slots=plan.slots, streams=streams)
    for i in range(layers):
        with stream.layer(i) as decoder_layer:
            hidden = decoder_layer(hidden, ...)

With S slots, S − 1 layers are on their way while one computes. The ring wraps around: during the last layers of a pass
the first layers of the next are already being copied. Layers on disk are read into staging buffers further ahead still;
one whose read is not over is waited for only when its turn to compute has come.

Invariant: a slot is overwritten only after an event recorded behind the last compute that reads it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from elsa_serve.offload.disk_layers import Feed
from elsa_serve.offload.streams import Copy, Event, Streams
from elsa_serve.offload.weights import LayerBinding, ModelWeights, flat_views

Parameters = Mapping[str, nn.Parameter]


class WeightStream:
    """Binds one decoder layer after the other to its weights on the device.

    `resident` layers are uploaded once, unless they were loaded to the device; the others need at least 2 `slots` (1
    works, without any overlap).
    Raises ValueError for slots or layers out of range. Belongs to one thread.
    """

    def __init__(self, weights: ModelWeights, resident: Collection[int], slots: int, streams: Streams) -> None:
        self._store = weights.store
        self._layers = weights.decoder_layers
        self._streams = streams
        self._lane = streams.lane("weights")
        count = len(self._layers)
        if not all(0 <= index < count for index in resident):
            raise ValueError(f"resident layers {sorted(resident)} are not all in 0 … {count - 1}")
        if both := sorted(set(resident) & weights.store.on_disk):
            raise ValueError(f"layers {both} are both resident and on disk")
        self._streamed = [index for index in range(count) if index not in set(resident)]
        if self._streamed and slots < 1:
            raise ValueError(f"{len(self._streamed)} streamed layers need at least one slot, not {slots}")
        self._bindings = [LayerBinding(layer) for layer in self._layers]
        self._resident, self._resident_nbytes = self._upload(sorted(set(resident)), weights.device)
        size = max((weights.store.layers[index].numel() for index in self._streamed), default=0)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=weights.device) for _ in range(slots if size else 0)]
        self._views: dict[tuple[int, int], Parameters] = {}  # (slot, layer), built on first use
        self._copies: list[Copy | None] = [None] * len(self._slots)  # the last copy into each slot
        self._released: list[Event] = [streams.record()] * len(self._slots)  # behind the last compute on each slot
        self._run_ahead: deque[Event] = deque()
        self._max_run_ahead = max(2, slots)
        self._position = 0  # the layer that comes next
        self._used = self._submitted = 0  # streamed layers taken from, and sent into, the ring since it began
        self._feed = Feed(weights.disk, self._streamed) if weights.disk is not None else None
        self._prefetch()

    def _upload(self, resident: list[int], device: torch.device) -> tuple[dict[int, Parameters], int]:
        """Copy the resident layers to the device, once and for good."""
        parameters: dict[int, Parameters] = {}
        nbytes = 0
        for index in resident:
            flat = self._store.layers[index]
            if index not in self._store.resident:
                flat = flat.to(device, copy=True)
            parameters[index] = _as_parameters(flat, self._store.layouts[index])
            nbytes += flat.numel()
        return parameters, nbytes

    @property
    def device_nbytes(self) -> int:
        """Device memory held: slots and resident layers."""
        return self._resident_nbytes + sum(slot.numel() for slot in self._slots)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Bind layer `index` to its weights on the device and yield the module; its parameters are meta afterwards.

        Layers come in order, 0 … last, then 0 again. The host runs at most `slots` layers ahead of the device, so that
        what it decides between layers (a cancellation) takes effect soon.
        """
        if index != self._position:
            raise RuntimeError(f"layer {index} asked for, but layer {self._position} is next: call rewind() first")
        self._wait_run_ahead()
        resident = self._resident.get(index)
        self._bindings[index].bind(resident if resident is not None else self._arrived(index))
        try:
            yield self._layers[index]
        finally:
            self._bindings[index].unbind()
            self._passed(index)

    @contextmanager
    def issued(self, index: int) -> Iterator[nn.Module]:
        """The same in a pass that is issued for CUDA graphs: in any order, without events. A streamed layer is bound to
        the slot that it has in the pass that comes next, whatever lies there now."""
        resident = self._resident.get(index)
        if resident is None:
            order = self._passes * len(self._streamed) + self._streamed.index(index)
            resident = self._parameters(order % len(self._slots), index)
        self._bindings[index].bind(resident)
        try:
            yield self._layers[index]
        finally:
            self._bindings[index].unbind()

    @property
    def all_resident(self) -> bool:
        return not self._streamed

    @property
    def first_slot(self) -> int:
        """The slot of a pass's first streamed layer: where it is the same, so are all layers'."""
        return self._passes * len(self._streamed) % len(self._slots) if self._slots else 0

    @property
    def _passes(self) -> int:
        """Since the ring began."""
        return self._used // len(self._streamed)

    def streamed(self, index: int) -> bool:
        return index not in self._resident

    @contextmanager
    def replayed(self, index: int) -> Iterator[None]:
        """Around a graph that computes the streamed layer `index`: it begins when the weights are there, and frees
        their slot. In order; resident layers are left out."""
        self._wait_run_ahead()
        self._position = index
        self._arrived(index)
        try:
            yield
        finally:
            self._passed(index)

    def _wait_run_ahead(self) -> None:
        while len(self._run_ahead) >= self._max_run_ahead:
            self._run_ahead.popleft().synchronize()

    def _passed(self, index: int) -> None:
        done = self._streams.record()
        self._run_ahead.append(done)
        self._position = (index + 1) % len(self._layers)
        if self.streamed(index):
            self._release(done)

    def _arrived(self, index: int) -> Parameters:
        """Make compute wait for the layer's copy; the layer's parameters in its slot."""
        slot = self._used % len(self._slots)
        if self._submitted == self._used:  # its read from disk was not over when the slot came free
            self._submit()
        self._prefetch()
        copy = self._copies[slot]
        if copy is not None:
            self._streams.wait(copy)
        return self._parameters(slot, index)

    def _parameters(self, slot: int, index: int) -> Parameters:
        key = slot, index
        if key not in self._views:
            nbytes = self._store.layers[index].numel()
            self._views[key] = _as_parameters(self._slots[slot][:nbytes], self._store.layouts[index])
        return self._views[key]

    def _release(self, done: Event) -> None:
        self._released[self._used % len(self._slots)] = done
        self._used += 1
        self._prefetch()

    def _prefetch(self) -> None:
        """Send layers into the ring until every slot is taken, or the next one is still being read from disk."""
        while self._submitted < self._used + len(self._slots):
            feed = self._feed
            if feed is not None and self._submitted in feed and not feed.ready(self._submitted):
                return
            self._submit()

    def _submit(self) -> None:
        """Send the next layer into its slot; one on disk is waited for. Raises what its read raised."""
        feed = self._feed if self._feed is not None and self._submitted in self._feed else None
        if feed is None:
            host, read = self._store.layers[self._streamed[self._submitted % len(self._streamed)]], None
        else:
            try:
                host, read = feed.take(self._submitted)
            except BaseException:
                feed.restart(self._submitted)  # the next pass reads it again
                raise
        slot = self._submitted % len(self._slots)
        pair = (self._slots[slot][: host.numel()], host)
        copy = self._lane.submit([pair], object="weights", direction="h2d", after=[self._released[slot]])
        if feed is not None and read is not None:
            feed.lend(copy, read)
        self._copies[slot] = copy
        self._submitted += 1

    def rewind(self) -> None:
        """Begin again at layer 0, behind the last layer that was replayed or when a pass was cut short. What was
        prefetched for the rest of it is discarded."""
        if self._position == 0:
            return
        self._position = 0
        if self._used % max(1, len(self._streamed)) == 0:
            return  # the ring stands at the first streamed layer already
        # The lane copies in order, so the discarded layers arrive before the new ones overwrite them.
        self._used = self._submitted = 0
        if self._feed is not None:
            self._feed.restart(0)
        self._prefetch()

    def close(self) -> None:
        """Wait for copies under way and free the device memory. Idempotent."""
        for copy in self._copies:
            if copy is not None:
                copy.synchronize()
        if self._feed is not None:
            self._feed.close()
        self._streams.synchronize()
        self._copies, self._slots, self._views, self._resident = [], [], {}, {}
        self._resident_nbytes = 0


def _as_parameters(flat: torch.Tensor, layout: Mapping) -> Parameters:
    return {name: nn.Parameter(view, requires_grad=False) for name, view in flat_views(flat, layout).items()}
