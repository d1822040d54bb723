"""`elsa-serve bench run`: one scenario against one endpoint."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from elsa_load import scenario as scenarios
from elsa_load import sweep
from elsa_load.client import Client, Endpoint
from elsa_load.envelope import envelope
from elsa_load.measures import summarise
from elsa_load.processes import Program, elsa_serve_command
from elsa_load.prompts import PromptMaker
from elsa_load.records import Request
from elsa_load.report import run_report
from elsa_load.runner import Run, run
from elsa_load.scenario import Scenario
from elsa_load.watch import Watch
from elsa_serve.envs import api_keys
from elsa_serve.errors import UsageError


def start(args: argparse.Namespace) -> int:
    """Run the scenario; returns 1 where requests failed that the scenario did not cancel or expect to be refused."""
    scenario = chosen(args)
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    with ExitStack() as stack:
        program = None
        if args.serve is not None:
            log = args.output / "server.log"
            program = stack.enter_context(Program(elsa_serve_command(args.serve, flags_of(args.set)), log))
        elif args.url is None:
            raise UsageError("say where to send requests: --url http://127.0.0.1:8000, or --serve MODEL_DIR")
        elif scenario.restart_at_s:
            raise UsageError(f"scenario {scenario.name} restarts the server, so it needs --serve MODEL_DIR, not --url")
        url = program.url if program else args.url
        keys = api_keys()
        endpoint = Endpoint(url, args.model, keys[0] if keys else None)
        for folder, point in points(args, scenario):
            result = sweep.known(folder, point, args) if folder != args.output else None
            if result is None:
                result = asyncio.run(measure(args, point, folder, endpoint, program))
                write(folder, result)
            results.append(result)
    if len(results) > 1:
        print(sweep.write(args.output, results))
    print(f"report: {args.output / 'report.html'}")
    outcomes = [result["summary"]["outcomes"] for result in results]
    return 1 if any(one["error"] or one["timeout"] for one in outcomes) else 0


def points(args: argparse.Namespace, scenario: Scenario) -> list[tuple[Path, Scenario]]:
    """What is run, and the folder of its results: the scenario, or it once for each of several concurrencies."""
    if args.concurrency is None or len(args.concurrency) == 1:
        return [(args.output, scenario)]
    return [(args.output / f"concurrency-{count}", sweep.point(scenario, count)) for count in args.concurrency]


def write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "run.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "report.html").write_text(run_report(result))
    print(text(result))


def text(result: dict[str, Any]) -> str:
    """The figures as lines: latencies in seconds, then everything else."""
    summary = result["summary"]
    latencies = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
    columns = ("mean", "p50", "p90", "p95", "p99", "p99.9", "max")
    lines = ["          " + "".join(f"{column:>10}" for column in columns)]
    for name in latencies:
        if summary[name]:
            lines.append(f"{name:<10}" + "".join(f"{summary[name][column]:>10.4f}" for column in columns))
    watch = {key: value for key, value in result["watch"].items() if key != "lives"}
    rest = {key: value for key, value in summary.items() if key not in latencies} | {"watch": watch}
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in rest.items() if value is not None)])


def chosen(args: argparse.Namespace) -> Scenario:
    scenario = scenarios.load(args.scenario)
    data = {name: getattr(args, name) for name in ("requests", "seed") if getattr(args, name) is not None}
    if args.restart_at is not None:
        data["restart_at_s"] = tuple(args.restart_at)
    if args.concurrency is not None:
        data["arrivals"] = scenarios.Arrivals(concurrency=args.concurrency[0])
    elif args.rate is not None:
        data["arrivals"] = scenarios.changed(scenario.arrivals, rate=args.rate)
    return scenarios.changed(scenario, **data).scaled(args.scale)


def flags_of(settings: list[str]) -> list[str]:
    """KEY=VALUE and bare KEY, comma-separated, as flags. Raises UsageError.

    A key may have parts, as vLLM's flags of whole objects have: compilation-config.mode=0.
    """
    flags = []
    for item in (item for text in settings for item in text.split(",") if item):
        key, separator, value = item.partition("=")
        if not re.sub("[-_.]", "", key).isalnum():
            raise UsageError(f"{item!r} is not KEY=VALUE with the name of a flag of `elsa-serve serve`")
        flags += [f"--{key}", value] if separator else [f"--{key}"]
    return flags


@contextlib.contextmanager
def encoder(client: Client, directory: Path | None) -> Iterator[Callable[[str], list[int]]]:
    """The tokenizer of a directory, or the endpoint's own. Blocking, so for preparations only."""
    if directory is not None:
        yield scenarios.tokenizer_of(directory)
        return
    endpoint = client.endpoint
    with httpx.Client(base_url=endpoint.url, headers=endpoint.headers(), timeout=120, trust_env=False) as http:

        def encode(text: str) -> list[int]:
            body = {"model": client.model, "prompt": text, "add_special_tokens": False}
            answer = http.post("/tokenize", json=body)
            if answer.status_code != 200:
                where = f"{endpoint.url}/tokenize answered {answer.status_code}"
                raise UsageError(f"{where}: give the model's tokenizer with --tokenizer DIR")
            return answer.json()["tokens"]

        yield encode


async def measure(
    args: argparse.Namespace, scenario: Scenario, folder: Path, endpoint: Endpoint, program: Program | None
) -> Any:
    """Run one scenario; its requests are saved in `folder`."""
    settings = {"counting": args.counting, "scale": args.scale, "url": endpoint.url}
    async with Client(
        endpoint, counting=args.counting, timeout_s=args.timeout, patience_s=scenario.patience_s
    ) as client:
        requests = planned(args, scenario, client)
        scenarios.save(requests, folder / "requests.jsonl")
        concurrency = scenario.arrivals.concurrency if scenario.arrivals.kind == "closed" else None
        async with watching(client) as watch, restarting(program, scenario):
            done = await run(client, requests, concurrency=concurrency, progress=not args.quiet)
    return as_data(scenario, requests, done, settings) | {"watch": watch.summary()}


def planned(args: argparse.Namespace, scenario: Scenario, client: Client) -> list[Request]:
    if args.replay is not None:
        return scenarios.replay(args.replay)
    with encoder(client, args.tokenizer) as encode:
        return scenarios.plan(scenario, PromptMaker(encode), progress=not args.quiet)


def as_data(scenario: Scenario, requests: list[Request], done: Run, settings: dict[str, Any]) -> dict[str, Any]:
    times = [request.at_s for request in requests if request.at_s is not None]
    offered = len(times) / max(times) if times and max(times) > 0 else None
    summary = summarise(done.observations, done.wall_s, scenario.objective, offered)
    rows = [seen.as_dict() for seen in done.observations]
    return envelope() | {
        "settings": settings,
        "scenario": asdict(scenario),
        "summary": summary,
        "observations": rows,
    }


@contextlib.asynccontextmanager
async def watching(client: Client) -> AsyncIterator[Watch]:
    watch = Watch(client)
    task = asyncio.ensure_future(watch.run())
    try:
        yield watch
    finally:
        await ended(task)


@contextlib.asynccontextmanager
async def restarting(program: Program | None, scenario: Scenario) -> AsyncIterator[None]:
    """Stops and starts our server at the times of the scenario."""

    async def restart() -> None:
        now = 0.0
        for at in scenario.restart_at_s if program is not None else ():
            await asyncio.sleep(at - now)
            now = at
            assert program is not None
            await asyncio.to_thread(program.restart)

    task = asyncio.ensure_future(restart())
    try:
        yield
    finally:
        await ended(task)


async def ended(task: asyncio.Future[None]) -> None:
    """Cancel a task and wait for its end; a failure of its own is raised."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
