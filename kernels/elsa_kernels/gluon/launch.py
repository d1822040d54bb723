"""Launchers of the two Hopper kernels: operands to TMA descriptors, one launch each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from triton import next_power_of_2
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from elsa_kernels.devices import multiprocessors
from elsa_kernels.gluon.half_kernel import half_attention
from elsa_kernels.gluon.planes import TilePlanes, split_tiles
from elsa_kernels.gluon.split_kernel import split_attention
from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import State
from elsa_kernels.triton.forward import careful_kernel
from elsa_kernels.triton.launch import CAREFUL_TILE

ROWS = 64
SHARED_LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile of one program: groups·64 query rows against BN keys at a time, `stages` of them in flight.

    registers: of a consumer thread (the producer gives its own away). turns: the warp groups issue in turn.
    """

    BN: int
    stages: int
    groups: int
    registers: int
    turns: bool = True


# BN is also the tile of `split_tiles`, so it depends on the head dimension alone.
SPLIT_TILES = {128: Tile(BN=64, stages=2, groups=2, registers=232), 64: Tile(BN=128, stages=2, groups=2, registers=232)}
THREE_GROUPS = Tile(BN=128, stages=2, groups=3, registers=160)  # of 64 channels
THREE_GROUPS_RATE = 1.1  # rows a second of an SM with it, over those with two
HALF_TILES = {128: Tile(BN=128, stages=2, groups=2, registers=240), 64: Tile(BN=128, stages=3, groups=2, registers=240)}
SECTION_HEADS = 4  # heads that work at a time under a causal mask, at least, so that their K and V share the L2 cache
SECTION_PROGRAMS = 132  # and enough of them to give every SM of an H100 or H200 a program


def split_forward(
    problem: Problem, operands: Operands, planes: TilePlanes, tile: Tile | None = None, section: int | None = None
) -> torch.Tensor | State:
    """FP32-accurate attention over K and V that are split already, by tiles of the kernel's BN keys."""
    tile = tile or split_tile(problem, multiprocessors(operands.q.get_device()))
    if planes.rows != tile.BN:
        raise ValueError(f"planes are split by tiles of {planes.rows} keys; this kernel takes {tile.BN}")
    out, m, s, todo = _outputs(problem, operands, tile)
    q = operands.q
    split_attention[_grid(problem, tile)](
        q=q,
        planes=_descriptor(planes.planes, tile.BN, width(problem)),
        exponents=planes.exponents,
        slots=planes.exponents.shape[1],
        q_stride_b=q.stride(0),
        q_stride_h=q.stride(1),
        q_stride_n=q.stride(2),
        STAGES=tile.stages,
        **_common(problem, operands, tile, out, m, s, todo, section),
    )
    _careful_pass(problem, operands, tile, out, m, s, todo)
    return State(m, s, out) if problem.return_state else out


def half_forward(
    problem: Problem, operands: Operands, tile: Tile | None = None, section: int | None = None
) -> torch.Tensor | State:
    """FP16 or BF16 attention."""
    tile = tile or HALF_TILES[width(problem)]
    out, m, s, todo = _outputs(problem, operands, tile)
    half_attention[_grid(problem, tile)](
        q_desc=_descriptor(operands.q, ROWS, width(problem)),
        k_desc=_descriptor(operands.k, tile.BN, width(problem)),
        v_desc=_descriptor(operands.v, tile.BN, width(problem)),
        STAGES=tile.stages,
        TURNS=tile.turns,
        **_common(problem, operands, tile, out, m, s, todo, section),
    )
    _careful_pass(problem, operands, tile, out, m, s, todo)
    return State(m, s, out) if problem.return_state else out


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    if problem.dtype == torch.float32:
        planes = split_tiles(
            operands.k, operands.v, SPLIT_TILES[width(problem)].BN, width(problem), operands.kv_range,
            operands.cu_seqlens_k, problem.Nk if problem.packed else None,
        )  # fmt: skip
        return split_forward(problem, operands, planes)
    return half_forward(problem, operands)


def width(problem: Problem) -> int:
    """Channels of a tile: heads between are padded with zeros."""
    return 64 if problem.D <= 64 else 128


def split_tile(problem: Problem, sms: int) -> Tile:
    """The faster tile on `sms` multiprocessors: three warp groups hide each other's softmax better than two, but their
    tiles are larger, and the last wave of programs may be nearly empty. No result depends on it."""
    two = SPLIT_TILES[width(problem)]
    if width(problem) > 64:
        return two

    def time(tile: Tile) -> float:  # of all waves, in rows of an SM
        waves = _grid(problem, tile)[0] / sms
        # Under a causal mask the last programs to start have the fewest keys, and fill the last wave's gaps.
        return tile.groups * (max(waves, 1.0) if problem.causal else math.ceil(waves))

    return THREE_GROUPS if time(THREE_GROUPS) < THREE_GROUPS_RATE * time(two) else two


def _tiles(problem: Problem, tile: Tile) -> int:
    return -(-problem.Nq // (ROWS * tile.groups))


def _grid(problem: Problem, tile: Tile) -> tuple[int]:
    return (problem.B * problem.H * _tiles(problem, tile),)


def _outputs(
    problem: Problem, operands: Operands, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B, H, Nq, D]; m and S [B, H, Nq] of a state (without one, out stands in); marks [B, Hkv, tiles, ·]: of
    each query head of a key head and each of its warp groups. Of packed sequences: out [tokens, H, D], or m and S
    [H, tokens] and W [H, tokens, D]."""
    shape: tuple[int, ...] = (problem.B, problem.H, problem.Nq)
    device = problem.device
    if problem.packed:
        tokens = operands.q.shape[2]
        shape = (problem.H, tokens) if problem.return_state else (tokens, problem.H)
    marks = (problem.H // problem.Hkv) * tile.groups
    todo = torch.empty((problem.B, problem.Hkv, _tiles(problem, tile), marks), dtype=torch.int32, device=device)
    if not problem.return_state:
        out = torch.empty((*shape, problem.D), dtype=problem.dtype, device=device)
        return out, out, out, todo
    out = torch.empty((*shape, problem.D), dtype=torch.float32, device=device)
    m, s = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return out, m, s, todo


def _careful_pass(
    problem: Problem,
    operands: Operands,
    tile: Tile,
    out: torch.Tensor,
    m: torch.Tensor,
    s: torch.Tensor,
    todo: torch.Tensor,
) -> None:
    """Compute the marked tiles again with exact FP32 products that leave masked keys out, whatever their values.

    The Triton form packs the query heads of a key head: a tile of ours is a block of `group` times as many rows there.
    """
    group = problem.H // problem.Hkv
    # Its offsets within a tile of keys are 32 bits wide.
    k, v = (x if x.stride(2) * 128 < 2**31 else x.contiguous() for x in (operands.k, operands.v))
    q = operands.q
    marks = todo.shape[3]
    careful_kernel[(todo.numel() // marks,)](
        q, k, v, out, m, s, todo, None, operands.alibi_slopes, operands.sinks, operands.kv_range,
        operands.cu_seqlens_q, operands.cu_seqlens_k,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0, 0, 0, 0,
        B=problem.B, Hkv=problem.Hkv, Nq=problem.Nq, Nk=problem.Nk, total=q.shape[2], q_start=problem.q_start,
        window=problem.window or 0, scale=problem.scale, softcap=problem.softcap or 0.0,
        n_blocks=todo.shape[2], first_chunk=0, GROUP=group, D=problem.D, BD=max(16, next_power_of_2(problem.D)),
        BM=ROWS * tile.groups * group, PART=CAREFUL_TILE.BM,
        BN=CAREFUL_TILE.BN, CHUNK=0, STATE=problem.return_state, CAUSAL=problem.causal,
        WINDOW=problem.window is not None, SOFTCAP=problem.softcap is not None, ALIBI=problem.has_alibi, HAS_BIAS=False,
        HAS_SINKS=problem.has_sinks, HAS_RANGES=problem.has_kv_range, VARLEN=problem.packed,
        MARKS=marks, BMARKS=next_power_of_2(marks),
        num_warps=CAREFUL_TILE.num_warps, num_stages=CAREFUL_TILE.num_stages,
    )  # fmt: skip


def _common(
    problem: Problem,
    operands: Operands,
    tile: Tile,
    out: torch.Tensor,
    m: torch.Tensor,
    s: torch.Tensor,
    todo: torch.Tensor,
    section: int | None,
) -> dict[str, object]:
    """The arguments that both kernels take. Pointers that a variant does not read are given `out`."""
    heads = problem.B * problem.H
    if section is None:
        enough = max(SECTION_HEADS, -(-SECTION_PROGRAMS // _tiles(problem, tile)))
        section = min(heads, enough) if problem.causal else 1
    # Heads by rows of the output; packed sequences are one batch element whose tokens come before heads.
    stride_b, stride_h, stride_n = (0, *out.stride()[:2]) if problem.packed else out.stride()[:3]
    if problem.packed and not problem.return_state:
        stride_h, stride_n = stride_n, stride_h
    sinks = None if operands.sinks is None else operands.sinks.float().contiguous()
    slopes = None if operands.alibi_slopes is None else operands.alibi_slopes.float().contiguous()
    reach = problem.Nk + problem.Nq + abs(problem.q_start)
    return {
        "sinks": out if sinks is None else sinks,
        "slopes": out if slopes is None else slopes,
        "kv_range": out if operands.kv_range is None else operands.kv_range.contiguous(),
        "starts_q": out if operands.cu_seqlens_q is None else operands.cu_seqlens_q,
        "starts_k": out if operands.cu_seqlens_k is None else operands.cu_seqlens_k,
        "out": out,
        "m_out": m,
        "s_out": s,
        "todo": todo,
        "H": problem.H,
        "Hkv": problem.Hkv,
        "heads": heads,
        "tiles": _tiles(problem, tile),
        "section": section,
        "Nq": problem.Nq,
        "Nk": problem.Nk,
        "total": operands.q.shape[2],
        "q_start": problem.q_start,
        "window": reach if problem.window is None else min(problem.window, reach),
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "out_stride_b": stride_b,
        "out_stride_h": stride_h,
        "out_stride_n": stride_n,
        "D": width(problem),
        "WIDTH": problem.D,
        "BN": tile.BN,
        "GROUPS": tile.groups,
        "REGS": tile.registers,
        "CAUSAL": problem.causal,
        "WINDOW": problem.window is not None,
        "KV_RANGE": problem.has_kv_range,
        "VARLEN": problem.packed,
        "SINKS": problem.has_sinks,
        "SOFTCAP": problem.softcap is not None,
        "ALIBI": problem.has_alibi,
        "STATE": problem.return_state,
        "num_warps": 4,
    }


def _descriptor(x: torch.Tensor, rows: int, channels: int) -> TensorDescriptor:
    """[1, 1, rows, channels ≥ D] boxes of x [B, heads, N, D]; zeros past N and D.

    TMA needs 16-byte strides: where x has others, it is copied.
    """
    unit = 16 // x.element_size()
    sizes, strides = x.shape[:3], x.stride()[:3]
    if x.data_ptr() % 16 or any(n > 1 and (s <= 0 or s % unit) for n, s in zip(sizes, strides)):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = x.stride()[:3]
    B, heads, N, D = x.shape
    # The stride of a dimension of length 1 is never used; what torch keeps there may be odd.
    used = [s if n > 1 else N * D * heads for n, s in zip(sizes, strides)]
    return TensorDescriptor(x, [B, heads, N, D], [*used, 1], [1, 1, rows, channels], SHARED_LAYOUT)
