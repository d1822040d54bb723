"""Predicted times: every pipe counted once, shared memory counted for both, and the numbers of an H200 reproduced."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from elsa_serve.errors import BudgetError
from elsa_serve.offload.disk_layers import BUFFERS
from elsa_serve.offload.kv import Extent, RequestKV, Span
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.plan import Geometry, Plan, make_plan
from elsa_serve.offload.plan_text import render
from elsa_serve.offload.predict import HOP_S, Pace, Share, device_seconds, pass_time, running_shares
from elsa_serve.offload.rounds import rounds_of

GIB = 2**30
RATES = Rates(
    h2d=50e9, d2h=40e9, device_memory=3e12, device_attention=2e12, host_memory=100e9, flops=500e12,
    attention_flops=400e12,
    cpu_attention=100e9, cpu_attention_beside_h2d=60e9, h2d_beside_cpu_attention=45e9, cpu_attention_flops=1e12,
    disk=2e9, activations=200e9, layer_s=1e-4, pass_s=1e-3,
    graph_attention=2e12, graph_layer_s=0.0, graph_pass_s=0.0, chunk_s=0.0, source="of this test",
)  # fmt: skip
GEOMETRY = Geometry.from_config(
    LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000,
        max_position_embeddings=131072,
    ),
    torch.float16,
)  # fmt: skip
TOKEN = 40 * GEOMETRY.kv_token_bytes()


def plan(**options: Any) -> Plan:
    options = {"gpu_budget": 8 * GIB, "host_budget": 110 * GIB, "context": 32768, "rates": RATES} | options
    return make_plan(GEOMETRY, **options)


def test_prefill_is_products_attention_and_activations_unless_copies_take_longer() -> None:
    products = 2 * GEOMETRY.weights_bytes / 2 * 32768
    attention = 2 * 32768**2 * 40 * 128 * 40
    activations = GEOMETRY.activation_bytes() * 40 * 32768
    keys = 2 * 2 * 5120 * 5120 * 32768  # in the last layer, whose other products only the last token needs
    made = plan()
    whole = products / 500e12 + attention / 400e12 + activations / 200e9
    assert made.ttft_s == pytest.approx(whole * 39 / 40 + keys / 500e12, rel=1e-3)
    assert plan(device_type="cpu").pipes["prefill"]["compute"] > whole  # type: ignore[index]  # not fused there
    assert made.bottleneck is not None
    assert made.bottleneck["prefill"] == "compute"
    slow = plan(rates=replace(RATES, h2d=5e9), resident_layers=0)
    assert slow.ttft_s == pytest.approx(GEOMETRY.weights_bytes / 5e9)
    assert plan(rates=replace(RATES, d2h=1e9)).bottleneck["prefill"] == "copies to the host"  # type: ignore[index]


def test_pipes_that_share_the_hosts_memory_slow_each_other_down() -> None:
    made = plan(resident_layers=0)
    assert made.pipes is not None
    alone = GEOMETRY.weights_bytes / 50e9, made.kv_host_tokens * TOKEN / 100e9
    both = GEOMETRY.weights_bytes / 45e9, made.kv_host_tokens * TOKEN / 60e9
    pipes = made.pipes["decode"]
    arithmetic = 4 * 40 * GEOMETRY.heads * GEOMETRY.head_dim * made.kv_host_tokens / RATES.cpu_attention_flops
    assert alone[0] < pipes["copies to the device"] <= both[0]
    own = device_seconds(GEOMETRY, RATES, [Share(made.kv_gpu_tokens, 1)]) + GEOMETRY.layers * HOP_S
    assert alone[1] < pipes["attention on the host"] - own <= math.hypot(both[1], arithmetic)
    resident = plan(gpu_budget=36 * GIB, resident_layers=40)
    assert resident.kv_host_tokens > 0
    assert resident.pipes is not None  # nothing is copied, so the host attends at its full rate
    host = resident.pipes["decode"]["attention on the host"]
    own = device_seconds(GEOMETRY, RATES, [Share(0, 1)])
    attended = resident.kv_gpu_tokens * TOKEN / RATES.device_attention
    expected = resident.kv_host_tokens * TOKEN / 100e9 + own + 40 * HOP_S
    assert expected - attended < host < expected + 2 * attended
    # The next layers are issued while the host attends: a slow issue is a pipe of its own, and moves nothing.
    slow = plan(gpu_budget=36 * GIB, resident_layers=40, rates=replace(RATES, layer_s=5e-4))
    assert slow.s_per_token == resident.s_per_token
    assert slow.pipes["decode"]["issue by the host"] == pytest.approx(0.021)  # type: ignore[index]


def test_everything_on_the_device_is_bound_by_its_memory_or_by_the_host_that_issues() -> None:
    whole = plan(gpu_budget=100 * GIB)
    read = (GEOMETRY.weights_bytes + GEOMETRY.outside_bytes) / 3e12 + 32768 * TOKEN / 2e12
    assert whole.s_per_token == pytest.approx(read, rel=0.01)
    assert whole.bottleneck == {"prefill": "compute", "decode": "compute"}
    # From a graph nothing is issued: what counts is the device's own time between the large kernels.
    rates = replace(RATES, layer_s=1e-3, graph_layer_s=5e-5, graph_pass_s=1e-3, graph_attention=4e12)
    graph = plan(gpu_budget=100 * GIB, rates=rates)
    attended = 32768 * TOKEN * (1 / 2e12 - 1 / 4e12)
    assert graph.s_per_token == pytest.approx(read - attended + 40 * 5e-5 + 1e-3, rel=0.01)
    assert graph.bottleneck == {"prefill": "compute", "decode": "compute"}
    issued = plan(gpu_budget=100 * GIB, rates=rates, graphs=False)
    assert issued.s_per_token == pytest.approx(0.041)
    assert "CUDA graphs" in graph.gpu_bytes.keys() - issued.gpu_bytes.keys()
    for shares in ([Share(100, 2)], [Share(30000, 1)] * 2):  # two tokens, or more than the device's KV
        assert pass_time(graph, shares).pipes["issue by the host"] == pytest.approx(0.041)
    streamed = plan(gpu_budget=100 * GIB, rates=rates, resident_layers=38)
    assert streamed.pipes["decode"]["issue by the host"] == pytest.approx(0.041)  # type: ignore[index]


def test_chunks_cost_the_device_and_rounds_bring_kv_back() -> None:
    rates = replace(RATES, chunk_s=1e-3)
    small, large = (plan(rates=rates, chunk_tokens=tokens) for tokens in (2048, 4096))
    assert small.ttft_s - large.ttft_s == pytest.approx(40 * 8e-3)
    made = plan(gpu_budget=24 * GIB, context=100_000, resident_layers=0)
    whole = device_seconds(GEOMETRY, RATES, [Share(0, 100_000)], fused=True)
    shares = rounds_of(made, 100_000)
    assert sum(share.new for share in shares) == 100_000
    assert shares[1].past == shares[0].new
    fetched = sum(max(0, share.past - made.kv_gpu_tokens) for share in shares) * TOKEN / 50e9
    products = 2 * GEOMETRY.weights_bytes / 2 / 500e12 * 4096
    assert whole + fetched - len(shares) * products < made.ttft_s < whole + fetched
    assert made.bottleneck["prefill"] == "KV brought to the device"  # type: ignore[index]


def test_without_a_gpu_copies_and_compute_take_turns() -> None:
    made = plan(device_type="cpu", resident_layers=0, context=1024, rates=replace(RATES, layer_s=0.0, pass_s=0.0))
    compute = device_seconds(GEOMETRY, RATES, [Share(1023, 1)])
    assert made.s_per_token == pytest.approx(GEOMETRY.weights_bytes / 50e9 + compute, rel=0.01)


def test_a_batch_shares_one_pass_over_the_weights() -> None:
    made = plan(context=1024, batch=8)
    one, eight = (pass_time(made, [Share(1000, 1)] * count).seconds for count in (1, 8))
    assert one <= eight < 1.5 * one


def test_what_requests_share_is_read_once() -> None:
    made = plan(resident_layers=20, gpu_budget=24 * GIB)
    apart = [Share(30000, 1, on_device=1000)] * 4
    together = [apart[0], *[Share(30000, 1, on_device=1000, shared=28000)] * 3]
    one, four, shared = (
        pass_time(made, shares).pipes["attention on the host"] for shares in (apart[:1], apart, together)
    )
    assert four > 3 * one
    assert one < shared < 1.6 * one


def test_shares_of_running_requests_say_where_their_kv_lies() -> None:
    def extent(tier: str) -> Extent:
        return Extent(tier, 100, [], [], [])  # type: ignore[arg-type]

    device, host, own = extent("gpu"), extent("host"), extent("host")
    first = RequestKV([Span(device, 0, 60), Span(host, 60, 100)], length=120)
    second = RequestKV([Span(device, 0, 60), Span(host, 60, 50), Span(own, 110, 40)], length=130)
    third = RequestKV([Span(extent("gpu"), 0, 10), Span(extent("disk"), 10, 90)], length=99)
    assert running_shares([(first, 1), (second, 3), (third, 1)]) == [
        Share(120, 1, on_device=60),
        Share(130, 3, on_device=60, shared=50),
        Share(99, 1, on_device=10, on_disk=90),
    ]


def test_a_pass_of_more_tokens_is_never_predicted_shorter() -> None:
    made = plan(resident_layers=5)
    times = [pass_time(made, [Share(30000, new)]).seconds for new in (1, 4, 16, 64, 256, 1024, 2048)]
    assert times == sorted(times)
    copied = pass_time(made, [Share(30000, 2048)])
    assert copied.pipes["copies to the device"] > made.streamed_bytes / RATES.h2d  # the prefix travels, too


# --- disk ---------------------------------------------------------------------------------------------------------


def test_layers_beyond_host_memory_stay_on_disk_if_they_may() -> None:
    small: dict[str, Any] = {"context": 4096, "host_budget": 14 * GIB, "resident_layers": 0}
    with pytest.raises(BudgetError, match=r"14\.0 GiB in host memory.*weights 23\.6 GiB"):
        plan(**small)
    made = plan(disk=True, **small)
    assert 0 < len(made.disk_layers) < 40
    assert sum(made.host_bytes.values()) <= 14 * GIB
    assert made.host_bytes["staging for layers on disk"] == BUFFERS * GEOMETRY.layer_bytes
    assert made.host_budget - sum(made.host_bytes.values()) < GEOMETRY.layer_bytes  # no layer more than must
    assert made.s_per_token == pytest.approx(made.disk_bytes / 2e9, rel=0.01)
    assert made.bottleneck == {"prefill": "disk", "decode": "disk"}
    text = render(made)
    for words in ("o on disk", f"{len(made.disk_layers)} on disk", "disk 2 GB/s", "staging for layers on disk"):
        assert words in text


def test_the_device_takes_layers_before_the_disk_does() -> None:
    made = plan(disk=True, context=4096, host_budget=14 * GIB, gpu_budget=16 * GIB)
    assert len(made.resident_layers) > 10
    assert not set(made.resident_layers) & set(made.disk_layers)
    fewer = plan(disk=True, context=4096, host_budget=14 * GIB, gpu_budget=16 * GIB, resident_layers=0)
    assert len(fewer.disk_layers) > len(made.disk_layers)
    assert plan(disk=True).disk_layers == ()


def test_kv_on_disk_is_read_as_it_is_attended() -> None:
    memory: dict[str, Any] = {"resident_layers": 0, "host_budget": 36 * GIB}
    made = plan(kv_disk=40 * GIB, **memory)
    assert made.kv_disk_tokens > 0
    read = made.kv_disk_tokens * TOKEN / RATES.disk
    assert made.s_per_token > read > 1
    assert made.s_per_token == pytest.approx(read + made.kv_host_tokens * TOKEN / 100e9, rel=0.05)
    assert made.bottleneck["decode"] == "attention over KV on disk"  # type: ignore[index]
    assert "o on disk" in render(made)


def test_a_prompt_waits_until_its_kv_is_in_the_file() -> None:
    made = plan(kv_disk=40 * GIB, host_budget=36 * GIB, resident_layers=0)
    in_memory = plan(resident_layers=0)
    assert made.bottleneck["prefill"] == "KV to disk"  # type: ignore[index]
    assert made.ttft_s == pytest.approx(in_memory.ttft_s + made.kv_disk_tokens * TOKEN / RATES.disk_write, rel=0.01)


def test_kv_on_disk_that_free_memory_holds_is_read_from_there() -> None:
    memory: dict[str, Any] = {"resident_layers": 0, "host_budget": 36 * GIB, "kv_disk": 40 * GIB}
    placed = plan(**memory)
    used = sum(placed.host_bytes.values())
    cached = plan(free_host=used + placed.kv_disk_bytes, **memory)
    assert cached.kv_disk_tokens == placed.kv_disk_tokens > 0
    assert cached.s_per_token == pytest.approx(plan(resident_layers=0).s_per_token)
    assert "in free memory too" in render(cached)
    assert plan(free_host=used + placed.kv_disk_bytes - 1, **memory).s_per_token == placed.s_per_token


def test_layers_and_kv_on_disk_share_one_disk() -> None:
    made = plan(disk=True, kv_disk=40 * GIB, host_budget=4 * GIB, resident_layers=0)
    read = made.disk_bytes + made.kv_disk_tokens * TOKEN
    assert min(made.disk_bytes, made.kv_disk_tokens) > 0
    assert made.s_per_token == pytest.approx(read / RATES.disk, rel=0.01)


def test_host_memory_too_small_even_for_the_staging() -> None:
    with pytest.raises(BudgetError, match=r"1\.0 GiB in host memory.*staging for layers on disk 1\.8 GiB"):
        plan(disk=True, context=512, host_budget=1 * GIB)


def test_the_pace_of_the_host_follows_what_passes_took() -> None:
    """A host whose attention runs at 0.6 of its measured rate, as neighbours on a shared one leave it."""
    made, shares, pace = plan(gpu_budget=24 * GIB), [Share(32767, 1)], Pace()
    slow = pass_time(made, shares, 0.6)
    assert slow.attending > 1.3 * pass_time(made, shares).attending
    for _ in range(6):
        pace.seen(pass_time(made, shares, pace.value).attending, slow.attending)
    assert pass_time(made, shares, pace.value).seconds == pytest.approx(slow.seconds, rel=0.05)
    for _ in range(20):
        pace.seen(1.0, 1e-9)
    assert pace.value == 4.0
    pace.seen(0.0, 1.0)
    assert pace.value == 4.0
