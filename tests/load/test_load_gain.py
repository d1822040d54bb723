"""The whole A/B as a person runs it: two servers, ABBA, a real Prometheus, and gains that are known beforehand."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from elsa_load import prometheus

from elsa_serve.cli import main

HERE = Path(__file__).parent
PREFILL_S, DECODE_S = 0.0004, 0.02  # a prompt token, a generated token

needs_prometheus = pytest.mark.skipif(prometheus.missing() is not None, reason=str(prometheus.missing()))


def timed(slowdown):
    command = [sys.executable, str(HERE / "timed_server.py"), "{port}", str(PREFILL_S), str(DECODE_S), str(slowdown)]
    return shlex.join(command).replace("'{port}'", "{port}")


def compare(folder, slowdown, *flags):
    """`bench ab` of a server that is `slowdown` times as slow as it could be, against one that is not."""
    arguments = ["bench", "ab", "--baseline", timed(slowdown), "--candidate", timed(1), "--quiet"]
    arguments += ["--context", "512", "--pairs", "10", "--output-tokens", "12", "--confidence", "0.999"]
    assert main([*arguments, "--scrape-interval", "0.2", "--output", str(folder), *flags]) == 0
    return json.loads((folder / "gain.json").read_text())


def rows_of(data):
    return {row["phase"]: row for row in data["rows"]}


@needs_prometheus
def test_a_planted_slowdown_is_found_by_client_and_prometheus(tmp_path, capsys):
    data = compare(tmp_path, 1.2)
    rows = rows_of(data)
    assert set(rows) == {"prefill", "decode", "end_to_end"}
    for phase, row in rows.items():
        assert row["ci_low"] <= 20 <= row["ci_high"], (phase, row)
        assert row["ci_low"] > 0, (phase, row)
        assert row["ci_low"] - 1 <= row["prometheus_gain_percent"] <= row["ci_high"] + 1, (phase, row)
        assert (row["pairs"], row["outputs_equal"], row["dtype"]) == (10, 10, "float32")
    firsts = [pair["first"] for pair in data["cells"][0]["pairs"]]
    assert firsts == ["baseline", "candidate"] * 5
    assert data["cells"][0]["prompt_tokens"] == [512] * 10
    assert {"machine", "versions", "commit", "command", "date"} <= data.keys()
    assert "prometheus" in data["versions"]
    html = (tmp_path / "report.html").read_text()
    assert "<svg" in html
    assert "17.8" in html
    assert not any(word in html for word in ("src=", "href=", "<script", "@import"))  # it loads nothing
    assert "Prometheus" in capsys.readouterr().out


def test_no_slowdown_is_found_where_there_is_none(tmp_path):
    data = compare(tmp_path, 1, "--no-prometheus")
    for phase, row in rows_of(data).items():
        assert row["ci_low"] <= 0 <= row["ci_high"], (phase, row)
        assert row["ci_high"] - row["ci_low"] < 40, (phase, row)  # one that covers everything says nothing
        assert row["prometheus_gain_percent"] is None


def test_a_run_goes_on_where_it_stopped(tmp_path):
    first = compare(tmp_path, 1, "--no-prometheus", "--pairs", "2", "--context", "256")
    both = compare(tmp_path, 1, "--no-prometheus", "--pairs", "2", "--context", "256", "512")
    assert [cell["cell"]["context"] for cell in both["cells"]] == [256, 512]
    assert both["cells"][0] == first["cells"][0]
    with pytest.raises(SystemExit):
        main(["bench", "ab", "--baseline", "http://127.0.0.1:9"])


def test_other_settings_do_not_go_into_the_same_file(tmp_path, capsys):
    compare(tmp_path, 1, "--no-prometheus", "--pairs", "2", "--context", "256")
    arguments = ["bench", "ab", "--baseline", timed(2), "--candidate", timed(1), "--quiet", "--output", str(tmp_path)]
    assert main([*arguments, "--no-prometheus"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_what_is_neither_url_nor_command_is_refused(tmp_path, capsys):
    arguments = ["bench", "ab", "--baseline", "vllm serve m", "--candidate", "http://127.0.0.1:9"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "{port}" in capsys.readouterr().err
