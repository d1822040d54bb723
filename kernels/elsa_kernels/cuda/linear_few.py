"""Launcher of `linear_few.cu`: a FP32-accurate linear layer for up to 32 rows, in one pass over the split weight."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.resources import files

import torch

from elsa_kernels.cuda import driver, nvrtc
from elsa_kernels.devices import multiprocessors, shared_limit

OLDEST = 80  # mma.m16n8k16 and conversions to FP16 pairs
MAX_ROWS = 32
SLICES = 8  # warps that share K; part of the result's definition, like FLUSH in the kernel
X_PITCH = 36  # floats of a row of X's ring, as in the kernel
STATIC_SHARED = 8 * 1024  # bytes, at most, of a block's shared memory beside the dynamic


@dataclass(frozen=True, slots=True)
class FewTile:
    """Up to 8·NT rows of W and 8·eights rows of X a block, `blocks_per_sm` of them on a multiprocessor; `sets` steps
    of W's K on their way to registers, and `x_sets` of X's, to registers or to shared memory; `ahead` steps of
    W asked of L2 before the kernel ahead has ended, `later` more as soon as it has. No result depends on any of
    them."""

    NT: int
    sets: int
    blocks_per_sm: int
    eights: int = 1
    x_sets: int = 1
    x_shared: bool = False
    ahead: int = 1
    later: int = 0

    @property
    def pitch(self) -> int:
        """Floats of a row of X's sums in shared memory: 8 beyond a multiple of 32, so that banks differ."""
        return (8 * self.NT + 23) // 32 * 32 + 8

    @property
    def shared_bytes(self) -> int:
        ring = X_PITCH * (self.x_sets + 1) if self.x_shared else 0
        return 4 * SLICES * 8 * self.eights * (self.pitch + ring)

    def defines(self) -> dict[str, int]:
        return {
            "ELSA_NT": self.NT,
            "ELSA_EIGHTS": self.eights,
            "ELSA_SETS": self.sets,
            "ELSA_X_SETS": self.x_sets,
            "ELSA_X_SHARED": int(self.x_shared),
            "ELSA_SLICES": SLICES,
            "ELSA_MIN_BLOCKS": self.blocks_per_sm,
            "ELSA_PITCH": self.pitch,
            "ELSA_AHEAD": self.ahead,
            "ELSA_LATER": self.later,
        }

    def rows(self, multiprocessors: int) -> int:
        """Rows of W that all multiprocessors have at once."""
        return 8 * self.NT * self.blocks_per_sm * multiprocessors

    def blocks(self, N: int, multiprocessors: int) -> int:
        """Blocks among which N rows are shared evenly: whole waves of the device, of shares no smaller than 8 rows."""
        fewest = -(-N // (8 * self.NT))
        slots = self.blocks_per_sm * multiprocessors
        return max(fewest, min(-(-fewest // slots) * slots, -(-N // 8)))


# By the eights of rows of X: fewer leave registers and instructions to the weights.
NARROW = (
    FewTile(NT=5, sets=2, blocks_per_sm=1, x_sets=2, ahead=3, later=2),
    FewTile(NT=5, sets=2, blocks_per_sm=1, eights=2, x_sets=2, x_shared=True, ahead=4, later=2),
)
WIDE = tuple(FewTile(NT=4, sets=1, blocks_per_sm=2, eights=eights) for eights in (1, 2))
MANY = FewTile(NT=5, sets=1, blocks_per_sm=1, eights=4, x_sets=2, x_shared=True, ahead=4, later=2)


def tile_of(M: int, N: int, multiprocessors: int) -> FewTile:
    """The tile for M rows of X and N of W: narrow where the device has all of W's rows at once."""
    if M > 16:
        return MANY
    of_x = (M - 1) // 8
    return NARROW[of_x] if NARROW[of_x].rows(multiprocessors) >= N else WIDE[of_x]


class Params(ctypes.Structure):
    """`struct Params` of linear_few.cu, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "bias", "out", "w_hi", "w_lo", "w_exponent")]
        + [("x_stride", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("M", "N", "K", "share", "larger")]
    )


def source() -> str:
    return files("elsa_kernels.cuda").joinpath("linear_few.cu").read_text()


def refusal(device: int, M: int, K: int) -> str | None:
    """Why this form does not take M rows of K on CUDA device `device`, or None."""
    return f"K = {K} is not a multiple of 8" if K % 8 else _refuse_device(device, M > 16)


@functools.cache
def _refuse_device(device: int, many: bool) -> str | None:
    if torch.version.hip:
        return "it runs on CUDA devices"
    needed, has = MANY.shared_bytes + STATIC_SHARED, shared_limit(device)
    if many and needed > has:
        return f"more than 16 rows need {needed} bytes of shared memory, a block of the device may have {has}"
    return nvrtc.refusal(*torch.cuda.get_device_capability(device), OLDEST)


@functools.cache
def kernel(device: int, tile: FewTile) -> tuple[ctypes.c_void_p, bool]:
    """The kernel, and whether it may be launched early."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.cached_cubin(source(), 10 * major + minor, tile.defines())
    return driver.Module(cubin).function("linear_few", tile.shared_bytes), driver.takes_early_launches(major)


def run(
    x: torch.Tensor,
    hi: torch.Tensor,
    lo: torch.Tensor,
    exponent: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: FewTile | None = None,
) -> None:
    """x [M ≤ 32, K] float32, hi and lo [N, K] float16, exponent [N] int32, bias [N] or None: out [M, N] float32."""
    (M, N), K = out.shape, x.shape[1]
    if x.stride(0) % 4 or x.data_ptr() % 16:
        x = x.contiguous() if x.stride(0) % 4 else x.clone()
    for name, plane in (("hi", hi), ("lo", lo)):
        if plane.data_ptr() % 16 or not plane.is_contiguous():
            raise ValueError(f"plane {name} of the weight is not contiguous and 16-byte aligned")
    with torch.cuda.device(x.device):
        device = torch.cuda.current_device()
        count = multiprocessors(device)
        tile = tile or tile_of(M, N, count)
        blocks = tile.blocks(N, count)
        params = Params(
            x.data_ptr(), bias.data_ptr() if bias is not None else None, out.data_ptr(), hi.data_ptr(), lo.data_ptr(),
            exponent.data_ptr(), x.stride(0), M, N, K, *divmod(N, blocks),
        )  # fmt: skip
        function, early = kernel(device, tile)
        driver.launch(function, blocks, 32 * SLICES, tile.shared_bytes, params, early)
