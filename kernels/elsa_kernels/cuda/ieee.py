"""Launcher of `attention_ieee.cu`: chooses the tile, has it compiled for the device, fills in the parameters."""

from __future__ import annotations

import ctypes
import functools
from importlib.resources import files

import torch

from elsa_kernels.cuda import driver, nvrtc
from elsa_kernels.cuda.tiles import SHORT_KEYS, Tile, choose
from elsa_kernels.devices import shared_limit
from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import State

PLAIN = ("attention_ieee", "attention_ieee_short")
KERNELS = ("channel_order", *PLAIN, "attention_ieee_ordered", "attention_ieee_guarded")
WIDEST_WINDOW = 1 << 29  # sums of two positions stay under 2³¹


class Params(ctypes.Structure):
    """`struct Params` of attention_ieee.cu, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "m_out", "s_out")]
        + [(name, ctypes.c_void_p) for name in ("alibi", "bias", "sinks", "kv_range")]
        + [(f"{tensor}_{axis}", ctypes.c_longlong) for tensor in "qkv" for axis in "bhn"]
        + [(f"bias_{axis}", ctypes.c_longlong) for axis in "bhnk"]
        + [("redo", ctypes.c_void_p), ("order", ctypes.c_void_p)]
        + [(name, ctypes.c_int) for name in ("B", "H", "Hkv", "Nq", "Nk", "q_start", "causal", "window", "blocks")]
        + [(name, ctypes.c_float) for name in ("scale", "softcap")]
    )


def source() -> str:
    return files("elsa_kernels.cuda").joinpath("attention_ieee.cu").read_text()


def names(tile: Tile) -> list[str]:
    """The kernels that a tile has, in the order of their launches."""
    return [name for name in KERNELS if tile.chains or name != "attention_ieee_short"]


@functools.cache
def kernels(device: int, tile: Tile, vector: int, logits: bool) -> dict[str, ctypes.c_void_p]:
    """The tile's kernels on `device`, compiled or taken from the cache."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.cached_cubin(source(), 10 * major + minor, tile.defines(vector=vector, logits=logits))
    module = driver.Module(cubin)
    return {name: module.function(name, tile.shared_bytes) for name in names(tile)}


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of every tensor can be read 16 bytes at a time."""
    return all(
        t.data_ptr() % 16 == 0 and t.shape[-1] % 4 == 0 and all(s % 4 == 0 for s in t.stride()[:-1]) for t in tensors
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def run(problem: Problem, operands: Operands) -> torch.Tensor | State:
    index = problem.device.index
    tile = choose(problem.D, shared_limit(torch.cuda.current_device() if index is None else index))
    if tile is None:
        raise ValueError(f"head dimension {problem.D} fits no tile on {problem.device}; ask `supports` first")
    return run_tile(problem, operands, tile)


def _unneeded(keys: int, tile: Tile) -> str | None:
    """Of the two kernels for long and for short sequences, the one without work where all have so many keys."""
    if not tile.chains:
        return None
    return "attention_ieee" if keys <= SHORT_KEYS else "attention_ieee_short"


def run_tile(problem: Problem, operands: Operands, tile: Tile) -> torch.Tensor | State:
    """Run one problem with the given tile shape."""
    q, k, v = operands.q, operands.k, operands.v
    B, H, Nq, D = q.shape
    device = q.device
    alibi, sinks, bias = _float(operands.alibi_slopes), _float(operands.sinks), _float(operands.bias)
    if bias is not None:
        bias = bias.expand(B, H, Nq, problem.Nk)
    if alibi is not None:
        alibi = alibi.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    kv_range = None if operands.kv_range is None else operands.kv_range.contiguous()
    out = torch.empty((B, H, Nq, D), dtype=torch.float32, device=device)
    m = S = None
    if problem.return_state:
        m, S = (torch.empty((B, H, Nq), dtype=torch.float32, device=device) for _ in range(2))
    blocks = -(-Nq // tile.rows) * B * H
    redo = torch.empty(blocks, dtype=torch.uint8, device=device)
    channels = torch.empty((B, problem.Hkv, tile.padded + 1), dtype=torch.int32, device=device)
    params = Params(
        *(_pointer(t) for t in (q, k, v, out, m, S, alibi, bias, sinks, kv_range)),
        *(s for t in (q, k, v) for s in t.stride()[:3]),
        *(bias.stride() if bias is not None else (0, 0, 0, 0)),
        redo.data_ptr(),
        channels.data_ptr(),
        *(B, H, problem.Hkv, Nq, problem.Nk, problem.q_start, int(problem.causal)),
        min(problem.window or 0, WIDEST_WINDOW),
        blocks,
        problem.scale,
        problem.softcap or 0.0,
    )
    logits = problem.softcap is not None or alibi is not None or bias is not None or not problem.scale > 0
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        early = driver.takes_early_launches(properties.major)
        some = min(blocks, properties.multi_processor_count * tile.blocks_per_sm)
        unneeded = set() if problem.has_kv_range else {_unneeded(problem.Nk, tile)}
        for name, kernel in kernels(index, tile, 4 if _aligned(v) else 1, logits).items():
            if name == "channel_order":
                driver.launch(kernel, B * problem.Hkv, tile.threads, 8 * tile.padded, params)
            elif name not in PLAIN:
                driver.launch(kernel, some, tile.threads, tile.shared_bytes, params)
            elif name not in unneeded:
                driver.launch(kernel, blocks, tile.threads, tile.shared_bytes, params, early)
    if m is not None and S is not None:
        return State(m, S, out)
    return out.to(q.dtype)
