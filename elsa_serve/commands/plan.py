"""`elsa-serve plan`: what fits where, and how fast it will be, without loading a weight."""

from __future__ import annotations

import argparse
from typing import Any

from elsa_serve.arguments import add_kernel_arguments, add_memory_arguments, add_model_arguments, check_model

HELP = "show what fits where at which context, and why, without loading anything"
EPILOG = (
    "examples:\n  elsa-serve plan ./llama-13b --gpu-memory 24GiB --host-memory 100GiB --context 131072 --dtype float16"
)


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help=HELP, description=HELP, epilog=EPILOG)
    add_model_arguments(parser)
    add_memory_arguments(parser)
    add_kernel_arguments(parser)
    parser.add_argument("--device", help="plan for cuda (also on a machine without one) or cpu (default: what is here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_model(args)
    from elsa_serve.offload.loading import EngineOptions, plan_only
    from elsa_serve.offload.plan_text import render

    names = (
        "device", "dtype", "gpu_memory", "host_memory", "kv_disk", "host_threads", "context", "max_batch",
        "resident_layers", "slots", "chunk_tokens", "load_format", "attention", "linear",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    print(render(plan_only(EngineOptions(model_dir=args.model, **options))))
    return 0
