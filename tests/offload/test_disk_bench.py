"""The disk tier's benchmark, on a tiny model: its rows, from memory alone and from disk."""

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
    flags += ["--gpu-memory", "1MiB", "--folder", tmp_path, "--output", output]
    budgets = ["--host-memory", "2MiB", "--host-memory", "450KiB", "--host-memory", "100KiB"]
    assert disk_bench.main([str(flag) for flag in flags] + budgets) == 0
    memory, disk, refused = results_file.read(output)["rows"]
    assert memory["disk_layers"] == 0
    assert memory["disk_read_bytes"] == 0
    assert 0 < disk["disk_layers"] <= 5
    assert disk["disk_read_bytes"] > 0
    assert disk["tokens_equal"]
    assert disk["predicted_decode_s_per_token"] >= disk["floor_s"] > 0
    assert "--host-memory" in refused["error"]
    assert not list(tmp_path.glob("elsa-disk-bench-*"))
