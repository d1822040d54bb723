"""Find the decode tiles of this GPU and write them into a table like tuning/paged.json.

Candidates are compiled in parallel, then timed one after another on the cases of their kind, each against the best of
its case; the tile with the largest geometric mean wins. Nothing is tuned while serving.

python -m kernels.bench.tune_decode --table kernels/elsa_kernels/tuning/paged.json --log tune.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from elsa_kernels.devices import architecture
from elsa_kernels.paged import tuning
from elsa_kernels.paged.tuning import DecodeTile

from kernels.bench import decode, measure
from kernels.bench.run import GATE

Job = tuple[str, DecodeTile]
CASES = {
    "lanes.32": [decode.DecodeCase("float32", 1, 40, 40, 32768)],
    "lanes.16": [decode.DecodeCase("float16", 1, 40, 40, 32768)],
    "dot16.half": [
        decode.DecodeCase("float16", 1, 32, 8, 32768),
        decode.DecodeCase("float16", 8, 32, 8, 32768),
        decode.DecodeCase("float16", 1, 32, 8, 131072),
    ],
    "dot16.fp32": [decode.DecodeCase("float32", 1, 32, 8, 32768)],
}
# (BN, CHUNK, num_warps, num_stages, FAN, merge_rows, registers)
CANDIDATES = {
    "lanes.32": [(16, 512, 2, 3), (16, 1024, 2, 3), (8, 512, 1, 1), (16, 512, 2, 2)],
    "lanes.16": [
        (32, 1024, 4, 1, 8, 4, 128), (16, 1024, 2, 1, 8, 4, 128), (32, 512, 4, 1, 8, 4, 128),
        (32, 2048, 4, 1, 8, 4, 128), (16, 1024, 1, 3), (16, 1024, 1, 2), (32, 1024, 4, 1), (16, 1024, 4, 1, 8, 4, 96),
        (32, 1024, 2, 1, 8, 4, 168), (16, 1024, 1, 3, 8, 4, 168),
    ],
    "dot16.half": [
        (32, 512, 2, 3), (32, 1024, 2, 3), (64, 512, 2, 2), (64, 1024, 2, 2), (64, 1024, 2, 3), (32, 512, 2, 4),
        (32, 1024, 2, 4), (16, 512, 1, 3), (16, 1024, 1, 3), (64, 512, 4, 3), (64, 1024, 4, 3), (128, 1024, 4, 2),
        (32, 512, 2, 3, 16), (32, 512, 2, 3, 8, 4, 200), (32, 1024, 2, 3, 16), (32, 512, 2, 3, 8, 2),
        (32, 1024, 2, 3, 8, 4, 168),
    ],
    "dot16.fp32": [(32, 512, 4, 2), (32, 1024, 4, 3)],
}  # fmt: skip


def jobs() -> list[Job]:
    """All candidates, the kinds in turn."""
    pairs = [(i, kind, DecodeTile(*fields)) for kind, found in CANDIDATES.items() for i, fields in enumerate(found)]
    return [(kind, tile) for _, kind, tile in sorted(pairs, key=lambda pair: pair[0])]


def force(kind: str, tile: DecodeTile) -> None:
    """Let every launch of a kind use the tile, in this process."""
    for entries in tuning.table().values():
        entries[kind] = asdict(tile)


def compile_and_check(job: Job) -> tuple[Job, str | None]:
    """In a process of its own: run a short case. Returns why the candidate is out, or None."""
    kind, tile = job
    case = CASES[kind][0]
    short = decode.DecodeCase(case.dtype, 1, case.H, case.Hkv, 4600)
    force(kind, tile)
    x = decode.draw(short, 0)
    try:
        error = decode.relative_error(short, x, decode.ours(short)(x))
    except RuntimeError as failure:
        return job, str(failure).splitlines()[0]
    return job, None if error <= GATE[case.dtype] else f"relative error {error:.1e}"


def measured(case: decode.DecodeCase, kind: str, tiles: list[DecodeTile]) -> list[dict[str, Any]]:
    sets = [decode.draw(case, seed) for seed in range(measure.sets_to_rotate(case.kv_bytes()))]
    rows = []
    for tile in tiles:
        force(kind, tile)
        call = decode.ours(case)
        timed = measure.Timed([functools.partial(call, x) for x in sets], graph=True, budget_ms=12.0)
        timed.round()
        row = {"kind": kind, "case": asdict(case), "tile": asdict(tile), "ms": timed.median_ms()}
        rows.append(row | {"tbps": case.kv_bytes() / timed.median_ms() / 1e9})
        print(f"  {rows[-1]['tbps']:.2f} TB/s {rows[-1]['ms'] * 1e3:7.1f} us {tile}", flush=True)
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The tile with the largest geometric mean of its speeds, each relative to the best of its case."""
    top: dict[str, float] = {}
    for row in rows:
        top[str(row["case"])] = max(top.get(str(row["case"]), 0.0), row["tbps"])
    scores: dict[str, float] = {}
    for row in rows:
        name = json.dumps(row["tile"])
        scores[name] = scores.get(name, 0.0) + math.log(row["tbps"] / top[str(row["case"])])
    tile: dict[str, int] = json.loads(max(scores, key=lambda name: scores[name]))
    return tile


def write_table(path: Path, arch: str, chosen: dict[str, dict[str, int]]) -> None:
    """Put the chosen tiles into the table's entry for the architecture; fields at their defaults are left out."""
    entries = json.loads(path.read_text())
    defaults = asdict(DecodeTile(0, 0, 0, 0))
    for kind, tile in chosen.items():
        short = {name: value for name, value in tile.items() if value != defaults[name]}
        entries.setdefault(arch, {})[kind] = short
    lines = []
    for name, kinds in entries.items():
        inner = ",\n".join(f'    "{kind}": {json.dumps(tile)}' for kind, tile in kinds.items())
        lines.append(f'  "{name}": {{\n{inner}\n  }}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="the table to rewrite")
    parser.add_argument("--log", type=Path, help="where all measurements go, as JSON")
    parser.add_argument("--processes", type=int, default=15, help="that compile, at a time")
    options = parser.parse_args()
    began = time.monotonic()
    good: dict[str, list[DecodeTile]] = {kind: [] for kind in CANDIDATES}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for (kind, tile), reason in pool.imap(compile_and_check, jobs()):
            if reason is None:
                good[kind].append(tile)
            else:
                print(f"out: {kind} {tile}: {reason}", flush=True)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    chosen = {}
    arch = architecture(0)
    for kind, tiles in good.items():
        found = []
        for case in CASES[kind]:
            print(case, flush=True)
            found += measured(case, kind, tiles)
            torch.cuda.empty_cache()
        rows += found
        if found:
            chosen[kind] = best(found)
            write_table(options.table, arch, chosen)
        if options.log:
            options.log.write_text(json.dumps(rows))
    print(json.dumps(chosen), f"after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
