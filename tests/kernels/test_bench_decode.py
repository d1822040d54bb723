"""The decode benchmark's own arithmetic. No GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels import attention_paged
from elsa_kernels.paged import tuning

pytest.importorskip("triton")

from kernels.bench import decode, measure, table, tune_cuda_decode, tune_decode
from tests.kernels import paged_aot

SMALL = decode.DecodeCase("float32", 2, 4, 2, 100, D=32, Nq=3)


def test_bytes_are_those_of_keys_and_values() -> None:
    x = decode.draw(SMALL, 0, "cpu")
    full_pages = x.k_cache.nbytes + x.v_cache.nbytes
    assert SMALL.kv_bytes() == full_pages * 100 // 112
    assert decode.DecodeCase("float16", 1, 8, 8, 64, kv="float8_e4m3fn").kv_bytes() == 2 * 8 * 64 * 128


@pytest.mark.parametrize("case", [SMALL, decode.DecodeCase("float16", 2, 4, 2, 100, D=32, kv="float8_e4m3fn")])
def test_error_is_against_the_pages_in_their_order(case: decode.DecodeCase) -> None:
    x = decode.draw(case, 0, "cpu")
    bounds = {"max_seqlen_q": case.Nq, "max_seqlen_k": case.Nk}
    out = attention_paged(x.q, x.k_cache, x.v_cache, x.cu_seqlens_q, x.seqused_k, x.block_table, **bounds)
    assert decode.relative_error(case, x, out) < decode.GATE[case.dtype]
    assert decode.relative_error(case, x, out * 1.01) == pytest.approx(0.01, rel=0.05)
    x.block_table = x.block_table.flip(1)
    assert decode.relative_error(case, x, out) > 0.1


def test_the_measured_cases_cover_the_targets() -> None:
    shapes = {(c.dtype, c.B, c.H, c.Hkv, c.Nk) for c in decode.CASES}
    assert {("float16", 1, 40, 40, 32768), ("float16", 1, 32, 8, 32768), ("float32", 1, 40, 40, 32768)} <= shapes


def test_table_has_a_line_a_case() -> None:
    row = {
        "op": "decode", "dtype": "float16", "kv": "float16", "B": 1, "H": 32, "Hkv": 8, "Nk": 512, "D": 128, "Nq": 1,
        "page": 16, "relerr": 2.1e-4,
    }  # fmt: skip
    rows = [row | {"impl": "elsa.paged", "tbps": 3.456}, row | {"impl": "fa3", "tbps": 2.0}]
    lines = table.decode_table([*rows, row | {"impl": "fa3", "tbps": 4.0, "kv": "float8_e4m3fn"}]).splitlines()
    assert lines[2:] == [
        "| problem | elsa.paged | fa3 |",
        "|---|---:|---:|",
        "| float16 B1 H32/8 D128 N 512 page 16 | 3.46 (2e-04) | 2.00 (2e-04) |",
        "| float16 over float8_e4m3fn B1 H32/8 D128 N 512 page 16 | – | 4.00 (2e-04) |",
    ]


# --- the tool that finds tiles


def test_candidates_are_tiles_of_known_kinds() -> None:
    assert set(tune_decode.CANDIDATES) == set(tune_decode.CASES) <= set(tuning.table()["default"])
    for kind, tile in tune_decode.jobs():
        assert tile.CHUNK % tile.BN == 0, (kind, tile)
        assert tile.CHUNK >= tuning.SMALLEST_CHUNK


def test_the_best_is_the_best_over_all_cases() -> None:
    speeds = {("a", 16): 4.0, ("a", 32): 3.6, ("b", 16): 2.0, ("b", 32): 3.0}
    rows = [{"case": case, "tile": {"BN": bn}, "tbps": tbps} for (case, bn), tbps in speeds.items()]
    assert tune_decode.best(rows) == {"BN": 32}


def test_the_table_keeps_what_was_not_tuned(tmp_path: Path) -> None:
    path = tmp_path / "paged.json"
    path.write_text(json.dumps(tuning.table()))
    tile = asdict(tuning.DecodeTile(32, 1024, 4, 1, registers=128))
    tune_decode.write_table(path, "sm_90", {"lanes.16": tile})
    expected = json.loads(json.dumps(tuning.table()))
    expected["sm_90"]["lanes.16"] = {"BN": 32, "CHUNK": 1024, "num_warps": 4, "num_stages": 1, "registers": 128}
    assert json.loads(path.read_text()) == expected


def test_every_device_finds_its_tile() -> None:
    problem = paged_aot.problem(torch.float16, 4, 256)
    for arch in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120", "gfx942"):
        for form, mode, rows in (("lanes", "ieee", 1), ("dot", "half", 16), ("dot", "bf16x6", 64), ("dot", "ieee", 16)):
            tile = tuning.decode_tile(form, mode, rows, problem, arch)
            assert tile.BN >= 16
            assert tile.registers == 0 or arch == "sm_90"


def test_a_cuda_form_is_kept_where_it_beats_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "draw", lambda case, seed: None)
    monkeypatch.setattr(measure, "sets_to_rotate", lambda size: 1)
    speeds = {1024: 3.5, 512: 2.0}
    monkeypatch.setattr(
        tune_cuda_decode, "speed", lambda case, sets, forms: speeds[forms["32x8"].chunk] if forms else 3.0
    )
    rows: list[dict[str, Any]] = []
    good, bad = tune_cuda_decode.CANDIDATES["32x8"]
    assert (good.chunk, bad.chunk) == (1024, 512)
    assert tune_cuda_decode.best("32x8", [good, bad], rows) == good
    assert tune_cuda_decode.best("32x8", [bad], rows) is None
    assert [row["tbps"] for row in rows] == [3.0, 3.5, 2.0, 3.0, 2.0]
