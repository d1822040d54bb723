"""Self-contained HTML of a gain file or of a run: tables and plots, next to the paper's figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from elsa_load.ab import SIDES, agrees
from elsa_load.prometheus import PHASES
from elsa_load.svg import Band, Series, plot

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th { text-align: left; }
td:not(:last-child) { white-space: nowrap; } td:last-child { overflow-wrap: anywhere; }
svg { width: 100%; font: 11px system-ui, sans-serif; } .grid { stroke: #e4e4e4; } .band { fill: #8885; }
figure { margin: 1rem 0; } figcaption { font-size: 13px; } .bad { color: #b00; } small { color: #666; }
"""
NAMES = {"prefill": "Prefill", "decode": "Decode", "end_to_end": "End to end"}


def page(title: str, body: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(body)}</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def gain_report(data: dict[str, Any]) -> str:
    """The report of an A/B from its results file."""
    paper = data["paper"]
    settings = data["settings"]
    body = [
        f"<p>{escape(verdict(data))}</p>",
        "<h2>Gain in throughput</h2>",
        gain_table(data["rows"]),
        gain_plot(data),
        f"<p><small>The paper’s figure: +{paper['low']} … {paper['high']} %, {escape(paper['about'])}. Each point is "
        f"paired over the same requests on both sides, in the order A B · B A; bars are "
        f"{100 * settings['confidence']:g} % intervals.</small></p>",
    ]
    body += ["<h2>Copies</h2>", copies_plots(data)]
    for cell in data["cells"]:
        body += cell_section(cell)
    return page("Gain of the candidate over the baseline", [*body, environment(data)])


def verdict(data: dict[str, Any]) -> str:
    """The result in one sentence: what the intervals say, and no more."""
    parts = []
    for row in data["rows"]:
        if row["ci_low"] is None:
            word = "has too few pairs for an interval"
        elif row["ci_low"] > 0:
            word = "is faster"
        elif row["ci_high"] < 0:
            word = "is slower"
        else:
            word = "cannot be told from the baseline"
        parts.append(f"{NAMES[row['phase']].lower()} at {row['context']:,} tokens {word} ({interval(row)})")
    return "Candidate: " + "; ".join(parts) + "."


def interval(row: dict[str, Any]) -> str:
    if row["ci_low"] is None:
        return f"{row['gain_percent']:+.1f} %"
    return f"{row['gain_percent']:+.1f} %, {row['ci_low']:+.1f} … {row['ci_high']:+.1f} %"


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("Phase", "Context", "Baseline", "Candidate", "Gain", "Interval", "Median", "By Prometheus", "Equal outputs")
    lines = []
    for row in rows:
        second = row["prometheus_gain_percent"]
        lines.append(
            (
                NAMES[row["phase"]],
                f"{row['context']:,}",
                f"{row['baseline_s']:.3f} s",
                f"{row['candidate_s']:.3f} s",
                f"{row['gain_percent']:+.1f} %",
                bounds(row["ci_low"], row["ci_high"]),
                f"{row['median_gain_percent']:+.1f} % ({bounds(row['median_ci_low'], row['median_ci_high'])})",
                (row["prometheus_reason"] or "not asked")
                if second is None
                else f"{second:+.1f} %{'' if agrees(row) else ', outside the interval'}",
                f"{row['outputs_equal']} of {row['pairs']}",
            )
        )
    return table(head, lines)


def bounds(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:+.1f} … {high:+.1f} %"


def gain_plot(data: dict[str, Any]) -> str:
    series = []
    for phase in PHASES:
        rows = [row for row in data["rows"] if row["phase"] == phase]
        points = [
            (row["context"], row["gain_percent"], row["ci_low"], row["ci_high"])
            if row["ci_low"] is not None
            else (row["context"], row["gain_percent"])
            for row in rows
        ]
        series.append(Series(NAMES[phase], points))
    band = Band("the paper", data["paper"]["low"], data["paper"]["high"])
    return plot(series, x_label="context (tokens)", y_label="gain (%)", bands=[band], log_x=True)


def copies_plots(data: dict[str, Any]) -> str:
    """Bytes over the bus and the share of the passes in which compute waited for them, against the context."""
    counted = [(cell["cell"]["context"], cell["counters"]) for cell in data["cells"]]
    requests = [len(cell["pairs"]) for cell in data["cells"]]
    if not any(counters[side]["h2d_bytes"] for _, counters in counted for side in SIDES):
        return "<p>Neither side reports copies between host and GPU.</p>"
    moved = [
        Series(side, [(n, counters[side]["h2d_bytes"] / 1e9 / m) for (n, counters), m in zip(counted, requests)])
        for side in SIDES
    ]
    waited = [
        Series(side, [(n, 100 * counters[side]["stall_share"]) for n, counters in counted if counters[side]["steps_s"]])
        for side in SIDES
    ]
    return plot(moved, x_label="context (tokens)", y_label="to the GPU (GB a request)", log_x=True) + plot(
        waited, x_label="context (tokens)", y_label="stall share (%)", log_x=True
    )


def cell_section(cell: dict[str, Any]) -> list[str]:
    """One context: times in their order, their distribution, and what the copies did."""
    one = cell["cell"]
    start = f", start {one['round'] + 1} of the servers" if one["round"] else ""
    parts = [f"<h2>{one['context']:,} tokens, {one['output_tokens']} generated{start}</h2>"]
    for phase in PHASES:
        times = {side: [pair["seconds"][side][phase] for pair in cell["pairs"]] for side in SIDES}
        dots = [Series(side, list(enumerate(times[side], 1))) for side in SIDES]
        parts.append(f"<h3>{NAMES[phase]}</h3>" + plot(dots, x_label="pair", y_label="seconds"))
        sums = [Series(side, cumulative(times[side]), line=True) for side in SIDES]
        parts.append(plot(sums, x_label="seconds", y_label="share of requests within", zero=True))
    return [*parts, counters_table(cell["counters"])]


def cumulative(values: Sequence[float]) -> list[tuple[float, ...]]:
    """The steps of the empirical distribution function."""
    ordered = sorted(values)
    steps: list[tuple[float, ...]] = []
    for i, value in enumerate(ordered):
        steps += [(value, i / len(ordered)), (value, (i + 1) / len(ordered))]
    return steps


def counters_table(counters: dict[str, dict[str, Any]]) -> str:
    head = ("Side", "To the GPU", "From the GPU", "Compute waited for copies", "Copies hidden", "Passes", "Stall share")
    lines = []
    for side, c in counters.items():
        share = "–" if c["stall_share"] is None else f"{100 * c['stall_share']:.1f} %"
        sizes = [f"{c[key] / 1e9:.2f} GB" for key in ("h2d_bytes", "d2h_bytes")]
        lines.append((side, *sizes, *(f"{c[key]:.2f} s" for key in ("stall_s", "hidden_s", "steps_s")), share))
    return table(head, lines)


def environment(data: dict[str, Any]) -> str:
    flat = {f"{kind} {key}": value for kind in ("machine", "versions") for key, value in data[kind].items()}
    flat |= {key: data[key] for key in ("commit", "date", "command")}
    flat |= {f"setting {key}": value for key, value in data["settings"].items()}
    return "<h2>Where and how</h2>" + table(("", ""), [(key, str(value)) for key, value in flat.items()])


def result_watch(data: dict[str, Any]) -> dict[str, Any]:
    return {f"watch: {key}": value for key, value in data["watch"].items() if key != "lives"}


def memory_plot(data: dict[str, Any]) -> str:
    """Resident memory of the server over its lives; empty where it did not tell."""
    lives = data["watch"].get("lives", ())
    names = [f"process {number}" for number in range(1, len(lives) + 1)]
    series = [
        Series(name, [(at, value / 2**20) for at, value in life["memory"]], line=True)
        for name, life in zip(names, lives)
    ]
    return plot(series, x_label="seconds", y_label="resident memory (MiB)") if series else ""


def run_report(data: dict[str, Any]) -> str:
    """The report of one scenario."""
    summary, seen = data["summary"], data["observations"]
    figures = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
    columns = ("mean", "p50", "p90", "p95", "p99", "p99.9", "max")
    lines = [(key, *(f"{summary[key][c]:.4f}" for c in columns)) for key in figures if summary[key]]
    counts = {key: value for key, value in summary.items() if key not in figures} | result_watch(data)
    dots = {
        outcome: [
            (o["sent_s"], o["ttft_s"] if o["ttft_s"] is not None else o["e2e_s"])
            for o in seen
            if o["outcome"] == outcome
        ]
        for outcome in summary["outcomes"]
    }
    series = [Series(name, points) for name, points in dots.items() if points]
    spread = [Series(key, cumulative([o[key] for o in seen if o[key]]), line=True) for key in ("ttft_s", "e2e_s")]
    body = [
        f"<p>{escape(data['scenario']['about'])}</p>",
        table(("Seconds", *columns), lines),
        plot(series, x_label="sent (s)", y_label="first token, or end (s)"),
        plot([one for one in spread if one.points], x_label="seconds", y_label="share of requests within"),
        memory_plot(data),
        table(("", ""), [(key, plain(value)) for key, value in counts.items()]),
        environment(data),
    ]
    return page(f"Load test: {data['scenario']['name']}", body)


def plain(value: Any) -> str:
    """A figure of a summary, or several by name."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    if isinstance(value, (tuple, list)):
        return " … ".join(map(plain, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
    return "–" if value is None else str(value)


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def sweep_report(data: dict[str, Any]) -> str:
    """The report of one scenario at several concurrencies."""
    rows = data["rows"]

    def against(*names: str) -> list[Series]:
        found = [(name, [(row["concurrency"], row[name]) for row in rows if row[name] is not None]) for name in names]
        return [Series(name, points) for name, points in found if points]

    head = list(rows[0])
    lines = [[figure(row[key]) for key in head] for row in rows]
    label = "clients at once"
    body = [
        f"<p>{escape(data['about'])}</p>",
        table([key.replace("_", " ") for key in head], lines),
        plot(against("prompt_tokens_per_s", "output_tokens_per_s"), x_label=label, y_label="tokens/s", log_x=True),
        plot(against("ttft_p50", "ttft_p95", "e2e_p95"), x_label=label, y_label="seconds", log_x=True),
        plot(against("itl_p50", "itl_p95"), x_label=label, y_label="seconds between two tokens", log_x=True),
        plot(against("goodput"), x_label=label, y_label="share of good answers", log_x=True),
        environment(data),
    ]
    return page(f"Sweep: {data['scenario']}", body)
