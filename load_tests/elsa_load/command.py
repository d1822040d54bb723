"""The `elsa-serve bench` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from elsa_serve.errors import UsageError

HELP = "measure a server under load, or what one configuration gains over another"
EPILOG = """\
examples:
  elsa-serve bench gain ./llama-13b --context 32768 65536 --set dtype=float32,gpu-memory=24GiB
      sdpa against elsa on the offload engine: starts both sides, interleaves them, prints gain ± interval
  elsa-serve bench gain ./llama-13b --engine vllm --context 32768 --set gpu-memory-utilization=0.45,dtype=float16
      FLASH_ATTN against elsa in two vLLM servers
  elsa-serve bench ab --context 32768 \\
      --baseline "vllm serve M --attention-backend FLASH_ATTN --port {port}" \\
      --candidate "vllm serve M --attention-backend elsa --port {port}"
  elsa-serve bench run long-context-mix --url http://127.0.0.1:8000
  elsa-serve bench run soak --serve ./configs/demo_model
  elsa-serve bench list

An API key comes from ELSA_API_KEY. The extra packages: pip install 'elsa-serve[bench]'
"""


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help=HELP, description=HELP, epilog=EPILOG)
    commands = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_gain(commands)
    _add_ab(commands)
    _add_run(commands)
    listing = commands.add_parser("list", help="the scenarios that come with the package")
    listing.set_defaults(run=list_scenarios)
    replay = commands.add_parser("replay", help="let a Prometheus here compute the gains of a run that had none")
    replay.add_argument("output", type=Path, metavar="DIR", help="the run's --output")
    replay.set_defaults(run=_replay)
    report = commands.add_parser("report", help="write the HTML report of a results file again")
    report.add_argument("results", type=Path, metavar="FILE", help="a gain.json")
    report.set_defaults(run=_report)


def _add_gain(commands: Any) -> None:
    about = "two configurations of one engine on one model: another attention against ELSA, unless told otherwise"
    parser = commands.add_parser("gain", help=about, description=about)
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="checkpoint to serve on both sides")
    parser.add_argument(
        "--engine",
        choices=("offload", "vllm"),
        default="offload",
        help="whose attention: the offload engine's, or vLLM's (default: offload)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        metavar="FILE",
        help="interpreter that has vLLM and elsa-serve installed (default: this one)",
    )
    parser.add_argument(
        "--baseline",
        metavar="KEY=VALUE,…",
        help="flags of the baseline alone (default: attention=sdpa; with vLLM attention-backend=FLASH_ATTN)",
    )
    parser.add_argument(
        "--candidate",
        metavar="KEY=VALUE,…",
        help="flags of the candidate alone (default: attention=elsa; with vLLM attention-backend=elsa)",
    )
    _add_set(parser)
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="no servers: engines of this process, one at a time, that share one copy of the weights",
    )
    parser.add_argument("--model", help=argparse.SUPPRESS)
    _add_cells(parser)
    parser.set_defaults(run=_gain)


def _add_ab(commands: Any) -> None:
    about = "any two OpenAI-compatible endpoints"
    parser = commands.add_parser("ab", help=about, description=about)
    for side in ("baseline", "candidate"):
        parser.add_argument(
            f"--{side}", required=True, metavar="URL|COMMAND", help="a URL, or a command with {port} to start a server"
        )
    parser.add_argument("--model", help="model to ask for (default: the first that an endpoint lists)")
    parser.add_argument("--engine", default="endpoint", help="name of the engine in the results (default: endpoint)")
    parser.add_argument("--dtype", help="precision in the results (default: what the servers' metrics say)")
    _add_cells(parser)
    parser.set_defaults(run=_ab)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help="flags of `elsa-serve serve`, such as dtype=float32,gpu-memory=24GiB; repeatable",
    )


def _add_cells(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--context", type=positive, nargs="+", default=[32768], metavar="TOKENS", help="of the prompts (default: 32768)"
    )
    add("--output-tokens", type=positive, default=16, metavar="N", help="tokens to generate (default: 16)")
    add("--pairs", type=positive, default=8, metavar="N", help="prompts a context, each on both sides (default: 8)")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="begin no further pair of a context after this long (default: all of --pairs)",
    )
    add(
        "--rounds",
        type=positive,
        default=1,
        metavar="N",
        help="starts of both servers, each with its pairs; from 2 on intervals are those of the rounds (default: 1)",
    )
    add("--warm-up", type=int, default=1, metavar="N", help="prompts a context before the clock runs (default: 1)")
    add("--rest", type=float, default=0.2, metavar="S", help="idle before every request (default: 0.2)")
    add("--seed", type=int, default=1, help="of the prompts (default: 1)")
    add("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--no-prometheus", action="store_true", help="do not run a Prometheus server beside")
    add("--scrape-interval", type=float, default=1.0, metavar="SECONDS", help="of that Prometheus (default: 1)")
    _add_client(parser)
    add(
        "--output",
        type=Path,
        default=Path("gain"),
        metavar="DIR",
        help="results, report, logs (default: gain)",
    )


def _add_run(commands: Any) -> None:
    about = "one scenario against one endpoint"
    parser = commands.add_parser("run", help=about, description=about)
    add = parser.add_argument
    add("scenario", help="a name from `bench list`, or a YAML file")
    add("--url", help="endpoint, without /v1")
    add("--serve", type=Path, metavar="MODEL_DIR", help="start `elsa-serve serve` with this model instead")
    _add_set(parser)
    add("--model", help="model to ask for (default: the first that the endpoint lists)")
    add("--requests", type=positive, metavar="N", help="how many (default: the scenario's)")
    add("--seed", type=int, help="(default: the scenario's)")
    add(
        "--concurrency",
        type=positive,
        nargs="+",
        metavar="N",
        help="closed, with so many clients, whatever the scenario says; several: one after the other, with a report",
    )
    add("--rate", type=float, metavar="PER_SECOND", help="instead of the scenario's")
    add("--scale", type=float, default=1.0, metavar="FACTOR", help="prompt lengths, such as 0.0625 (default: 1)")
    add("--replay", type=Path, metavar="FILE", help="requests.jsonl of an earlier run, instead of making prompts")
    add(
        "--restart-at",
        type=float,
        nargs="+",
        metavar="SECONDS",
        help="stop and start the server at these times; with --serve (default: the scenario's)",
    )
    add("--timeout", type=float, metavar="SECONDS", help="longest silence of a stream (default: none)")
    _add_client(parser)
    add("--output", type=Path, default=Path("run"), metavar="DIR", help="results, report, requests (default: run)")
    parser.set_defaults(run=_run)


def _add_client(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="(default: the endpoint's own /tokenize)")
    parser.add_argument(
        "--counting",
        choices=("usage", "logprobs", "continuous"),
        default="usage",
        help="how tokens of a chunk are known: final usage, log-probabilities, vLLM's running usage (default: usage)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def list_scenarios(args: argparse.Namespace) -> int:
    from elsa_load import scenario

    for name in scenario.names():
        print(f"{name:<20} {scenario.load(name).about}")
    return 0


def _needs_httpx() -> None:
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the benchmark needs its extra packages: pip install 'elsa-serve[bench]' ({error})"
        ) from error


def _gain(args: argparse.Namespace) -> int:
    _needs_httpx()
    from elsa_load.bench_gain import gain

    return gain(args)


def _ab(args: argparse.Namespace) -> int:
    _needs_httpx()
    from elsa_load.bench_gain import ab

    return ab(args)


def _run(args: argparse.Namespace) -> int:
    _needs_httpx()
    from elsa_load.bench_run import start

    return start(args)


def _replay(args: argparse.Namespace) -> int:
    _needs_httpx()
    from elsa_load.bench_gain import replay

    return replay(args)


def _report(args: argparse.Namespace) -> int:
    from elsa_load.bench_gain import report

    return report(args)
