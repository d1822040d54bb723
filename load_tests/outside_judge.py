"""The same requests driven by an outside tool, aiperf, and by our client, turn about, against one server.

python -m load_tests.outside_judge --aiperf ../venv/bin/aiperf --output load_tests/results/outside-judge-cpu.json

aiperf (PyPI, NVIDIA) lives in a virtual environment of its own. It replays the request bodies that our scenario makes,
with as many clients. Both tools run in turn, in the order A B · B A, against the embedded model, and then against a
server of fixed times, which owes nothing to the processor: on a machine where client and server share few cores, a
tool's own processes slow the model down, and the second comparison shows the tools without that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
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

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "configs" / "demo_model"
TIMED = ROOT / "tests" / "load" / "timed_server.py"
PREFILL_S, DECODE_S = 0.0001, 0.01  # of that server: a prompt token, a generated token
PERCENTILES = ("avg", "p50", "p90", "p95", "p99", "max")
OURS = {"avg": "mean"}  # our names where they differ
# aiperf's metric, its unit in seconds (or requests, tokens), and ours of the same definition
METRICS: tuple[tuple[str, float, str], ...] = (
    ("time_to_first_token", 1e-3, "ttft_s"),
    ("request_latency", 1e-3, "e2e_s"),
    ("inter_token_latency", 1e-3, "tpot_s"),  # a request's decode time over its tokens less one
    ("inter_chunk_latency", 1e-3, "itl_s"),  # between two chunks, each of which brings one token here
    ("request_throughput", 1.0, "finished_per_s"),
    ("output_token_throughput", 1.0, "output_tokens_per_s"),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.aiperf.exists():
        raise SystemExit(f"{args.aiperf} is missing: python -m venv venv && venv/bin/pip install aiperf")
    # Both tools send the same prompts to one server: the second must not find what the first left.
    flags = [f"--gpu-memory={args.gpu_memory}", f"--context={args.context}", "--no-prefix-caching"]
    servers = {
        "embedded model": elsa_serve_command(args.model, flags),
        "fixed times": [sys.executable, str(TIMED), str(PREFILL_S), str(DECODE_S), "{port}:1"],
    }
    requests = planned(args)
    rows: list[dict[str, Any]] = []
    for name, command in servers.items():
        rows += compared(args, name, both(args, command, requests), requests)
        results_file.write(args.output, rows)
    for row in rows:
        print(f"{row['server']:<15} {row['metric']:<20} {row['statistic']:<4} {row['ours']:>10.4f}", end=" ")
        print(f"{row['aiperf']:>10.4f} {row['difference_percent']:+.2f} %")
    return 0


def both(
    args: argparse.Namespace, command: list[str], requests: list[Request]
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """The runs of both tools against one server, started for them."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "aiperf": []}
    with tempfile.TemporaryDirectory() as name, Program(command, Path(name) / "server.log") as server:
        asyncio.run(ours(server.url, requests[: args.concurrency], args.concurrency))  # warm-up
        for number in range(args.rounds):
            for tool in ("ours", "aiperf") if number % 2 == 0 else ("aiperf", "ours"):
                before = processor_s()
                if tool == "ours":
                    found = asyncio.run(ours(server.url, requests, args.concurrency))
                else:
                    found = aiperf(args, server.url, requests, Path(name))
                runs[tool].append(found | {"client_cpu_s": {"avg": processor_s() - before}})
    return runs


def processor_s() -> float:
    """Of this process and of the children that have ended; a server that runs on is not among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


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


async def ours(url: str, requests: list[Request], concurrency: int) -> dict[str, dict[str, float]]:
    async with Client(Endpoint(url)) as client:
        done = await run(client, requests, concurrency=concurrency)
    failed = [seen.error for seen in done.observations if seen.outcome != "ok"]
    if failed:
        raise ElsaError(f"{len(failed)} requests failed, the first with {failed[0]}")
    figures = summarise(done.observations, done.wall_s)
    found: dict[str, dict[str, float]] = {}
    for _, _, name in METRICS:
        value = figures[name]
        found[name] = {s: value[OURS.get(s, s)] for s in PERCENTILES} if isinstance(value, dict) else {"avg": value}
    return found


async def served_name(url: str) -> str:
    async with Client(Endpoint(url)) as client:
        return str(client.model)


def aiperf(args: argparse.Namespace, url: str, requests: list[Request], folder: Path) -> dict[str, dict[str, float]]:
    """aiperf over the very bodies that our client sends."""
    bodies, artifacts = folder / "bodies.jsonl", folder / "aiperf"
    name = asyncio.run(served_name(url))
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
    for metric, unit, mine in METRICS:
        if metric in document:
            found[mine] = {s: document[metric][s] * unit for s in PERCENTILES if document[metric].get(s) is not None}
    return found


def compared(
    args: argparse.Namespace, server: str, runs: dict[str, list[dict[str, Any]]], requests: list[Request]
) -> list[dict[str, Any]]:
    """A row a metric and statistic: the mean over the runs of each tool, their difference, and every run."""
    about = {
        "server": server,
        "scenario": args.scenario,
        "requests": len(requests),
        "concurrency": args.concurrency,
        "prompt_tokens": requests[0].prompt_tokens,
        "output_tokens": requests[0].max_tokens,
        "runs": args.rounds,
    }
    rows = []
    for metric, name in [*((metric, name) for metric, _, name in METRICS), (None, "client_cpu_s")]:
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
