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
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.kv import Extent, RequestKV, Span
from elsa_serve.offload.loading import _with_disk_tried
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.plan import Plan, make_plan
from elsa_serve.offload.plan_text import render
from elsa_serve.offload.predict import (
    HOP_S,
    IN_PLACE_ISSUE,
    Pace,
    Prediction,
    Share,
    device_seconds,
    in_place_limit,
    pass_time,
    ring_seconds,
    running_shares,
)  # fmt: skip
from elsa_serve.offload.rounds import rounds_of
from elsa_serve.stats import DiskReads

GIB = 2**30
RATES = Rates(
    h2d=50e9, d2h=40e9, device_memory=3e12, device_attention=2e12, host_memory=100e9, flops=500e12,
    attention_flops=400e12,
    cpu_attention=100e9, cpu_attention_beside_h2d=60e9, h2d_beside_cpu_attention=45e9, cpu_attention_flops=1e12,
    cpu_attention_flops_beside_h2d=1e12,
    disk=2e9, activations=200e9, layer_s=1e-4, pass_s=1e-3, copy_s=0.0,
    graph_attention=2e12, graph_layer_s=0.0, graph_pass_s=0.0, chunk_s=0.0, source="of this test",
)  # fmt: skip
SHAPE: dict[str, Any] = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "vocab_size": 32000, "max_position_embeddings": 131072,
}  # fmt: skip
GEOMETRY = Geometry.from_config(LlamaConfig(**SHAPE), torch.float16)
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
    own = device_seconds(GEOMETRY, RATES, [Share(made.kv_gpu_tokens, 1)]) + GEOMETRY.layers * HOP_S + RATES.pass_s
    assert alone[1] < pipes["attention on the host"] - own <= math.hypot(both[1], arithmetic)
    resident = plan(gpu_budget=36 * GIB, resident_layers=40)
    assert resident.kv_host_tokens > 0
    assert resident.pipes is not None  # nothing is copied, so the host attends at its full rate
    host = resident.pipes["decode"]["attention on the host"]
    own = device_seconds(GEOMETRY, RATES, [Share(0, 1)])
    attended = resident.kv_gpu_tokens * TOKEN / RATES.device_attention
    expected = resident.kv_host_tokens * TOKEN / 100e9 + own + 40 * HOP_S + RATES.pass_s
    assert expected - attended < host < expected + 2 * attended
    # The next layers are issued while the host attends: a slow issue is a pipe of its own, and moves nothing.
    slow = plan(gpu_budget=36 * GIB, resident_layers=40, rates=replace(RATES, layer_s=5e-4))
    assert slow.s_per_token == resident.s_per_token
    issue = 40 * 5e-4 * IN_PLACE_ISSUE + RATES.pass_s
    assert slow.pipes["decode"]["issue by the host"] == pytest.approx(issue)  # type: ignore[index]


def test_the_device_attends_its_own_tokens_while_the_host_attends() -> None:
    """By hand: of the device's seconds only those in front of the host's attention, and behind it, add to that."""
    share, hops = Share(30000, 1, on_device=20000), 40 * HOP_S
    nbytes = 40 * GEOMETRY.kv_token_bytes()
    for seconds_on_device in (0.02, 0.3):
        rates = replace(RATES, device_attention=20000 * nbytes / seconds_on_device, cpu_attention_flops=1e15)
        made = plan(gpu_budget=46 * GIB, resident_layers=40, rates=rates, graphs=False)
        rest = device_seconds(GEOMETRY, replace(rates, device_attention=1e30), [Share(0, 1)]) + rates.pass_s
        small = 40 * rates.graph_layer_s
        expected = rest + small + hops + max(10001 * nbytes / rates.cpu_attention, seconds_on_device)
        found = pass_time(made, [share])
        assert found.pipes["attention on the host"] == pytest.approx(expected, rel=1e-3)


def test_graphs_are_for_passes_that_wait_for_python() -> None:
    """Where the host attends little, a token takes Python longer to issue than it takes all others; where it attends
    much, or most weights are copied, graphs would take memory for nothing."""
    rates = replace(RATES, layer_s=1.2e-3)
    for gib in (45, 47, 50):
        made, issued = (plan(gpu_budget=gib * GIB, rates=rates, graphs=graphs) for graphs in (True, False))
        assert made.graphs
        assert made.kv_host_tokens > 0
        assert made.streamed_layers % max(1, made.slots) == 0
        assert made.s_per_token < 0.98 * issued.s_per_token
        assert "issue by the host" not in made.pipes["decode"]  # type: ignore[index]
    for gib in (8, 16, 24):
        assert not plan(gpu_budget=gib * GIB, rates=rates).graphs
    assert plan(gpu_budget=24 * GIB, rates=rates) == plan(gpu_budget=24 * GIB, rates=rates, graphs=False)


def test_a_pass_with_its_newest_tokens_in_host_memory_is_replayed() -> None:
    rates = replace(RATES, layer_s=1.2e-3)
    made = plan(gpu_budget=46 * GIB, rates=rates, resident_layers=34)
    assert made.graphs
    total, here = 30000, made.kv_gpu_tokens
    for share, replayed in (
        (Share(total, 1, on_device=here), True),
        (Share(total, 1), True),
        (Share(total, 2, on_device=here), False),  # drafted tokens
        (Share(total, 1, on_device=here, on_disk=5), False),
        (Share(100, 1, on_device=101), False),  # all on the device, but not all layers
    ):
        assert ("issue by the host" not in pass_time(made, [share]).pipes) == replayed, share
    assert "issue by the host" in pass_time(made, [Share(100, 1, on_device=101), Share(total, 1, on_device=here)]).pipes
    both = [Share(total, 1, on_device=here // 2)] * 2
    assert "issue by the host" not in pass_time(made, both).pipes
    windows = replace(made, geometry=replace(made.geometry, whole_context=False))
    assert "issue by the host" in pass_time(windows, both).pipes


def test_everything_on_the_device_is_bound_by_its_memory_or_by_the_host_that_issues() -> None:
    whole = plan(gpu_budget=100 * GIB)
    head = 32000 * 5120 * 2  # of the embeddings, as large, a pass takes some rows
    read = (GEOMETRY.weights_bytes + head) / 3e12 + 32768 * TOKEN / 2e12
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
    # Two tokens, more than the device's KV, or some of it shared.
    shared = [Share(100, 1, on_device=101), Share(100, 1, on_device=101, shared_on_device=100)]
    for shares, more in (([Share(100, 2)], 1.0), ([Share(30000, 1)] * 2, IN_PLACE_ISSUE), (shared, 1.0)):
        assert pass_time(graph, shares).pipes["issue by the host"] == pytest.approx(0.04 * more + 0.001)
    streamed = plan(gpu_budget=100 * GIB, rates=rates, resident_layers=38)
    assert streamed.pipes["decode"]["issue by the host"] == pytest.approx(0.041)  # type: ignore[index]


def test_what_a_pass_costs_besides_its_bytes_is_counted_once() -> None:
    """The device's small kernels in every layer, and its rest before the first and behind the last; from a graph, the
    graph's own."""
    rates = replace(RATES, graph_layer_s=1e-4, graph_pass_s=5e-3, pass_s=20e-3)
    small = 40 * 1e-4
    made, free = (plan(gpu_budget=100 * GIB, rates=one, graphs=False) for one in (rates, replace(RATES, pass_s=0.0)))
    assert made.ttft_s - free.ttft_s == pytest.approx(small + 20e-3)
    assert made.s_per_token - free.s_per_token == pytest.approx(small + 20e-3)
    graph = plan(gpu_budget=100 * GIB, rates=rates)
    assert graph.s_per_token - free.s_per_token == pytest.approx(small + 5e-3)
    streamed = plan(resident_layers=0, rates=rates)  # copies go on through it
    assert streamed.pipes["decode"]["copies to the device"] <= GEOMETRY.weights_bytes / 45e9  # type: ignore[index]


@pytest.mark.parametrize(("slots", "expected"), [(2, 3.4), (3, 3.2)])
def test_in_front_of_a_resident_layer_a_full_ring_waits(slots: int, expected: float) -> None:
    """By hand, four layers of 0.8 s of which the first is resident, copies of 1 s. With two slots, from the end of one
    pass at 0 on: the first copy is over at 0.2, the second at 1.2; the resident layer ends at 0.8, the first copied one
    at 1.6. Only then the third copy begins, its layer begins at 2.6 and ends at 3.4."""
    made = replace(plan(), geometry=replace(GEOMETRY, layers=4), resident_layers=(0,), slots=slots)
    assert ring_seconds(made, 3.0, 3.2) == pytest.approx(expected)
    assert ring_seconds(replace(made, resident_layers=()), 3.0, 3.2) == 3.2


# Of H200s on 29 and 30 November 2026, 32K tokens in FP16: cap, resident layers, tokens on the device, what the host's
# attention and the copies reached beside each other in the run itself, and its seconds a token. None waited for Python.
RUNS = (
    (8, 5, 262, 74.8e9, 50.6e9, 0.4620),
    (24, 20, 8843, 80.4e9, 47.7e9, 0.2649),
    (24, 0, 17235, 95.5e9, 53.4e9, 0.4722),
    (40, 31, 21126, 99.6e9, 47.0e9, 0.1193),
    (46, 40, 24343, 120.8e9, 54.5e9, 0.0724),  # nothing was copied
)


@pytest.mark.parametrize(("cap", "resident", "tokens", "attention", "copies", "taken"), RUNS)
def test_from_the_rates_that_a_run_reached_its_time_follows(
    cap: int, resident: int, tokens: int, attention: float, copies: float, taken: float
) -> None:
    reached = Rates(
        h2d=54.5e9, cpu_attention=max(106e9, attention), cpu_attention_beside_h2d=attention,
        h2d_beside_cpu_attention=copies,
        device_memory=3.9e12, cpu_attention_flops=1.2e12, cpu_attention_flops_beside_h2d=1.2e12,
    )  # fmt: skip
    made = plan(gpu_budget=cap * GIB, resident_layers=resident, rates=reached)
    share = Share(32768, 1, on_device=tokens)
    assert pass_time(made, [share]).seconds == pytest.approx(taken, rel=0.06)


def test_float32_from_a_graph_reads_twice_the_bytes() -> None:
    """By hand: ten layers of 1.27 GB, a head of 0.66 GB and 13.4 GB of KV."""
    geometry = Geometry.from_config(LlamaConfig(**SHAPE | {"num_hidden_layers": 10}), torch.float32)
    rates = replace(RATES, device_memory=4e12, graph_attention=4e12, graph_layer_s=3e-5, graph_pass_s=2e-4)
    made = make_plan(geometry, gpu_budget=100 * GIB, host_budget=110 * GIB, context=32768, rates=rates)
    assert geometry.weights_bytes == pytest.approx(12.69e9, rel=1e-3)
    expected = (12.69e9 + 0.655e9 + 13.42e9) / 4e12 + 10 * 3e-5 + 2e-4
    assert made.s_per_token == pytest.approx(expected, rel=0.005)


def test_drafted_tokens_add_the_hosts_arithmetic_like_the_side_of_a_right_angle() -> None:
    """By hand: sixteen rows over 24,000 tokens in host memory, every layer resident."""
    made = plan(gpu_budget=36 * GIB, resident_layers=40)
    share = Share(30000, 16, on_device=6016)
    assert in_place_limit(RATES, weights_bytes=0, kv_bytes=23984 * TOKEN, flops_per_token=4 * 40 * 5120 * 23984) >= 16
    reading, arithmetic = 24000 * TOKEN / 100e9, 16 * 24000 * 4 * 40 * 5120 / 1e12
    own = device_seconds(GEOMETRY, RATES, [Share(0, 16)], fused=True) + 6016 * TOKEN / 2e12
    found = pass_time(made, [share])
    assert found.seconds == pytest.approx(math.hypot(reading, arithmetic) + own + 40 * HOP_S + RATES.pass_s, rel=0.01)
    assert found.attending == pytest.approx(math.hypot(reading, arithmetic))


def test_attention_without_states_brings_the_hosts_kv_to_the_device() -> None:
    """As torch's SDPA has none: 30,000 tokens, and every weight, over PCIe for each token."""
    made = plan(resident_layers=0, in_place=False)
    found = pass_time(made, [Share(30000, 1, on_device=1)])
    assert found.attending == 0
    assert found.seconds == pytest.approx((GEOMETRY.weights_bytes + 29999 * TOKEN) / 50e9)
    assert found.bottleneck == "copies to the device"


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
    products = 2 * GEOMETRY.weights_bytes / 2 / 500e12 * made.chunk_tokens
    rests = len(shares) * RATES.pass_s
    assert whole + fetched - len(shares) * products < made.ttft_s - rests < whole + fetched
    assert made.bottleneck["prefill"] == "KV brought to the device"  # type: ignore[index]


def test_every_round_of_a_long_prompt_is_its_slowest_pipe() -> None:
    """By hand: two rounds of 32,768 tokens, of which the second's first layers wait for the first one's KV."""
    made = plan(gpu_budget=12 * GIB, context=65536, resident_layers=0, chunk_tokens=4096)
    first, second = (pass_time(made, [share]) for share in (Share(0, 32768), Share(32768, 32768)))
    products = 2 * GEOMETRY.weights_bytes / 2 / 500e12
    activations = GEOMETRY.activation_bytes() * 39 * 32768 / 200e9
    last = 2 * 2 * 5120 * 5120 * 32768 / 500e12  # keys and values in the last layer
    seen = 32768 * (65536 - 16384)  # by the second round's tokens
    attention = 4 * 39 * 5120 * seen / 400e12
    device = products * 32768 * 39 / 40 + last + attention + activations + RATES.pass_s
    fetched = (32768 - made.kv_gpu_tokens) * TOKEN / 50e9
    assert second.seconds == pytest.approx(device + fetched - products * 4096, rel=1e-3)
    assert second.bottleneck == "KV brought to the device"  # its copies do not hide behind the last chunk alone
    assert first.bottleneck == "compute"
    assert first.seconds == pytest.approx(device - attention + 4 * 39 * 5120 * 32768 * 16384 / 400e12, rel=1e-3)
    assert second.pipes["copies to the device"] == pytest.approx(GEOMETRY.weights_bytes / 50e9 + fetched)


def test_without_a_gpu_copies_and_compute_take_turns() -> None:
    made = plan(device_type="cpu", resident_layers=0, context=1024, rates=replace(RATES, layer_s=2e-3, pass_s=5e-3))
    compute = device_seconds(GEOMETRY, RATES, [Share(1023, 1)])
    issue = 40 * 2e-3 + 5e-3  # nobody else computes meanwhile
    assert made.s_per_token == pytest.approx(GEOMETRY.weights_bytes / 50e9 + compute + issue, rel=0.01)


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
    hops = 40 * HOP_S  # once for all requests
    assert four - hops > 3 * (one - hops)
    assert one < shared < 1.6 * one
    # On the device, too: by hand, four queries over 30,001 tokens of which three read none but their own.
    for count, read in ((0, 4 * 30001), (30000, 30001 + 3)):
        shares = [Share(30000, 1, 30001), *[Share(30000, 1, 30001, shared_on_device=count)] * 3]
        four = pass_time(plan(gpu_budget=140 * GIB, batch=4, graphs=False), shares).pipes["compute"]
        rest = (GEOMETRY.weights_bytes + GEOMETRY.head_bytes) / 3e12 + GEOMETRY.activation_bytes() * 160 / 200e9
        assert four == pytest.approx(rest + read * TOKEN / 2e12 + RATES.pass_s, rel=0.01)


def test_shares_of_running_requests_say_where_their_kv_lies() -> None:
    def extent(tier: str) -> Extent:
        return Extent(tier, 100, [], [], [])  # type: ignore[arg-type]

    device, host, own = extent("gpu"), extent("host"), extent("host")
    first = RequestKV([Span(device, 0, 60), Span(host, 60, 100)], length=120)
    second = RequestKV([Span(device, 0, 60), Span(host, 60, 50), Span(own, 110, 40)], length=130)
    third = RequestKV([Span(extent("gpu"), 0, 10), Span(extent("disk"), 10, 90)], length=99)
    assert running_shares([(first, 1), (second, 3), (third, 1)]) == [
        Share(120, 1, on_device=60),
        Share(130, 3, on_device=60, shared=50, shared_on_device=60),
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
    """By hand: once the first layer has computed what comes before, the writes go on beside all else, and take longer,
    or do not show."""
    memory: dict[str, Any] = {"kv_disk": 40 * GIB, "host_budget": 36 * GIB, "resident_layers": 0}
    made, in_memory = plan(**memory), plan(resident_layers=0)
    assert made.bottleneck["prefill"] == "KV to disk"  # type: ignore[index]
    writes = made.kv_disk_tokens * TOKEN / RATES.disk_write
    layer = device_seconds(GEOMETRY, RATES, [Share(0, 32768)], fused=True) / 40
    first = RATES.pass_s + (1 - made.kv_disk_tokens / 32768) * layer
    assert made.ttft_s - writes == pytest.approx(first, rel=0.02)
    fast = plan(**memory, rates=replace(RATES, disk_write=1e12))
    assert fast.ttft_s == pytest.approx(in_memory.ttft_s)
    assert fast.ttft_s < made.ttft_s


def test_without_a_gpu_writes_to_a_file_take_turns_with_all_else() -> None:
    own: dict[str, Any] = {"device_type": "cpu", "resident_layers": 0, "context": 8192}
    made = plan(kv_disk=40 * GIB, host_budget=25 * GIB, gpu_budget=4 * GIB, **own)
    in_memory = plan(host_budget=60 * GIB, gpu_budget=4 * GIB, **own)
    assert made.kv_disk_tokens > 0
    assert made.ttft_s > in_memory.ttft_s + 0.9 * made.kv_disk_tokens * TOKEN / RATES.disk_write


def test_many_queries_are_attended_more_slowly_beside_copies() -> None:
    """By hand: 16 rows are arithmetic alone, of which copies that run all the time leave half."""
    slow = replace(RATES, cpu_attention_flops=4e11, cpu_attention_flops_beside_h2d=2e11, cpu_attention=1e12,
                   cpu_attention_beside_h2d=1e12, h2d=5e9, h2d_beside_cpu_attention=5e9)  # fmt: skip
    beside = plan(rates=slow, resident_layers=0)
    alone = plan(rates=slow, resident_layers=40, gpu_budget=40 * GIB, graphs=False)
    for made, rate in ((beside, 2e11), (alone, 4e11)):
        tokens = 32768 - made.kv_gpu_tokens
        assert tokens > 5000
        found = pass_time(made, [Share(32752, 16)])
        assert found.attending == pytest.approx(16 * tokens * 4 * 5120 * 40 / rate, rel=0.02)
    assert in_place_limit(slow, weights_bytes=10**9, kv_bytes=10**9, flops_per_token=1e9) == 79
    assert in_place_limit(slow, weights_bytes=0, kv_bytes=10**9, flops_per_token=1e9) == 79


def test_the_pace_of_attention_is_that_of_reading_and_of_arithmetic() -> None:
    halved = Pace(attention=0.5).of(RATES)
    for name in ("cpu_attention", "cpu_attention_beside_h2d", "cpu_attention_flops", "cpu_attention_flops_beside_h2d"):
        assert getattr(halved, name) == getattr(RATES, name) / 2


def test_the_first_passes_tell_of_a_disk() -> None:
    """By hand: it gave half its rate."""
    on_disk = plan(disk=True, context=4096, host_budget=14 * GIB, resident_layers=0)
    slow = _with_disk_tried(on_disk, DiskReads(3_000_000_000, 3.0, 0.0))
    assert slow.s_per_token == pytest.approx(2 * on_disk.s_per_token)
    assert _with_disk_tried(on_disk, DiskReads(0, 0.0, 0.0)) is on_disk
    assert _with_disk_tried(on_disk, None) is on_disk


def test_every_copy_of_a_chunks_kv_is_issued() -> None:
    """By hand: 128 chunks of 64 tokens, of which some stay on the device; a round over 4,096 brings those back."""
    rates = replace(RATES, layer_s=1e-5, copy_s=1e-3)
    made = plan(gpu_budget=4 * GIB, resident_layers=0, context=8192, chunk_tokens=64, rates=rates)
    here = made.kv_gpu_tokens
    assert 64 < here < 4096
    prompt, after = (
        pass_time(made, [share]).pipes["issue by the host"] for share in (Share(0, 8192), Share(4096, 1024))
    )
    home = -(-(8192 - here) // 64)
    assert prompt == pytest.approx(40 * (128 * 1e-5 + home * 1e-3) + RATES.pass_s)
    assert after == pytest.approx(40 * (16 * 1e-5 + (1 + 16) * 1e-3) + RATES.pass_s)  # what was there, its own
    assert pass_time(made, [Share(8191, 1)]).pipes["issue by the host"] == pytest.approx(
        40 * 1e-5 * IN_PLACE_ISSUE + RATES.pass_s
    )


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
    slow = pass_time(made, shares, Pace(attention=0.6))
    assert slow.attending > 1.3 * pass_time(made, shares).attending
    for _ in range(6):
        pace = pace.after(pass_time(made, shares, pace), slow.seconds, slow.attending)
    assert pass_time(made, shares, pace).seconds == pytest.approx(slow.seconds, rel=0.05)
    assert (pace.issue, pace.reads, pace.writes) == (1.0, 1.0, 1.0)
    for _ in range(20):
        pace = pace.after(Prediction(1.0, {"compute": 1.0}, attending=1.0), 1.0, 1e-9)
    assert pace.attention == 4.0
    assert pace.after(Prediction(1.0, {"compute": 1.0}), 2.0) == pace


@pytest.mark.parametrize(
    ("pipe", "slow", "made", "share"),
    [
        (
            "issue by the host",
            Pace(issue=0.5),
            {"gpu_budget": 140 * GIB, "graphs": False, "rates": replace(RATES, layer_s=1e-3)},
            Share(2047, 1),
        ),
        ("disk", Pace(reads=0.7), {"disk": True, "context": 4096, "host_budget": 8 * GIB}, Share(2047, 1)),
    ],
)
def test_what_else_of_the_host_sets_the_time_has_its_pace(
    pipe: str, slow: Pace, made: dict[str, Any], share: Share
) -> None:
    placed, pace = plan(**made), Pace()
    real = pass_time(placed, [share], slow)
    assert real.bottleneck == pipe
    assert real.seconds > 1.2 * pass_time(placed, [share]).seconds
    for _ in range(6):
        pace = pace.after(pass_time(placed, [share], pace), real.seconds, real.attending)
    assert pass_time(placed, [share], pace).seconds == pytest.approx(real.seconds, rel=0.05)
