"""How long something takes: for a moment, where it lasts, and with pauses as between the layers of a pass."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 5
PAUSE_S = 2e-3  # between two layers' attention on the host
WARM_UP_S = 0.3
SUSTAINED_S = 0.8  # for which a GPU computes before its clock is what its power allows, half of it timed


def repeated(work: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [work() for _ in range(times)]


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


def paused(work: Callable[[], float], over: Callable[[], bool]) -> list[float]:
    """What calls say that they took, with pauses in between, in which threads fall asleep, as between the layers of a
    pass: as many calls as fit before `over` says so; at least one."""
    taken: list[float] = []
    while not taken or not over():
        time.sleep(PAUSE_S)
        taken.append(work())
    return taken


def warm_up(work: Callable[[], object]) -> None:
    """Until the processor's clock has had time to rise."""
    until = time.perf_counter() + WARM_UP_S
    work()
    while time.perf_counter() < until:
        work()
