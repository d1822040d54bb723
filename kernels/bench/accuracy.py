"""Error against float64 over lengths and families of inputs, for ours and for the peers.

python -m kernels.bench.accuracy --output kernels/bench/results/accuracy-h200.json
"""

from __future__ import annotations

import argparse

import elsa_kernels
import torch
from elsa_kernels.registry import UnsupportedProblem
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench import inputs, peers, results_file
from kernels.bench.cases import ACCURACY_LENGTHS, FAMILIES, Case

MATH_LIMIT = 2 << 30  # bytes of logits
HEADS = 2
QUERIES = 256  # rows computed: the last ones, which see most keys


def contenders() -> dict[str, object]:
    """Name → call (q, k, v) in float32."""

    def ours(impl: str, precision: str):
        return lambda q, k, v: elsa_kernels.attention(q, k, v, precision=precision, impl=impl)

    def sdpa(backend: SDPBackend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return call

    def authors(q, k, v):
        # It takes as many queries as keys: the ones asked for come last.
        call = peers.make("authors", Case("float32", False, *q.shape[:2], k.shape[2], q.shape[3]))
        longer = torch.cat([torch.zeros_like(k[:, :, q.shape[2] :]), q], 2)
        return call(longer, k, v)[:, :, k.shape[2] - q.shape[2] :]

    return {
        "elsa.gluon": ours("gluon", "fp32"),
        "elsa.triton": ours("triton", "fp32"),
        "elsa.cuda_ieee": ours("cuda_ieee", "ieee"),
        "sdpa.mem_efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa.math": sdpa(SDPBackend.MATH),
        "authors": authors,
        "elsa.triton.tf32": ours("triton", "tf32"),
    }


def rows_of(case: Case, family: str, impls: list[str]) -> list[results_file.Row]:
    tensors = inputs.draw(case, family)
    rows = []
    for name, call in contenders().items():
        if name not in impls:
            continue
        if name == "sdpa.math" and 4 * case.H * case.Nq * case.Nk > MATH_LIMIT:
            continue
        try:
            out = call(*tensors)  # type: ignore[operator]
        except UnsupportedProblem as refusal:
            print(f"  {name}: {refusal}")
            continue
        error = inputs.relative_error(case, tensors, out, rows=32)
        precision = {"elsa.cuda_ieee": "ieee", "elsa.triton.tf32": "tf32"}.get(name, "fp32")
        ours = name.startswith("elsa.")
        rows.append(
            case.row()
            | {"op": "accuracy", "impl": name, "ours": ours, "precision": precision, "family": family}
            | {"relerr": float(f"{error:.3g}")}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(ACCURACY_LENGTHS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--impls", nargs="+", choices=list(contenders()), default=list(contenders()))
    parser.add_argument("--output", help="results file to write")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has of other implementations")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("the implementations compared run on a CUDA device")
    if options.add and not options.output:
        parser.error("--add needs --output")
    rows = results_file.others(options.output, options.impls) if options.add else []
    for D in options.head_dims:
        for family in options.families:
            for N in options.lengths:
                case = Case("float32", False, 1, HEADS, min(N, QUERIES), D, Nk=N)
                found = rows_of(case, family, options.impls)
                rows += found
                print(D, family, N, {row["impl"]: row["relerr"] for row in found}, flush=True)
                if options.output:
                    results_file.write(options.output, rows)


if __name__ == "__main__":
    main()
