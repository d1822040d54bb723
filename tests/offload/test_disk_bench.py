"""The disk tiers' benchmark, on a tiny model: its rows, from memory alone and from disk."""

from __future__ import annotations

import json
from pathlib import Path

from engine_models import make_config

from kernels.bench import results_file
from load_tests import disk_bench


def test_rows_from_disk_and_from_memory_have_the_same_tokens(tmp_path: Path) -> None:
    model, output = tmp_path / "tiny.json", tmp_path / "rows.json"
    model.write_text(json.dumps(make_config("llama").to_dict()))
    flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--layers", "5", "--context", "60"]
    flags += ["--gpu-memory", "820KiB", "--folder", tmp_path, "--output", output]
    for size in ("2MiB", "450KiB", "625KiB+64KiB", "100KiB"):
        flags += ["--host-memory", size]
    assert disk_bench.main([str(flag) for flag in flags]) == 0
    memory, weights, kv, refused = results_file.read(output)["rows"]
    assert memory["disk_layers"] == 0
    assert memory["disk_read_bytes"] == memory["kv_disk_bytes"] == 0
    assert 0 < weights["disk_layers"] <= 5
    assert weights["disk_read_bytes"] > 0
    assert weights["predicted_decode_s_per_token"] >= weights["floor_s"] > 0
    assert kv["disk_layers"] == 0
    assert kv["kv_disk_bytes"] > 0
    assert all(row["tokens_equal"] for row in (memory, weights, kv))
    assert "--host-memory" in refused["error"]
    for more, count in (([], 4), (["--fresh"], 1)):  # the same configuration again, then without the others
        assert disk_bench.main([str(flag) for flag in [*flags[:-8], "--host-memory", "100KiB", *more]]) == 0
        assert len(results_file.read(output)["rows"]) == count
    assert not list(tmp_path.glob("elsa-disk-bench-*"))
