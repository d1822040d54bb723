"""This machine's rates, measured once in a few seconds and kept in `ELSA_CACHE_DIR/rates.json`.

Memory pipes are measured alone and, where the processor and the copy engine share the host's memory, both at once
(`host_rates`); then the disk (`disk_rates`) and the device's own work (`device_rates`). What depends on the engine's
own code (the issue of a layer, the activations between matrix products) is measured by running small random models
through the engine (`probes`).
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elsa_serve import __version__, envs
from elsa_serve.errors import BudgetError
from elsa_serve.offload import device_rates, disk_rates, host_rates, probes
from elsa_serve.offload.device import require_exact_matmul
from elsa_serve.offload.machine import Heads, Rates, assumed_rates, gpu_facts, host_memory
from elsa_serve.offload.units import format_size

FORM = 16  # of the measurement: what an earlier form kept is measured again
LARGE_DEVICE = 8 << 30  # bytes free from which the full sizes are measured
HEADS = Heads()  # where no model is named

logger = logging.getLogger(__name__)


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


def rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "elsa",
    linear: str = "torch",
    heads: Heads = HEADS,
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
    many = f"{rates.cpu_attention_flops / tera:.2f}", f"{rates.cpu_attention_flops_beside_h2d / tera:.2f}"
    return [
        rates.source,
        f"host to device {rates.h2d / giga:.1f} GB/s, device to host {rates.d2h / giga:.1f} GB/s",
        f"host memory read {rates.host_memory / giga:.1f} GB/s, the device's, by a product of one row, "
        f"{rates.device_memory / giga:.1f} GB/s",
        f"CPU attention {rates.cpu_attention / giga:.1f} GB/s of KV; beside copies to the device {beside[0]} GB/s, and "
        f"the copies {beside[1]} GB/s; with many queries {many[0]} TFLOP/s, beside copies {many[1]}",
        f"matrix products {rates.flops / tera:.4g} TFLOP/s, attention {rates.attention_flops / tera:.4g} TFLOP/s, "
        f"of one query {rates.device_attention / giga:.4g} GB/s of KV, in a graph {rates.graph_attention / giga:.4g}, "
        f"activations {rates.activations / giga:.1f} GB/s",
        f"a layer of a decode pass {rates.layer_s * 1e3:.3f} ms, a pass besides {rates.pass_s * 1e3:.3f} ms; from a "
        f"graph {rates.graph_layer_s * 1e3:.3f} and {rates.graph_pass_s * 1e3:.3f} ms; a prompt's chunk costs a layer "
        f"{rates.chunk_s * 1e3:.3f} ms, a copy of its KV {rates.copy_s * 1e6:.1f} µs",
        f"disk, past the page cache {rates.disk / giga:.2f} GB/s, to new pages of a file {rates.disk_write / giga:.2f} "
        "GB/s",
    ]


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention: str = "elsa",
    linear: str = "torch",
    heads: Heads = HEADS,
    sizes: Sizes | None = None,
) -> Rates:
    """All rates, measured now."""
    require_exact_matmul()
    sizes = sizes or sizes_for(device, dtype)
    found: dict[str, Any] = {"source": f"measured on {_machine_key(device).partition(', torch')[0]}"}
    found |= host_rates.memory_rates(device, dtype, heads, sizes)
    found |= {"copy_s": host_rates.copy_seconds(device, heads, dtype)}
    folder = envs.cache_dir()
    found |= {
        "disk": disk_rates.folder_rate(sizes.file, folder),
        "disk_write": disk_rates.write_rate(folder, device, sizes.file),
    }
    # The last: they leave the device's memory free. The probes' prompts are over before power limits the clock.
    brief, lasting = device_rates.compute_rates(device, dtype, attention, linear, heads, sizes)
    if device.type == "cuda":
        found["multiprocessors"] = gpu_facts(device).multiprocessors
    measured = replace(assumed_rates(dtype), **found | brief)
    layer = functools.partial(device_rates.layer_seconds, device, dtype, linear)
    share: dict[str, Any] = probes.engine_rates(device, dtype, attention, linear, sizes, measured, layer)
    return replace(measured, **lasting | share)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
