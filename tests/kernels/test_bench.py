"""The measuring tools themselves: cases, inputs, results files and tables. No GPU."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from elsa_kernels.reference import attention_reference
from elsa_kernels.registry import UnsupportedProblem

from kernels.bench import accuracy, inputs, linear, measure, merge, peers, results_file, run, table
from kernels.bench.cases import FAMILIES, SUITES, Case


def brute_force_pairs(case: Case) -> int:
    q = torch.arange(case.Nq)[:, None] + case.Nk - case.Nq
    return int((torch.arange(case.Nk)[None, :] <= q).sum()) if case.causal else case.Nq * case.Nk


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("Nq", "Nk"), [(64, 64), (16, 48), (1, 7)])
def test_flops_count_visible_pairs(causal, Nq, Nk):
    case = Case("float32", causal, 2, 4, Nq, 8, Nk=Nk)
    assert case.flops() == 4 * 8 * 2 * 4 * brute_force_pairs(case)


def test_cases_are_complete():
    assert all(case.H % case.Hkv == 0 and case.Nk >= case.Nq for suite in SUITES.values() for case in suite)
    assert {"dtype", "causal", "B", "H", "Hkv", "Nq", "Nk", "D", "precision", "op"} == set(SUITES["fp32"][0].row())
    with pytest.raises(ValueError, match="not a multiple"):
        Case("float32", True, 1, 4, 8, 8, Hkv=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_relative_error_of_every_family(family):
    case = Case("float32", True, 2, 4, 40, 16, Nk=72, Hkv=2)
    tensors = inputs.draw(case, family, device="cpu")
    exact = attention_reference(*tensors, causal=True)
    assert inputs.relative_error(case, tensors, exact) == 0.0
    assert inputs.relative_error(case, tensors, exact * 1.01) == pytest.approx(0.01)


def test_relative_error_sees_a_wrong_mask():
    case = Case("float32", True, 1, 2, 40, 16, Nk=72)
    tensors = inputs.draw(case, device="cpu")
    assert inputs.relative_error(case, tensors, attention_reference(*tensors, causal=True, q_start=0)) > 0.1


def test_unknown_family():
    with pytest.raises(ValueError, match="family"):
        inputs.draw(Case("float32", True, 1, 2, 4, 16), "odd", device="cpu")


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM's package of FlashAttention kernels."""
    module = ModuleType("vllm.vllm_flash_attn")
    module.fa_version_unsupported_reason = lambda version: None
    module.flash_attn_varlen_func = lambda *tensors, **options: None
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    return module


def test_flash_attention_3_is_found_in_vllm(vllm):
    assert peers.flash_attention_3() is vllm.flash_attn_varlen_func


def test_flash_attention_3_is_missing_with_a_reason(vllm, monkeypatch):
    vllm.fa_version_unsupported_reason = lambda version: f"FA{version} needs another device"
    with pytest.raises(UnsupportedProblem, match="FA3 needs another device"):
        peers.flash_attention_3()

    def broken(name):
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    with pytest.raises(UnsupportedProblem, match="libcudart"):
        peers.flash_attention_3()


def test_rotation_covers_the_cache():
    assert measure.sets_needed(10 << 20, 50 << 20) == 10
    assert measure.sets_needed(1 << 30, 50 << 20) == 2
    assert measure.sets_needed(1 << 10, 50 << 20) == measure.MAX_SETS


def test_a_merged_file_says_where_its_older_rows_come_from(tmp_path):
    case = Case("float32", True, 1, 4, 64, 32).row()
    new, old = (
        [case | {"impl": i, "ms": ms, "tflops": ms, "tbps": ms} for i in impls]
        for ms, impls in ((1, ["a"]), (2, ["a", "b"]))
    )
    for name, rows in (("new", new), ("old", old)):
        results_file.write(tmp_path / f"{name}.json", rows)
    before = results_file.read(tmp_path / "old.json")
    out = tmp_path / "out.json"
    merge.main([str(tmp_path / "new.json"), str(tmp_path / "old.json"), "--output", str(out)])
    first, second = results_file.read(out)["rows"]
    assert first == new[0]
    assert second == {"commit": before["commit"], "date": before["date"]} | old[1]


def test_a_run_of_some_implementations_keeps_the_rows_of_the_others(tmp_path):
    path = tmp_path / "attention-x.json"
    results_file.write(path, [{"impl": "ours", "ms": 1}, {"impl": "peer", "ms": 2}, {"op": "gemm", "impl": "cublas"}])
    assert results_file.others(path, ["peer"]) == [{"impl": "ours", "ms": 1}, {"op": "gemm", "impl": "cublas"}]


@pytest.mark.parametrize("tool", [run, accuracy])
def test_tools_refuse_without_a_gpu(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tool.main([])
    assert "CUDA device" in capsys.readouterr().err


def test_results_file_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSA_COMMIT", "abc123")
    path = tmp_path / "deep" / "x-cpu.json"
    rows = [{"op": "prefill", "ms": 1.5}, {"op": "gemm"}]
    results_file.write(path, rows, command="tool --flag")
    doc = results_file.read(path)
    assert doc["rows"] == rows
    assert doc["commit"] == "abc123"
    assert doc["command"] == "tool --flag"
    assert {"gpu", "gpu_count", "cpu", "cores", "ram_bytes", "driver"} == set(doc["machine"])
    assert doc["versions"]["torch"] == torch.__version__
    results_file.write(path, [])
    assert results_file.read(path)["rows"] == []


def test_results_file_of_another_form(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="commit"):
        results_file.read(path)


def test_commit_of_this_repository(monkeypatch):
    monkeypatch.delenv("ELSA_COMMIT", raising=False)
    monkeypatch.setattr(results_file, "_git", lambda *a: None)
    with pytest.raises(RuntimeError, match="ELSA_COMMIT"):
        results_file.commit()
    answers = {"--show-toplevel": str(results_file.ROOT), "HEAD": "f00", "--porcelain": " M file"}
    monkeypatch.setattr(results_file, "_git", lambda *a: answers[a[1]])
    assert results_file.commit() == "f00-dirty"
    answers["--show-toplevel"] = "/somebody/else"  # whose repository an installed package lies in
    assert results_file.find_commit() is None


def speed_row(impl: str, tflops: float, **changes):
    case = Case("float32", True, 1, 40, 4096, 128)
    return case.row() | {"impl": impl, "ours": impl.startswith("elsa."), "tflops": tflops, "relerr": 5e-7} | changes


def test_speed_table_has_a_line_a_case_and_the_ratio():
    rows = [
        speed_row("elsa.gluon", 200.0),
        speed_row("sdpa.mem_efficient", 40.0),
        speed_row("elsa.gluon", 100.0, causal=False),
        speed_row("elsa.gluon", 600.0, dtype="float16"),
    ]
    lines = table.speed_table(rows, ("float32",)).splitlines()
    assert len(lines) == 4
    assert "200 (5e-07)" in lines[2]
    assert lines[2].endswith("5.00× |")
    assert lines[3].endswith("– |")


def test_speed_table_stars_what_the_host_slowed():
    rows = [speed_row("elsa.gluon", 60.0, graph=False), speed_row("sdpa.mem_efficient", 40.0, graph=True)]
    line = table.speed_table(rows, ("float32",)).splitlines()[2]
    assert "60* (5e-07) | 40 (5e-07)" in line


def test_accuracy_table_shows_both_ends():
    rows = [
        speed_row("elsa.gluon", 0.0, op="accuracy", family="normal", Nk=N, relerr=error)
        for N, error in ((4096, 5e-7), (256, 3e-7))
    ]
    assert "| normal | 3e-07 … 5e-07 |" in table.accuracy_table(rows)


def test_render_replaces_known_tables_alone():
    text = "a\n<!-- table:x -->\nold\n<!-- /table -->\n<!-- table:other -->\nkept\n<!-- /table -->\n"
    new = table.render(text, {"x": lambda: "new\n"})
    assert "new\n<!-- /table -->" in new
    assert "old" not in new
    assert "kept" in new
    assert table.render(new, {"x": lambda: "new\n"}) == new


def test_check_fails_on_a_stale_document(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("<!-- table:x -->\n<!-- /table -->\n")
    monkeypatch.setattr(table, "TABLES", {"x": lambda: "| 1 |\n"})
    with pytest.raises(SystemExit, match="out of date"):
        table.main([str(path), "--check"])
    table.main([str(path)])
    table.main([str(path), "--check"])
    assert "| 1 |" in path.read_text()


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_committed_results_have_the_form(path):
    doc = results_file.read(path)
    assert doc["machine"]["gpu"]
    assert doc["rows"]
    assert all({"op", "impl", "ours", "dtype"} <= row.keys() for row in doc["rows"])


def test_committed_tables_render():
    for make in table.TABLES.values():
        assert make().count("\n") > 3


def test_plots_show_the_committed_results(tmp_path):
    plot = pytest.importorskip("kernels.bench.plot", exc_type=ImportError)
    plot.main(["--output", str(tmp_path)])
    for name in ("attention-float32-h200.svg", "attention-float16-h200.svg", "accuracy-h200.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert "elsa.gluon" in (tmp_path / name).read_text()


PEERS_OF_LINEAR = {
    "torch.fp32": linear.CALLS["torch.fp32"],
    "elsa.near": lambda x, w, split: (x.double() @ w.double().t()).float(),
    "elsa.off": lambda x, w, split: (x.double() @ w.double().t() * (1 + 1e-5)).float(),
}


@pytest.fixture
def proof(monkeypatch):
    """Rows of the proof of linear layers on the CPU, and how often operands were drawn."""
    drawn = []
    monkeypatch.setattr(linear, "names", lambda M: list(PEERS_OF_LINEAR))
    monkeypatch.setattr(linear, "CALLS", PEERS_OF_LINEAR)
    draw = linear.operands
    monkeypatch.setattr(linear, "operands", lambda *case: drawn.append(draw(*case)) or drawn[-1])

    def rows(M: int, family: str = "normal") -> list[dict]:
        drawn.clear()
        found = list(linear.proof_rows((M, 24, 1024), family, "cpu"))
        distinct = {(x[0, 0].item(), w[0, 0].item()) for x, w, _ in drawn}
        assert len(distinct) == len(drawn) == found[0]["draws"]  # fresh rows and a fresh weight each time
        return found

    return rows


@pytest.mark.parametrize(("M", "draws"), [(1, 256), (100, 4)])
def test_proof_of_linear_layers_pools_its_draws(proof, M, draws):
    torchs, near, off = proof(M)
    assert torchs["draws"] == draws
    assert torchs["over_torch"] == 0.0
    assert near["relerr"] < torchs["relerr"] < 1e-6
    assert near["over_torch"] < 0.2
    assert off["relerr"] == pytest.approx(1e-5, rel=0.05)
    assert off["over_torch"] == 1.0


def test_proof_table_shows_the_worst_family(proof):
    rows = proof(100) + proof(100, "outliers")
    for row in rows:
        if row["impl"] == "elsa.off" and row["family"] == "outliers":
            torchs = next(r for r in rows if r["impl"] == "torch.fp32" and r["family"] == "outliers")
            row["relerr"] = 1000 * torchs["relerr"]
    text = table.linear_proof_table(rows)
    assert "| 100 | elsa.off | 4 | 1000.00 (outliers, 100%) |" in text
    assert text.count("elsa.") == 2


def test_merge_takes_a_cell_of_the_proof_anew(proof):
    new = {"commit": "n", "date": "2", "rows": proof(100)}
    old = {"commit": "o", "date": "1", "rows": [{**row, "relerr": 1.0} for row in new["rows"]]}
    for row in old["rows"]:
        del row["draws"], row["over_torch"]
    assert merge.merged(new, old) == new["rows"]


def test_linear_table_shows_the_share_of_the_bandwidth():
    row = {"op": "linear", "family": "normal", "M": 16, "N": 8, "K": 8, "relerr": 1e-7, "tflops": 1.0}
    rows = [
        row | {"impl": "torch.fp32", "ours": False, "tbps": 1.5, "read_tbps": 4.2},
        row | {"impl": "elsa.cuda", "ours": True, "tbps": 3.78, "read_tbps": 4.2},
        row | {"impl": "elsa.gluon", "ours": True, "M": 8192, "tbps": 0.01},
    ]
    text = table.linear_table(rows)
    assert "| 16 × 8 × 8 | 1.50 (1e-07) | 3.78 (1e-07) | 90% |" in text
    assert "| 8192 × 8 × 8 | 1 (1e-07) |" in text
