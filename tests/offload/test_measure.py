"""The machine's rates: all of them measured, kept by machine and versions, measured again on demand."""

from __future__ import annotations

import gc
import json
import logging
import math
import statistics
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_models import make_config, make_engine

from elsa_serve.errors import BudgetError, UsageError
from elsa_serve.offload import device_rates, disk_rates, host_rates, loading, measure, probes, timing
from elsa_serve.offload.disk import PIECE, DirectFile
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.machine import Heads, Rates, assumed_rates

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
        patch.setattr(host_rates, "BESIDE_S", 0.02)
        patch.setattr(timing, "WARM_UP_S", 0.0)
        return measure.measure_rates(CPU, torch.float32, sizes=TINY)


def test_every_rate_is_measured(measured: Rates) -> None:
    assumed = asdict(assumed_rates(torch.float32))
    del assumed["multiprocessors"]  # a GPU's
    for name, value in asdict(measured).items():
        assert value != assumed.get(name), name
        assert name == "source" or value > 0, name
    assert "cores" in measured.source
    assert len(measure.describe(measured)) == 7


def test_the_cpu_attends_other_memory_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call finds in the processor's cache would be no rate of the memory's."""
    read: list[int] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> None:
        assert (k.shape, v.shape) == ((1, 2, 78, 32),) * 2
        read.extend((k.data_ptr(), v.data_ptr()))

    monkeypatch.setattr(host_rates.native, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(host_rates.elsa_kernels, "attention", attention)
    storage, heads = torch.zeros(3 * 40_000, dtype=torch.uint8), Heads(4, 2, 32)
    call = host_rates._CpuAttention(CPU, storage, 40_000, torch.float32, heads).call(1)
    for _ in range(4):
        call()
    assert len(set(read)) == 6
    assert read[:2] == read[6:]


def rounds(monkeypatch: pytest.MonkeyPatch, *attention: float) -> dict[str, float]:
    """What is made of rounds that found these rates of attention, and of none else."""
    found = iter(attention)
    monkeypatch.setattr(host_rates, "_round", lambda *_: {"h2d": 50e9, "cpu_attention": next(found)})
    monkeypatch.setattr(host_rates, "_arithmetic", lambda *_: {})
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    heads = Heads(1, 1, 32)
    once = host_rates._CpuAttention(CPU, torch.zeros(4096, dtype=torch.uint8), 4096, torch.float32, heads)
    return host_rates._shared_rates(torch.zeros(8, dtype=torch.uint8), [torch.zeros(8, dtype=torch.uint8)], once)


def test_rates_of_host_memory_are_those_that_two_rounds_agree_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disturbance that is over before the second round, or before the third."""
    assert rounds(monkeypatch, 100e9, 92e9) == {"h2d": 50e9, "cpu_attention": 96e9}
    assert rounds(monkeypatch, 60e9, 100e9, 104e9)["cpu_attention"] == 102e9
    assert not caplog.records
    assert rounds(monkeypatch, 60e9, 100e9, 70e9, 120e9, 80e9)["cpu_attention"] == 80e9
    assert "by more than 10 %" in caplog.text
    assert "60.0 to 120.0 GB/s" in caplog.text


def test_copies_beside_attention_are_told_from_those_in_its_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second in which attention ran for 0.8 s: 10 GB were copied in the other 0.2 s, and 40 beside it."""
    monkeypatch.setattr(host_rates, "paused", lambda *_: [0.1, 0.3])
    monkeypatch.setattr(host_rates, "_copy_rate", lambda *_: 50e9)
    monkeypatch.setattr(host_rates, "_both_cpu", lambda *_: (50_000_000_000, 1.0, [0.4, 0.4]))
    turns = iter([torch.zeros(1)])
    found = host_rates._round(torch.zeros(1, dtype=torch.uint8), turns, lambda: 0.0, 20_000_000_000)
    assert found == pytest.approx(
        {
            "cpu_attention": 40e9 / 0.4,
            "h2d": 50e9,
            "h2d_beside_cpu_attention": 40e9 / 0.8,
            "cpu_attention_beside_h2d": 40e9 / 0.8,
        }
    )
    # Without copies there is nothing to be beside.
    assert host_rates._round(torch.zeros(0, dtype=torch.uint8), None, lambda: 0.0, 20) == {"cpu_attention": 100}


def test_arithmetic_is_measured_alone_and_beside_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two calls beside copies that took twice and four times as long as one alone."""
    heads = Heads(2, 2, 32)
    attention = host_rates._CpuAttention(CPU, torch.zeros(65536, dtype=torch.uint8), 65536, torch.float32, heads)
    times = iter([9.0, 0.05, 0.15] * 2)  # the first does not count
    monkeypatch.setattr(host_rates._CpuAttention, "call", lambda *_: lambda: next(times))
    monkeypatch.setattr(host_rates, "_copy_rate", lambda *_: 50e9)
    monkeypatch.setattr(host_rates, "_both_cpu", lambda *_: (1, 1.0, [0.2, 0.4]))
    flops = 4 * 2 * 32 * attention.tokens * 32
    found = host_rates._arithmetic(torch.zeros(1, dtype=torch.uint8), iter([torch.zeros(1)]), attention)
    assert found == pytest.approx({"cpu_attention_flops": flops / 0.1, "cpu_attention_flops_beside_h2d": flops / 0.3})
    assert set(host_rates._arithmetic(torch.zeros(0, dtype=torch.uint8), None, attention)) == {"cpu_attention_flops"}


def test_any_few_turns_come_to_all_regions() -> None:
    for count in (1, 2, 3, 7, 40, 64):
        order = host_rates.scattered(range(count))
        assert sorted(order) == list(range(count))
        if count >= 40:
            assert max(order[:8]) - min(order[:8]) > count / 2
            assert max(b - a for a, b in zip(sorted(order[:8]), sorted(order[:8])[1:])) <= count // 3


def test_rates_of_an_engines_own_memory(
    measured: Rates, rates_of_memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Attended are layers of its KV, copied are its weights; what has changed since then is told."""
    monkeypatch.setattr(host_rates, "BESIDE_S", 0.02)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    kv, heads = torch.ones(5 * 65536, dtype=torch.uint8), Heads(2, 2, 32)
    weights = [torch.ones(n, dtype=torch.uint8) for n in (300_000, 200_000)]
    known = replace(measured, cpu_attention=1.0)
    found = rates_of_memory(known, CPU, torch.float32, heads, kv, 65536, weights)
    changed = {name for name, value in asdict(found).items() if value != asdict(known)[name]}
    assert changed == {
        "h2d", "cpu_attention", "h2d_beside_cpu_attention", "cpu_attention_beside_h2d", "cpu_attention_flops",
        "cpu_attention_flops_beside_h2d", "source",
    }  # fmt: skip
    assert "other rates now" in caplog.text
    assert "cpu_attention +" in caplog.text
    alone = rates_of_memory(known, CPU, torch.float32, heads, kv, 65536, [])
    assert alone.cpu_attention > 1.0
    assert alone.h2d == known.h2d


def test_an_engine_is_measured_by_what_lies_in_host_memory(
    make: Any, rates_of_memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its streamed layers and its layers' KV there; the placement stays, the times follow."""
    seen: list[Any] = []

    def looking(rates: Rates, device: Any, dtype: Any, heads: Any, kv: Any, nbytes: int, weights: Any, **o: Any) -> Any:
        seen.extend((kv.numel() // nbytes, [w.numel() for w in weights], o))
        return replace(rates_of_memory(rates, device, dtype, heads, kv, nbytes, weights, **o), cpu_attention=1e3)

    monkeypatch.setattr(host_rates, "BESIDE_S", 0.02)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(host_rates, "rates_of_memory", looking)
    engine = make(gpu_memory="1600KiB", max_batch=1, resident_layers=1)
    plan, loaded = engine.plan, engine._loaded
    assert plan.kv_host_tokens > 0
    now = loading.with_rates_now(plan, loaded.weights, loaded.host_buffer.tensor, 1)
    layers = plan.geometry.layers
    assert seen == [layers, [plan.geometry.layer_bytes] * (layers - 1), {"threads": 1}]
    assert now.pipes["decode"]["attention on the host"] > plan.kv_host_bytes / 1e3
    for placed in ("kv_host_tokens", "resident_layers", "chunk_tokens", "host_bytes"):
        assert getattr(now, placed) == getattr(plan, placed)

    def refuse(*_: Any, **__: Any) -> Rates:
        raise MemoryError("no room")

    monkeypatch.setattr(host_rates, "rates_of_memory", refuse)
    assert loading.with_rates_now(plan, loaded.weights, loaded.host_buffer.tensor, 1) is plan
    assert "no memory to measure with (no room)" in caplog.text
    # Nothing is measured where the host attends nothing.
    for other in (replace(plan, in_place=False), replace(plan, kv_host_bytes=0, kv_gpu_bytes=1 << 30)):
        assert loading.with_rates_now(other, loaded.weights, loaded.host_buffer.tensor, 1) is other


@pytest.mark.gpu
def test_an_engine_on_a_gpu_is_measured_when_it_starts(
    tmp_path: Path, rates_of_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_rates, "rates_of_memory", rates_of_memory)
    make_config(
        "llama", hidden_size=1024, intermediate_size=2752, num_attention_heads=8, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=16384,
    ).save_pretrained(tmp_path)  # fmt: skip
    options: dict[str, Any] = {"context": 16384, "max_batch": 1, "load_format": "dummy", "device": "cuda"}
    engine = make_engine(tmp_path, **options, gpu_memory="2000MiB", host_memory="4GiB", resident_layers=0)
    try:
        assert engine.plan.kv_host_tokens > 0
        assert engine.plan.rates.source.endswith("of host memory when the engine started")
        assert engine.plan.rates.cpu_attention != assumed_rates(torch.float32).cpu_attention
    finally:
        engine.shutdown()


@pytest.mark.parametrize("linear", ["torch", "elsa"])
def test_a_layers_products_and_attention_are_timed(linear: str) -> None:
    geometry = Geometry.from_config(make_config("llama"), torch.float32)
    assert 0 < device_rates.layer_seconds(CPU, torch.float32, linear, geometry, 64) < 1


def test_activations_are_what_a_layer_takes_besides() -> None:
    """By hand: 0.2 s of a layer, of which products of 0.05 s and small kernels of 0.05 s are not theirs."""
    geometry = replace(Geometry.from_config(make_config("llama"), torch.float16), weights_bytes=2 * 10**9, layers=4)
    rates = Rates(flops=1e13, attention_flops=1e30, device_memory=1e30, device_attention=1e30, graph_layer_s=0.05,
                  chunk_s=9.0, pass_s=9.0, layer_s=0.03)  # fmt: skip
    probe = probes._Probe(SimpleNamespace(geometry=geometry), prompt_layer_s=0.2)
    tokens = 1000  # through 10**9 / 4 parameters a layer
    nbytes = geometry.activation_bytes() * tokens
    assert probes._activations(probe, rates, tokens, on_gpu=True) == pytest.approx(nbytes / (0.2 - 0.05 - 0.05))
    # Without a GPU the issue of a layer is part of its time.
    assert probes._activations(probe, rates, tokens, on_gpu=False) == pytest.approx(nbytes / (0.2 - 0.05 - 0.03))
    slow = replace(rates, flops=1e12)  # nothing is left
    assert probes._activations(probe, slow, tokens, on_gpu=True) == pytest.approx(nbytes / 0.01)


def test_layers_are_timed_between_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: four layers, the first of 5 s, the last of 0.1, those between of 1 s; prompts are told from decodes."""
    layers = [torch.nn.Identity() for _ in range(4)]
    clock = 0.0
    monkeypatch.setattr(probes, "time", SimpleNamespace(perf_counter=lambda: clock))
    times = probes._LayerTimes(layers, 8, on_gpu=False)
    for tokens, slower in ((8, 10.0), (1, 50.0), (8, 1.0), (16, 3.0), (8, 2.0)):
        for layer, seconds in zip(layers, (5.0, 1.0, 1.0, 0.1)):
            clock += slower * seconds
            layer(torch.zeros(1, tokens, 2))
    assert times.prompts() == pytest.approx([10.0, 1.0, 2.0])
    assert times.decodes() == pytest.approx([50.0, 3.0])


def test_a_probe_tells_its_layers_from_the_rest_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads decode passes of a prompt's probe, so none run; a pass is its layers and what is left."""
    seen: list[list[float]] = []
    decodes = probes._LayerTimes.decodes

    def looking(times: probes._LayerTimes) -> list[float]:
        seen.append(decodes(times))
        return seen[-1]

    monkeypatch.setattr(probes._LayerTimes, "decodes", looking)
    arguments = (CPU, torch.float32, "elsa", "torch", assumed_rates(torch.float32), 64, 4, 32)
    of_prompts = probes._probe(*arguments, decodes=0, graphs=False)
    assert not seen
    assert of_prompts.prompt_layer_s > 0
    assert math.isnan(of_prompts.decode_s)
    assert math.isnan(of_prompts.half_s)
    both = probes._probe(*arguments, decodes=5, graphs=False)
    assert len(seen[0]) == 1 + probes.WARM_UP_TOKENS + 5
    assert both.decode_layer_s == statistics.median(seen[0][-5:])
    assert 0 < both.decode_rest_s < both.decode_s


def test_chunks_are_no_larger_than_planned(make: Any) -> None:
    engine = make()
    for tokens in (0, engine.plan.chunk_tokens + 1):
        with pytest.raises(UsageError, match=f"chunks of {tokens} tokens: memory is planned for 1 to"):
            engine.use_chunks(tokens)


def test_prompts_in_one_chunk_and_in_two_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a device that slows down by 1 s a prompt, and half a second more for a prompt in two chunks."""
    chunks: list[int] = []
    use_chunks = OffloadEngine.use_chunks

    def keeping(engine: OffloadEngine, tokens: int) -> None:
        chunks.append(tokens)
        use_chunks(engine, tokens)

    monkeypatch.setattr(OffloadEngine, "use_chunks", keeping)
    monkeypatch.setattr(
        probes._LayerTimes, "prompts", lambda _: [i + (0.5 if n == 16 else 0.0) for i, n in enumerate(chunks)]
    )
    arguments = (CPU, torch.float32, "elsa", "torch", assumed_rates(torch.float32), 64, 4, 32)
    found = probes._probe(*arguments, decodes=0, halves=True, graphs=False)
    assert chunks == [32, 16, 32, 16, 16, 32, 16, 32, 32, 16]
    assert found.prompt_layer_s == (5 + 7) / 2
    assert found.half_s == pytest.approx(0.5)


def test_a_probe_that_cannot_run_leaves_its_rates_assumed(
    measured: Rates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("no memory for a probe")

    monkeypatch.setattr(probes, "_probe", refuse)
    found = probes.engine_rates(CPU, torch.float32, "elsa", "torch", TINY, measured, lambda *_: 0.0)
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
    grouped = Heads(32, 8)
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
    folder = measure.envs.cache_dir()
    assert disk_rates.folder_rate(1 << 20, folder) == Rates().disk
    assert disk_rates.write_rate(folder, torch.device("cpu"), 1 << 20) == Rates().disk_write
    assert "its rate is assumed" in caplog.text


def test_a_checkpoints_disk_is_measured_over_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One small file after the other, the largest first: one of them is over before a disk's rate shows."""
    read: list[tuple[str, int, int]] = []

    def counted(file: DirectFile, start: int, nbytes: int, bounce: Any) -> torch.Tensor:
        read.append((file.path.name, start, nbytes))
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(DirectFile, "read", counted)
    assert disk_rates.checkpoint_rate(tmp_path) is None
    assert "there is no *.safetensors in it" in caplog.text
    for name, nbytes in {"a": 5, "b": PIECE + 7, "c": PIECE}.items():
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.truncate(nbytes)
    (tmp_path / "config.json").write_text("{}")
    rate = disk_rates.checkpoint_rate(tmp_path)
    assert rate is not None
    assert rate > 0
    b = [("b.safetensors", 0, PIECE), ("b.safetensors", PIECE, 7)]
    assert sorted(read) == sorted([*b, ("c.safetensors", 0, PIECE), ("a.safetensors", 0, 5)])
    read.clear()
    with DirectFile(tmp_path / "b.safetensors") as file:
        assert disk_rates.read_rate([file], 2 * PIECE) > 0
        assert sorted(read) == b
        read.clear()
        assert disk_rates.read_rate([file], PIECE) > 0
        assert read == b[:1]


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
    monkeypatch.setattr(host_rates, "BESIDE_S", 0.05)
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

    monkeypatch.setattr(device_rates, "Capturing", Refusing)
    assert device_rates.as_a_graph(CPU, work) is work


def test_a_graph_that_is_timed_keeps_alive_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 one replay read weights that had been freed, and unmapped by the next capture."""
    read = torch.zeros(8)
    alive, replays = weakref.ref(read), []

    def work(read: torch.Tensor = read) -> torch.Tensor:
        return read + 1

    def capturing(device: torch.device) -> Any:
        return lambda work: (lambda: replays.append(alive() is not None), work())

    monkeypatch.setattr(device_rates, "Capturing", capturing)
    timed = device_rates.as_a_graph(CPU, work)
    del work, read
    gc.collect()
    timed()
    assert replays == [True]
    del timed
    gc.collect()
    assert alive() is None  # and no longer than that
