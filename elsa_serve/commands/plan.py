"""`elsa-serve plan`: what fits where, and how fast it will be, without loading a weight."""

from __future__ import annotations

import argparse
from typing import Any

from elsa_serve.arguments import add_memory_arguments, add_model_arguments
from elsa_serve.errors import UsageError

HELP = "show what fits where at which context, and why, without loading anything"
EPILOG = (
    "examples:\n  elsa-serve plan ./llama-13b --gpu-memory 24GiB --host-memory 100GiB --context 131072 --dtype float16"
)


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("plan", help=HELP, description=HELP, epilog=EPILOG)
    add_model_arguments(parser)
    add_memory_arguments(parser)
    parser.add_argument("--device", help="plan for cuda (also on a machine without one) or cpu (default: what is here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from elsa_serve.offload import machine
    from elsa_serve.offload.checkpoint import load_config
    from elsa_serve.offload.plan import Geometry, make_plan, render
    from elsa_serve.offload.units import parse_size
    from elsa_serve.offload.weights import choose_dtype

    config = load_config(args.model)
    dtype = choose_dtype(args.dtype if args.dtype == "auto" else getattr(torch, args.dtype), config, None)
    device = machine.choose_device(args.device, present=False)
    here = device.type != "cuda" or torch.cuda.is_available()
    if not here and args.gpu_memory is None:
        raise UsageError("this machine has no GPU to take the budget from: pass --gpu-memory, such as 24GiB")
    gpu = parse_size(args.gpu_memory) if args.gpu_memory else machine.default_gpu_budget(device)
    host = parse_size(args.host_memory) if args.host_memory else machine.default_host_budget(device, gpu)
    plan = make_plan(
        Geometry.from_config(config, dtype),
        gpu_budget=gpu,
        host_budget=host,
        context=args.context,
        batch=args.max_batch,
        resident_layers=args.resident_layers,
        slots=args.slots,
        chunk_tokens=args.chunk_tokens,
        device_type=device.type,
        rates=machine.rates(device, dtype) if here else None,
    )
    print(render(plan))
    return 0
