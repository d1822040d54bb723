"""Speed of our kernels and of the peers in one process: correctness first, then time.

python -m kernels.bench.run --suites fp32 half --output kernels/bench/results/attention-h200.json
"""

from __future__ import annotations

import argparse
import gc
import sys

import torch
from elsa_kernels.registry import UnsupportedProblem

from kernels.bench import inputs, measure, peers, results_file
from kernels.bench.cases import SUITES, Case

# A result further off than this is wrong, not fast.
GATE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
ROUNDS = 3
GRAPH_BELOW_FLOPS = 1e11  # smaller cases are timed as CUDA graphs, or the host's launches would be measured


def prepare(name: str, case: Case, sets: list[inputs.Tensors]) -> tuple[measure.Timed, float]:
    """Check one implementation on one case and warm it up. Raises UnsupportedProblem, ValueError or RuntimeError."""
    call = peers.make(name, case)
    shaped = [tuple(peers.layout(name, x) for x in tensors) for tensors in sets]
    with peers.context(name):
        error = inputs.relative_error(case, sets[0], call(*shaped[0]))
        if not error <= GATE[case.dtype]:
            raise ValueError(f"relative error {error:.1e} is beyond {GATE[case.dtype]:.0e}")
        calls = [lambda t=tensors: call(*t) for tensors in shaped]
        timed = measure.Timed(calls, graph=case.flops() < GRAPH_BELOW_FLOPS)
    return timed, error


def run_case(case: Case, only: list[str] | None, ceilings: dict[str, float]) -> list[results_file.Row]:
    """Rows of all implementations that take the case, their rounds interleaved so that all see the same card."""
    sets = [inputs.draw(case, seed=s) for s in range(measure.sets_to_rotate(case.input_bytes()))]
    prepared: dict[str, tuple[measure.Timed, float]] = {}
    for name in only or peers.names(case):
        try:
            prepared[name] = prepare(name, case, sets)
        except (UnsupportedProblem, RuntimeError, ValueError) as refusal:
            print(f"  {name}: {str(refusal).splitlines()[0]}", file=sys.stderr)
    for _ in range(ROUNDS):
        for name, (timed, _error) in prepared.items():
            with peers.context(name):
                timed.round()
    return [_row(case, name, timed, error, ceilings) for name, (timed, error) in prepared.items()]


def _row(case: Case, name: str, timed: measure.Timed, error: float, ceilings: dict[str, float]) -> results_file.Row:
    ms = timed.median_ms()
    tflops = case.flops() / ms / 1e9
    row = case.row() | {
        "impl": name,
        "ours": peers.is_ours(name),
        "ms": round(ms, 5),
        "tflops": round(tflops, 2),
        "relerr": float(f"{error:.3g}"),
        "family": "normal",
        "graph": timed.graph is not None,
        "percent_of_ceiling": round(100.0 * tflops / ceilings[case.dtype], 1),
    }
    if name == "elsa.cuda_ieee":
        row |= {"precision": "ieee", "percent_of_ceiling": round(100.0 * tflops / ceilings["ieee"], 1)}
    return row


def measured_ceilings() -> tuple[dict[str, float], list[results_file.Row]]:
    """What matrix products sustain, in useful TFLOP/s: FP32 accuracy takes three FP16 products for one."""
    gemm = {dtype: measure.gemm_ceiling(getattr(torch, dtype)) for dtype in ("float16", "bfloat16", "float32")}
    rows = [{"op": "gemm", "impl": "cublas", "ours": False, "dtype": d, "tflops": round(t, 1)} for d, t in gemm.items()]
    return gemm | {"float32": gemm["float16"] / 3, "ieee": gemm["float32"]}, rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--impls", nargs="+", help="names of rows, such as elsa.gluon; default: all that apply")
    parser.add_argument("--longest", type=int, help="leave out cases of more query rows")
    parser.add_argument("--output", help="results file to write")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has of other implementations")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    if options.add and not (options.impls and options.output):
        parser.error("--add needs --impls and --output")
    ceilings, rows = measured_ceilings()
    if options.add:
        rows = results_file.others(options.output, options.impls)
    print({name: round(value) for name, value in ceilings.items()})
    for suite in options.suites:
        for case in SUITES[suite]:
            if options.longest and case.Nq > options.longest:
                continue
            print(case, flush=True)
            for row in run_case(case, options.impls, ceilings):
                rows.append(row)
                print(
                    f"  {row['impl']:20} {row['tflops']:7.1f} TFLOP/s {row['ms']:9.4f} ms  relerr {row['relerr']:.1e}"
                )
            gc.collect()
            torch.cuda.empty_cache()
            if options.output:
                results_file.write(options.output, rows)


if __name__ == "__main__":
    main()
