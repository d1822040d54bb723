"""Launcher of `linear_few.cu`: a FP32-accurate linear layer for up to 16 rows, in one pass over the split weight."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.resources import files

import torch

from elsa_kernels.cuda import driver, nvrtc
from elsa_kernels.devices import multiprocessors

OLDEST = 80  # mma.m16n8k16 and conversions to FP16 pairs


MAX_ROWS = 16
SLICES = 8  # warps that share K; part of the result's definition, like FLUSH in the kernel


@dataclass(frozen=True, slots=True)
class FewTile:
    """Up to 16·MT rows of W a block, `blocks_per_sm` of them on a multiprocessor. No result depends on either."""

    MT: int
    blocks_per_sm: int

    def defines(self, tiles: int) -> dict[str, int]:
        return {
            "ELSA_TILES": tiles,
            "ELSA_MT": self.MT,
            "ELSA_SLICES": SLICES,
            "ELSA_MIN_BLOCKS": self.blocks_per_sm,
        }

    def blocks(self, N: int, multiprocessors: int) -> int:
        """Blocks among which N rows are shared evenly: whole waves of the device, of shares no smaller than 8 rows."""
        fewest = -(-N // (16 * self.MT))
        slots = self.blocks_per_sm * multiprocessors
        return max(fewest, min(-(-fewest // slots) * slots, -(-N // 8)))


TILE = FewTile(MT=2, blocks_per_sm=2)


class Params(ctypes.Structure):
    """`struct Params` of linear_few.cu, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "bias", "out", "w_hi", "w_lo", "w_exponent")]
        + [("x_stride", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("M", "N", "K")]
    )


def source() -> str:
    return files("elsa_kernels.cuda").joinpath("linear_few.cu").read_text()


def refusal(device: int, K: int) -> str | None:
    """Why this form does not take rows of K on CUDA device `device`, or None."""
    return f"K = {K} is not a multiple of 8" if K % 8 else _refuse_device(device)


@functools.cache
def _refuse_device(device: int) -> str | None:
    if torch.version.hip:
        return "it runs on CUDA devices"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        return f"needs compute capability 8.0, the device has {major}.{minor}"
    reason = nvrtc.unavailable()
    if reason is None and 10 * major + minor not in nvrtc.architectures():
        return f"NVRTC {nvrtc.version()} does not compile for compute capability {major}.{minor}"
    return reason


def tiles_of(M: int) -> int:
    """Groups of 8 rows of X."""
    return 1 if M <= 8 else 2


@functools.cache
def kernel(device: int, tile: FewTile, tiles: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.cached_cubin(source(), 10 * major + minor, tile.defines(tiles))
    return driver.Module(cubin).function("linear_few", 0)


def run(
    x: torch.Tensor,
    hi: torch.Tensor,
    lo: torch.Tensor,
    exponent: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: FewTile | None = None,
) -> None:
    """x [M ≤ 16, K] float32, hi and lo [N, K] float16, exponent [N] int32, bias [N] or None: out [M, N] float32."""
    (M, N), K = out.shape, x.shape[1]
    if x.stride(0) % 4 or x.data_ptr() % 16:
        x = x.contiguous() if x.stride(0) % 4 else x.clone()
    for name, plane in (("hi", hi), ("lo", lo)):
        if plane.data_ptr() % 16 or not plane.is_contiguous():
            raise ValueError(f"plane {name} of the weight is not contiguous and 16-byte aligned")
    params = Params(
        x.data_ptr(), bias.data_ptr() if bias is not None else None, out.data_ptr(), hi.data_ptr(), lo.data_ptr(),
        exponent.data_ptr(), x.stride(0), M, N, K,
    )  # fmt: skip
    tile = tile or TILE
    with torch.cuda.device(x.device):
        device = torch.cuda.current_device()
        blocks = tile.blocks(N, multiprocessors(device))
        driver.launch(kernel(device, tile, tiles_of(M)), blocks, 32 * SLICES, 0, params)
