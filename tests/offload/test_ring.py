"""The ring: right weights for every layer in every pass, no slot overwritten too early, and layers really streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_models import logits, make_model, save, streamed

from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.streams import Copy, Event, Lane, Streams, make_streams
from elsa_serve.offload.weights import ModelWeights, load_model

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return logits(make_model("llama"), IDS)


@pytest.fixture(scope="module")
def weights(directory: Path) -> Iterator[ModelWeights]:
    loaded = load_model(directory, dtype="auto", device="cpu", attn_implementation="sdpa", progress=False)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize(
    ("resident", "slots"), [((), 2), ((), 3), ((0,), 2), ((1, 3), 2), ((4,), 4), ((0, 1, 2, 3, 4), 0)]
)
def test_every_pass_gives_the_logits_of_the_whole_model(
    weights: ModelWeights, expected: torch.Tensor, resident: tuple[int, ...], slots: int, serial: bool
) -> None:
    streams = make_streams("cpu", serial=serial)
    ring = WeightStream(weights, resident, slots, streams)
    with streamed(weights, ring):
        for _ in range(4):
            assert torch.equal(logits(weights.model, IDS), expected)
    ring.close()
    streams.close()


def test_bytes_prove_that_layers_were_streamed(weights: ModelWeights) -> None:
    streams = make_streams("cpu")
    ring = WeightStream(weights, (2,), 2, streams)
    passes = 3
    with streamed(weights, ring):
        for _ in range(passes):
            logits(weights.model, IDS)
    ring.close()
    (transfer,) = streams.drain_transfers()
    layer = weights.store.layers[0].numel()
    assert (transfer.object, transfer.direction) == ("weights", "h2d")
    assert transfer.bytes == (4 * passes + 2) * layer  # every streamed layer of every pass, and what was prefetched
    assert ring.device_nbytes == 0
    streams.close()


def test_parameters_are_meta_outside_their_layer(weights: ModelWeights) -> None:
    streams = make_streams("cpu", serial=True)
    ring = WeightStream(weights, (1,), 2, streams)
    for index, layer in enumerate(weights.decoder_layers):
        assert all(p.is_meta for p in layer.parameters())
        with ring.layer(index) as bound:
            assert bound is layer
            names = dict(bound.named_parameters())
            for name, view in weights.store.views(index).items():
                assert torch.equal(names[name], view)
                assert names[name].data_ptr() != view.data_ptr()
        assert all(p.is_meta for p in layer.parameters())
    assert ring.device_nbytes == 3 * weights.store.layers[0].numel()
    ring.close()


@pytest.mark.parametrize("resident", [(), (0,), (4,), (0, 1, 3)])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_rewind_after_a_pass_cut_short(
    weights: ModelWeights, expected: torch.Tensor, cut: int, resident: tuple[int, ...]
) -> None:
    streams = make_streams("cpu")
    ring = WeightStream(weights, resident, 2, streams)
    for index in range(cut):
        with ring.layer(index):
            pass
    ring.rewind()
    with streamed(weights, ring):
        assert torch.equal(logits(weights.model, IDS), expected)
        assert torch.equal(logits(weights.model, IDS), expected)
    ring.close()
    streams.close()


def test_an_error_inside_a_layer_unbinds_it_and_the_ring_goes_on(weights: ModelWeights, expected: torch.Tensor) -> None:
    streams = make_streams("cpu")
    ring = WeightStream(weights, (), 2, streams)

    def fail() -> None:
        with ring.layer(0):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert all(p.is_meta for p in weights.decoder_layers[0].parameters())
    ring.rewind()
    with streamed(weights, ring):
        assert torch.equal(logits(weights.model, IDS), expected)
    ring.close()
    streams.close()


def test_layers_out_of_order_are_refused(weights: ModelWeights) -> None:
    streams = make_streams("cpu", serial=True)
    ring = WeightStream(weights, (), 2, streams)
    with pytest.raises(RuntimeError, match="layer 2 asked for, but layer 0 is next"), ring.layer(2):
        pass
    ring.close()


@pytest.mark.parametrize(("resident", "slots", "message"), [((9,), 2, "0 … 4"), ((), 0, "at least one slot")])
def test_impossible_rings_are_refused(
    weights: ModelWeights, resident: tuple[int, ...], slots: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WeightStream(weights, resident, slots, make_streams("cpu", serial=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("serial", [False, True])
def test_streamed_equals_resident_on_the_gpu(directory: Path, serial: bool) -> None:
    weights = load_model(directory, dtype="auto", device="cuda", attn_implementation="sdpa", progress=False)
    assert weights.store.pinned
    assert all(flat.is_pinned() for flat in weights.store.layers)
    results = []
    for resident, slots in (((0, 1, 2, 3, 4), 0), ((), 2), ((2,), 3)):
        streams = make_streams("cuda", serial=serial)
        ring = WeightStream(weights, resident, slots, streams)
        with streamed(weights, ring):
            results += [logits(weights.model, IDS.cuda()) for _ in range(3)]
        streams.synchronize()
        moved = sum(transfer.bytes for transfer in streams.drain_transfers())
        assert moved >= 3 * (5 - len(resident)) * weights.store.layers[0].numel()
        ring.close()
        streams.close()
    assert all(torch.equal(result, results[0]) for result in results)
    weights.close()


# --- a device that computes as late as it may and copies as early as it may --------------------------------------


class _Late(Event):
    def __init__(self, device: LazyDevice, position: int) -> None:
        self._device, self._position = device, position

    def query(self) -> bool:
        return self._device.done >= self._position

    def synchronize(self) -> None:
        self._device.host_syncs += not self.query()
        self._device.run(self._position)


class _Eager(Copy):
    def __init__(self, pairs: Any, after: Sequence[Event]) -> None:
        self.object, self.direction, self.nbytes = "weights", "h2d", sum(d.numel() for d, _ in pairs)
        self._pairs, self._after, self.finished = pairs, after, False

    def attempt(self) -> bool:
        if not self.finished and all(event.query() for event in self._after):
            for dst, src in self._pairs:
                dst.copy_(src)
            self.finished = True
        return self.finished

    def query(self) -> bool:
        return self.finished

    def synchronize(self) -> None:
        if not self.attempt():
            raise AssertionError("waiting for a copy whose conditions were never met: deadlock")

    def seconds(self) -> float:
        return 0.0


class LazyDevice(Streams, Lane):
    """Streams whose compute runs only when the host synchronises, while copies run as soon as their events allow.

    That is the schedule a ring must survive: any slot overwritten without waiting for its last reader shows at once.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), serial=False)
        self.done = 0
        self.host_syncs = 0
        self._work: list[Callable[[], None]] = []
        self._pending: list[_Eager] = []

    def compute(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def run(self, position: int) -> None:
        while self.done < position:
            self._work[self.done]()
            self.done += 1
            self._copy()

    def _copy(self) -> None:
        while self._pending and self._pending[0].attempt():  # in order, as a lane is
            self._pending.pop(0)

    def _make_lane(self, name: str) -> Lane:
        return self

    def submit(self, pairs: Any, *, object: Any, direction: Any, after: Sequence[Event] = ()) -> Copy:
        copy = _Eager(pairs, after)
        self._pending.append(copy)
        self._copy()
        return copy

    def record(self) -> Event:
        return _Late(self, len(self._work))

    def wait(self, event: Event) -> None:
        self.compute(event.synchronize)

    def synchronize(self) -> None:
        self.run(len(self._work))

    def drain_transfers(self) -> tuple:
        return ()

    def call_host(self, functions: Any, after: Event) -> Event:
        raise NotImplementedError("a ring calls no functions of the host")

    def drain_host_stall(self) -> float:
        return 0.0


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("resident", [(), (0, 3)])
def test_no_slot_is_overwritten_before_compute_released_it(
    weights: ModelWeights, slots: int, resident: tuple[int, ...]
) -> None:
    device = LazyDevice()
    ring = WeightStream(weights, resident, slots, device)
    seen: list[bool] = []

    def check(layer: Any, index: int) -> Callable[[], None]:
        bound = dict(layer.named_parameters())
        views = weights.store.views(index)
        return lambda: seen.append(all(torch.equal(bound[name], view) for name, view in views.items()))

    for step in range(3):
        for index in range(5 if step != 1 else 3):
            with ring.layer(index) as layer:
                device.compute(check(layer, index))
        ring.rewind()
    device.synchronize()
    assert len(seen) == 13
    assert all(seen)
    ring.close()


def test_the_host_runs_at_most_the_slots_ahead(weights: ModelWeights) -> None:
    device = LazyDevice()
    ring = WeightStream(weights, (0, 1, 2, 3, 4), 0, device)
    computed: list[int] = []
    for step in range(3):
        for index in range(5):
            with ring.layer(index):
                device.compute(lambda n=5 * step + index: computed.append(n))
                assert 5 * step + index - len(computed) <= 2
    assert device.host_syncs > 0
    ring.close()


def test_the_instrument_sees_a_ring_that_forgets_to_wait(weights: ModelWeights) -> None:
    """The test above must be able to fail: without the release events the same schedule corrupts a slot."""
    device = LazyDevice()
    forgetful = device.submit
    device.submit = lambda pairs, *, object, direction, after=(): forgetful(  # type: ignore[method-assign]
        pairs, object=object, direction=direction
    )
    ring = WeightStream(weights, (), 2, device)
    right: list[bool] = []
    for index in range(5):
        with ring.layer(index) as layer:
            bound = dict(layer.named_parameters())
            views = weights.store.views(index)
            device.compute(
                lambda b=bound, v=views: right.append(all(torch.equal(b[n], t) for n, t in v.items()))  # type: ignore[misc]
            )
    device.synchronize()
    assert not all(right)
