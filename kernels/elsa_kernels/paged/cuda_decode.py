"""Launcher of `cuda/paged_decode.cu`: up to 8 packed rows a sequence over a 16-bit paged KV with D = 128, in CUDA C++."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from importlib.resources import files

import torch

from elsa_kernels.cuda import driver, nvrtc
from elsa_kernels.devices import multiprocessors
from elsa_kernels.paged.problem import PagedOperands, PagedProblem

OLDEST = 80  # mma.m16n8k16 and movmatrix
HEAD_DIM, ROWS, TILE, FAN = 128, 8, 16, 32  # as in the kernel
STATE_BYTES = 4 * ROWS * (HEAD_DIM + 2)
MAX_CHUNK_BYTES = 256 << 20  # of chunks' states; where more would be needed, blocks take whole nodes
MAX_SEQUENCES = 12288  # whose counts fit in a block's shared memory
POINTERS = (
    "q", "k", "v", "out", "lse", "sinks", "cu", "used", "table", "state_m", "state_l", "state_w", "node_counters",
    "counters",
)  # fmt: skip
STRIDES = (
    "q_token", "q_head", "k_block", "k_place", "k_head", "v_block", "v_place", "v_head", "table_row", "out_token",
    "out_head",
)  # fmt: skip
INTEGERS = ("B", "T", "Hkv", "table_width", "causal", "whole_nodes", "nodes0")


@dataclass(frozen=True, slots=True)
class Form:
    """`warps` share chunks of `chunk` keys, `blocks_per_sm` such blocks a multiprocessor. Both of the first are part of
    the result's definition."""

    warps: int
    chunk: int
    blocks_per_sm: int

    def defines(self, dtype: torch.dtype, group: int, page: int) -> dict[str, int]:
        return {
            "ELSA_BF16": int(dtype == torch.bfloat16),
            "ELSA_GROUP": group,
            "ELSA_PAGE": page,
            "ELSA_WARPS": self.warps,
            "ELSA_CHUNK": self.chunk,
            "ELSA_MIN_BLOCKS": self.blocks_per_sm,
        }


FORM = Form(warps=8, chunk=1024, blocks_per_sm=2)


class Params(ctypes.Structure):
    """`struct Params` of paged_decode.cu, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_longlong) for name in STRIDES]
        + [(name, ctypes.c_int) for name in INTEGERS]
        + [("scale", ctypes.c_float)]
    )


@dataclass(frozen=True, slots=True)
class Slots:
    """States in memory: of chunks, and from there on of nodes; `whole_nodes` as in the kernel."""

    chunks: int
    nodes: int
    whole_nodes: bool

    def counters(self, problem: PagedProblem) -> int:
        return (0 if self.whole_nodes else self.chunks) + problem.B * problem.Hkv

    @classmethod
    def of(cls, problem: PagedProblem, form: Form, blocks: int) -> Slots:
        chunks = max(1, -(-problem.max_seqlen_k // form.chunk))
        nodes = -(-chunks // FAN)
        pairs = problem.B * problem.Hkv
        if pairs * chunks * STATE_BYTES > MAX_CHUNK_BYTES:
            return cls(blocks * FAN, pairs * nodes if nodes > 1 else 0, True)
        # a sequence's nodes are numbered from ⌊its first chunk / FAN⌋ + its number
        return cls(pairs * chunks, (problem.B * chunks // FAN + problem.B) * problem.Hkv if nodes > 1 else 0, False)


def source() -> str:
    return files("elsa_kernels.cuda").joinpath("paged_decode.cu").read_text()


def refusal(problem: PagedProblem, operands: PagedOperands) -> str | None:
    """Why this form does not take the call, or None. It does not depend on the sequences or on their number."""
    if problem.device.type != "cuda" or torch.version.hip:
        return "it runs on CUDA devices"
    if problem.kv_dtype not in (torch.float16, torch.bfloat16):
        return f"it reads FP16 and BF16 caches, not {problem.kv_dtype}"
    if problem.D != HEAD_DIM or problem.page % TILE or problem.group > ROWS:
        return f"D {problem.D}, page {problem.page}, group {problem.group}: it takes 128, multiples of 16, up to 8"
    if problem.window is not None or problem.softcap is not None or problem.has_alibi:
        return "it has no window, softcap or ALiBi"
    o = operands
    wide = [o.k_cache, o.v_cache, o.q, o.out]
    if any(x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]) for x in wide):
        return "q, out and the caches must be aligned to 16 bytes"
    return _refuse_device(o.q.get_device())


@functools.cache
def _refuse_device(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        return f"needs compute capability 8.0, the device has {major}.{minor}"
    reason = nvrtc.unavailable()
    if reason is None and 10 * major + minor not in nvrtc.architectures():
        return f"NVRTC {nvrtc.version()} does not compile for compute capability {major}.{minor}"
    return reason


@functools.cache
def kernel(device: int, form: Form, dtype: torch.dtype, group: int, page: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.cached_cubin(source(), 10 * major + minor, form.defines(dtype, group, page))
    return driver.Module(cubin).function("paged_decode", 4 * MAX_SEQUENCES)


def parameters(
    problem: PagedProblem,
    o: PagedOperands,
    slots: Slots,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    counters: torch.Tensor,
) -> Params:
    """states: m, l, W of `slots`; counters: zeros int32 [slots.counters(problem)]."""
    sinks = None if o.sinks is None else o.sinks.float().contiguous()
    tensors = (
        o.q, o.k_cache, o.v_cache, o.out, o.lse, sinks, o.cu_seqlens_q, o.seqused_k, o.block_table, *states, counters,
    )  # fmt: skip
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    # the sequences' come after the chunks'
    pointers.append(counters.data_ptr() + 4 * (slots.counters(problem) - problem.B * problem.Hkv))
    strides = (
        *o.q.stride()[:2], *o.k_cache.stride()[:3], *o.v_cache.stride()[:3], o.block_table.stride(0),
        *o.out.stride()[:2],
    )  # fmt: skip
    integers = (
        problem.B, problem.T, problem.Hkv, o.block_table.shape[1], problem.causal, slots.whole_nodes,
        slots.chunks,
    )  # fmt: skip
    return Params(*pointers, *strides, *map(int, integers), problem.scale * math.log2(math.e))


def blocks_of(operands: PagedOperands) -> int:
    return FORM.blocks_per_sm * multiprocessors(operands.q.get_device())


def counters_needed(problem: PagedProblem, operands: PagedOperands) -> int:
    return Slots.of(problem, FORM, blocks_of(operands)).counters(problem)


def run(problem: PagedProblem, operands: PagedOperands, counters: torch.Tensor) -> None:
    """Sequences of up to ROWS packed rows. counters: zeros int32 [`counters_needed`], left as zeros."""
    if problem.B > MAX_SEQUENCES:
        raise ValueError(f"{problem.B} sequences in a call; split it, {MAX_SEQUENCES} are possible")
    blocks = blocks_of(operands)
    slots = Slots.of(problem, FORM, blocks)
    shape = (slots.chunks + slots.nodes, ROWS)
    m, l = (torch.empty(shape, dtype=torch.float32, device=problem.device) for _ in range(2))
    W = torch.empty((*shape, HEAD_DIM), dtype=torch.float32, device=problem.device)
    params = parameters(problem, operands, slots, (m, l, W), counters)
    function = kernel(operands.q.get_device(), FORM, problem.dtype, problem.group, problem.page)
    driver.launch(function, blocks, 32 * FORM.warps, 4 * problem.B, params)
