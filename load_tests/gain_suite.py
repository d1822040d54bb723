"""Gain of ELSA attention over SDPA on the offload engine, LLaMA-13B's geometry: `bench gain --in-process` cell by cell.

python -m load_tests.gain_suite --output load_tests/results/gain-h200.json \\
        --cell float16:32768:40 --cell float16:65536:10 --cell float32:32768:4 --cell float32:65536:2

A cell is DTYPE:CONTEXT:LAYERS. Layers are alike, and time grows with their number on both sides, so a few of them show
the gain of all in far less time; each row says how many ran. They get the GPU memory that is theirs of --gpu-memory:
what the model with all its layers would spend on the KV of the missing ones is taken away, so that the same share of
the KV lies in host memory. Weights are random and all streamed, float32 is strict (no TF32 in linear layers nor in
either attention), and one engine changes its attention between two requests. Results are written after every cell;
cells that the work folder holds already are not measured again. Where no Prometheus is, its scrapes are kept in the
work folder: `--collect` on a machine that has one adds what it makes of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from elsa_load.ab import SIDES
from elsa_load.command import add_command
from elsa_load.report import gain_report
from elsa_load.scrapes import FILE

from elsa_serve.errors import ElsaError
from elsa_serve.offload.checkpoint import load_config
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.plan import Geometry, make_plan
from elsa_serve.offload.units import parse_size
from kernels.bench import results_file

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
PLENTY = 1 << 50  # bytes of host memory: the plan of all layers is never run
CELLS = ("float16:32768:40", "float16:65536:10", "float32:32768:4", "float32:65536:2")


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

    @classmethod
    def named(cls, name: str) -> SuiteCell:
        return cls.parse(name.replace("-", ":"))

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.context}-{self.layers}"


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    failed = []
    for cell in [] if args.collect else args.cell or [SuiteCell.parse(text) for text in CELLS]:
        if measure(args, cell):
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
    add("--pairs", type=int, default=6, help="prompts a cell, each on both sides (default: 6)")
    add("--warm-up", type=int, default=1, help="full prompts a cell and side before the clock runs (default: 1)")
    add("--seconds", type=float, default=600.0, help="begin no further pair of a cell after this long (default: 600)")
    add("--output-tokens", type=int, default=4, help="generated a request (default: 4)")
    add("--gpu-memory", default="24GiB", help="device budget of all layers, enforced (default: 24GiB)")
    add("--chunk-tokens", type=int, help="prompt tokens that pass a layer at a time (default: planned)")
    add("--work", type=Path, default=Path("gain-suite"), help="folder of each cell's own files (default: gain-suite)")
    add(
        "--collect",
        action="store_true",
        help="measure nothing: let a Prometheus here compute what was recorded, and write the work folder's results",
    )
    add("--output", type=Path, required=True, help="results file; reports are written to the work folder")
    return parser


def collect(args: argparse.Namespace) -> None:
    """Write the results and the reports of all cells that the work folder holds."""
    documents = {
        SuiteCell.named(file.parent.name): json.loads(file.read_text()) for file in args.work.glob("*/gain.json")
    }
    documents = dict(sorted(documents.items(), key=lambda item: (item[0].dtype, item[0].context, item[0].layers)))
    rows = [row for cell, document in documents.items() for row in rows_of(args, cell, document)]
    newest = max(documents.values(), key=lambda document: document["date"])
    head = {key: newest[key] for key in ("machine", "versions", "commit", "command", "date")}
    results_file.write_document(args.output, head | {"rows": rows})
    write_reports(args, documents)


def measure(args: argparse.Namespace, cell: SuiteCell) -> int:
    folder = args.work / cell.name
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = json.loads(args.model.read_text()) | {"num_hidden_layers": cell.layers}
    (model / "config.json").write_text(json.dumps(config))
    settings = {"dtype": cell.dtype, "load-format": "dummy", "resident-layers": 0, **placement(args, cell)}
    # A token a pass, and a prompt in one: what differs between the sides is then attention and nothing that it decides.
    settings |= {"num-speculative-tokens": 0, "prefill-round-tokens": cell.context}
    flags = ["--context", cell.context, "--pairs", args.pairs, "--warm-up", args.warm_up]
    flags += ["--seconds", args.seconds, "--output-tokens", args.output_tokens, "--output", folder]
    flags += ["--set", ",".join(f"{key}={value}" for key, value in settings.items())]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    return bench(["gain", str(model), "--in-process", *map(str, flags), *quiet])


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


def rows_of(args: argparse.Namespace, cell: SuiteCell, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The cell's rows, with what ran and every single time, so that anyone can do the statistics again."""
    (measured,) = document["cells"]
    flags = dict(item.split("=") for item in ",".join(document["settings"]["set"]).split(","))
    about = {
        "model": args.model.stem,
        "layers": cell.layers,
        "linear": flags.get("linear", "torch"),
        "gpu_cap_bytes": int(flags["gpu-memory"]),
        "gpu_cap_bytes_all_layers": parse_size(args.gpu_memory),
        "chunk_tokens": int(flags["chunk-tokens"]),
        **{key: document[key] for key in ("commit", "date", "command", "machine")},
    }
    counters = {f"{side}_{key}": measured["counters"][side][key] for side in SIDES for key in ("h2d_bytes", "stall_s")}
    rows = []
    for row in document["rows"]:
        times = [[pair["seconds"][side][row["phase"]] for side in SIDES] for pair in measured["pairs"]]
        rows.append(row | about | counters | {"pairs_s": times})
    return rows


def write_reports(args: argparse.Namespace, documents: dict[SuiteCell, dict[str, Any]]) -> None:
    """An HTML report a dtype, with its contexts side by side."""
    for dtype in dict.fromkeys(cell.dtype for cell in documents):
        found = [document for cell, document in documents.items() if cell.dtype == dtype]
        layers = ", ".join(f"{cell.context}: {cell.layers}" for cell in documents if cell.dtype == dtype)
        merged = found[0] | {key: [item for one in found for item in one[key]] for key in ("rows", "cells")}
        merged["settings"] = found[0]["settings"] | {"layers by context": layers}
        (args.work / f"report-{dtype}.html").write_text(gain_report(merged))


if __name__ == "__main__":
    raise SystemExit(main())
