"""From a paged problem to launches. Nothing here reads a tensor: grids follow from shapes and bounds.

Each class of sequences has a kernel of its own, chosen by the packed rows (queries × heads of a group) of the sequence
alone: up to 8 rows (`cuda_decode`, where it runs) or single ones, up to 16 rows, up to 64 rows, more. A batch gets the
launches that its bounds allow, and each passes over the sequences of the other classes: so the bits of a sequence do
not depend on its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from elsa_kernels.devices import architecture
from elsa_kernels.paged import cuda_decode, gather, tuning
from elsa_kernels.paged.cache_kernel import cache_kernel
from elsa_kernels.paged.decode_kernel import decode_kernel
from elsa_kernels.paged.prefill_kernel import prefill_kernel
from elsa_kernels.paged.problem import FP8, PagedOperands, PagedProblem

DECODE_ROWS = (16, 64)  # packed rows of the two tensor-core decode classes
# With at least this many queries a sequence is worth gathering for the dense kernels, where lengths are known.
DENSE_QUERIES = 128
MAX_CHUNK_BYTES = 256 << 20  # of chunks' states; where more would be needed, units of work are whole nodes
NODE_PROGRAMS = 1024  # at most, then: several an SM


@dataclass(frozen=True, slots=True)
class Launch:
    """One decode launch: sequences of more than `above` and at most `rows_max` packed rows."""

    form: str
    above: int
    rows_max: int
    tile: tuning.DecodeTile


def run(problem: PagedProblem, operands: PagedOperands) -> None:
    if problem.device.type != "cuda":  # the interpreter
        _run(problem, operands, "interpreter")
        return
    with torch.cuda.device(problem.device):
        _run(problem, operands, architecture(operands.q.get_device()))


def _run(problem: PagedProblem, operands: PagedOperands, arch: str) -> None:
    longest, known = problem.max_seqlen_q, None
    if problem.lengths is not None:
        dense = _run_dense(problem, operands)
        known = {n * problem.group for s, (n, _) in enumerate(problem.lengths) if n and s not in dense}
        longest = max(known, default=0) // problem.group
    if longest == 0:
        return
    arguments = _shared_arguments(problem, operands, arch)
    mode = tuning.choose_mode(problem.dtype, problem.precision, arch)

    def wanted(above: int, most: int) -> bool:
        """Whether a sequence may have so many packed rows: any up to the longest, where lengths are not known."""
        return longest * problem.group > above if known is None else any(above < rows <= most for rows in known)

    above = 0
    if cuda_decode.refusal(problem) is None and not cuda_decode.misaligned(operands):
        above = cuda_decode.form_of(problem).rows
        if wanted(0, above):
            cuda_decode.run(problem, operands, functools.partial(_counters, problem, operands))
    for cut in decode_launches(problem, mode, arch, above):
        if wanted(cut.above, cut.rows_max):
            _launch_decode(problem, operands, cut, mode, arguments)
    if longest * problem.group > DECODE_ROWS[-1]:
        _launch_prefill(problem, mode, arch, arguments, longest)


def _run_dense(problem: PagedProblem, operands: PagedOperands) -> frozenset[int]:
    """Run the long sequences on the dense kernels and say which they were."""
    done, start = [], 0
    for s, (queries, keys) in enumerate(problem.lengths or ()):
        rows = slice(start, min(start + queries, problem.T))
        if queries >= DENSE_QUERIES and rows.stop > rows.start:
            gather.attend_sequence(problem, operands, s, rows, keys, keys - queries, None)
            done.append(s)
        start += queries
    return frozenset(done)


def decode_launches(problem: PagedProblem, mode: str, arch: str, above: int = 0) -> list[Launch]:
    """The classes of few rows, more than `above`, of which a sequence belongs to one at most."""
    launches = []
    if problem.group == 1 and above == 0:
        launches.append(Launch("lanes", 0, 1, tuning.decode_tile("lanes", mode, 1, problem, arch)))
        above = 1
    for rows in DECODE_ROWS:
        if rows > above:
            launches.append(Launch("dot", above, rows, tuning.decode_tile("dot", mode, rows, problem, arch)))
            above = rows
    return launches


def decode_memory(problem: PagedProblem, arch: str) -> tuple[Callable[[int], int], int]:
    """What decode of such a batch takes: splits of a one-query sequence by its keys, bytes for states at the most."""
    above = 0
    found: list[tuple[Callable[[int], int], int]] = []
    if cuda_decode.refusal(problem) is None:
        form, _, slots = cuda_decode.plan(problem)
        above = form.rows
        found.append((form.chunks_of, slots.bytes(form)))
    for cut in decode_launches(problem, tuning.choose_mode(problem.dtype, problem.precision, arch), arch, above):
        if cut.above < problem.max_seqlen_q * problem.group:
            held = slots_of(problem, cut).held * state_bytes(problem, cut)
            found.append((functools.partial(_splits, cut.tile.CHUNK), held))
    return found[0][0], max(size for _, size in found)


def _splits(chunk: int, keys: int) -> int:
    return -(-keys // chunk)


@dataclass(frozen=True, slots=True)
class Slots:
    """Partial states that a launch has room for, programs, counters, and whether units of work are whole nodes."""

    held: int
    programs: int
    counters: int
    nodes: bool


def state_bytes(problem: PagedProblem, cut: Launch) -> int:
    return 4 * cut.rows_max * (width_of(problem) + 2)


def width_of(problem: PagedProblem) -> int:
    """Channels of a tile."""
    return max(16, triton.next_power_of_2(problem.D))


def slots_of(problem: PagedProblem, cut: Launch) -> Slots:
    """One a chunk and key head; where that were too many, FAN a program and one a node of FAN chunks and key head."""
    pairs, chunks = problem.B * problem.Hkv, max(1, -(-problem.max_seqlen_k // cut.tile.CHUNK))
    if pairs * chunks * state_bytes(problem, cut) <= MAX_CHUNK_BYTES:
        return Slots(pairs * chunks, min(pairs * chunks, cut.tile.programs), pairs * chunks + pairs, False)
    # keys that begin within a node, as a window may have it, reach into one more
    nodes = pairs * (-(-chunks // cut.tile.FAN) + 1)
    programs = min(nodes, cut.tile.programs, NODE_PROGRAMS)
    return Slots(programs * cut.tile.FAN + nodes, programs, pairs, True)


def counters_needed(B: int, Hkv: int, max_seqlen_k: int) -> int:
    """Counters that any decode launch of such a call may use."""
    return B * Hkv * (max(1, -(-max_seqlen_k // tuning.SMALLEST_CHUNK)) + 1)


def _shared_arguments(problem: PagedProblem, operands: PagedOperands, arch: str) -> dict[str, object]:
    """What all kernels take alike."""
    o = operands
    fp8 = "none"
    k_cache, v_cache = o.k_cache, o.v_cache
    if problem.kv_dtype == FP8:
        fp8 = "native" if tuning.converts_fp8(arch) else "bits"
        if fp8 == "bits":
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_scale, v_scale = o.k_scale, o.v_scale
    if (k_scale is None) != (v_scale is None):
        one = torch.ones_like(k_scale if k_scale is not None else v_scale)  # type: ignore[arg-type]
        k_scale, v_scale = (one if x is None else x for x in (k_scale, v_scale))
    if k_scale is not None and v_scale is not None and k_scale.numel() != v_scale.numel():
        k_scale, v_scale = (x.expand(problem.Hkv).contiguous() for x in (k_scale, v_scale))
    return {
        "Q": o.q, "K": k_cache, "V": v_cache, "CU": o.cu_seqlens_q, "USED": o.seqused_k, "TABLE": o.block_table,
        "OUT": o.out, "LSE": o.lse, "SLOPES": o.alibi_slopes, "SINKS": o.sinks, "K_SCALE": k_scale,
        "V_SCALE": v_scale,
        **dict(zip(("sqt", "sqh"), o.q.stride())), **dict(zip(("skb", "skp", "skh"), k_cache.stride())),
        **dict(zip(("svb", "svp", "svh"), v_cache.stride())), "stb": o.block_table.stride(0),
        **dict(zip(("sot", "soh"), o.out.stride())),
        "B": problem.B, "T": problem.T, "Hkv": problem.Hkv, "window": problem.window or 0, "scale": problem.scale,
        "softcap": problem.softcap or 0.0, "GROUP": problem.group, "D": problem.D,
        "BD": width_of(problem),
        "BB": 1 if problem.B == 1 else max(16, triton.next_power_of_2(problem.B)),
        "PAGE": problem.page, "FP8": fp8, "ALIKE": k_cache.stride() == v_cache.stride(),
        "HEAD_SCALES": k_scale is not None and k_scale.numel() > 1,
        "SCALED": k_scale is not None, "CAUSAL": problem.causal, "WINDOW": problem.window is not None,
        "SOFTCAP": problem.softcap is not None, "ALIBI": problem.has_alibi, "HAS_SINKS": problem.has_sinks,
        "HAS_LSE": o.lse is not None,
    }  # fmt: skip


def _counters(problem: PagedProblem, operands: PagedOperands, needed: int) -> torch.Tensor:
    """The call's counters, or fresh ones."""
    counters, device = operands.counters, problem.device
    if counters is None:
        return torch.zeros(needed, dtype=torch.int32, device=device)
    if counters.numel() < needed or counters.dtype != torch.int32 or counters.device != device:
        raise ValueError(
            f"counters is {counters.dtype} with {counters.numel()} elements on {counters.device}; this call needs "
            f"{needed} int32 on {device}: see decode_counters"
        )
    return counters


def _launch_decode(
    problem: PagedProblem, operands: PagedOperands, cut: Launch, mode: str, arguments: dict[str, object]
) -> None:
    tile, slots, device = cut.tile, slots_of(problem, cut), problem.device
    m, l = (torch.empty((slots.held, cut.rows_max), dtype=torch.float32, device=device) for _ in range(2))
    W = torch.empty((slots.held, cut.rows_max, width_of(problem)), dtype=torch.float32, device=device)
    counters = _counters(problem, operands, slots.counters)
    decode_kernel[(slots.programs,)](
        **arguments, PM=m, PL=l, PW=W, COUNT=counters, top0=slots.counters - problem.B * problem.Hkv,
        ROWS=cut.rows_max, BN=tile.BN, CHUNK=tile.CHUNK, NODES=slots.nodes,
        FAN=tile.FAN, RB=min(tile.merge_rows, cut.rows_max), STAGES=tile.num_stages, FORM=cut.form, MODE=mode,
        MIN_ROWS=cut.above, MAX_ROWS=cut.rows_max, num_warps=tile.num_warps, **tile.limits(),
    )  # fmt: skip


def _launch_prefill(problem: PagedProblem, mode: str, arch: str, arguments: dict[str, object], longest: int) -> None:
    tile = tuning.prefill_tile(mode, problem.D, arch)
    blocks = min(
        triton.cdiv(problem.T * problem.group, tile.BM) + problem.B,
        problem.B * triton.cdiv(longest * problem.group, tile.BM),
    )
    prefill_kernel[(blocks, problem.Hkv)](
        **arguments, BM=tile.BM, BN=tile.BN, STAGES=tile.num_stages, MODE=mode, MIN_ROWS=DECODE_ROWS[-1],
        num_warps=tile.num_warps,
    )  # fmt: skip


def write_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """k, v [T, Hkv, D] to their slots: see `elsa_kernels.reshape_and_cache`."""
    fp8 = k_cache.dtype == FP8
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    BD = triton.next_power_of_2(k.shape[2])
    cache_kernel[(slot_mapping.shape[0],)](
        k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, *k.stride()[:2], *v.stride()[:2],
        *k_cache.stride()[:3], *v_cache.stride()[:3], Hkv=k.shape[1], D=k.shape[2], BD=BD, BH=max(1, 1024 // BD),
        PAGE=k_cache.shape[1], FP8=fp8, K_HEADS=k_scale is not None and k_scale.numel() > 1,
        V_HEADS=v_scale is not None and v_scale.numel() > 1, K_SCALED=k_scale is not None,
        V_SCALED=v_scale is not None, num_warps=4,
    )  # fmt: skip
