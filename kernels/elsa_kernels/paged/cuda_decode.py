"""Launcher of `cuda/paged_decode.cu`: up to 8 packed rows a sequence over a paged KV with D = 128, in CUDA C++."""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch

from elsa_kernels.cuda import driver, nvrtc
from elsa_kernels.devices import multiprocessors
from elsa_kernels.paged.problem import FP8, PagedOperands, PagedProblem

OLDEST, OLDEST_FP8 = 80, 89  # mma.m16n8k16 and movmatrix; conversion from FP8
HEAD_DIM, FAN, PLACES = 128, 32, 16  # the last: keys that must lie on one page
MAX_CHUNK_BYTES = 256 << 20  # of chunks' states; where more would be needed, blocks take whole nodes
MAX_SEQUENCES = 8192  # whose counts fit in a block's shared memory
POINTERS = (
    "q", "k", "v", "out", "lse", "sinks", "k_scale", "v_scale", "cu", "used", "table", "state_m", "state_l", "state_w",
    "node_counters", "counters",
)  # fmt: skip
STRIDES = (
    "q_token", "q_head", "k_block", "k_place", "k_head", "v_block", "v_place", "v_head", "table_row", "out_token",
    "out_head",
)  # fmt: skip
INTEGERS = ("B", "T", "Hkv", "table_width", "causal", "whole_nodes", "nodes0", "k_scales", "v_scales")


@dataclass(frozen=True, slots=True)
class Form:
    """`warps` share chunks of keys (`chunk_of`), `blocks_per_sm` such blocks an SM; up to `rows` packed rows.

    A warp multiplies `step` tiles at a time. `longest`: keys of the chunks of long sequences, where they are more than
    `chunk`. `conductor`: one more warp does for the others what lies between chunks; it leaves a thread 168 registers
    where they were 255. All but the blocks and the conductor are part of a result's definition.
    """

    warps: int
    chunk: int
    blocks_per_sm: int
    rows: int = 8
    step: int = 1
    longest: int = 0
    conductor: bool = True

    def defines(self, problem: PagedProblem) -> dict[str, int]:
        return {
            "ELSA_FP32": int(problem.dtype == torch.float32),
            "ELSA_FP8": int(problem.kv_dtype == FP8),
            "ELSA_BF16": int(problem.dtype == torch.bfloat16),
            "ELSA_ROWS": self.rows,
            "ELSA_GROUP": problem.group,
            "ELSA_PAGE": problem.page,
            "ELSA_WARPS": self.warps,
            "ELSA_CONDUCTOR": int(self.conductor),
            "ELSA_CHUNK": self.chunk,
            "ELSA_MIN_BLOCKS": self.blocks_per_sm,
            "ELSA_STEP": self.step,
            "ELSA_LONGEST": max(self.longest, self.chunk),
            "ELSA_SHARED": self.shared_bytes(),
        }

    def chunk_of(self, keys: int) -> int:
        """Keys of the chunks of a sequence of so many: `chunk_of` of the kernel."""
        if self.chunk < keys < 8 * self.chunk:
            return self.chunk // (4 if keys < 4 * self.chunk else 2)
        return max(self.longest, self.chunk) if keys >= 64 * self.chunk else self.chunk

    def chunks_of(self, keys: int) -> int:
        return -(-keys // self.chunk_of(keys))

    def most_chunks(self, keys: int) -> int:
        """Of any sequence of up to so many keys, which is not always the longest's."""
        lengths = (min(keys, most) for most in (keys, *(n * self.chunk - 1 for n in (4, 8, 64))))
        return max(1, *map(self.chunks_of, lengths))

    def threads(self) -> int:
        return 32 * (self.warps + self.conductor)

    def shared_bytes(self) -> int:
        """What the kernel's `Shared` may take."""
        return 16384 + 4352 * self.warps

    def state_bytes(self) -> int:
        return 4 * self.rows * (HEAD_DIM + 2)


@functools.cache
def forms() -> dict[str, Form]:
    """tuning/paged_cuda.json, by `kind_of`: as kernels/bench/tune_cuda_decode.py found them on an H200."""
    text = resources.files("elsa_kernels.tuning").joinpath("paged_cuda.json").read_text()
    return {kind: Form(**fields) for kind, fields in json.loads(text).items()}


def kind_of(problem: PagedProblem) -> str:
    """FP8 caches, 16-bit ones, or FP32 ones with up to 4 or up to 8 rows a key head."""
    if problem.kv_dtype == FP8:
        return "8"
    return "16" if problem.dtype != torch.float32 else "32x4" if problem.group <= 4 else "32x8"


def form_of(problem: PagedProblem) -> Form:
    return forms()[kind_of(problem)]


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

    def bytes(self, form: Form) -> int:
        return (self.chunks + self.nodes) * form.state_bytes()

    def counters(self, problem: PagedProblem) -> int:
        return (0 if self.whole_nodes else self.chunks) + problem.B * problem.Hkv

    @classmethod
    def of(cls, problem: PagedProblem, form: Form, blocks: int) -> Slots:
        chunks = form.most_chunks(problem.max_seqlen_k)
        nodes = -(-chunks // FAN)
        pairs = problem.B * problem.Hkv
        if pairs * chunks * form.state_bytes() > MAX_CHUNK_BYTES:
            return cls(blocks * FAN, pairs * nodes if nodes > 1 else 0, True)
        # a sequence's nodes are numbered from ⌊its first chunk / FAN⌋ + its number
        return cls(pairs * chunks, (problem.B * chunks // FAN + problem.B) * problem.Hkv if nodes > 1 else 0, False)


def plan(problem: PagedProblem) -> tuple[Form, int, Slots]:
    """Form, blocks and slots of a call on the problem's device."""
    index = problem.device.index
    form = form_of(problem)
    blocks = form.blocks_per_sm * multiprocessors(torch.cuda.current_device() if index is None else index)
    return form, blocks, Slots.of(problem, form, blocks)


def source(dtype: torch.dtype) -> str:
    """paged_decode.cu with the tiles of the dtype in the place that it keeps for them."""
    tiles = "paged_tiles_fp32.cu" if dtype == torch.float32 else "paged_tiles_half.cu"
    text, inner = (
        resources.files("elsa_kernels.cuda").joinpath(name).read_text() for name in ("paged_decode.cu", tiles)
    )
    import os  # temporary: which variant

    on = os.environ.get("ELSA_TRY", "").split()
    if on in (["shipped"], ["a"], ["b"]):
        text = resources.files("kernels.bench").joinpath(f"_try/{on[0]}.cu").read_text()
        stamp = "".join(f"#define {n}\n" for n in ["X_STAMP " + os.environ.get("ELSA_STAMP", "0")])
        return stamp + text.replace("#include TILES", inner)
    names = ("X_TAIL", "X_FAR", "X_REHEARSE", "X_STAMP")
    given = dict(x.split("=") for x in on) | {"X_STAMP": os.environ.get("ELSA_STAMP", "0")}
    return "".join(f"#define {n} {given.get(n, 0)}\n" for n in names) + text.replace("#include TILES", inner)


def refusal(problem: PagedProblem) -> str | None:
    """Why this form does not take such calls, or None. It does not depend on the sequences or on their number."""
    if problem.device.type != "cuda" or torch.version.hip:
        return "it runs on CUDA devices"
    if problem.kv_dtype != problem.dtype and (problem.kv_dtype != FP8 or problem.dtype == torch.float32):
        return f"it reads no {problem.kv_dtype} caches for {problem.dtype} queries"
    if problem.dtype == torch.float32 and problem.precision == "tf32":
        return "in FP32 it multiplies without tensor cores"
    if kind_of(problem) not in forms():
        return "Triton's kernel is the faster one"
    if problem.D != HEAD_DIM or problem.page % PLACES or problem.group > form_of(problem).rows:
        return f"D {problem.D}, page {problem.page}, group {problem.group}: it takes 128, multiples of 16, up to 8"
    if problem.window is not None or problem.softcap is not None or problem.has_alibi:
        return "it has no window, softcap or ALiBi"
    index = problem.device.index
    oldest = OLDEST_FP8 if problem.kv_dtype == FP8 else OLDEST
    return _refuse_device(torch.cuda.current_device() if index is None else index, oldest)


def misaligned(o: PagedOperands) -> bool:
    """Whether the kernel's loads and stores of 16 bytes cannot be made in these tensors."""
    tensors = (o.k_cache, o.v_cache, o.q, o.out)
    return any(x.data_ptr() % 16 or any(s * x.itemsize % 16 for s in x.stride()[:-1]) for x in tensors)


@functools.cache
def _refuse_device(device: int, oldest: int) -> str | None:
    return nvrtc.refusal(*torch.cuda.get_device_capability(device), oldest)


def kernel(device: int, problem: PagedProblem) -> tuple[ctypes.c_void_p, bool]:
    """The kernel, and whether it may be launched early."""
    defines = form_of(problem).defines(problem)
    return _kernel(device, problem.dtype, tuple(defines.items()))


@functools.cache
def _kernel(device: int, dtype: torch.dtype, defines: tuple[tuple[str, int], ...]) -> tuple[ctypes.c_void_p, bool]:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.cached_cubin(source(dtype), 10 * major + minor, dict(defines))
    function = driver.Module(cubin).function("paged_decode", dict(defines)["ELSA_SHARED"] + 4 * MAX_SEQUENCES)
    return function, driver.takes_early_launches(major)


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
        o.q, o.k_cache, o.v_cache, o.out, o.lse, sinks, o.k_scale, o.v_scale, o.cu_seqlens_q, o.seqused_k,
        o.block_table, *states, counters,
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
        slots.chunks, *(x is not None and x.numel() > 1 for x in (o.k_scale, o.v_scale)),
    )  # fmt: skip
    return Params(*pointers, *strides, *map(int, integers), problem.scale * math.log2(math.e))


def run(problem: PagedProblem, operands: PagedOperands, counters_of: Callable[[int], torch.Tensor]) -> None:
    """Sequences of up to `form_of(problem).rows` packed rows. counters_of(n): n zeros, int32, left as zeros."""
    if problem.B > MAX_SEQUENCES:
        raise ValueError(f"{problem.B} sequences in a call; split it, {MAX_SEQUENCES} are possible")
    form, blocks, slots = plan(problem)
    shape = (slots.chunks + slots.nodes, form.rows)
    m, l = (torch.empty(shape, dtype=torch.float32, device=problem.device) for _ in range(2))
    W = torch.empty((*shape, HEAD_DIM), dtype=torch.float32, device=problem.device)
    params = parameters(problem, operands, slots, (m, l, W), counters_of(slots.counters(problem)))
    function, early = kernel(operands.q.get_device(), problem)
    driver.launch(function, blocks, form.threads(), form.shared_bytes() + 4 * problem.B, params, early)
