"""The benchmark of the offload engine, on a tiny model: its rows, and that a refusal becomes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_models import make_config

from elsa_serve.offload.machine import Rates
from elsa_serve.offload.weights import ModelWeights
from elsa_serve.stats import StepStats
from kernels.bench import results_file
from load_tests import offload_bench


def test_runs_of_one_load_become_rows(tmp_path: Path) -> None:
    config = make_config("llama", num_key_value_heads=4).to_dict()
    model, output = tmp_path / "tiny.json", tmp_path / "rows.json"
    model.write_text(json.dumps(config))
    flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--layers", "3", "--context", "150"]
    flags += ["--decode-tokens", "3", "--gpu-memory", "2MiB", "--chunk-tokens", "32", "--output", output]
    runs = ["--run", "resident-layers=0", "--run", "resident-layers=0,serial=1", "--run", "gpu-memory=100KiB"]
    for _ in range(2):  # the second time, its rows replace those of the first
        assert offload_bench.main([str(flag) for flag in flags] + runs) == 0
    rows = results_file.read(output)["rows"]
    assert len(rows) == 3
    streamed, serial, refused = rows[:3]
    assert (streamed["layers"], streamed["context"], streamed["serial"]) == (3, 150, False)
    assert streamed["tokens_equal"]
    assert serial["tokens_equal"]
    assert serial["hidden_s"] == 0
    assert streamed["predicted_decode_s_per_token"] > 0
    assert streamed["rates"]["h2d"] == 50e9
    assert streamed["predicted_prefill_s"] == pytest.approx(streamed["live_predicted_prefill_s"])
    assert serial["predicted_decode_s_per_token"] is None
    assert len(streamed["prefills_s"]) == 3
    assert streamed["prefill_s"] == sorted(streamed["prefills_s"])[1]
    assert streamed["decode_s_per_token"] > 0
    assert streamed["h2d_bytes"] > 0
    assert "--gpu-memory" in refused["error"]


def test_what_was_predicted_first_stands_beside_what_followed() -> None:
    """The host's attention turned out slower than planned: the second pass is predicted by the first, the row's
    prediction is not."""
    passes = [
        StepStats("prefill", 2.0, 100, 1, "elsa", planned_s=1.5, predicted_s=1.5),
        *(StepStats("decode", 0.4, 0, 1, "elsa", planned_s=0.2, predicted_s=p) for p in (0.2, 0.28, 0.37)),
    ]
    row = offload_bench.timings(passes)
    assert (row["predicted_prefill_s"], row["predicted_decode_s_per_token"]) == (1.5, 0.2)
    assert (row["live_predicted_prefill_s"], row["live_predicted_decode_s_per_token"]) == (1.5, 0.28)


def test_passes_before_a_graph_replays_them_do_not_count() -> None:
    passes = [StepStats("decode", seconds, 0, 1, "elsa") for seconds in (0.1, 0.16, 0.027, 0.029, 0.028)]
    assert offload_bench.timings(passes)["decode_s_per_token"] == 0.029
    assert offload_bench.timings(passes, unlike=2)["decode_s_per_token"] == 0.028
    assert offload_bench.timings(passes, unlike=2)["decode_s_max"] == 0.029


def test_older_rows_keep_what_their_files_head_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"

    def run(commit: str, date: str, command: str, **row: Any) -> None:
        head = {"machine": {"gpu": "one"}, "versions": {"torch": "2"}, "commit": commit, "command": command}
        monkeypatch.setattr(results_file, "document", lambda rows: head | {"date": date, "rows": rows})
        offload_bench.record(file, row)

    run("a", "Monday", "bench 8", gpu_cap="8GiB", prefill_s=1)
    run("a", "Monday, later", "bench 8", gpu_cap="24GiB", prefill_s=2)
    run("b", "Tuesday", "bench 24", gpu_cap="24GiB", prefill_s=3)
    first, second = results_file.read(file)["rows"]
    # The head's machine is the row's; its commit, date and command are not.
    assert first == {"gpu_cap": "8GiB", "prefill_s": 1, "commit": "a", "date": "Monday", "command": "bench 8"}
    assert second == {"gpu_cap": "24GiB", "prefill_s": 3, "commit": "b", "date": "Tuesday"}
    assert results_file.read(file)["command"] == "bench 24"


def test_the_floor_is_the_slowest_of_three_bounds() -> None:
    rates = Rates(h2d=50e9, cpu_attention=90e9, cpu_attention_beside_h2d=80e9, h2d_beside_cpu_attention=40e9)
    assert offload_bench.floor_seconds(100, 0, 100e9, rates) == pytest.approx(100 / 50e9)
    assert offload_bench.floor_seconds(1, 100, 100e9, rates) == pytest.approx(100 / 100e9)
    assert offload_bench.floor_seconds(60, 120, 100e9, rates) == pytest.approx(180 / 120e9)  # one memory for both
    # What the run itself reached is no more than the machine allows.
    assert offload_bench.floor_seconds(100, 0, 100e9, rates, 55e9, 0.0) == pytest.approx(100 / 55e9)
    assert offload_bench.floor_seconds(60, 120, 100e9, rates, 45e9, 90e9) == pytest.approx(180 / 135e9)


def test_weights_as_vllm_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("llama").to_dict()
    model, output = tmp_path / "tiny.json", tmp_path / "rows.json"
    model.write_text(json.dumps(config))
    seen: list[float] = []
    measure = offload_bench.measure

    def looking(args: Any, run: Any, directory: Path, weights: ModelWeights, *rest: Any) -> dict[str, Any]:
        drawn = [*(flat.view(weights.dtype) for flat in weights.store.layers), weights.model.lm_head.weight]
        largest = [float(values.abs().max()) for values in drawn]
        seen.append(min(largest) if run.weights == "transformers" else max(largest))
        return measure(args, run, directory, weights, *rest)

    monkeypatch.setattr(offload_bench, "measure", looking)
    flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--layers", "2", "--context", "40"]
    flags += ["--decode-tokens", "2", "--gpu-memory", "2MiB", "--output", output, "--run", "", "--run", "weights=vllm"]
    assert offload_bench.main([str(flag) for flag in flags]) == 0
    rows = results_file.read(output)["rows"]
    assert ["vLLM" in row.get("case", "") for row in rows] == [False, True]
    assert seen[0] > 0.1
    assert 0.9e-3 < seen[1] <= 1e-3
    with pytest.raises(SystemExit, match="come last"):
        offload_bench.main([str(flag) for flag in [*flags, "--run", "serial=1"]])


def test_a_misspelt_run_is_refused() -> None:
    with pytest.raises(SystemExit, match="serail"):
        offload_bench.main(["--run", "serail=1"])
