"""The comparison with an outside tool, with a program in its place that writes what the tool would."""

import json
import sys

import pytest
from elsa_load.processes import Program
from elsa_load.records import Request

from elsa_serve.errors import ElsaError
from load_tests import outside_judge

STAND_IN = """#!{python}
import json, pathlib, sys
words = sys.argv
folder = pathlib.Path(words[words.index("--artifact-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
bodies = pathlib.Path(words[words.index("--input-file") + 1]).read_text().splitlines()
assert words[words.index("--model") + 1] == json.loads(bodies[0])["model"] == "timed"
spread = dict.fromkeys(("avg", "p50", "p90", "p95", "p99", "max"), 50.0)
figures = {{"time_to_first_token": spread, "request_throughput": {{"avg": len(bodies)}}}}
(folder / "profile_export_aiperf.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def args(tmp_path):
    def build(text):
        program = tmp_path / "aiperf"
        program.write_text(text)
        program.chmod(0o755)
        words = ["--aiperf", str(program), "--output", str(tmp_path / "out.json"), "--rounds", "2"]
        return outside_judge.build_parser().parse_args(words)

    return build


@pytest.fixture(scope="module")
def command():
    return [sys.executable, str(outside_judge.TIMED), "0.0001", "0.001", "{port}:1"]


def requests():
    return [Request(f"r{i}", [{"role": "user", "content": "x" * 200}], 200, 3, ignore_eos=True) for i in range(4)]


def test_figures_of_both_tools_stand_side_by_side(args, command):
    options = args(STAND_IN.format(python=sys.executable))
    runs = outside_judge.both(options, command, requests())
    rows = {(row["metric"], row["statistic"]): row for row in outside_judge.compared(options, "t", runs, requests())}
    first = rows["ttft_s", "avg"]
    assert first["aiperf_each"] == [0.05, 0.05]  # its milliseconds are our seconds
    assert len(first["ours_each"]) == 2
    assert first["ours"] >= 0.02
    assert first["difference_percent"] == pytest.approx(100 * (first["ours"] / 0.05 - 1))
    assert rows["finished_per_s", "avg"]["aiperf"] == 4
    assert rows["client_cpu_s", "avg"]["ours"] > 0
    assert ("tpot_s", "avg") not in rows  # which this tool did not report
    json.dumps(list(rows.values()))


def test_a_tool_that_fails_is_no_result(args, command, tmp_path):
    with (
        Program(command, tmp_path / "log", startup_s=60) as server,
        pytest.raises(ElsaError, match="status 3"),
    ):
        outside_judge.aiperf(args("#!/bin/sh\nexit 3\n"), server.url, requests(), tmp_path)
