"""`elsa-serve bench run` against a server of fixed timings."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from elsa_load.client import Client, Endpoint
from elsa_load.pages import Page
from elsa_load.processes import Program
from elsa_load.watch import Watch

from elsa_serve.cli import main

HERE = Path(__file__).parent


def timed_server(*_):
    return [sys.executable, str(HERE / "timed_server.py"), "0.0002", "0.005", "{port}:1"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with Program(timed_server(), tmp_path_factory.mktemp("timed") / "log", startup_s=60, stop_s=10) as program:
        yield program.url


def bench(*arguments):
    return main(["bench", "run", *arguments, "--quiet"])


@pytest.mark.timed
def test_a_storm_of_cancels_loses_no_request_and_can_be_replayed(url, tmp_path, capsys):
    flags = ["--url", url, "--requests", "16", "--rate", "20", "--scale", "0.1"]
    assert bench("cancel-storm", *flags, "--output", str(tmp_path / "a")) == 0
    data = json.loads((tmp_path / "a" / "run.json").read_text())
    summary, watch = data["summary"], data["watch"]
    assert summary["requests"] == 16
    assert summary["outcomes"]["cancelled"] >= 5
    assert summary["outcomes"]["ok"] + summary["outcomes"]["cancelled"] == 16
    assert summary["late_s"] < 0.5
    assert watch["scrapes"] >= 1
    assert watch["unbalanced_scrapes"] == 0
    assert "itl_s" in capsys.readouterr().out
    html = (tmp_path / "a" / "report.html").read_text()
    assert "<svg" in html

    replay = ["--replay", str(tmp_path / "a" / "requests.jsonl"), "--output", str(tmp_path / "b")]
    assert bench("cancel-storm", *flags, *replay) == 0
    first, second = ((tmp_path / name / "requests.jsonl").read_text() for name in "ab")
    assert first == second


@pytest.mark.timed
def test_lengths_are_those_that_the_endpoint_counts(url, tmp_path):
    flags = ["--url", url, "--requests", "3", "--concurrency", "2", "--scale", "0.1", "--output", str(tmp_path)]
    assert bench("closed", *flags) == 0
    data = json.loads((tmp_path / "run.json").read_text())
    seen = data["observations"]
    assert [(one["prompt_tokens"], one["output_tokens"], one["exact_tokens"]) for one in seen] == [(410, 64, True)] * 3
    assert data["summary"]["tpot_s"]["p50"] == pytest.approx(0.005, rel=0.3)
    assert data["summary"]["goodput"]["ratio"] == 1.0


def test_no_request_is_lost_where_the_server_is_stopped_under_load(tmp_path, monkeypatch):
    """Requests that come while it is away, or that its end cut off, are sent again."""
    monkeypatch.setattr("elsa_load.bench_run.elsa_serve_command", timed_server)
    scenario = tmp_path / "restart.yaml"
    scenario.write_text(
        "{name: away, requests: 16, patience_s: 120, restart_at_s: [0.5], arrivals: {kind: constant, rate: 8},"
        " mix: [{prompt_tokens: 500, output_tokens: 20}]}"
    )
    assert bench(str(scenario), "--serve", "no-model", "--output", str(tmp_path / "out")) == 0
    data = json.loads((tmp_path / "out" / "run.json").read_text())
    assert data["summary"]["outcomes"]["ok"] == 16
    assert data["summary"]["retried"] >= 1  # it was away; whether a scrape, one a second, fell into that is chance
    assert data["watch"]["unbalanced_in_a_row"] < 2
    assert (tmp_path / "out" / "server.log").read_text().count("Listening on") == 2


def test_a_sweep_goes_on_where_it_stopped_and_repeats_no_prompt(url, tmp_path, capsys):
    flags = ["closed", "--url", url, "--requests", "4", "--scale", "0.05", "--output", str(tmp_path)]
    assert bench(*flags, "--concurrency", "1", "2") == 0
    first = (tmp_path / "concurrency-1" / "run.json").stat().st_mtime_ns
    assert bench(*flags, "--concurrency", "1", "2", "4") == 0
    assert (tmp_path / "concurrency-1" / "run.json").stat().st_mtime_ns == first
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["concurrency"], row["requests"], row["failed"]) for row in data["rows"]] == [
        (1, 4, 0), (2, 4, 0), (4, 4, 0),
    ]  # fmt: skip
    for row in data["rows"]:  # the server takes one at a time: four requests' tokens and no more
        assert 0 < row["output_tokens_per_s"] < 1 / 0.005
        assert 0 < row["ttft_p50"] <= row["ttft_p95"] <= row["e2e_p95"]
    assert {"machine", "versions", "commit"} <= data.keys()
    saved = [(tmp_path / f"concurrency-{count}" / "requests.jsonl").read_text() for count in (1, 2, 4)]
    prompts = [str(json.loads(line)["prompt"]) for text in saved for line in text.splitlines()]
    assert len(set(prompts)) == 12
    assert (tmp_path / "report.html").read_text().count("<svg") == 4
    assert "ttft_p95" in capsys.readouterr().out
    assert bench(*flags, "--concurrency", "1", "2", "--seed", "7") == 0
    assert (tmp_path / "concurrency-1" / "run.json").stat().st_mtime_ns != first


def test_what_cannot_run_is_refused_with_the_remedy(url, tmp_path, capsys):
    for arguments, message in (
        (["closed"], "--serve MODEL_DIR"),
        (["restart", "--url", url], "needs --serve"),
        (["no-such", "--url", url], "long-context-mix"),
        (["closed", "--url", "http://127.0.0.1:9"], "is the server up?"),
    ):
        assert bench(*arguments, "--output", str(tmp_path)) == 2
        assert message in capsys.readouterr().err


def test_the_list_names_every_scenario(capsys):
    assert main(["bench", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11


def page_of(resident, born, finished):
    lines = []
    for name, value in (
        ("elsa_requests_received_total", 3),
        ("elsa_requests_finished_total", finished),
        ("process_start_time_seconds", born),
        ("process_resident_memory_bytes", resident),
    ):
        lines += [f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}", f"{name} {value}"]
    return Page.parse("\n".join(lines) + "\n")


def watched(pages):
    async def watch_pages():
        async with Client(Endpoint("http://127.0.0.1:9", model="m")) as client:
            watch = Watch(client)
            for second, page in enumerate(pages):
                watch._take(second, page)
            return watch.summary()

    return asyncio.run(watch_pages())


def test_watch_notices_lost_requests_and_growing_memory():
    summary = watched([page_of(1000 + 50 * second, 7, finished=2) for second in range(16)])
    assert (summary["unbalanced_in_a_row"], summary["largest_imbalance"]) == (16, 1.0)
    assert summary["memory_growth"] == pytest.approx(1675 / 1275 - 1)


def test_memory_is_judged_within_a_life_of_the_server():
    """A fresh process is smaller: across a restart growth would be hidden, or loss of memory found."""
    first = [page_of(5000, 7, finished=3)] * 8
    second = [page_of(1000 + 10 * i, 8, finished=3) for i in range(12)]
    summary = watched([*first, *second])
    assert [life["seconds"] for life in summary["lives"]] == [7, 11]
    assert summary["lives"][0]["memory_growth"] == summary["lives"][0]["bytes_per_hour"] == 0
    assert summary["lives"][1]["bytes_per_hour"] == pytest.approx(36_000)
    assert summary["memory_growth"] == pytest.approx(1100 / 1040 - 1)
    assert summary["peak_memory_bytes"] == 5000
    assert summary["unbalanced_scrapes"] == 0
