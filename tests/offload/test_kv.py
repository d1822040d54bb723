"""KV memory: an allocator that tells the truth in bytes, and requests that span both tiers and travel unharmed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.host import FileBuffer
from elsa_serve.offload.kv import Arena, Block, KVPool, KVShape, RequestKV
from elsa_serve.offload.streams import Streams, make_streams
from elsa_serve.offload.units import ALIGNMENT
from elsa_serve.offload.working import Visit, WorkingKV

SHAPE = KVShape(layers=3, kv_heads=2, head_dim=8, dtype=torch.float32)


def arena(nbytes: int) -> Arena:
    return Arena(torch.zeros(nbytes, dtype=torch.uint8))


def pool(gpu_tokens: int, host_tokens: int, disk_tokens: int = 0) -> KVPool:
    """Pools that hold so many tokens each. float32 of all ones is a NaN: what is read before it is written shows."""
    sizes = (SHAPE.layers * SHAPE.block_nbytes(tokens) for tokens in (gpu_tokens, host_tokens, disk_tokens))
    gpu, host, disk = (torch.full((size,), 255, dtype=torch.uint8) for size in sizes)
    return KVPool(SHAPE, gpu, host, disk=disk if disk_tokens else None)


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


def test_the_arena_says_how_many_blocks_it_has_room_for() -> None:
    memory = arena(10 * ALIGNMENT)
    blocks = [memory.allocate(2 * ALIGNMENT) for _ in range(5)]
    for block in (blocks[0], blocks[3]):
        assert block is not None
        memory.free(block)
    assert [memory.room_for(n * ALIGNMENT) for n in (1, 2, 3)] == [4, 2, 0]


def test_a_request_fills_the_device_and_spills_the_rest_of_its_tokens() -> None:
    memory = pool(gpu_tokens=6, host_tokens=20)
    kv = memory.allocate(10)
    assert kv is not None
    assert (kv.split, kv.capacity) == (6, 10)
    assert [span.extent.tier for span in kv.spans] == ["gpu", "host"]
    assert [tuple(layer.shape) for layer in kv.spans[0].extent.layers] == [(2, 2, 6, 8)] * 3
    assert [tuple(layer.shape) for layer in kv.spans[1].extent.layers] == [(2, 2, 4, 8)] * 3
    assert memory.used_bytes() == {"gpu": 3 * SHAPE.block_nbytes(6), "host": 3 * SHAPE.block_nbytes(4)}
    second = memory.allocate(16)
    assert second is not None
    assert second.split == 0
    assert memory.allocate(1) is None
    assert memory.used_bytes() == memory.capacity_bytes()
    memory.free(kv)
    memory.free(second)
    assert set(memory.used_bytes().values()) == {0}


def test_blocks_of_a_request_do_not_overlap() -> None:
    memory = pool(gpu_tokens=6, host_tokens=9)
    kvs = [memory.allocate(8), memory.allocate(5)]
    for number, kv in enumerate(kvs):
        assert kv is not None
        for tensor, i in layers_of(kv):
            tensor.fill_(10 * number + i)
    for number, kv in enumerate(kvs):
        assert kv is not None
        assert all(bool((tensor == 10 * number + i).all()) for tensor, i in layers_of(kv))


def layers_of(kv: RequestKV) -> list[tuple[torch.Tensor, int]]:
    return [(tensor, i) for span in kv.spans for i, tensor in enumerate(span.extent.layers)]


def test_a_request_grows_and_takes_nothing_that_does_not_fit() -> None:
    memory = pool(gpu_tokens=6, host_tokens=12)
    kv = memory.allocate(4)
    assert kv is not None
    assert memory.extend(kv, 9)
    assert [(s.extent.tier, s.first, s.tokens) for s in kv.spans] == [("gpu", 0, 4), ("gpu", 4, 2), ("host", 6, 3)]
    before = memory.used_bytes()
    assert not memory.extend(kv, 30)
    assert memory.used_bytes() == before
    assert memory.extend(kv, 5)  # less than it has: nothing to do
    assert kv.capacity == 9
    assert (kv.split, kv.host_tokens(6), kv.host_tokens(8), kv.host_tokens(100)) == (6, 0, 2, 3)
    assert [s.first for s in kv.spans_of(5, 7)] == [4, 6]
    assert kv.spans[2].within(0, 8) == slice(0, 2)
    memory.trim(kv, 6)
    assert kv.capacity == 6
    memory.free(kv)
    assert set(memory.used_bytes().values()) == {0}


def test_a_beginning_is_shared_in_the_same_memory_until_its_last_holder_goes() -> None:
    memory = pool(gpu_tokens=10, host_tokens=10)
    one = memory.allocate(8)
    assert one is not None
    one.length = 8
    two = memory.allocate(10, one, 6)
    assert two is not None
    assert (two.length, two.capacity) == (6, 10)
    assert [(s.extent is one.spans[0].extent, s.first, s.tokens) for s in two.spans] == [
        (True, 0, 6), (False, 6, 2), (False, 8, 2)
    ]  # fmt: skip
    assert not one.spans[0].extent.exclusive
    memory.free(one)
    assert memory.used_bytes() == {"gpu": 3 * (SHAPE.block_nbytes(8) + SHAPE.block_nbytes(2)),
                                   "host": 3 * SHAPE.block_nbytes(2)}  # fmt: skip
    memory.free(two)
    assert set(memory.used_bytes().values()) == {0}


def test_kept_memory_is_counted_apart_and_may_be_taken_over() -> None:
    memory = pool(gpu_tokens=10, host_tokens=0)
    kv = memory.allocate(6)
    assert kv is not None
    assert memory.extend(kv, 9)
    kv.length = 5
    memory.keep(kv)
    assert kv.capacity == 6  # nothing had come to the second extent
    assert memory.used_bytes()["gpu"] == 0
    assert memory.cached_bytes()["gpu"] == 3 * SHAPE.block_nbytes(6)
    memory.reuse(kv, 4)
    assert (kv.length, kv.capacity, kv.kept) == (4, 6, False)
    assert memory.used_bytes()["gpu"] == 3 * SHAPE.block_nbytes(6)
    assert memory.cached_bytes()["gpu"] == 0
    memory.free(kv)


@pytest.mark.parametrize(("tokens", "capacity"), [(7, 8), (4, 8), (2, 2)])
def test_what_others_share_is_not_taken_over(tokens: int, capacity: int) -> None:
    """Kept KV of four tokens that a running request shares, and four of its own: only the latter may be written."""
    memory = pool(gpu_tokens=20, host_tokens=0)
    one = memory.allocate(6)
    assert one is not None
    kv = memory.allocate(8, one, 4)
    assert kv is not None
    kv.length = 8
    memory.keep(kv)
    memory.reuse(kv, tokens)
    assert (kv.length, kv.capacity) == (tokens, capacity)
    memory.free(kv)
    memory.free(one)
    assert set(memory.used_bytes().values()) == {0}


def test_idle_memory_moves_between_the_tiers_with_its_bytes() -> None:
    memory = pool(gpu_tokens=6, host_tokens=6)
    kv = memory.allocate(6)
    assert kv is not None
    for tensor, i in layers_of(kv):
        tensor.fill_(3.5 + i)
    kv.length = 6
    memory.keep(kv)
    (span,) = kv.spans
    assert memory.move(span.extent, "host")
    assert memory.cached_bytes() == {"gpu": 0, "host": 3 * SHAPE.block_nbytes(6)}
    assert kv.split == 0
    assert all(bool((tensor == 3.5 + i).all()) for tensor, i in layers_of(kv))
    other = memory.allocate(6)
    assert other is not None
    assert other.split == 6
    assert not memory.move(span.extent, "gpu")
    memory.free(other)
    assert memory.move(span.extent, "gpu")
    assert memory.arenas["host"].used_bytes == 0
    memory.free(kv)
    assert memory.arenas["gpu"].used_bytes == 0


def test_all_of_a_request_may_lie_on_either_side() -> None:
    assert pool(10, 0).allocate(10).split == 10  # type: ignore[union-attr]
    assert pool(0, 10).allocate(10).split == 0  # type: ignore[union-attr]


def test_a_failed_allocation_takes_nothing() -> None:
    memory = pool(gpu_tokens=4, host_tokens=4)
    assert memory.allocate(10) is None
    assert set(memory.used_bytes().values()) == {0}


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    memory = pool(gpu_tokens=20, host_tokens=10)
    memory.check(30)
    with pytest.raises(BudgetError, match=r"1000 tokens need 3\d\d KiB .*--gpu-memory or --host-memory"):
        memory.check(1000)


def test_the_disk_takes_what_host_memory_does_not_hold() -> None:
    memory = pool(gpu_tokens=4, host_tokens=4, disk_tokens=8)
    kv = memory.allocate(14)
    assert kv is not None
    assert [(s.extent.tier, s.first, s.tokens) for s in kv.spans] == [("gpu", 0, 4), ("host", 4, 4), ("disk", 8, 6)]
    assert (kv.split, kv.host_tokens(14)) == (4, 10)
    assert memory.allocate(2, disk=False) is None
    assert not memory.extend(kv, 16, disk=False)
    assert memory.extend(kv, 16)
    memory.check(16)
    with pytest.raises(BudgetError, match=r"in host memory, .* on disk"):
        memory.check(17)


def test_a_file_takes_its_space_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    buffer = FileBuffer(100_000, tmp_path)
    buffer.tensor.fill_(7)
    assert int(buffer.tensor.sum()) == 700_000
    assert list(tmp_path.iterdir()) == []
    buffer.close()
    with pytest.raises(BudgetError, match=r"16\.0 TiB for KV cannot be had.*--kv-disk-dir"):
        FileBuffer(1 << 44, tmp_path)
    with pytest.raises(BudgetError, match="No such file"):
        FileBuffer(1, tmp_path / "missing")


# --- over the device ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["overlapped", "serial"])
def streams(request: pytest.FixtureRequest) -> Iterator[Streams]:
    made = make_streams("cpu", serial=request.param == "serial")
    yield made
    made.close()


def run_pass(
    working: WorkingKV,
    kvs: list[RequestKV],
    new: list[int],
    seen: list[torch.Tensor],
    *,
    chunk: int = 100,
    skip: int = -1,
) -> None:
    """What a pass does: each layer's random new tokens are written in chunks, and everything before them is there."""
    working.begin([Visit(kv, layer) for layer in range(SHAPE.layers) for kv in kvs])
    for layer in range(SHAPE.layers):
        for i, (kv, n) in enumerate(zip(kvs, new)):
            if i == skip:
                continue
            for start in range(0, n, chunk):
                first, last = kv.length + start, kv.length + min(n, start + chunk)
                fresh = torch.randn(2, 1, SHAPE.kv_heads, last - first, SHAPE.head_dim)
                seen[i][layer, :, :, first:last] = fresh[:, 0]
                block = working.write(kv, layer, first, fresh[0], fresh[1])
                torch.testing.assert_close(block[:, :, :last], seen[i][layer, :, :, :last], rtol=0, atol=0)
            working.give()
    working.end()
    for i, (kv, n) in enumerate(zip(kvs, new)):
        if i != skip:
            kv.length += n


def requests(capacity: int, splits: list[int]) -> tuple[list[RequestKV], list[torch.Tensor]]:
    """Requests, and room for what they are to hold."""
    kvs = [pool(split, capacity - split).allocate(capacity) for split in splits]
    return kvs, [torch.zeros(SHAPE.layers, 2, SHAPE.kv_heads, capacity, SHAPE.head_dim) for _ in splits]  # type: ignore[return-value]


def stored(kv: RequestKV) -> torch.Tensor:
    layers = [[span.extent.layers[i][:, :, : span.tokens] for span in kv.spans] for i in range(SHAPE.layers)]
    return torch.stack([torch.cat(spans, 2) for spans in layers])[:, :, :, : kv.length]


@pytest.mark.parametrize("chunk", [100, 70])
@pytest.mark.parametrize("splits", [[0, 0], [50, 120], [210, 3]])
def test_both_tiers_hold_every_token(streams: Streams, splits: list[int], chunk: int) -> None:
    torch.manual_seed(0)
    working = WorkingKV(SHAPE, streams, capacity=400)
    kvs, seen = requests(400, splits)
    for new in ([150, 90], [1, 1], [80, 200], [1, 1], [1, 3]):
        run_pass(working, kvs, new, seen, chunk=chunk)
    for kv, everything in zip(kvs, seen):
        torch.testing.assert_close(stored(kv), everything[:, :, :, : kv.length], rtol=0, atol=0)


def test_a_request_given_up_in_the_middle_disturbs_nobody(streams: Streams) -> None:
    torch.manual_seed(0)
    working = WorkingKV(SHAPE, streams, capacity=300)
    kvs, seen = requests(300, [5, 2, 0])
    run_pass(working, kvs, [70, 80, 100], seen)
    for skip in (0, 1, 2):
        run_pass(working, kvs, [1, 1, 1], seen, skip=skip)
        run_pass(working, kvs, [1, 66, 1], seen, skip=skip)
    run_pass(working, kvs, [1, 1, 1], seen)


def test_an_abandoned_pass_keeps_nothing(streams: Streams) -> None:
    torch.manual_seed(0)
    working = WorkingKV(SHAPE, streams, capacity=200)
    kvs, seen = requests(200, [2])
    run_pass(working, kvs, [80], seen)
    working.begin([Visit(kvs[0], layer) for layer in range(SHAPE.layers)])
    working.write(kvs[0], 0, 80, *torch.full((2, 1, SHAPE.kv_heads, 70, SHAPE.head_dim), 77.0))
    working.give()
    working.end()
    run_pass(working, kvs, [1], seen)
    run_pass(working, kvs, [1], seen)


def test_nothing_is_copied_back_that_did_not_change(streams: Streams) -> None:
    working = WorkingKV(SHAPE, streams, capacity=400)
    kvs, seen = requests(400, [20])
    token = SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_dim * 4
    run_pass(working, kvs, [120], seen, chunk=120)
    assert copies(streams) == {("d2h", 100 * token)}
    run_pass(working, kvs, [1], seen)
    assert copies(streams) == {("h2d", 100 * token)}  # the new token is written by a kernel
    run_pass(working, kvs, [90], seen)
    assert copies(streams) == {("h2d", 101 * token), ("d2h", 90 * token)}


def copies(streams: Streams) -> set[tuple[str, int]]:
    return {(transfer.direction, transfer.bytes) for transfer in streams.drain_transfers()}
