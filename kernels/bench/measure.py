"""Timing on a GPU: warmed up, inputs rotated past the L2 cache, medians of CUDA events, rounds interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

L2_MARGIN = 2  # inputs in rotation cover the L2 cache this many times
MAX_SETS = 16


def sets_needed(input_bytes: int, l2_bytes: int) -> int:
    """How many copies of the inputs to rotate through, so that none is still in the L2 cache when its turn comes."""
    return max(2, min(MAX_SETS, -(-L2_MARGIN * l2_bytes // input_bytes)))


def sets_to_rotate(input_bytes: int) -> int:
    """`sets_needed` on the current device."""
    return sets_needed(input_bytes, torch.cuda.get_device_properties("cuda").L2_cache_size)


def once(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of `repeats` calls, taken round robin, each between its own two events."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, stop) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


class Timed:
    """One implementation on one case, warmed up; as replays of a CUDA graph if `graph`, which leaves the host out."""

    def __init__(self, calls: Sequence[Callable[[], object]], graph: bool = False, budget_ms: float = 60.0) -> None:
        self.calls = calls
        self.samples: list[float] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        once(calls, len(calls))
        if graph:
            self._capture()
        typical = statistics.median(self._replay(3) if graph else once(calls, 3))
        self.repeats = max(3, min(100, int(budget_ms / max(typical, 1e-3))))

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()

    def _replay(self, repeats: int) -> list[float]:
        assert self.graph is not None
        return [ms / len(self.calls) for ms in once([self.graph.replay], repeats)]

    def round(self) -> None:
        if self.graph is None:
            self.samples += once(self.calls, self.repeats)
        else:
            self.samples += self._replay(max(3, self.repeats // len(self.calls)))

    def median_ms(self) -> float:
        return statistics.median(self.samples)


def read_tbps(size: int = 2 << 30) -> float:
    """TB/s at which a sum reads `size` bytes: what this card's memory gives, now."""
    values = torch.ones(size // 4, device="cuda")
    return size / statistics.median(once([values.sum], 12)[2:]) / 1e9


def gemm_ceiling(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a square matrix product: what the tensor cores of this card sustain."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    timed = Timed([lambda: a @ b, lambda: b @ a])
    timed.round()
    return 2.0 * size**3 / timed.median_ms() / 1e9
