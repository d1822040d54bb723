"""Gain of ELSA attention over SDPA on the offload engine, LLaMA-13B's geometry: `bench gain --in-process` cell by cell.

python -m load_tests.gain_suite --output load_tests/results/gain-h200.json \\
        --cell float16:32768:40 --cell float16:65536:40 --cell float32:32768:10 --cell float32:65536:6

A cell is DTYPE:CONTEXT:LAYERS. Layers are alike, and time grows with their number on both sides, so a few of them show
the gain of all in far less time; each row says how many ran. They get the GPU memory that is theirs of --gpu-memory:
what the model with all its layers would spend on the KV of the missing ones is taken away, so that the same share of
the KV lies in host memory. Weights are random and all streamed, float32 is strict (no TF32 in linear layers nor in
either attention), and one engine changes its attention between two requests. Two layers run a request of the very same
shapes on both sides before, so that every kernel is there when the clock runs; those that are not are named.

Results are written after every cell; cells that the work folder holds already are not measured again, and rows of the
results file that the work folder has nothing for stay. Where no Prometheus is, its scrapes are kept in the work folder:
`--collect` on a machine that has one adds what it makes of them.

With `--engine vllm` a cell is two vLLM servers on one GPU, FLASH_ATTN (TRITON_ATTN in float32, which FLASH_ATTN does
not take) against ELSA, everything on the GPU, the prompt in one step, CUDA graphs for decode, no torch.compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from elsa_load.ab import SIDES
from elsa_load.command import add_command
from elsa_load.report import gain_report
from elsa_load.scrapes import FILE

from elsa_serve.errors import ElsaError
from elsa_serve.offload.checkpoint import load_config
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.plan import make_plan
from elsa_serve.offload.split import CHOICES
from elsa_serve.offload.units import parse_size
from kernels.bench import results_file
from load_tests.vllm_bench import compiled_kernels

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
DEMO_MODEL = Path(__file__).parents[1] / "configs" / "demo_model"
PLENTY = 1 << 50  # bytes of host memory: the plan of all layers is never run
CELLS = ("float16:32768:40", "float16:65536:40", "float32:32768:10", "float32:65536:6")
REHEARSAL_LAYERS = 2  # all KV of a single one would lie on the device, in the place of a second weight slot
VLLM_BASELINES = {"float32": "TRITON_ATTN"}  # FLASH_ATTN takes no float32
COMPILED = "compiled.json"  # names of kernels that were compiled while a cell was measured


@dataclass(frozen=True, slots=True)
class SuiteCell:
    """One measurement. `layers` of the model, `context` in tokens."""

    dtype: str
    context: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> SuiteCell:
        """DTYPE:CONTEXT:LAYERS. Raises argparse's error, which names the text."""
        dtype, *numbers = text.split(":")
        if dtype not in DTYPES or len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not DTYPE:CONTEXT:LAYERS, such as float32:32768:4")
        return cls(dtype, *map(int, numbers))

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.context}-{self.layers}"


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    failed = []
    for cell in [] if args.collect else args.cell or [SuiteCell.parse(text) for text in CELLS]:
        if (measure_vllm if args.engine == "vllm" else measure)(args, cell):
            failed.append(cell.name)
        else:
            collect(args)
    if args.collect:
        for folder in sorted(file.parent for file in args.work.glob("*/gain.json")):
            if (folder / FILE).exists() and bench(["replay", str(folder)]):
                failed.append(folder.name)
        collect(args)
    if failed:
        print(f"no results of {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    add("--cell", type=SuiteCell.parse, action="append", metavar="DTYPE:CONTEXT:LAYERS", help="repeatable")
    add(
        "--engine", choices=("offload", "vllm"), default="offload",
        help="whose attention: the offload engine's, or vLLM's (default: offload)",
    )  # fmt: skip
    add("--pairs", type=int, default=6, help="prompts a cell, each on both sides (default: 6)")
    add("--warm-up", type=int, default=0, help="prompts of all layers a side, after the two layers' (default: 0)")
    add("--seconds", type=float, default=600.0, help="begin no further pair of a cell after this long (default: 600)")
    add("--output-tokens", type=int, default=8, help="generated a request (default: 8)")
    add("--gpu-memory", default="24GiB", help="device budget of all layers, enforced (default: 24GiB)")
    add("--chunk-tokens", type=int, help="prompt tokens that pass a layer at a time (default: planned)")
    add("--linear", choices=CHOICES, default="torch", help="linear layers of both sides (default: torch's)")
    add("--work", type=Path, default=Path("gain-suite"), help="folder of each cell's own files (default: gain-suite)")
    add(
        "--collect",
        action="store_true",
        help="measure nothing: let a Prometheus here compute what was recorded, and write the work folder's results",
    )
    add("--output", type=Path, required=True, help="results file; reports are written to the work folder")
    return parser


def collect(args: argparse.Namespace) -> None:
    """Write the reports of all that the work folder holds, and its rows into the results file, in the place of older
    ones of the same engine, dtype, context, chunks and linear layers."""
    documents = {file.parent: json.loads(file.read_text()) for file in args.work.glob("*/gain.json")}
    rows = [row for folder, document in documents.items() for row in rows_of(args, folder, document)]
    if not rows:
        return
    new = {kind(row) for row in rows}
    known = results_file.read(args.output)["rows"] if args.output.exists() else []
    rows += [row for row in known if kind(row) not in new]
    rows.sort(key=lambda row: (row["engine"] != "elsa-offload", *kind(row)))
    newest = max(documents.values(), key=lambda document: document["date"])
    head = {key: newest[key] for key in ("machine", "versions", "commit", "command", "date")}
    results_file.write_document(args.output, head | {"rows": rows})
    write_reports(args, documents)


def kind(row: dict[str, Any]) -> tuple[Any, ...]:
    about = (row["engine"], row["dtype"], row["context"], row["baseline"])
    return (*about, row["linear"] == "elsa", row.get("chunk_tokens", 0))


def measure(args: argparse.Namespace, cell: SuiteCell) -> int:
    """The exit status. An engine's own warm-up is a short prompt, which spills no KV into host memory, so that what
    decode does with it would be compiled in the first pair: hence a request of the same shapes through few layers."""
    folder = args.work / (cell.name if args.linear == "torch" else f"{cell.name}-{args.linear}")
    if (folder / COMPILED).exists():
        return 0
    few = replace(cell, layers=min(REHEARSAL_LAYERS, cell.layers))
    print(f"{few.name}: for kernels to be compiled")
    with tempfile.TemporaryDirectory() as unused:
        if status := run_cell(args, few, Path(unused), "--pairs", 1, "--warm-up", 0, "--no-prometheus"):
            return status
    print(f"{cell.name}: measured", flush=True)
    with compiled_kernels() as compiled:
        status = run_cell(args, cell, folder, "--pairs", args.pairs, "--warm-up", args.warm_up)
    if not status:
        (folder / COMPILED).write_text(json.dumps(sorted(set(compiled))))
    return status


def run_cell(args: argparse.Namespace, cell: SuiteCell, folder: Path, *more: object) -> int:
    """`bench gain` of the cell with `more` flags, into `folder`."""
    model = written_model(args, cell, folder)
    settings = {"dtype": cell.dtype, "load-format": "dummy", "resident-layers": 0, **placement(args, cell)}
    # A token a pass, and a prompt in one: what differs between the sides is then attention and nothing that it decides.
    settings |= {"num-speculative-tokens": 0, "prefill-round-tokens": cell.context}
    settings |= {"linear": args.linear} if args.linear != "torch" else {}
    return bench_gain(args, cell, folder, model, settings, "--in-process", *more)


def bench_gain(
    args: argparse.Namespace, cell: SuiteCell, folder: Path, model: Path, settings: dict[str, Any], *more: object
) -> int:
    flags = [*more, "--context", cell.context, "--seconds", args.seconds, "--output-tokens", args.output_tokens]
    flags += ["--output", folder, "--set", ",".join(f"{key}={value}" for key, value in settings.items())]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    return bench(["gain", str(model), *map(str, flags), *quiet])


def written_model(args: argparse.Namespace, cell: SuiteCell, folder: Path) -> Path:
    """A model folder of the cell's layers."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = json.loads(args.model.read_text()) | {"num_hidden_layers": cell.layers}
    (model / "config.json").write_text(json.dumps(config))
    return model


def measure_vllm(args: argparse.Namespace, cell: SuiteCell) -> int:
    """The exit status. Each server gets the KV of one request, so that two fit a GPU."""
    folder = args.work / f"vllm-{cell.name}"
    model = written_model(args, cell, folder)
    geometry = Geometry.from_config(load_config(model), DTYPES[cell.dtype])
    write_tokenizer(model, geometry.vocab)
    tokens = cell.context + args.output_tokens + 1
    a_token = geometry.layers * geometry.kv_token_bytes()
    settings = {
        "dtype": cell.dtype,
        "load-format": "dummy",
        "worker-cls": "load_tests.drawn_weights.Worker",
        "gpu-memory-utilization": 0.05,  # the KV is stated; so much must be free
        "kv-cache-memory-bytes": int(1.01 * (tokens + 64) * a_token) + (256 << 20),
        "max-num-batched-tokens": args.chunk_tokens or tokens,
        "max-num-seqs": 2,
        "compilation-config.mode": 0,
        "compilation-config.cudagraph_mode": "FULL_DECODE_ONLY",
    }
    more = ["--engine", "vllm", "--baseline", f"attention-backend={VLLM_BASELINES.get(cell.dtype, 'FLASH_ATTN')}"]
    # Its running usage times tokens that have no text, too.
    more += ["--pairs", args.pairs, "--warm-up", args.warm_up, "--tokenizer", model, "--counting", "continuous"]
    print(f"{folder.name}: measured", flush=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # vllm_bench, which is imported here, wants engines in-process
    return bench_gain(args, cell, folder, model, settings, *more)


def write_tokenizer(folder: Path, size: int) -> None:
    """The demo model's, with a text of its own for every further id of the model's: what differs shows."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((DEMO_MODEL / name).read_text())
        if name == "tokenizer.json":
            vocabulary = data["model"]["vocab"]
            known = {*vocabulary.values(), *(token["id"] for token in data["added_tokens"])}
            vocabulary |= {f"<{i}>": i for i in range(size) if i not in known}
        else:
            data["model_max_length"] = 1 << 20
        (folder / name).write_text(json.dumps(data))


def placement(args: argparse.Namespace, cell: SuiteCell) -> dict[str, int]:
    """Flags that place `cell.layers` layers as the whole model's would be placed within --gpu-memory."""
    whole = Geometry.from_config(load_config(args.model), DTYPES[cell.dtype])
    plan = make_plan(
        whole,
        gpu_budget=parse_size(args.gpu_memory),
        host_budget=PLENTY,
        context=cell.context + args.output_tokens + 1,
        resident_layers=0,
        chunk_tokens=args.chunk_tokens,
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        linear=args.linear,
    )
    missing = plan.kv_gpu_bytes * (whole.layers - cell.layers) // whole.layers
    return {"gpu-memory": plan.gpu_budget - missing, "slots": plan.slots, "chunk-tokens": plan.chunk_tokens}


def bench(words: Sequence[str]) -> int:
    """`elsa-serve bench …` where the package need not be installed, so that its entry points are unknown."""
    parser = argparse.ArgumentParser(prog="elsa-serve")
    add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", *words])
    try:
        return int(args.run(args) or 0)
    except ElsaError as error:
        print(f"elsa-serve: error: {error}", file=sys.stderr)
        return 1


def rows_of(args: argparse.Namespace, folder: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The folder's rows, with what ran and every single time, so that anyone can do the statistics again."""
    (measured,) = document["cells"]
    flags = {
        item.partition("=")[0]: item.partition("=")[2] for item in ",".join(document["settings"]["set"]).split(",")
    }
    layers = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
    about = {"model": args.model.stem, "layers": layers, "linear": flags.get("linear", "torch")}
    if "gpu-memory" in flags:  # the offload engine
        about |= {
            "gpu_cap_bytes": int(flags["gpu-memory"]),
            "gpu_cap_bytes_all_layers": parse_size(args.gpu_memory),
            "chunk_tokens": int(flags["chunk-tokens"]),
            "slots": int(flags["slots"]),  # all but one hold weights of the next pass when one ends
            # What a request stored there.
            "kv_host_bytes": round(measured["counters"]["candidate"]["d2h_bytes"] / len(measured["pairs"])),
        }
    elif "max-num-batched-tokens" in flags:
        about["chunk_tokens"] = int(flags["max-num-batched-tokens"])
    about |= {key: document[key] for key in ("commit", "date", "command", "machine")}
    if (folder / COMPILED).exists():
        about["compiled_late"] = json.loads((folder / COMPILED).read_text())
    counters = {f"{side}_{key}": measured["counters"][side][key] for side in SIDES for key in ("h2d_bytes", "stall_s")}
    rows = []
    for row in document["rows"]:
        times = [[pair["seconds"][side][row["phase"]] for side in SIDES] for pair in measured["pairs"]]
        rows.append(row | about | counters | {"pairs_s": times})
    return rows


def write_reports(args: argparse.Namespace, documents: dict[Path, dict[str, Any]]) -> None:
    """An HTML report an engine and dtype, with its contexts side by side."""
    groups: dict[tuple[str, ...], dict[Path, dict[str, Any]]] = {}
    for folder, document in documents.items():
        first = document["rows"][0]
        groups.setdefault((first["engine"], first["dtype"]), {})[folder] = document
    for (engine, dtype), found in groups.items():
        ordered = sorted(found, key=lambda folder: found[folder]["rows"][0]["context"])
        first = found[ordered[0]]
        merged = first | {key: [item for folder in ordered for item in found[folder][key]] for key in ("rows", "cells")}
        merged["settings"] = first["settings"] | {"measured": ", ".join(folder.name for folder in ordered)}
        name = dtype if engine == "elsa-offload" else f"{engine}-{dtype}"
        (args.work / f"report-{name}.html").write_text(gain_report(merged))


if __name__ == "__main__":
    raise SystemExit(main())
