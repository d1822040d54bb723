"""KV memory: an allocator that tells the truth in bytes, and blocks that travel between host and device unharmed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.kv import ALIGNMENT, Arena, Block, HostKV, KVPool, KVShape, RequestKV, Visit
from elsa_serve.offload.streams import Streams, make_streams

SHAPE = KVShape(layers=3, kv_heads=2, head_dim=8, dtype=torch.float32)


def arena(nbytes: int) -> Arena:
    return Arena(torch.zeros(nbytes, dtype=torch.uint8))


def pool(gpu_layers: int, host_layers: int, capacity: int = 10) -> KVPool:
    nbytes = SHAPE.block_nbytes(capacity)
    return KVPool(SHAPE, *(torch.zeros(n * nbytes, dtype=torch.uint8) for n in (gpu_layers, host_layers)))


def test_the_arena_counts_bytes_and_refuses_what_does_not_fit() -> None:
    memory = arena(4 * ALIGNMENT)
    first = memory.allocate(1)
    assert first == Block(0, ALIGNMENT)
    assert memory.used_bytes == ALIGNMENT
    assert memory.allocate(3 * ALIGNMENT + 1) is None
    assert memory.allocate(3 * ALIGNMENT) == Block(ALIGNMENT, 3 * ALIGNMENT)
    assert memory.allocate(1) is None
    assert arena(0).allocate(1) is None


def test_the_arena_never_gives_a_byte_twice_and_becomes_whole_again() -> None:
    random.seed(0)
    memory, blocks = arena(100 * ALIGNMENT), []
    for _ in range(2000):
        if blocks and random.random() < 0.5:
            memory.free(blocks.pop(random.randrange(len(blocks))))
        elif (block := memory.allocate(random.randint(1, 12 * ALIGNMENT))) is not None:
            blocks.append(block)
        taken = sorted(blocks)
        assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(taken))
        assert memory.used_bytes == sum(block.nbytes for block in blocks)
    for block in blocks:
        memory.free(block)
    assert memory.allocate(100 * ALIGNMENT) == Block(0, 100 * ALIGNMENT)


def test_a_request_takes_the_device_first_and_the_host_for_the_rest() -> None:
    memory = pool(gpu_layers=2, host_layers=4)
    kv = memory.allocate(10)
    assert kv is not None
    assert [layer.tier for layer in kv.layers] == ["gpu", "gpu", "host"]
    second = memory.allocate(10)
    assert second is not None
    assert {layer.tier for layer in second.layers} == {"host"}
    assert memory.allocate(10) is None
    assert memory.used_bytes() == memory.capacity_bytes()
    memory.free(kv)
    memory.free(second)
    assert set(memory.used_bytes().values()) == {0}


def test_preferred_layers_get_the_device() -> None:
    nbytes = SHAPE.block_nbytes(10)
    memory = KVPool(SHAPE, torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(9 * nbytes, dtype=torch.uint8), (1,))
    kv = memory.allocate(10)
    assert kv is not None
    assert [layer.tier for layer in kv.layers] == ["host", "gpu", "host"]


def test_a_failed_allocation_takes_nothing() -> None:
    memory = pool(gpu_layers=1, host_layers=1)
    assert memory.allocate(10) is None
    assert set(memory.used_bytes().values()) == {0}


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    memory = pool(gpu_layers=2, host_layers=1)
    memory.check(10)
    with pytest.raises(BudgetError, match=r"1000 tokens need 3\d\d KiB .*--gpu-memory or --host-memory"):
        memory.check(1000)


# --- travelling ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["overlapped", "serial"])
def streams(request: pytest.FixtureRequest) -> Iterator[Streams]:
    made = make_streams("cpu", serial=request.param == "serial")
    yield made
    made.close()


def run_pass(host_kv: HostKV, kvs: list[RequestKV], new: list[int], seen: list[torch.Tensor], skip: int = -1) -> None:
    """What a pass does: each layer's block is taken, extended by random tokens, compared with all that came before."""
    host_kv.begin([Visit(kv, layer, n) for layer in range(SHAPE.layers) for kv, n in zip(kvs, new)])
    for layer in range(SHAPE.layers):
        for i, (kv, n) in enumerate(zip(kvs, new)):
            if i == skip:
                continue
            block = host_kv.take(kv, layer)
            torch.testing.assert_close(block[:, :, : kv.length], seen[i][layer, :, :, : kv.length], rtol=0, atol=0)
            fresh = torch.randn(2, SHAPE.kv_heads, n, SHAPE.head_dim)
            block[:, :, kv.length : kv.length + n] = fresh
            seen[i][layer, :, :, kv.length : kv.length + n] = fresh
            host_kv.give(kv, layer)
    host_kv.end()
    for i, (kv, n) in enumerate(zip(kvs, new)):
        if i != skip:
            kv.length += n


def request(capacity: int) -> RequestKV:
    nbytes = SHAPE.block_nbytes(capacity)
    storage = torch.full((SHAPE.layers * nbytes,), 255, dtype=torch.uint8)  # float32 of all ones is a NaN
    kv = KVPool(SHAPE, torch.empty(0, dtype=torch.uint8), storage).allocate(capacity)
    assert kv is not None
    return kv


@pytest.mark.parametrize("capacity", [12, 20_000], ids=["one flat copy", "a copy a head"])
def test_blocks_survive_prefill_and_decode(streams: Streams, capacity: int) -> None:
    torch.manual_seed(0)
    host_kv = HostKV(SHAPE, streams, capacity=capacity, max_batch=2)
    kvs = [request(capacity), request(capacity)]
    seen = [torch.zeros(SHAPE.layers, 2, SHAPE.kv_heads, capacity, SHAPE.head_dim) for _ in kvs]
    run_pass(host_kv, kvs, [5, 3], seen)
    for _ in range(4):
        run_pass(host_kv, kvs, [1, 1], seen)
    for kv, everything in zip(kvs, seen):
        stored = torch.stack([layer.data for layer in kv.layers])[:, :, :, : kv.length]
        torch.testing.assert_close(stored, everything[:, :, :, : kv.length], rtol=0, atol=0)


def test_a_request_given_up_in_the_middle_disturbs_nobody(streams: Streams) -> None:
    torch.manual_seed(0)
    host_kv = HostKV(SHAPE, streams, capacity=12, max_batch=3)
    kvs = [request(12) for _ in range(3)]
    seen = [torch.zeros(SHAPE.layers, 2, SHAPE.kv_heads, 12, SHAPE.head_dim) for _ in kvs]
    run_pass(host_kv, kvs, [4, 2, 3], seen)
    for skip in (0, 1, 2):
        run_pass(host_kv, kvs, [1, 1, 1], seen, skip=skip)
    run_pass(host_kv, kvs, [1, 1, 1], seen)


def test_an_abandoned_pass_keeps_nothing(streams: Streams) -> None:
    torch.manual_seed(0)
    host_kv = HostKV(SHAPE, streams, capacity=12, max_batch=1)
    kvs, seen = [request(12)], [torch.zeros(SHAPE.layers, 2, SHAPE.kv_heads, 12, SHAPE.head_dim)]
    run_pass(host_kv, kvs, [4], seen)
    host_kv.begin([Visit(kvs[0], layer, 1) for layer in range(SHAPE.layers)])
    host_kv.take(kvs[0], 0)[:, :, 4] = 77.0
    host_kv.give(kvs[0], 0)
    host_kv.take(kvs[0], 1)
    host_kv.abandon()
    run_pass(host_kv, kvs, [1], seen)
    run_pass(host_kv, kvs, [1], seen)


def test_transfers_are_counted(streams: Streams) -> None:
    host_kv = HostKV(SHAPE, streams, capacity=12, max_batch=1)
    kvs, seen = [request(12)], [torch.zeros(SHAPE.layers, 2, SHAPE.kv_heads, 12, SHAPE.head_dim)]
    run_pass(host_kv, kvs, [4], seen)
    block = 2 * SHAPE.kv_heads * 12 * SHAPE.head_dim * 4
    token = SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_dim * 4
    assert {(t.object, t.direction, t.bytes, t.count) for t in streams.drain_transfers()} == {
        ("kv", "d2h", 3 * block, 3)
    }
    run_pass(host_kv, kvs, [1], seen)
    assert {(t.object, t.direction, t.bytes, t.count) for t in streams.drain_transfers()} == {
        ("kv", "h2d", 3 * block, 3),
        ("kv", "d2h", token, 1),
    }
