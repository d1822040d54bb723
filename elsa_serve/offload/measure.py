"""This machine's rates, measured once in a few seconds and kept in `ELSA_CACHE_DIR/rates.json`.

Memory pipes are measured alone and, where the processor and the copy engine share the host's memory, both at once.
What depends on the engine's own code (the issue of a layer, the activations between matrix products) is measured by
running small random models through the engine.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import elsa_kernels
import torch
from elsa_kernels.checks import build_problem
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library
from elsa_kernels.registry import Operands

from elsa_serve import __version__, envs
from elsa_serve.errors import BudgetError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload import probes
from elsa_serve.offload.device import require_exact_matmul
from elsa_serve.offload.disk import DirectFile, read_rate
from elsa_serve.offload.graphs import PAGE, Capturing, GraphAttention
from elsa_serve.offload.host import FileBuffer, HostBuffer
from elsa_serve.offload.in_place import worker_threads
from elsa_serve.offload.kv import Extent, Span
from elsa_serve.offload.machine import Rates, assumed_rates, gpu_facts, host_memory
from elsa_serve.offload.streams import make_streams
from elsa_serve.offload.units import format_size
from elsa_serve.offload.working import runs_of

if TYPE_CHECKING:
    from elsa_serve.offload.plan import Geometry

FORM = 9  # of the measurement: what an earlier form kept is measured again
REPEATS = 5
PAUSE_S = 2e-3  # between two layers' attention on the host
WARM_UP_S = 0.3
BESIDE_S = 0.4  # seconds for which copies and CPU attention run beside each other; half of them each runs alone
AGREE = 0.1  # two rounds of host memory's rates are within this part of each other, or there is another round
MOST_ROUNDS = 5
ROWS, WEIGHTS = 48, 3  # products of one row in a timed run, and matrices that they take in turn
SHORT_RUN = 64  # tokens
LAYERS = 8  # whose products are timed in turn: together more than a cache holds
QUERIES = 8  # calls of attention of one query in a timed run
CPU_ROWS = 32  # query tokens that bind the CPU kernel by arithmetic
SUSTAINED_S = 0.8  # for which a GPU computes before its clock is what its power allows, half of it timed
WRITTEN, RUN = 1 << 30, 1 << 20  # bytes written to measure a disk, and of a head's tokens that go to it in one run
LARGE_DEVICE = 8 << 30  # bytes free from which the full sizes are measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heads:
    """Of queries, of keys, and the channels of each: attention's rates are those of such heads."""

    queries: int = 32
    keys: int = 32
    dim: int = 128

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of a token."""
        return 2 * self.keys * self.dim * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.queries}/{self.keys} heads of {self.dim}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: bytes of a copy, of the KV that the CPU attends in a call, of the host memory that both go
    through in turn, and of the file; then the device's work."""

    copy: int
    kv: int
    host: int
    file: int
    attention: int  # tokens
    product: tuple[int, int, int]  # m, k, n
    probe_hidden: int
    probe_prompt: int


def sizes_for(device: torch.device, dtype: torch.dtype) -> Sizes:
    """Large enough to leave caches and launches behind, small enough for the memory that is free."""
    if device.type == "cpu":
        kv = min(256 << 20, host_memory().available // 16)
        return Sizes(64 << 20, kv, kv, 64 << 20, 512, (256, 1024, 1024), 256, 256)
    # Servers' caches hold hundreds of MiB, and what comes from there again and again is no rate of the memory's.
    host = min(4 << 30, host_memory().available // 16)
    kv = min(640 << 20, host)  # a layer of 32K tokens
    if gpu_facts(device).free < LARGE_DEVICE:
        return Sizes(min(64 << 20, host), kv, host, 64 << 20, 4096, (2048, 2048, 8192), 1024, 2048)
    attention = 8192 if dtype == torch.float32 else 16384
    return Sizes(min(512 << 20, host), kv, host, 256 << 20, attention, (8192, 4096, 11008), 4096, 8192)


# --- the cache ----------------------------------------------------------------------------------------------------


def rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "elsa",
    linear: str = "torch",
    heads: Heads = Heads(),
    refresh: bool = False,
) -> Rates:
    """This machine's rates for a dtype, an attention of such heads and linear layers: from the cache, else measured now
    and kept.

    `refresh` also forgets those of other heads, which are then measured again when they are needed. Without the memory
    to measure with, which is announced, rates are assumed.
    """
    kind = ", ".join((_machine_key(device), _name(dtype), attention, linear))
    key = f"{kind}, {heads}"
    file = envs.cache_dir() / "rates.json"
    known = _read_cache(file)
    if not refresh and key in known:
        return Rates(**known[key])
    logger.warning(
        "measuring this machine's rates for %s once, which takes some seconds, and more where kernels that the engine "
        "needs are not built yet",
        _name(dtype),
    )
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # both of the whole machine, containers or not
    if load > cores:
        logger.warning(
            "this machine is busy (load %.1f on %d cores): the rates come out too low, and are kept; "
            "`elsa-serve doctor --measure` repeats them",
            load,
            cores,
        )
    try:
        measured = measure_rates(device, dtype, attention=attention, linear=linear, heads=heads)
    except (BudgetError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("no memory to measure with (%s): times are predicted from assumed rates", error)
        return assumed_rates(dtype)
    # Read again: another process may have added its own meanwhile.
    known = {name: kept for name, kept in _read_cache(file).items() if not (refresh and name.startswith(f"{kind}, "))}
    known[key] = asdict(measured)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known, indent=1))
        scratch.replace(file)
    except OSError as error:
        logger.warning("the rates cannot be kept in %s (%s): the next start measures again", file, error)
    return measured


def _read_cache(file: Path) -> dict[str, dict]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    fields = set(asdict(Rates()))
    return (
        {k: v for k, v in known.items() if isinstance(v, dict) and set(v) == fields} if isinstance(known, dict) else {}
    )


def _machine_key(device: torch.device) -> str:
    """What a measurement belongs to: GPU and driver, cores and threads, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} cores, {torch.get_num_threads()} threads, {format_size(host_memory().total)}"]
    if device.type == "cuda":
        parts.insert(0, f"{torch.cuda.get_device_name(device)}, driver {_driver()}")
    return ", ".join([*parts, f"torch {torch.__version__}, elsa-serve {__version__}, form {FORM}"])


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


def describe(rates: Rates) -> list[str]:
    """The rates for people, a line each."""
    giga, tera = 1e9, 1e12
    beside = f"{rates.cpu_attention_beside_h2d / giga:.1f}", f"{rates.h2d_beside_cpu_attention / giga:.1f}"
    return [
        rates.source,
        f"host to device {rates.h2d / giga:.1f} GB/s, device to host {rates.d2h / giga:.1f} GB/s",
        f"host memory read {rates.host_memory / giga:.1f} GB/s, the device's, by a product of one row, "
        f"{rates.device_memory / giga:.1f} GB/s",
        f"CPU attention {rates.cpu_attention / giga:.1f} GB/s of KV; beside copies to the device {beside[0]} GB/s, and "
        f"the copies {beside[1]} GB/s; {rates.cpu_attention_flops / tera:.2f} TFLOP/s with many queries",
        f"matrix products {rates.flops / tera:.4g} TFLOP/s, attention {rates.attention_flops / tera:.4g} TFLOP/s, "
        f"of one query {rates.device_attention / giga:.4g} GB/s of KV, in a graph {rates.graph_attention / giga:.4g}, "
        f"activations {rates.activations / giga:.1f} GB/s",
        f"a layer of a decode pass {rates.layer_s * 1e3:.3f} ms, a pass besides {rates.pass_s * 1e3:.3f} ms; from a "
        f"graph {rates.graph_layer_s * 1e3:.3f} and {rates.graph_pass_s * 1e3:.3f} ms; a prompt's chunk costs a layer "
        f"{rates.chunk_s * 1e3:.3f} ms, a run of KV copied {rates.run_s * 1e6:.1f} µs",
        f"disk, past the page cache {rates.disk / giga:.2f} GB/s, to new pages of a file {rates.disk_write / giga:.2f} "
        "GB/s",
    ]


# --- measuring ----------------------------------------------------------------------------------------------------


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "elsa",
    linear: str = "torch",
    heads: Heads = Heads(),
    sizes: Sizes | None = None,
) -> Rates:
    """All rates, measured now."""
    require_exact_matmul()
    sizes = sizes or sizes_for(device, dtype)
    found: dict[str, Any] = {"source": f"measured on {_machine_key(device).partition(', torch')[0]}"}
    found |= _memory_rates(device, dtype, heads, sizes)
    found |= {"run_s": _run_seconds(device, heads, dtype)}
    folder = envs.cache_dir()
    found |= {"disk": _disk_rate(sizes.file, folder), "disk_write": disk_write_rate(folder, device, sizes.file)}
    # The last: they leave the device's memory free. The probes' prompts are over before power limits the clock.
    brief, lasting = _device_rates(device, dtype, attention, linear, heads, sizes)
    measured = replace(assumed_rates(dtype), **found | brief)
    layer = functools.partial(_layer_seconds, device, dtype, linear)
    share: dict[str, Any] = probes.engine_rates(device, dtype, attention, linear, sizes, measured, layer)
    return replace(measured, **lasting | share)


def _memory_rates(device: torch.device, dtype: torch.dtype, heads: Heads, sizes: Sizes) -> dict[str, float]:
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
        many, turns = attention.call(CPU_ROWS), itertools.cycle(copied)
        return found | {
            "host_memory": home.nbytes / seconds(lambda: _read(home.tensor), False),
            "cpu_attention_flops": attention.flops(CPU_ROWS) / seconds(many, False, repeats=2),
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
    found = _shared_rates(place, copied, attention)
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
    rounds: list[dict[str, float]] = []
    while len(rounds) < MOST_ROUNDS:
        rounds.append(_round(place, turns if copied else None, one, attention.nbytes))
        if len(rounds) > 1 and not any(_apart(value, rounds[-2][name]) for name, value in rounds[-1].items()):
            return {name: (value + rounds[-2][name]) / 2 for name, value in rounds[-1].items()}
    least, most = (pick(one["cpu_attention"] for one in rounds) / 1e9 for pick in (min, max))
    logger.warning(
        "host memory's rates differ by more than %.0f %% from one second to the next (CPU attention %.1f to %.1f "
        "GB/s): others use this host, and what it attends is predicted no better than that",
        100 * AGREE,
        least,
        most,
    )
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _apart(a: float, b: float) -> bool:
    return abs(a - b) > AGREE * max(a, b)


def _round(
    place: torch.Tensor, copied: Iterator[torch.Tensor] | None, attend: Callable[[], object], nbytes: int
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


def _copy_rate(place: torch.Tensor, copied: Iterator[torch.Tensor]) -> float:
    one = seconds(lambda: place.copy_(next(copied), non_blocking=True), place.is_cuda, repeats=1)
    many = max(2, math.ceil(BESIDE_S / 4 / one))
    work = _repeated(lambda: place.copy_(next(copied), non_blocking=True), many)
    return many * place.numel() / seconds(work, place.is_cuda, repeats=1)


def _both_cuda(
    place: torch.Tensor, copied: Iterator[torch.Tensor], attend: Callable[[], object], h2d: float
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
    place: torch.Tensor, copied: Iterator[torch.Tensor], attend: Callable[[], object], h2d: float
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

    def call(self, rows: int) -> Callable[[], object]:
        q = torch.full((1, self._heads.queries, rows, self._heads.dim), 0.01, dtype=self._keys[0].dtype)
        keys = itertools.cycle(self._keys)
        options: dict[str, Any] = {"causal": True, "return_state": True}
        pool = self._pool
        if pool is None:
            return lambda: elsa_kernels.attention(q, *next(keys), impl="cpu", **options)
        operands = [Operands(q, k, v) for k, v in self._keys]
        problem = build_problem(
            operands[0], scale=None, q_start=None, window=None, softcap=None, precision=None, **options
        )
        turns = itertools.cycle(operands)
        return lambda: pool.attend(problem, next(turns))

    def flops(self, rows: int) -> float:
        return 4.0 * self._heads.queries * rows * self.tokens * self._heads.dim


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


def _device_rates(
    device: torch.device, dtype: torch.dtype, attention: str, linear: str, heads: Heads, sizes: Sizes
) -> tuple[dict[str, float], dict[str, float]]:
    """The device's products and its attention, on random numbers: constants draw less power. As fast as they are for a
    moment, and what differs where they last."""
    on_gpu = device.type == "cuda"
    issued = functools.partial(_as_a_graph, device) if on_gpu else (lambda work: work)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    tokens, keys = sizes.attention, sizes.copy // heads.token_bytes(dtype)
    weights = sizes.product[1] * sizes.product[2] * dtype.itemsize
    one = _attention(attention, 1, keys, heads, options)
    in_graph = _paged_attention(keys, heads, options) if attention in attentions.IN_GRAPHS else one
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "flops": (2.0 * math.prod(sizes.product), _product(linear, sizes.product, options)),
        "attention_flops": (
            2.0 * heads.queries * heads.dim * tokens**2,
            _attention(attention, tokens, tokens, heads, options),
        ),
        "device_memory": (1.0 * ROWS * weights, issued(_products_of_one_row(linear, sizes.product, options))),
        "device_attention": (1.0 * QUERIES * keys * heads.token_bytes(dtype), issued(_repeated(one, QUERIES))),
        "graph_attention": (1.0 * QUERIES * keys * heads.token_bytes(dtype), issued(_repeated(in_graph, QUERIES))),
    }
    brief = {name: amount / seconds(call, on_gpu) for name, (amount, call) in work.items()}
    lasting = {name: work[name][0] / sustained(work[name][1]) for name in ("flops", "attention_flops") if on_gpu}
    del work, one, in_graph  # with the graphs' memory
    if on_gpu:
        torch.cuda.empty_cache()
    return brief, lasting


def _product(linear: str, shape: tuple[int, int, int], options: dict[str, Any]) -> Callable[[], object]:
    m, k, n = shape
    left, right = torch.randn(m, k, **options), torch.randn(n, k, **options)
    if linear == "elsa":
        from elsa_kernels.linear import linear as split_linear
        from elsa_kernels.linear import split_weight

        planes = split_weight(right)
        return lambda: split_linear(left, planes)
    return lambda: torch.nn.functional.linear(left, right)


def _products_of_one_row(linear: str, shape: tuple[int, int, int], options: dict[str, Any]) -> Callable[[], object]:
    """ROWS products of one row, whose weights are not in the cache when their turn comes."""
    _, k, n = shape
    calls = [_product(linear, (1, k, n), options) for _ in range(WEIGHTS)]
    return lambda: [calls[i % WEIGHTS]() for i in range(ROWS)]


def _layer_seconds(device: torch.device, dtype: torch.dtype, linear: str, geometry: Geometry, keys: int) -> float:
    """Of one layer's products of one row, as the engine makes them, and attention over so many keys; in a graph where
    that can be."""
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    heads, hidden, ffn = Heads(geometry.heads, geometry.kv_heads, geometry.head_dim), geometry.hidden, geometry.ffn
    inner, keys_and_values = heads.queries * heads.dim, [heads.keys * heads.dim] * 2
    into, gates = [inner, *keys_and_values], [ffn] * 2
    if on_gpu and linear == "torch":  # fused: what has the same input is one product
        into, gates = [sum(into)], [sum(gates)]
    shapes = [*((hidden, n) for n in into), (inner, hidden), *((hidden, n) for n in gates), (ffn, hidden)]
    layers = [[_product(linear, (1, *shape), options) for shape in shapes] for _ in range(LAYERS)]
    attend = _paged_attention(keys, heads, options)

    def work() -> None:
        for products in layers:
            for product in products:
                product()
            attend()

    return seconds(_as_a_graph(device, work) if on_gpu else work, on_gpu) / LAYERS


def _attention(name: str, queries: int, keys: int, heads: Heads, options: dict[str, Any]) -> Callable[[], object]:
    q = torch.randn(1, heads.queries, queries, heads.dim, **options)
    k, v = (torch.randn(1, heads.keys, keys, heads.dim, **options) for _ in range(2))
    attend, asked = attentions.ATTEND[name], attentions.AttentionOptions(heads.dim**-0.5)
    return lambda: attend(q, k, v, asked)


def _paged_attention(keys: int, heads: Heads, options: dict[str, Any]) -> Callable[[], object]:
    """Attention of one query as a graph of a decode pass holds it."""
    layer = torch.randn(2, heads.keys, keys // PAGE * PAGE, heads.dim, **options)
    span = Span(Extent("gpu", layer.shape[2], [layer], [layer], []), 0, layer.shape[2])
    attend = GraphAttention([[span]], layer.device)
    attend.place(torch.tensor([layer.shape[2] - 1], device=layer.device))
    q = torch.randn(1, heads.queries, 1, heads.dim, **options)
    new = layer[None, 0, :, :1]
    asked = attentions.AttentionOptions(heads.dim**-0.5)
    return lambda: attend(0, q, new, new, asked)


def _repeated(work: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [work() for _ in range(times)]


def _as_a_graph(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph, where it can be captured: a query's attention is over before Python has issued it."""
    capturing = Capturing(device)
    try:
        replay, result = capturing(work)
    except RuntimeError as error:
        logger.info("no CUDA graph holds what is to be timed, which includes its issue then: %s", error)
        return work
    held = work, result, capturing  # a graph reads what `work` refers to, and keeps none of it alive

    def again() -> object:
        replay()
        return held

    return again


def _run_seconds(device: torch.device, heads: Heads, dtype: torch.dtype) -> float:
    """What the copy of a run takes the host to issue, of short ones that the copy engines do not wait for."""
    capacity, streams = 2 * SHORT_RUN, make_streams(device)
    home = HostBuffer(heads.token_bytes(dtype) * capacity, pin=device.type == "cuda")
    try:
        new = torch.zeros(2, heads.keys, SHORT_RUN, heads.dim, dtype=dtype, device=device)
        place = home.tensor.view(dtype).view(2, heads.keys, capacity, heads.dim)[:, :, :SHORT_RUN]
        lane = streams.lane("measure")

        def issue() -> None:
            lane.submit(runs_of(place, new), object="kv", direction="d2h").synchronize()

        return seconds(issue, device.type == "cuda") / (2 * heads.keys)
    finally:
        streams.close()
        home.close()


def _disk_rate(nbytes: int, folder: Path) -> float:
    """Reads of a file written for it; the assumed rate where no such file can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="elsa-disk-") as file:
            block = b"\x01" * (1 << 20)
            for _ in range(max(1, nbytes >> 20)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            with DirectFile(Path(file.name)) as opened:
                return read_rate(opened, opened.size)
    except OSError as error:
        logger.warning("the disk of %s cannot be measured (%s): its rate is assumed", folder, error)
        return Rates().disk


def disk_write_rate(folder: Path, device: torch.device, nbytes: int = WRITTEN, run: int = RUN) -> float:
    """Copies from the device into a new mapped file, in runs of so many bytes, as KV on disk is written; the assumed
    rate where no such file can be."""
    try:
        file = FileBuffer(nbytes, folder)
    except BudgetError as error:
        logger.warning("writes to the disk of %s cannot be measured (%s): their rate is assumed", folder, error)
        return Rates().disk_write
    source = torch.ones(min(run, nbytes), dtype=torch.uint8, device=device)
    began = time.perf_counter()
    for place in file.tensor.split(run):
        place.copy_(source[: place.numel()])
    return nbytes / (time.perf_counter() - began)


def seconds(work: Callable[[], object], on_gpu: bool, repeats: int = REPEATS) -> float:
    """The median of some runs after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def sustained(work: Callable[[], object]) -> float:
    """Seconds of a call among calls that follow each other for SUSTAINED_S: a GPU that reaches its power limit lowers
    its clock, as it does in a long prompt."""
    half = max(1, math.ceil(SUSTAINED_S / 2 / seconds(work, True, repeats=2)))
    taken = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(half):
            work()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / half)
    return taken[-1]


def paused(work: Callable[[], object], over: Callable[[], bool]) -> list[float]:
    """Seconds of each call, with pauses in between, in which threads fall asleep, as between the layers of a pass: as
    many calls as fit before `over` says so; at least one."""
    taken: list[float] = []
    while not taken or not over():
        time.sleep(PAUSE_S)
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def warm_up(work: Callable[[], object]) -> None:
    """Until the processor's clock has had time to rise."""
    until = time.perf_counter() + WARM_UP_S
    work()
    while time.perf_counter() < until:
        work()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
