"""Figures that can be worked out by hand or against another source."""

import random
import statistics

import pytest
from elsa_load.ab import SIDES, gain_rows
from elsa_load.intervals import median_gain, paired_gain, student_t
from elsa_load.measures import Objective, distribution, summarise, weighted_percentile, wilson
from elsa_load.pages import Page, growth
from elsa_load.prometheus import PHASES
from elsa_load.records import Observation
from elsa_load.svg import Series, plot, ticks

from elsa_serve.errors import UsageError
from elsa_serve.metrics import Metrics
from elsa_serve.stats import Gauges, RequestFinished, RequestReceived, StepStats, Transfer


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    # Printed tables of Student's t, two-sided
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 7, 2.365), (0.99, 9, 3.250), (0.95, 30, 2.042), (0.999, 8, 5.041)],
)
def test_students_t_is_that_of_the_tables(confidence, freedom, expected):
    assert student_t(confidence, freedom) == pytest.approx(expected, abs=6e-4)


def test_a_common_drift_does_not_widen_the_interval():
    drift = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    gain = paired_gain([1.2 * t for t in drift], drift)
    assert (gain.percent, gain.low, gain.high) == pytest.approx((20, 20, 20))


def test_the_interval_covers_as_often_as_it_says():
    """1,000 experiments with a true gain of 20 % and paired noise; 95 % of the intervals must hold it."""
    rng = random.Random(7)
    covered = 0
    for _ in range(1000):
        work = [rng.uniform(1, 2) for _ in range(8)]
        baseline = [1.2 * t * rng.gauss(1, 0.03) for t in work]
        candidate = [t * rng.gauss(1, 0.03) for t in work]
        covered += paired_gain(baseline, candidate).covers(20)
    assert 925 <= covered <= 975


def test_the_median_does_not_notice_a_pair_that_was_held_up():
    baseline = [1.2, 1.21, 1.19, 1.2, 1.22, 1.18, 1.2, 9.0]
    candidate = [1.0] * 8
    median = median_gain(baseline, candidate, 0.9)
    assert (median.percent, median.low, median.high) == pytest.approx((20, 19, 22))
    mean = paired_gain(baseline, candidate, 0.9)
    assert mean.high - mean.low > 100


@pytest.mark.parametrize(
    ("pairs", "confidence", "left_out"),
    # Printed tables of the sign test's interval: n, and how many order statistics lie outside it on either side
    [(5, 0.95, None), (6, 0.95, 0), (8, 0.95, 0), (9, 0.95, 1), (12, 0.95, 2), (15, 0.95, 3), (20, 0.99, 3)],
)
def test_the_medians_interval_is_that_of_the_tables(pairs, confidence, left_out):
    gains = list(range(1, pairs + 1))
    median = median_gain([1 + g / 100 for g in gains], [1.0] * pairs, confidence)
    if left_out is None:
        assert median.low is None
    else:
        assert (median.low, median.high) == pytest.approx((gains[left_out], gains[-1 - left_out]))


def test_what_makes_no_pairs_is_refused():
    for baseline, candidate in (([], []), ([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0])):
        for gain in (paired_gain, median_gain):
            with pytest.raises(UsageError):
                gain(baseline, candidate)
    assert paired_gain([1.2], [1.0]).low is None


def round_of(baseline, candidate, number):
    seconds = [{side: dict.fromkeys(PHASES, t) for side, t in zip(SIDES, times)} for times in zip(baseline, candidate)]
    pairs = [{"seconds": one, "texts_equal": True} for one in seconds]
    told = {"seconds": {"baseline": sum(baseline), "candidate": sum(candidate)}, "reason": None}
    cell = {"context": 512, "output_tokens": 4, "round": number}
    return {"cell": cell, "pairs": pairs, "prometheus": dict.fromkeys(PHASES, told)}


def test_rounds_bring_the_difference_from_start_to_start_into_the_interval():
    """Within a round every pair agrees, and from round to round the same program differs by 10 %."""
    rounds = [round_of([1.0 + 0.1 * (i % 2)] * 6, [1.0 + 0.1 * ((i + 1) % 2)] * 6, i) for i in range(4)]
    alone = gain_rows(rounds[:1], {}, 0.95)[0]
    assert alone["ci_high"] < -9  # the pairs of one start are sure of what is not there
    together = gain_rows(rounds, {}, 0.95)[0]
    assert (together["rounds"], together["pairs"]) == (4, 24)
    assert together["ci_low"] < 0 < together["ci_high"]
    assert together["gain_percent"] == pytest.approx(0, abs=1e-9)
    assert together["prometheus_gain_percent"] == pytest.approx(0, abs=1e-9)


def test_a_round_that_prometheus_missed_leaves_its_figure_out():
    rounds = [round_of([1.2] * 2, [1.0] * 2, i) for i in range(2)]
    rounds[1]["prometheus"] = {phase: {"seconds": None, "reason": "Prometheus saw 1 of 2"} for phase in PHASES}
    row = gain_rows(rounds, {}, 0.95)[0]
    assert (row["prometheus_gain_percent"], row["prometheus_reason"]) == (None, "Prometheus saw 1 of 2")


def test_percentiles_weigh_tokens():
    pairs = [(0.01, 90.0), (0.02, 9.0), (1.0, 1.0)]
    assert [weighted_percentile(pairs, p) for p in (50, 90, 90.1, 99, 99.1)] == [0.01, 0.01, 0.02, 0.02, 1.0]
    values = [random.Random(1).random() for _ in range(1001)]
    figures = distribution((v, 1.0) for v in values)
    assert figures["mean"] == pytest.approx(statistics.mean(values))
    assert figures["p50"] == statistics.median(values)
    assert figures["p99"] == sorted(values)[990]
    assert distribution([]) is None


def answered(name, ttft_s, outcome="ok"):
    arrivals = [(ttft_s + 0.1 * i, 1.0) for i in range(5)]
    seen = Observation(name, 0.0, outcome, ttft_s=ttft_s, decode_s=0.4, e2e_s=ttft_s + 0.4, arrivals=arrivals)
    seen.output_tokens = 5
    return seen


def test_goodput_counts_failures_against_the_server_and_cancels_against_nobody():
    seen = [answered("fast", 0.1), answered("slow", 9.0), answered("refused", 0.1, "rejected")]
    seen += [answered("broken", 0.1, "error"), answered("hung up", 0.1, "cancelled")]
    figures = summarise(seen, wall_s=2.0, objective=Objective(ttft_s=1.0, tpot_s=0.2))
    assert (figures["goodput"]["good"], figures["goodput"]["of"], figures["goodput"]["ratio"]) == (1, 4, 0.25)
    assert (figures["failed"], figures["finished_per_s"], figures["output_tokens_per_s"]) == (2, 1.0, 5.0)
    assert figures["itl_s"]["count"] == 8
    assert summarise(seen, 2.0, Objective(tpot_s=0.05))["goodput"]["good"] == 0


def test_offered_rate_stands_beside_the_rate_sent():
    seen = [answered(str(i), 0.1) for i in range(5)]
    for i, one in enumerate(seen):
        one.due_s, one.sent_s = i * 0.5, i * 1.0  # the client fell behind
    figures = summarise(seen, 5.0, offered_per_s=2.0)
    assert figures["late_s"] == 2.0
    assert figures["sent_per_s"] == pytest.approx(1.25)


def test_wilsons_interval():
    assert wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)  # Wilson (1927), as in textbooks
    assert wilson(0, 0) is None


def test_a_page_shows_lost_requests_and_copies():
    metrics = Metrics()

    def page():
        return Page.parse(metrics.exposition().decode())

    before = page()
    metrics.record(RequestReceived("completions"))
    assert page().unaccounted == 1
    metrics.record(Gauges(1, 0, 0, 0))
    assert page().unaccounted == 0
    copies = Transfer("weights", "h2d", bytes=1000, seconds=0.5, stall_s=0.2, hidden_s=0.3)
    metrics.record(StepStats("prefill", 0.8, 10, 1, "elsa", (copies,)))
    metrics.record(RequestFinished("completions", "length", 10, 1, 0.0, 0.8, 0.0, 0.8, 0.8))
    metrics.record(Gauges(0, 0, 0, 0))
    grown = growth(before, page())
    assert (grown["h2d_bytes"], grown["stall_s"], grown["stall_share"]) == (1000, 0.2, pytest.approx(0.25))
    assert page().unaccounted == 0


def test_plots_have_round_ticks_and_escape_names():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.3, 0.3) == pytest.approx([-0.2, 0.0, 0.2])
    bars = plot([Series(n, [(1, 2, 1, 3), (2, 3, 2, 4)]) for n in "ab"], x_label="x", y_label="y", log_x=True)
    assert bars.count("<circle") == 4
    places = {part.split('"')[1] for part in bars.split("<circle cx=")[1:]}
    assert len(places) == 4  # bars at the same x stand beside each other
    assert "No data" in plot([], x_label="x", y_label="y")
    assert "<b>" not in plot([Series("<b>", [(1, 2)])], x_label="x", y_label="y")
