"""The road over the device for layers whose KV lies in part on the host: prompts, and many new tokens over a prefix.

A layer's keys and values are put together in one working buffer on the device, `[2, Hkv, capacity, D]`: what the
device holds of them, and what the host holds, copied once ahead of the attention. What a pass adds is computed into the
buffer and from there carried home; nothing is copied back that did not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from elsa_kernels.elementwise import copy_heads

from elsa_serve.offload.file_lane import FileLane
from elsa_serve.offload.kv import KVShape, RequestKV
from elsa_serve.offload.streams import Copy, Event, Pairs, Streams

# So few tokens go home by a kernel that writes host memory; more by the copy engines.
SMALL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Visit:
    """One layer of one request, computed over the working buffer: new tokens after `kv.length` old ones."""

    kv: RequestKV
    layer: int


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Tokens [first, last) of the buffer on their way to the host."""

    kv: RequestKV
    first: int
    last: int
    copy: Copy


@dataclass(slots=True)
class _Pass:
    waiting: deque[Visit] = field(default_factory=deque)
    current: Visit | None = None  # the one that the buffer is for
    filled: Copy | None = None
    taken: bool = False
    leaving: list[_Leaving] = field(default_factory=list)


class WorkingKV:
    """The working buffer. A pass announces its visits in the order in which it will compute them (`begin`), for each
    calls `write` for every chunk, then `give`, and ends with `end`, after which the host holds everything.
    """

    def __init__(self, shape: KVShape, streams: Streams, *, capacity: int, file: FileLane | None = None) -> None:
        """`capacity`: tokens of the largest request; 0 when no KV will ever lie on the host. `file`: of the disk tier,
        where there is one."""
        self._shape, self._streams, self._file = shape, streams, file
        self._up, self._down = streams.lane("kv-h2d"), streams.lane("kv-d2h")
        nbytes = shape.block_nbytes(capacity) if capacity else 0
        self._storage = torch.empty(nbytes, dtype=torch.uint8, device=streams.device)
        self._pass = _Pass()

    @property
    def device_nbytes(self) -> int:
        return self._storage.numel()

    def begin(self, visits: Sequence[Visit]) -> None:
        self._pass = _Pass(deque(visits))
        self._next([])

    def _take(self, kv: RequestKV, layer: int) -> torch.Tensor:
        """The layer on the device, [2, Hkv, capacity, D], its first `kv.length` tokens in place."""
        run = self._pass
        while run.current is None or run.current.kv is not kv or run.current.layer != layer:
            # Its request was given up, perhaps between two chunks, with kernels on the buffer still under way.
            if run.current is None:
                raise RuntimeError(f"layer {layer} asked for, which the pass did not announce")
            self._next([self._streams.record(), *([run.filled] if run.filled else [])])
        buffer = self._view(kv)
        if not run.taken and kv.length:
            for left in run.leaving:  # what the fill overwrites, it waited for; the device's share overwrites too
                self._streams.wait(left.copy)
            if run.filled is not None:
                self._streams.wait(run.filled)
            for span in kv.spans_of(0, kv.length, on_device=True):
                here = span.within(0, kv.length)
                _copy_runs(buffer[:, :, span.first : span.first + here.stop], span.extent.layers[layer][:, :, here])
        run.taken = True
        return buffer

    def write(self, kv: RequestKV, layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Put k and v [1, Hkv, n, D] of tokens from `first` on into the buffer and their homes. Returns the buffer."""
        buffer, last = self._take(kv, layer), first + k.shape[2]
        for left in self._pass.leaving:
            if left.kv is not kv or (left.first < last and first < left.last):
                self._streams.wait(left.copy)
        copy_heads(buffer[0, :, first:last], k[0])
        copy_heads(buffer[1, :, first:last], v[0])
        for span in kv.spans_of(first, last):
            places, low = span.within(first, last), max(span.first, first)
            new = buffer[:, :, low : low + places.stop - places.start]
            if span.extent.on_device:
                _copy_runs(span.extent.layers[layer][:, :, places], new)
            elif new.shape[2] <= SMALL_TOKENS and span.extent.tier == "host":
                write_mapped(span.extent.mapped[layer][:, :, places], new)
            else:
                home, after = span.extent.layers[layer][:, :, places], (self._streams.record(),)
                if span.extent.tier == "disk":
                    assert self._file is not None
                    copies = self._file.submit(home, new, after)
                else:
                    copies = [self._down.submit([(home, new)], object="kv", direction="d2h", after=after)]
                self._pass.leaving += [_Leaving(kv, low, low + new.shape[2], copy) for copy in copies]
        return buffer

    def give(self) -> None:
        """The attention over the buffer has been issued: it may be filled for the next visit."""
        self._next([self._streams.record()])

    def end(self) -> None:
        """Block until the host holds everything the pass computed. Raises what a copy raised."""
        copies = [left.copy for left in self._pass.leaving]
        if self._pass.filled is not None:  # for a visit of a request given up
            copies.append(self._pass.filled)
        self._pass = _Pass()
        self._streams.synchronize()
        errors = [error for copy in copies if (error := _outcome(copy)) is not None]
        if self._file is not None:
            errors += self._file.end()
        if errors:
            raise errors[0]

    def abandon(self) -> None:
        """The same for a pass that is lost anyway."""
        with suppress(Exception):
            self.end()

    def close(self) -> None:
        """Let go of the buffer. Idempotent."""
        self.abandon()
        self._storage = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            self._file.close()

    def _view(self, kv: RequestKV) -> torch.Tensor:
        return self._shape.view(self._storage, kv.capacity)

    def _next(self, busy: list[Event]) -> None:
        """Go on to the next visit; copies into the buffer begin when `busy` is over."""
        run = self._pass
        run.current, run.filled, run.taken = (run.waiting.popleft() if run.waiting else None), None, False
        run.leaving = [left for left in run.leaving if not _is_over(left.copy)]
        if run.current is None:
            return
        kv = run.current.kv
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for span in kv.spans_of(0, kv.length, on_device=False):
            places = span.within(0, kv.length)
            here = self._view(kv)[:, :, span.first : span.first + places.stop]
            there = span.extent.layers[run.current.layer][:, :, places]
            # A file's pages are copied by the host itself, and run by run without a temporary.
            pairs += runs_of(here, there) if span.extent.tier == "disk" else [(here, there)]
        if pairs:
            after = [*busy, *(left.copy for left in run.leaving)]
            run.filled = self._up.submit(pairs, object="kv", direction="h2d", after=after)


def _is_over(copy: Copy) -> bool:
    """Whether a copy has ended well; one that failed is kept for `end` to raise."""
    return copy.query() and _outcome(copy) is None


def _outcome(copy: Copy) -> Exception | None:
    """Wait for a copy; what it raised."""
    try:
        copy.synchronize()
    except Exception as error:
        return error
    return None


def write_mapped(mapped: torch.Tensor, values: torch.Tensor) -> None:
    """Write host memory from the device by a kernel, which a `copy_` might hand to a copy engine's queue instead."""
    torch.mul(values, 1, out=mapped)


def _copy_runs(target: torch.Tensor, source: torch.Tensor) -> None:
    """target = source, [2, Hkv, n, D] on the device, each contiguous per head: torch's own copy of such runs reaches a
    third of the memory's bandwidth."""
    for part in range(2):
        copy_heads(target[part], source[part])


def runs_of(dst: torch.Tensor, src: torch.Tensor) -> Pairs:
    """Copies of two tensors [2, Hkv, n, D], each contiguous on both sides."""
    if dst.is_contiguous() and src.is_contiguous():
        return [(dst, src)]
    return [(dst[part, head], src[part, head]) for part in range(2) for head in range(dst.shape[1])]
