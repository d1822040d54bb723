"""Benchmark attention of few queries over a KV in host memory: ours beside torch's forms, against the read bandwidth.

usage: python -m kernels.bench.cpu_decode --out kernels/bench/results/cpu-decode-<machine>.json

The bandwidth beside each case is that of the same threads reading the same K and V, so caches that hold a part of them
help both. Needs no GPU; about 30 s with the defaults.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from elsa_kernels import attention
from elsa_kernels.cpu.native import library
from elsa_kernels.reference import attention_reference

from kernels.bench import results_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (query heads, key heads, queries): decode with and without groups, and tokens to verify at once.
SHAPES = ((40, 40, 1), (32, 8, 1), (40, 40, 4), (40, 40, 16))
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def aten_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
    # Its causal mask is aligned top-left: without a mask, the same work for few queries.
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


IMPLEMENTATIONS: dict[str, Call] = {
    "elsa.cpu_native": functools.partial(attention, impl="cpu_native", return_state=True),
    "elsa.cpu": functools.partial(attention, impl="cpu", return_state=True),
    "aten.flash": aten_flash,
}


def buffers(H: int, N: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [1, H, N, D], normal values."""
    torch.manual_seed(0)
    piece = torch.randn(N, D).to(dtype)
    k, v = torch.empty(1, H, N, D, dtype=dtype), torch.empty(1, H, N, D, dtype=dtype)
    for h in range(H):  # rolled copies: as good as new numbers here, and a hundred times faster to make
        k[0, h], v[0, h] = piece.roll(h + 1, 0), piece.roll(-h, 1)
    return k, v


def seconds(call: Callable[[], object], budget_s: float) -> list[float]:
    """Times of a call after a warm-up: at least one, at most fifteen, for about `budget_s`."""
    call()
    times: list[float] = []
    while not times or (len(times) < 15 and sum(times) < budget_s):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def relative_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> float:
    """‖out − ref‖ / ‖ref‖ of the first key head's group, with the first 4096 keys, the reference in FP64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q[:, :group], k[:, :1, :4096], v[:, :1, :4096]
    truth = attention_reference(q, k, v)
    result = IMPLEMENTATIONS[name](q, k, v)
    out = result[0] if isinstance(result, tuple) else result.finalize()  # type: ignore[attr-defined]
    return ((out.double() - truth).norm() / truth.norm()).item()


def measure(dtype: str, N: int, D: int, budget_s: float) -> list[results_file.Row]:
    pool = library.default_pool()
    k, v = buffers(40, N, D, DTYPES[dtype])
    rows = []
    for H, Hkv, Nq in SHAPES:
        q = torch.randn(1, H, Nq, D).to(k.dtype)
        keys, values = k[:, :Hkv], v[:, :Hkv]
        size = keys.nbytes + values.nbytes
        read = seconds(lambda a=keys[0], b=values[0]: (pool.read_seconds(a), pool.read_seconds(b)), budget_s / 2)
        for name, call in IMPLEMENTATIONS.items():
            times = seconds(lambda call=call, q=q, a=keys, b=values: call(q, a, b), budget_s)
            taken = statistics.median(times)
            row: results_file.Row = {
                "op": "decode", "impl": name, "ours": name.startswith("elsa"), "dtype": dtype, "device": "cpu",
                "threads": pool.threads if name == "elsa.cpu_native" else torch.get_num_threads(),
                "level": pool.level if name == "elsa.cpu_native" else None, "B": 1, "H": H, "Hkv": Hkv, "Nq": Nq,
                "Nk": N, "D": D, "ms": taken * 1e3, "ms_best": min(times) * 1e3, "gbps": size / taken / 1e9,
                "gbps_best": size / min(times) / 1e9, "read_gbps": size / statistics.median(read) / 1e9,
                "read_gbps_best": size / min(read) / 1e9, "tflops": 4 * H * Nq * N * D / taken / 1e12,
                "relerr": relative_error(q, keys, values, name),
            }  # fmt: skip
            rows.append(row)
            show(row)
    return rows


def show(row: results_file.Row) -> None:
    print(
        f"{row['dtype']:5} {row['H']:3}/{row['Hkv']:<3} Nq {row['Nq']:<3} {row['impl']:16} {row['ms']:9.2f} ms"
        f" {row['gbps']:6.1f} GB/s = {row['gbps'] / row['read_gbps']:4.0%} of {row['read_gbps']:.1f}"
        f"  (best {row['gbps_best']:.1f} of {row['read_gbps_best']:.1f})  {row['tflops']:.3f} TFLOP/s"
        f"  relerr {row['relerr']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="keys of each head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for one implementation on one case")
    parser.add_argument("--out", type=Path, help="results file to write")
    options = parser.parse_args()
    rows: list[results_file.Row] = []
    for dtype in options.dtypes:
        rows += measure(dtype, options.context, options.head_dim, options.budget)
        if options.out:
            results_file.write(options.out, rows)


if __name__ == "__main__":
    main()
