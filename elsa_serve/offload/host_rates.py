"""Rates of host memory's pipes: copies, reads by all cores, attention on the host, each alone and beside the others."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import elsa_kernels
import torch
from elsa_kernels.checks import build_problem
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library
from elsa_kernels.registry import Operands

from elsa_serve.offload.host import HostBuffer
from elsa_serve.offload.in_place import worker_threads
from elsa_serve.offload.machine import Heads, Rates
from elsa_serve.offload.streams import make_streams
from elsa_serve.offload.timing import paused, repeated, seconds, warm_up

if TYPE_CHECKING:
    from elsa_serve.offload.measure import Sizes

BESIDE_S = 0.4  # seconds for which copies and CPU attention run beside each other; half of them each runs alone
AGREE = 0.1  # two rounds of host memory's rates are within this part of each other, or there is another round
MOST_ROUNDS = 5
SHORT_RUN, COPIES = 64, 32  # tokens of a short copy, and how many are issued one after the other
CPU_ROWS = 32  # query tokens that bind the CPU kernel by arithmetic

logger = logging.getLogger(__name__)


def memory_rates(device: torch.device, dtype: torch.dtype, heads: Heads, sizes: Sizes) -> dict[str, float]:
    """Host memory's pipes: copies each way, reads by all cores, the CPU kernel, and copies beside the CPU kernel.

    On a host that other machines share these change from minute to minute: twofold has been seen.
    """
    on_gpu = device.type == "cuda"
    home = HostBuffer(sizes.host, pin=on_gpu)
    try:
        home.tensor.view(dtype).fill_(0.01)  # pages that nobody has written are one page of zeros, read from the cache
        copied = home.tensor[: sizes.host // sizes.copy * sizes.copy].split(sizes.copy)
        place = torch.zeros(sizes.copy, dtype=torch.uint8, device=device)
        attention = _CpuAttention(device, home.tensor, sizes.kv, dtype, heads)
        found = _shared_rates(place, copied, attention)
        turns = itertools.cycle(copied)
        return found | {
            "host_memory": home.nbytes / seconds(lambda: _read(home.tensor), False),
            "d2h": sizes.copy / seconds(lambda: next(turns).copy_(place, non_blocking=True), on_gpu),
        }
    finally:
        home.close()


def rates_of_memory(
    rates: Rates,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    kv: torch.Tensor,
    nbytes: int,
    weights: Sequence[torch.Tensor],
    threads: int | None = None,
) -> Rates:
    """The rates, with those of attention and of copies as the memory that an engine uses gives them now: `nbytes` of
    the storage `kv` are a layer's in host memory, `weights` are the layers that are copied.

    Other places of a host's memory, and other minutes on a shared one, have other rates. Announces where they are.
    """
    attention = _CpuAttention(device, kv, nbytes, dtype, heads, threads)
    place = torch.empty(min((w.numel() for w in weights), default=0), dtype=torch.uint8, device=device)
    copied = [w[: place.numel()] for w in weights]
    found: dict[str, Any] = _shared_rates(place, copied, attention)
    kept = asdict(rates)
    changes = [f"{name} {value / kept[name] - 1:+.0%}" for name, value in found.items() if _apart(value, kept[name])]
    if changes:
        logger.warning(
            "this engine's host memory has other rates now than were measured on this machine (%s): times are "
            "predicted from what it gives now; `elsa-serve doctor --measure` has the next start place by the same",
            ", ".join(changes),
        )
    return replace(rates, **found, source=f"{rates.source}, of host memory when the engine started")


def _shared_rates(place: torch.Tensor, copied: Sequence[torch.Tensor], attention: _CpuAttention) -> dict[str, float]:
    """Attention on the host and copies to `place`, each alone and beside the other: the mean of the first two rounds
    in succession that agree. Where none do, which is announced, the median. Without copies, the attention alone."""
    one, turns = attention.call(1), itertools.cycle(copied)
    warm_up(one)
    arithmetic = _arithmetic(place, turns if copied else None, attention)
    rounds: list[dict[str, float]] = []
    while len(rounds) < MOST_ROUNDS:
        rounds.append(_round(place, turns if copied else None, one, attention.nbytes))
        if len(rounds) > 1 and not any(_apart(value, rounds[-2][name]) for name, value in rounds[-1].items()):
            return arithmetic | {name: (value + rounds[-2][name]) / 2 for name, value in rounds[-1].items()}
    least, most = (pick(one["cpu_attention"] for one in rounds) / 1e9 for pick in (min, max))
    logger.warning(
        "host memory's rates differ by more than %.0f %% from one second to the next (CPU attention %.1f to %.1f "
        "GB/s): others use this host, and what it attends is predicted no better than that",
        100 * AGREE,
        least,
        most,
    )
    return arithmetic | {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _apart(a: float, b: float) -> bool:
    return abs(a - b) > AGREE * max(a, b)


def _round(
    place: torch.Tensor, copied: Iterator[torch.Tensor] | None, attend: Callable[[], float], nbytes: int
) -> dict[str, float]:
    """Bytes per second: what took part in a whole window, over its time, as a pass's layers add up."""
    until = time.perf_counter() + BESIDE_S / 2
    alone = paused(attend, lambda: time.perf_counter() > until)
    found = {"cpu_attention": nbytes * len(alone) / sum(alone)}
    if copied is None:
        return found
    both = _both_cuda if place.is_cuda else _both_cpu
    h2d = _copy_rate(place, copied)
    moved, taken, beside = both(place, copied, attend, h2d)
    # While the attention paused, the copies had the memory to themselves.
    together = min(taken, sum(beside))
    left = (moved - h2d * (taken - together)) / together
    return found | {
        "h2d": h2d,
        "h2d_beside_cpu_attention": max(left, 0.5 * moved / taken),
        "cpu_attention_beside_h2d": nbytes * len(beside) / sum(beside),
    }


def _arithmetic(
    place: torch.Tensor, copied: Iterator[torch.Tensor] | None, attention: _CpuAttention
) -> dict[str, float]:
    """FLOP per second of attention by many query tokens."""
    many, flops = attention.call(CPU_ROWS), attention.flops(CPU_ROWS)
    many()
    found = {"cpu_attention_flops": flops / statistics.mean(many() for _ in range(2))}
    if copied is None:
        return found
    both = _both_cuda if place.is_cuda else _both_cpu
    _, _, beside = both(place, copied, many, _copy_rate(place, copied))
    return found | {"cpu_attention_flops_beside_h2d": flops * len(beside) / sum(beside)}


def _copy_rate(place: torch.Tensor, copied: Iterator[torch.Tensor]) -> float:
    one = seconds(lambda: place.copy_(next(copied), non_blocking=True), place.is_cuda, repeats=1)
    many = max(2, math.ceil(BESIDE_S / 4 / one))
    work = repeated(lambda: place.copy_(next(copied), non_blocking=True), many)
    return many * place.numel() / seconds(work, place.is_cuda, repeats=1)


def _both_cuda(
    place: torch.Tensor, copied: Iterator[torch.Tensor], attend: Callable[[], float], h2d: float
) -> tuple[int, float, list[float]]:
    """Copies and attention at once: bytes copied, their seconds, and those of each call of `attend`."""
    copies = max(4, math.ceil(BESIDE_S * h2d / place.numel()))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream(place.device)
    torch.cuda.synchronize(place.device)
    with torch.cuda.stream(side):
        start.record()
        for _ in range(copies):
            place.copy_(next(copied), non_blocking=True)
        end.record()
    taken = paused(attend, end.query)
    end.synchronize()
    return copies * place.numel(), start.elapsed_time(end) / 1e3, taken


def _both_cpu(
    place: torch.Tensor, copied: Iterator[torch.Tensor], attend: Callable[[], float], h2d: float
) -> tuple[int, float, list[float]]:
    """Without a GPU a thread copies, as the engine's lanes do."""
    over = threading.Event()
    times: list[float] = []

    def copy() -> None:
        while not over.is_set():
            began = time.perf_counter()
            place.copy_(next(copied))
            times.append(time.perf_counter() - began)

    worker = threading.Thread(target=copy, name="elsa-measure", daemon=True)
    until = time.perf_counter() + BESIDE_S / 2
    worker.start()
    taken = paused(attend, lambda: time.perf_counter() > until)
    over.set()
    worker.join()
    return place.numel() * len(times), sum(times), taken


class _CpuAttention:
    """Attention of some query tokens over K and V in host memory, as the engine runs it: its kernel, its threads. Every
    call takes other `nbytes` of the storage, and a few calls come to all of its regions."""

    def __init__(
        self,
        device: torch.device,
        storage: torch.Tensor,
        nbytes: int,
        dtype: torch.dtype,
        heads: Heads,
        threads: int | None = None,
    ) -> None:
        self.tokens = nbytes // heads.token_bytes(dtype)
        self.nbytes = heads.token_bytes(dtype) * self.tokens
        shape = 2, 1, heads.keys, self.tokens, heads.dim
        parts = storage[: storage.numel() // self.nbytes * self.nbytes].split(self.nbytes)
        self._keys = [part.view(dtype).view(shape) for part in scattered(parts)]
        self._heads = heads
        self._pool = library.Pool(threads or worker_threads(device)) if native.unavailable() is None else None

    def call(self, rows: int) -> Callable[[], float]:
        """What attends once and returns its seconds, as the engine counts them: without what Python takes to describe
        the call, 0.2 ms on an H200's host, where 65 MB of a layer's KV take 0.55."""
        q = torch.full((1, self._heads.queries, rows, self._heads.dim), 0.01, dtype=self._keys[0].dtype)
        keys = itertools.cycle(self._keys)
        options: dict[str, Any] = {"causal": True, "return_state": True}
        pool = self._pool
        if pool is None:
            return lambda: _wall_seconds(lambda: elsa_kernels.attention(q, *next(keys), impl="cpu", **options))
        operands = [Operands(q, k, v) for k, v in self._keys]
        problem = build_problem(
            operands[0], scale=None, q_start=None, window=None, softcap=None, precision=None, **options
        )
        turns = itertools.cycle(operands)
        return lambda: pool.prepare(problem, next(turns)).run()

    def flops(self, rows: int) -> float:
        return 4.0 * self._heads.queries * rows * self.tokens * self._heads.dim


def _wall_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def scattered(items: Sequence[Any]) -> list[Any]:
    """All items, in an order whose every beginning is spread over them."""
    count = len(items)
    step = next(step for step in itertools.count(max(1, int(0.618 * count))) if math.gcd(step, count) == 1)
    return [items[i * step % count] for i in range(count)]


def _read(data: torch.Tensor) -> object:
    """Every byte once, by all cores: the native kernel's threads where they are to be had, torch's sum elsewhere."""
    if native.unavailable() is None:
        return library.default_pool().read_seconds(data)
    return data[: data.numel() // 8 * 8].view(torch.int64).sum()


def copy_seconds(device: torch.device, heads: Heads, dtype: torch.dtype) -> float:
    """What the copy of a chunk's KV takes the host to issue: of short ones that the copy engines do not wait for."""
    capacity, streams = 2 * SHORT_RUN, make_streams(device)
    home = HostBuffer(heads.token_bytes(dtype) * capacity, pin=device.type == "cuda")
    try:
        new = torch.zeros(2, heads.keys, SHORT_RUN, heads.dim, dtype=dtype, device=device)
        place = home.tensor.view(dtype).view(2, heads.keys, capacity, heads.dim)[:, :, :SHORT_RUN]
        lane = streams.lane("measure")

        def issue() -> None:
            for _ in range(COPIES):
                copy = lane.submit([(place, new)], object="kv", direction="d2h", after=[streams.record()])
            copy.synchronize()

        return seconds(issue, device.type == "cuda") / COPIES
    finally:
        streams.close()
        home.close()
