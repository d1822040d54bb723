"""Tiles and splits of the paged kernels: functions of dtype, head dimension, group and device, never of the batch."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from importlib import resources

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
    programs: int = 4096

    def limits(self) -> dict[str, int]:
        return {"maxnreg": self.registers} if self.registers else {}


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


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """tuning/paged.json: fields of a `DecodeTile` by architecture and kind, for head dimensions up to 128."""
    text = resources.files("elsa_kernels.tuning").joinpath("paged.json").read_text()
    entries: dict[str, dict[str, dict[str, int]]] = json.loads(text)
    return entries


def kind_of(form: str, mode: str, rows: int, problem: PagedProblem) -> str:
    """The table's name for a launch: "lanes" by the bits of a query element, "dot16" and "dot64" by their products."""
    if form == "lanes":
        return f"lanes.{32 if problem.dtype == torch.float32 else 16}"
    return f"{form}{rows}.{'half' if mode == 'half' else 'fp32'}"


def decode_tile(form: str, mode: str, rows: int, problem: PagedProblem, arch: str) -> DecodeTile:
    """The tile of a decode launch: the architecture's own entry, else that of its nearest older kind, else default."""
    if arch == "interpreter":
        return DecodeTile(BN=16, CHUNK=SMALLEST_CHUNK, num_warps=4, num_stages=1, FAN=2)
    kind = kind_of(form, mode, rows, problem)
    entry = next(table()[name][kind] for name in tiles.candidates(arch, table()) if kind in table()[name])
    tile = DecodeTile(**entry)
    return tile if problem.D <= 128 else dataclasses.replace(tile, BN=max(16, tile.BN // 2), registers=0)


def prefill_tile(mode: str, D: int, arch: str) -> tiles.Tile:
    if arch == "interpreter":
        return tiles.Tile(BM=64, BN=32, num_warps=4, num_stages=1)
    if mode == "bf16x6":
        return tiles.Tile(BM=64, BN=32, num_warps=4 if D <= 128 else 8, num_stages=1 if D > 64 else 2)
    return tiles.choose(mode, max(16, 1 << (D - 1).bit_length()), arch)
