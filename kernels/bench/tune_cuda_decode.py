"""Find the forms of the CUDA C++ decode on this GPU and write them into a table like tuning/paged_cuda.json.

A form is kept where the geometric mean of its speeds, each relative to the Triton kernel's in the same case, is the
largest and above 1; a kind without one is left out, and Triton's kernel runs.

python -m kernels.bench.tune_cuda_decode --table kernels/elsa_kernels/tuning/paged_cuda.json --log tune.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import multiprocessing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from elsa_kernels.cuda import nvrtc
from elsa_kernels.paged import cuda_decode
from elsa_kernels.paged.cuda_decode import Form
from elsa_kernels.paged.problem import PagedProblem

from kernels.bench import decode, measure
from kernels.bench.run import GATE

CASES = {
    "16": [
        decode.DecodeCase("float16", 1, 32, 8, 32768),
        decode.DecodeCase("float16", 8, 32, 8, 32768),
        decode.DecodeCase("float16", 1, 32, 8, 131072),
        decode.DecodeCase("float16", 1, 32, 8, 4096),
    ],
    "8": [
        decode.DecodeCase("float16", 1, 32, 8, 32768, kv="float8_e4m3fn"),
        decode.DecodeCase("float16", 8, 32, 8, 32768, kv="float8_e4m3fn"),
    ],
    "32x4": [decode.DecodeCase("float32", 1, 32, 8, 32768), decode.DecodeCase("float32", 8, 32, 8, 32768)],
    "32x8": [decode.DecodeCase("float32", 1, 64, 8, 32768)],
}
CANDIDATES = {
    "16": [
        Form(8, 2048, 1, longest=4096), Form(10, 2240, 1, longest=4480), Form(8, 1024, 1, longest=4096),
        Form(8, 2048, 1, step=2, longest=4096, conductor=False),
    ],
    "8": [
        Form(11, 2112, 1, step=2, longest=4224), Form(8, 2048, 1, step=2, longest=4096), Form(8, 2048, 1, longest=4096),
        Form(8, 2048, 1, step=2, longest=4096, conductor=False),
    ],
    "32x4": [
        Form(8, 2048, 1, 4), Form(8, 1024, 1, 4), Form(8, 2048, 1, 4, conductor=False),
        Form(4, 1024, 3, 4, conductor=False),
    ],
    "32x8": [Form(4, 1024, 2, conductor=False), Form(4, 512, 2, conductor=False)],
}  # fmt: skip


def compile_form(job: tuple[str, Form, int]) -> str | None:
    """In a process of its own, into the cache on disk. Returns why the form is out, or None."""
    kind, form, arch = job
    case = CASES[kind][0]
    dtype, kv_dtype = getattr(torch, case.dtype), getattr(torch, case.kv or case.dtype)
    problem = PagedProblem(
        T=1, B=1, H=case.H, Hkv=case.Hkv, D=case.D, page=case.page, dtype=dtype, kv_dtype=kv_dtype,
        device=torch.device("cpu"), precision="fp32", causal=True, scale=1.0, window=None, softcap=None,
        max_seqlen_q=1, max_seqlen_k=1,
    )  # fmt: skip
    try:
        nvrtc.cached_cubin(cuda_decode.source(dtype), arch, form.defines(problem))
    except nvrtc.CompilationFailed as failure:
        return str(failure).splitlines()[-1]
    return None


def speed(case: decode.DecodeCase, sets: list[decode.Inputs], forms: dict[str, Form]) -> float:
    """TB/s with these forms; without any, of Triton's kernel."""
    with mock.patch.object(cuda_decode, "forms", return_value=forms):
        call = decode.ours(case)
        for x in sets:
            x.room.clear()
        error = decode.relative_error(case, sets[0], call(sets[0]))
        if not error <= GATE[case.dtype]:
            raise ValueError(f"relative error {error:.1e} is beyond {GATE[case.dtype]:.0e}")
        timed = measure.Timed([functools.partial(call, x) for x in sets], graph=True, budget_ms=20.0)
        for _ in range(2):
            timed.round()
    return case.kv_bytes() / timed.median_ms() / 1e9


def best(kind: str, candidates: list[Form], rows: list[dict[str, Any]]) -> Form | None:
    """Measure and choose, and leave the measurements in `rows`."""
    scores = dict.fromkeys(candidates, 0.0)
    for case in CASES[kind]:
        sets = [decode.draw(case, seed) for seed in range(measure.sets_to_rotate(case.kv_bytes()))]
        triton = speed(case, sets, {})
        print(f"{case}\n  {triton:.2f} TB/s Triton", flush=True)
        rows.append({"kind": kind, "case": asdict(case), "form": None, "tbps": triton})
        for form in candidates:
            found = speed(case, sets, {kind: form})
            scores[form] += math.log(found / triton)
            print(f"  {found:.2f} TB/s {form}", flush=True)
            rows.append({"kind": kind, "case": asdict(case), "form": asdict(form), "tbps": found})
        del sets
        gc.collect()
        torch.cuda.empty_cache()
    form = max(scores, key=lambda form: scores[form])
    return form if scores[form] > 0.0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="the table to rewrite")
    parser.add_argument("--log", type=Path, help="where all measurements go, as JSON")
    parser.add_argument("--processes", type=int, default=15, help="that compile, at a time")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    jobs = [(kind, form, 10 * major + minor) for kind, found in CANDIDATES.items() for form in found]
    good: dict[str, list[Form]] = {kind: [] for kind in CANDIDATES}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for (kind, form, _), reason in zip(jobs, pool.imap(compile_form, jobs)):
            if reason is None:
                good[kind].append(form)
            else:
                print(f"out: {kind} {form}: {reason}", flush=True)
    rows: list[dict[str, Any]] = []
    chosen: dict[str, Form] = {}
    for kind, candidates in good.items():
        form = best(kind, candidates, rows)
        if form is not None:
            chosen[kind] = form
        lines = ",\n".join(f'  "{kind}": {json.dumps(asdict(form))}' for kind, form in chosen.items())
        options.table.write_text(f"{{\n{lines}\n}}\n")
        if options.log:
            options.log.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
