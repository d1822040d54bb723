"""Command-line flags that several commands share, and the engine options they become."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from elsa_serve.errors import NoSuchModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", type=Path, metavar="MODEL_DIR", help="directory of a Hugging Face checkpoint (safetensors)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="weights and activations (default: the checkpoint's)"
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="longest prompt and output together (default: the model's own maximum); KV memory is planned for it",
    )
    group.add_argument(
        "--load-format",
        choices=("auto", "safetensors", "dummy"),
        default="auto",
        help="dummy: random weights of any config.json, to try speed and memory without a checkpoint (default: auto)",
    )


def check_model(args: argparse.Namespace) -> None:
    """Before torch and transformers are imported, which takes seconds. Raises NoSuchModel."""
    if not args.model.exists():
        raise NoSuchModel(args.model)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="budget on the device, such as 24GiB; enforced (default: 90%% of its free memory; on a CPU, part of RAM)",
    )
    group.add_argument(
        "--host-memory", metavar="SIZE", help="budget in host memory (default: 90%% of what the cgroup leaves free)"
    )
    group.add_argument(
        "--kv-disk", metavar="SIZE", help="KV that may lie on disk where host memory does not hold it (default: none)"
    )
    group.add_argument(
        "--kv-disk-dir",
        type=Path,
        metavar="DIR",
        help="folder for it, on a fast disk (default: that of temporary files)",
    )
    group.add_argument(
        "--host-threads", type=int, metavar="N", help="CPU threads that attend KV in host memory (default: planned)"
    )
    group.add_argument("--max-batch", type=int, default=8, metavar="N", help="requests that share a pass (default: 8)")
    group.add_argument(
        "--resident-layers",
        type=int,
        metavar="N",
        help="layers kept on the device (default: as many as fit; 0 streams all)",
    )
    group.add_argument(
        "--slots", type=int, metavar="N", help="layer slots of the streaming ring, at least 2 (default: planned)"
    )
    group.add_argument(
        "--chunk-tokens", type=int, metavar="N", help="prompt tokens that pass a layer at a time (default: planned)"
    )


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("kernels")
    group.add_argument(
        "--attention",
        choices=("elsa", "sdpa"),
        default="elsa",
        help="attention kernels (default: elsa); sdpa is for comparison",
    )
    group.add_argument(
        "--linear",
        choices=("torch", "elsa"),
        default="torch",
        help="float32 linear layers: torch's (default), or FP32-accurate ones on tensor cores, several times as fast",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    add_kernel_arguments(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="norms, rotary embedding and gated activations in one kernel each, where a layer's code computes just "
        "them (default: on a GPU)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="prompt tokens in a pass beside running decodes, which wait for its end (default: planned)",
    )
    group.add_argument(
        "--prefill-round-tokens",
        type=int,
        metavar="N",
        help="prompt tokens in a pass while nothing decodes, at most 32768; what a round has finished survives a "
        "timeout (default: planned, so that rounds cost nothing)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="tokens guessed from the prompt and verified in one pass, exactly; 0 is off "
        "(default: 15 where weights or KV are read from host memory, else 0)",
    )
    group.add_argument(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the KV of ended requests for prompts that begin alike, as long as nobody needs its memory "
        "(default: on)",
    )
    group.add_argument(
        "--serial", action="store_true", help="copy and compute in turn: slow, same tokens, for checking"
    )
    group.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    group.add_argument(
        "--seed", type=int, default=0, help="seed of dummy weights and of requests that bring none (default: 0)"
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `OffloadEngine` from the flags above."""
    names = (
        "dtype", "context", "load_format", "gpu_memory", "host_memory", "kv_disk", "kv_disk_dir", "host_threads",
        "max_batch", "resident_layers", "slots", "chunk_tokens", "attention", "linear", "fused", "serial", "device",
        "seed", "max_num_batched_tokens", "prefill_round_tokens", "num_speculative_tokens", "prefix_caching",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}
