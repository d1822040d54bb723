"""`elsa-serve doctor`: what this machine offers, and why a kernel is or is not among it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

HELP = "show what this machine offers: GPU, kernels with reasons, measured rates, vLLM plugin"
PACKAGES = ("elsa-serve", "torch", "triton", "transformers", "safetensors", "fastapi", "prometheus-client", "vllm")
MARK = {True: "yes", False: "no "}


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help=HELP, description=HELP)
    parser.add_argument("--measure", action="store_true", help="measure the rates again (some seconds)")
    parser.add_argument("--no-bandwidth", action="store_true", help="skip the rates, measured or kept")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the rates (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from elsa_serve.offload.machine import choose_device

    device = choose_device(args.device)
    sections: list[tuple[str, Iterator[str]]] = [
        ("software", software()),
        ("machine", machine(device)),
        ("attention kernels", kernels(device)),
        ("vLLM plugin", vllm_plugin()),
    ]
    if not args.no_bandwidth:
        dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
        sections.insert(3, (f"rates in {dtype}", measured_rates(device, dtype, args.measure)))
    for title, lines in sections:
        print(title)
        for line in lines:
            print("  " + line, flush=True)
    return 0


def software() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} not installed"


def kernels(device: Any) -> Iterator[str]:
    """For typical problems on this device: the implementation that would run, and why others would not."""
    import torch
    from elsa_kernels.registry import Problem, UnsupportedProblem, explain, select

    cases = (
        ("FP32 prefill", torch.float32, "fp32", 4096),
        ("FP32 prefill, no tensor cores", torch.float32, "ieee", 4096),
        ("FP16 prefill", torch.float16, "fp32", 4096),
        ("BF16 prefill", torch.bfloat16, "fp32", 4096),
        ("FP32 decode", torch.float32, "fp32", 1),
    )
    for title, dtype, precision, queries in cases:
        problem = Problem(
            B=1, H=32, Hkv=8, Nq=queries, Nk=4096, D=128, dtype=dtype, device=device, precision=precision,
            causal=True, scale=128**-0.5, q_start=4096 - queries,
        )  # fmt: skip
        try:
            yield f"{title}: {select(problem).name}"
        except UnsupportedProblem as error:
            yield f"{title}: none ({error})"
        for name, reason in explain(problem).items():
            yield f"    {MARK[reason is None]} {name}" + (f": {reason}" if reason else "")


def vllm_plugin() -> Iterator[str]:
    """Whether vLLM would find the plugin, whether it supports this vLLM, and whether the backend registers."""
    from elsa_serve.vllm_plugin import compat

    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        found = [e for e in importlib.metadata.entry_points(group=group) if e.value.startswith("elsa_")]
        if not found:
            yield f"{MARK[False]} {group}: not in the installed metadata; pip install elsa-serve where vLLM runs"
        for entry in found:
            try:
                entry.load()
                yield f"{MARK[True]} {group}: {entry.name} = {entry.value}"
            except Exception as error:  # a broken plugin is what the user came here to see
                yield f"{MARK[False]} {group}: {entry.name} = {entry.value}: {type(error).__name__}: {error}"
    try:
        version = compat.vllm_version()
    except ImportError:
        yield f"{MARK[False]} vLLM is not installed here: pip install 'elsa-serve[vllm]'"
        return
    if (refusal := compat.refusal(version)) is not None:
        yield f"{MARK[False]} {refusal}"
        return
    try:
        yield f"{MARK[True]} vLLM {version} takes --attention-backend elsa: {compat.registered_backend()}"
    except Exception as error:  # the same
        yield f"{MARK[False]} vLLM {version}: {type(error).__name__}: {error}"


def machine(device: Any) -> Iterator[str]:
    from elsa_serve.offload.machine import gpu_facts, host_memory
    from elsa_serve.offload.units import format_size

    memory = host_memory()
    yield f"{os.cpu_count()} CPU cores; vector instructions torch uses: {torch_cpu_capability()}"
    limit = "no cgroup limit" if memory.cgroup_limit is None else f"cgroup limit {format_size(memory.cgroup_limit)}"
    yield f"host memory {format_size(memory.total)}, {limit}, {format_size(memory.available)} available"
    if device.type != "cuda":
        yield "no GPU in use: the same engine runs on the CPU, with layers copied within host memory"
        return
    gpu = gpu_facts(device)
    capability = ".".join(map(str, gpu.capability))
    yield f"{gpu.name}, compute capability {capability}, {gpu.multiprocessors} multiprocessors"
    yield f"device memory {format_size(gpu.total)}, {format_size(gpu.free)} free"


def torch_cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def measured_rates(device: Any, dtype: str, again: bool) -> Iterator[str]:
    """What the planner knows of this machine: measured once and kept, or now."""
    from elsa_serve.offload.loading import DTYPES
    from elsa_serve.offload.measure import describe, rates

    yield from describe(rates(device, DTYPES[dtype], refresh=again))
