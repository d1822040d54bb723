"""Tile shapes of the FFMA attention kernel, and what they cost in registers and shared memory.

A thread keeps 8 rows. In registers it holds O [8, D/16], the larger of S [8, BN/16] and the tile's sums T [8, D/16]
(where `tile_sums`), m, l, alpha [8 each] and about 48 operands. In shared memory lie Q [16·warps, D + 4] (where
`q_resident`), the ring of `stages` slots, and P [16·warps, BN]; see `attention_ieee.cu`.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_WARP = 16
HEAD_DIM_STEP = 32
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut the work. `super_tiles`: tiles summed before they are merged into global memory."""

    head_dim: int
    warps: int
    keys: int
    k_chunk: int
    v_chunk: int
    stages: int
    q_resident: bool
    tile_sums: bool
    super_tiles: int
    blocks_per_sm: int = 1
    unroll_k: int = 2
    unroll_v: int = 2

    @property
    def rows(self) -> int:
        return ROWS_PER_WARP * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the layout of `attention_ieee.cu`."""
        padded = -(-self.head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
        k_slot = self.k_chunk * (self.keys + 4 + (0 if self.q_resident else self.rows + 4))
        slot = max(k_slot, self.v_chunk * padded)
        q = padded * (self.rows + 4) if self.q_resident else 0
        return 4 * (q + self.stages * slot + self.rows * self.keys + 2 * self.rows)

    def defines(self, *, vector: int, logits: bool) -> dict[str, int]:
        return {
            "ELSA_HEAD": self.head_dim,
            "ELSA_WARPS": self.warps,
            "ELSA_BN": self.keys,
            "ELSA_DC": self.k_chunk,
            "ELSA_NC": self.v_chunk,
            "ELSA_STAGES": self.stages,
            "ELSA_Q_RESIDENT": int(self.q_resident),
            "ELSA_TILE_SUMS": int(self.tile_sums),
            "ELSA_SUPER": self.super_tiles,
            "ELSA_MIN_BLOCKS": self.blocks_per_sm,
            "ELSA_UNROLL_K": self.unroll_k,
            "ELSA_UNROLL_V": self.unroll_v,
            "ELSA_VEC": vector,
            "ELSA_LOGITS": int(logits),
        }
