"""The whole A/B as a person runs it: two servers, ABBA, a real Prometheus, and gains that are known beforehand."""

import argparse
import asyncio
import functools
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from elsa_load import ab, bench_gain, in_process, prometheus
from elsa_load.ab import SIDES, Cell, gain_rows, run_cell
from elsa_load.command import add_command
from elsa_load.in_process import EngineSide, Gate, Switch
from elsa_load.processes import Program, free_port
from elsa_load.prompts import PromptMaker
from elsa_load.records import Observation, Request
from elsa_load.scenario import tokenizer_of

from elsa_serve.cli import main
from elsa_serve.errors import ElsaError
from elsa_serve.offload.engine import OffloadEngine

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "configs" / "demo_model"
SMALL = "gpu-memory=512MiB"
PREFILL_S, DECODE_S = 0.0006, 0.03  # a prompt token, a generated token
OVERHEAD = 0.03  # of a phase may be HTTP's and the client's, which no slowdown is planted in

needs_prometheus = pytest.mark.skipif(prometheus.missing() is not None, reason=str(prometheus.missing()))


def timed_command(*servers):
    return [sys.executable, str(HERE / "timed_server.py"), str(PREFILL_S), str(DECODE_S), *servers]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server for tests in which both sides may be the same one."""
    with Program(
        timed_command("{port}:1"), tmp_path_factory.mktemp("timed") / "log", startup_s=60, stop_s=10
    ) as program:
        yield program.url


def compare_same(url, folder, *flags):
    arguments = ["bench", "ab", "--baseline", url, "--candidate", url, "--quiet", "--no-prometheus", "--rest", "0"]
    assert main([*arguments, "--output", str(folder), *flags]) == 0
    return json.loads((folder / "gain.json").read_text())


def compare(folder, slowdown):
    """`bench ab` of a server that is `slowdown` times as slow as it could be, against one that is not."""
    other = free_port()
    with Program(timed_command("{port}:" + str(slowdown), f"{other}:1"), folder / "server.log", startup_s=60) as server:
        arguments = ["bench", "ab", "--baseline", server.url, "--candidate", f"http://127.0.0.1:{other}", "--quiet"]
        arguments += ["--context", "512", "--pairs", "12", "--output-tokens", "10", "--confidence", "0.999"]
        arguments += ["--rest", "0", "--scrape-interval", "0.2"]
        assert main([*arguments, "--output", str(folder)]) == 0
    return json.loads((folder / "gain.json").read_text())


def rows_of(data):
    return {row["phase"]: row for row in data["rows"]}


def covers(row, low, high):
    """Whether the interval of the row holds a value of low … high."""
    return row["ci_low"] <= high and row["ci_high"] >= low


def told_by_prometheus(row):
    """The gain as Prometheus has it, in the client's interval; nothing to hold where there is no Prometheus."""
    second = row["prometheus_gain_percent"]
    return (second is None) == bool(prometheus.missing()) and (second is None or covers(row, second - 1, second + 1))


def test_a_planted_slowdown_is_found_by_client_and_prometheus(tmp_path, capsys):
    """Engines of fixed times in one process, so that a busy machine widens the intervals and hardly moves them."""
    data = compare(tmp_path, 1.2)
    rows = rows_of(data)
    assert set(rows) == {"prefill", "decode", "end_to_end"}
    for phase, row in rows.items():
        assert covers(row, 20 * (1 - OVERHEAD), 20), (phase, row)
        assert told_by_prometheus(row), (phase, row)
        assert (row["pairs"], row["outputs_equal"], row["dtype"]) == (12, 12, "float32")
    # A first token that comes late on a busy machine takes from one phase what it gives to the other, so their
    # intervals may grow past 0; that of both together does not.
    assert rows["end_to_end"]["ci_low"] > 0, rows["end_to_end"]
    firsts = [pair["first"] for pair in data["cells"][0]["pairs"]]
    assert firsts == ["baseline", "candidate"] * 6
    assert data["cells"][0]["prompt_tokens"] == [512] * 12
    assert {"machine", "versions", "commit", "command", "date"} <= data.keys()
    assert ("prometheus" in data["versions"]) == (prometheus.missing() is None)
    html = (tmp_path / "report.html").read_text()
    assert "<svg" in html
    assert "17.8" in html
    assert not any(word in html for word in ("src=", "href=", "<script", "@import"))  # it loads nothing
    if prometheus.missing():
        assert "the client's alone" in capsys.readouterr().out


def test_no_slowdown_is_found_where_there_is_none(tmp_path):
    for phase, row in rows_of(compare(tmp_path, 1)).items():
        assert covers(row, 0, 0), (phase, row)
        assert told_by_prometheus(row), (phase, row)


def test_rounds_start_both_servers_anew_in_the_other_order(tmp_path):
    quick = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'timed_server.py'))} 0.0001 0.001 {{port}}:1"
    arguments = ["bench", "ab", "--baseline", quick, "--candidate", quick, "--quiet", "--no-prometheus", "--rest", "0"]
    arguments += ["--context", "256", "--pairs", "2", "--output-tokens", "2", "--rounds", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gain.json").read_text())
    first, second = data["cells"]
    assert [pair["first"] for cell in (first, second) for pair in cell["pairs"]] == [*SIDES, *reversed(SIDES)]
    ids = [pair["id"] for cell in (first, second) for pair in cell["pairs"]]
    assert len(set(ids)) == 4  # each round has prompts of its own
    assert [(row["rounds"], row["pairs"]) for row in data["rows"]] == [(2, 4)] * 3
    for side in SIDES:
        assert (tmp_path / f"{side}.log").read_text().count("Listening on") == 2
    assert main([*arguments, "--output", str(tmp_path)]) == 0  # all there: no server is started anew
    assert (tmp_path / "baseline.log").read_text().count("Listening on") == 3


def test_servers_of_stated_memory_start_together_and_others_one_by_one(tmp_path, monkeypatch):
    """Each comes up only once both have begun: alone, the first would never be ready."""
    flags = ["dtype=float16", "gpu-memory-utilization=0.05,kv-cache-memory-bytes=1G"]
    assert bench_gain.kv_is_stated(bench_gain.flags_of(flags))
    assert not bench_gain.kv_is_stated(bench_gain.flags_of(flags[:1]))
    timed = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'timed_server.py'))} 0.0001 0.001 {{port}}:1"
    folder = shlex.quote(str(tmp_path))
    wait = f"until [ $(ls {folder}/begun.* | wc -l) = 2 ]; do sleep 0.05; done"
    commands = {side: ["sh", "-c", f"touch {folder}/begun.{side}; {wait}; exec {timed}"] for side in SIDES}
    asked = ["--quiet", "--no-prometheus", "--rest", "0", "--context", "256", "--pairs", "2", "--output-tokens", "2"]
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    args = parser.parse_args(["bench", "gain", str(DEMO), *asked, "--output", str(tmp_path / "together")])
    labels = {"engine": "vllm", "dtype": "float16", "baseline": "a"}
    args.baseline, args.candidate = "a", "b"
    assert bench_gain.compare(args, commands, {}, labels, together=True) == 0
    for file in tmp_path.glob("begun.*"):
        file.unlink()
    monkeypatch.setattr(bench_gain, "Program", functools.partial(Program, startup_s=2))
    args.output = tmp_path / "apart"
    with pytest.raises(ElsaError, match="was not ready in 2 s"):
        bench_gain.compare(args, commands, {}, labels)
    assert [file.name for file in tmp_path.glob("begun.*")] == ["begun.baseline"]


def test_rounds_want_servers_that_can_be_started(tmp_path, url, capsys):
    arguments = ["bench", "ab", "--baseline", url, "--candidate", url, "--rounds", "2", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "no URLs" in capsys.readouterr().err
    assert main(["bench", "gain", str(DEMO), "--in-process", "--rounds", "2", "--output", str(tmp_path)]) == 2
    assert "--rounds" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped_but_not_with_other_settings(tmp_path, url, capsys):
    flags = ["--pairs", "2", "--output-tokens", "2", "--context", "256"]
    first = compare_same(url, tmp_path, *flags)
    both = compare_same(url, tmp_path, *flags, "384")
    assert [cell["cell"]["context"] for cell in both["cells"]] == [256, 384]
    assert both["cells"][0] == first["cells"][0]
    arguments = ["bench", "ab", "--baseline", url, "--candidate", url, "--quiet", "--no-prometheus", "--rest", "0"]
    assert main([*arguments, "--seed", "2", "--output", str(tmp_path)]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "gain.json")]) == 0
    assert (tmp_path / "gain.html").read_text() == (tmp_path / "report.html").read_text()


@needs_prometheus
def test_scrapes_kept_where_no_prometheus_is_give_its_gain_elsewhere(tmp_path, monkeypatch, capsys):
    arguments = ["bench", "gain", str(DEMO), "--in-process", "--quiet", "--set", SMALL, "--scrape-interval", "0.5"]
    arguments += ["--context", "600", "--pairs", "2", "--output-tokens", "8", "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(prometheus, "missing", lambda: "none here")
        assert main(arguments) == 0
    assert "bench replay" in capsys.readouterr().out
    before = json.loads((tmp_path / "gain.json").read_text())
    assert {row["prometheus_gain_percent"] for row in before["rows"]} == {None}
    assert main(["bench", "replay", str(tmp_path)]) == 0
    after = json.loads((tmp_path / "gain.json").read_text())
    (cell,) = after["cells"]
    for phase, told in cell["prometheus"].items():
        assert told["reason"] is None
        for side in SIDES:
            seen = sum(pair["seconds"][side][phase] for pair in cell["pairs"])
            assert told["seconds"][side] == pytest.approx(seen, rel=0.2, abs=0.1), (phase, side)
    assert None not in {row["prometheus_gain_percent"] for row in after["rows"]}
    assert after["commit"] == before["commit"]  # of the run, not of the replay
    (tmp_path / "scrapes.om").unlink()
    assert main(["bench", "replay", str(tmp_path)]) == 2
    assert "nothing to replay" in capsys.readouterr().err


def test_a_run_that_is_cut_off_keeps_its_pairs_and_measures_that_context_anew(tmp_path, url, monkeypatch, capsys):
    flags = ["--pairs", "4", "--output-tokens", "2", "--context", "256"]
    run_pair = ab.run_pair

    async def breaking(sides, request, number, rest_s):
        if number == 3:
            raise ElsaError("the machine went away")
        return await run_pair(sides, request, number, rest_s)

    arguments = ["bench", "ab", "--baseline", url, "--candidate", url, "--quiet", "--no-prometheus", "--rest", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(ab, "run_pair", breaking)
        assert main([*arguments, "--output", str(tmp_path), *flags]) == 1
    data = json.loads((tmp_path / "gain.json").read_text())
    assert [cell["complete"] for cell in data["cells"]] == [False]
    assert [(row["phase"], row["pairs"]) for row in data["rows"]] == [(p, 3) for p in prometheus.PHASES]
    data = compare_same(url, tmp_path, *flags)
    assert [(cell["complete"], len(cell["pairs"])) for cell in data["cells"]] == [(True, 4)]


def test_each_request_of_a_pair_begins_after_a_rest(monkeypatch):
    """Which is in neither side's time."""
    happened = []

    class Noting:
        def __init__(self, name):
            self.name = name

        async def run(self, request):
            happened.append(self.name)
            return Observation(request.id, 0.0, ttft_s=1.0, decode_s=2.0, e2e_s=3.0)

    async def sleep(seconds):
        happened.append(seconds)

    monkeypatch.setattr(ab.asyncio, "sleep", sleep)
    sides = {side: Noting(side) for side in SIDES}
    pair = asyncio.run(ab.run_pair(sides, Request("r", [1], 1, 4), 1, rest_s=7.0))
    assert happened == [7.0, "candidate", 7.0, "baseline"]
    assert pair.seconds["baseline"] == {"prefill": 1.0, "decode": 2.0, "end_to_end": 3.0}


def test_no_pair_is_begun_after_the_time_given(tmp_path, url):
    flags = ["--pairs", "50", "--seconds", "0", "--output-tokens", "2", "--context", "256"]
    data = compare_same(url, tmp_path, *flags)
    assert [row["pairs"] for row in data["rows"]] == [2, 2, 2]
    assert data["cells"][0]["prompt_tokens"] == [256, 256]


def test_a_failing_side_ends_the_benchmark(tmp_path, capsys):
    broken = f"{shlex.quote(sys.executable)} -c 'raise SystemExit(\"no model\")' {{port}}"
    arguments = ["bench", "ab", "--baseline", broken, "--candidate", "http://127.0.0.1:9", "--no-prometheus"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert "no model" in capsys.readouterr().err


def test_what_is_neither_url_nor_command_is_refused(tmp_path, capsys):
    arguments = ["bench", "ab", "--baseline", "vllm serve m", "--candidate", "http://127.0.0.1:9"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "{port}" in capsys.readouterr().err


@pytest.fixture
def built(monkeypatch):
    """The attention of each engine that a side was built with; the measurement of rates may build others."""
    built = []

    class Counted(OffloadEngine):
        def __init__(self, *arguments, **options):
            if isinstance(options.get("sink"), Gate):
                built.append(options["attention"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr("elsa_serve.offload.engine.OffloadEngine", Counted)
    return built


@pytest.mark.parametrize(
    ("flags", "engines"),
    [([], ["elsa"]), (["--candidate", "attention=elsa,chunk-tokens=128"], ["sdpa", "elsa", "sdpa", "elsa"])],
    ids=["attention alone", "more than attention"],
)
def test_engines_of_this_process_take_turns_and_warm_ups_leave_no_trace(tmp_path, built, flags, engines):
    """The real engine on the embedded model: each side's metrics hold its pairs and nothing else."""
    arguments = ["bench", "gain", str(DEMO), "--in-process", "--quiet", "--no-prometheus", "--set", SMALL, *flags]
    arguments += ["--context", "600", "--pairs", "3", "--output-tokens", "4", "--warm-up", "0"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert built == engines  # AB BA AB: two sides that are next to each other are one engine's turn
    (cell,) = json.loads((tmp_path / "gain.json").read_text())["cells"]
    assert [pair["output_tokens"] for pair in cell["pairs"]] == [{"baseline": 4, "candidate": 4}] * 3
    assert cell["config"]["baseline"]["attention"] == "sdpa"
    assert cell["config"]["candidate"]["attention"] == "elsa"
    assert cell["labels"]["dtype"] == "float16"
    assert all(pair["texts_equal"] for pair in cell["pairs"])


def test_shared_weights_are_split_where_both_sides_have_our_linear_layers(tmp_path, monkeypatch):
    kinds = []
    observe = in_process.observe

    def noting(engine, request):
        kinds.append(type(engine._loaded.weights.decoder_layers[0].self_attn.q_proj).__name__)
        return observe(engine, request)

    monkeypatch.setattr(in_process, "observe", noting)
    arguments = ["bench", "gain", str(DEMO), "--in-process", "--quiet", "--no-prometheus", "--context", "300"]
    arguments += ["--pairs", "2", "--output-tokens", "2", "--warm-up", "0", "--rest", "0"]
    for linear, kind in (("elsa", "SplitLinear"), ("torch", "Linear")):
        settings = f"{SMALL},dtype=float32,linear={linear}"
        assert main([*arguments, "--set", settings, "--output", str(tmp_path / linear)]) == 0
        assert kinds == [kind] * 4
        kinds.clear()


@pytest.mark.parametrize(("candidate", "key"), [("dtype=float32", "dtype"), ("linear=elsa", "linear")])
def test_sides_that_cannot_share_weights_are_refused(tmp_path, capsys, candidate, key):
    arguments = ["bench", "gain", str(DEMO), "--in-process", "--candidate", candidate]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert f"same {key}" in capsys.readouterr().err


def test_two_servers_need_a_budget_each(tmp_path, capsys):
    assert main(["bench", "gain", str(DEMO), "--output", str(tmp_path)]) == 2
    assert "--set gpu-memory" in capsys.readouterr().err


@pytest.fixture
def fake_python(tmp_path):
    """An "interpreter" that keeps the words it is called with and serves on the port among them."""
    file = tmp_path / "python-with-vllm"
    file.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys\n"
        f"with pathlib.Path({str(tmp_path / 'calls')!r}).open('a') as out:\n"
        "    print(*sys.argv[1:], file=out)\n"
        f"server = [sys.executable, {str(HERE / 'timed_server.py')!r}, '0.0001', '0.001']\n"
        "os.execv(server[0], [*server, sys.argv[sys.argv.index('--port') + 1] + ':1'])\n"
    )
    file.chmod(0o755)
    return file


def test_gain_on_vllm_starts_two_of_its_servers(tmp_path, fake_python):
    arguments = ["bench", "gain", "some-model", "--engine", "vllm", "--python", str(fake_python), "--quiet"]
    settings = "gpu-memory-utilization=0.4,dtype=float16,compilation-config.cudagraph_mode=NONE,enforce-eager"
    arguments += ["--set", settings, "--no-prometheus"]
    arguments += ["--context", "256", "--pairs", "2", "--output-tokens", "3", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    calls = [line.split(" --port ")[0] for line in (tmp_path / "calls").read_text().splitlines()]
    shared = "--max-model-len 260 --no-enable-prefix-caching"
    assert calls == [
        "-m elsa_serve serve some-model --engine vllm --gpu-memory-utilization 0.4 --dtype float16 "
        f"--compilation-config.cudagraph_mode NONE --enforce-eager --attention-backend {backend} {shared}"
        for backend in ("FLASH_ATTN", "elsa")
    ]
    rows = json.loads((tmp_path / "out" / "gain.json").read_text())["rows"]
    named = {(row["engine"], row["dtype"], row["baseline"], row["candidate"]) for row in rows}
    assert named == {("vllm", "float16", "attention-backend=FLASH_ATTN", "attention-backend=elsa")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "gpu-memory-utilization"), (["--in-process", "--set", "gpu-memory-utilization=0.4"], "--in-process")],
)
def test_gain_on_vllm_refuses_what_cannot_be_compared(tmp_path, capsys, flags, message):
    assert main(["bench", "gain", "m", "--engine", "vllm", *flags, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def in_one_process(folder, slowdown):
    """The real engine on the embedded model, with a real Prometheus; as the baseline its passes also do nothing.

    They spin and do not sleep: on a busy machine a sleeper waits for its turn again, which for the short passes of
    decode came to more than what was planted.
    """
    planted = dict.fromkeys(SIDES, 0.0) | {"baseline": slowdown - 1}
    now = {"share": 0.0}

    def build(name, sink):
        options = {"gpu_memory": "512MiB", "context": 4096, "max_batch": 1, "progress": False}
        engine = OffloadEngine(DEMO, sink=sink, **options, prefix_caching=False, num_speculative_tokens=0)
        runner = engine._loaded.runner
        run = runner.run

        def slowed(parts):
            start = time.perf_counter()
            rows = run(parts)
            until = time.perf_counter() + now["share"] * (time.perf_counter() - start)
            while time.perf_counter() < until:
                pass
            return rows

        runner.run = slowed
        return engine

    switch = Switch(build, SIDES, lambda engine, name: now.update(share=planted[name]))
    sides = {name: EngineSide(name, switch) for name in SIDES}
    maker = PromptMaker(tokenizer_of(DEMO))
    try:
        with prometheus.Prometheus({n: side.url for n, side in sides.items()}, folder, interval_s=0.5) as watcher:
            return asyncio.run(run_cell(Cell(2048, 24, pairs=12), sides, maker, prometheus=watcher))
    finally:
        switch.close()
        for side in sides.values():
            side.close()


@pytest.mark.timed
@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize(("slowdown", "percent"), [(1.2, 20), (1.0, 0)])
def test_real_engines_show_what_was_planted_and_nothing_else(tmp_path, slowdown, percent):
    rows = {row["phase"]: row for row in gain_rows([in_one_process(tmp_path, slowdown)], {}, 0.999)}
    for phase, row in rows.items():
        print(phase, row["gain_percent"], row["ci_low"], row["ci_high"], row["prometheus_gain_percent"])
        assert covers(row, percent, percent), (phase, row)
        assert told_by_prometheus(row), (phase, row)
        assert row["outputs_equal"] == 12


@pytest.mark.timed
@needs_prometheus
@pytest.mark.slow
def test_gain_starts_both_servers_and_prometheus_agrees_with_the_client(tmp_path):
    """No claim about the size: two processes of the same program may differ by more than the spread within each."""
    arguments = ["bench", "gain", str(DEMO), "--set", SMALL, "--quiet", "--context", "2048", "--pairs", "6"]
    arguments += ["--confidence", "0.999", "--scrape-interval", "0.5", "--output", str(tmp_path)]
    assert main(arguments) == 0
    for phase, row in rows_of(json.loads((tmp_path / "gain.json").read_text())).items():
        assert row["ci_low"] - 2 <= row["prometheus_gain_percent"] <= row["ci_high"] + 2, (phase, row)
        assert (row["engine"], row["dtype"], row["outputs_equal"]) == ("elsa-offload", "float16", 6)
