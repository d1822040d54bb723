"""Where keys and values lie: two pools allocated once, one on the device and one in host memory.

Tokens that lie together are an extent: on one tier, in every layer `[2, Hkv, capacity, D]` (K, then V), contiguous per
head, which is what the CPU's attention reads and what copies are long runs of. A request's KV is a list of spans of
extents: usually one on the device, as long as it fits there, and one in host memory for the rest; it grows by further
extents, and begins with extents of another request where both begin with the same tokens.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.units import aligned, format_size

Tier = Literal["gpu", "host", "disk"]  # in the order in which requests fill them


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values are, in every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_nbytes(self, capacity: int) -> int:
        """Bytes of one layer's block for `capacity` tokens, padded to the alignment."""
        return aligned(2 * self.kv_heads * capacity * self.head_dim * self.dtype.itemsize)

    def view(self, storage: torch.Tensor, capacity: int) -> torch.Tensor:
        """The first bytes of a flat uint8 tensor as [2, Hkv, capacity, D]."""
        nbytes = 2 * self.kv_heads * capacity * self.head_dim * self.dtype.itemsize
        return storage[:nbytes].view(self.dtype).view(2, self.kv_heads, capacity, self.head_dim)


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
        nbytes = aligned(nbytes)
        for i, block in enumerate(self._free):
            if block.nbytes >= nbytes:
                rest = Block(block.offset + nbytes, block.nbytes - nbytes)
                self._free[i : i + 1] = [rest] if rest.nbytes else []
                self.used_bytes += nbytes
                return Block(block.offset, nbytes)
        return None

    def room_for(self, nbytes: int) -> int:
        """How many blocks of `nbytes` could be allocated now."""
        return sum(block.nbytes // aligned(nbytes) for block in self._free) if nbytes else sys.maxsize

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


@dataclass(eq=False, slots=True)
class Extent:
    """Tokens that lie together, and who holds them: `users` are requests, `keepers` is the prefix cache."""

    tier: Tier
    capacity: int
    layers: list[torch.Tensor]  # [2, Hkv, capacity, D], on the device, in host memory or in a mapped file
    mapped: list[torch.Tensor]  # the same memory as the device addresses it; a file's pages it does not
    blocks: list[Block]
    users: int = 0
    keepers: int = 0
    sums: torch.Tensor | None = None  # [layers, capacity] int64, of the debug mode that looks for changed memory

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def on_device(self) -> bool:
        return self.tier == "gpu"

    @property
    def exclusive(self) -> bool:
        """Held once: whoever holds it may write to it."""
        return self.users + self.keepers == 1


@dataclass(frozen=True, slots=True)
class Span:
    """The first `tokens` of an extent as the tokens of a request from position `first` on."""

    extent: Extent
    first: int
    tokens: int

    @property
    def last(self) -> int:
        return self.first + self.tokens

    def within(self, first: int, last: int) -> slice:
        """Positions [first, last) of the request, as far as the span reaches, as places in the extent."""
        return slice(max(first - self.first, 0), min(last - self.first, self.tokens))


@dataclass(eq=False, slots=True)
class RequestKV:
    """The KV of one request, in spans without gaps. `length` counts the tokens that every layer holds: a pass adds its
    own when it is over. What lies beyond is garbage, to be overwritten.
    """

    spans: list[Span] = field(default_factory=list)
    length: int = 0
    kept: bool = False  # by the prefix cache, after its request

    @property
    def capacity(self) -> int:
        return self.spans[-1].last if self.spans else 0

    @property
    def split(self) -> int:
        """Tokens from the first on that lie on the device."""
        return next((span.first for span in self.spans if not span.extent.on_device), self.capacity)

    def host_tokens(self, last: int) -> int:
        """How many of the first `last` tokens lie in host memory or on disk."""
        return sum(min(span.tokens, last - span.first) for span in self.spans_of(0, last, on_device=False))

    def spans_of(self, first: int, last: int, on_device: bool | None = None) -> Iterator[Span]:
        """The spans that hold some of the tokens [first, last), in order: on the device, elsewhere, or all."""
        for span in self.spans:
            if span.first < last and first < span.last and on_device in (None, span.extent.on_device):
                yield span


class KVPool:
    """Extents for requests, in all layers or none. `gpu`, `host` and `disk` are flat uint8 tensors."""

    def __init__(
        self,
        shape: KVShape,
        gpu: torch.Tensor,
        host: torch.Tensor,
        mapped: torch.Tensor | None = None,
        disk: torch.Tensor | None = None,
    ) -> None:
        """`mapped`: `host` as the device addresses it, where that is another tensor. `disk`: a mapped file."""
        self.shape = shape
        self.arenas: dict[Tier, Arena] = {"gpu": Arena(gpu), "host": Arena(host)}
        if disk is not None:
            self.arenas["disk"] = Arena(disk)
        self._mapped = host if mapped is None else mapped
        self._idle: dict[Tier, int] = dict.fromkeys(self.arenas, 0)  # bytes that only the prefix cache holds

    def check(self, capacity: int) -> None:
        """Raise BudgetError with numbers when `capacity` tokens do not fit even into empty pools."""
        sizes, left = self.capacity_bytes(), capacity
        for size in sizes.values():
            left -= largest(left, lambda tokens, size=size: self._nbytes(tokens) <= size)  # type: ignore[misc]
        if left:
            nbytes, layers = self.shape.block_nbytes(capacity), self.shape.layers
            disk = f", {format_size(sizes['disk'])} on disk" if "disk" in sizes else ""
            raise BudgetError(
                f"{capacity} tokens need {format_size(nbytes * layers)} of KV memory ({layers} layers of "
                f"{format_size(nbytes)}), but the KV pools hold {format_size(sizes['gpu'])} on the device and "
                f"{format_size(sizes['host'])} in host memory{disk}: ask for fewer tokens, or give more with "
                "--gpu-memory or --host-memory"
            )

    def _nbytes(self, tokens: int) -> int:
        return self.shape.layers * self.shape.block_nbytes(tokens)

    def allocate(
        self, capacity: int, prefix: RequestKV | None = None, shared: int = 0, disk: bool = True
    ) -> RequestKV | None:
        """KV for `capacity` tokens, on the device as far as there is room, then in host memory, then on disk if that is
        allowed; None when it does not fit now.

        Its first `shared` tokens are those of `prefix`, in the same memory, and count as computed.
        """
        own = self._extents(capacity - shared, shared, disk)
        if own is None:
            return None
        kv = RequestKV([], shared)
        for span in prefix.spans if prefix is not None else ():
            if span.first < shared:
                kv.spans.append(Span(span.extent, span.first, min(span.tokens, shared - span.first)))
        kv.spans += own
        for span in kv.spans:
            self._hold(span.extent, users=1)
        return kv

    def extend(self, kv: RequestKV, capacity: int, disk: bool = True) -> bool:
        """Room for `capacity` tokens. Takes nothing when it does not fit now."""
        own = self._extents(capacity - kv.capacity, kv.capacity, disk)
        if own is None:
            return False
        kv.spans += own
        for span in own:
            self._hold(span.extent, users=1)
        return True

    def _extents(self, tokens: int, first: int, disk: bool) -> list[Span] | None:
        """New extents for so many tokens from position `first` on."""
        spans: list[Span] = []
        last = first + max(0, tokens)
        for tier in self.arenas:
            if tier == "disk" and not disk:
                continue
            count = self.room(tier, last - first)
            extent = self._extent(tier, count) if count else None
            if extent is not None:
                spans.append(Span(extent, first, count))
                first += count
        if first == last:
            return spans
        for span in spans:
            self._release(span.extent)
        return None

    def room(self, tier: Tier, tokens: int) -> int:
        """How many of so many tokens fit into a tier now, in one extent."""
        fits = self.arenas[tier].room_for
        return largest(tokens, lambda count: fits(self.shape.block_nbytes(count)) >= self.shape.layers)

    def device_room(self, tokens: int) -> int:
        return self.room("gpu", tokens)

    def move(self, extent: Extent, tier: Tier) -> bool:
        """Carry an extent that no request uses to another tier. False when that has no room, or is not there."""
        if tier not in self.arenas:
            return False
        other = self._extent(tier, extent.capacity)
        if other is None:
            return False
        for here, there in zip(extent.layers, other.layers):
            there.copy_(here, non_blocking=True)
        for device in {layer.device for layer in (extent.layers[0], other.layers[0]) if layer.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._idle[extent.tier] -= extent.nbytes
        self._release(extent)
        extent.tier, extent.layers, extent.mapped, extent.blocks = tier, other.layers, other.mapped, other.blocks
        self._idle[tier] += extent.nbytes
        return True

    def _extent(self, tier: Tier, capacity: int) -> Extent | None:
        nbytes, arena = self.shape.block_nbytes(capacity), self.arenas[tier]
        blocks: list[Block] = []
        while len(blocks) < self.shape.layers and (block := arena.allocate(nbytes)) is not None:
            blocks.append(block)
        if len(blocks) < self.shape.layers:
            for block in blocks:
                arena.free(block)
            return None
        layers = [self._view(arena.storage, block, capacity) for block in blocks]
        mapped = [self._view(self._mapped, block, capacity) for block in blocks] if tier == "host" else layers
        return Extent(tier, capacity, layers, mapped, blocks)

    def _view(self, storage: torch.Tensor, block: Block, capacity: int) -> torch.Tensor:
        return self.shape.view(storage[block.offset : block.offset + block.nbytes], capacity)

    def _hold(self, extent: Extent, users: int = 0, keepers: int = 0) -> None:
        """Change who holds an extent; without any holder it is free."""
        nbytes = extent.nbytes
        self._idle[extent.tier] -= nbytes if extent.users == 0 and extent.keepers else 0
        extent.users += users
        extent.keepers += keepers
        self._idle[extent.tier] += nbytes if extent.users == 0 and extent.keepers else 0
        if extent.users == extent.keepers == 0:
            self._release(extent)

    def _release(self, extent: Extent) -> None:
        for block in extent.blocks:
            self.arenas[extent.tier].free(block)
        extent.blocks, extent.layers, extent.mapped = [], [], []

    def free(self, kv: RequestKV) -> None:
        """Give a request's share of its extents back. No copy from or to them may be under way."""
        while kv.spans:
            self._let_go(kv)

    def _let_go(self, kv: RequestKV) -> None:
        extent = kv.spans.pop().extent
        self._hold(extent, users=0 if kv.kept else -1, keepers=-1 if kv.kept else 0)

    def keep(self, kv: RequestKV) -> None:
        """The request has ended; its KV stays, without the extents that it had not come to."""
        self.trim(kv, kv.length)
        kv.kept = True
        for span in kv.spans:
            self._hold(span.extent, keepers=1)
            self._hold(span.extent, users=-1)

    def reuse(self, kv: RequestKV, tokens: int) -> None:
        """A request takes kept KV over, from its `tokens`-th token on as its own memory, as far as nobody shares it."""
        kv.kept, kv.length = False, tokens
        for span in kv.spans:
            self._hold(span.extent, users=1)
            self._hold(span.extent, keepers=-1)
        shared = next((i for i, s in enumerate(kv.spans) if s.last > tokens and not self._writable(s)), None)
        if shared is not None:
            span = kv.spans[shared]
            while len(kv.spans) > shared + 1:
                self._let_go(kv)
            self.trim(kv, max(tokens, span.first))
            if span.first < tokens:
                kv.spans[-1] = Span(span.extent, span.first, tokens - span.first)

    @staticmethod
    def _writable(span: Span) -> bool:
        return span.extent.exclusive and span.tokens == span.extent.capacity

    def trim(self, kv: RequestKV, tokens: int) -> None:
        """Free the spans of which none of the first `tokens` tokens is part."""
        while kv.spans and kv.spans[-1].first >= tokens:
            self._let_go(kv)

    def drop_last_span(self, kv: RequestKV) -> int:
        """Free the last span of kept KV; the tokens that are left."""
        self._let_go(kv)
        kv.length = min(kv.length, kv.capacity)
        return kv.length

    def close(self) -> None:
        """Let go of the pools' memory. Idempotent."""
        self.arenas = {tier: Arena(torch.empty(0, dtype=torch.uint8)) for tier in self.arenas}
        self._mapped = torch.empty(0, dtype=torch.uint8)

    def used_bytes(self) -> dict[str, int]:
        """What requests hold, by tier."""
        return {tier: arena.used_bytes - self._idle[tier] for tier, arena in self.arenas.items()}

    def cached_bytes(self) -> dict[str, int]:
        """What only the prefix cache holds, by tier: free as soon as a request needs it."""
        return dict(self._idle.items())

    def capacity_bytes(self) -> dict[str, int]:
        return {tier: arena.capacity_bytes for tier, arena in self.arenas.items()}


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number of 0 … limit that `fits`, which is true up to some number and false beyond; 0 if none is."""
    low, high = 0, limit + 1  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
