"""From observations to figures: percentiles, goodput with failures in the denominator, offered against sent rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from elsa_load.records import Observation, Outcome

PERCENTILES = (50, 90, 95, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a good answer keeps, in seconds; None: not asked. `tpot_s` is the request's mean time a token."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, seen: Observation) -> bool:
        limits = ((self.ttft_s, seen.ttft_s), (self.tpot_s, seen.tpot_s or 0.0), (self.e2e_s, seen.e2e_s))
        return seen.outcome == "ok" and all(limit is None or (t is not None and t <= limit) for limit, t in limits)


def weighted_percentile(pairs: Sequence[tuple[float, float]], percent: float) -> float:
    """The smallest value that at least `percent` of the weight does not exceed. `pairs` (value, weight), sorted."""
    total = sum(weight for _, weight in pairs)
    passed = 0.0
    for value, weight in pairs:
        passed += weight
        if passed >= total * percent / 100 * (1 - 1e-12):
            return value
    return pairs[-1][0]


def distribution(pairs: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """Mean, percentiles and maximum of weighted values; None where there are none."""
    ordered = sorted(pairs)
    if not ordered:
        return None
    weight = sum(w for _, w in ordered)
    figures = {"count": weight, "mean": sum(v * w for v, w in ordered) / weight}
    figures |= {f"p{percent:g}": weighted_percentile(ordered, percent) for percent in PERCENTILES}
    return figures | {"max": ordered[-1][0]}


def once(values: Iterable[float | None]) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in values if value is not None]


def summarise(
    observations: Sequence[Observation],
    wall_s: float,
    objective: Objective | None = None,
    offered_per_s: float | None = None,
) -> dict[str, Any]:
    """Figures of a run. Latencies are of the requests that succeeded; `failed` stands beside them.

    Goodput counts answers within the objective over all requests but those the scenario itself cancelled: a refused or
    broken request is not good. `late_s` is how far the client fell behind its own schedule.
    """
    ok = [seen for seen in observations if seen.outcome == "ok"]
    outcomes = Counter(seen.outcome for seen in observations)
    counted = len(observations) - outcomes["cancelled"]
    late = [seen.sent_s - seen.due_s for seen in observations if seen.due_s is not None]
    sending = max((seen.sent_s for seen in observations), default=0.0)
    judged = [seen.right for seen in ok if seen.right is not None]
    figures: dict[str, Any] = {
        "requests": len(observations),
        "outcomes": {outcome: outcomes[outcome] for outcome in get_args(Outcome)},
        "failed": counted - len(ok),
        "retried": sum(seen.attempts > 1 for seen in observations),
        "wall_s": wall_s,
        "offered_per_s": offered_per_s,
        "sent_per_s": len(observations) / sending if late and sending > 0 else None,
        "late_s": max(late) if late else None,
        "finished_per_s": len(ok) / wall_s if wall_s > 0 else None,
        "prompt_tokens_per_s": sum(seen.prompt_tokens or 0 for seen in ok) / wall_s if wall_s > 0 else None,
        "output_tokens_per_s": sum(seen.output_tokens for seen in ok) / wall_s if wall_s > 0 else None,
        "ttft_s": distribution(once(seen.ttft_s for seen in ok)),
        "tpot_s": distribution(once(seen.tpot_s for seen in ok)),
        "itl_s": distribution(gap for seen in ok for gap in seen.token_gaps()),
        "e2e_s": distribution(once(seen.e2e_s for seen in ok)),
        "exact_tokens": sum(seen.exact_tokens for seen in ok) / len(ok) if ok else None,
        "right": {"right": sum(judged), "of": len(judged)} if judged else None,
    }
    if objective is not None:
        good = sum(objective.met_by(seen) for seen in observations)
        figures["goodput"] = {
            "good": good,
            "of": counted,
            "ratio": good / counted if counted else None,
            "per_s": good / wall_s if wall_s > 0 else None,
            "interval_95": wilson(good, counted),
        }
    return figures


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a proportion."""
    if trials == 0:
        return None
    ratio = successes / trials
    centre = (ratio + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(ratio * (1 - ratio) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
