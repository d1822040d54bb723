"""The offload engine at full size with random weights: one long prompt and some tokens, per configuration.

    python -m load_tests.offload_bench --dtype float16 --context 32768 --decode-tokens 8 --gpu-memory 8GiB \\
        --run attention=elsa --run serial=1 --run attention=sdpa --run gpu-memory=24GiB

Every --run changes some of the flags for one configuration; without any, the flags are the one configuration. All runs
of a process share the loaded and page-locked weights. Each run warms up on a shorter prompt first. Prefill is the
median over --prefills prompts, decode that over the passes after the first of them: from the third on where a CUDA
graph replays them, in which the second is captured. `predicted_…` is what the planner said from the `rates` of the row,
all measured before the run's first pass; `live_predicted_…` is what the server's metrics say, where each pass is
predicted by what the ones before it showed of the host. `floor_s` is what this machine allows for the placement: the KV
in host memory, read once a pass by all cores, the weights over PCIe, or both out of one memory, whichever takes the
longest.

The model has LLaMA-13B's geometry with its positions stretched from 4,096 to 131,072 (linear rope scaling by 32).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library

from elsa_serve.errors import ElsaError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload.device import indexed
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.machine import Heads, Rates, host_memory
from elsa_serve.offload.measure import rates
from elsa_serve.offload.plan import HOST_PROCESS
from elsa_serve.offload.split import CHOICES, split_linears
from elsa_serve.offload.weights import ModelWeights, load_model
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Steps, StepStats, Transfer
from kernels.bench import results_file

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
RUN_KEYS = (
    "gpu-memory", "host-memory", "attention", "serial", "resident-layers", "slots", "chunk-tokens",
    "prefill-round-tokens", "context", "decode-tokens", "fused", "graphs", "host-threads", "weights",
)  # fmt: skip
# What tells one configuration from another in the results file; the rest of a row is what it gave.
CONFIGURATION = (
    "system", "model", "layers", "dtype", "attention", "linear", "context", "batch", "serial", "fused", "gpu_cap",
    "asked", "case",
)  # fmt: skip
HEAD = ("commit", "date", "command", "machine", "versions")  # of a file: a row's own where it has none of them
# Recorded where set by hand.
PLANNED = ("graphs", "host_memory", "resident_layers", "slots", "chunk_tokens", "prefill_round_tokens", "host_threads")
WARM_UP_TOKENS = 3
CAPTURED_BY = 2  # decode passes of a request, of which the first is issued and the second captured in a graph
PREFILLS = 3
SLOW_S = 4.0  # a prompt slower than this is timed once
READ_LAYERS = 8  # to find the host's bandwidth


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    runs = [parse_run(args, text) for text in args.run or [""]]
    drawn = [run.weights for run in runs]
    if "vllm" in drawn and (args.linear == "elsa" or "transformers" in drawn[drawn.index("vllm") :]):
        raise SystemExit("runs with weights=vllm come last, and need --linear torch: they change the weights in place")
    rows: list[dict[str, Any]] = []
    if args.measure:
        device = indexed(torch.device(args.device))
        heads = heads_of(json.loads(args.model.read_text()))
        rates(device, DTYPES[args.dtype], attention=args.attention, linear=args.linear, heads=heads, refresh=True)
    with tempfile.TemporaryDirectory() as folder, shared_weights(args, Path(folder)) as (directory, weights, load_s):
        first_tokens: dict[str, list[int]] = {}
        for run in runs:
            if run.weights == "vllm":  # from here on: what transformers drew is not kept
                draw_as_vllm(weights)
            row = measure(args, run, directory, weights, first_tokens)
            row["load_s"] = load_s
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if value is not None}), flush=True)
            if args.output:
                record(args.output, row)
            gc.collect()
    table(rows)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=32768, help="prompt tokens (default: 32768)")
    parser.add_argument("--decode-tokens", type=int, default=8, help="tokens after the first (default: 8)")
    parser.add_argument(
        "--prefills", type=int, default=PREFILLS,
        help=f"prompts timed, one that takes over {SLOW_S:.0f} s once (default: {PREFILLS})",
    )  # fmt: skip
    parser.add_argument("--gpu-memory", default="24GiB", help="device budget, enforced (default: 24GiB)")
    parser.add_argument("--host-memory", help="host budget (default: 90%% of what is free, the weights included)")
    parser.add_argument("--attention", choices=sorted(attentions.ATTEND), default="elsa")
    parser.add_argument("--linear", choices=CHOICES, default="torch", help="float32 linear layers, for all runs")
    parser.add_argument(
        "--weights", choices=("transformers", "vllm"), default="transformers",
        help="whose way to draw random weights: transformers' (normal), or vLLM's dummy loader's, which runs then keep",
    )  # fmt: skip
    parser.add_argument("--serial", type=int, default=0, help="1: the serial twin")
    parser.add_argument("--fused", type=int, default=1, help="0: transformers' own elementwise work on a GPU")
    parser.add_argument("--graphs", type=int, help="0: no CUDA graphs of decode passes")
    parser.add_argument("--resident-layers", type=int, help="layers on the device (default: planned)")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--prefill-round-tokens", type=int, help="of the prompt, in one pass (default: planned)")
    parser.add_argument("--host-threads", type=int, help="for attention over KV in host memory (default: planned)")
    parser.add_argument(
        "--run", action="append", metavar="KEY=VALUE,…", help=f"one configuration; {', '.join(RUN_KEYS)}"
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine's rates again first")
    parser.add_argument("--output", type=Path, help="results file to append the rows to")
    return parser


def parse_run(args: argparse.Namespace, text: str) -> argparse.Namespace:
    """The flags with one --run's changes, parsed like the flags themselves."""
    flags: list[str] = []
    for item in filter(None, text.split(",")):
        key, separator, value = item.partition("=")
        if key not in RUN_KEYS or not separator:
            raise SystemExit(f"--run {text}: {item!r} is not KEY=VALUE with KEY one of {', '.join(RUN_KEYS)}")
        flags += [f"--{key}", value]
    return build_parser().parse_args(flags, argparse.Namespace(**vars(args)))


def heads_of(config: dict[str, Any]) -> Heads:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    return Heads(heads, config.get("num_key_value_heads") or heads, dim)


@contextmanager
def shared_weights(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, ModelWeights, float]]:
    """The model directory, its random weights, and the seconds their drawing and page-locking took."""
    config = json.loads(args.model.read_text())
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    (folder / "config.json").write_text(json.dumps(config))
    attentions.register()
    start = time.perf_counter()
    weights = load_model(
        folder,
        dtype=DTYPES[args.dtype],
        device=args.device,
        load_format="dummy",
        attn_implementation=attentions.NAME,
        progress=sys.stderr.isatty(),
    )
    if args.linear == "elsa":
        split_linears(weights, progress=sys.stderr.isatty())
    try:
        yield folder, weights, time.perf_counter() - start
    finally:
        weights.close()


def draw_as_vllm(weights: ModelWeights) -> None:
    """Every parameter, norms too, uniform in ±1e-3, as vLLM's dummy loader draws them.

    Such numbers' products switch fewer transistors than those of normal weights of the usual size: where power limits
    the GPU's clock, they run faster, so a comparison with vLLM takes the same.
    """
    for flat in weights.store.layers:
        values = torch.empty(flat.numel() // weights.dtype.itemsize, dtype=weights.dtype, device=weights.device)
        flat.view(weights.dtype).copy_(values.uniform_(-1e-3, 1e-3))
    with torch.no_grad():
        for parameter in weights.model.parameters():
            if not parameter.is_meta:
                parameter.uniform_(-1e-3, 1e-3)


def read_bandwidth(weights: ModelWeights) -> float:
    """Bytes per second at which all cores together read host memory: the best of some layers' weights, each read once
    (a second time, much of it would come from the cores' cache), by the native attention's own threads where they are
    to be had, else by torch's."""
    read: Callable[[torch.Tensor], float] = _sum_seconds
    if native.unavailable() is None:
        read = library.Pool(len(os.sched_getaffinity(0))).read_seconds
    layers = [flat[: flat.numel() // 8 * 8].view(torch.int64) for flat in weights.store.layers[:READ_LAYERS]]
    return max(words.nbytes / read(words) for words in layers)


def _sum_seconds(words: torch.Tensor) -> float:
    start = time.perf_counter()
    words.sum()
    return time.perf_counter() - start


def floor_seconds(
    streamed: int, kv_on_host: int, bandwidth: float, rates: Rates, copied: float = 0.0, attended: float = 0.0
) -> float:
    """No pass is shorter than any of three: the streamed weights over PCIe, the KV in host memory read by all cores,
    each as if alone, and both out of the same memory at what it gives the two at once, which is more than to either.

    Bytes and bytes per second, of which the best seen count: `bandwidth` of all cores, the machine's rates, and in the
    run itself those of its copies and of its attention on the host.
    """
    copying, reading = max(rates.h2d, copied), max(bandwidth, rates.cpu_attention, attended)
    both = max(rates.h2d_beside_cpu_attention + rates.cpu_attention_beside_h2d, copied + attended, copying, reading)
    return max(kv_on_host / reading, streamed / copying, (streamed + kv_on_host) / both)


def measure(
    args: argparse.Namespace,
    run: argparse.Namespace,
    directory: Path,
    weights: ModelWeights,
    first_tokens: dict[str, list[int]],
) -> dict[str, Any]:
    """One configuration's row. A refusal or a failure becomes the row's `error`."""
    row = base_row(args, run, weights)
    steps = Steps()
    bandwidth = read_bandwidth(weights)
    reset_host_peak()
    try:
        engine = make_engine(run, directory, weights, steps)
    except (ElsaError, torch.cuda.OutOfMemoryError) as refusal:
        return row | {"error": f"{type(refusal).__name__}: {refusal}"}
    try:
        plan = engine.plan
        vocabulary = engine.info.vocab_size
        warm = min(run.context, 2 * plan.chunk_tokens + 1)
        generate(engine, prompt_of(warm, vocabulary), WARM_UP_TOKENS)
        steps.passes.clear()
        prompt = prompt_of(run.context, vocabulary)
        tokens, error = generate(engine, prompt, 1 + run.decode_tokens)
        timed = timings(steps.passes, CAPTURED_BY if plan.graphs else 0)
        prefills = [timed["prefill_s"]]
        while error is None and len(prefills) < run.prefills and prefills[-1] < SLOW_S:
            steps.passes.clear()
            _, error = generate(engine, prompt, 1)
            prefills.append(timings(steps.passes)["prefill_s"])
        memory, huge = engine.memory(), huge_pages()
    finally:
        engine.shutdown()
    if error is not None:
        return row | {"error": error}
    same = first_tokens.setdefault(f"{run.attention} {run.context} {run.weights}", tokens)
    compared = min(len(same), len(tokens))
    streamed = weights.store.nbytes * plan.streamed_layers // plan.geometry.layers
    kv_on_host = max(0, run.context - plan.kv_gpu_tokens) * plan.geometry.layers * plan.geometry.kv_token_bytes()
    rates, used = plan.rates, host_peak()
    own = timed["decode_h2d_bytes_per_s"] or 0.0, timed.get("host_attention_bytes_per_s") or 0.0
    # The shared weights lie in host memory whole, whatever the placement.
    asked = HOST_PROCESS + weights.store.host_nbytes + plan.kv_host_bytes
    return (
        row
        | {
            "resident_layers": len(plan.resident_layers),
            "slots": plan.slots,
            "chunk_tokens": plan.chunk_tokens,
            "graphs": plan.graphs,
            "kv_gpu_tokens": plan.kv_gpu_tokens,
            "kv_host_bytes": kv_on_host,
            "weights_host_bytes": streamed,
            "gpu_cap_bytes": plan.gpu_budget,
            **timed,
            "prefill_s": statistics.median(prefills),
            "prefills_s": prefills,
            "rates": significant(rates),
            "peak_gpu_bytes": memory.device_used,
            "peak_torch_bytes": memory.peak_reserved,
            "peak_host_bytes": used,
            "asked_host_bytes": asked,
            "host_used_per_asked": used / asked if used else None,
            "huge_page_bytes": huge,
            "floor_s": floor_seconds(streamed, kv_on_host, bandwidth, rates, *own),
            "h2d_bytes_per_s": rates.h2d,
            "cpu_attention_bytes_per_s": [rates.cpu_attention, rates.cpu_attention_beside_h2d],  # alone, beside copies
            "both_bytes_per_s": rates.h2d_beside_cpu_attention + rates.cpu_attention_beside_h2d,
            "host_read_bytes_per_s": bandwidth,
            "tokens_equal": tokens[:compared] == same[:compared],
            "error": None,
        }
    )


def significant(rates: Rates) -> dict[str, Any]:
    """The rates that a row's predictions are from, in four digits."""
    return {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in asdict(rates).items()}


def make_engine(run: argparse.Namespace, directory: Path, weights: ModelWeights, steps: Steps) -> OffloadEngine:
    # The weights are loaded already, so they are no longer part of what is free.
    host = run.host_memory or int(0.9 * host_memory().available) + weights.store.nbytes
    return OffloadEngine(
        directory,
        sink=steps,
        device=run.device,
        gpu_memory=run.gpu_memory,
        host_memory=host,
        context=run.context + run.decode_tokens + 1,
        max_batch=1,
        resident_layers=run.resident_layers,
        slots=run.slots,
        chunk_tokens=run.chunk_tokens,
        host_threads=run.host_threads,
        prefill_round_tokens=run.prefill_round_tokens,
        attention=run.attention,
        linear=run.linear,
        fused=None if run.fused else False,
        graphs=None if run.graphs is None else bool(run.graphs),
        num_speculative_tokens=0,  # a token a pass: what the floor is of
        prefix_caching=False,
        serial=bool(run.serial),
        load_format="dummy",
        weights=weights,
    )


def prompt_of(length: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


def generate(engine: OffloadEngine, prompt: list[int], count: int) -> tuple[list[int], str | None]:
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    events = list(stream(engine, GenerationRequest(f"bench-{len(prompt)}", prompt, sampling)))
    return [event.token_id for event in events if event.token_id is not None], events[-1].error


def base_row(args: argparse.Namespace, run: argparse.Namespace, weights: ModelWeights) -> dict[str, Any]:
    case = {"case": "weights as vLLM's dummy loader draws them"} if run.weights == "vllm" else {}
    return case | {
        "system": "elsa-offload",
        "model": args.model.stem,
        "layers": len(weights.decoder_layers),
        "dtype": args.dtype,
        "attention": run.attention,
        "linear": args.linear,
        "context": run.context,
        "batch": 1,
        "serial": bool(run.serial),
        "fused": bool(run.fused),
        "gpu_cap": run.gpu_memory,
        "asked": {name: value for name in PLANNED if (value := getattr(run, name)) is not None},
    }


def timings(passes: list[StepStats], unlike: int = 0) -> dict[str, Any]:
    """Seconds of the prefill's rounds together, of the median decode pass, and of their copies: stalled and hidden.

    unlike: so many decode passes, the first ones, are not like those that follow, and do not count.
    """
    prefills = [one for one in passes if one.phase == "prefill"]
    decodes = [one for one in passes if one.phase == "decode"][unlike:]
    transfers = [transfer for one in passes for transfer in one.transfers]
    decode_transfers = [transfer for one in decodes for transfer in one.transfers]
    return {
        "prefill_s": sum(one.duration_s for one in prefills),
        "prefill_rounds": len(prefills),
        "predicted_prefill_s": sum(one.planned_s for one in prefills) or None,
        "live_predicted_prefill_s": sum(one.predicted_s for one in prefills) or None,
        "decode_s_per_token": median(one.duration_s for one in decodes),
        "predicted_decode_s_per_token": median(one.planned_s for one in decodes),
        "live_predicted_decode_s_per_token": median(one.predicted_s for one in decodes),
        "decode_s_min": min((one.duration_s for one in decodes), default=None),
        "decode_s_max": max((one.duration_s for one in decodes), default=None),
        "stall_s": sum(t.stall_s for t in transfers),
        "hidden_s": sum(t.hidden_s for t in transfers),
        "prefill_stall_s": sum(t.stall_s for one in prefills for t in one.transfers),
        "prefill_hidden_s": sum(t.hidden_s for one in prefills for t in one.transfers),
        "h2d_bytes": _bytes(transfers, "h2d"),
        "d2h_bytes": _bytes(transfers, "d2h"),
        "decode_h2d_bytes_per_s": _rate(decode_transfers, "h2d"),
        **host_attention(decodes),
    }


def median(seconds: Iterable[float]) -> float | None:
    """Of what was timed, or predicted: None where nothing was."""
    found = list(seconds)
    return statistics.median(found) or None if found else None


def host_attention(decodes: list[StepStats]) -> dict[str, Any]:
    """What the host's cores attended in place, per decode pass, and for how long the device waited for them."""
    parts = [one.host_attention for one in decodes if one.host_attention is not None]
    if not parts:
        return {"host_attention_bytes": 0}
    nbytes, seconds = sum(part.bytes for part in parts), sum(part.seconds for part in parts)
    return {
        "host_attention_bytes": nbytes // len(decodes),
        "host_attention_s": seconds / len(decodes),
        "host_attention_bytes_per_s": nbytes / seconds if seconds else None,
        "host_attention_stall_s": sum(part.stall_s for part in parts) / len(decodes),
    }


def _bytes(transfers: list[Transfer], direction: str) -> int:
    return sum(t.bytes for t in transfers if t.direction == direction)


def _rate(transfers: list[Transfer], direction: str) -> float | None:
    seconds = sum(t.seconds for t in transfers if t.direction == direction)
    return _bytes(transfers, direction) / seconds if seconds else None


def reset_host_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then is the process's, earlier runs included


def huge_pages() -> int | None:
    """Bytes of this process's memory that lie in huge pages: reading the others costs the cores more."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("AnonHugePages:")), None)
    return int(found.split()[1]) * 1024 if found else None


def host_peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak.split()[1]) * 1024 if peak else None


# --- the results file ---------------------------------------------------------------------------------------------


def record(file: Path, row: dict[str, Any], fresh: bool = False) -> None:
    """Put a row into the file, in place of the one of the same configuration; `fresh`, of all that it has. The file's
    head is of the latest run; every row names its own commit and date, and what else of a head its own differs in."""
    doc = results_file.document([])
    if file.exists() and not fresh:
        before = results_file.read(file)
        configuration = {key: row.get(key) for key in CONFIGURATION}
        others = [old for old in before["rows"] if {key: old.get(key) for key in CONFIGURATION} != configuration]
        doc["rows"] = [of_its_own(old, before, doc) for old in others]
    doc["rows"].append(row | {key: doc[key] for key in ("commit", "date")})
    results_file.write_document(file, doc)


def of_its_own(row: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An older row with what it shared with its file's former head, as far as the new one says something else."""
    shared = {key: before[key] for key in HEAD if key not in row and before[key] != now[key]}
    return row | shared


def table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'cap':>8} {'attention':>9} {'serial':>6} {'context':>8} {'prefill s':>9} {'s/token':>8} {'floor':>6} equal"
    )
    for row in rows:
        start = f"{row['gpu_cap']:>8} {row['attention']:>9} {row['serial']!s:>6} {row['context']:>8}"
        if row.get("error"):
            print(start, row["error"])
            continue
        decode = row["decode_s_per_token"] or float("nan")
        print(f"{start} {row['prefill_s']:>9.3f} {decode:>8.4f} {row['floor_s']:>6.3f} {row['tokens_equal']}")


if __name__ == "__main__":
    raise SystemExit(main())
