"""The planner: budgets kept to the byte, refusals whose numbers are true, predictions that follow the placement."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import COMMON, FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import make_config
from transformers import AutoConfig, LlamaConfig

from elsa_serve.errors import BudgetError
from elsa_serve.offload.geometry import Geometry, max_context, whole_waves
from elsa_serve.offload.kv import KVPool, KVShape
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.plan import Plan, make_plan
from elsa_serve.offload.plan_text import render
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.streams import make_streams
from elsa_serve.offload.weights import load_model

GIB = 2**30
RATES = Rates(h2d=50e9, d2h=50e9, device_memory=3e12, host_memory=100e9, flops=500e12, source="of this test")


def llama_13b(dtype: torch.dtype = torch.float16) -> Geometry:
    rope = {"rope_type": "linear", "factor": 32.0, "rope_theta": 1e4}
    config = LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000,
        max_position_embeddings=4096, rope_parameters=rope,
    )  # fmt: skip
    return Geometry.from_config(config, dtype)


LLAMA_13B = llama_13b()


def plan_13b(**options: Any) -> Plan:
    options = {"gpu_budget": 8 * GIB, "host_budget": 110 * GIB, "context": 32768, "rates": RATES} | options
    return make_plan(options.pop("geometry", LLAMA_13B), **options)


def test_geometry_of_llama_13b() -> None:
    geometry = LLAMA_13B
    assert (geometry.layers, geometry.heads, geometry.kv_heads, geometry.head_dim) == (40, 40, 40, 128)
    assert geometry.weights_bytes == pytest.approx(25.4e9, rel=0.01)
    assert geometry.outside_bytes == pytest.approx(2 * 32000 * 5120 * 2, rel=0.001)
    assert geometry.kv_bytes(1) == 800 * 1024
    assert geometry.max_context == 131072
    assert llama_13b(torch.float32).weights_bytes == pytest.approx(2 * geometry.weights_bytes, rel=0.001)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_geometry_agrees_with_the_loaded_model(family: str, tmp_path: Path) -> None:
    config = make_config(family)
    config.save_pretrained(tmp_path)
    geometry = Geometry.from_config(config, torch.float32)
    weights = load_model(tmp_path, dtype=torch.float32, device="cpu", load_format="dummy", progress=False)
    assert geometry.layer_bytes == weights.store.layers[0].numel()
    assert geometry.weights_bytes == weights.store.nbytes
    assert geometry.outside_bytes <= weights.device_nbytes <= geometry.outside_bytes + 1024  # buffers besides
    weights.close()


def test_the_text_says_what_is_replayed_from_graphs() -> None:
    for gib, replayed in ((8, False), (50, True), (100, True)):
        made = make_plan(llama_13b(), gpu_budget=gib * GIB, host_budget=100 * GIB, context=32768)
        assert made.graphs == replayed
        assert ("then a token, from CUDA graphs: about" in render(made)) == replayed
        assert ("CUDA graphs  " in render(made)) == replayed


def test_the_text_says_where_a_token_waits_for_python() -> None:
    for graphs in (True, False):
        text = render(plan_13b(gpu_budget=100 * GIB, graphs=graphs, rates=replace(RATES, layer_s=1.2e-3)))
        assert ("set by issue by the host: Python, twice as fast or slow" in text) != graphs


def test_the_text_says_where_a_token_waits_for_a_disk_that_others_use() -> None:
    for gib, waits in ((10, True), (100, False)):
        text = render(plan_13b(gpu_budget=12 * GIB, host_budget=gib * GIB, context=2048, disk=True))
        assert ("set by disk: a disk that others use, too, gives a third more or less" in text) == waits


@pytest.mark.parametrize(
    ("model", "changes", "whole"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}, False),
        ("mistral", {}, False),
        ("mistral", {"sliding_window": None}, True),
        ("gemma2", {}, False),
        ("gpt_oss", {"num_local_experts": 2, "layer_types": ["full_attention"] * 5}, False),  # sinks
    ],
)
def test_windows_and_sinks_are_known(model: str, changes: dict[str, Any], whole: bool) -> None:
    config = AutoConfig.for_model(model, **COMMON | FAMILIES.get(model, {}) | changes)
    assert Geometry.from_config(config, torch.float32).whole_context == whole


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}, 32768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096}, 4096),
        (
            {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
            8192,
        ),
    ],
)
def test_max_context_respects_rope_scaling(rope: dict[str, Any], expected: int) -> None:
    class Config:
        max_position_embeddings = 4096
        rope_parameters = rope

    assert max_context(Config()) == expected


# --- placement ----------------------------------------------------------------------------------------------------


def test_eight_gib_streams_every_layer_and_keeps_the_budget() -> None:
    plan = plan_13b(resident_layers=0)
    assert plan.resident_layers == ()
    assert plan.slots == 2
    assert plan.prefetch_depth == 1
    assert sum(plan.gpu_bytes.values()) <= 8 * GIB
    assert plan.kv_gpu_bytes == LLAMA_13B.kv_bytes(plan.kv_gpu_tokens)
    assert plan.kv_gpu_bytes + plan.kv_host_bytes == LLAMA_13B.kv_bytes(32768)
    assert plan.kv_tokens == 32768


def test_a_layers_kv_split_along_the_sequence_fills_the_device_first() -> None:
    plan = plan_13b()
    token = LLAMA_13B.kv_token_bytes()
    assert 0 < plan.kv_gpu_tokens < 32768
    assert plan.kv_gpu_tokens + plan.kv_host_tokens == 32768
    assert plan.kv_gpu_tokens * token * 40 <= plan.kv_gpu_bytes < (plan.kv_gpu_tokens + 1) * token * 40
    assert plan.kv_layer_split() == (plan.kv_gpu_tokens * token, plan.kv_host_tokens * token)
    assert plan.kv_layer_split(100) == (100 * token, 0)
    assert plan_13b(gpu_budget=100 * GIB).kv_layer_split() == (32768 * token, 0)


def test_memory_is_shared_so_that_both_pipes_take_as_long() -> None:
    for size in (8, 16, 24, 36):
        plan = plan_13b(gpu_budget=size * GIB)
        assert plan.pipes is not None
        pipes = plan.pipes["decode"]
        if size != 16:
            assert pipes["copies to the device"] == pytest.approx(pipes["attention on the host"], rel=0.1)
        else:  # two slots, which are full in front of every resident layer: equal pipes would wait for each other
            assert plan.slots == 2
            equal = plan_13b(gpu_budget=size * GIB, resident_layers=8)
            assert equal.bottleneck is not None
            assert equal.bottleneck["decode"] == "copies that wait for a slot"
            assert pipes["copies to the device"] < pipes["attention on the host"] == plan.s_per_token
        for other in range(0, size // 2, 4):
            assert plan.s_per_token <= plan_13b(gpu_budget=size * GIB, resident_layers=other).s_per_token
    whole = plan_13b(gpu_budget=60 * GIB)
    assert whole.resident_layers == tuple(range(40))
    assert (whole.slots, whole.kv_host_bytes) == (0, 0)


def test_a_slow_cpu_gets_less_kv_and_a_slow_bus_fewer_layers() -> None:
    def resident(**changes: float) -> int:
        return len(plan_13b(gpu_budget=24 * GIB, rates=replace(RATES, **changes)).resident_layers)

    even = resident()
    assert resident(cpu_attention=20e9, cpu_attention_beside_h2d=20e9) < even
    assert resident(h2d=12e9, h2d_beside_cpu_attention=12e9) > even


def test_kv_that_host_memory_does_not_hold_may_lie_on_disk() -> None:
    with pytest.raises(BudgetError, match="--host-memory"):
        plan_13b(host_budget=40 * GIB)
    plan = plan_13b(host_budget=40 * GIB, kv_disk=20 * GIB)
    assert plan.kv_gpu_tokens + plan.kv_host_tokens + plan.kv_disk_tokens == 32768
    assert min(plan.kv_host_tokens, plan.kv_disk_tokens) > 0
    assert sum(plan.host_bytes.values()) <= 40 * GIB
    assert LLAMA_13B.kv_bytes(plan.kv_disk_tokens) <= plan.kv_disk_bytes <= 20 * GIB
    assert plan.bottleneck is not None
    assert plan.bottleneck["decode"] == "attention over KV on disk"
    assert f"{plan.kv_disk_tokens} on disk" in render(plan)
    assert plan_13b(kv_disk=20 * GIB).kv_disk_bytes == 0  # not needed
    with pytest.raises(BudgetError, match="--host-memory"):
        plan_13b(host_budget=26 * GIB, kv_disk=2 * GIB)


def test_resident_layers_are_spread_evenly() -> None:
    layers = plan_13b(gpu_budget=36 * GIB, resident_layers=8).resident_layers
    assert layers == (0, 5, 10, 15, 20, 25, 30, 35)


def test_resident_layers_take_no_host_memory() -> None:
    plan = plan_13b(gpu_budget=48 * GIB, host_budget=12 * GIB)
    assert len(plan.resident_layers) > 20
    assert plan.host_bytes["weights of streamed layers"] <= 12 * GIB
    with pytest.raises(BudgetError, match="--host-memory"):
        plan_13b(gpu_budget=48 * GIB, host_budget=12 * GIB, resident_layers=10)
    assert not any(plan_13b(gpu_budget=64 * GIB, host_budget=0).host_bytes.values())


def test_what_was_asked_for_is_kept() -> None:
    plan = plan_13b(gpu_budget=100 * GIB, resident_layers=0, slots=5, chunk_tokens=1000)
    assert (plan.resident_layers, plan.slots, plan.chunk_tokens) == ((), 5, 1000)
    assert plan.gpu_bytes["layer slots"] == 5 * LLAMA_13B.layer_bytes


def test_chunks_shrink_with_the_budget_and_never_exceed_the_context() -> None:
    chunks = [plan_13b(gpu_budget=size * GIB, context=4096).chunk_tokens for size in (4, 8, 24)]
    assert chunks == sorted(chunks)
    assert chunks[0] < 4096
    assert plan_13b(gpu_budget=24 * GIB, context=300).chunk_tokens == 300


def test_chunks_fill_whole_waves_of_the_devices_attention() -> None:
    """By hand: 40 heads × 33 tiles of 128 rows are ten programs for each of 132 multiprocessors."""
    assert whole_waves(4096, 40, 132) == whole_waves(4096, 32, 132) == 33 * 128
    assert [whole_waves(size, 40, 132) for size in (8192, 16384, 32768)] == [66 * 128, 132 * 128, 264 * 128]
    assert whole_waves(4096, 32, 108) == 30 * 128  # 960 programs: of nine waves 8.9; 27 tiles, eight, are too few
    assert whole_waves(4096, 14, 132) == 34 * 128  # 476 of 528
    assert whole_waves(2048, 40, 132) == 16 * 128  # 640 of 660
    assert whole_waves(64, 40, 132) == 64  # there is no other
    memory = {"gpu_budget": 40 * GIB, "resident_layers": 0}
    for device, chunk in (("cuda", 4224), ("cpu", 4096)):
        made = plan_13b(**memory, rates=replace(RATES, chunk_s=0.0), device_type=device)
        assert made.chunk_tokens == chunk
    assert plan_13b(**memory, rates=replace(RATES, chunk_s=0.0, multiprocessors=128)).chunk_tokens == 4096


def test_float32_products_without_tensor_cores_gain_nothing_from_larger_chunks() -> None:
    budget = {"geometry": llama_13b(torch.float32), "gpu_budget": 24 * GIB, "resident_layers": 0, "rates": None}
    assert plan_13b(**budget).chunk_tokens == 4224
    assert plan_13b(**budget, linear="elsa").chunk_tokens == 32768


def test_a_batch_takes_what_the_host_has_left_and_says_so() -> None:
    plan = plan_13b(batch=8)
    assert 32768 < plan.kv_tokens < 8 * 32768
    assert 0 <= plan.host_budget - sum(plan.host_bytes.values()) < 4096
    small = plan_13b(batch=2, context=1024)
    assert small.kv_tokens >= 2048


def test_without_a_gpu_no_context_is_reserved() -> None:
    assert plan_13b(device_type="cpu").gpu_bytes["CUDA context"] == 0
    assert plan_13b().gpu_bytes["CUDA context"] > 0


def test_the_ring_takes_what_was_planned(tmp_path: Path) -> None:
    config = make_config("llama", layers=6)
    config.save_pretrained(tmp_path)
    geometry = Geometry.from_config(config, torch.float32)
    budget = geometry.outside_bytes + 800_000
    plan = make_plan(geometry, gpu_budget=budget, host_budget=10**8, context=64, resident_layers=1, device_type="cpu")
    weights = load_model(
        tmp_path, dtype=torch.float32, device="cpu", load_format="dummy", progress=False, resident=plan.resident_layers
    )
    streams = make_streams("cpu")
    ring = WeightStream(weights, plan.resident_layers, plan.slots, streams)
    assert ring.device_nbytes == plan.gpu_bytes["layer slots"] + plan.gpu_bytes["resident layers"]
    assert weights.store.host_nbytes == plan.host_bytes["weights of streamed layers"]
    ring.close()
    streams.close()
    weights.close()


@settings(max_examples=150, deadline=None)
@given(
    gpu=st.integers(1 * GIB, 90 * GIB),
    host=st.integers(1 * GIB, 200 * GIB),
    context=st.integers(1, 131072),
    batch=st.integers(1, 16),
    resident=st.none() | st.integers(0, 40),
    slots=st.none() | st.integers(2, 6),
    chunk=st.none() | st.integers(1, 10000),
    fp32=st.booleans(),
)
def test_every_plan_keeps_its_budgets_or_is_refused(
    gpu: int,
    host: int,
    context: int,
    batch: int,
    resident: int | None,
    slots: int | None,
    chunk: int | None,
    fp32: bool,
) -> None:
    geometry = replace(LLAMA_13B, dtype=torch.float32, layer_bytes=LLAMA_13B.layer_bytes * 2) if fp32 else LLAMA_13B
    geometry = replace(geometry, weights_bytes=geometry.layer_bytes * 40)
    try:
        plan = make_plan(
            geometry, gpu_budget=gpu, host_budget=host, context=context, batch=batch, resident_layers=resident,
            slots=slots, chunk_tokens=chunk, rates=RATES,
        )  # fmt: skip
    except BudgetError:
        return
    assert sum(plan.gpu_bytes.values()) <= gpu
    assert sum(plan.host_bytes.values()) <= host
    assert min(*plan.gpu_bytes.values(), *plan.host_bytes.values()) >= 0
    shape = KVShape(40, geometry.kv_heads, geometry.head_dim, geometry.dtype)
    pool = KVPool(shape, *(torch.empty(n, device="meta") for n in (plan.kv_gpu_bytes, plan.kv_host_bytes)))
    pool.check(context)  # one request of full length fits
    assert plan.gpu_bytes["KV"] + plan.host_bytes["KV"] <= geometry.kv_bytes(context) * batch
    assert resident is None or len(plan.resident_layers) == resident
    assert plan.slots >= 2 or len(plan.resident_layers) == 40
    assert plan.ttft_s > 0
    assert plan.s_per_token > 0


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_context_too_large_names_the_largest_that_fits_and_it_does_fit() -> None:
    with pytest.raises(BudgetError, match="--host-memory") as caught:
        plan_13b(context=131072)
    largest = int(re.search(r"largest context that fits is (\d+) tokens", str(caught.value))[1])  # type: ignore[index]
    assert plan_13b(context=largest).context == largest
    with pytest.raises(BudgetError):
        plan_13b(context=largest + 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_refusal_names_the_disk_space_that_is_enough(batch: int) -> None:
    with pytest.raises(BudgetError) as caught:
        plan_13b(host_budget=40 * GIB, batch=batch)
    asked = int(re.search(r"--kv-disk (\d+)MiB", str(caught.value))[1]) << 20  # type: ignore[index]
    assert plan_13b(host_budget=40 * GIB, batch=batch, kv_disk=asked).kv_disk_tokens > 0
    with pytest.raises(BudgetError, match=f"--kv-disk {asked >> 20}MiB"):
        plan_13b(host_budget=40 * GIB, batch=batch, kv_disk=asked - (1 << 20))
    with pytest.raises(BudgetError, match=r"^(?!.*--kv-disk)"):
        plan_13b(host_budget=20 * GIB)  # does not even hold the weights


def test_the_least_that_is_needed_is_enough() -> None:
    with pytest.raises(BudgetError) as caught:
        plan_13b(gpu_budget=3 * GIB, slots=2)
    least = float(re.search(r"([\d.]+) GiB are needed at least", str(caught.value))[1])  # type: ignore[index]
    with pytest.raises(BudgetError):
        plan_13b(gpu_budget=int((least - 0.1) * GIB), slots=2)
    assert plan_13b(gpu_budget=int((least + 0.1) * GIB), slots=2).kv_gpu_tokens < 1000


def test_a_gpu_too_small_for_two_layers() -> None:
    with pytest.raises(BudgetError, match=r"1\.5 GiB on the device.*2 layer slots 1\.2 GiB.*no context fits"):
        plan_13b(gpu_budget=int(1.5 * GIB))


def test_a_host_too_small_for_the_weights() -> None:
    with pytest.raises(BudgetError, match=r"20\.0 GiB in host memory.* are needed \(weights 23\.6 GiB, KV"):
        plan_13b(host_budget=20 * GIB)


def test_a_host_too_small_for_the_kv() -> None:
    with pytest.raises(BudgetError, match=r"30\.0 GiB in host memory.*KV \d.*largest context that fits is"):
        plan_13b(host_budget=30 * GIB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 131073}, "--context 131073 exceeds the model's maximum of 131072"),
        ({"context": 0}, "--context 0 is too small"),
        ({"slots": 1}, "--slots 1 is too small; it must be at least 2"),
        ({"batch": 0}, "--max-batch 0 is too small"),
        ({"chunk_tokens": 0}, "--chunk-tokens 0 is too small"),
        ({"resident_layers": 41}, "--resident-layers 41 is not in 0 … 40"),
        ({"resident_layers": 30}, "use fewer --resident-layers"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        plan_13b(**options)


# --- prediction and print -----------------------------------------------------------------------------------------


def test_more_device_memory_is_never_predicted_slower() -> None:
    times = [plan_13b(gpu_budget=size * GIB).s_per_token for size in (6, 8, 12, 16, 24, 32, 40, 48, 60)]
    assert times == sorted(times, reverse=True)


def test_render_shows_every_item_the_tiers_and_the_times() -> None:
    plan = plan_13b(gpu_budget=24 * GIB)
    text = render(plan)
    for name, nbytes in (*plan.gpu_bytes.items(), *plan.host_bytes.items()):
        assert (name in text) or not nbytes
    for words in (
        "budget 24.0 GiB",
        "32768 of 131072",
        "of 32768 tokens",
        "3 slots",
        f"{plan.ttft_s:.3g} s",
        "of this test",
        "compute",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 160
    assert "not needed, all layers are resident" in render(plan_13b(gpu_budget=100 * GIB))
