"""The HTML reports: every plot they promise, nothing loaded from elsewhere, no text of a run taken for HTML."""

from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from elsa_load.ab import SIDES, Cell, Results, table
from elsa_load.envelope import envelope
from elsa_load.measures import summarise
from elsa_load.prometheus import PHASES
from elsa_load.records import Observation
from elsa_load.report import gain_report, run_report, sweep_report
from elsa_load.sweep import row

CONTEXTS = (1024, 4096)
HOSTILE = "<script src=//x>"


class Seen(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.plots, self.texts = [], set(), {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "svg":
            self.plot = dict(attrs)["aria-label"]
            self.plots.setdefault(self.plot, []).append({"circle": 0, "polyline": 0})
        elif tag in ("circle", "polyline"):
            self.plots[self.plot][-1][tag] += 1

    def handle_data(self, data):
        self.texts.append(data)


def loads_nothing(seen):
    return not {"script", "link", "img", "iframe", "object"} & set(seen.tags) and not {
        "src", "href", "onload", "xlink:href",
    } & seen.attributes  # fmt: skip


def measured(context, gain):
    pairs = [
        {
            "id": str(number),
            "first": SIDES[number % 2],
            "seconds": {side: dict.fromkeys(PHASES, (1 + number / 10) * s) for side, s in zip(SIDES, (gain, 1.0))},
            "texts_equal": True,
            "output_tokens": dict.fromkeys(SIDES, 4),
        }
        for number in range(3)
    ]
    copies = {"h2d_bytes": 3e9, "d2h_bytes": 1e9, "stall_s": 1.0, "hidden_s": 3.0, "steps_s": 10.0, "stall_share": 0.1}
    return {
        "cell": asdict(Cell(context, 4, 3)),
        "pairs": pairs,
        "counters": dict.fromkeys(SIDES, copies),
        "window": [0.0, 1.0],
        "prometheus": {},
    }


@pytest.fixture
def gains(tmp_path):
    results = Results(tmp_path / "gain.json", envelope(), {"confidence": 0.95, "set": HOSTILE})
    for context, gain in zip(CONTEXTS, (1.2, 1.5)):
        labels = {"engine": "elsa-offload", "dtype": "float32", "baseline": HOSTILE, "candidate": "elsa"}
        results.add(measured(context, gain), lambda _, labels=labels: labels)
    return results.as_dict()


def test_the_report_of_an_ab_has_every_plot(gains):
    seen = Seen(gain_report(gains))
    assert loads_nothing(seen)
    assert seen.plots["gain (%)"] == [{"circle": len(PHASES) * len(CONTEXTS), "polyline": 0}]
    for copies in ("to the GPU (GB a request)", "stall share (%)"):
        assert seen.plots[copies] == [{"circle": len(SIDES) * len(CONTEXTS), "polyline": 0}]
    cells = len(PHASES) * len(CONTEXTS)
    assert seen.plots["seconds"] == [{"circle": 3 * len(SIDES), "polyline": 0}] * cells  # over time, pair by pair
    assert seen.plots["share of requests within"] == [{"circle": 0, "polyline": len(SIDES)}] * cells
    text = " ".join(seen.texts)
    assert "+17.8 … 20.2 %" in text
    assert "prefill at 1,024 tokens is faster (+20.0 %, +20.0 … +20.0 %)" in text
    assert "decode at 4,096 tokens is faster (+50.0 %" in text
    assert HOSTILE in text


def test_a_prometheus_that_disagrees_is_pointed_out(gains):
    first, second, *_ = gains["rows"]
    first["ci_low"], first["ci_high"], first["prometheus_gain_percent"] = 19.0, 21.0, 20.5
    second["ci_low"], second["ci_high"], second["prometheus_gain_percent"] = 19.0, 21.0, 21.5
    lines = table(gains["rows"]).splitlines()
    assert [line.endswith("Prometheus: outside the interval") for line in lines[1:3]] == [False, True]
    text = gain_report(gains)
    assert "<td>+20.5 %</td>" in text
    assert "<td>+21.5 %, outside the interval</td>" in text


def test_the_reports_of_a_run_and_of_a_sweep_have_every_plot():
    seen_ok = [
        Observation(str(i), float(i), "ok", ttft_s=0.1 * i + 0.1, decode_s=0.2, e2e_s=0.5, output_tokens=3,
                    arrivals=[(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)])
        for i in range(4)
    ]  # fmt: skip
    observations = [*seen_ok, Observation("x", 4.0, "rejected", error=HOSTILE, e2e_s=0.1)]
    summary = summarise(observations, 5.0)
    lives = [{"memory": [(0.0, 2**20), (1.0, 2**21)]}, {"memory": [(2.0, 2**20), (3.0, 2**20)]}]
    data = envelope() | {
        "settings": {"url": HOSTILE},
        "scenario": {"name": HOSTILE, "about": HOSTILE},
        "summary": summary,
        "observations": [one.as_dict() for one in observations],
        "watch": {"scrapes": 4, "lives": lives},
    }
    seen = Seen(run_report(data))
    assert loads_nothing(seen)
    assert seen.plots["first token, or end (s)"] == [{"circle": 5, "polyline": 0}]
    assert seen.plots["share of requests within"] == [{"circle": 0, "polyline": 2}]
    assert seen.plots["resident memory (MiB)"] == [{"circle": 0, "polyline": 2}]

    rows = [row(concurrency, summary | {"goodput": {"ratio": 0.8}}) for concurrency in (1, 2)]
    rows.append(row(4, summarise(observations[4:], 5.0) | {"goodput": {"ratio": 0.0}}))  # nobody was answered
    data = envelope() | {"scenario": HOSTILE, "about": HOSTILE, "settings": {}, "rows": rows}
    seen = Seen(sweep_report(data))
    assert loads_nothing(seen)
    assert {name: plots[0]["circle"] for name, plots in seen.plots.items()} == {
        "tokens/s": 6, "seconds": 6, "seconds between two tokens": 4, "share of good answers": 3,
    }  # fmt: skip
    assert "–" in seen.texts
