"""How others run a model that does not fit: vLLM's and accelerate's offloading, over offload_bench's prompt and cap.

    python -m load_tests.offload_peers --gpu-memory 40GiB --peer vllm-prefetch --peer accelerate \\
        --output load_tests/results/offload-h200.json

All decoder layers lie in host memory. vLLM needs the whole KV on the GPU and refuses where the cap does not hold it;
accelerate, with transformers' offloaded cache, copies a layer's KV forth and back for every token. Weights are random:
vLLM's as its dummy loader draws them, accelerate's as transformers would. What refuses or fails becomes the row's
`error`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.units import parse_size
from load_tests import vllm_bench
from load_tests.offload_bench import MODEL, host_peak, prompt_of, record, reset_host_peak

Row = dict[str, Any]
WARM_UP_TOKENS = 2048
VLLM_OFFLOADS: dict[str, Callable[[float], Row]] = {  # by the weights' GiB
    "vllm-prefetch": lambda gib: {
        "offload_backend": "prefetch", "offload_group_size": 1, "offload_num_in_group": 1, "offload_prefetch_step": 1,
    },
    "vllm-uva": lambda gib: {"offload_backend": "uva", "cpu_offload_gb": gib},
}  # fmt: skip
PEERS = (*VLLM_OFFLOADS, "accelerate")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = json.loads(args.model.read_text())
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for peer in args.peer or PEERS:
            work = accelerate if peer == "accelerate" else vllm
            reset_host_peak()
            row = vllm_bench.attempt(base_row(args, config, peer), lambda: work(args, folder, config, peer))  # noqa: B023
            print(json.dumps(row), flush=True)
            if args.output:
                record(args.output, row | {"peak_host_bytes": host_peak()})
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: all, in this order")
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=32768, help="prompt tokens (default: 32768)")
    parser.add_argument("--decode-tokens", type=int, default=4, help="tokens after the first (default: 4)")
    parser.add_argument("--gpu-memory", default="40GiB", help="of the GPU, at most (default: 40GiB)")
    parser.add_argument("--output", type=Path, help="results file to put the rows into")
    return parser


def base_row(args: argparse.Namespace, config: Row, peer: str) -> Row:
    return {
        "system": "hf-accelerate" if peer == "accelerate" else "vllm",
        "model": args.model.stem,
        "layers": config["num_hidden_layers"],
        "dtype": args.dtype,
        "attention": "sdpa" if peer == "accelerate" else "FLASH_ATTN",
        "linear": "torch",
        "context": args.context,
        "batch": 1,
        "gpu_cap": args.gpu_memory,
        "case": {"accelerate": "cpu_offload, offloaded cache"}.get(peer, peer),
    }


def vllm(args: argparse.Namespace, folder: str, config: Row, peer: str) -> Row:
    """vLLM's own engine without CUDA graphs, the prompt in one piece."""
    total = torch.cuda.get_device_properties(0).total_memory
    layer = 4 * config["hidden_size"] ** 2 + 3 * config["hidden_size"] * config["intermediate_size"]
    weights = config["num_hidden_layers"] * layer * DTYPES[args.dtype].itemsize
    options = argparse.Namespace(
        context=args.context, decode_tokens=args.decode_tokens, dtype=args.dtype, kv_cache_dtype="auto",
        chunk_tokens=None, command="speed",
    )  # fmt: skip
    changes = VLLM_OFFLOADS[peer](1.01 * weights / 2**30) | {
        "gpu_memory_utilization": parse_size(args.gpu_memory) / total,
        "kv_cache_memory_bytes": None,  # as much as is left
        "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"},
        "enforce_eager": True,
    }
    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    with vllm_bench.engine(options, folder, "FLASH_ATTN", **changes) as llm:
        load_s = time.perf_counter() - start
        vllm_bench.generate(llm, [prompt_of(WARM_UP_TOKENS, config["vocab_size"])], 2)
        times = vllm_bench.timed(llm, prompt_of(args.context, config["vocab_size"]), options)
        return {**times, "peak_gpu_bytes": torch.cuda.max_memory_reserved(), "load_s": load_s}


def accelerate(args: argparse.Namespace, folder: str, config: Row, peer: str) -> Row:
    """transformers' model with its layers' weights in pageable host memory, which accelerate's hooks copy."""
    from accelerate import cpu_offload
    from transformers import AutoConfig, DynamicCache

    device = torch.device(args.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(parse_size(args.gpu_memory) / total, device)
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
        passes(prompt_of(min(args.context, WARM_UP_TOKENS), config["vocab_size"]), 1)
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
