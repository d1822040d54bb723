"""One scenario at several concurrencies: where a server saturates, and what waiting that costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elsa_load.envelope import envelope
from elsa_load.report import figure, sweep_report
from elsa_load.scenario import Arrivals, Scenario, changed


def point(scenario: Scenario, concurrency: int) -> Scenario:
    """The scenario with so many clients, and prompts of its own: none may be in a cache because of another point."""
    return changed(scenario, arrivals=Arrivals(concurrency=concurrency), seed=scenario.seed + concurrency)


def known(folder: Path, scenario: Scenario, args: argparse.Namespace) -> dict[str, Any] | None:
    """The results of this very point in an earlier run that was cut off or had fewer points; None where there are none.

    Makes the folder.
    """
    folder.mkdir(exist_ok=True)
    try:
        result = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    same = result["scenario"] == json.loads(json.dumps(asdict(scenario)))
    return result if same and result["settings"]["counting"] == args.counting else None


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a point. Latencies in seconds; None where no request succeeded."""
    return [row(result["scenario"]["arrivals"]["concurrency"], result["summary"]) for result in results]


def row(concurrency: int, summary: dict[str, Any]) -> dict[str, Any]:
    latencies = {
        f"{name}_{column}": summary[f"{name}_s"][column] if summary[f"{name}_s"] else None
        for name in ("ttft", "itl", "e2e")
        for column in ("p50", "p95")
    }
    rates = {name: summary[name] for name in ("finished_per_s", "prompt_tokens_per_s", "output_tokens_per_s")}
    counts = {"requests": summary["requests"], "failed": summary["failed"], "goodput": summary["goodput"]["ratio"]}
    return {"concurrency": concurrency, **rates, **latencies, **counts}


def write(folder: Path, results: Sequence[dict[str, Any]]) -> str:
    """Write `sweep.json` and `report.html`; returns the rows as text."""
    first = results[0]
    about = {"scenario": first["scenario"]["name"], "about": first["scenario"]["about"], "settings": first["settings"]}
    data = envelope() | about | {"rows": rows(results)}
    (folder / "sweep.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "report.html").write_text(sweep_report(data))
    shown = ("concurrency", "finished_per_s", "output_tokens_per_s", "ttft_p50", "ttft_p95", "itl_p95", "goodput")
    lines = [shown, *([figure(one[name]) for name in shown] for one in data["rows"])]
    return "\n".join("".join(f"{text:>20}" for text in line) for line in lines)
