"""The Prometheus and log sinks: names, counts, invariants."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elsa_serve.metrics import LogSink, Metrics, Tee
from elsa_serve.stats import (
    CancelLatency,
    ClientDisconnected,
    DiskReads,
    EngineStarted,
    Gauges,
    HostAttention,
    InterTokenLatency,
    Preempted,
    PrefixLookup,
    Record,
    RequestFinished,
    RequestReceived,
    RequestRejected,
    ServerState,
    StepStats,
    Transfer,
)

TRANSFERS = (
    Transfer("weights", "h2d", 2000, 0.5, stall_s=0.2, hidden_s=0.3, count=4),
    Transfer("kv", "d2h", 1000, 0.25, stall_s=0.0, hidden_s=0.25),
)
DECODE_STEP = StepStats(
    "decode", 0.2, 0, 1, "sdpa", drafted_tokens=8, accepted_tokens=5, predicted_s=0.25,
    host_attention=HostAttention(900, 0.05, 0.02, 40),
)  # fmt: skip
GAUGES = Gauges(
    1, 2, 3, 500, {"gpu": 10, "host": 0}, {"gpu": 20, "host": 0}, {"gpu": 4, "host": 6}, {"weights": 5},
    {"weights of all layers": 7}, {"first_token": 3.0, "token": 0.5},
)  # fmt: skip
ONE_OF_EACH: tuple[Record, ...] = (
    RequestReceived("completions"),
    RequestRejected("chat_completions", "queue_full"),
    RequestFinished("completions", "ok", 40_000, 11, 1.0, 20.0, 2.0, 21.0, 23.0),
    StepStats("prefill", 20.0, 40_000, 1, "elsa.cpu", TRANSFERS, predicted_s=19.0, disk=DiskReads(500, 0.4, 0.1)),
    DECODE_STEP,
    InterTokenLatency(0.2),
    GAUGES,
    PrefixLookup(100, 64),
    Preempted(1),
    ClientDisconnected("prefill"),
    CancelLatency(0.01),
    ServerState("ready", 4),
    EngineStarted("org/model", "float16", "elsa", 4096, 12.5, {"version": "1", "torch": "2", "cuda": "", "gpu": ""}),
)


def values(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {f"{s.name}{sorted(s.labels.items()) or ''}": s.value for family in families for s in family.samples}


def total(metrics: Metrics, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())


@pytest.fixture
def fed() -> Metrics:
    metrics = Metrics()
    for record in ONE_OF_EACH:
        metrics.record(record)
    return metrics


def test_every_kind_of_record_is_taken() -> None:
    assert {type(record) for record in ONE_OF_EACH} == set(get_args(Record))


def test_every_metric_is_fed(fed: Metrics) -> None:
    """No metric is exported that nothing sets: each of ours shows a change after one record of every kind."""
    before, after = values(Metrics()), values(fed)
    changed = {re.sub(r"\[.*|_(count|sum|bucket)\b.*", "", key) for key in after if before.get(key) != after[key]}
    ours = {f.name for f in fed.registry.collect() if f.name.startswith("elsa_")}
    assert {name for name in ours if not {name, f"{name}_total"} & changed} == set()


def test_values(fed: Metrics) -> None:
    for name, labels, value in (
        ("elsa_time_to_first_token_seconds_sum", {"ctx": "le_128k"}, 21.0),
        ("elsa_time_per_output_token_seconds_sum", {}, 0.2),
        ("elsa_prompt_tokens_total", {}, 40_000),
        ("elsa_generation_tokens_total", {}, 2),
        ("elsa_attention_backend_steps_total", {"backend": "elsa"}, 1),
        ("elsa_offload_transfer_bytes_total", {"object": "weights", "direction": "h2d"}, 2000),
        ("elsa_offload_transfers_total", {"object": "weights"}, 4),
        ("elsa_offload_stall_seconds_total", {}, 0.2),
        ("elsa_offload_hidden_seconds_total", {}, 0.55),
        ("elsa_step_predicted_seconds_total", {"phase": "prefill"}, 19.0),
        ("elsa_step_predicted_seconds_total", {"phase": "decode"}, 0.25),
        ("elsa_host_attention_bytes_total", {}, 900),
        ("elsa_host_attention_stall_seconds_total", {}, 0.02),
        ("elsa_disk_read_bytes_total", {}, 500),
        ("elsa_disk_stall_seconds_total", {}, 0.1),
        ("elsa_plan_seconds", {"kind": "token"}, 0.5),
        ("elsa_kv_cache_used_bytes", {"tier": "gpu"}, 10),
        ("elsa_host_memory_bytes", {"kind": "weights_of_all_layers"}, 7),
        ("elsa_engine_state", {"state": "ready"}, 1),
        ("elsa_engine_state", {}, 1),
        ("elsa_startup_seconds", {}, 12.5),
    ):
        assert total(fed, name, **labels) == pytest.approx(value), name


def test_phases_of_a_request_sum_to_its_duration(fed: Metrics) -> None:
    parts = [total(fed, f"elsa_request_{phase}_seconds_sum") for phase in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(total(fed, "elsa_request_duration_seconds_sum"))


def test_received_is_finished_and_running_and_waiting() -> None:
    metrics = Metrics()
    for _ in range(6):
        metrics.record(RequestReceived("completions"))
    metrics.record(Gauges(1, 2, 3, 0))
    metrics.record(RequestRejected("generate", "draining"))
    metrics.record(RequestRejected("somewhere", "auth", "client_error"))
    metrics.record(RequestFinished("completions", "cancelled", 5, 0, 0.1, None, None, None, 0.1))
    metrics.record(Gauges(0, 2, 3, 0))
    names = ("elsa_requests_finished_total", "elsa_requests_running", "elsa_requests_waiting")
    assert total(metrics, "elsa_requests_received_total") == sum(total(metrics, name) for name in names) == 8
    assert total(metrics, "elsa_requests_received_total", endpoint="other") == 1


def test_size_and_zero_start() -> None:
    lines = Metrics().exposition().decode().splitlines()
    series = [line for line in lines if not line.startswith("#")]
    assert len(series) <= 400
    assert not any("_created" in line for line in series)
    ours = [line for line in series if line.startswith("elsa_")]
    assert all(line.endswith(" 0.0") for line in ours)
    assert any('outcome="timeout"' in line for line in ours)
    assert any(line.startswith("process_resident_memory_bytes") for line in series)
    assert any(line.startswith("python_info") for line in series)


def test_naming_rules(fed: Metrics) -> None:
    """Those of the Prometheus documentation that can be checked by name."""
    for family in fed.registry.collect():
        if not family.name.startswith("elsa_"):
            continue
        assert re.fullmatch(r"elsa_[a-z0-9_]+", family.name)
        assert family.documentation.endswith((".", "now."))
        assert not re.search(r"_(ms|us|mb|kb|gb|percent|perc|milliseconds|histogram|gauge|counter)\b", family.name)
        assert not family.name.endswith(("_count", "_sum", "_bucket"))
        if family.type != "counter":
            assert not family.name.endswith("_total")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_bytes", "_tokens"))
        for sample in family.samples:
            assert sample.labels.keys() <= {
                "endpoint", "outcome", "reason", "phase", "ctx", "le", "backend", "object", "direction", "tier", "kind",
                "state", "version", "torch", "cuda", "gpu", "model", "dtype", "attention", "context",
            }  # fmt: skip


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (package prometheus) is not installed")
def test_promtool_finds_nothing(fed: Metrics) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=fed.exposition(), capture_output=True, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_two_servers_in_a_process_do_not_meet(fed: Metrics) -> None:
    other = Metrics()
    other.record(RequestReceived("completions"))
    assert total(fed, "elsa_requests_received_total") == 2
    assert total(other, "elsa_requests_received_total") == 1


def test_records_from_many_threads_are_all_counted() -> None:
    metrics = Metrics()

    def many() -> None:
        for _ in range(500):
            metrics.record(RequestReceived("generate"))

    work = [threading.Thread(target=many) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert total(metrics, "elsa_requests_received_total") == 2000


def test_log_sink_says_one_line_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    times: Iterator[float] = iter([0.0, 4.0, 10.0, 11.0])
    sink = LogSink(10.0, clock=lambda: next(times))
    with caplog.at_level(logging.INFO, "elsa_serve"):
        sink.record(Gauges(1, 2, 3, 0))
        for _ in range(3):
            sink.record(StepStats("mixed", 1.0, 50, 5, "elsa", TRANSFERS))
    assert [record.message for record in caplog.records] == [
        "prompt 10.0, generation 1.0 tokens/s, running 3, waiting 3, stalled 20 % of 2.0 s of passes"
    ]


def test_the_log_counts_no_idle_time(caplog: pytest.LogCaptureFixture) -> None:
    """Two passes of a second, an hour of nothing, and ten more: the rates are those of the busy times."""
    times = iter([0.0, 1.0, 2.0, *(3602.0 + i for i in range(11))])
    sink = LogSink(10.0, clock=lambda: next(times))
    with caplog.at_level(logging.INFO, "elsa_serve"):
        for _ in range(13):
            sink.record(StepStats("decode", 1.0, 0, 5, "elsa"))
    assert [record.message.split(",")[1] for record in caplog.records] == [" generation 5.0 tokens/s"] * 2


def test_tee() -> None:
    sinks = [Metrics(), Metrics()]
    Tee(*sinks).record(RequestReceived("completions"))
    assert [total(sink, "elsa_requests_received_total") for sink in sinks] == [1, 1]


def test_no_page_shows_a_change_half_done() -> None:
    """Records of one call appear together, whenever the page is read."""
    metrics = Metrics()
    stop = threading.Event()
    finished = RequestFinished("completions", "ok", 5, 1, 0.1, 0.1, 0.1, 0.2, 0.3)

    def change() -> None:
        while not stop.is_set():
            metrics.record(RequestReceived("completions"), Gauges(0, 0, 1, 0))
            metrics.record(finished, Gauges(0, 0, 0, 0))

    worker = threading.Thread(target=change)
    worker.start()
    try:
        for _ in range(100):
            page = values(metrics)
            sums = {
                name: sum(value for sample, value in page.items() if sample.startswith(f"elsa_requests_{name}"))
                for name in ("received_total", "finished_total", "running", "waiting")
            }
            assert sums["received_total"] == sums["finished_total"] + sums["running"] + sums["waiting"]
    finally:
        stop.set()
        worker.join()
    assert sums["received_total"] > 0
