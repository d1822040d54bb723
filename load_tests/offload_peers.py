"""How others run a model that does not fit: vLLM's and accelerate's offloading, over offload_bench's prompt and cap.

    python -m load_tests.offload_peers --case vllm-prefetch-2:40GiB vllm-prefetch-2:24GiB accelerate:8GiB \\
        --limit 100 --output peers.json
    python -m load_tests.merge_rows peers.json --output load_tests/results/offload-h200.json

All decoder layers lie in host memory, but for `vllm-prefetch-3-of-4`, where every fourth stays on the GPU. vLLM needs
the whole KV on the GPU and refuses where the cap does not hold it; accelerate, with transformers' offloaded cache,
copies a layer's KV forth and back for every token. vLLM's prefetch copies one layer ahead unless told otherwise, into
the one buffer there is then, so that the copy waits for the layer before it: the others copy two ahead. Weights are
random: vLLM's as its dummy loader draws them, accelerate's as transformers would. vLLM's rows are medians over as many
prompts as offload_bench times. What refuses, fails or takes too long becomes the row's `error`: with `--limit`, cases
run in processes of their own, vLLM's one after the other in one, which is ended when one of them fails or its time is
over, whatever it waits for. So name those last that may be refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from elsa_serve.offload.device import indexed
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.units import parse_size
from kernels.bench import results_file
from load_tests import vllm_bench
from load_tests.offload_bench import MODEL, PREFILLS, host_peak, prompt_of, record, reset_host_peak

Row = dict[str, Any]
WARM_UP_TOKENS = 2048
# Kernels that read weights over PCIe read them once for every tile of rows, so a pass of 32,773 tokens, which vLLM also
# makes to see what memory it takes, lasted 73 s on an H200: in pieces the first of the two is short.
UVA_TOKENS = 2048
VLLM_OFFLOADS: dict[str, Callable[[float], Row]] = {  # by the weights' GiB
    "vllm-prefetch-2": lambda gib: prefetch(2),
    "vllm-prefetch-3-of-4": lambda gib: prefetch(2) | {"offload_group_size": 4, "offload_num_in_group": 3},
    "vllm-prefetch": lambda gib: prefetch(1),
    "vllm-uva": lambda gib: {"offload_backend": "uva", "cpu_offload_gb": gib, "max_num_batched_tokens": UVA_TOKENS},
}  # fmt: skip
PEERS = (*VLLM_OFFLOADS, "accelerate")


def prefetch(step: int) -> Row:
    """vLLM's options that keep every layer in host memory and copy it `step` layers ahead."""
    return {
        "offload_backend": "prefetch",
        "offload_group_size": 1,
        "offload_num_in_group": 1,
        "offload_prefetch_step": step,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = json.loads(args.model.read_text())
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        run(args, folder, config)
    return 0


def run(args: argparse.Namespace, folder: str, config: Row) -> None:
    """Measure one case after the other, and record its row."""
    worker: Worker | None = None
    try:
        for peer, cap in args.case:
            start = time.perf_counter()
            if args.limit is None:
                row = measure(args, folder, config, peer, cap)
            else:
                if worker is None or not worker.serves(peer):
                    worker = Worker(args, folder, config, worker)
                row = base_row(args, config, peer, cap) | worker.measure(peer, cap, args.limit)
            keep(args, {"run_s": round(time.perf_counter() - start, 1)} | row)
    finally:  # also where this process is interrupted
        if worker is not None:
            worker.end()


class Worker:
    """A process that measures one peer's cases as long as none fails: a second engine finds the libraries imported and
    the host memory page-locked. What an engine that was refused leaves is let go while the next one measures memory,
    which that takes for an error."""

    def __init__(self, args: argparse.Namespace, folder: str, config: Row, before: Worker | None = None) -> None:
        if before is not None:
            before.end()
        fresh = multiprocessing.get_context("spawn")
        self._connection, other = fresh.Pipe()
        self._process = fresh.Process(target=serve, args=(other, args, folder, config))
        self._process.start()
        other.close()
        self._system: str | None = None
        self._usable = True

    def serves(self, peer: str) -> bool:
        return self._usable and self._system in (None, system(peer))

    def measure(self, peer: str, cap: str, limit: float) -> Row:
        self._system = system(peer)
        try:
            self._connection.send((peer, cap))
            if self._connection.poll(limit):
                row: Row = self._connection.recv()
                self._usable = row["error"] is None
                return row
            row = {"error": f"no result within {limit} s"}
        except (EOFError, OSError):
            self._process.join()
            row = {"error": f"ended with status {self._process.exitcode}"}
        self._usable = False
        return row

    def end(self) -> None:
        """With all that it started, at once: giving tens of GiB back in good order takes it seconds."""
        self._connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        except ProcessLookupError:  # it has no group yet, or is gone
            self._process.kill()
        self._process.join()


def serve(connection: Connection, args: argparse.Namespace, folder: str, config: Row) -> None:
    """`measure` in a process that leads a group of its own: what it starts ends with it."""
    os.setsid()
    with suppress(EOFError):
        while True:
            connection.send(measure(args, folder, config, *connection.recv()))


def measure(args: argparse.Namespace, folder: str, config: Row, peer: str, cap: str) -> Row:
    def work() -> Row:
        return (accelerate if peer == "accelerate" else vllm)(args, folder, config, peer, parse_size(cap))

    reset_host_peak()
    return vllm_bench.attempt(base_row(args, config, peer, cap), work) | {"peak_host_bytes": host_peak()}


def keep(args: argparse.Namespace, row: Row) -> None:
    print(json.dumps(row), flush=True)
    if args.output:
        record(args.output, row | {"command": results_file.command_line()})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", type=case, default=[(peer, "40GiB") for peer in PEERS], metavar="PEER:CAP",
        help=f"of {', '.join(PEERS)}, with so much of the GPU at most (default: each with 40GiB)",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=32768, help="prompt tokens (default: 32768)")
    parser.add_argument("--decode-tokens", type=int, default=4, help="tokens after the first (default: 4)")
    parser.add_argument("--limit", type=int, metavar="SECONDS", help="of a case; then an error (default: none)")
    parser.add_argument("--output", type=Path, help="results file to put the rows into")
    return parser


def case(text: str) -> tuple[str, str]:
    peer, _, cap = text.partition(":")
    if peer not in PEERS:
        raise argparse.ArgumentTypeError(f"{text!r}: peers are {', '.join(PEERS)}")
    parse_size(cap)
    return peer, cap


def system(peer: str) -> str:
    return "hf-accelerate" if peer == "accelerate" else "vllm"


def base_row(args: argparse.Namespace, config: Row, peer: str, cap: str) -> Row:
    return {
        "system": system(peer),
        "model": args.model.stem,
        "layers": config["num_hidden_layers"],
        "dtype": args.dtype,
        "attention": "sdpa" if peer == "accelerate" else "FLASH_ATTN",
        "linear": "torch",
        "context": args.context,
        "batch": 1,
        "gpu_cap": cap,
        "case": {"accelerate": "cpu_offload, offloaded cache"}.get(peer, peer),
    }


def vllm(args: argparse.Namespace, folder: str, config: Row, peer: str, cap: int) -> Row:
    """vLLM's own engine without CUDA graphs, the prompt in one piece but for UVA."""
    total = torch.cuda.get_device_properties(0).total_memory
    layer = 4 * config["hidden_size"] ** 2 + 3 * config["hidden_size"] * config["intermediate_size"]
    weights = config["num_hidden_layers"] * layer * DTYPES[args.dtype].itemsize
    options = argparse.Namespace(
        context=args.context, decode_tokens=args.decode_tokens, dtype=args.dtype, kv_cache_dtype="auto",
        chunk_tokens=None, command="speed", one_gpu=False, prefills=PREFILLS,
    )  # fmt: skip
    changes = VLLM_OFFLOADS[peer](1.01 * weights / 2**30) | {
        "gpu_memory_utilization": cap / total,
        "kv_cache_memory_bytes": None,  # as much as is left
        "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"},
        "enforce_eager": True,
    }
    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    with (
        forgotten() as note,
        drawing_on_device(),
        vllm_bench.engine(options, folder, "FLASH_ATTN", **changes) as llm,
    ):
        note()
        load_s = time.perf_counter() - start
        vllm_bench.generate(llm, [prompt_of(min(args.context, WARM_UP_TOKENS), config["vocab_size"])], 2)
        times = vllm_bench.timed(llm, prompt_of(args.context, config["vocab_size"]), options)
        medians = {key: statistics.median(one[key] for one in times) for key in times[0]}
        chunk = changes.get("max_num_batched_tokens", args.context)
        return {**medians, "chunk_tokens": chunk, "peak_gpu_bytes": torch.cuda.max_memory_reserved(), "load_s": load_s}


@contextmanager
def forgotten() -> Iterator[Callable[[], None]]:
    """Afterwards nothing holds the offloaded weights any more: host memory has no room for those of two engines. To be
    called once there is an engine: its shutdown hides what it had."""
    known: list[Any] = []

    def note() -> None:
        with suppress(ImportError):
            from vllm.model_executor.offloader import get_offloader

            known.append(get_offloader())

    try:
        yield note
    finally:
        for layer in (layer for one in known for layer in getattr(one, "module_offloaders", ())):
            layer._param_offloaders.clear()
        with suppress(ImportError):
            from vllm.model_executor.offloader import set_offloader

            set_offloader(None)


@contextmanager
def drawing_on_device() -> Iterator[None]:
    """vLLM's dummy loader draws what lies in host memory there, on one core: a minute for 13 billion weights."""
    try:
        from vllm.model_executor.model_loader import dummy_loader
    except ImportError:  # the engine will say so
        yield
        return
    draw = dummy_loader.initialize_single_dummy_weight

    def drawn(weight: torch.Tensor, *args: Any, **options: Any) -> None:
        if weight.device.type != "cpu" or not weight.is_floating_point() or hasattr(weight, "dummy_weight_value"):
            draw(weight, *args, **options)
            return
        here = torch.empty_like(weight, device="cuda")
        draw(here, *args, **options)
        weight.data.copy_(here)

    dummy_loader.initialize_single_dummy_weight = drawn
    try:
        yield
    finally:
        dummy_loader.initialize_single_dummy_weight = draw


def accelerate(args: argparse.Namespace, folder: str, config: Row, peer: str, cap: int) -> Row:
    """transformers' model with its layers' weights in pageable host memory, which accelerate's hooks copy."""
    from accelerate import cpu_offload
    from transformers import AutoConfig, DynamicCache

    device = indexed(torch.device(args.device))
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = random_model(AutoConfig.from_pretrained(folder), DTYPES[args.dtype], device)
    cpu_offload(model, device)
    load_s = time.perf_counter() - start

    def passes(prompt: list[int], count: int) -> list[float]:
        """Seconds of the prompt's pass and of `count` more, a token each."""
        cache, seconds = DynamicCache(config=model.config, offloading=device.type == "cuda"), []
        tokens = torch.tensor([prompt], device=device)
        for _ in range(1 + count):
            begun = time.perf_counter()
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            tokens.tolist()  # waits
            seconds.append(time.perf_counter() - begun)
        return seconds

    with torch.inference_mode():
        passes(prompt_of(min(args.context, WARM_UP_TOKENS), config["vocab_size"]), 0)
        prefill_s, *decodes = passes(prompt_of(args.context, config["vocab_size"]), args.decode_tokens)
    return {
        "prefill_s": prefill_s,
        "decode_s_per_token": sorted(decodes)[len(decodes) // 2] if decodes else None,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "load_s": load_s,
    }


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in pageable host memory; its weights are drawn on the device, which is quicker."""
    from elsa_serve.offload.weights import build_meta_model, materialise_buffers

    model = build_meta_model(config, dtype, "sdpa")
    materialise_buffers(model, torch.device("cpu"))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            drawn = torch.empty(parameter.shape, dtype=dtype, device=device)
            drawn = drawn.normal_(0.0, config.initializer_range) if parameter.ndim > 1 else drawn.fill_(1.0)
            module._parameters[name] = torch.nn.Parameter(drawn.cpu(), requires_grad=False)
    return model


if __name__ == "__main__":
    raise SystemExit(main())
