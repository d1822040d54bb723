"""Writes the Grafana dashboards, and checks that every metric they query is one that /metrics shows or a rule records.

python configs/grafana/generate.py            write dashboards/*.json
python configs/grafana/generate.py --check    exit 1 where a file differs or a query names an unknown metric
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = HERE / "dashboards"
RULES = (ROOT / "configs" / "prometheus" / "recording.yml", ROOT / "load_tests" / "elsa_load" / "gain_rules.yml")
WIDTH, HEIGHT = 12, 8  # of a panel; a row is 24 wide
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ON = '{job=~"$job",instance=~"$instance"}'
METRIC = re.compile(r"\b((?:elsa|process|vllm)[_:][a-zA-Z0-9_:]+)")


def on(*matchers: str) -> str:
    """The selector of the chosen servers, with more matchers."""
    return "{" + ",".join(['job=~"$job"', 'instance=~"$instance"', *matchers]) + "}"


def rate(metric: str, *matchers: str, by: str = "") -> str:
    inner = f"rate({metric}{on(*matchers)}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(percent: float, metric: str, by: str = "") -> str:
    return f"histogram_quantile({percent}, {rate(metric + '_bucket', by=', '.join(filter(None, ('le', by))))})"


def quantiles(metric: str) -> list[tuple[str, str]]:
    return [(quantile(q, metric), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)]


def panel(title: str, unit: str, queries: Sequence[tuple[str, str]], about: str = "", **more: Any) -> dict[str, Any]:
    """A time series. Queries are (PromQL, legend)."""
    return {
        "type": "timeseries",
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "targets": [
            {"refId": chr(65 + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}, **more},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
    }


def dashboard(uid: str, title: str, panels: Sequence[dict[str, Any]], variables: Sequence[dict[str, Any]]) -> Any:
    placed = [
        one | {"id": i + 1, "gridPos": {"x": i % 2 * WIDTH, "y": i // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT}}
        for i, one in enumerate(panels)
    ]
    return {
        "uid": uid,
        "title": title,
        "tags": ["elsa-serve"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source_variable(), *variables]},
        "annotations": {"list": []},
        "panels": placed,
    }


def source_variable() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1}


def label_variable(label: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": label,
        "datasource": SOURCE,
        "query": {"query": f"label_values(elsa_requests_received_total, {label})", "refId": "A"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def overview() -> list[dict[str, Any]]:
    return [
        panel(
            "Requests ended, by outcome",
            "reqps",
            [
                (rate("elsa_requests_finished_total", by="outcome"), "{{outcome}}"),
                (rate("elsa_requests_received_total"), "received"),
            ],
            "Refused and cancelled requests included.",
        ),
        panel(
            "Requests inside",
            "short",
            [
                (f"sum by (phase) (elsa_requests_running{ON})", "{{phase}}"),
                (f"sum(elsa_requests_waiting{ON})", "waiting"),
                (f"sum(elsa_server_open_requests{ON})", "open over HTTP"),
            ],
        ),
        panel("Time to first token", "s", quantiles("elsa_time_to_first_token_seconds")),
        panel(
            "Time to first token, p95 by prompt length",
            "s",
            [(quantile(0.95, "elsa_time_to_first_token_seconds", "ctx"), "{{ctx}}")],
        ),
        panel("Between two tokens", "s", quantiles("elsa_inter_token_latency_seconds")),
        panel("Request, from arrival to end", "s", quantiles("elsa_request_duration_seconds")),
        panel(
            "Where a request's time goes (mean)",
            "s",
            [
                (f"{rate(f'elsa_request_{phase}_seconds_sum')} / {rate(f'elsa_request_{phase}_seconds_count')}", phase)
                for phase in ("queue", "prefill", "decode")
            ],
        ),
        panel(
            "Tokens",
            "short",
            [(rate("elsa_prompt_tokens_total"), "prompt /s"), (rate("elsa_generation_tokens_total"), "generated /s")],
        ),
        panel("Refused, by reason", "reqps", [(rate("elsa_admission_rejections_total", by="reason"), "{{reason}}")]),
        panel(
            "Prompt tokens still to compute",
            "short",
            [(f"sum by (instance) (elsa_prefill_pending_tokens{ON})", "{{instance}}")],
        ),
        panel(
            "Clients that hung up, by phase",
            "reqps",
            [(rate("elsa_client_disconnects_total", by="phase"), "{{phase}}")],
        ),
        panel(
            "From a hang-up to a free slot",
            "s",
            quantiles("elsa_cancel_latency_seconds"),
            "How long a request goes on that nobody waits for.",
        ),
        panel(
            "State",
            "short",
            [(f"max by (instance, state) (elsa_engine_state{ON}) == 1", "{{instance}} {{state}}")],
            "What /readyz answers.",
        ),
        panel(
            "Lost requests",
            "short",
            [(f"elsa:requests_unaccounted{ON}", "{{instance}}")],
            "received − finished − running − waiting: 0 at every scrape.",
        ),
    ]


def offload() -> list[dict[str, Any]]:
    return [*passes(), *memory()]


def passes() -> list[dict[str, Any]]:
    """What moves and computes in a pass, and what it waits for."""
    transfer = "elsa_offload_transfer_{}_total"
    return [
        panel(
            "Stall: share of the passes in which compute waited for copies",
            "percentunit",
            [(f"elsa:offload_stall_ratio:rate5m{ON}", "{{instance}}")],
            "The figure that offloading is about: 0 means that copies cost nothing.",
        ),
        panel(
            "Copy time, hidden and not",
            "s",
            [
                (rate("elsa_offload_stall_seconds_total", by="object"), "{{object}}: compute waited, s/s"),
                (rate("elsa_offload_hidden_seconds_total", by="object"), "{{object}}: under compute, s/s"),
            ],
        ),
        panel(
            "Bytes over the bus",
            "Bps",
            [(rate(transfer.format("bytes"), by="object, direction"), "{{object}} {{direction}}")],
            "Over the wall clock.",
        ),
        panel(
            "Bandwidth while copying",
            "Bps",
            [(f"elsa:offload_bandwidth_bytes_per_second:rate5m{ON}", "{{object}} {{direction}}")],
        ),
        panel(
            "Copies",
            "ops",
            [(rate("elsa_offload_transfers_total", by="object, direction"), "{{object}} {{direction}}")],
        ),
        panel(
            "One pass over the layers (p95)",
            "s",
            [(quantile(0.95, "elsa_step_duration_seconds", "phase"), "{{phase}}")],
        ),
        panel(
            "Passes: time taken over time predicted",
            "percentunit",
            [
                (
                    f"{rate('elsa_step_duration_seconds_sum', by='phase')} / "
                    f"{rate('elsa_step_predicted_seconds_total', by='phase')}",
                    "{{phase}}",
                )
            ],
            "The planner's prediction of each pass, before it ran: from rates measured on this machine, and the "
            "host's pace in the passes before. 100 % is as predicted.",
        ),
        panel(
            "Beside the passes: CPU attention and disk",
            "s",
            [
                (rate("elsa_host_attention_stall_seconds_total"), "compute waited for CPU attention, s/s"),
                (rate("elsa_disk_stall_seconds_total"), "compute waited for the disk, s/s"),
            ],
        ),
    ]


def memory() -> list[dict[str, Any]]:
    """What lies where, what of it is used again, and what computes it."""
    return [
        panel("KV memory in use", "percentunit", [(f"elsa:kv_cache_used:ratio{ON}", "{{instance}} {{tier}}")], max=1),
        panel("KV memory", "bytes", [(f"sum by (tier) (elsa_kv_cache_used_bytes{ON})", "{{tier}}")]),
        panel(
            "KV memory kept for later prompts",
            "bytes",
            [(f"sum by (tier) (elsa_kv_cache_cached_bytes{ON})", "{{tier}}")],
            "The prefix cache: free as soon as a request needs it.",
        ),
        panel(
            "Found, guessed right",
            "percentunit",
            [
                (
                    f"{rate('elsa_prefix_cache_hits_total')} / {rate('elsa_prefix_cache_queries_total')}",
                    "prompt tokens found in the prefix cache",
                ),
                (
                    f"{rate('elsa_spec_decode_accepted_tokens_total')} / {rate('elsa_spec_decode_draft_tokens_total')}",
                    "guessed tokens that came out",
                ),
            ],
            max=1,
        ),
        panel(
            "Requests that gave their KV back",
            "ops",
            [(rate("elsa_preemptions_total"), "preemptions")],
            "Each is computed again: less --max-batch, or more memory for KV, makes them rare.",
        ),
        panel("GPU memory as planned", "bytes", [(f"sum by (kind) (elsa_gpu_memory_bytes{ON})", "{{kind}}")]),
        panel(
            "Host memory: planned, and resident in fact",
            "bytes",
            [
                (f"sum by (kind) (elsa_host_memory_bytes{ON})", "{{kind}}"),
                (f"sum(process_resident_memory_bytes{ON})", "resident"),
            ],
        ),
        panel(
            "Passes by attention kernels",
            "ops",
            [(rate("elsa_attention_backend_steps_total", by="backend"), "{{backend}}")],
            "Anything but the kernels asked for is a fallback.",
        ),
        panel(
            "Time since the last pass", "s", [(f"time() - (elsa_last_step_timestamp_seconds{ON} > 0)", "{{instance}}")]
        ),
    ]


def gain() -> list[dict[str, Any]]:
    """The A/B of `elsa-serve bench`, whose Prometheus labels its two servers with `side`."""
    phases = ("prefill", "decode", "end_to_end")
    ratios = [(f"elsa:{phase}_gain:ratio", phase.replace("_", " ")) for phase in phases]
    about = "Since both servers started, warm-up included. The paper: 17.8 … 20.2 %."
    first = panel("Gain of the candidate over the baseline", "percentunit", ratios, about)
    del first["fieldConfig"]["defaults"]["min"]  # a gain may be a loss
    return [
        first,
        *(
            panel(
                f"Mean seconds: {phase.replace('_', ' ')}",
                "s",
                [(f"elsa:{phase}_seconds:sum / elsa:{phase}_seconds:count", "{{side}}")],
            )
            for phase in phases
        ),
    ]


def dashboards() -> dict[str, Any]:
    servers = [label_variable("job"), label_variable("instance")]
    return {
        "overview": dashboard("elsa-overview", "ELSA-Serve: requests", overview(), servers),
        "offload": dashboard("elsa-offload", "ELSA-Serve: offloading", offload(), servers),
        "gain": dashboard("elsa-gain", "ELSA-Serve: A/B gain", gain(), []),
    }


def queries(one: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for p in one["panels"] for target in p["targets"]]
    return asked + [v["query"]["query"] for v in one["templating"]["list"] if v["type"] == "query"]


def exported() -> set[str]:
    """Names that can be queried: those of /metrics, by family and type, and the recorded ones."""
    from elsa_serve.metrics import Metrics

    names: set[str] = set()
    for line in Metrics().exposition().decode().splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            names |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return names | {rule["record"] for file in RULES for rule in _rules(file)}


def _rules(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def unknown_metrics(expressions: Sequence[str], known: set[str]) -> set[str]:
    return {name for text in expressions for name in METRIC.findall(text)} - known


def rule_queries() -> list[str]:
    """The expressions of all rules. Names of vLLM's exporter are not ours to check."""
    files = (*RULES, ROOT / "configs" / "prometheus" / "alerts.yml")
    return [re.sub(r"vllm:\w+", "", rule["expr"]) for file in files for rule in _rules(file)]


def problems() -> list[str]:
    known = exported()
    found = [f"rules query {name}, which nothing exports" for name in sorted(unknown_metrics(rule_queries(), known))]
    for name, one in dashboards().items():
        wrong = unknown_metrics(queries(one), known)
        found += [f"dashboard {name} queries {metric}, which nothing exports" for metric in sorted(wrong)]
        file = FOLDER / f"{name}.json"
        if not file.exists() or json.loads(file.read_text()) != one:
            found.append(f"{file.relative_to(ROOT)} is not what generate.py writes: run it")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    if not args.check:
        FOLDER.mkdir(exist_ok=True)
        for name, one in dashboards().items():
            (FOLDER / f"{name}.json").write_text(json.dumps(one, indent=1) + "\n")
    found = problems()
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
