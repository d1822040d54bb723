"""What this machine offers: host memory and its limits, GPU facts. Its rates are measured in `measure`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from elsa_serve import __version__
from elsa_serve.errors import UsageError

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number of this size
BUDGET_SHARE = 0.9  # of what is free, where the user names no budget
CPU_DEVICE_SHARE = 0.25  # without a GPU, the part of free memory that plays the device


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
class Rates:
    """Bytes per second, FLOP per second and seconds. Defaults are a guess at a data-centre GPU and its host; `source`
    says which they are.

    Host memory is one pipe for the processor and for the copy engine: what either gets while both are at work is a rate
    of its own (`…_beside_…`), and the two together never exceed `host_memory`.
    """

    h2d: float = 50e9  # page-locked copies to the device, alone
    d2h: float = 50e9  # and back, alone
    device_memory: float = 3.0e12  # bytes of weights that a matrix product of one row reads
    host_memory: float = 100e9  # bytes read by all cores
    flops: float = 500e12  # matrix products in the model's dtype, one after the other for as long as a prompt takes
    attention_flops: float = 400e12  # causal attention of a long prompt on the device, useful FLOPs
    device_attention: float = 2.5e12  # bytes of K and V that attention of one query token reads on the device
    graph_attention: float = 3.5e12  # the same in a decode pass from a CUDA graph
    cpu_attention: float = 90e9  # bytes of K and V that the CPU kernel reads for one query token, alone
    cpu_attention_beside_h2d: float = 50e9  # the same while copies to the device run
    h2d_beside_cpu_attention: float = 50e9  # copies to the device while the CPU kernel runs
    cpu_attention_flops: float = 1e12  # the CPU kernel where many query tokens share the reading of K and V, alone
    cpu_attention_flops_beside_h2d: float = 0.9e12  # the same while copies to the device run
    disk: float = 2e9  # sequential reads that bypass the page cache
    disk_write: float = 6e8  # copies from the device into a file's new pages
    activations: float = 150e9  # a layer's activations, counted once, in all that is neither product nor attention
    layer_s: float = 5e-4  # seconds of one decoder layer of a decode pass whose bytes cost nothing: the host's issue
    pass_s: float = 1e-3  # seconds of a pass outside its layers
    copy_s: float = 3e-5  # seconds in which the host issues the copy of a chunk's keys and values in a layer
    graph_layer_s: float = 4e-5  # the same two of a decode pass from a CUDA graph: the device's own small kernels,
    graph_pass_s: float = 5e-4  # and what the host does before and after
    chunk_s: float = 1e-4  # seconds of the device that one more chunk of a prompt costs in a layer
    multiprocessors: int = 132  # of the device
    source: str = "assumed, not measured"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes. `limit` is the smaller of the machine's memory and the cgroup's limit, `available` what is free of it."""

    total: int
    cgroup_limit: int | None
    limit: int
    available: int


@dataclass(frozen=True, slots=True)
class GpuFacts:
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    total: int  # bytes
    free: int  # bytes


def software() -> dict[str, str]:
    """Versions that decide how this process computes, and its GPU; empty where there is none."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"version": __version__, "torch": torch.__version__, "cuda": torch.version.cuda or "", "gpu": gpu}


def choose_device(name: str | torch.device | None, *, present: bool = True) -> torch.device:
    """The device named, or the machine's: cuda where there is one. Raises UsageError for one that is not here.

    `present=False` takes a GPU that this machine lacks: enough to plan for one.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {str(name)!r}; choose cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"the engine runs on cuda and on cpu, not on {device.type!r}")
    count = torch.cuda.device_count()
    if present and device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"--device {device}: torch {torch.__version__} sees {count} CUDA devices here; use --device cpu"
        )
    return device


# --- memory -------------------------------------------------------------------------------------------------------


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Memory of this machine and of the container it runs in (cgroup v2, then v1)."""
    info = _meminfo(proc / "meminfo")
    total, available = info["MemTotal"], info["MemAvailable"]
    limit, used = _cgroup_limit(proc, cgroup)
    if limit is None or limit >= total:
        return HostMemory(total, limit, total, available)
    return HostMemory(total, limit, limit, max(0, min(available, limit - used)))


def _meminfo(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text().splitlines()
    except OSError:  # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"MemTotal": pages, "MemAvailable": pages}
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if len(words) == 3}


def _cgroup_limit(proc: Path, root: Path) -> tuple[int | None, int]:
    """The tightest limit of this process's cgroup and its parents, and the bytes used there without file cache."""
    found: list[tuple[int, int]] = []
    for folder, limit_name, used_name in _cgroup_folders(proc, root):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and limit < _NO_LIMIT:
            found.append((limit, max(0, (used or 0) - _file_cache(folder))))
    return min(found, key=lambda pair: pair[0] - pair[1]) if found else (None, 0)


def _cgroup_folders(proc: Path, root: Path) -> list[tuple[Path, str, str]]:
    own: dict[str, str] = {}
    try:
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.strip("/"))
    except (OSError, ValueError):
        own = {}
    v2 = [(root, own.get("", ""), "memory.max", "memory.current")]
    v1 = [(root / "memory", own.get("memory", ""), "memory.limit_in_bytes", "memory.usage_in_bytes")]
    folders = []
    for top, path, limit, used in v2 + v1:
        here = top / path
        while True:
            folders.append((here, limit, used))
            if here == top or top not in here.parents:
                break
            here = here.parent
    return folders


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text().strip())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _file_cache(folder: Path) -> int:
    """Clean file pages count as used but are given back on demand."""
    try:
        words = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
        return int(words.get("inactive_file", 0)) + int(words.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def usable_cores(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, _, _ in _cgroup_folders(proc, root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, max(1, int(quota) // int(period)))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return cores


def gpu_facts(device: torch.device) -> GpuFacts:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    capability = (properties.major, properties.minor)
    return GpuFacts(properties.name, capability, properties.multi_processor_count, total, free)


def default_gpu_budget(device: torch.device) -> int:
    """Bytes on the device where the user names none."""
    if device.type == "cuda":
        return int(BUDGET_SHARE * gpu_facts(device).free)
    return int(CPU_DEVICE_SHARE * host_memory().available)


def default_host_budget(device: torch.device, gpu_budget: int) -> int:
    """Bytes of host memory where the user names none. Without a GPU, the device's part comes out of the same memory."""
    available = int(BUDGET_SHARE * host_memory().available)
    return available if device.type == "cuda" else max(0, available - gpu_budget)


# --- rates --------------------------------------------------------------------------------------------------------


def assumed_rates(dtype: torch.dtype) -> Rates:
    """A data-centre GPU's, for planning on another machine. FP32 without TF32 has a tenth of the arithmetic."""
    return Rates(flops=50e12, attention_flops=200e12) if dtype == torch.float32 else Rates()
