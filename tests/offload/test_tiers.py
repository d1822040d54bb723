"""Attention over KV that spans the tiers: the same on every road, at every split, and clean failures on the host."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsa_kernels import attention
from elsa_kernels.cpu import native

from elsa_serve.offload import tiers
from elsa_serve.offload.attention import AttentionOptions, elsa_attend, elsa_attend_state
from elsa_serve.offload.file_lane import FileLane
from elsa_serve.offload.host import FileBuffer, HostBuffer
from elsa_serve.offload.in_place import InPlace
from elsa_serve.offload.kv import KVPool, KVShape, RequestKV, Span
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.predict import in_place_limit
from elsa_serve.offload.streams import Streams, make_streams
from elsa_serve.offload.tiers import Piece, Tiers
from elsa_serve.offload.working import WorkingKV

LAYERS, HEADS, KV_HEADS, D = 2, 4, 2, 16
PLAIN = AttentionOptions(D**-0.5)


@dataclass(slots=True)
class Rows:
    """A part of a pass, as far as the tiers know it."""

    kv: RequestKV
    tokens: list[int]


class World:
    """Tiers over one device, and what every request was given so far."""

    def __init__(
        self,
        device: str,
        *,
        dtype: torch.dtype = torch.float32,
        serial: bool = False,
        limit: int = 8,
        alike: int | None = None,
        disk: tuple[Path, int] | None = None,
    ) -> None:
        """`disk`: where the file of the last tier lies, and how many tokens it holds."""
        self.streams: Streams = make_streams(device, serial=serial)
        self.shape = KVShape(LAYERS, KV_HEADS, D, dtype)
        self.in_place = InPlace(self.streams, threads=2)
        self.limit = limit
        self.disk = FileBuffer(disk[1] * LAYERS * self.shape.block_nbytes(1), disk[0]) if disk else None
        lane = FileLane(self.disk, self.streams) if self.disk else None
        working = WorkingKV(self.shape, self.streams, capacity=600, file=lane)
        self.tiers = Tiers(
            working, self.in_place, self.streams, elsa_attend, elsa_attend_state, lambda kv: self.limit, alike
        )
        self.given: dict[int, torch.Tensor] = {}
        self.buffers: list[Any] = []

    def request(self, capacity: int, split: int) -> RequestKV:
        """`split` of its tokens on the device, the rest in host memory but for what the file holds."""
        on_gpu = self.streams.device.type == "cuda"
        disk = self.disk.tensor if self.disk else None
        on_disk = 0 if disk is None else disk.numel() // (LAYERS * self.shape.block_nbytes(1))
        host = HostBuffer(LAYERS * self.shape.block_nbytes(capacity - split - on_disk), pin=on_gpu)
        host.tensor.fill_(255)  # NaN
        gpu = torch.full((LAYERS * self.shape.block_nbytes(split),), 255, dtype=torch.uint8, device=self.streams.device)
        kv = KVPool(self.shape, gpu, host.tensor, host.mapped(), disk).allocate(capacity)
        assert kv is not None
        assert kv.split == split
        self.buffers.append(host)
        self.given[id(kv)] = torch.zeros(LAYERS, 2, 1, KV_HEADS, capacity, D, dtype=self.shape.dtype)
        return kv

    @torch.inference_mode()
    def run(self, kvs: list[RequestKV], new: list[int], options: AttentionOptions = PLAIN, chunk: int = 600) -> None:
        """One pass of random tokens; every output is compared with attention over all keys on the CPU."""
        self.tiers.begin([Rows(kv, [0] * n) for kv, n in zip(kvs, new)], LAYERS)
        for layer in range(LAYERS):
            for start in range(0, max(new), chunk):
                pieces, expected = [], []
                for kv, n in zip(kvs, new):
                    size = min(chunk, n - start)
                    if size > 0:
                        piece, truth = self._piece(kv, layer, kv.length + start, size, start + size == n, options)
                        pieces.append(piece)
                        expected.append(truth)
                for out, truth in zip(self.tiers.attend(layer, pieces, options), expected):
                    self._compare(out.cpu(), truth)
        self.tiers.end()
        for kv, n in zip(kvs, new):
            kv.length += n

    def _piece(
        self, kv: RequestKV, layer: int, first: int, size: int, final: bool, options: AttentionOptions
    ) -> tuple[Piece, torch.Tensor]:
        q = torch.randn(1, HEADS, size, D).to(self.shape.dtype)
        k, v = torch.randn(2, 1, KV_HEADS, size, D).to(self.shape.dtype)
        given, last = self.given[id(kv)][layer], first + size
        given[0, :, :, first:last], given[1, :, :, first:last] = k, v
        truth = attention(
            q, given[0, :, :, :last], given[1, :, :, :last], causal=True, scale=options.scale, window=options.window,
            softcap=options.softcap, sinks=options.sinks, impl="cpu",
        )  # fmt: skip
        here = (tensor.to(self.streams.device) for tensor in (q, k, v))
        return Piece(kv, first, final, *here), truth

    def _compare(self, out: torch.Tensor, truth: torch.Tensor) -> None:
        tolerance = 1e-5 if self.shape.dtype == torch.float32 else 4e-3
        torch.testing.assert_close(out, truth, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- roads --------------------------------------------------------------------------------------------------------


def test_each_request_takes_the_road_that_its_tokens_ask_for() -> None:
    world = World("cpu", limit=4)
    kv = world.request(100, split=40)
    assert world.tiers.road(kv, 40) == "resident"
    assert world.tiers.road(kv, 41) == "over the device"
    kv.length = 60
    assert [world.tiers.road(kv, n) for n in (1, 4, 5)] == ["in place", "in place", "over the device"]
    assert [world.tiers.without_moving(kv, n) for n in (1, 4, 5, 16)] == [1, 4, 4, 4]
    assert world.tiers.without_moving(world.request(100, split=100), 16) == 16
    world.tiers.use(elsa_attend, None)
    assert world.tiers.road(kv, 1) == "over the device"
    assert world.tiers.without_moving(kv, 16) == 16


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("split", [0, 1, 37, 64, 200])
def test_decoding_is_exact_at_every_split(split: int, serial: bool, device: str) -> None:
    world = World(device, serial=serial)
    kv = world.request(200, split)
    for new in (50, 1, 8, 9, 1, 1):  # a prompt, in place, at the switch point, beyond it, in place
        world.run([kv], [new])


@pytest.mark.parametrize(
    "options",
    [
        replace(PLAIN, window=20),
        replace(PLAIN, softcap=3.0),
        replace(PLAIN, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
        replace(PLAIN, window=20, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=5.0),
    ],
    ids=["window", "softcap", "sinks", "all"],
)
@pytest.mark.parametrize("split", [0, 30, 90])
def test_masks_and_sinks_apply_once_and_by_position(split: int, options: AttentionOptions) -> None:
    world = World("cpu")
    kv = world.request(120, split)
    for new in (60, 1, 5, 30, 1):
        world.run([kv], [new], options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    world = World(device, dtype=dtype)
    kv = world.request(200, 20)
    for new in (70, 1, 1):
        world.run([kv], [new])


def test_many_requests_and_chunks_at_random(device: str) -> None:
    """Several requests a pass, each on its own road, in chunks of any length."""
    random.seed(1)
    world = World(device, limit=6)
    kvs = [world.request(600, split) for split in (0, 5, 150, 600)]
    for _ in range(6):
        chosen = random.sample(kvs, random.randint(1, 4))
        world.run(chosen, [random.choice([1, 1, 3, 6, 7, 70]) for _ in chosen], chunk=600)
    for chunk in (3, 20):
        world.run(kvs[1:2], [40], chunk=chunk)


@pytest.mark.parametrize(
    "options", [PLAIN, replace(PLAIN, window=20, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))], ids=["plain", "window"]
)
@pytest.mark.parametrize(
    "extents", [[20, 30, 150], [-20, -30, -150], [20, -30, 40, -110], [-50, 150]], ids=["gpu", "host", "both", "moved"]
)
def test_kv_in_many_pieces(
    extents: list[int], options: AttentionOptions, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extents of a request that grew, or that begins with another's: on the device (positive) and on the host."""
    monkeypatch.setattr("elsa_serve.offload.tiers.STATE_ROWS", 7)
    if device == "cuda":
        options = replace(options, sinks=None)  # the truth is computed on the CPU, and sinks lie with the queries
    world = World(device)
    kv = world.request(200, 0)
    spans, first = [], 0
    for tokens in extents:
        part = world.request(abs(tokens), max(tokens, 0))
        spans.append(Span(part.spans[0].extent, first, abs(tokens)))
        first += abs(tokens)
    kv.spans[:] = spans
    assert kv.split == next((span.first for span in spans if span.extent.tier == "host"), 200)
    for new in (15, 30, 1, 1, 8, 9, 20, 1):
        world.run([kv], [new], options, chunk=16)
    for new in (kv.spans[0].last - 5, 12, 1):  # and again over garbage, as after rejected drafts
        kv.length = kv.spans[0].last - 5 if new != 1 else kv.length
        world.run([kv], [min(new, 200 - kv.length)], options)


@pytest.mark.parametrize("split", [0, 60, 200], ids=["host", "both", "gpu"])
@pytest.mark.parametrize("options", [PLAIN, replace(PLAIN, window=30)], ids=["plain", "window"])
def test_requests_that_share_a_beginning(split: int, options: AttentionOptions, device: str) -> None:
    """One request owns the document and goes on in the same extent; two others begin with it; a fourth has its own."""
    world = World(device, limit=8)
    owner, other = world.request(200, split), world.request(100, 50)
    world.run([owner], [100], options)
    kvs = [owner]
    for tokens, spare in ((100, 0), (90, 20)):
        kv = world.request(200, spare)
        own = [Span(span.extent, tokens + span.first, span.tokens) for span in kv.spans]
        kv.spans[:] = [
            Span(s.extent, s.first, min(s.tokens, tokens - s.first)) for s in owner.spans_of(0, tokens)
        ] + own
        kv.length = tokens
        for span in kv.spans:
            span.extent.users += 1
        world.given[id(kv)] = torch.nn.functional.pad(world.given[id(owner)], (0, 0, 0, 100))
        kvs.append(kv)
    for new in ([3, 1, 2, 5], [1, 1, 1, 1], [1, 70, 2, 1], [1, 1, 1, 1]):
        world.tiers.drain()
        world.run([*kvs, other], new, options)
    done = world.tiers.drain()
    if options.window is None:
        read = (
            sum(kv.host_tokens(kv.length) for kv in (*kvs, other))
            - 2 * owner.host_tokens(90)
            - (owner.host_tokens(100) - owner.host_tokens(90))
        )
        assert (done.bytes if done else 0) >= read * LAYERS * 2 * KV_HEADS * D * 4
        assert (done.bytes if done else 0) <= (read + 10) * LAYERS * 2 * KV_HEADS * D * 4


@pytest.mark.parametrize("split", [0, 40])
@pytest.mark.parametrize("long_run", [1, 1 << 20])
def test_tokens_on_disk_are_attended_like_the_others(
    split: int, long_run: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "LONG_RUN", long_run)
    world = World(device, disk=(tmp_path, 60))
    kv = world.request(200, split)
    assert [span.extent.tier for span in kv.spans][-2:] == ["host", "disk"]
    for new in (110, 1, 8, 66, 1, 1):  # the last ones, whole and in part, go to disk
        world.run([kv], [new])
    world.tiers.close()


@pytest.mark.parametrize("road", ["resident", "in place"])
def test_few_rows_are_attended_as_each_would_be_alone(road: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In calls of at most so many rows, and outputs as ever."""
    world = World(device, alike=3, limit=8)
    kv = world.request(300, 300 if road == "resident" else 100)
    world.run([kv], [200])
    rows: list[int] = []

    def spy(attend: Any) -> Any:
        def counted(q: torch.Tensor, *rest: Any) -> Any:
            rows.append(q.shape[2])
            return attend(q, *rest)

        return counted

    world.tiers.use(spy(elsa_attend), spy(elsa_attend_state))
    world.run([kv], [7])
    world.run([kv], [1])
    assert rows == [3, 3, 1] * LAYERS + [1] * LAYERS


@pytest.mark.skipif(native.unavailable() is not None, reason=f"no native CPU attention: {native.unavailable()}")
def test_the_time_of_shares_that_the_host_attends_together_counts_once(device: str) -> None:
    streams = make_streams(device, serial=False)
    in_place = InPlace(streams, threads=2)
    q, keys = torch.randn(1, HEADS, 1, D, device=streams.device), torch.randn(2, KV_HEADS, 100_000, D)
    with torch.inference_mode():
        shares = [in_place.stage(q, keys, keys.shape[2] - 1, PLAIN, None) for _ in range(8)]
        start = time.perf_counter()
        in_place.launch(shares, streams.record())
        in_place.end()
        taken = time.perf_counter() - start
    done = in_place.drain()
    assert done is not None
    assert 0 < done.seconds <= taken
    assert done.bytes == 8 * keys.nbytes


def test_both_roads_agree_at_the_switch_point(device: str) -> None:
    """The same tokens once in place and once over the device."""
    outs = []
    for limit in (8, 7):
        torch.manual_seed(5)
        world = World(device, limit=limit)
        kv = world.request(300, 100)
        world.run([kv], [250])
        assert world.tiers.road(kv, 8) == ("in place" if limit == 8 else "over the device")
        piece, _ = world._piece(kv, 0, 250, 8, True, PLAIN)
        with torch.inference_mode():
            world.tiers.begin([Rows(kv, [0] * 8)], LAYERS)
            outs += world.tiers.attend(0, [piece], PLAIN)
            world.tiers.abandon()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


def test_the_switch_follows_the_rates() -> None:
    rates = Rates(
        h2d=50e9,
        cpu_attention=100e9,
        cpu_attention_beside_h2d=50e9,
        cpu_attention_flops=1e12,
        cpu_attention_flops_beside_h2d=1e12,
    )
    kv_bytes, flops = 26_800_000_000, 4.0 * 40 * 40 * 128 * 32768

    def limit(weights: int, **changes: float) -> int:
        changed = replace(rates, **changes)
        return in_place_limit(changed, weights_bytes=weights, kv_bytes=kv_bytes, flops_per_token=flops)

    left = ((kv_bytes / 50e9) ** 2 - (kv_bytes / rates.cpu_attention) ** 2) ** 0.5  # beside the reading of K and V
    assert limit(0) == int(left * 1e12 / flops) == 17
    assert limit(25_400_000_000) == 33  # streamed weights need the copy engine anyway
    assert limit(0, cpu_attention_flops=0.2e12) == 3
    assert limit(0, cpu_attention=10e9) == 1
    assert in_place_limit(rates, weights_bytes=5, kv_bytes=0, flops_per_token=0.0) == 1


# --- what the host did, and what can go wrong there ---------------------------------------------------------------


def test_what_the_host_read_is_counted(device: str) -> None:
    world = World(device)
    kv = world.request(100, 30)
    world.run([kv], [50])
    assert world.tiers.drain() is None
    world.run([kv], [1])
    done = world.tiers.drain()
    assert done is not None
    assert (done.bytes, done.calls) == (21 * LAYERS * 2 * KV_HEADS * D * 4, LAYERS)
    assert done.seconds > 0
    assert done.stall_s >= 0
    assert world.tiers.drain() is None


@pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("field", "value", "error"), [("D", 1 << 58, MemoryError), ("dtype", 7, RuntimeError)], ids=["memory", "thread"]
)
def test_a_job_that_fails_ends_its_pass_and_nothing_else(
    field: str, value: int, error: type[Exception], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elsa_kernels.cpu.native import library

    world = World(device)
    kv, other = world.request(100, 30), world.request(100, 10)
    world.run([kv, other], [50, 40])
    describe = library._describe

    def broken(*arguments: Any) -> Any:
        problem, kept = describe(*arguments)
        setattr(problem, field, value)
        return problem, kept

    with monkeypatch.context() as patch:
        patch.setattr(library, "_describe", broken)
        world.tiers.begin([Rows(kv, [0]), Rows(other, [0])], LAYERS)
        pieces = [world._piece(one, 0, one.length, 1, True, PLAIN)[0] for one in (kv, other)]
        with torch.inference_mode(), pytest.raises(error):  # noqa: PT012
            world.tiers.attend(0, pieces, PLAIN)
            world.tiers.end()
        world.tiers.abandon()
    for _ in range(2):
        world.run([kv, other], [1, 1])


def test_without_a_compiler_the_same_numbers_come_from_torch(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler was found")
    world = World(device)
    assert "several times slower" in caplog.text
    assert "no C++ compiler was found" in caplog.text
    kv = world.request(100, 30)
    for new in (50, 1, 3):
        world.run([kv], [new])
