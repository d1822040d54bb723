"""The offload engine with layers on disk: a random model written as a checkpoint, served from ever less host memory.

    python -m load_tests.disk_bench --layers 8 --context 2048 --gpu-memory 5GiB --host-memory 4GiB --host-memory 8GiB

Every --host-memory is one configuration; what it does not hold stays in the checkpoint's files and is read again every
pass. With "2GiB+4GiB" up to 4 GiB of KV may lie on disk, too. Rows carry the planner's prediction beside what was
measured, and `floor_s`: the weights on disk at its measured rate (KV on disk is read through the page cache). The
checkpoint and the KV are written below --folder, which needs room for them and decides whose disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from elsa_serve.errors import ElsaError
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.weights import ModelWeights, load_model
from elsa_serve.stats import Steps, StepStats
from load_tests.offload_bench import (
    MODEL,
    WARM_UP_TOKENS,
    generate,
    host_peak,
    prompt_of,
    record,
    significant,
    timings,
)

WARM_UP_PROMPT = 4096  # tokens: whole chunks, so that the prompt that is timed loads no kernel


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    first_tokens: list[int] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="elsa-disk-bench-") as name:
        folder = Path(name)
        write_s = write_checkpoint(args, folder)
        for i, host in enumerate(args.host_memory):
            row = measure(args, host, folder, first_tokens) | {"write_s": write_s}
            print(json.dumps(row), flush=True)
            if args.output:
                record(args.output, row, fresh=args.fresh and i == 0)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (default: 8)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=2048, help="prompt tokens (default: 2048)")
    parser.add_argument("--decode-tokens", type=int, default=6, help="tokens after the first (default: 6)")
    parser.add_argument("--gpu-memory", default="5GiB", help="device budget, enforced (default: 5GiB)")
    parser.add_argument("--host-memory", action="append", required=True, help="host budget, +KV on disk; several rows")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="results file to append the rows to")
    parser.add_argument("--fresh", action="store_true", help="without the rows that --output has from earlier runs")
    return parser


def write_checkpoint(args: argparse.Namespace, folder: Path) -> float:
    """A checkpoint of random weights, a file a layer. Returns the seconds its writing took."""
    config = json.loads(args.model.read_text()) | {"num_hidden_layers": args.layers}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_model(
        folder, dtype=DTYPES[args.dtype], device=args.device, load_format="dummy", progress=sys.stderr.isatty()
    )
    try:
        began = time.perf_counter()
        names: dict[str, str] = {}
        for file, tensors in shards(weights):
            save_file(tensors, folder / file)
            names |= dict.fromkeys(tensors, file)
        save_tokenizer(folder, int(weights.config.get_text_config().vocab_size))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        os.sync()  # what is still on its way to the disk would slow the reads that are measured
        return time.perf_counter() - began
    finally:
        weights.close()


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word a token: the engine wants a tokenizer, and nobody reads the text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0").save_pretrained(folder)


def shards(weights: ModelWeights) -> Any:
    """(file, tensors by their stored names): what lies outside the layers, then a file for each layer."""
    state = weights.model.state_dict(keep_vars=True)
    yield "outside.safetensors", {name: t.detach().contiguous().cpu() for name, t in state.items() if not t.is_meta}
    prefixes = {id(module): name for name, module in weights.model.named_modules()}
    for index, layer in enumerate(weights.decoder_layers):
        prefix = prefixes[id(layer)]
        views = weights.store.views(index).items()
        yield f"layer-{index:03}.safetensors", {f"{prefix}.{name}": view.cpu() for name, view in views}


def measure(args: argparse.Namespace, host_and_disk: str, folder: Path, first_tokens: list[int]) -> dict[str, Any]:
    """One configuration's row. A refusal becomes its `error`."""
    host, _, kv_disk = host_and_disk.partition("+")
    row: dict[str, Any] = {
        "system": "elsa-offload", "model": args.model.stem, "layers": args.layers, "dtype": args.dtype,
        "attention": "elsa", "linear": "torch", "context": args.context, "batch": 1, "serial": False,
        "gpu_cap": args.gpu_memory, "host_cap": host,
        "asked": {"host_memory": host, "kv_disk": kv_disk or None, "from": "disk"},
    }  # fmt: skip
    steps = Steps()
    try:
        engine = OffloadEngine(
            folder, sink=steps, device=args.device, dtype=args.dtype, gpu_memory=args.gpu_memory, host_memory=host,
            context=args.context + args.decode_tokens + 1, max_batch=1, num_speculative_tokens=0, prefix_caching=False,
            kv_disk=kv_disk or None, kv_disk_dir=folder, progress=False,
        )  # fmt: skip
    except ElsaError as refusal:
        return row | {"error": f"{type(refusal).__name__}: {refusal}"}
    try:
        vocabulary = engine.info.vocab_size
        generate(engine, prompt_of(min(WARM_UP_PROMPT, args.context), vocabulary), WARM_UP_TOKENS)
        steps.passes.clear()
        tokens, error = generate(engine, prompt_of(args.context, vocabulary), 1 + args.decode_tokens)
    finally:
        engine.shutdown()
    if error is not None:
        return row | {"error": error}
    first_tokens += tokens if not first_tokens else []
    plan = engine.plan
    return row | {
        "resident_layers": len(plan.resident_layers),
        "disk_layers": len(plan.disk_layers),
        "chunk_tokens": plan.chunk_tokens,
        "kv_tokens": {"gpu": plan.kv_gpu_tokens, "host": plan.kv_host_tokens, "disk": plan.kv_disk_tokens},
        "gpu_cap_bytes": plan.gpu_budget,
        "host_cap_bytes": plan.host_budget,
        **timings(steps.passes),
        **disk_reads(steps.passes),
        "kv_disk_bytes": plan.kv_disk_tokens * plan.geometry.layers * plan.geometry.kv_token_bytes(),
        "disk_bytes_per_s": plan.rates.disk,
        "rates": significant(plan.rates),
        "floor_s": plan.disk_bytes / plan.rates.disk,
        "peak_host_bytes": host_peak(),
        "tokens_equal": tokens == first_tokens,
        "error": None,
    }


def disk_reads(passes: list[StepStats]) -> dict[str, Any]:
    """Bytes read from disk, the rate while reading, and how long compute waited for them."""
    reads = [one.disk for one in passes if one.disk is not None]
    nbytes, seconds = sum(one.bytes for one in reads), sum(one.seconds for one in reads)
    return {
        "disk_read_bytes": nbytes,
        "disk_read_bytes_per_s": nbytes / seconds if seconds else None,
        "disk_stall_s": sum(one.stall_s for one in reads),
    }


if __name__ == "__main__":
    raise SystemExit(main())
