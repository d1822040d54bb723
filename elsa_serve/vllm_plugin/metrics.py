"""Counters of the backend on vLLM's own /metrics page.

The page is served by the API process, the backend computes in engine and worker processes. Each of these owns one file
of 8-byte numbers in a directory that they share through the environment (`envs.vllm_metrics_dir`), and a collector in
the API process's registry adds them up at every scrape: one worker, tensor parallel ranks, data parallel engines alike.
Where vLLM runs several API servers its page is prometheus_client's multiprocess one, which shows no collectors;
PROMETHEUS_MULTIPROC_DIR is set then, and the counters are kept in prometheus_client's own files as well.
"""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from elsa_serve import envs
from elsa_serve.vllm_plugin.step import PHASES, Step

TEXTS = {
    "elsa_vllm_steps": "Batches that ELSA attention was planned for, by phase.",
    "elsa_vllm_tokens": "Tokens whose attention ELSA computed, by the phase of their request.",
    "elsa_vllm_decode_splits": "KV splits of rows in decode, one layer's worth.",
    "elsa_vllm_attention_calls": "Layers' attention calls from Python, by phase; replays of CUDA graphs make none.",
    "elsa_vllm_attention_seconds": "Time of those calls: on the device where there is one, else on the host.",
    "elsa_vllm_fallbacks": "Steps with a prefill that could not take the preferred kernels, by cause.",
}
CAUSES = ("host_lengths_unknown", "batch_invariant")
SLOTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    *(("elsa_vllm_steps", (("phase", p),)) for p in PHASES),
    *(("elsa_vllm_tokens", (("phase", p),)) for p in ("prefill", "decode")),
    ("elsa_vllm_decode_splits", ()),
    *(("elsa_vllm_attention_calls", (("phase", p),)) for p in PHASES),
    *(("elsa_vllm_attention_seconds", (("phase", p),)) for p in PHASES),
    *(("elsa_vllm_fallbacks", (("cause", c),)) for c in CAUSES),
)
# The layers of a process that run on ELSA: a gauge, kept last in the same file.
LAYERS = ("elsa_vllm_attention_layers", "Attention layers whose implementation is ELSA, over all engine processes.")
INDEX = {slot: at for at, slot in enumerate(SLOTS)}
SIZE = 8 * (len(SLOTS) + 1)
PREFIX = "elsa-vllm-"  # of folders made here; the process that made one follows


class Recorder:
    """The counters of one engine process. One thread writes; readers see each number whole."""

    def __init__(self, directory: Path | None) -> None:
        self._values = memoryview(bytearray(SIZE)).cast("d")
        if directory is not None:
            # The start time tells a process from an earlier one of the same id.
            path = directory / f"{os.getpid()}-{time.time_ns()}.counters"
            with path.open("wb+") as file:
                file.truncate(SIZE)
                self._values = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("d")
        self._mirror = _prometheus_mirror() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None

    def add(self, name: str, amount: float, **labels: str) -> None:
        at = INDEX[name, tuple(labels.items())]
        self._values[at] += amount
        if self._mirror is not None:
            counter = self._mirror[name]
            (counter.labels(**labels) if labels else counter).inc(amount)

    def step(self, step: Step, splits: int, fallback: str | None) -> None:
        self.add("elsa_vllm_steps", 1, phase=step.phase)
        if step.prefill_tokens:
            self.add("elsa_vllm_tokens", step.prefill_tokens, phase="prefill")
        if step.decode_tokens:
            self.add("elsa_vllm_tokens", step.decode_tokens, phase="decode")
        if splits:
            self.add("elsa_vllm_decode_splits", splits)
        if fallback is not None:
            self.add("elsa_vllm_fallbacks", 1, cause=fallback)

    def add_layers(self, count: int) -> None:
        """Attention layers of this process that now run on ELSA; negative where they are gone."""
        self._values[len(SLOTS)] += count
        if self._mirror is not None:
            self._mirror[LAYERS[0]].inc(count)

    def value(self, name: str, **labels: str) -> float:
        return self._values[INDEX[name, tuple(labels.items())]]


class Stopwatch:
    """Times attention calls: the host's clock on a CPU; on a GPU pairs of events, read when they have passed."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder = recorder
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[str, Any, Any]] = []
        self._idle: list[Any] = []
        self._since = 0.0

    def start(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None  # a graph holds the kernels alone
        event = self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, phase: str) -> None:
        if started is None:
            return
        if not self._cuda:
            self._count(phase, time.perf_counter() - started)
            return
        event = self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)
        event.record()
        self._pending.append((phase, started, event))
        while self._pending and self._pending[0][2].query():
            done, first, last = self._pending.pop(0)
            self._count(done, first.elapsed_time(last) / 1e3)
            self._idle += (first, last)

    def _count(self, phase: str, seconds: float) -> None:
        self._recorder.add("elsa_vllm_attention_calls", 1, phase=phase)
        self._recorder.add("elsa_vllm_attention_seconds", seconds, phase=phase)


class Collector:
    """Adds up the files of all engine processes, for prometheus_client."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> list[Any]:
        return []  # no collection at registration

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        values = totals(self._directory)
        for name, text in TEXTS.items():
            slots = [(labels, at) for (slot, labels), at in INDEX.items() if slot == name]
            family = CounterMetricFamily(name, text, labels=[key for key, _ in slots[0][0]])
            for labels, at in slots:
                family.add_metric([value for _, value in labels], values[at])
            yield family
        yield GaugeMetricFamily(*LAYERS, value=values[len(SLOTS)])


def totals(directory: Path) -> tuple[float, ...]:
    """The sum over all engine processes, in the order of SLOTS, the number of layers last."""
    sums = [0.0] * (len(SLOTS) + 1)
    for path in directory.glob("*.counters"):
        data = path.read_bytes()
        if len(data) == SIZE:
            sums = [a + b for a, b in zip(sums, struct.unpack(f"{len(sums)}d", data))]
    return tuple(sums)


_recorder: Recorder | None = None
_exposed = False


def recorder() -> Recorder:
    """The recorder of this process."""
    global _recorder
    if _recorder is None:
        _recorder = Recorder(envs.vllm_metrics_dir())
    return _recorder


def expose() -> None:
    """Show the counters in this process's Prometheus registry; the first process of a server makes the directory."""
    global _exposed
    if _exposed:
        return
    _exposed = True
    directory = envs.vllm_metrics_dir()
    if directory is None or _of_a_program_above(directory):
        directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        envs.set_vllm_metrics_dir(directory)  # inherited by the engine processes
        atexit.register(_remove, directory, os.getpid())
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector(directory))  # type: ignore[arg-type]


def _of_a_program_above(directory: Path) -> bool:
    """Whether a program that runs an engine started this one, a server say, and passed on its environment.

    vLLM's own processes come from multiprocessing, and share the folder. One that was set by hand is kept.
    """
    made = directory.name.startswith(PREFIX) and not directory.name.startswith(f"{PREFIX}{os.getpid()}-")
    return made and multiprocessing.parent_process() is None


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(directory, ignore_errors=True)


def _prometheus_mirror() -> dict[str, Any]:
    from prometheus_client import CollectorRegistry, Counter, Gauge

    registry = CollectorRegistry()  # the files are what counts: the page is made from them
    counters: dict[str, Any] = {}
    for name, labels in SLOTS:
        if name not in counters:
            counters[name] = Counter(name, TEXTS[name], [key for key, _ in labels], registry=registry)
    return counters | {LAYERS[0]: Gauge(*LAYERS, registry=registry, multiprocess_mode="livesum")}
