"""Predictions beside measurements: which rows count, and when a prediction is too far off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from load_tests import predicted

ROW = {"dtype": "float16", "layers": 4, "context": 100, "gpu_cap": "8GiB", "attention": "elsa", "asked": {"slots": 2}}


def results(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "some.json"
    form = dict.fromkeys(("machine", "versions", "commit", "command", "date"))
    file.write_text(json.dumps(form | {"rows": [ROW | row for row in rows]}))
    return str(file)


def test_rows_with_both_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"predicted_prefill_s": 1.1, "prefill_s": 1.0, "predicted_decode_s_per_token": 0.05}
    refused = {"error": "BudgetError: too small"}
    assert predicted.main([results(tmp_path, both | {"decode_s_per_token": 0.1}, both, refused)]) == 1
    out = capsys.readouterr().out
    assert out.count("float16 4 layers 100 tokens 8GiB elsa slots=2") == 3
    assert "+10.0%" in out
    assert "-50.0%" in out
    assert "3 predictions, 1 further off than 15 %" in out
    assert predicted.main([results(tmp_path, both)]) == 0
    assert predicted.main([results(tmp_path, both), "--limit", "5"]) == 1


def test_only_what_was_predicted_first_is_held_to_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"predicted_prefill_s": 1.1, "live_predicted_prefill_s": 2.0, "prefill_s": 1.0}
    assert predicted.main([results(tmp_path, row)]) == 0
    assert "+100.0%" in capsys.readouterr().out
    row = {"predicted_prefill_s": 2.0, "live_predicted_prefill_s": 1.0, "prefill_s": 1.0}
    assert predicted.main([results(tmp_path, row)]) == 1


def test_rows_of_one_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"predicted_prefill_s": 2.0, "prefill_s": 1.0}
    file = results(tmp_path, row | {"commit": "abc1"}, row | {"commit": "def2", "prefill_s": 2.0})
    assert predicted.main([file]) == 1
    assert predicted.main([file, "--commit", "def"]) == 0
    assert "1 predictions, 0 further off" in capsys.readouterr().out


def test_passes_of_several_tokens_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"case": "shared document", "predicted_s_per_pass": 0.3, "s_per_pass": 0.25}
    assert predicted.main([results(tmp_path, row)]) == 1
    assert "elsa shared document slots=2" in capsys.readouterr().out
