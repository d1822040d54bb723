"""Which tile a kernel runs with: read from tuning/triton.json, a function of mode, head dimension and device alone.

Never of the batch or of the lengths, apart from the three row classes of `rows_of_tile` and from `crowded`, which
changes no bit: so a row's result depends on its own sequence and nothing else. Nothing is tuned while serving.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib import resources

# Packed query rows (queries × heads of a group) up to which KV is cut into chunks, one program each.
DECODE_ROWS = 64
CHUNK_KEYS = 512
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True, slots=True)
class Tile:
    """BM query rows by BN keys; threads and pipeline depth of the program that holds them; registers a thread may use.

    registers 0 leaves their number to the compiler; fewer than it takes let more programs share a multiprocessor.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Of a Triton launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    text = resources.files("elsa_kernels.tuning").joinpath("triton.json").read_text()
    table: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(text)
    return table


@functools.cache
def choose(mode: str, D: int, arch: str) -> Tile:
    """The tile for a mode ("split", "half", "ieee", "tf32"), head dimension and architecture ("sm_90", "gfx942").

    The nearest entry: the same architecture, else the newest older one of its kind, else "default"; the smallest
    listed head dimension that holds D.
    """
    table = _table()
    for name in candidates(arch, table):
        by_dim = table[name].get(mode)
        if by_dim is not None:
            dim = min((int(d) for d in by_dim if int(d) >= D), default=max(map(int, by_dim)))
            return Tile(**by_dim[str(dim)])
    raise KeyError(f"tuning/triton.json has no default for mode {mode!r}")


def candidates(arch: str, table: dict) -> list[str]:
    """Names of a table's entries for an architecture, the nearest first."""
    if not arch.startswith("sm_"):
        return [arch, "default"] if arch in table else ["default"]
    # Consumer parts (sm_86, sm_89, sm_120) have too little shared memory for the tiles of their big siblings.
    if arch not in ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103"):
        return ["default"]
    version = int(arch[3:])
    older = sorted((int(n[3:]) for n in table if n.startswith("sm_") and int(n[3:]) <= version), reverse=True)
    return [*(f"sm_{n}" for n in older), "default"]


def rows_of_tile(tile: Tile, rows: int) -> Tile:
    """The tile for `rows` packed query rows: with few of them (decode), no taller than 16, 32 or 64."""
    if rows > DECODE_ROWS:
        return tile
    return replace(tile, BM=16 if rows <= 16 else 32 if rows <= 32 else 64, num_warps=4)


def crowded(tile: Tile, blocks: int, heads: int) -> Tile:
    """The tile for so many programs of it, where its registers were bounded so that three share a multiprocessor.

    With at most two for each there is nothing to bound for. With more than three, twice the rows split each key half
    as often, if that pads no more. Same BN, and rows do not meet: the same bits.
    """
    programs = blocks * heads
    if not tile.registers:
        return tile
    if programs <= 2 * MULTIPROCESSORS:
        return replace(tile, registers=0)
    if programs > 3 * MULTIPROCESSORS and blocks % 2 == 0:
        return replace(tile, BM=2 * tile.BM, num_warps=2 * tile.num_warps, registers=128)
    return tile
