"""The CUDA C++ form for few rows: what its machine code holds, without a GPU (only NVRTC)."""

from __future__ import annotations

import ctypes

import pytest
from elsa_kernels.cuda import linear_few, nvrtc

from tests.kernels import aot

needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"{nvrtc.unavailable()}")


TILES = [*linear_few.NARROW, *linear_few.WIDE]


@needs_nvrtc
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("arch", [80, 90])
def test_weights_go_into_registers_without_spills(arch, tile):
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for sm_{arch}")
    used = aot.cubin_resources(nvrtc.compile_cubin(linear_few.source(), arch, tile.defines()))
    assert used["stack"] == 0
    assert used["registers"] * 32 * linear_few.SLICES * tile.blocks_per_sm <= 65536


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


@pytest.mark.parametrize("tile", [*TILES, linear_few.FewTile(2, 1, 3)])
@pytest.mark.parametrize("N", [1, 7, 33, 72, 1000, 5120, 13824, 15360, 250_000])
def test_rows_are_shared_evenly_and_fit(tile, N):
    blocks = tile.blocks(N, 132)
    shares = [(i + 1) * N // blocks - i * N // blocks for i in range(blocks)]
    assert sum(shares) == N
    assert 1 <= min(shares) <= max(shares) <= min(min(shares) + 1, 8 * tile.NT)
    if N >= 5120:
        assert blocks % (132 * tile.blocks_per_sm) == 0
