"""Paged decode: TB/s of keys and values read, by our kernels and by vLLM's (FlashAttention-3, Triton) where it is.

Timed as replays of a CUDA graph over caches in rotation, none of which is still in the L2 cache when its turn comes;
pages lie in random order. Correctness first.

python -m kernels.bench.decode --output kernels/bench/results/decode-h200.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from elsa_kernels import attention_paged
from elsa_kernels.paged import decode_counters
from elsa_kernels.reference import attention_reference
from elsa_kernels.registry import UnsupportedProblem

from kernels.bench import measure, peers, results_file
from kernels.bench.run import GATE, ROUNDS

MAKERS: dict[str, Callable[[DecodeCase], Callable[[Inputs], torch.Tensor]]] = {}


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """B sequences of Nk keys each and Nq new queries; `kv` is the cache's dtype where it is not the queries'."""

    dtype: str
    B: int
    H: int
    Hkv: int
    Nk: int
    D: int = 128
    page: int = 16
    Nq: int = 1
    kv: str = ""

    def kv_bytes(self) -> int:
        size = getattr(torch, self.kv or self.dtype).itemsize
        return 2 * size * self.B * self.Hkv * self.Nk * self.D


@dataclass(slots=True)
class Inputs:
    """One set of tensors. `room` keeps what a caller allocates once: counters, workspaces."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    out: torch.Tensor
    room: dict[str, Any] = field(default_factory=dict)


CASES = [
    DecodeCase("float16", 1, 40, 40, 32768),
    DecodeCase("float16", 1, 32, 8, 32768),
    DecodeCase("float16", 8, 40, 40, 32768),
    DecodeCase("float16", 8, 32, 8, 32768),
    DecodeCase("float16", 1, 32, 8, 131072),
    DecodeCase("float32", 1, 40, 40, 32768),
    DecodeCase("float32", 1, 32, 8, 32768),
    DecodeCase("float32", 8, 32, 8, 32768),
    DecodeCase("bfloat16", 1, 40, 40, 32768),
    DecodeCase("bfloat16", 1, 32, 8, 32768),
    DecodeCase("float16", 64, 32, 8, 2048),
    DecodeCase("float16", 1, 32, 8, 4096),
    DecodeCase("float16", 1, 32, 8, 32768, Nq=4),
    DecodeCase("float16", 1, 32, 8, 32768, kv="float8_e4m3fn"),
    DecodeCase("float16", 8, 32, 8, 32768, kv="float8_e4m3fn"),
]


def draw(case: DecodeCase, seed: int, device: str = "cuda") -> Inputs:
    """Normal inputs in pages of random order."""
    g = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    pages = -(-case.Nk // case.page)
    shape = (2, case.B * pages, case.page, case.Hkv, case.D)
    cache = torch.empty(shape, dtype=getattr(torch, case.kv or case.dtype), device=device)
    for half in cache:
        for part in half.split(4096):
            part.copy_(torch.randn(part.shape, generator=g, device=device))
    q = torch.randn(case.B * case.Nq, case.H, case.D, generator=g, device=device).to(dtype)
    return Inputs(
        q=q,
        k_cache=cache[0],
        v_cache=cache[1],
        cu_seqlens_q=torch.arange(0, (case.B + 1) * case.Nq, case.Nq, dtype=torch.int32, device=device),
        seqused_k=torch.full((case.B,), case.Nk, dtype=torch.int32, device=device),
        block_table=torch.randperm(case.B * pages, generator=g, device=device).int().view(case.B, pages),
        out=torch.empty_like(q),
    )


def relative_error(case: DecodeCase, x: Inputs, out: torch.Tensor, heads: int = 4) -> float:
    """‖out − truth‖ / ‖truth‖ against float64, over up to `heads` heads of the last sequence."""
    off, norm = 0.0, 0.0
    blocks = x.block_table[-1].long()
    rows = slice(int(x.cu_seqlens_q[-2]), int(x.cu_seqlens_q[-1]))
    for h in torch.linspace(0, case.H - 1, min(heads, case.H)).long().unique().tolist():
        kv = h // (case.H // case.Hkv)
        keys, values = (c[blocks, :, kv].double().flatten(0, 1)[: case.Nk] for c in (x.k_cache, x.v_cache))
        truth = attention_reference(x.q[rows, h][None, None], keys[None, None], values[None, None], causal=True)
        assert isinstance(truth, torch.Tensor)
        off += (out[rows, h].double() - truth[0, 0]).square().sum().item()
        norm += truth.square().sum().item()
    return float((off / norm) ** 0.5)


def ours(case: DecodeCase) -> Callable[[Inputs], torch.Tensor]:
    def call(x: Inputs) -> torch.Tensor:
        if "counters" not in x.room:
            x.room["counters"] = decode_counters(case.B, case.Hkv, case.Nk, x.q.device)
        return attention_paged(
            x.q, x.k_cache, x.v_cache, x.cu_seqlens_q, x.seqused_k, x.block_table, max_seqlen_q=case.Nq,
            max_seqlen_k=case.Nk, out=x.out, counters=x.room["counters"], impl="triton",
        )  # fmt: skip

    return call


def flash_attention_3(case: DecodeCase) -> Callable[[Inputs], torch.Tensor]:
    if case.dtype == "float32" or case.kv:
        raise UnsupportedProblem("takes no FP32, and FP8 only with FP8 queries")
    flash = peers.flash_attention_3()
    return lambda x: flash(
        x.q, x.k_cache, x.v_cache, out=x.out, cu_seqlens_q=x.cu_seqlens_q, max_seqlen_q=case.Nq,
        seqused_k=x.seqused_k, max_seqlen_k=case.Nk, block_table=x.block_table, causal=True, fa_version=3,
    )  # fmt: skip


def vllm_triton(case: DecodeCase) -> Callable[[Inputs], torch.Tensor]:
    """vLLM's TRITON_ATTN, with the workspace that its backend gives it for few sequences (16 segments of the keys)."""
    if case.kv:
        raise UnsupportedProblem("measured without FP8")
    try:
        unified = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    except ImportError as missing:
        raise UnsupportedProblem("vLLM is not installed") from missing
    segments, threshold = 16, 128 // case.Hkv

    def call(x: Inputs) -> torch.Tensor:
        if "segments" not in x.room:
            shape = (threshold, case.H, segments)
            x.room["segments"] = [torch.empty(s, device=x.q.device) for s in ((*shape, case.D), shape, shape)]
        W, m, S = x.room["segments"]
        unified(
            q=x.q, k=x.k_cache, v=x.v_cache, out=x.out, cu_seqlens_q=x.cu_seqlens_q, max_seqlen_q=case.Nq,
            seqused_k=x.seqused_k, max_seqlen_k=case.Nk, softmax_scale=case.D**-0.5, causal=True,
            window_size=(-1, -1), block_table=x.block_table, softcap=0.0, q_descale=None, k_descale=None,
            v_descale=None, seq_threshold_3D=threshold, num_par_softmax_segments=segments, softmax_segm_output=W,
            softmax_segm_max=m, softmax_segm_expsum=S,
        )  # fmt: skip
        return x.out

    return call


MAKERS |= {"elsa.paged": ours, "fa3": flash_attention_3, "vllm.triton": vllm_triton}


def prepare(name: str, case: DecodeCase, sets: list[Inputs], budget_ms: float) -> tuple[measure.Timed, float]:
    """Check one implementation on one case and capture it. Raises UnsupportedProblem, ValueError or RuntimeError."""
    call = MAKERS[name](case)
    for x in sets:
        x.out.fill_(float("nan"))
    error = relative_error(case, sets[0], call(sets[0]))
    # vLLM's Triton kernel multiplies FP32 as TF32: it is shown with its error, and ours are held to theirs.
    if name.startswith("elsa") and not error <= GATE[case.dtype]:
        raise ValueError(f"relative error {error:.1e} is beyond {GATE[case.dtype]:.0e}")
    return measure.Timed([functools.partial(call, x) for x in sets], graph=True, budget_ms=budget_ms), error


def run_case(case: DecodeCase, only: list[str] | None = None, budget_ms: float = 60.0) -> list[results_file.Row]:
    """Rows of all implementations that take the case, their rounds interleaved."""
    sets = [draw(case, seed) for seed in range(measure.sets_to_rotate(case.kv_bytes()))]
    prepared = {}
    for name in only or MAKERS:
        try:
            prepared[name] = prepare(name, case, sets, budget_ms)
        except (UnsupportedProblem, RuntimeError, ValueError, TypeError) as refusal:
            print(f"  {name}: {str(refusal).splitlines()[0]}", file=sys.stderr)
    for _ in range(ROUNDS):
        for timed, _error in prepared.values():
            timed.round()
    return [row(case, name, timed, error) for name, (timed, error) in prepared.items()]


def row(case: DecodeCase, name: str, timed: measure.Timed, error: float) -> results_file.Row:
    ms = timed.median_ms()
    return {
        "op": "decode", "impl": name, "ours": name.startswith("elsa"), **asdict(case), "kv": case.kv or case.dtype,
        "precision": "tf32" if name == "vllm.triton" and case.dtype == "float32" else "fp32",
        "ms": round(ms, 5), "tbps": round(case.kv_bytes() / ms / 1e9, 3), "relerr": float(f"{error:.3g}"),
        "family": "normal", "graph": True,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impls", nargs="+", choices=list(MAKERS), help="default: all that apply")
    parser.add_argument("--budget-ms", type=float, default=60.0, help="of a round of one implementation on one case")
    parser.add_argument("--output", help="results file to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    rows: list[results_file.Row] = []
    for case in CASES:
        print(case, flush=True)
        for found in run_case(case, options.impls, options.budget_ms):
            rows.append(found)
            print(f"  {found['impl']:12} {found['tbps']:6.2f} TB/s {found['ms']:8.4f} ms  relerr {found['relerr']:.1e}")
        gc.collect()
        torch.cuda.empty_cache()
        if options.output:
            results_file.write(options.output, rows)


if __name__ == "__main__":
    main()
