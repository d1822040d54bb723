"""The seam on the CPU, and on a GPU where there is one: order, waiting, accounts, errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from elsa_serve.offload.streams import Event, Streams, make_streams

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


class Gate(Event):
    """An event that a test opens by hand."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def query(self) -> bool:
        return self._open.is_set()

    def synchronize(self) -> None:
        self._open.wait(10)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cpu() -> Streams:
    streams = make_streams("cpu")
    yield streams
    streams.close()


def host(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, pin_memory=torch.cuda.is_available())


@pytest.mark.parametrize("serial", [False, True])
def test_copies_arrive_and_are_accounted(device: str, serial: bool) -> None:
    streams = make_streams(device, serial=serial)
    source, home = host(1000), host(1000)
    there = torch.full((1000,), float("nan"), device=device)
    up = streams.lane("up").submit([(there, source)], object="weights", direction="h2d", after=[streams.record()])
    streams.wait(up)
    there.mul_(2)
    down = streams.lane("down").submit([(home, there)], object="kv", direction="d2h", after=[streams.record()])
    down.synchronize()
    assert torch.equal(home, source * 2)
    streams.synchronize()
    transfers = {(t.object, t.direction): t for t in streams.drain_transfers()}
    assert set(transfers) == {("weights", "h2d"), ("kv", "d2h")}
    for transfer in transfers.values():
        assert transfer.bytes == 4000
        assert transfer.count == 1
        assert transfer.seconds > 0
        assert transfer.hidden_s == max(0.0, transfer.seconds - transfer.stall_s)
    if serial:
        assert all(t.hidden_s == 0 for t in transfers.values())
    assert streams.drain_transfers() == ()
    streams.close()


def test_submit_does_not_wait_for_the_copy(cpu: Streams) -> None:
    gate, target = Gate(), torch.zeros(4)
    copy = cpu.lane("up").submit([(target, torch.ones(4))], object="kv", direction="h2d", after=[gate])
    time.sleep(0.02)
    assert not copy.query()
    assert target.sum() == 0
    gate.open()
    copy.synchronize()
    assert target.sum() == 4


def test_a_lane_keeps_its_order_and_lanes_are_independent(cpu: Streams) -> None:
    gate, target = Gate(), torch.zeros(1)
    first = cpu.lane("a").submit([(target, torch.tensor([1.0]))], object="kv", direction="h2d", after=[gate])
    second = cpu.lane("a").submit([(target, torch.tensor([2.0]))], object="kv", direction="h2d")
    other = cpu.lane("b").submit([(torch.zeros(1), torch.ones(1))], object="kv", direction="h2d")
    other.synchronize()
    assert not second.query()
    gate.open()
    second.synchronize()
    assert first.query()
    assert target.item() == 2.0


def test_a_copy_may_follow_a_copy_of_another_lane(cpu: Streams) -> None:
    gate, middle, end = Gate(), torch.zeros(1), torch.zeros(1)
    first = cpu.lane("a").submit([(middle, torch.ones(1))], object="kv", direction="d2h", after=[gate])
    second = cpu.lane("b").submit([(end, middle)], object="kv", direction="h2d", after=[first])
    time.sleep(0.01)
    assert not second.query()
    gate.open()
    second.synchronize()
    assert end.item() == 1.0


def test_stall_is_the_time_compute_was_held(cpu: Streams) -> None:
    gate = Gate()
    copy = cpu.lane("up").submit([(torch.zeros(1), torch.ones(1))], object="weights", direction="h2d", after=[gate])
    threading.Timer(0.05, gate.open).start()
    cpu.wait(copy)
    (transfer,) = cpu.drain_transfers()
    assert 0.03 < transfer.stall_s < 5
    assert transfer.seconds < transfer.stall_s
    assert transfer.hidden_s == 0


def test_waiting_for_a_finished_copy_costs_nothing(cpu: Streams) -> None:
    copy = cpu.lane("up").submit([(torch.zeros(1), torch.ones(1))], object="weights", direction="h2d")
    copy.synchronize()
    cpu.wait(copy)
    (transfer,) = cpu.drain_transfers()
    assert transfer.stall_s < 0.01


def test_a_copy_under_way_is_counted_by_a_later_drain(cpu: Streams) -> None:
    gate = Gate()
    copy = cpu.lane("up").submit([(torch.zeros(8), torch.ones(8))], object="weights", direction="h2d", after=[gate])
    assert cpu.drain_transfers() == ()
    gate.open()
    copy.synchronize()
    (transfer,) = cpu.drain_transfers()
    assert transfer.bytes == 32


def test_a_failed_copy_raises_where_it_is_waited_for(cpu: Streams) -> None:
    copy = cpu.lane("up").submit([(torch.zeros(3), torch.ones(4))], object="kv", direction="h2d")
    with pytest.raises(RuntimeError, match="size"):
        cpu.wait(copy)


def test_tensors_of_inference_mode_can_be_copied(device: str) -> None:
    streams = make_streams(device)
    with torch.inference_mode():
        target = torch.zeros(4, device=device)
    zeroed = [streams.record()]  # compute may not have got there yet
    copy = streams.lane("up").submit([(target, host(4) * 0 + 3)], object="kv", direction="h2d", after=zeroed)
    copy.synchronize()
    assert target.sum().item() == 12
    streams.close()


@pytest.mark.parametrize("serial", [False, True])
def test_heads_that_lie_apart_are_one_copy(device: str, serial: bool) -> None:
    """Tokens in the middle of a block of 9, there and back, between two of another block; nothing else changes."""
    streams = make_streams(device, serial=serial)
    source, home = host(2, 3, 9, 4), host(2, 3, 5, 4)
    there = torch.zeros(2, 3, 7, 4, device=device)
    before = home.clone()
    some, after = (there[:, :, 2:5], source[:, :, 3:6]), [streams.record()]
    up = streams.lane("kv").submit([some], object="kv", direction="h2d", after=after)
    back = (home[:, :, 1:4], there[:, :, 2:5])
    streams.lane("kv").submit([back], object="kv", direction="d2h", after=[up]).synchronize()
    assert torch.equal(home[:, :, 1:4], source[:, :, 3:6])
    assert torch.equal(home[:, :, [0, 4]], before[:, :, [0, 4]])
    assert not there[:, :, [0, 1, 5, 6]].any()
    whole = torch.empty(2, 3, 3, 4, device=device)  # contiguous on one side alone
    streams.lane("kv").submit([(whole, source[:, :, 6:])], object="kv", direction="h2d").synchronize()
    assert torch.equal(whole.cpu(), source[:, :, 6:])
    assert sum(one.bytes for one in streams.drain_transfers()) == 3 * whole.nbytes
    streams.close()


def test_close_ends_the_worker_threads() -> None:
    streams = make_streams("cpu")
    streams.lane("closing")
    assert any(t.name == "elsa-lane-closing" for t in threading.enumerate())
    streams.close()
    streams.close()
    assert not any(t.name == "elsa-lane-closing" for t in threading.enumerate())


def test_a_copy_holds_its_tensors_only_until_it_is_complete(cpu: Streams) -> None:
    import weakref

    gate, source = Gate(), torch.ones(4)
    alive = weakref.ref(source)
    copy = cpu.lane("up").submit([(torch.zeros(4), source)], object="kv", direction="h2d", after=[gate])
    del source
    assert alive() is not None
    gate.open()
    copy.synchronize()
    deadline = time.monotonic() + 5
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_events_are_used_again_on_the_gpu() -> None:
    streams = make_streams("cuda")
    source, target = host(16), torch.zeros(16, device="cuda")
    for _ in range(50):
        copy = streams.lane("up").submit([(target, source)], object="kv", direction="h2d", after=[streams.record()])
        copy.synchronize()
        streams.drain_transfers()
    assert len(streams.pool._free) < 10
    streams.close()
