"""The CUDA C++ form for few rows without a GPU: on a host whose threads are fibers, and what its machine code holds."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from elsa_kernels import linear as elsa
from elsa_kernels.cuda import linear_few, nvrtc
from elsa_kernels.cuda.linear_few import FewTile

from tests.kernels import aot, on_host
from tests.kernels.on_host import needs_gpp
from tests.kernels.test_linear import BOUND, operands, row_errors

needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"{nvrtc.unavailable()}")

TILES = [*linear_few.NARROW, *linear_few.WIDE, linear_few.MANY]
SMALL = {  # of every kind, with fewer rows of W
    "narrow": FewTile(NT=2, sets=2, blocks_per_sm=1, x_sets=2, ahead=3, later=2),
    "narrow16": FewTile(NT=2, sets=2, blocks_per_sm=1, eights=2, x_sets=2, x_shared=True, ahead=4, later=2),
    "wide16": FewTile(NT=3, sets=1, blocks_per_sm=2, eights=2),
    "many": FewTile(NT=1, sets=1, blocks_per_sm=1, eights=4, x_sets=3, x_shared=True),
}


class Host:
    """Stands in for a device."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.eager, self.seed = False, 0  # when copies to shared memory are made; how warps take turns

    def library(self, tile: FewTile) -> ctypes.CDLL:
        floats = f"alignas(16) static float shared[{tile.shared_bytes // 4}];"
        source = linear_few.source().replace("extern __shared__ float shared[];", floats)
        defines = tile.defines() | {"ELSA_LINEAR": 1, "ELSA_EAGER": int(self.eager)}
        return on_host.library(self.room, source, "linear_few", defines, *on_host.FUSED)

    def linear(self, x: torch.Tensor, w: elsa.SplitMatrix, bias: torch.Tensor | None, tile: FewTile) -> torch.Tensor:
        out = torch.full((x.shape[0], w.shape[0]), float("nan"))

        def launch(function, blocks, threads, shared_bytes, params, early):
            order = torch.randperm(blocks, dtype=torch.int32)
            self.library(tile).launch(ctypes.byref(params), blocks, ctypes.c_void_p(order.data_ptr()), self.seed)

        with (
            mock.patch.multiple(linear_few, kernel=lambda device, tile: (None, True), multiprocessors=lambda device: 2),
            mock.patch.object(linear_few.driver, "launch", launch),
            mock.patch.multiple(
                torch.cuda, device=lambda device: contextlib.nullcontext(), current_device=lambda: 0
            ),
        ):  # fmt: skip
            linear_few.run(x, w.hi, w.lo, w.exponent, bias, out, tile)
        return out


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    return Host(tmp_path_factory.mktemp("cuda"))


@needs_gpp
@pytest.mark.parametrize("family", ["normal", "positive", "outliers", "wild rows", "zeros"])
@pytest.mark.parametrize("name", SMALL)
def test_error_on_the_host(name: str, family: str, host: Host) -> None:
    x, w = operands(8 * SMALL[name].eights - 3, 37, 1064, family)
    assert row_errors(host.linear(x, elsa.split_weight(w), None, SMALL[name]), x, w) < BOUND


@needs_gpp
def test_products_are_rounded_on_the_host(host: Host) -> None:
    x, w = operands(8, 37, 2560, "positive")  # where truncation would be a bias
    assert row_errors(host.linear(x, elsa.split_weight(w), None, SMALL["narrow"]), x, w) < 4e-8


@needs_gpp
@pytest.mark.parametrize("K", [8, 1064, 2560])
def test_bits_depend_on_neither_company_nor_tile_nor_pace_on_the_host(K: int, host: Host) -> None:
    x, w = operands(32, 37, K, "normal")
    split, bias = elsa.split_weight(w), torch.randn(37)
    expected = host.linear(x, split, bias, SMALL["many"])
    for tile in SMALL.values():
        for eager, seed in ((False, 0), (False, 7), (True, 8)):
            rows = slice(3, 3 + 8 * tile.eights - seed % 4)
            with mock.patch.multiple(host, eager=eager, seed=seed):
                assert torch.equal(host.linear(x[rows], split, bias, tile), expected[rows])


@needs_gpp
def test_non_finite_values_on_the_host(host: Host) -> None:
    x, w = operands(6, 37, 1064, "normal")
    x[2, 5], x[3, 7], x[4, 300], x[5, 2], x[5, 3] = (float(v) for v in ("inf", "nan", "-inf", "inf", "-inf"))
    w[4, 5] = 0
    expected = x @ w.t()
    for tile in (SMALL["narrow"], SMALL["narrow16"]):
        out = host.linear(x, elsa.split_weight(w), None, tile)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[expected.isinf()], expected[expected.isinf()])
        assert row_errors(out[:2], x[:2], w) < BOUND


@needs_nvrtc
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("arch", [80, 90])
def test_weights_go_into_registers_without_spills(arch, tile):
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for sm_{arch}")
    used = aot.cubin_resources(nvrtc.compile_cubin(linear_few.source(), arch, tile.defines()))
    assert used["stack"] == 0
    assert used["registers"] * 32 * linear_few.SLICES * tile.blocks_per_sm <= 65536
    assert used["shared"] <= linear_few.STATIC_SHARED
    limit = 227 if arch == 90 else 163
    assert tile.blocks_per_sm * (tile.shared_bytes + linear_few.STATIC_SHARED + 1024) <= (limit + 1) * 1024


@needs_nvrtc
def test_parameters_have_the_size_of_the_kernels():
    defines, size = linear_few.WIDE[1].defines(), ctypes.sizeof(linear_few.Params)
    arch = max(a for a in nvrtc.architectures() if a <= 90)
    nvrtc.compile_cubin(linear_few.source() + f"static_assert(sizeof(Params) == {size});", arch, defines)
    with pytest.raises(nvrtc.CompilationFailed, match="static assertion"):
        nvrtc.compile_cubin(linear_few.source() + f"static_assert(sizeof(Params) == {size + 8});", arch, defines)


def test_the_narrow_tile_is_for_what_it_takes_at_once():
    for M, of_x in ((1, 0), (8, 0), (9, 1), (16, 1)):
        narrow, wide = linear_few.NARROW[of_x], linear_few.WIDE[of_x]
        assert narrow.eights == wide.eights == of_x + 1
        tiles = [linear_few.tile_of(M, N, 132) for N in (8, 5120, 5280, 5281, 15360)]
        assert tiles == [narrow] * 3 + [wide] * 2
    assert {linear_few.tile_of(M, N, 132) for M in (17, 32) for N in (8, 15360)} == {linear_few.MANY}


def test_more_rows_than_shared_memory_takes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(linear_few, "shared_limit", lambda index: 99 * 1024)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "architectures", lambda: (89,))
    monkeypatch.setattr(linear_few, "_refuse_device", linear_few._refuse_device.__wrapped__)
    assert linear_few.refusal(0, 16, 1024) is None
    assert "more than 16 rows need" in linear_few.refusal(0, 17, 1024)
    for tile in (*linear_few.NARROW, *linear_few.WIDE):
        assert tile.blocks_per_sm * (tile.shared_bytes + linear_few.STATIC_SHARED) <= 99 * 1024


@pytest.mark.parametrize("tile", [*TILES, FewTile(2, 1, 3)])
@pytest.mark.parametrize("N", [1, 7, 33, 72, 1000, 5120, 13824, 15360, 250_000])
def test_rows_are_shared_evenly_and_fit(tile, N):
    blocks = tile.blocks(N, 132)
    share, larger = divmod(N, blocks)
    assert 1 <= share <= share + bool(larger) <= 8 * tile.NT
    if N >= 5120:
        assert blocks % (132 * tile.blocks_per_sm) == 0
