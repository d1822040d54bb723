"""Tile shapes of the FFMA attention kernel, and what they cost in registers and shared memory.

Registers of a thread, which keeps 8 rows: O [8, D/16]; the larger of S [8, keys/16] and, with `tile_sums`, T [8, D/16];
m, l, alpha [8 each]; two sets of operands [8 + the larger of keys/16 and D/16]; about 20 addresses. At D = 128 and 128
keys that is 64 + 64 + 24 + 32 + 20 of 255; with `chains` S has two sets while it is computed, and O none. Above D = 128
T does not fit: tiles chain in O, 512 keys at a time.

Shared memory: Q transposed [D, rows + 4] (where `q_resident`), the ring of `stages` chunks of K [k_chunk, keys + 4] or
V [v_chunk, D], P [keys, rows], and (m, l) of the rows. `choose` takes the first shape that fits the device:
    D          227 KiB (sm_90)          99 KiB (sm_86, sm_89)     48 KiB (sm_60 … sm_62)
    64         64 × 128,   82 KiB       the same                  64 × 64, 33 KiB
    128        128 × 128, 197 KiB       64 × 64, 76 KiB           64 × 64, 33 KiB
    256        128 × 64,  213 KiB       64 × 64, 50 KiB           32 × 64, 40 KiB
in rows × keys. On 48 KiB the chunks of Q stream beside those of K, with plain loads instead of asynchronous copies.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_WARP = 16
HEAD_DIM_STEP = 32
MAX_HEAD_DIM = 256
MERGE_EVERY = 1024  # keys summed in registers before they are merged into global memory
SHORT_KEYS = 1024  # of a sequence, up to which tiles with chains have shorter ones
MERGE_EVERY_CHAINED = 512  # the same where tiles have no sums of their own


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut the work: what a block of `warps` warps keeps where. `chains`: chunks, of D for a
    logit and of keys for an output, are summed from zero. `unroll_k` counts steps of four; `along_rows`: the order of
    P·V's outer products."""

    head_dim: int
    warps: int
    keys: int
    k_chunk: int
    v_chunk: int
    stages: int
    q_resident: bool
    tile_sums: bool
    super_tiles: int
    chains: bool
    blocks_per_sm: int = 1
    unroll_k: int = 2
    along_rows: bool = True

    @property
    def rows(self) -> int:
        return ROWS_PER_WARP * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def padded(self) -> int:
        """Channels of a head with those that fill it up."""
        return _padded(self.head_dim)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the layout of `attention_ieee.cu`."""
        padded = self.padded
        k_slot = self.k_chunk * (self.keys + 4 + (0 if self.q_resident else self.rows + 4))
        slot = max(k_slot, self.v_chunk * padded)
        q = padded * (self.rows + 4) if self.q_resident else 0
        return 4 * (q + self.stages * slot + self.rows * self.keys + 2 * self.rows)

    def defines(self, *, vector: int, logits: bool) -> dict[str, int]:
        """The macros that `attention_ieee.cu` wants."""
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
            "ELSA_ALONG_ROWS": int(self.along_rows),
            "ELSA_CHAINS": int(self.chains),
            "ELSA_SHORT_KEYS": SHORT_KEYS,
            "ELSA_VEC": vector,
            "ELSA_LOGITS": int(logits),
        }


def _padded(head_dim: int) -> int:
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP


def choose(head_dim: int, shared_limit: int) -> Tile | None:
    """The preferred tile whose shared memory fits, or None. A function of the device and D alone: bits follow it."""
    return next((tile for tile in candidates(head_dim) if tile.shared_bytes <= shared_limit), None)


def candidates(head_dim: int) -> list[Tile]:
    """The tiles for a head dimension, preferred first."""
    if head_dim > 128:
        return [
            _tile(head_dim, warps=8, keys=64, k_chunk=32, v_chunk=16, stages=3, q_resident=True),
            _tile(head_dim, warps=4, keys=64, k_chunk=32, v_chunk=16, stages=2, q_resident=False),
            _tile(head_dim, warps=2, keys=64, k_chunk=16, v_chunk=16, stages=2, q_resident=False),
        ]
    large = _tile(head_dim, warps=4, keys=128, k_chunk=32, v_chunk=32, stages=2, q_resident=True, blocks_per_sm=2)
    if _padded(head_dim) == 128:
        large = _tile(head_dim, warps=8, keys=128, k_chunk=64, v_chunk=64, stages=2, q_resident=True, chains=True)
    return [
        large,
        _tile(head_dim, warps=4, keys=64, k_chunk=32, v_chunk=16, stages=3, q_resident=True),
        _tile(head_dim, warps=4, keys=64, k_chunk=16, v_chunk=16, stages=2, q_resident=False),
    ]


def _tile(
    head_dim: int,
    *,
    warps: int,
    keys: int,
    k_chunk: int,
    v_chunk: int,
    stages: int,
    q_resident: bool,
    chains: bool = False,
    blocks_per_sm: int = 1,
) -> Tile:
    tile_sums = head_dim <= 128
    return Tile(
        head_dim=head_dim,
        warps=warps,
        keys=keys,
        k_chunk=k_chunk,
        v_chunk=v_chunk,
        stages=stages,
        q_resident=q_resident,
        tile_sums=tile_sums,
        super_tiles=(MERGE_EVERY if tile_sums else MERGE_EVERY_CHAINED) // keys,
        chains=chains,
        blocks_per_sm=blocks_per_sm,
        along_rows=_padded(head_dim) > 64,
    )
