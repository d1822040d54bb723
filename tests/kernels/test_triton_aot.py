"""The Triton kernels compile for GPUs that are not here, and keep to the budgets of the ones we chose tiles for."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from elsa_kernels.triton import tiles  # noqa: E402

from tests.kernels import aot  # noqa: E402

# What a program may use of shared memory, in bytes.
SHARED = {"sm_75": 64 * 1024, "sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@pytest.mark.parametrize(
    ("target", "mode", "D", "dtype"),
    [
        ("sm_75", "ieee", 128, "fp32"),
        ("sm_75", "ieee", 64, "fp16"),
        ("sm_80", "split", 128, "fp32"),
        ("sm_80", "half", 128, "bf16"),
        ("sm_90", "half", 128, "fp16"),
        ("sm_90", "tf32", 128, "fp32"),
        ("sm_90", "ieee", 128, "fp32"),
        ("gfx942", "split", 128, "fp32"),
        ("gfx942", "half", 64, "bf16"),
    ],
)
def test_forward_compiles_and_fits(target: str, mode: str, D: int, dtype: str) -> None:
    compiled = aot.forward_variant(target, mode, D, aot.PLAIN, dtype)
    assert compiled.metadata.shared <= SHARED[target]


@pytest.mark.parametrize("D", [64, 128])
def test_the_hot_loop_for_hopper_uses_tensor_cores_and_no_local_memory(D: int) -> None:
    compiled = aot.forward_variant("sm_90", "split", D, aot.PLAIN)
    assert compiled.metadata.shared <= SHARED["sm_90"]
    loops = aot.product_loops(aot.machine_code(compiled))
    assert len(loops) >= 2  # tiles that all rows see, and tiles at the edge
    assert not re.search(r"\b(LDL|STL)\b", loops[0])
    # Row sums, and with 128 channels the two chains of S that are added in FP32: the compiler has folded them into one.
    assert aot.count(loops[0], "FADD") >= (64 if D == 128 else 32)


@pytest.mark.parametrize("target", list(SHARED))
@pytest.mark.parametrize(("count", "state"), [(1, False), (3, False), (4, True)])
def test_states_are_merged_in_registers(target: str, count: int, state: bool) -> None:
    compiled = aot.join_variant(target, 128, count, state)
    assert compiled.metadata.shared == 0
    if target == "sm_90":
        code = aot.machine_code(compiled)
        assert not re.search(r"\b(LDL|STL)\b", code)
        assert len(re.findall(r"\bLDG\.E\.128\b", code)) == count  # a row of W, at once


def test_ieee_touches_no_tensor_core() -> None:
    compiled = aot.forward_variant("sm_90", "ieee", 64, aot.PLAIN, "fp32")
    assert not re.search(r"\b[HQI]G?MMA\b", aot.machine_code(compiled))


def test_everything_at_once_compiles_for_hopper() -> None:
    compiled = aot.forward_variant("sm_90", "split", 128, aot.EVERYTHING)
    assert compiled.metadata.shared <= SHARED["sm_90"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_splitting_compiles(target: str) -> None:
    for compiled in aot.planes_variants(target, 128, ranges=True, packed=True):
        assert compiled.metadata.shared <= SHARED[target]


@pytest.mark.parametrize("D", [64, 128])
def test_splitting_for_hopper_loads_wide_and_spills_nothing(D: int) -> None:
    """Four channels at a time, moved or not."""
    for compiled in aot.planes_variants("sm_90", D):
        assert aot.resources(compiled)["stack"] == 0
        assert len(re.findall(r"LDG\.E\.128", aot.machine_code(compiled))) >= D // 4


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942"])
def test_careful_pass_compiles(target: str) -> None:
    from elsa_kernels.triton.launch import CAREFUL_TILE

    compiled = aot.careful_variant(target, 128, aot.EVERYTHING, "fp32", CAREFUL_TILE)
    assert compiled.metadata.shared <= SHARED[target]


# --- tiles


def test_tiles_are_found_for_every_device_and_head_dimension() -> None:
    for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        for mode in ("split", "half", "ieee", "tf32"):
            for D in (16, 32, 64, 128, 256):
                assert tiles.choose(mode, D, arch).BN >= 16


def test_small_relatives_of_big_devices_get_the_small_tiles() -> None:
    assert tiles.choose("split", 128, "sm_89") == tiles.choose("split", 128, "unheard_of")
    assert tiles.choose("split", 128, "sm_100") == tiles.choose("split", 128, "sm_90")
    assert tiles.choose("split", 128, "sm_90") != tiles.choose("split", 128, "sm_80")


def test_a_crowd_of_programs_gets_taller_tiles_with_the_same_keys() -> None:
    tile = tiles.choose("inline", 64, "sm_90")
    assert (tile.BM, tile.num_warps, tile.registers) == (64, 4, 168)
    few, some, many, odd = (
        tiles.crowded(tile, blocks, heads) for blocks, heads in ((2, 96), (4, 96), (4, 384), (3, 384))
    )
    assert (few.BM, few.registers) == (64, 0)
    assert some == odd == tile
    assert (many.BM, many.num_warps, many.registers) == (128, 8, 128)
    assert few.BN == many.BN == tile.BN
    unbounded = tiles.choose("inline", 64, "sm_80")
    assert tiles.crowded(unbounded, 4, 384) == unbounded


def test_turing_falls_back_to_plain_fp32_products() -> None:
    from elsa_kernels.registry import Problem
    from elsa_kernels.triton import launch

    problem = Problem(
        B=1, H=4, Hkv=4, Nq=500, Nk=500, D=64, dtype=torch.float32, device=torch.device("cuda"), precision="fp32",
        causal=True, scale=0.1, q_start=0,
    )  # fmt: skip
    assert launch.plan(problem, "sm_75").mode == "ieee"
    assert launch.plan(problem, "sm_90").mode == "split"


def test_packed_sequences_compile() -> None:
    compiled = aot.forward_variant("sm_90", "split", 64, aot.PLAIN | {"VARLEN": True})
    assert compiled.metadata.shared <= SHARED["sm_90"]
