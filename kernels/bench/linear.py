"""Benchmark FP32 linear layers: ours beside torch's FP32, TF32 and three FP16 products, with error against FP64.

usage: python -m kernels.bench.linear --out kernels/bench/results/linear-h200.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from elsa_kernels import linear as elsa

# (M, N, K): the shapes of LLaMA-13B's layers at 8K and 32K tokens, and in decoding.
TALL = ((8192, 13824, 5120), (32768, 15360, 5120), (32768, 5120, 13824), (8192, 5120, 5120))
SKINNY = tuple((m, n, k) for m in (1, 4, 16) for n, k in ((15360, 5120), (13824, 5120), (5120, 13824)))
FAMILIES = ("normal", "positive", "outliers", "tiny", "huge")


def operands(M: int, N: int, K: int, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(M, K, device="cuda")
    w = torch.randn(N, K, device="cuda")
    if family == "positive":
        return x.abs_(), w.abs_()
    if family == "outliers":
        x[:, 5::997] *= 1e4
    elif family in ("tiny", "huge"):
        x *= 1e-4 if family == "tiny" else 1e4
    return x, w


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def three_products(x: torch.Tensor, split: elsa.SplitMatrix) -> torch.Tensor:
    """What anybody can build of cuBLAS: the same split, summed inside the tensor core over all of K."""
    xs = elsa.split_rows(x)
    out = torch.mm(xs.lo, split.hi.t(), out_dtype=torch.float32)
    out += torch.mm(xs.hi, split.lo.t(), out_dtype=torch.float32)
    out += torch.mm(xs.hi, split.hi.t(), out_dtype=torch.float32)
    return torch.ldexp(out, xs.exponent[:, None] + split.exponent[None, :])


def implementations(x: torch.Tensor, w: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    split = elsa.split_weight(w)

    def torch_tf32() -> torch.Tensor:
        with tf32(True):
            return F.linear(x, w)

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch.fp32": lambda: F.linear(x, w),
        "torch.tf32": torch_tf32,
        "elsa.triton": lambda: elsa.linear(x, split, impl="triton"),
    }
    if x.shape[0] > 32:
        calls["three_fp16_products"] = lambda: three_products(x, split)
        calls["elsa.gluon"] = lambda: elsa.linear(x, split, impl="gluon")
    return calls


def relative_error(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ over up to 64 rows, the reference in FP64."""
    rows = torch.randperm(x.shape[0], device=x.device)[:64]
    reference = x[rows].double() @ w.double().t()
    return ((out[rows].double() - reference).norm() / reference.norm()).item()


def median_ms(call: Callable[[], object], runs: int) -> float:
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")  # twice the L2: every run reads from memory
    times = []
    for _ in range(runs + 2):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[runs // 2]


def measure(M: int, N: int, K: int, family: str, timed: bool) -> Iterator[dict]:
    x, w = operands(M, N, K, family)
    for name, call in implementations(x, w).items():
        error = relative_error(call(), x, w)
        row = {"op": "linear", "impl": name, "ours": name.startswith("elsa."), "dtype": "float32"}
        row |= {"precision": "tf32" if name == "torch.tf32" else "fp32", "M": M, "N": N, "K": K}
        row |= {"family": family, "relerr": error}
        if timed:
            ms = median_ms(call, 10 if M > 32 else 30)
            row |= {"ms": ms, "tflops": 2.0 * M * N * K / ms / 1e9, "tbps": 4.0 * N * K / ms / 1e9}
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results file to write")
    args = parser.parse_args()
    from kernels.bench import results_file

    rows: list[dict] = []
    for shape in TALL + SKINNY:
        for family in FAMILIES if shape == TALL[0] else FAMILIES[:1]:
            for row in measure(*shape, family, timed=family == "normal"):
                rows.append(row)
                speed = f"{row['tflops']:7.1f} TFLOP/s {row['tbps']:5.2f} TB/s" if "ms" in row else ""
                print(f"{shape} {family:9} {row['impl']:20} relerr {row['relerr']:.1e} {speed}", flush=True)
    K = 32768
    for family in FAMILIES[:2]:
        rows += measure(1024, 1024, K, family, timed=False)
    results_file.write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
