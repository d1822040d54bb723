"""Temporary: variants of paged decode, interleaved."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from elsa_kernels.cuda import nvrtc
from elsa_kernels.paged import cuda_decode
from elsa_kernels.paged.problem import PagedProblem

from kernels.bench import decode, measure
from kernels.bench.decode import DecodeCase
from kernels.bench.run import GATE

VARIANTS = {
    "shipped": "shipped",
    "a": "a",
    "b": "b",
    "NT4": "X_TAIL=4 X_FAR=2",
}
STAMPED = ()
START = time.time()
LIMIT = float(os.environ.get("LIMIT", "75"))


def problem_of(case: DecodeCase) -> PagedProblem:
    return PagedProblem(
        T=1, B=1, H=case.H, Hkv=case.Hkv, D=case.D, page=case.page, dtype=getattr(torch, case.dtype),
        kv_dtype=getattr(torch, case.kv or case.dtype), device=torch.device("cpu"), precision="fp32", causal=True,
        scale=1.0, window=None, softcap=None, max_seqlen_q=1, max_seqlen_k=1,
    )  # fmt: skip


def compile_one(job: tuple[str, str, DecodeCase]) -> str:
    variant, stamp, case = job
    os.environ["ELSA_TRY"], os.environ["ELSA_STAMP"] = VARIANTS[variant], stamp
    problem = problem_of(case)
    nvrtc.cached_cubin(cuda_decode.source(problem.dtype), 90, cuda_decode.form_of(problem).defines(problem))
    return variant


def choose(variant: str, stamp: str = "0") -> None:
    os.environ["ELSA_TRY"], os.environ["ELSA_STAMP"] = VARIANTS[variant], stamp
    cuda_decode._kernel.cache_clear()


def stamps(case: DecodeCase, sets: list[decode.Inputs], variant: str) -> dict[str, object]:
    choose(variant, "1")
    rooms = [torch.zeros(132 * 16, dtype=torch.int64, device="cuda") for _ in sets]
    turn = iter(rooms * 100)
    plain = cuda_decode.parameters

    def parameters(*a, **k):
        p = plain(*a, **k)
        p.lse = next(turn).data_ptr()
        return p

    cuda_decode.parameters = parameters
    try:
        call = decode.ours(case)
        for x in sets:
            call(x)
        graph = torch.cuda.CUDAGraph()
        turn = iter(rooms)
        with torch.cuda.graph(graph):
            for x in sets:
                call(x)
        found: list[list[list[int]]] = [[] for _ in sets]
        for _ in range(20):
            for room in rooms:
                room.zero_()
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            for at, room in enumerate(rooms):
                found[at].append(room.view(132, 16).tolist())
    finally:
        cuda_decode.parameters = plain
    out = {}
    for at in range(len(sets)):
        lines = []
        for run in found[at]:
            blocks = [b for b in run if b[7]]
            base = 1  # from where the kernel ahead is done
            row = {}
            for i, name in ((2, "K asked or length"), (3, "ready"), (4, "q there"), (5, "warp 0 done"), (11, "warp 0 left"), (6, "all left"), (7, "put")):
                v = sorted(b[i] - b[base] for b in blocks)
                row[name] = (v[0], v[len(v) // 2], v[-1])
            for to, since, name in ((11, 5, "leave"), (7, 6, "gather, put")):
                v = sorted(b[to] - b[since] for b in blocks)
                row[name] = (v[0], v[len(v) // 2], v[-1])
            v = sorted(b[8] - b[7] for b in blocks if b[8])
            row["count"] = (v[0], v[len(v) // 2], v[-1])
            last = [b for b in blocks if b[9]]
            v = sorted(b[9] - b[7] for b in last)
            row["count, last"] = (v[0], v[len(v) // 2], v[-1])
            v = sorted(b[10] - b[9] for b in last if b[10])
            row["merge"] = (v[0], v[len(v) // 2], v[-1])
            v = sorted(b[10] - b[base] for b in last if b[10])
            row["end"] = (v[0], v[len(v) // 2], v[-1])
            lines.append(row)
        out[f"call {at}"] = {n: [statistics.median(r[n][j] for r in lines) for j in range(3)] for n in lines[0]}
    return out


def main() -> None:
    out_dir = Path(os.environ["OUT_DIR"])
    jobs = [(v, "0", c) for c in (CASES["B1 32K"], CASES["40/40"], CASES["FP8 B1"], CASES["FP32 40/40"]) for v in VARIANTS]
    jobs += [(v, "1", CASES["B1 32K"]) for v in STAMPED]
    with multiprocessing.get_context("fork").Pool(15) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    print(f"compiled {len(jobs)} in {time.time() - START:.0f} s", nvrtc.version(), flush=True)
    table: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    for name, case in CASES.items():
        if time.time() - START > LIMIT:
            print("out of time before", name)
            break
        sets = [decode.draw(case, seed) for seed in range(measure.sets_to_rotate(case.kv_bytes()))]
        timed: dict[str, measure.Timed] = {}
        first = None
        for variant in VARIANTS:
            choose(variant)
            call = decode.ours(case)
            sets[0].out.fill_(float("nan"))
            result = call(sets[0]).clone()
            error = decode.relative_error(case, sets[0], result, heads=2)
            if not error <= GATE[case.dtype]:
                notes.append(f"WRONG {name} {variant} {error:.1e}")
                continue
            again = [torch.equal(call(sets[0]), result) for _ in range(3)]
            if first is None:
                first = result
            differs = "" if torch.equal(first, result) else f" {int((first != result).sum())} of {result.numel()} differ"
            notes.append(f"{name} {variant} relerr {error:.2e}{differs}{'' if all(again) else ' NOT REPEATABLE'}")
            timed[variant] = measure.Timed([functools.partial(call, x) for x in sets], graph=True, budget_ms=8.0)
        for turn in range(ROUNDS.get(name, 5)):
            order = list(timed)
            order = order[turn % len(order) :] + order[: turn % len(order)]
            for variant in order:
                timed[variant].round()
        table[name] = {v: t.median_ms() * 1e3 for v, t in timed.items()}
        print(f"{time.time() - START:5.0f} s {name:10}", {v: round(us, 2) for v, us in table[name].items()}, flush=True)
        if name == "B1 32K":
            for variant in STAMPED:
                found = stamps(case, sets, variant)
                (out_dir / f"stamps-{variant}.json").write_text(json.dumps(found))
                print(variant, "cycles after the wait: first, median, last block")
                for part in found["call 0"]:
                    print(f"  {part:18}", *(found[c][part] for c in found))
        del sets, timed
        gc.collect()
        torch.cuda.empty_cache()
        (out_dir / "times.json").write_text(json.dumps(table))
    (out_dir / "notes.txt").write_text("\n".join(notes))
    print("\n".join(n for n in notes if "WRONG" in n or "NOT" in n or "differ" in n))
    print(f"{'TB/s':10}", *(f"{n:>10}" for n in table))
    for variant in VARIANTS:
        cells = [CASES[n].kv_bytes() / table[n][variant] / 1e6 if variant in table[n] else float("nan") for n in table]
        print(f"{variant:10}", *(f"{c:10.3f}" for c in cells))


if __name__ == "__main__":
    sys.exit(main())
