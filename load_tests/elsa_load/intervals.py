"""The gain of one side over the other from paired times, with its confidence interval.

The same requests ran on both sides, so the times are paired, and the gain in throughput is the ratio of their sums:
gain = Σ baseline / Σ candidate − 1. Its interval is that of the classical ratio estimator (W. G. Cochran, Sampling
Techniques, 3rd edition, chapter 6): the residuals d = baseline − ratio · candidate, whose spread is small where the two
sides rise and fall together, and Student's t.

One request that the machine held up for a second widens that interval beyond use. So the median of the pairs' own
ratios stands beside it, with the interval of order statistics (the sign test's), which assumes no distribution and
hardly notices a few such pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from elsa_serve.errors import UsageError


@dataclass(frozen=True, slots=True)
class Gain:
    """Percent. The interval is None with fewer than two pairs."""

    percent: float
    low: float | None
    high: float | None
    pairs: int

    def covers(self, percent: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= percent <= self.high


def paired_gain(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> Gain:
    """Gain in throughput of the candidate, in percent, from seconds of the same work. Raises UsageError."""
    _check_pairs(baseline, candidate)
    count = len(baseline)
    ratio = sum(baseline) / sum(candidate)
    if count < 2:
        return Gain(100 * (ratio - 1), None, None, count)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(baseline, candidate))
    error = math.sqrt(squares / (count * (count - 1))) / (sum(candidate) / count)
    half = student_t(confidence, count - 1) * error
    return Gain(100 * (ratio - 1), 100 * (ratio - half - 1), 100 * (ratio + half - 1), count)


def median_gain(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> Gain:
    """The median of the pairs' gains, in percent. No interval where so few pairs cannot give the confidence."""
    _check_pairs(baseline, candidate)
    gains = sorted(100 * (a / b - 1) for a, b in zip(baseline, candidate))
    count = len(gains)
    left_out, tail = -1, 0.0  # how many on either side the interval may leave out, and the chance of the median there
    while 2 * (tail + math.comb(count, left_out + 1) / 2**count) <= 1 - confidence:
        left_out += 1
        tail += math.comb(count, left_out) / 2**count
    middle = statistics.median(gains)
    if left_out < 0:
        return Gain(middle, None, None, count)
    return Gain(middle, gains[left_out], gains[count - 1 - left_out], count)


def _check_pairs(baseline: Sequence[float], candidate: Sequence[float]) -> None:
    if len(baseline) != len(candidate) or not baseline:
        raise UsageError(f"{len(baseline)} baseline and {len(candidate)} candidate times are no pairs")
    if min(*baseline, *candidate) <= 0:
        raise UsageError("times must be more than 0")


def student_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| ≤ t) = confidence, by bisection over the closed form for whole degrees of freedom."""
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence of {confidence} is none: it lies between 0 and 1, such as 0.95")
    low, high = 0.0, 1.0
    while _two_sided(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, freedom) < confidence else (low, middle)
    return high


def _two_sided(t: float, freedom: int) -> float:
    """P(|T| ≤ t): Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):  # cos^k (odd) or cos^(k-1) (even), times the running product
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
