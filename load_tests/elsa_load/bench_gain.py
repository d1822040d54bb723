"""`elsa-serve bench gain` and `bench ab`: two systems, interleaved, and what one gains over the other."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from elsa_load import prometheus, scrapes
from elsa_load.ab import SIDES, Cell, HttpSide, Results, Side, Watcher, order, run_cell, run_cells, table
from elsa_load.bench_run import encoder, flags_of
from elsa_load.client import Client, Endpoint
from elsa_load.envelope import envelope
from elsa_load.in_process import engine_sides
from elsa_load.processes import Program, elsa_serve_command, split_command, stop_all
from elsa_load.prometheus import Prometheus
from elsa_load.prompts import PromptMaker
from elsa_load.report import gain_report
from elsa_load.scrapes import Recorder
from elsa_serve.envs import api_keys
from elsa_serve.errors import UsageError

DEFAULTS = {  # what is compared, unless told otherwise
    "offload": ("attention=sdpa", "attention=elsa"),
    "vllm": ("attention-backend=FLASH_ATTN", "attention-backend=elsa"),
}
VLLM_BUDGETS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
OWN = ("settings", "paper", "rows", "cells")  # keys of a results file that `Results` writes itself


def gain(args: argparse.Namespace) -> int:
    """Two configurations of one engine on one model."""
    for side, default in zip(SIDES, DEFAULTS[args.engine]):
        if getattr(args, side) is None:
            setattr(args, side, default)
    flags = {side: flags_of([*args.set, getattr(args, side)]) for side in SIDES}
    context = max(args.context) + args.output_tokens + 1
    if args.engine == "vllm":
        return gain_on_vllm(args, flags, context)
    # Every prompt comes to each side once; a kept prefix would only hide the prefill that is measured.
    fixed = ["--context", str(context), "--max-batch", "1"]
    flags = {side: ["--no-prefix-caching", *one, *fixed] for side, one in flags.items()}
    if args.in_process:
        if args.rounds > 1:
            raise UsageError("--in-process has no servers to start anew: leave --rounds away")
        return in_process(args, flags)
    if not all("--gpu-memory" in one for one in flags.values()):
        # The default budget is most of what is free, so the second server would get the rest of the first.
        raise UsageError("two servers share this machine: give both the same budget with --set gpu-memory=24GiB")
    commands = {side: elsa_serve_command(args.model_dir, flags[side]) for side in SIDES}
    return compare(args, commands, {}, {"engine": "elsa-offload", "dtype": None, "baseline": args.baseline})


def gain_on_vllm(args: argparse.Namespace, flags: dict[str, list[str]], context: int) -> int:
    """Two vLLM servers that differ in their attention backend. Every flag of --set is vLLM's own."""
    if args.in_process:
        raise UsageError("--in-process is the offload engine's: with --engine vllm both sides are servers")
    if not all(any(word.partition("=")[0] in VLLM_BUDGETS for word in one) for one in flags.values()):
        raise UsageError(
            "two servers share this machine, and vLLM takes nearly all of a GPU unless told otherwise: "
            "give both a share with --set gpu-memory-utilization=0.4 (on a CPU: --set kv-cache-memory-bytes=1G)"
        )
    fixed = ["--max-model-len", str(context), "--no-enable-prefix-caching"]
    commands = {
        side: elsa_serve_command(args.model_dir, ["--engine", "vllm", *one, *fixed], args.python)
        for side, one in flags.items()
    }
    dtypes = {one[one.index("--dtype") + 1] for one in flags.values() if "--dtype" in one}
    labels = {"engine": "vllm", "dtype": " / ".join(sorted(dtypes)) or "auto", "baseline": args.baseline}
    return compare(args, commands, {}, labels, together=all(map(kv_is_stated, flags.values())))


def kv_is_stated(flags: Sequence[str]) -> bool:
    """Whether a vLLM server is told how much KV it gets, and measures no memory that another takes meanwhile."""
    return any(word.partition("=")[0] == "--kv-cache-memory-bytes" for word in flags)


def ab(args: argparse.Namespace) -> int:
    """Any two endpoints: a side is a URL, or a command with {port} that starts a server."""
    urls = {side: text for side in SIDES if (text := getattr(args, side)).startswith(("http://", "https://"))}
    commands = {side: split_command(getattr(args, side)) for side in SIDES if side not in urls}
    for side, command in commands.items():
        if not any("{port}" in part for part in command):
            raise UsageError(f"--{side} is neither a URL nor a command with {{port}}: {getattr(args, side)}")
    return compare(args, commands, urls, {"engine": args.engine, "dtype": args.dtype, "baseline": args.baseline})


def compare(
    args: argparse.Namespace,
    commands: dict[str, list[str]],
    urls: dict[str, str],
    labels: dict[str, Any],
    together: bool = False,
) -> int:
    """`together`: the servers start at the same time; else one after the other, as each plans with what is free."""
    if args.rounds > 1 and len(commands) < len(SIDES):
        raise UsageError("--rounds starts both sides anew, so both must be commands that start a server, and no URLs")
    results = opened(args)
    with ExitStack() as stack:
        programs = {side: Program(command, args.output / f"{side}.log") for side, command in commands.items()}
        stack.callback(stop_all, programs.values())
        for program in programs.values():
            program.start()
            if not together:
                program.wait_ready()
        if together:
            for program in programs.values():
                program.wait_ready()
        urls |= {side: program.url for side, program in programs.items()}
        watcher = stack.enter_context(watched(args, urls))
        for number in range(args.rounds):
            if all(map(results.done, cells_of(args, number))):
                continue
            if number:
                restart(programs, order(number))
            asyncio.run(over_http(args, urls, results, watcher, labels, number))
    return finish(args, results)


def restart(programs: Mapping[str, Program], sides: Sequence[str]) -> None:
    """New processes on the same ports, the first of `sides` first; both old ones are gone before."""
    stop_all(programs[side] for side in sides)
    for side in sides:
        programs[side].start()
        programs[side].wait_ready()


async def over_http(
    args: argparse.Namespace,
    urls: dict[str, str],
    results: Results,
    watcher: Watcher | None,
    labels: dict[str, Any],
    number: int,
) -> None:
    keys = api_keys()
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for side in SIDES:
            endpoint = Endpoint(urls[side].rstrip("/"), args.model, keys[0] if keys else None)
            clients[side] = await stack.enter_async_context(Client(endpoint, counting=args.counting, timeout_s=None))
        maker = PromptMaker(stack.enter_context(encoder(clients["baseline"], args.tokenizer)))
        sides: dict[str, Side] = {side: HttpSide(client) for side, client in clients.items()}
        await measured(args, sides, maker, results, watcher, labels, number)


def in_process(args: argparse.Namespace, flags: dict[str, list[str]]) -> int:
    from elsa_serve.arguments import add_engine_arguments, add_memory_arguments, add_model_arguments, engine_options
    from elsa_serve.offload.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(prog="elsa-serve serve", allow_abbrev=False)
    for add in (add_model_arguments, add_memory_arguments, add_engine_arguments):
        add(parser)
    options = {side: engine_options(parser.parse_args([str(args.model_dir), *flags[side]])) for side in SIDES}
    for key in ("dtype", "device", "load_format", "linear"):
        if options["baseline"][key] != options["candidate"][key]:
            raise UsageError(f"--in-process shares the weights, so both sides need the same {key.replace('_', '-')}")
    dummy = options["baseline"]["load_format"] == "dummy"
    tokenizer = load_tokenizer(args.tokenizer or args.model_dir, 256, dummy=dummy)
    maker = PromptMaker(lambda text: tokenizer.encode(text, add_special_tokens=False))
    results = opened(args)
    labels = {"engine": "elsa-offload", "dtype": None, "baseline": args.baseline}
    with ExitStack() as stack:
        engines = stack.enter_context(engine_sides(args.model_dir, options))
        watcher = stack.enter_context(watched(args, {side: one.url for side, one in engines.items()}))
        asyncio.run(measured(args, dict(engines), maker, results, watcher, labels))
    return finish(args, results)


async def measured(
    args: argparse.Namespace,
    sides: Mapping[str, Side],
    maker: PromptMaker,
    results: Results,
    watcher: Watcher | None,
    labels: dict[str, Any],
    number: int = 0,
) -> None:
    def labelled(one: dict[str, Any]) -> dict[str, Any]:
        """Where the servers tell their precision, it is theirs."""
        found = {one["config"][side].get("dtype") for side in SIDES} - {None}
        dtype = labels["dtype"] or " / ".join(sorted(found)) or None
        return labels | {"dtype": dtype, "candidate": args.candidate}

    def measure(cell: Cell) -> Any:
        def keep(part: dict[str, Any]) -> None:
            results.keep(part, labelled)

        return run_cell(cell, sides, maker, prometheus=watcher, progress=not args.quiet, keep=keep)

    await run_cells(cells_of(args, number), results, measure, labelled)


def cells_of(args: argparse.Namespace, number: int) -> list[Cell]:
    """What one round measures."""
    fixed = (args.output_tokens, args.pairs, args.seed, args.warm_up, number, args.seconds, args.rest)
    return [Cell(context, *fixed) for context in args.context]


@contextmanager
def watched(args: argparse.Namespace, urls: dict[str, str]) -> Iterator[Watcher | None]:
    """A Prometheus over both sides; where it is not installed, a recorder for one elsewhere; none where not wanted."""
    if args.no_prometheus:
        print("gains are the client's alone: --no-prometheus")
        yield None
        return
    reason = prometheus.missing()
    if reason is not None:
        print(f"gains are the client's alone: {reason}; `elsa-serve bench replay {args.output}` adds its own elsewhere")
        with Recorder(urls, args.output / scrapes.FILE, args.scrape_interval) as recorder:
            yield recorder
        return
    keys = api_keys()
    folder: Path = args.output / "prometheus"
    with Prometheus(
        urls, folder, interval_s=args.scrape_interval, api_keys=dict.fromkeys(SIDES, keys[0] if keys else None)
    ) as watcher:
        yield watcher


def replay(args: argparse.Namespace) -> int:
    """Let a real Prometheus compute the gains of a run that had none, from the scrapes that it kept."""
    file = args.output / "gain.json"
    try:
        known = json.loads(file.read_text())
        results = Results(file, {key: value for key, value in known.items() if key not in OWN}, known["settings"])
        results.cells = known["cells"]  # those that were cut off, too
        windows = [cell["window"] for cell in results.cells]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{file} is no results file of an A/B: {error!r}") from error
    with scrapes.replayed(args.output / scrapes.FILE, SIDES, args.output / "prometheus") as watcher:
        for cell, (start, end) in zip(results.cells, windows):
            seen = {phase: watcher.seconds(phase, start, end, len(cell["pairs"])) for phase in prometheus.PHASES}
            cell["prometheus"] = {phase: {"seconds": spent, "reason": why} for phase, (spent, why) in seen.items()}
    results.save()
    return finish(args, results)


def opened(args: argparse.Namespace) -> Results:
    names = (
        "baseline",
        "candidate",
        "set",
        "output_tokens",
        "pairs",
        "seed",
        "warm_up",
        "seconds",
        "rest",
        "confidence",
        "counting",
    )
    settings = {name: getattr(args, name, None) for name in names} | {"in_process": getattr(args, "in_process", False)}
    settings["counting"] = args.counting
    settings["model"] = str(getattr(args, "model_dir", None) or args.model)
    return Results(args.output / "gain.json", envelope(), settings)


def finish(args: argparse.Namespace, results: Results) -> int:
    report = args.output / "report.html"
    report.write_text(gain_report(results.as_dict()))
    print(table(results.rows))
    print(f"results: {results.file}\nreport:  {report}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the HTML of a results file again."""
    try:
        data = json.loads(args.results.read_text())
        html = gain_report(data)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{args.results} is no results file of an A/B: {error!r}") from error
    target = args.results.with_suffix(".html")
    target.write_text(html)
    print(target)
    return 0
