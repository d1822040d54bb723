"""The benchmark of reuse, on a tiny model: its rows, and a trace whose hits are those of prompt lookup."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_models import make_config

from kernels.bench import results_file
from load_tests import questions_bench, reuse_bench


def test_both_cases_become_rows(tmp_path: Path) -> None:
    config = make_config("llama", num_key_value_heads=4).to_dict()
    model, output = tmp_path / "tiny.json", tmp_path / "rows.json"
    model.write_text(json.dumps(config))
    flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--context", "150", "--tokens", "30",
             "--gpu-memory", "2400KiB", "--host-kv", "4MiB", "--resident-layers", "0", "--requests", "3",
             "--output", output]  # fmt: skip
    assert reuse_bench.main([str(flag) for flag in flags]) == 0
    assert reuse_bench.main([str(flag) for flag in [*flags, "--context", "160", "--fresh"]]) == 0
    assert {row["context"] for row in results_file.read(output)["rows"]} == {160}
    plain, guessed, shared = results_file.read(output)["rows"]
    assert guessed["tokens_equal"]
    assert "margin" not in guessed
    assert guessed["accepted_tokens"] > 10
    assert guessed["passes"] == 29 - guessed["accepted_tokens"]
    assert plain["cached_tokens"] == shared["cached_tokens"] == 128
    assert shared["batch"] == 3
    assert shared["tokens_equal"]
    assert shared["tokens_per_s"] > 0
    for row, name in ((plain, "decode_s_per_token"), (guessed, "s_per_pass"), (shared, "s_per_pass")):
        assert row[f"predicted_{name}"] > 0
        assert row[f"live_predicted_{name}"] > 0


def test_where_tokens_differ_the_row_says_how_near_the_two_were() -> None:
    events = [SimpleNamespace(top_logprobs=[SimpleNamespace(logprob=value) for value in (-2.5, -0.5)])]
    asked: list[tuple[int, int | None]] = []

    def run(prompts: object, count: int, logprobs: int | None = None) -> tuple[None, list[SimpleNamespace], None]:
        asked.append((count, logprobs))
        return None, events, None

    bench: Any = SimpleNamespace(run=run)
    assert reuse_bench.difference(bench, [1], [5, 6, 7], [5, 6, 7]) == {}
    assert reuse_bench.difference(bench, [1], [5, 6, 7], [5, 8, 9]) == {"differs_at": 1, "margin": 2.0}
    assert asked == [(2, 2)]


def test_the_trace_is_copy_heavy_and_not_all_copy() -> None:
    hits = reuse_bench.trace_hits(300)
    drafted, accepted = (sum(column) for column in zip(*hits))
    assert 0.4 * drafted < accepted < 0.95 * drafted
    assert 3 < (accepted + len(hits)) / len(hits) < 12


def test_questions_become_a_row(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    flags = ["--device", "cpu", "--documents", "2", "--context", "1024", "--gpu-memory", "200MiB", "--output", output]
    assert questions_bench.main([str(flag) for flag in flags]) == 0
    (row,) = results_file.read(output)["rows"]
    assert row["tokens_equal"]
    assert row["answers_right"]
    assert row["passes"] == row["passes_plain"] - row["accepted_tokens"]
    assert row["speedup_min"] <= row["speedup"] <= row["speedup_max"]
