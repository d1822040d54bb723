"""FP32-accurate linear layers on tensor cores: Y = X·Wᵀ + b with every operand split into an FP16 pair.

Weights are split once (`split_rows`), in the bytes of FP32; activations on the way in. Every 64 of K is summed on the
tensor core and added in FP32 outside it. Error against FP64 at or under that of torch's FP32 GEMM; no TF32 anywhere.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from elsa_kernels import gluon
from elsa_kernels.cuda import linear_few
from elsa_kernels.devices import multiprocessors
from elsa_kernels.registry import FallbackWarning

try:
    import triton
    import triton.knobs

    _TRITON_MISSING = None
except ImportError as error:
    _TRITON_MISSING = str(error)

_announced: set[tuple[str, str]] = set()  # (form, reason) of fallbacks
FORMS = ("cuda", "gluon", "triton", "torch")  # in order of preference
GROUP = 8  # rows of tiles that share W's tiles in L2
ROW_IN_REGISTERS = 16384  # elements of a row up to which splitting reads it once
SKINNY = 32  # up to so many rows of x, time is that of reading the weights once


@dataclass(frozen=True, slots=True)
class SplitMatrix:
    """A FP32 matrix [R, K] as (hi + lo)·2^exponent: hi, lo [R, K] FP16, exponent [R] int32, nonfinite [R] int32."""

    hi: torch.Tensor
    lo: torch.Tensor
    exponent: torch.Tensor
    nonfinite: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.hi.shape

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hi, self.lo, self.exponent, self.nonfinite))

    def to_float32(self) -> torch.Tensor:
        """[R, K] float32: the represented values, within 2^-22 of the split matrix's."""
        return torch.ldexp(self.hi.float() + self.lo.float(), self.exponent[:, None])


def split_rows(x: torch.Tensor) -> SplitMatrix:
    """Split x [R, K] float32 (contiguous rows) row by row, on any device."""
    _check_matrix(x, "x")
    rows, inner = x.shape
    if _TRITON_MISSING is not None or (x.device.type == "cpu" and not triton.knobs.runtime.interpret):
        return _split_rows_torch(x)
    hi, lo = (torch.empty(rows, inner, dtype=torch.float16, device=x.device) for _ in range(2))
    exponent, nonfinite = (torch.empty(rows, dtype=torch.int32, device=x.device) for _ in range(2))
    if rows and inner:
        from elsa_kernels.triton.linear_kernel import split_rows_kernel

        whole = triton.next_power_of_2(inner)
        one = whole <= ROW_IN_REGISTERS
        with torch.cuda.device_of(x):
            split_rows_kernel[(rows,)](
                x, hi, lo, exponent, nonfinite, inner, x.stride(0),
                BLOCK=whole if one else 4096, ONE=one, num_warps=16 if one and whole > 8192 else 8,
            )  # fmt: skip
    else:
        exponent.zero_(), nonfinite.zero_()
    return SplitMatrix(hi, lo, exponent, nonfinite)


def _split_rows_torch(x: torch.Tensor) -> SplitMatrix:
    """The kernel's arithmetic in plain torch: the same bits."""
    finite = x.isfinite()
    if x.shape[1]:
        largest = torch.where(finite, x, 0.0).abs().amax(dim=1)
    else:
        largest = x.new_zeros(x.shape[0])
    exponent = (largest.view(torch.int32) >> 23).clamp(min=15) - 127
    scaled = torch.where(finite, torch.ldexp(x, 14 - exponent[:, None]), x)
    hi = scaled.half()
    lo = torch.where(finite, scaled - hi.float(), 0.0).half()
    return SplitMatrix(hi, lo, exponent - 14, (~finite).any(dim=1).int())


def split_weight(weight: torch.Tensor) -> SplitMatrix:
    """Split a weight [N, K] once. Refuses one that holds Inf or NaN: ValueError naming the first such row."""
    split = split_rows(weight)
    bad = split.nonfinite.nonzero()
    if bad.numel():
        raise ValueError(
            f"the weight holds Inf or NaN in {bad.numel()} of its rows, first in row {int(bad[0])}: "
            "it cannot be split; use torch's own linear layer for it"
        )
    return split


def linear(
    x: torch.Tensor, weight: torch.Tensor | SplitMatrix, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """x [..., K] float32 times weight [N, K] (float32, or split once), plus bias [N]: [..., N] float32.

    impl: "cuda" (up to 32 rows, compute capability 8.0 and newer), "gluon" (more rows, 9.0), "triton" (8.0 and newer),
    "torch" (everywhere); None chooses the first that takes the problem.
    An Inf or NaN in x gives what FP32 arithmetic gives, in its own row only.
    """
    if torch.compiler.is_compiling():
        split = weight if isinstance(weight, SplitMatrix) else split_weight(weight)
        return _linear_op(x, split.hi, split.lo, split.exponent, bias, impl)
    N, K = weight.shape
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}: linear takes float32; use torch.nn.functional.linear for other dtypes")
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, the weight [N, K] takes {K}")
    impl = _choose(x, K, impl)
    if impl == "torch":
        # Of a split weight, the values it represents: for a device without these kernels, at the price of a copy.
        return F.linear(x, weight.to_float32() if isinstance(weight, SplitMatrix) else weight, bias)
    split = weight if isinstance(weight, SplitMatrix) else split_weight(weight)
    rows = x.reshape(-1, K)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape[0], N, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _run(rows, split, bias, out, impl)
    return out.view(*x.shape[:-1], N)


@torch.library.custom_op("elsa::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    hi: torch.Tensor,
    lo: torch.Tensor,
    exponent: torch.Tensor,
    bias: torch.Tensor | None,
    impl: str | None,
) -> torch.Tensor:
    # Nothing reads a split weight's `nonfinite`: `split_weight` has refused what would set it.
    return linear(x, SplitMatrix(hi, lo, exponent, exponent), bias, impl=impl)


@_linear_op.register_fake
def _(x, hi, lo, exponent, bias, impl):
    return x.new_empty((*x.shape[:-1], hi.shape[0]))


def matmul(a: torch.Tensor, b: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """a [M, K] times b [K, N], both float32: [M, N] float32."""
    return linear(a, b.t().contiguous(), impl=impl)


def _choose(x: torch.Tensor, K: int, impl: str | None) -> str:
    if impl is None:
        return _preferred(x, K)
    if impl not in FORMS:
        raise ValueError(f"unknown implementation {impl!r} of linear; known: {', '.join(FORMS)}")
    reason = _refusal(impl, x, K)
    if reason is not None:
        raise ValueError(f"implementation {impl!r} of linear does not take this problem: {reason}")
    return impl


def _preferred(x: torch.Tensor, K: int) -> str:
    """The first form that takes the problem. Where one that is meant for it refuses, that is said, once a reason."""
    for name in FORMS[:-1]:
        reason = _refusal(name, x, K)
        if reason is None:
            return name
        if _meant_for(name, x, K) and (name, reason) not in _announced:
            _announced.add((name, reason))
            message = f"elsa_kernels.linear: {name} refused ({reason}); another form runs instead"
            warnings.warn(message, FallbackWarning, stacklevel=4)
    return "torch"


def _meant_for(name: str, x: torch.Tensor, K: int) -> bool:
    if x.device.type != "cuda" or not x.numel():
        return False
    if name == "gluon":
        return x.numel() > SKINNY * K and torch.cuda.get_device_capability(x.device)[0] == 9
    return x.numel() <= linear_few.MAX_ROWS * K if name == "cuda" else name == "triton"


def _refusal(name: str, x: torch.Tensor, K: int) -> str | None:
    if name == "torch":
        return None
    if name == "cuda":
        return _refusal_of_few(x, K)
    if _TRITON_MISSING is not None:
        return f"triton is not installed ({_TRITON_MISSING})"
    if x.device.type == "cpu":
        interpreted = name == "triton" and triton.knobs.runtime.interpret
        return None if interpreted else "x is on the CPU"
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    capability = torch.cuda.get_device_capability(x.device)
    if name == "gluon":
        if capability[0] != 9:
            return f"needs compute capability 9.0, the device has {capability[0]}.{capability[1]}"
        if gluon._missing():
            return gluon._missing()
        if K % 8:
            return f"K = {K} is not a multiple of 8, as the tensor memory accelerator needs"
        if x.numel() <= SKINNY * K:
            return f"at most {SKINNY} rows: the forms with small tiles read the weights faster"
    elif capability < (8, 0):
        return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return None


def _refusal_of_few(x: torch.Tensor, K: int) -> str | None:
    if x.device.type != "cuda":
        return f"x is on the {x.device.type.upper()}"
    rows = x.numel() // max(K, 1)
    if not 0 < rows <= linear_few.MAX_ROWS:
        return f"{rows} rows: this form takes 1 to {linear_few.MAX_ROWS}"
    return linear_few.refusal(x.device.index, rows, K)


def _run(x: torch.Tensor, w: SplitMatrix, bias: torch.Tensor | None, out: torch.Tensor, impl: str) -> None:
    if impl == "cuda":
        return linear_few.run(x, w.hi, w.lo, w.exponent, bias, out)
    from elsa_kernels.triton.linear_kernel import repair_kernel

    split = split_rows(x)
    (M, N), K = out.shape, x.shape[1]
    if M <= SKINNY:
        return _run_skinny(x, split, w, bias, out)
    (_run_gluon if impl == "gluon" else _run_triton)(split, w, bias, out)
    repair_kernel[(triton.cdiv(M, 128),)](
        x, x.stride(0), split.nonfinite, w.hi, w.lo, w.exponent, bias, out, M, N, K,
        ROWS=128, BN=64, BK=64, BIAS=bias is not None,
    )  # fmt: skip
    return None


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """Tile of the form for few rows. SPAN of K goes to one program: fixed, so that no result depends on the batch."""

    BN: int = 32
    BK: int = 64  # 16 a warp
    SPAN: int = 1280
    warps: int = 4
    stages: int = 4


def _run_skinny(
    x: torch.Tensor,
    split: SplitMatrix,
    w: SplitMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: SkinnyTile | None = None,
) -> None:
    from elsa_kernels.triton.linear_kernel import combine_kernel, skinny_kernel

    tile = tile or SkinnyTile()
    (M, N), K = out.shape, x.shape[1]
    spans = triton.cdiv(K, tile.SPAN)
    parts = torch.empty(spans, M, N, dtype=torch.float32, device=x.device)
    skinny_kernel[(triton.cdiv(N, tile.BN), spans)](
        split.hi, split.lo, w.hi, w.lo, parts, M, N, K, tile.SPAN,
        BM=16 if M <= 16 else 32, BN=tile.BN, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    combine_kernel[(M, triton.cdiv(N, 256))](
        parts, spans, x, x.stride(0), split.exponent, split.nonfinite, w.hi, w.lo, w.exponent, bias, out, M, N, K,
        BN=256, BK=32, BIAS=bias is not None,
    )  # fmt: skip


def _run_triton(x: SplitMatrix, w: SplitMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    from elsa_kernels.triton.linear_kernel import linear_kernel

    M, N = out.shape
    BM, BN = 128, 128
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
    linear_kernel[grid](
        x.hi, x.lo, x.exponent, w.hi, w.lo, w.exponent, bias, out, M, N, x.shape[1],
        BM=BM, BN=BN, BK=64, GROUP=GROUP, BIAS=bias is not None, num_warps=8, num_stages=3,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GluonTile:
    """Tile of the Hopper form: two warp groups of 64 rows, BN columns, BK of K between promotions."""

    BN: int = 128
    BK: int = 64
    stages: int = 3
    registers: int = 232


def _run_gluon(
    x: SplitMatrix, w: SplitMatrix, bias: torch.Tensor | None, out: torch.Tensor, tile: GluonTile | None = None
) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from elsa_kernels.gluon.linear_kernel import linear_kernel

    tile = tile or GluonTile()

    def descriptor(plane: torch.Tensor, rows: int) -> TensorDescriptor:
        box = [rows, tile.BK]
        return TensorDescriptor.from_tensor(plane, box, gl.NVMMASharedLayout.get_default_for(box, gl.float16))

    (M, N), K = out.shape, x.shape[1]
    tiles = triton.cdiv(M, 128) * triton.cdiv(N, tile.BN)
    linear_kernel[(min(tiles, multiprocessors(out.device.index)),)](
        descriptor(x.hi, 64), descriptor(x.lo, 64), descriptor(w.hi, tile.BN), descriptor(w.lo, tile.BN),
        out, x.exponent, w.exponent, bias if bias is not None else out, M, N, K,
        BN=tile.BN, BK=tile.BK, STAGES=tile.stages, GROUP=GROUP, BIAS=bias is not None,
        REGISTERS=tile.registers, num_warps=4,
    )  # fmt: skip


def _check_matrix(x: torch.Tensor, name: str) -> None:
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}: expected a float32 matrix")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has column stride {x.stride(-1)}: expected contiguous rows")
