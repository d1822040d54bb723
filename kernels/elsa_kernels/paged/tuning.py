"""Tiles and splits of the paged kernels: functions of dtype, head dimension, group and device, never of the batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from elsa_kernels.paged.problem import PagedProblem
from elsa_kernels.triton import tiles

SMALLEST_CHUNK = 256


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """CHUNK keys a unit of work, BN of them at a time, FAN chunks a node of the merge; at most `programs` launched.

    merge_rows: packed rows that are merged at a time. registers: bound on those of a thread, which lets more programs
    share an SM; 0 for none (and off CUDA).
    """

    BN: int
    CHUNK: int
    num_warps: int
    num_stages: int
    FAN: int = 8
    merge_rows: int = 4
    registers: int = 0

    def limits(self) -> dict[str, int]:
        return {"maxnreg": self.registers} if self.registers else {}

    programs: int = 4096


@functools.cache
def architecture(index: int) -> str:
    """Of a CUDA or ROCm device: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def converts_fp8(arch: str) -> bool:
    """Whether Triton converts float8_e4m3fn in hardware there."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89


def choose_mode(dtype: torch.dtype, precision: str, arch: str) -> str:
    """How products are made: "half", or how FP32 operands are multiplied ("ieee", "bf16x6", "tf32")."""
    if precision in ("ieee", "tf32"):
        return precision
    if arch == "sm_75":  # Triton emits no tensor-core instruction for Turing
        return "ieee"
    if dtype != torch.float32:
        return "half"
    return "ieee" if arch == "interpreter" else "bf16x6"


def decode_tile(form: str, mode: str, rows: int, problem: PagedProblem, arch: str) -> DecodeTile:
    wide = problem.D > 128
    if arch == "interpreter":
        return DecodeTile(BN=16, CHUNK=SMALLEST_CHUNK, num_warps=4, num_stages=1, FAN=2)
    if form == "lanes":
        return DecodeTile(BN=16 if wide else 32, CHUNK=512, num_warps=4, num_stages=1)
    if mode == "half":
        if rows <= 16:
            return DecodeTile(BN=64 // (1 + wide), CHUNK=512, num_warps=2, num_stages=3)
        return DecodeTile(BN=64 // (1 + wide), CHUNK=512, num_warps=4, num_stages=2)
    return DecodeTile(BN=16 if wide or rows > 16 else 32, CHUNK=512, num_warps=4, num_stages=1)


def prefill_tile(mode: str, D: int, arch: str) -> tiles.Tile:
    if arch == "interpreter":
        return tiles.Tile(BM=64, BN=32, num_warps=4, num_stages=1)
    if mode == "bf16x6":
        return tiles.Tile(BM=64, BN=32, num_warps=4 if D <= 128 else 8, num_stages=1 if D > 64 else 2)
    return tiles.choose(mode, max(16, 1 << (D - 1).bit_length()), arch)
