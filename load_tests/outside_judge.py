"""The same requests driven by an outside tool, aiperf, and by our client, turn about, against one server.

python -m load_tests.outside_judge --aiperf ../venv/bin/aiperf --output load_tests/results/outside-judge-cpu.json

aiperf (PyPI, NVIDIA) lives in a virtual environment of its own. It replays the request bodies that our scenario makes,
with as many clients. Both tools run in turn against one server with the embedded model, in the order A B · B A, and
each figure of ours stands beside aiperf's. Where the two should agree by their definitions, `same_definition` is true.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elsa_load import scenario as scenarios
from elsa_load.client import Client, Endpoint
from elsa_load.measures import summarise
from elsa_load.processes import Program, elsa_serve_command
from elsa_load.prompts import PromptMaker
from elsa_load.records import Request
from elsa_load.runner import run

from elsa_serve.errors import ElsaError
from kernels.bench import results_file

MODEL = Path(__file__).parents[1] / "configs" / "demo_model"
PERCENTILES = ("avg", "p50", "p90", "p95", "p99", "max")
OURS = {"avg": "mean"}  # our names where they differ
# aiperf's metric, its unit in seconds (or requests, tokens), ours, and whether both mean the same
METRICS: tuple[tuple[str, float, str, bool], ...] = (
    ("time_to_first_token", 1e-3, "ttft_s", True),
    ("request_latency", 1e-3, "e2e_s", True),
    # aiperf: a request's decode time over its tokens less one, then the distribution over requests: our TPOT
    ("inter_token_latency", 1e-3, "tpot_s", True),
    # aiperf: between two chunks; ours: between two tokens, which is the same where each chunk brings one
    ("inter_chunk_latency", 1e-3, "itl_s", True),
    ("request_throughput", 1.0, "finished_per_s", True),
    ("output_token_throughput", 1.0, "output_tokens_per_s", True),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.aiperf.exists():
        raise SystemExit(f"{args.aiperf} is missing: python -m venv venv && venv/bin/pip install aiperf")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = elsa_serve_command(args.model, [f"--gpu-memory={args.gpu_memory}", f"--context={args.context}"])
        with Program(command, folder / "server.log") as server:
            requests = planned(args)
            measure(args, server.url, requests[: args.concurrency], "ours", folder)  # warm-up
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "aiperf": []}
            for number in range(args.rounds):
                for tool in ("ours", "aiperf") if number % 2 == 0 else ("aiperf", "ours"):
                    runs[tool].append(measure(args, server.url, requests, tool, folder))
    rows = compared(args, runs, requests)
    results_file.write(args.output, rows)
    for row in rows:
        print(f"{row['metric']:<22} {row['statistic']:<4} {row['ours']:>10.4f} {row['aiperf']:>10.4f}", end=" ")
        print(f"{row['difference_percent']:+.2f} %")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--aiperf", type=Path, required=True, help="the aiperf program, in an environment of its own")
    add("--model", type=Path, default=MODEL, help="checkpoint to serve (default: the embedded model)")
    add("--scenario", default="closed", help="whose requests are sent, as chats (default: closed)")
    add("--requests", type=int, default=40, help="a run (default: 40)")
    add("--concurrency", type=int, default=2, help="clients (default: 2)")
    add("--scale", type=float, default=0.25, help="of the scenario's prompt lengths (default: 0.25)")
    add("--rounds", type=int, default=4, help="runs of each tool (default: 4)")
    add("--gpu-memory", default="512MiB", help="of the server (default: 512MiB)")
    add("--context", type=int, default=8192, help="of the server (default: 8192)")
    add("--output", type=Path, required=True, help="results file")
    return parser


def planned(args: argparse.Namespace) -> list[Request]:
    scenario = scenarios.changed(scenarios.load(args.scenario), requests=args.requests, form="chat")
    return scenarios.plan(scenario.scaled(args.scale), PromptMaker(scenarios.tokenizer_of(args.model)))


def measure(
    args: argparse.Namespace, url: str, requests: list[Request], tool: str, folder: Path
) -> dict[str, dict[str, float]]:
    """A run of one tool: metric (by our name) -> statistic -> value."""
    return asyncio.run(ours(url, requests, args.concurrency)) if tool == "ours" else aiperf(args, url, requests, folder)


async def ours(url: str, requests: list[Request], concurrency: int) -> dict[str, dict[str, float]]:
    async with Client(Endpoint(url)) as client:
        done = await run(client, requests, concurrency=concurrency)
    failed = [seen.error for seen in done.observations if seen.outcome != "ok"]
    if failed:
        raise ElsaError(f"{len(failed)} requests failed, the first with {failed[0]}")
    figures = summarise(done.observations, done.wall_s)
    found: dict[str, dict[str, float]] = {}
    for _, _, name, _ in METRICS:
        value = figures[name]
        found[name] = {s: value[OURS.get(s, s)] for s in PERCENTILES} if isinstance(value, dict) else {"avg": value}
    return found


def aiperf(args: argparse.Namespace, url: str, requests: list[Request], folder: Path) -> dict[str, dict[str, float]]:
    """aiperf over the very bodies that our client sends."""
    bodies, artifacts = folder / "bodies.jsonl", folder / "aiperf"
    name = args.model.resolve().name
    bodies.write_text("".join(json.dumps(request.body(name)) + "\n" for request in requests))
    command = [args.aiperf, "profile", "--model", name, "--url", url, "--endpoint-type", "chat", "--streaming"]
    command += ["--input-file", bodies, "--custom-dataset-type", "raw-payload", "--dataset-sampling-strategy"]
    command += ["sequential", "--tokenizer", args.model.resolve(), "--use-server-token-count"]
    command += ["--concurrency", args.concurrency, "--request-count", len(requests), "--artifact-dir", artifacts]
    command += ["--ui", "none", "--no-server-metrics", "--no-gpu-telemetry"]
    # Offline, aiperf takes a folder's name for one of the hub; and it must not import our packages.
    hidden = ("HF_HUB_OFFLINE", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    summary = artifacts / "profile_export_aiperf.json"
    if done.returncode or not summary.exists():
        raise ElsaError(f"aiperf failed with status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    document = json.loads(summary.read_text())
    summary.unlink()
    found: dict[str, dict[str, float]] = {}
    for metric, unit, mine, _ in METRICS:
        if metric in document:
            found[mine] = {s: document[metric][s] * unit for s in PERCENTILES if document[metric].get(s) is not None}
    return found


def compared(
    args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], requests: list[Request]
) -> list[dict[str, Any]]:
    """A row a metric and statistic: the mean over the runs of each tool, their difference and their spread."""
    about = {
        "scenario": args.scenario,
        "requests": len(requests),
        "concurrency": args.concurrency,
        "prompt_tokens": requests[0].prompt_tokens,
        "output_tokens": requests[0].max_tokens,
        "runs": args.rounds,
    }
    rows = []
    for metric, _, name, same in METRICS:
        for statistic in PERCENTILES:
            values = {tool: [one[name][statistic] for one in found if statistic in one.get(name, {})] for tool, found in
                      runs.items()}  # fmt: skip
            if not values["ours"] or not values["aiperf"]:
                continue
            mine, theirs = statistics.mean(values["ours"]), statistics.mean(values["aiperf"])
            rows.append(
                about
                | {
                    "metric": name,
                    "aiperf_metric": metric,
                    "statistic": statistic,
                    "same_definition": same,
                    "ours": mine,
                    "aiperf": theirs,
                    "difference_percent": 100 * (mine / theirs - 1),
                    "ours_each": values["ours"],
                    "aiperf_each": values["aiperf"],
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
