"""A against B: the same seeded requests on both sides, interleaved in ABBA blocks, with paired intervals.

One request is under way at a time. The order A B · B A · A B · … gives both sides the same share of a machine that
slowly warms up or slows down, and a pair's two times stand next to each other. Prompts differ from pair to pair, so no
prefix cache answers them, and both sides see every prompt once.

What pairing cannot cancel: two processes of the very same program may differ throughout their lives, by where their
memory lies. On a CPU of two cores the same server twice differed by up to 14 % in prefill, far outside the interval of
its pairs. So `--rounds` starts both servers anew, in the other order, for every round, and the interval is that of the
rounds and no longer of the pairs: it holds the difference from start to start too. Or the engines run in one process
(`elsa-serve bench gain --in-process`), which has no such difference.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from elsa_load.client import Client
from elsa_load.intervals import median_gain, paired_gain
from elsa_load.pages import Page, growth
from elsa_load.prometheus import PHASES
from elsa_load.prompts import PromptMaker
from elsa_load.records import Observation, Request
from elsa_serve.errors import ElsaError

SIDES = ("baseline", "candidate")
PAPER = {
    "low": 17.8,
    "high": 20.2,
    "about": "LLaMA-13B with offloading, 32K tokens and more, FP32, A100-40GB (the ELSA paper)",
}
SEED_STEP = 100_003


class Side(Protocol):
    """One of the two systems."""

    async def run(self, request: Request) -> Observation: ...

    async def page(self) -> Page:
        """Its /metrics now."""
        ...


class Watcher(Protocol):
    """What sees both sides' metrics all through the run: a Prometheus, or what records for one."""

    def settle(self) -> float:
        """Wait until all that has happened is seen. Returns a time to ask about, in seconds since the epoch."""
        ...

    def seconds(
        self, phase: str, start: float, end: float, requests: int
    ) -> tuple[dict[str, float] | None, str | None]:
        """What each side's `requests` took between two settled times; or None and why that is not known."""
        ...


class HttpSide:
    """A server, through the measuring client."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def run(self, request: Request) -> Observation:
        return await self.client.send(self.client.prepare(request), time.perf_counter())

    async def page(self) -> Page:
        return Page.parse(await self.client.get_text("/metrics"))


@dataclass(frozen=True, slots=True)
class Cell:
    """One context of an A/B: `pairs` prompts of `context` tokens, each continued for exactly `output_tokens`.

    `round` counts the starts of the servers, from 0; each has prompts of its own. After `seconds` no pair is begun any
    more, two at the least; which pairs there are then depends on the time that all of them took, not on what they say.
    `rest_s` is waited before every request, so that what the other side left under way is in nobody's time.
    """

    context: int
    output_tokens: int
    pairs: int
    seed: int = 1
    warm_up: int = 1
    round: int = 0
    seconds: float | None = None
    rest_s: float = 0.0

    def requests(self, make: PromptMaker) -> list[Request]:
        """The warm-up's first, then one a pair."""
        count = self.warm_up + self.pairs
        return [self._request(make, self.round * count + number) for number in range(count)]

    def _request(self, make: PromptMaker, number: int) -> Request:
        (asked,) = make.prompts(self.context, self.seed * SEED_STEP + number)
        name = f"ab-{self.context}-{self.seed}-{number}"
        return Request(name, asked.prompt, asked.tokens, self.output_tokens, ignore_eos=True)


@dataclass(slots=True)
class Pair:
    """The times of one request on both sides, in seconds, by phase; `first` is the side that ran first."""

    id: str
    first: str
    seconds: dict[str, dict[str, float]]  # side -> phase -> seconds
    texts_equal: bool
    equal_chars: int  # of the common beginning
    output_tokens: dict[str, int] = field(default_factory=dict)


def times_of(seen: Observation) -> dict[str, float]:
    """Seconds by phase. Raises ElsaError for a request that failed: a benchmark with holes proves nothing."""
    if seen.outcome != "ok" or seen.ttft_s is None or seen.decode_s is None:
        raise ElsaError(f"request {seen.id} failed ({seen.outcome}, HTTP {seen.status}): {seen.error}")
    return {"prefill": seen.ttft_s, "decode": seen.decode_s, "end_to_end": seen.e2e_s}


def order(number: int) -> tuple[str, str]:
    """Which side comes first in pair, or in round, `number`: A B, B A, A B, …"""
    return SIDES if number % 2 == 0 else (SIDES[1], SIDES[0])


def common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


async def run_pair(sides: Mapping[str, Side], request: Request, number: int, rest_s: float = 0.0) -> Pair:
    first, second = order(number)
    seen = {}
    for side in (first, second):
        await asyncio.sleep(rest_s)
        seen[side] = await sides[side].run(request)
    texts = [seen[side].text for side in SIDES]
    return Pair(
        id=request.id,
        first=first,
        seconds={side: times_of(seen[side]) for side in SIDES},
        texts_equal=texts[0] == texts[1],
        equal_chars=common_start(*texts),
        output_tokens={side: seen[side].output_tokens for side in SIDES},
    )


async def run_cell(
    cell: Cell,
    sides: Mapping[str, Side],
    make: PromptMaker,
    *,
    prometheus: Watcher | None = None,
    progress: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda measured: None,
) -> dict[str, Any]:
    """Measure one context on both sides. Returns what `gain_rows` and the report need, as plain data.

    `keep` gets the same after every pair, of those that there are so far.
    """
    requests = cell.requests(make)
    bar = tqdm(total=2 * len(requests), desc=f"{cell.context} tokens", disable=not progress)
    for request in requests[: cell.warm_up]:
        for side in SIDES:
            times_of(await sides[side].run(request))
            bar.update()
    start = prometheus.settle() if prometheus else 0.0
    before = {side: await sides[side].page() for side in SIDES}
    pairs: list[Pair] = []

    async def measured(end: float, seen: dict[str, Any]) -> dict[str, Any]:
        after = {side: await sides[side].page() for side in SIDES}
        return {
            "cell": asdict(cell),
            "prompt_tokens": [request.prompt_tokens for request in requests[cell.warm_up :]][: len(pairs)],
            "pairs": [asdict(pair) for pair in pairs],
            "counters": {side: growth(before[side], after[side]) for side in SIDES},
            "config": {side: after[side].labels("elsa_engine_config_info") for side in SIDES},
            "window": [start, end],
            "prometheus": {phase: {"seconds": seconds, "reason": why} for phase, (seconds, why) in seen.items()},
        }

    until = time.monotonic() + (cell.seconds if cell.seconds is not None else math.inf)
    for number, request in enumerate(requests[cell.warm_up :]):
        if len(pairs) >= 2 and time.monotonic() > until:
            break
        pairs.append(await run_pair(sides, request, cell.round + number, cell.rest_s))
        keep(await measured(time.time(), {}))
        bar.update(2)
    bar.close()
    if prometheus is None:
        return await measured(time.time(), {})
    end = prometheus.settle()
    return await measured(end, {phase: prometheus.seconds(phase, start, end, len(pairs)) for phase in PHASES})


def gain_rows(measured: Sequence[dict[str, Any]], labels: dict[str, Any], confidence: float) -> list[dict[str, Any]]:
    """A row a phase, with the keys of every gain file, from the rounds of one context.

    Phases that took no time (one token: no decode) have no row. With several rounds the interval is that of the rounds'
    sums (the ratio estimator over clusters), with one it is that of its pairs.
    """
    rows = []
    for phase in PHASES:
        rounds = [[[pair["seconds"][side][phase] for pair in one["pairs"]] for side in SIDES] for one in measured]
        times = [[t for one in rounds for t in one[i]] for i in range(len(SIDES))]
        if min(min(side) for side in times) <= 0:
            continue
        units = times if len(rounds) == 1 else [[sum(one[i]) for one in rounds] for i in range(len(SIDES))]
        gain, median = (method(units[0], units[1], confidence) for method in (paired_gain, median_gain))
        second, reason = prometheus_gain(measured, phase)
        rows.append(
            {
                **labels,
                "context": measured[0]["cell"]["context"],
                "phase": phase,
                "gain_percent": gain.percent,
                "ci_low": gain.low,
                "ci_high": gain.high,
                "median_gain_percent": median.percent,
                "median_ci_low": median.low,
                "median_ci_high": median.high,
                "prometheus_gain_percent": second,
                "prometheus_reason": reason,
                "pairs": len(times[0]),
                "rounds": len(rounds),
                "confidence": confidence,
                "baseline_s": statistics.mean(times[0]),
                "candidate_s": statistics.mean(times[1]),
                "output_tokens": measured[0]["cell"]["output_tokens"],
                "outputs_equal": sum(pair["texts_equal"] for one in measured for pair in one["pairs"]),
            }
        )
    return rows


def prometheus_gain(measured: Sequence[dict[str, Any]], phase: str) -> tuple[float | None, str | None]:
    """Percent gained in the seconds that Prometheus saw, or None and why not; neither where none ran."""
    seen = [one["prometheus"].get(phase) for one in measured]
    if None in seen:
        return None, None
    reasons = [one["reason"] for one in seen if one["reason"] is not None]
    if reasons:
        return None, reasons[0]
    baseline, candidate = (sum(one["seconds"][side] for one in seen) for side in SIDES)
    return 100 * (baseline / candidate - 1), None


def agrees(row: dict[str, Any]) -> bool:
    """Whether Prometheus's gain lies in the client's interval, where there are both."""
    second = row["prometheus_gain_percent"]
    return second is None or row["ci_low"] is None or row["ci_low"] <= second <= row["ci_high"]


class Results:
    """A results file that grows a pair at a time; an interrupted run goes on with the context that it stopped in."""

    def __init__(self, file: Path, envelope: dict[str, Any], settings: dict[str, Any]) -> None:
        self.file, self._envelope, self._settings = file, envelope, settings
        self.cells: list[dict[str, Any]] = []
        self._part: list[dict[str, Any]] = []
        if file.exists():
            known = json.loads(file.read_text())
            if known.get("settings") != settings:
                raise ElsaError(f"{file} holds a run with other settings: name another --output, or remove it")
            self.cells = [cell for cell in known["cells"] if cell.get("complete", True)]

    def done(self, cell: Cell) -> bool:
        return any(known["cell"] == asdict(cell) for known in self.cells)

    def add(self, measured: dict[str, Any], labels: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.cells.append(measured | {"labels": labels(measured), "complete": True})
        self._part = []
        self.save()

    def keep(self, measured: dict[str, Any], labels: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Save a cell that is still being measured; a later run measures it anew."""
        self._part = [measured | {"labels": labels(measured), "complete": False}]
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        confidence = self._settings["confidence"]
        contexts: dict[int, list[dict[str, Any]]] = {}
        for cell in [*self.cells, *self._part]:
            contexts.setdefault(cell["cell"]["context"], []).append(cell)
        return [row for rounds in contexts.values() for row in gain_rows(rounds, rounds[0]["labels"], confidence)]

    def as_dict(self) -> dict[str, Any]:
        cells = [*self.cells, *self._part]
        return self._envelope | {"settings": self._settings, "paper": PAPER, "rows": self.rows, "cells": cells}

    def save(self) -> None:
        """Whole or not at all: a run cut off in the middle of a write keeps its file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        partial.replace(self.file)


async def run_cells(
    cells: Sequence[Cell],
    results: Results,
    measure: Callable[[Cell], Awaitable[dict[str, Any]]],
    labels: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Measure what the results do not hold yet."""
    for cell in cells:
        if not results.done(cell):
            results.add(await measure(cell), labels)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The gains as text."""
    head = f"{'context':>8} {'phase':<11} {'baseline':>10} {'candidate':>10} {'gain':>8}   {'interval':<18}"
    lines = [f"{head} {'Prometheus':>10}  equal"]
    for row in rows:
        interval = "" if row["ci_low"] is None else f"[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}] %"
        second = row["prometheus_gain_percent"]
        lines.append(
            f"{row['context']:>8} {row['phase']:<11} {row['baseline_s']:>8.3f} s {row['candidate_s']:>8.3f} s "
            f"{row['gain_percent']:>+6.1f} %   {interval:<18} {'–' if second is None else f'{second:+.1f} %':>10}  "
            f"{row['outputs_equal']}/{row['pairs']}{'' if agrees(row) else '  Prometheus: outside the interval'}"
        )
    return "\n".join(lines)
