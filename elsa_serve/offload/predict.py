"""How long a pass takes: the pipes that run beside each other, from a plan's placement and a machine's rates.

Copies to the device, copies to the host and reads from disk each run beside everything else. The device's own work and
the host's attention are one chain: a layer's host tokens are attended between its projections, so their times add. What
the chain and the copies both read from host memory, they read more slowly while the other does, too. A pass takes as
long as the slowest of these, or longer where the ring of slots makes copies and chain wait for each other in turn.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elsa_serve.offload.machine import Rates

if TYPE_CHECKING:
    from elsa_serve.offload.geometry import Geometry
    from elsa_serve.offload.kv import RequestKV
    from elsa_serve.offload.plan import Plan

# Seconds that a layer takes for queries to reach the host, for the host's functions to be called, and for its state to
# come back and be merged: 150 to 200 µs in passes replayed from graphs on an H200.
HOP_S = 150e-6
# A layer whose KV the host attends too takes Python so many times as long to issue as one that has all of it on the
# device: more calls, on a core whose neighbours are at work. Seen on an H200's host: 2.9 to 3.7 ms for 1.2.
IN_PLACE_ISSUE = 2.6
FEW = 32  # tokens of a share up to which all of them pass every layer: a decode pass's, drafted ones included
ROUNDS = 20  # of the iteration for two pipes that slow each other down; it settles within a few

TO_DEVICE, TO_HOST, DISK = "copies to the device", "copies to the host", "disk"
TO_DISK, FETCH = "KV to disk", "KV brought to the device"
SLOTS = "copies that wait for a slot"
DEVICE, ISSUE = "compute", "issue by the host"
HOST_ATTENTION, DISK_ATTENTION = "attention on the host", "attention over KV on disk"


@dataclass(frozen=True, slots=True)
class Share:
    """One request's part of a pass: `new` tokens after `past`.

    Where its KV lies is known once it runs: tokens of both `on_device` and `on_disk`, the others in host memory. Those
    `shared` with an earlier share, and `shared_on_device`, are read once for both. None: as the plan places them.
    """

    past: int
    new: int
    on_device: int | None = None
    on_disk: int = 0
    shared: int = 0
    shared_on_device: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """`seconds` of a pass, `pipes` seconds by name, and the name of the one that sets the time. `attending`: those that
    the host's cores attend KV for, where all of it lies in memory."""

    seconds: float
    pipes: dict[str, float]
    attending: float = 0.0

    @property
    def bottleneck(self) -> str:
        return max(self.pipes, key=self.pipes.__getitem__)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a pass has to do. Bytes, FLOPs, seconds; all layers together."""

    to_device: float
    to_host: float
    to_disk: float
    before_disk_s: float  # until the first layer has computed the first token of these
    fetched: float  # bytes of KV, of those to the device, for which a layer's first chunk waits
    fetch_hidden_s: float  # for which the device computes meanwhile
    from_disk: float  # bytes that are read ahead, beside everything else
    in_place: float  # bytes of KV that the host attends where they lie, in its memory
    mapped: float  # and in a mapped file, which it reads from disk as it attends
    in_place_flops: float
    device_s: float
    beside_s: float  # of these, the device's attention while the host attends the same requests
    issue_s: float
    hops: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the host is at present, beside its measured rates: what others on a shared host leave of its memory, of
    its cores and of its disk changes within minutes, so each pass tells of the next."""

    attention: float = 1.0
    issue: float = 1.0
    reads: float = 1.0  # from disk
    writes: float = 1.0

    def of(self, rates: Rates) -> Rates:
        """The rates at this pace."""
        return replace(
            rates,
            cpu_attention=self.attention * rates.cpu_attention,
            cpu_attention_beside_h2d=self.attention * rates.cpu_attention_beside_h2d,
            cpu_attention_flops=self.attention * rates.cpu_attention_flops,
            cpu_attention_flops_beside_h2d=self.attention * rates.cpu_attention_flops_beside_h2d,
            layer_s=rates.layer_s / self.issue,
            pass_s=rates.pass_s / self.issue,
            copy_s=rates.copy_s / self.issue,
            disk=self.reads * rates.disk,
            disk_write=self.writes * rates.disk_write,
        )

    def after(self, expected: Prediction, taken: float, attended: float = 0.0) -> Pace:
        """The pace behind a pass that was expected so at this one: of its attention from the seconds that the host
        `attended`, of what else may have set its time from all the seconds that it has `taken`."""
        found = {"attention": (expected.attending, attended)}
        if expected.bottleneck in _PACED:
            found[_PACED[expected.bottleneck]] = expected.seconds, taken
        nearer = {
            name: min(4.0, max(0.25, getattr(self, name) * math.sqrt(thought / took)))
            for name, (thought, took) in found.items()
            if thought > 0 and took > 0
        }
        return replace(self, **nearer)


_PACED = {ISSUE: "issue", DISK: "reads", DISK_ATTENTION: "reads", TO_DISK: "writes"}


def pass_time(plan: Plan, shares: Sequence[Share], pace: Pace | None = None) -> Prediction:
    """The pass of these requests' shares, at the host's present pace or at the measured rates."""
    if pace is not None:
        plan = replace(plan, rates=pace.of(plan.rates))
    work = _work(plan, shares)
    found = _time(work, plan.rates, one_memory=plan.device_type == "cpu")
    if work.fetched or plan.device_type == "cpu":
        return found
    copying, computing = found.pipes.get(TO_DEVICE, 0.0), max(found.pipes.get(HOST_ATTENTION, 0.0), work.device_s)
    waiting = ring_seconds(plan, copying, computing)
    if waiting <= 1.001 * found.seconds:
        return found
    return replace(found, seconds=waiting, pipes=found.pipes | {SLOTS: waiting})


def ring_seconds(plan: Plan, copying: float, computing: float) -> float:
    """A pass of layers whose weights come through a ring of slots, from the seconds of all its copies and of all its
    layers. A slot is free again when its layer has been computed, so in front of resident layers, which take time and
    no copy, the ring is full and the copies wait: between passes that follow each other nothing else is lost."""
    layers, streamed, resident = plan.geometry.layers, plan.streamed_layers, set(plan.resident_layers)
    if not streamed or not resident:
        return max(copying, computing)
    arrived, ended, ends = 0.0, 0.0, []
    released = deque([0.0] * plan.slots)  # when each slot is free
    for _ in range(3):  # by the second pass they are alike
        for index in range(layers):
            if index not in resident:
                arrived = max(arrived, released.popleft()) + copying / streamed
                ended = max(ended, arrived)
            ended += computing / layers
            if index not in resident:
                released.append(ended)
        ends.append(ended)
    return ends[2] - ends[1]


def running_shares(parts: Iterable[tuple[RequestKV, int]]) -> list[Share]:
    """The shares of requests that run: their KV, and how many tokens come after what it holds."""
    shares, seen = [], set()
    for kv, new in parts:
        total = kv.length + new
        tokens = {"gpu": 0, "host": 0, "disk": 0}
        shared = {True: 0, False: 0}  # on the device, elsewhere
        for span in kv.spans_of(0, total):
            count = min(span.tokens, total - span.first)
            tokens[span.extent.tier] += count
            if id(span.extent) in seen:
                shared[span.extent.on_device] += count
            seen.add(id(span.extent))
        shares.append(Share(kv.length, new, tokens["gpu"], tokens["disk"], shared[False], shared[True]))
    return shares


def in_place_limit(rates: Rates, *, weights_bytes: int, kv_bytes: int, flops_per_token: float) -> int:
    """The most new tokens over a prefix for which the host's attention is expected to take no longer than copying the
    prefix to the device; at least 1, whatever the rates, so that decoding never moves KV.

    weights_bytes: streamed in a pass. kv_bytes: of the prefix on the host. flops_per_token: of one query over it. In
    place, weights are copied while the host reads and computes; over the device, both share the copy engine.
    """
    over = (weights_bytes + kv_bytes) / rates.h2d
    reading, flops = rates.cpu_attention, rates.cpu_attention_flops
    if weights_bytes:
        reading, flops = rates.cpu_attention_beside_h2d, rates.cpu_attention_flops_beside_h2d
    left = over**2 - (kv_bytes / reading) ** 2  # reading and arithmetic add like the sides of a right angle
    if kv_bytes == 0 or left <= 0:
        return 1
    return max(1, int(math.sqrt(left) * flops / flops_per_token))


def whole_layers(geometry: Geometry, new: int, fused: bool) -> int:
    """Layers that all of a share's `new` tokens pass: where layers are fused, a prompt's not the last, which makes
    keys and values of them and computes the one token whole that logits are wanted of."""
    return geometry.layers - (1 if fused and new > FEW else 0)


def in_graph(plan: Plan, shares: Sequence[Share]) -> bool:
    """Whether a pass is replayed from CUDA graphs: of one token each, with all layers and all KV on the device, none of
    it shared, or with the newest of each request's KV in host memory, attended in place."""
    if not plan.graphs or any(share.new != 1 or share.on_disk for share in shares):
        return False
    here = _on_device(plan, shares)
    if _all_here(here, shares):
        return not plan.streamed_layers and not any(share.shared_on_device for share in shares)
    in_memory = not plan.kv_disk_bytes or all(share.on_device is not None for share in shares)
    possible = plan.in_place and plan.geometry.whole_context and in_memory
    return possible and all(tokens <= share.past for tokens, share in zip(here, shares))


def _on_device(plan: Plan, shares: Sequence[Share]) -> list[int]:
    """Tokens of each whose KV lies on the device; where that is not known yet, those that come first fill it."""
    room, here = plan.kv_pool_tokens, []
    for share in shares:
        total = share.past + share.new
        here.append(min(total, max(0, room)) if share.on_device is None else share.on_device)
        room -= here[-1]
    return here


def _all_here(here: Sequence[int], shares: Sequence[Share]) -> bool:
    return all(tokens == share.past + share.new for tokens, share in zip(here, shares))


def device_seconds(geometry: Geometry, rates: Rates, shares: Sequence[Share], fused: bool = False) -> float:
    """Matrix products, attention and activations on the device, all of the KV there; no issue and no copies."""
    parameters = geometry.weights_bytes / geometry.dtype.itemsize / geometry.layers
    flops = activations = attention = 0.0
    for share in shares:
        layers = whole_layers(geometry, share.new, fused)
        keys_alone = (geometry.layers - layers) * 2 * geometry.kv_heads * geometry.head_dim * geometry.hidden
        flops += 2.0 * (layers * parameters + keys_alone) * share.new
        activations += geometry.activation_bytes() * layers * share.new
        attention += _attention_seconds(geometry, rates, share, share.past + share.new, fused)
    read = (geometry.weights_bytes + geometry.head_bytes) / rates.device_memory
    return max(flops / rates.flops, read) + attention + activations / rates.activations


def small_seconds(layers: int, rates: Rates, chunks: int) -> float:
    """The device's time for what is neither bytes nor FLOPs: a layer's small kernels, and the cut into chunks."""
    return layers * (rates.graph_layer_s + (chunks - 1) * rates.chunk_s)


def _attention_seconds(geometry: Geometry, rates: Rates, share: Share, keys: int, fused: bool) -> float:
    """A share's attention over `keys` tokens, the newest of them its own."""
    layers = whole_layers(geometry, share.new, fused)
    seen = share.new * max(0.0, keys - share.new / 2)  # causal
    flops = 4.0 * layers * geometry.heads * geometry.head_dim * seen
    nbytes = layers * geometry.kv_token_bytes() * max(0, keys - share.shared_on_device)
    return max(flops / rates.attention_flops, nbytes / rates.device_attention)


def _work(plan: Plan, shares: Sequence[Share]) -> _Work:
    geometry, rates = plan.geometry, plan.rates
    token = geometry.layers * geometry.kv_token_bytes()
    row_flops = 4.0 * geometry.layers * geometry.heads * geometry.head_dim
    streamed = plan.streamed_bytes
    here = _on_device(plan, shares)
    host_room = geometry.kv_tokens(plan.kv_host_bytes) if plan.kv_disk_bytes else sys.maxsize
    to_device, to_host, from_disk = float(streamed), 0.0, float(plan.disk_bytes)
    in_place, mapped, in_place_flops, to_disk, before_disk = 0.0, 0.0, 0.0, 0.0, 0.0
    fetched, fetch_hidden_s, copies, beside_s = 0.0, 0.0, 0, 0.0
    fused = plan.device_type == "cuda"
    replayed = in_graph(plan, shares)
    if replayed and _all_here(here, shares):
        rates = replace(rates, device_attention=rates.graph_attention)
    device_s = device_seconds(geometry, rates, [Share(0, share.new) for share in shares], fused)
    hops = 0
    for share, on_device in zip(shares, here):
        total = share.past + share.new
        on_host = total - on_device - share.on_disk
        if share.on_device is None:
            on_host = min(total - on_device, host_room)
        host_room -= on_host
        old = max(0, share.past - on_device)  # of its past tokens, those in host memory and on disk
        new = max(0, total - max(on_device, share.past))  # of its new ones
        limit = in_place_limit(
            rates, weights_bytes=streamed, kv_bytes=old * token, flops_per_token=max(1.0, row_flops * old)
        )
        to_host += new * token
        on_disk = min(share.new, total - on_device - on_host)
        to_disk += on_disk * token
        if on_disk:
            before_disk = max(before_disk, 1 - on_disk / share.new)
        device_s -= _attention_seconds(geometry, rates, Share(0, share.new), share.new, fused)
        if plan.in_place and total > on_device and share.past and share.new <= limit:
            in_place += max(0, on_host - share.shared) * token
            mapped += (total - on_device - on_host) * token
            in_place_flops += row_flops * share.new * (total - on_device)
            attention = _attention_seconds(geometry, rates, share, on_device, fused)
            device_s, beside_s = device_s + attention, beside_s + (attention if fused else 0.0)
            hops = geometry.layers if fused else 0
        else:
            to_device += old * token
            copies += (1 if old else 0) + (-(-new // plan.chunk_tokens) if new > FEW else 0)
            fetched += old * token
            fetch_hidden_s += _beside_fetch(plan, share.new) if old else 0.0
            from_disk += max(0, old - on_host) * token
            device_s += _attention_seconds(geometry, rates, share, total, fused)
    if plan.kv_disk_cached:
        from_disk, in_place, mapped = float(plan.disk_bytes), in_place + mapped, 0.0
    chunks = max(1, -(-sum(share.new for share in shares) // plan.chunk_tokens))
    a_layer = chunks * rates.layer_s * (IN_PLACE_ISSUE if hops else 1.0)
    issue = geometry.layers * (a_layer + copies * rates.copy_s) + rates.pass_s
    if fused:
        device_s += small_seconds(geometry.layers, rates, chunks)
    if replayed:
        device_s, issue = device_s + rates.graph_pass_s, 0.0
    elif fused:
        device_s += rates.pass_s  # before a pass's first layer and behind its last the device waits for the host
    before_disk_s = rates.pass_s + before_disk * max(device_s, issue) / geometry.layers
    return _Work(
        to_device, to_host, to_disk, before_disk_s, fetched, fetch_hidden_s, from_disk,
        in_place, mapped, in_place_flops, device_s, beside_s, issue, hops,
    )  # fmt: skip


def _beside_fetch(plan: Plan, new: int) -> float:
    """Seconds for which the device computes while the KV of its next layer is brought to the working buffer: between
    the last chunk's attention in one layer and the first one's in the next."""
    parameters = plan.geometry.weights_bytes / plan.geometry.dtype.itemsize
    return 2.0 * parameters * min(new, plan.chunk_tokens) / plan.rates.flops


def _time(work: _Work, rates: Rates, one_memory: bool) -> Prediction:
    """`one_memory`: the device is the host's own processor, whose copies and computing take turns at its memory."""
    copying, attending = work.to_device / rates.h2d, _attending(work, rates, 0.0)
    # A GPU is issued the next layers while it computes and the host attends: only without one all of that takes turns.
    own = work.device_s + (copying + work.issue_s if one_memory else 0.0) + work.hops * HOP_S
    alone = own - work.beside_s  # in front of the host's attention and behind it
    for _ in range(ROUNDS if copying and attending else 0):
        # The part of either during which the other reads host memory, too.
        whole = max(copying, alone + max(attending, work.beside_s))
        beside_copies, beside_attention = min(1.0, copying / whole), min(1.0, attending / whole)
        copying = work.to_device / _between(rates.h2d, rates.h2d_beside_cpu_attention, beside_attention)
        attending = _attending(work, rates, beside_copies)
    paging = work.mapped / rates.disk
    fetching = work.fetched / rates.h2d - work.fetch_hidden_s
    chain, attending = HOST_ATTENTION if attending >= paging else DISK_ATTENTION, attending + paging
    pipes = {
        TO_DEVICE: copying,
        chain: alone + max(attending, work.beside_s) if attending else 0.0,
        DEVICE: own if one_memory else work.device_s,
        ISSUE: work.issue_s,
        FETCH: work.device_s + fetching if fetching > 0 else 0.0,
        TO_HOST: work.to_host / rates.d2h,
        # Threads write it while a GPU computes, but use the cores that else do.
        TO_DISK: (own if one_memory else work.before_disk_s) + work.to_disk / rates.disk_write if work.to_disk else 0.0,
        DISK: (work.from_disk + work.mapped) / rates.disk,
    }
    found = {name: value for name, value in pipes.items() if value}
    return Prediction(max(pipes.values()), found, 0.0 if paging else attending)


def _attending(work: _Work, rates: Rates, beside_copies: float) -> float:
    """Seconds of the host's attention, for a part of which copies run. Reading and arithmetic add like the sides of a
    right angle, which fits 1 to 32 rows within 10 % on a Xeon of 16 cores."""
    reading = _between(rates.cpu_attention, rates.cpu_attention_beside_h2d, beside_copies)
    flops = _between(rates.cpu_attention_flops, rates.cpu_attention_flops_beside_h2d, beside_copies)
    return math.hypot(work.in_place / reading, work.in_place_flops / flops)


def _between(alone: float, beside: float, part: float) -> float:
    """The mean rate of a pipe that runs beside another for a part of its time."""
    return alone + (min(beside, alone) - alone) * part
