"""The machine's rates: all of them measured, kept by machine and versions, measured again on demand."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload import measure, probes
from elsa_serve.offload.machine import Rates, assumed_rates

CPU = torch.device("cpu")
TINY = measure.Sizes(
    copy=1 << 20,
    kv=1 << 20,
    host=3 << 20,
    file=1 << 20,
    attention=64,
    product=(32, 64, 64),
    probe_hidden=64,
    probe_prompt=32,
)


@pytest.fixture(scope="module")
def measured() -> Rates:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BESIDE_S", 0.02)
        patch.setattr(measure, "WARM_UP_S", 0.0)
        return measure.measure_rates(CPU, torch.float32, sizes=TINY)


def test_every_rate_is_measured(measured: Rates) -> None:
    assumed = asdict(assumed_rates(torch.float32))
    for name, value in asdict(measured).items():
        assert value != assumed[name], name
        assert name == "source" or value > 0, name
    assert "cores" in measured.source
    assert len(measure.describe(measured)) == 7


def test_the_cpu_attends_other_memory_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call finds in the processor's cache would be no rate of the memory's."""
    read: list[int] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> None:
        assert (k.shape, v.shape) == ((1, 2, 78, 32),) * 2
        read.extend((k.data_ptr(), v.data_ptr()))

    monkeypatch.setattr(measure.native, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(measure.elsa_kernels, "attention", attention)
    storage, heads = torch.zeros(3 * 40_000, dtype=torch.uint8), measure.Heads(4, 2, 32)
    call = measure._CpuAttention(CPU, storage, 40_000, torch.float32, heads).call(1)
    for _ in range(4):
        call()
    assert len(set(read)) == 6
    assert read[:2] == read[6:]


def test_a_probe_that_cannot_run_leaves_its_rates_assumed(
    measured: Rates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("no memory for a probe")

    monkeypatch.setattr(probes, "_probe", refuse)
    found = probes.engine_rates(CPU, torch.float32, "elsa", "torch", TINY, measured)
    assert found == {}
    assert "no memory for a probe" in caplog.text


@pytest.mark.parametrize(("load", "warned"), [(0.5, False), (1e4, True)])
def test_a_busy_machine_is_named_where_it_is_measured(
    load: float, warned: bool, rates: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "measure_rates", lambda *_, **__: Rates())
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    rates(CPU, torch.float32)
    assert ("the rates come out too low" in caplog.text) == warned


def test_rates_are_measured_once_and_kept(
    rates: Any, measured: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    calls: list[str] = []

    def counted(device: torch.device, dtype: torch.dtype, *, attention: str, linear: str, heads: Any) -> Rates:
        calls.append(f"{dtype} {attention} {linear} {heads}")
        return replace(measured, h2d=len(calls) * 1e9)

    monkeypatch.setattr(measure, "measure_rates", counted)
    with caplog.at_level(logging.WARNING):
        assert rates(CPU, torch.float32).h2d == 1e9
        assert rates(CPU, torch.float32).h2d == 1e9
    assert caplog.text.count("measuring this machine") == 1
    assert rates(CPU, torch.bfloat16).h2d == 2e9
    assert rates(CPU, torch.float32, attention="sdpa").h2d == 3e9
    assert rates(CPU, torch.float32, refresh=True).h2d == 4e9
    assert rates(CPU, torch.float32).h2d == 4e9
    assert rates(CPU, torch.bfloat16).h2d == 2e9
    grouped = measure.Heads(32, 8)
    assert rates(CPU, torch.float32, heads=grouped).h2d == 5e9
    assert rates(CPU, torch.float32, heads=grouped).h2d == 5e9
    assert rates(CPU, torch.float32, refresh=True).h2d == 6e9
    assert rates(CPU, torch.float32, heads=grouped).h2d == 7e9
    assert rates(CPU, torch.bfloat16).h2d == 2e9
    assert len(calls) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rates.json"]


def test_rates_of_another_machine_or_version_do_not_count(
    rates: Any, measured: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    calls: list[int] = []
    monkeypatch.setattr(measure, "measure_rates", lambda *_, **__: (calls.append(1), measured)[1])
    rates(CPU, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "__version__", "0.0.0")
        rates(CPU, torch.float32)
    assert len(calls) == 2
    file = tmp_path / "rates.json"
    kept = json.loads(file.read_text())
    assert len(kept) == 2
    for entry in kept.values():
        del entry["disk"]  # as an older version would have left it
    file.write_text(json.dumps(kept))
    rates(CPU, torch.float32)
    assert len(calls) == 3
    file.write_text("damaged")
    rates(CPU, torch.float32)
    assert len(calls) == 4


def test_a_cache_that_cannot_be_written_is_announced(
    rates: Any, measured: Rates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(measure, "measure_rates", lambda *_, **__: measured)
    assert rates(CPU, torch.float32) == measured
    assert "the next start measures again" in caplog.text
    assert measure._disk_rate(1 << 20) == Rates().disk
    assert measure._disk_write_rate(1 << 20, torch.device("cpu")) == Rates().disk_write
    assert "its rate is assumed" in caplog.text


def test_without_memory_to_measure_with_rates_are_assumed_and_not_kept(
    rates: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))

    def refuse(*_: object, **__: object) -> Rates:
        raise BudgetError("CUDA refused to page-lock 640 MiB")

    monkeypatch.setattr(measure, "measure_rates", refuse)
    assert rates(CPU, torch.float32) == assumed_rates(torch.float32)
    assert "no memory to measure with (CUDA refused" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_the_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        measure.sizes_for(torch.device("cuda"), torch.float16),
        kv=64 << 20,
        host=1 << 30,
        probe_hidden=256,
        probe_prompt=256,
    )
    monkeypatch.setattr(measure, "BESIDE_S", 0.05)
    before = torch.cuda.memory_allocated()
    found = measure.measure_rates(torch.device("cuda"), torch.float16, sizes=small)
    # What it timed with is given back: no more stays than cuBLAS's workspaces on the streams that it has seen.
    assert torch.cuda.memory_allocated() - before < 256 << 20
    assert min(value for value in asdict(found).values() if not isinstance(value, str)) > 0
    assert torch.cuda.get_device_name() in found.source
    assert found.graph_attention > 0.5 * found.device_memory  # far beyond what the issue of each call leaves of it


def test_what_no_graph_holds_is_timed_with_its_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    def work() -> None:
        pass

    monkeypatch.setattr(measure, "Capturing", Refusing)
    assert measure._as_a_graph(CPU, work) is work


def test_a_graph_that_is_timed_keeps_alive_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 one replay read weights that had been freed, and unmapped by the next capture."""
    read = torch.zeros(8)
    alive, replays = weakref.ref(read), []

    def work(read: torch.Tensor = read) -> torch.Tensor:
        return read + 1

    def capturing(device: torch.device) -> Any:
        return lambda work: (lambda: replays.append(alive() is not None), work())

    monkeypatch.setattr(measure, "Capturing", capturing)
    timed = measure._as_a_graph(CPU, work)
    del work, read
    gc.collect()
    timed()
    assert replays == [True]
    del timed
    gc.collect()
    assert alive() is None  # and no longer than that
