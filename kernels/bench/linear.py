"""Benchmark FP32 linear layers: ours beside torch's FP32, TF32 and three FP16 products, with error against FP64.

usage: python -m kernels.bench.linear --out kernels/bench/results/linear-h200.json

Rows with `ms` are timed. Up to 32 rows of x, where reading the weight is the work, weights rotate past the L2 cache
and every implementation runs as replays of a CUDA graph of 16 calls or so, as a decoding step has layers, which
leaves the host and the graph's start out; beyond, call by call. `tbps` counts the weight's FP32 bytes; `read_tbps` is
what a sum over 2 GiB read just before and after that shape. Rows without `ms` are the proof: every input family at K
up to 32768. The error of one row of x is luck, within a factor of two; so x and the weight are drawn anew until
`ROWS_SEEN` rows have been compared: `relerr` is the root mean square of the draws' errors, `over_torch` the share of
the draws in which torch's FP32 was nearer to FP64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from elsa_kernels import linear as elsa
from elsa_kernels.cuda import linear_few

from kernels.bench import measure, results_file

# (M, N, K): the shapes of LLaMA-13B's layers at 8K and 32K tokens, and in decoding.
TALL = ((8192, 13824, 5120), (32768, 15360, 5120), (32768, 5120, 13824), (8192, 5120, 5120))
FEW = tuple(
    (m, n, k) for n, k in ((15360, 5120), (5120, 5120), (13824, 5120), (5120, 13824)) for m in (1, 2, 4, 8, 16, 32)
)
PROOF = tuple((m, 1024, k) for m in (1, 4, 16, 32, 1024) for k in (1024, 5120, 13824, 32768))
FAMILIES = ("normal", "positive", "outliers", "tiny", "huge")
ROWS_SEEN = 256  # in a cell of the proof, at least
ROWS_A_DRAW = 64  # compared, at most
BUDGET_MS = 60.0  # of samples
ROUNDS = 3  # in which implementations take turns, where a weight is read
GRAPH_CALLS = 16  # at least

Operands = tuple[torch.Tensor, torch.Tensor, elsa.SplitMatrix]  # x, weight, the weight split


def operands(M: int, N: int, K: int, family: str, device: str = "cuda") -> Operands:
    x = torch.randn(M, K, device=device)
    w = torch.randn(N, K, device=device)
    if family == "positive":
        x, w = x.abs_(), w.abs_()
    elif family == "outliers":
        x[:, 5::997] *= 1e4
    elif family in ("tiny", "huge"):
        x *= 1e-30 if family == "tiny" else 1e30
    return x, w, elsa.split_weight(w)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def torch_tf32(x: torch.Tensor, w: torch.Tensor, split: elsa.SplitMatrix) -> torch.Tensor:
    with tf32(True):
        return F.linear(x, w)


def three_products(x: torch.Tensor, w: torch.Tensor, split: elsa.SplitMatrix) -> torch.Tensor:
    """What anybody can build of cuBLAS: the same split, summed inside the tensor core over all of K."""
    xs = elsa.split_rows(x)
    out = torch.mm(xs.lo, split.hi.t(), out_dtype=torch.float32)
    out += torch.mm(xs.hi, split.lo.t(), out_dtype=torch.float32)
    out += torch.mm(xs.hi, split.hi.t(), out_dtype=torch.float32)
    return torch.ldexp(out, xs.exponent[:, None] + split.exponent[None, :])


def ours(impl: str) -> Callable[..., torch.Tensor]:
    return lambda x, w, split: elsa.linear(x, split, impl=impl)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "torch.fp32": lambda x, w, split: F.linear(x, w),
    "torch.tf32": torch_tf32,
    "three_fp16_products": three_products,
    "elsa.triton": ours("triton"),
    "elsa.gluon": ours("gluon"),
    "elsa.cuda": ours("cuda"),
}


def names(M: int) -> list[str]:
    left_out = {"elsa.gluon", "three_fp16_products"} if M <= elsa.SKINNY else {"elsa.cuda"}
    left_out |= {"elsa.cuda"} if M > linear_few.MAX_ROWS else set()
    return [name for name in CALLS if name not in left_out]


def relative_errors(outs: Sequence[torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """‖out − ref‖ / ‖ref‖ of each, over the same up to ROWS_A_DRAW rows, the reference in FP64."""
    rows = torch.randperm(x.shape[0], device=x.device)[:ROWS_A_DRAW]
    reference = x[rows].double() @ w.double().t()
    return torch.stack([(out[rows].double() - reference).norm() for out in outs]) / reference.norm()


def row(name: str, shape: Sequence[int], family: str, error: float) -> dict:
    M, N, K = shape
    found = {"op": "linear", "impl": name, "ours": name.startswith("elsa."), "dtype": "float32"}
    found |= {"precision": "tf32" if name == "torch.tf32" else "fp32", "M": M, "N": N, "K": K}
    return found | {"family": family, "relerr": error}


def timed_rows(shape: tuple[int, int, int]) -> Iterator[dict]:
    M, N, K = shape
    few = M <= elsa.SKINNY
    rounds = ROUNDS if few else 1
    sets = [operands(*shape, "normal") for _ in range(measure.sets_to_rotate(4 * N * K) if few else 1)]
    timed, errors = {}, {}
    for name in names(M):
        calls = [lambda inputs=inputs, call=CALLS[name]: call(*inputs) for inputs in sets]
        errors[name] = relative_errors([calls[0]()], *sets[0][:2]).item()
        if few:
            calls *= -(-GRAPH_CALLS // len(calls))
        timed[name] = measure.Timed(calls, graph=few, budget_ms=BUDGET_MS / rounds)
    read = [measure.read_tbps()] if few else []
    for _ in range(rounds):
        for one in timed.values():
            one.round()
    if few:
        read.append(measure.read_tbps())
    for name, one in timed.items():
        ms = one.median_ms()
        speed = {"ms": ms, "tflops": 2.0 * M * N * K / ms / 1e9, "tbps": 4.0 * N * K / ms / 1e9, "graph": few}
        speed |= {"read_tbps": sum(read) / 2} if few else {}
        yield row(name, shape, "normal", errors[name]) | speed


def proof_rows(shape: tuple[int, int, int], family: str, device: str = "cuda") -> Iterator[dict]:
    """A cell of the proof: every implementation on the same draws."""
    M = shape[0]
    draws = -(-ROWS_SEEN // min(M, ROWS_A_DRAW))
    errors = torch.empty(draws, len(names(M)), dtype=torch.float64, device=device)
    for i in range(draws):
        inputs = operands(*shape, family, device)
        errors[i] = relative_errors([CALLS[name](*inputs) for name in names(M)], *inputs[:2])
    pooled = errors.square().mean(0).sqrt().tolist()
    over = (errors > errors[:, [names(M).index("torch.fp32")]]).double().mean(0).tolist()
    for name, error, share in zip(names(M), pooled, over, strict=True):
        yield row(name, shape, family, error) | {"draws": draws, "over_torch": share}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results file to write")
    parser.add_argument("--only", choices=("tall", "few", "proof"), action="append", help="parts (default: all)")
    args = parser.parse_args()
    parts: dict[str, Iterator[dict]] = {
        "tall": itertools.chain.from_iterable(map(timed_rows, TALL)),
        "few": itertools.chain.from_iterable(map(timed_rows, FEW)),
        "proof": itertools.chain.from_iterable(itertools.starmap(proof_rows, itertools.product(PROOF, FAMILIES))),
    }
    rows: list[dict] = []
    for part in args.only or parts:
        for found in parts[part]:
            rows.append(found)
            speed = f"{found['tflops']:7.1f} TFLOP/s {found['tbps']:5.2f} TB/s" if "ms" in found else ""
            shape = f"{found['M']} × {found['N']} × {found['K']}"
            print(f"{shape:22} {found['family']:9} {found['impl']:20} relerr {found['relerr']:.1e} {speed}", flush=True)
        results_file.write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
