"""The prefix cache: KV that has been computed once is found again by what it is the KV of.

Tokens are named block by block by chained digests: a digest stands for the model, its dtype and kernels, and every
token from the first on. KV of running requests can be shared as soon as a pass has finished it; when a request ends,
its KV is kept, and given up again, least recently used first, when other requests need the memory. A request that was
cancelled or ran out of time leaves the rounds of its prompt that were finished, so that a retry goes on from there.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from elsa_serve.offload.kv import Extent, KVPool, RequestKV

BLOCK_TOKENS = 64


def chain(root: bytes, known: list[bytes], tokens: Sequence[int], count: int) -> None:
    """Extend `known`, the digests of the first blocks of `tokens`, to all full blocks of the first `count` tokens."""
    for start in range(len(known) * BLOCK_TOKENS, count - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array.array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        known.append(hashlib.sha256((known[-1] if known else root) + block).digest())


@dataclass(eq=False, slots=True)
class Entry:
    """KV that can be shared, and the digests of its full blocks. `running`: its request still owns it."""

    kv: RequestKV
    digests: list[bytes] = field(default_factory=list)
    running: bool = True
    used: int = 0  # the cache's clock when it was last matched or kept


class PrefixCache:
    """Belongs to the scheduler, under whose lock it is called. `identity`: what KV depends on besides tokens."""

    def __init__(self, pool: KVPool, identity: str) -> None:
        self.root = hashlib.sha256(identity.encode()).digest()
        self._pool = pool
        self._index: dict[bytes, list[Entry]] = {}
        self._entries: dict[int, Entry] = {}  # by id of its kv
        self._clock = 0

    def match(self, digests: Sequence[bytes], limit: int) -> tuple[RequestKV | None, int]:
        """The KV that holds the longest beginning, and its tokens: whole blocks, `limit` tokens at most."""
        for i in range(min(len(digests), limit // BLOCK_TOKENS), 0, -1):
            found = self._index.get(digests[i - 1])
            if found:
                self._touch(found[-1])
                return found[-1].kv, i * BLOCK_TOKENS
        return None, 0

    def publish(self, kv: RequestKV, digests: Sequence[bytes]) -> None:
        """Offer the full blocks that `kv` holds by now."""
        entry = self._entries.setdefault(id(kv), Entry(kv))
        for digest in digests[len(entry.digests) : kv.length // BLOCK_TOKENS]:
            entry.digests.append(digest)
            self._index.setdefault(digest, []).append(entry)

    def keep(self, kv: RequestKV) -> None:
        """Take over the KV of a request that has ended. What another entry holds as well is freed."""
        entry = self._entries.get(id(kv))
        if entry is None or not entry.digests:
            self.forget(kv)
            return
        whole = self._index[entry.digests[-1]]
        if any(other is not entry and not other.running for other in whole):
            self._touch(next(other for other in whole if other is not entry and not other.running))
            self.forget(kv)
            return
        entry.running = False
        self._touch(entry)
        self._pool.keep(kv)
        digests = set(entry.digests)
        shorter = {id(e): e for d in entry.digests for e in self._index[d] if e is not entry and not e.running}
        for other in shorter.values():
            if other.digests[-1] in digests:
                self._drop(other)

    def adopt(self, kv: RequestKV, tokens: int) -> None:
        """A request takes kept KV over and goes on after its first `tokens`; what followed is no longer offered."""
        entry = self._entries[id(kv)]
        entry.running = True
        self._pool.reuse(kv, tokens)
        self._unlist(entry, tokens // BLOCK_TOKENS)

    def prepare(self, found: RequestKV | None, shared: int, tokens: int) -> None:
        """Give the device's memory to a request that joins: `tokens` new ones after the first `shared` of `found`.

        Other kept KV goes to the host, least recently used first, or is given up where the host has no room; what the
        request will read again comes to the device, as far as it fits.
        """
        back = [span for span in found.spans if span.first < shared] if found is not None and found.kept else []
        back = [span for span in back if not span.extent.on_device and not span.extent.users]
        wanted = tokens + sum(span.extent.capacity for span in back)
        others = sorted(
            (e for e in self._entries.values() if not e.running and e.kv is not found), key=lambda e: e.used
        )
        for entry in others:
            idle = {id(s.extent): s.extent for s in entry.kv.spans if s.extent.tier == "gpu" and not s.extent.users}
            for extent in idle.values():
                if self._pool.device_room(wanted) >= wanted:
                    break
                if not (self._pool.move(extent, "host") or self._pool.move(extent, "disk")):
                    self._drop(entry)
                    break
        for span in back:
            if self._pool.device_room(span.extent.capacity) >= span.extent.capacity:
                self._pool.move(span.extent, "gpu")

    def kept(self) -> int:
        """Entries that no request owns."""
        return sum(not entry.running for entry in self._entries.values())

    def forget(self, kv: RequestKV) -> None:
        """Free the KV of a request, and offer it no longer."""
        entry = self._entries.get(id(kv))
        if entry is not None:
            self._unlist(entry, 0)
        self._pool.free(kv)

    def withdraw(self, extent: Extent) -> None:
        """What lies in this extent is broken: offer it no longer."""
        for entry in list(self._entries.values()):
            first = next((span.first for span in entry.kv.spans if span.extent is extent), None)
            if first is not None and entry.running:
                self._unlist(entry, first // BLOCK_TOKENS)
            elif first is not None:
                self._drop(entry)

    def reclaim(self) -> bool:
        """Free some memory of KV that no request owns, the least recently used first and from its end: what lies in
        host memory goes to disk if there is room, else the oldest is given up. False where there is none."""
        kept = sorted((entry for entry in self._entries.values() if not entry.running), key=lambda e: e.used)
        for span in (span for entry in kept for span in reversed(entry.kv.spans)):
            if span.extent.tier == "host" and not span.extent.users and self._pool.move(span.extent, "disk"):
                return True
        if not kept:
            return False
        entry = kept[0]
        tokens = self._pool.drop_last_span(entry.kv)
        self._unlist(entry, tokens // BLOCK_TOKENS)
        if not entry.digests:
            self._pool.free(entry.kv)
        return True

    def clear(self) -> None:
        """Give up everything that no request owns."""
        while self.reclaim():
            pass

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _drop(self, entry: Entry) -> None:
        self._unlist(entry, 0)
        self._pool.free(entry.kv)

    def _unlist(self, entry: Entry, blocks: int) -> None:
        """Offer the first `blocks` of an entry alone; none of them means the end of it."""
        for digest in entry.digests[blocks:]:
            found = self._index[digest]
            found.remove(entry)
            if not found:
                del self._index[digest]
        del entry.digests[blocks:]
        if not entry.digests:
            del self._entries[id(entry.kv)]
