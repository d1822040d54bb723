"""Where keys and values lie: two pools allocated once, one on the device and one in host memory.

Every request gets, for every layer, one block `[2, Hkv, capacity, D]` (K, then V) in either pool: the device first, the
host for the rest. A layer whose block lies on the host borrows a working buffer on the device while it is computed:
`HostKV` fills it ahead of the attention and carries what is new back behind it.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.streams import Copy, Event, Pairs, Streams
from elsa_serve.offload.units import format_size

ALIGNMENT = 256  # bytes: what vector loads and the copy engines like
WORKING_BUFFERS = 2  # one is computed on while the other is filled or emptied
FLAT_COPY_WASTE = 1 << 20  # bytes: below this much padding, one copy beats one a head

Tier = Literal["gpu", "host"]


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values are, in every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_nbytes(self, capacity: int) -> int:
        """Bytes of one layer's block for `capacity` tokens, padded to the alignment."""
        return _aligned(2 * self.kv_heads * capacity * self.head_dim * self.dtype.itemsize)

    def view(self, storage: torch.Tensor, capacity: int) -> torch.Tensor:
        """The first bytes of a flat uint8 tensor as [2, Hkv, capacity, D]."""
        nbytes = 2 * self.kv_heads * capacity * self.head_dim * self.dtype.itemsize
        return storage[:nbytes].view(self.dtype).view(2, self.kv_heads, capacity, self.head_dim)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, order=True)
class Block:
    offset: int
    nbytes: int


class Arena:
    """First-fit allocation inside one flat uint8 tensor. Neighbouring free blocks always merge, so that an arena with
    nothing in it is one block again."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage = storage
        self.capacity_bytes = storage.numel()
        self.used_bytes = 0
        self._free = [Block(0, self.capacity_bytes)] if self.capacity_bytes else []

    def allocate(self, nbytes: int) -> Block | None:
        """A block of `nbytes` rounded up to the alignment; None when no free block is that large."""
        nbytes = _aligned(nbytes)
        for i, block in enumerate(self._free):
            if block.nbytes >= nbytes:
                rest = Block(block.offset + nbytes, block.nbytes - nbytes)
                self._free[i : i + 1] = [rest] if rest.nbytes else []
                self.used_bytes += nbytes
                return Block(block.offset, nbytes)
        return None

    def free(self, block: Block) -> None:
        i = bisect.bisect(self._free, block)
        before, after = self._free[:i], self._free[i:]
        self.used_bytes -= block.nbytes
        if before and before[-1].offset + before[-1].nbytes == block.offset:
            last = before.pop()
            block = Block(last.offset, last.nbytes + block.nbytes)
        if after and block.offset + block.nbytes == after[0].offset:
            block = Block(block.offset, block.nbytes + after.pop(0).nbytes)
        self._free = [*before, block, *after]

    def bytes_of(self, block: Block) -> torch.Tensor:
        return self.storage[block.offset : block.offset + block.nbytes]


@dataclass(frozen=True, slots=True)
class LayerKV:
    tier: Tier
    block: Block
    data: torch.Tensor  # [2, Hkv, capacity, D], on the device or in page-locked host memory


@dataclass(eq=False, slots=True)
class RequestKV:
    """The KV of one request. `length` counts the tokens that every layer holds: a pass adds its own when it is over."""

    capacity: int
    layers: list[LayerKV]
    length: int = 0


class KVPool:
    """Blocks for requests, all layers or none. `gpu` and `host` are flat uint8 tensors."""

    def __init__(self, shape: KVShape, gpu: torch.Tensor, host: torch.Tensor, prefer_gpu: Sequence[int] = ()) -> None:
        self.shape = shape
        self.arenas: dict[Tier, Arena] = {"gpu": Arena(gpu), "host": Arena(host)}
        rest = [layer for layer in range(shape.layers) if layer not in set(prefer_gpu)]
        self._order = (*prefer_gpu, *rest)

    def check(self, capacity: int) -> None:
        """Raise BudgetError with numbers when `capacity` tokens do not fit even into empty pools."""
        nbytes = self.shape.block_nbytes(capacity)
        fit = sum(arena.capacity_bytes // nbytes for arena in self.arenas.values())
        if fit < self.shape.layers:
            gpu, host = (format_size(self.arenas[tier].capacity_bytes) for tier in ("gpu", "host"))
            raise BudgetError(
                f"{capacity} tokens need {format_size(nbytes * self.shape.layers)} of KV memory "
                f"({self.shape.layers} layers of {format_size(nbytes)}), but the KV pools hold {gpu} on the device and "
                f"{host} in host memory: ask for fewer tokens, or give more with --gpu-memory or --host-memory"
            )

    def allocate(self, capacity: int) -> RequestKV | None:
        """KV for `capacity` tokens; None when it does not fit now."""
        nbytes = self.shape.block_nbytes(capacity)
        placed: dict[int, LayerKV] = {}
        for layer in self._order:
            found = self._place(nbytes, capacity)
            if found is None:
                self._release(placed.values())
                return None
            placed[layer] = found
        return RequestKV(capacity, [placed[layer] for layer in range(self.shape.layers)])

    def _place(self, nbytes: int, capacity: int) -> LayerKV | None:
        for tier, arena in self.arenas.items():
            block = arena.allocate(nbytes)
            if block is not None:
                return LayerKV(tier, block, self.shape.view(arena.bytes_of(block), capacity))
        return None

    def _release(self, layers: Iterable[LayerKV]) -> None:
        for layer in layers:
            self.arenas[layer.tier].free(layer.block)

    def free(self, kv: RequestKV) -> None:
        """Give a request's blocks back. No copy from or to them may be under way."""
        self._release(kv.layers)
        kv.layers = []

    def close(self) -> None:
        """Let go of the pools' memory. Idempotent."""
        self.arenas = {tier: Arena(torch.empty(0, dtype=torch.uint8)) for tier in self.arenas}

    def used_bytes(self) -> dict[str, int]:
        return {tier: arena.used_bytes for tier, arena in self.arenas.items()}

    def capacity_bytes(self) -> dict[str, int]:
        return {tier: arena.capacity_bytes for tier, arena in self.arenas.items()}


@dataclass(frozen=True, slots=True)
class Visit:
    """One layer of one request on the host, computed in one pass: `new` tokens after `kv.length` old ones."""

    kv: RequestKV
    layer: int
    new: int


@dataclass(slots=True)
class _Open:
    """A visit whose working buffer is being filled, computed on, or emptied."""

    visit: Visit
    buffer: torch.Tensor  # [2, Hkv, capacity, D] on the device
    slot: int
    filled: Copy | None = None


@dataclass(slots=True)
class _Tail:
    """The one new token of a decode visit, on its way to the host."""

    visit: Visit
    row: int


@dataclass(slots=True)
class _Pass:
    waiting: deque[Visit] = field(default_factory=deque)
    open: deque[_Open] = field(default_factory=deque)
    tails: list[_Tail] = field(default_factory=list)
    home: list[Copy] = field(default_factory=list)  # copies into host blocks


class HostKV:
    """Carries the blocks of host layers to the device and their new tokens back, beside the compute.

    A pass announces its visits in the order in which it will compute them (`begin`), takes each buffer (`take`), gives
    it back (`give`), and ends with `end`, after which the host blocks are complete. A prompt's block travels back
    behind its layer; single new tokens travel back together at the end, and the host puts each into its place.
    """

    def __init__(self, shape: KVShape, streams: Streams, *, capacity: int, max_batch: int) -> None:
        """`capacity`: tokens of the largest block; 0 when no layer will ever lie on the host."""
        self._shape, self._streams = shape, streams
        self._up, self._down = streams.lane("kv-h2d"), streams.lane("kv-d2h")
        nbytes = shape.block_nbytes(capacity)
        device, pinned = streams.device, streams.device.type == "cuda"
        count = WORKING_BUFFERS if capacity else 0
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
        # What must be over before a buffer is written again, by buffer.
        self._busy: list[list[Event]] = [[] for _ in self._buffers]
        rows = shape.layers * max_batch if capacity else 0
        self._tail = torch.empty(rows, 2, shape.kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
        self._tail_home = torch.empty(self._tail.shape, dtype=shape.dtype, pin_memory=pinned and rows > 0)
        self._pass = _Pass()
        self._turn = 0

    @property
    def device_nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers) + self._tail.numel() * self._tail.element_size()

    def begin(self, visits: Sequence[Visit]) -> None:
        self._pass = _Pass(deque(visits))
        for _ in self._buffers:
            self._open_next()

    def take(self, kv: RequestKV, layer: int) -> torch.Tensor:
        """The block of a layer on the device, [2, Hkv, capacity, D], its first `kv.length` tokens in place."""
        while (head := self._head()).visit.kv is not kv or head.visit.layer != layer:
            # Its request was given up, perhaps between two chunks, with kernels on the buffer still under way.
            self._close_head([self._streams.record(), *([head.filled] if head.filled else [])])
        if head.filled is not None:
            self._streams.wait(head.filled)
        else:
            for event in self._busy[head.slot]:
                self._streams.wait(event)
        return head.buffer

    def give(self, kv: RequestKV, layer: int) -> None:
        """The attention over the block has been issued: carry home what is new, and refill the buffer."""
        head, computed = self._head(), self._streams.record()
        new = head.visit.new
        if kv.length == 0 or new > 1:
            pairs = _pairs(kv.layers[layer].data, head.buffer, kv.length, kv.length + new)
            copy = self._down.submit(pairs, object="kv", direction="d2h", after=(computed,))
            self._pass.home.append(copy)
            self._close_head([copy])
            return
        row = len(self._pass.tails)
        self._tail[row].copy_(head.buffer[:, :, kv.length])
        self._pass.tails.append(_Tail(head.visit, row))
        self._close_head([computed])

    def end(self) -> None:
        """Block until the host blocks hold everything the pass computed. Call before `length` is advanced."""
        tails, rows = self._pass.tails, len(self._pass.tails)
        if rows:
            pairs = [(self._tail_home[:rows], self._tail[:rows])]
            copy = self._down.submit(pairs, object="kv", direction="d2h", after=(self._streams.record(),))
            self._pass.home.append(copy)
        self._settle()
        for tail in tails:
            kv = tail.visit.kv
            kv.layers[tail.visit.layer].data[:, :, kv.length].copy_(self._tail_home[tail.row])

    def abandon(self) -> None:
        """A pass was cut short: wait for what is under way, so that blocks may be freed. Nothing new is kept."""
        self._settle()

    def _settle(self) -> None:
        self._streams.synchronize()
        for copy in self._pass.home:
            copy.synchronize()
        for head in self._pass.open:  # visits of requests given up, filled but never taken
            if head.filled is not None:
                head.filled.synchronize()
        self._pass = _Pass()
        self._busy = [[] for _ in self._buffers]

    def close(self) -> None:
        """Let go of the buffers. Idempotent."""
        self._settle()
        self._buffers, self._busy = [], []
        self._tail = self._tail_home = torch.empty(0)

    def _head(self) -> _Open:
        return self._pass.open[0]

    def _open_next(self) -> None:
        if not self._pass.waiting:
            return
        visit = self._pass.waiting.popleft()
        slot, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        opened = _Open(visit, self._shape.view(self._buffers[slot], visit.kv.capacity), slot)
        if visit.kv.length:
            pairs = _pairs(opened.buffer, visit.kv.layers[visit.layer].data, 0, visit.kv.length)
            opened.filled = self._up.submit(pairs, object="kv", direction="h2d", after=self._busy[slot])
        self._pass.open.append(opened)

    def _close_head(self, busy: Sequence[Event]) -> None:
        self._busy[self._pass.open.popleft().slot] = list(busy)
        self._open_next()


def _pairs(dst: torch.Tensor, src: torch.Tensor, first: int, last: int) -> Pairs:
    """Copies of tokens [first, last) of two blocks [2, Hkv, capacity, D], each copy contiguous on both sides."""
    nbytes = dst.numel() * dst.element_size()
    wasted = nbytes * (dst.shape[2] - last) // dst.shape[2]
    if first == 0 and wasted <= max(FLAT_COPY_WASTE, nbytes // 16):
        return [(dst, src)]
    heads = [(part, head) for part in range(2) for head in range(dst.shape[1])]
    return [(dst[part, head, first:last], src[part, head, first:last]) for part, head in heads]
