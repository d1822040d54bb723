"""Who is in the next pass, and with how many tokens: first come, first served; requests join and leave between passes.

A prompt alone passes the layers whole, or in a few rounds where it is very long; beside running decodes it comes in
smaller pieces, because every decode waits for the end of the pass. What a pass has finished of a prompt is kept.

A request holds KV for its prompt and for what it has generated, and takes more as it goes on. When there is no more,
the youngest request gives its own back and waits; it is computed again later, from what the prefix cache still has.
The oldest always goes on, so every request ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from elsa_serve.errors import QueueFull
from elsa_serve.offload.kv import Extent, KVPool, RequestKV
from elsa_serve.offload.output import OutputText
from elsa_serve.offload.prefix import BLOCK_TOKENS, PrefixCache, chain
from elsa_serve.offload.sampling import Draw, Sampler
from elsa_serve.offload.speculation import PromptLookup
from elsa_serve.protocol import Event, FinishReason, GenerationRequest

Ending = Literal["cancelled", "timeout"]

FIRST_GROWTH, LAST_GROWTH, LEAST_GROWTH = 256, 4096, 16  # tokens of KV that a request takes at once beyond its prompt
ADOPTED_TAIL = 8  # kept KV is taken over, not shared, where it is lost for others by less than one part in so many


@dataclass(frozen=True, slots=True)
class Taken:
    """One generated token, the text that became certain with it, and why it is the last, if it is."""

    draw: Draw
    text: str
    reason: FinishReason | None


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine. Times are of time.monotonic()."""

    request: GenerationRequest
    on_event: Callable[[Event], None]
    sampler: Sampler
    output: OutputText
    received: float
    lookup: PromptLookup | None = None  # guesses of coming tokens, where the engine makes any
    cancelled: bool = False  # set from any thread
    kv: RequestKV | None = None  # None while waiting
    tokens: list[int] = field(init=False)  # of prompt and output
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as they were needed
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache when it was first admitted
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.request.sampling.max_tokens - self.generated

    @property
    def capacity(self) -> int:
        """Tokens its KV must hold: the last token that it generates is never fed back."""
        return self.prompt_tokens + self.request.sampling.max_tokens - 1

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.tokens) - (self.kv.length if self.kv is not None else 0)

    @property
    def prefilling(self) -> bool:
        return self.generated == 0 or self.pending > 1

    def take(self, rows: torch.Tensor, draft: list[int], eos_ids: frozenset[int]) -> list[Taken]:
        """Draw tokens from logits [1 + len(draft), V], as long as the drafted ones come out.

        A row counts only where the tokens before it are the drawn ones, so each token is drawn from the logits, and
        with the random number, that it would have had without a draft.
        """
        taken: list[Taken] = []
        for row, expected in zip(rows, [*draft, None]):
            draw = self.sampler.draw(row)
            taken.append(self._append(draw, eos_ids))
            if taken[-1].reason is not None or draw.token_id != expected:
                break
        if self.kv is not None:
            self.kv.length = len(self.tokens) - 1  # what was drafted beyond is forgotten
        if self.lookup is not None and draft:
            self.lookup.verified(len(draft), len(taken) - 1)
        return taken

    def _append(self, draw: Draw, eos_ids: frozenset[int]) -> Taken:
        self.tokens.append(draw.token_id)
        if self.lookup is not None:
            self.lookup.append(draw.token_id)
        sampling = self.request.sampling
        if draw.token_id in sampling.stop_token_ids or (draw.token_id in eos_ids and not sampling.ignore_eos):
            return Taken(Draw(draw.token_id), self.output.flush(), "stop")
        last = self.remaining <= 0
        text, stopped = self.output.push(draw.token_id, last)
        return Taken(draw, text, "stop" if stopped else "length" if last else None)

    def ending(self) -> Ending | None:
        """Why the request should stop now, if it should."""
        if self.cancelled:
            return "cancelled"
        limit = self.request.deadline_s
        return "timeout" if limit is not None and time.monotonic() - self.received > limit else None

    def given_up(self) -> bool:
        return self.ending() is not None


@dataclass(frozen=True, slots=True)
class Lookup:
    """A search of the prefix cache: tokens that were needed, and tokens that it had."""

    tokens: int
    hits: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A sequence's share of the next pass: tokens after those its KV holds, the last of them perhaps drafted."""

    sequence: Sequence
    tokens: list[int]
    draft: list[int]
    prefilling: bool
    rows: int  # of logits: none while tokens of the prompt remain


@dataclass(slots=True)
class Pass:
    """What the next pass computes, and what changed to make it so."""

    work: list[Work] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)  # of the sequences that joined
    preempted: int = 0  # sequences that gave their KV back and wait again


@dataclass(frozen=True, slots=True)
class PassTokens:
    """Prompt tokens of one pass at most: while nothing decodes, and beside running decodes."""

    alone: int
    beside_decode: int


class Scheduler:
    """The waiting queue and the running set. Thread-safe; the engine's thread alone moves sequences and touches KV."""

    def __init__(
        self,
        pool: KVPool,
        *,
        max_batch: int,
        max_queue: int,
        pass_tokens: PassTokens,
        draft_rows: int = 1 << 30,
        together: Callable[[RequestKV, int], int] = lambda kv, new: new,
        cache: PrefixCache | None = None,
    ) -> None:
        """`draft_rows`: drafted tokens of a pass at most, of all its sequences; `together`: how many of so many new
        tokens of one sequence are computed as cheaply as one."""
        self._pool, self._cache = pool, cache
        self._draft_rows, self._together = draft_rows, together
        self._max_batch, self._max_queue, self._pass_tokens = max_batch, max_queue, pass_tokens
        self._lock = threading.RLock()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._seconds_per_request: float | None = None
        self._last_end: float | None = None
        self._full = False  # a sequence was preempted, and none has ended since

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, with the time one place takes to come free, as measured."""
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait, and the queue holds {self._max_queue}: try again later",
                    retry_after_s=self.retry_after_s(),
                )
            self._by_id[sequence.request.request_id] = sequence
            self._waiting.append(sequence)

    def __contains__(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._by_id

    def cancel(self, request_id: str) -> bool:
        with self._lock:
            sequence = self._by_id.get(request_id)
            if sequence is not None:
                sequence.cancelled = True
            return sequence is not None

    def next_pass(self) -> Pass:
        """Each running sequence's share, after waiting ones have joined as far as the limits allow.

        KV may move between the tiers meanwhile, so the lock is held only where sequences change places.
        """
        result = Pass()
        decoding = [s for s in self._running if not s.prefilling]
        for sequence in sorted(decoding, key=lambda s: s.received):
            self._make_room(sequence, result)
        work = result.work
        guesses = self._draft_rows
        for sequence in decoding:
            if sequence.kv is not None:
                work.append(self._decode(sequence, sequence.kv, guesses))
                guesses -= len(work[-1].draft)
        left = self._pass_tokens.beside_decode if work else self._pass_tokens.alone
        for sequence in [s for s in self._running if s.prefilling]:
            if left > 0:
                work.append(self._prompt(sequence, left))
                left -= len(work[-1].tokens)
        while left > 0 and (admitted := self._admit(result)) is not None:
            work.append(self._prompt(admitted, left))
            left -= len(work[-1].tokens)
        return result

    def _decode(self, sequence: Sequence, kv: RequestKV, guesses: int) -> Work:
        draft: list[int] = []
        if sequence.lookup is not None:
            room = kv.capacity - len(sequence.tokens)
            draft = sequence.lookup.draft(min(room, sequence.remaining - 1, guesses))
            draft = draft[: self._together(kv, 1 + len(draft)) - 1]
        return Work(sequence, [sequence.tokens[-1], *draft], draft, False, 1 + len(draft))

    def _prompt(self, sequence: Sequence, most: int) -> Work:
        """As much as a pass takes of what is pending; of several rounds, none is a small rest."""
        pending = sequence.pending
        rounds = -(-pending // most)
        size = -(-pending // rounds)
        start = len(sequence.tokens) - pending
        return Work(sequence, sequence.tokens[start : start + size], [], True, int(size == pending))

    def computed(self, sequence: Sequence) -> None:
        """A pass has added to a sequence's KV: others may share it from now on."""
        with self._lock:
            if self._cache is not None and sequence.kv is not None:
                chain(self._cache.root, sequence.digests, sequence.tokens, sequence.kv.length)
                self._cache.publish(sequence.kv, sequence.digests)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, result: Pass) -> None:
        """KV for the sequence's next token, and some more; the youngest give theirs back where there is none."""
        kv = sequence.kv
        if kv is None or kv.capacity >= len(sequence.tokens):
            return
        beyond = sequence.capacity - kv.capacity
        size = min(beyond, max(FIRST_GROWTH, min(sequence.generated, LAST_GROWTH)))
        while sequence.kv is not None:
            if any(self._extend(kv, kv.capacity + tokens) for tokens in (size, min(size, LEAST_GROWTH))):
                return
            self._preempt(max(self._running, key=lambda s: s.received))
            result.preempted += 1

    def _extend(self, kv: RequestKV, capacity: int) -> bool:
        """Room for `capacity` tokens, for which the prefix cache gives up as much as that needs."""
        while not self._pool.extend(kv, capacity, disk=False):
            if self._cache is None or not self._cache.reclaim():
                return self._pool.extend(kv, capacity)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue. Its KV stays in the prefix cache as long as nobody needs the memory."""
        with self._lock:
            self._running.remove(sequence)
            self._waiting.appendleft(sequence)
        self._give_back(sequence, keep=True)
        self._full = True

    def _admit(self, result: Pass) -> Sequence | None:
        """Move the head of the queue into the running set, if batch and KV memory allow.

        It blocks those behind it, so a long prompt is never overtaken for ever. After a preemption nobody joins until
        one has ended: what comes back too early would be preempted again.
        """
        if not self._waiting or len(self._running) >= self._max_batch or (self._full and self._running):
            return None
        head = self._waiting[0]
        wanted, least = head.capacity, len(head.tokens) + FIRST_GROWTH
        if wanted > least and not self._full and not self._plenty(wanted, wanted - least):
            wanted = least
        if not self._allocate(head, wanted):
            return None
        assert head.kv is not None
        if self._cache is not None:
            result.lookups.append(Lookup(len(head.tokens), head.kv.length))
        if head.admitted is None:
            head.admitted, head.cached_tokens = time.monotonic(), head.kv.length
        with self._lock:
            self._running.append(self._waiting.popleft())
        return head

    def _plenty(self, tokens: int, spare: int) -> bool:
        """Whether the device has room for so many tokens, and for what each request of a full batch might spare: then
        none need grow, and its KV stays in one piece."""
        tokens += self._max_batch * spare
        return self._pool.device_room(tokens) >= tokens

    def _allocate(self, sequence: Sequence, capacity: int) -> bool:
        """KV for a sequence that joins, beginning with what the prefix cache has of it; False to wait."""
        if self._cache is None:
            sequence.kv = self._pool.allocate(capacity)
            return sequence.kv is not None
        chain(self._cache.root, sequence.digests, sequence.tokens, len(sequence.tokens))
        tight = False
        while True:
            found, shared = self._cache.match(sequence.digests, len(sequence.tokens) - 1)
            if self._soon(sequence, shared):
                return False
            self._cache.prepare(found, shared, capacity - shared)
            if found is not None and found.kept and (tight or (found.length - shared) * ADOPTED_TAIL <= found.length):
                self._cache.adopt(found, shared)
                if self._extend(found, capacity):
                    sequence.kv = found
                    return True
                if self._running:
                    self._cache.keep(found)
                    return False
                self._cache.forget(found)
                continue
            sequence.kv = self._pool.allocate(capacity, found, shared, disk=False)
            if sequence.kv is not None:
                return True
            tight = found is not None and found.kept and self._cache.kept() == 1
            if not tight and not self._cache.reclaim():
                sequence.kv = self._pool.allocate(capacity, found, shared)
                return sequence.kv is not None

    def _soon(self, sequence: Sequence, shared: int) -> bool:
        """Whether a running prompt is about to compute so much more of this one's beginning than the cache has, that it
        could not be computed beside a pass for nothing.
        """
        return any(
            _common(sequence, other) - shared > self._pass_tokens.beside_decode
            for other in self._running
            if other.prefilling
        )

    def finish(self, sequence: Sequence, keep: bool = True) -> None:
        """Take a sequence out, wherever it is, and give its KV back; `keep` leaves it to the prefix cache."""
        with self._lock:
            if sequence in self._running:
                self._running.remove(sequence)
                self._full = False
                self._measure()
            else:
                self._waiting.remove(sequence)
            del self._by_id[sequence.request.request_id]
            self._give_back(sequence, keep)

    def _give_back(self, sequence: Sequence, keep: bool) -> None:
        if sequence.kv is None:
            return
        if self._cache is None:
            self._pool.free(sequence.kv)
        elif keep:
            self._cache.keep(sequence.kv)
        else:
            self._cache.forget(sequence.kv)
        sequence.kv = None

    def _measure(self) -> None:
        """The smoothed time between two ends while the engine was busy."""
        now = time.monotonic()
        if self._last_end is not None:
            gap = now - self._last_end
            old = self._seconds_per_request
            self._seconds_per_request = gap if old is None else 0.8 * old + 0.2 * gap
        # The gap to the next end says something about the engine's speed only while it has work.
        self._last_end = now if self._running or self._waiting else None

    def retry_after_s(self) -> float:
        return max(1.0, self._seconds_per_request or 1.0)

    def withdraw(self, extent: Extent) -> None:
        """Never begin a request with KV from this extent again."""
        with self._lock:
            if self._cache is not None:
                self._cache.withdraw(extent)

    def forget_prefixes(self, identity: str) -> None:
        """Give up all cached KV, and name tokens anew. Nothing may be running."""
        with self._lock:
            if self._cache is not None:
                self._cache.clear()
                self._cache = PrefixCache(self._pool, identity)

    def waiting(self) -> list[Sequence]:
        with self._lock:
            return list(self._waiting)

    def running(self) -> list[Sequence]:
        with self._lock:
            return list(self._running)

    def idle(self) -> bool:
        with self._lock:
            return not self._by_id

    def counts(self) -> tuple[int, int, int]:
        """(running in prefill, running in decode, waiting), taken together."""
        with self._lock:
            prefill = sum(sequence.prefilling for sequence in self._running)
            return prefill, len(self._running) - prefill, len(self._waiting)

    def pending_prefill_tokens(self) -> int:
        """Prompt tokens of waiting and prefilling sequences."""
        with self._lock:
            return sum(s.pending for s in (*self._waiting, *self._running) if s.prefilling)


def _common(one: Sequence, other: Sequence) -> int:
    """Tokens of the full blocks with which both begin."""
    blocks = 0
    for mine, yours in zip(one.digests, other.digests):
        if mine != yours:
            break
        blocks += 1
    return blocks * BLOCK_TOKENS
