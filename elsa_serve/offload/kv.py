"""Where keys and values lie: two pools allocated once, one on the device and one in host memory.

One request's KV spans both: in every layer its first `split` tokens lie on the device, as many as fit there, and the
others in host memory. In either tier a layer is `[2, Hkv, tokens, D]` (K, then V): contiguous per head, which is what
the CPU's attention reads and what copies are long runs of.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.units import format_size

ALIGNMENT = 256  # bytes: what vector loads and the copy engines like

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

    def room_for(self, nbytes: int) -> int:
        """How many blocks of `nbytes` could be allocated now."""
        return sum(block.nbytes // _aligned(nbytes) for block in self._free) if nbytes else sys.maxsize

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


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer of one request: tokens [0, split) and [split, capacity)."""

    gpu: torch.Tensor  # [2, Hkv, split, D] on the device
    host: torch.Tensor  # [2, Hkv, capacity − split, D] in host memory, page-locked where there is a GPU
    mapped: torch.Tensor  # the same memory as the device addresses it; without a GPU, `host` itself


@dataclass(eq=False, slots=True)
class RequestKV:
    """The KV of one request: tokens [0, split) lie on the device, [split, capacity) in host memory, in every layer.

    `length` counts the tokens that every layer holds: a pass adds its own when it is over.
    """

    capacity: int
    split: int
    layers: list[LayerKV]
    blocks: dict[Tier, list[Block]] = field(default_factory=dict)
    length: int = 0


class KVPool:
    """Blocks for requests, all layers or none. `gpu` and `host` are flat uint8 tensors."""

    def __init__(
        self, shape: KVShape, gpu: torch.Tensor, host: torch.Tensor, mapped: torch.Tensor | None = None
    ) -> None:
        """`mapped`: `host` as the device addresses it, where that is another tensor."""
        self.shape = shape
        self.arenas: dict[Tier, Arena] = {"gpu": Arena(gpu), "host": Arena(host)}
        self._mapped = host if mapped is None else mapped

    def check(self, capacity: int) -> None:
        """Raise BudgetError with numbers when `capacity` tokens do not fit even into empty pools."""
        sizes = self.capacity_bytes()
        split = largest(capacity, lambda tokens: self._nbytes(tokens) <= sizes["gpu"])
        if self._nbytes(capacity - split) > sizes["host"]:
            nbytes, layers = self.shape.block_nbytes(capacity), self.shape.layers
            raise BudgetError(
                f"{capacity} tokens need {format_size(nbytes * layers)} of KV memory ({layers} layers of "
                f"{format_size(nbytes)}), but the KV pools hold {format_size(sizes['gpu'])} on the device and "
                f"{format_size(sizes['host'])} in host memory: ask for fewer tokens, or give more with --gpu-memory "
                "or --host-memory"
            )

    def _nbytes(self, tokens: int) -> int:
        return self.shape.layers * self.shape.block_nbytes(tokens)

    def allocate(self, capacity: int) -> RequestKV | None:
        """KV for `capacity` tokens, on the device as far as there is room; None when it does not fit now."""
        layers = self.shape.layers
        fits = self.arenas["gpu"].room_for
        split = largest(capacity, lambda tokens: fits(self.shape.block_nbytes(tokens)) >= layers)
        blocks: dict[Tier, list[Block]] = {"gpu": [], "host": []}
        tokens: dict[Tier, int] = {"gpu": split, "host": capacity - split}
        for tier, count in tokens.items():
            for _ in range(layers if count else 0):
                block = self.arenas[tier].allocate(self.shape.block_nbytes(count))
                if block is None:
                    self._release(blocks)
                    return None
                blocks[tier].append(block)
        return RequestKV(capacity, split, [self._layer(blocks, i, tokens) for i in range(layers)], blocks)

    def _layer(self, blocks: dict[Tier, list[Block]], index: int, tokens: dict[Tier, int]) -> LayerKV:
        places = {tier: found[index] if found else Block(0, 0) for tier, found in blocks.items()}

        def view(storage: torch.Tensor, tier: Tier) -> torch.Tensor:
            block = places[tier]
            return self.shape.view(storage[block.offset : block.offset + block.nbytes], tokens[tier])

        gpu, host = self.arenas["gpu"].storage, self.arenas["host"].storage
        return LayerKV(view(gpu, "gpu"), view(host, "host"), view(self._mapped, "host"))

    def _release(self, blocks: dict[Tier, list[Block]]) -> None:
        for tier, found in blocks.items():
            for block in found:
                self.arenas[tier].free(block)

    def free(self, kv: RequestKV) -> None:
        """Give a request's blocks back. No copy from or to them may be under way."""
        self._release(kv.blocks)
        kv.layers, kv.blocks = [], {}

    def close(self) -> None:
        """Let go of the pools' memory. Idempotent."""
        self.arenas = {tier: Arena(torch.empty(0, dtype=torch.uint8)) for tier in self.arenas}
        self._mapped = torch.empty(0, dtype=torch.uint8)

    def used_bytes(self) -> dict[str, int]:
        return {tier: arena.used_bytes for tier, arena in self.arenas.items()}

    def capacity_bytes(self) -> dict[str, int]:
        return {tier: arena.capacity_bytes for tier, arena in self.arenas.items()}


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number of 0 … limit that `fits`, which is true up to some number and false beyond; 0 if none is."""
    low, high = 0, limit + 1  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
