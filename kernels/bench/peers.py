"""Who is measured: our implementations and the peers, as callables over one case's tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import elsa_kernels
import torch
from elsa_kernels.registry import UnsupportedProblem
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench.cases import Case

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OURS = ("gluon", "triton", "cuda_ieee")
SDPA = {
    "sdpa.mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa.math": SDPBackend.MATH,
    "sdpa.flash": SDPBackend.FLASH_ATTENTION,
    "sdpa.cudnn": SDPBackend.CUDNN_ATTENTION,
}
MATH_LIMIT = 8 << 30  # bytes of logits that the math form may materialise


def is_ours(name: str) -> bool:
    return name.startswith("elsa.")


def names(case: Case) -> list[str]:
    """Everything that can be asked for this dtype."""
    ours = [f"elsa.{name}" for name in OURS]
    if case.dtype == "float32":
        return [*ours, "sdpa.mem_efficient", "sdpa.math", "authors"]
    return [*ours, "sdpa.flash", "sdpa.cudnn", "fa3"]


def context(name: str) -> AbstractContextManager[object]:
    """What must surround calls of that name."""
    return sdpa_kernel(SDPA[name]) if name in SDPA else nullcontext()


def make(name: str, case: Case) -> Call:
    """The call of that name for the case. Raises UnsupportedProblem where it does not apply."""
    if is_ours(name):
        return _ours(name.removeprefix("elsa."), case)
    if name == "fa3":
        return _fa3(case)
    if name == "authors":
        return _authors(case)
    if name == "sdpa.math" and 4 * case.B * case.H * case.Nq * case.Nk > MATH_LIMIT:
        raise UnsupportedProblem("its matrix of logits is too large")
    return _sdpa(case)


def _ours(impl: str, case: Case) -> Call:
    precision = "ieee" if impl == "cuda_ieee" else case.precision
    if case.dtype != "float32":
        if impl == "cuda_ieee":
            raise UnsupportedProblem("measured in float32 alone")
        precision = "fp32"
    return lambda q, k, v: elsa_kernels.attention(q, k, v, causal=case.causal, precision=precision, impl=impl)


def _sdpa(case: Case) -> Call:
    gqa = case.Hkv != case.H
    if case.causal and case.Nq != case.Nk:
        mask = causal_lower_right(case.Nq, case.Nk)
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)


def flash_attention_3() -> Callable[..., torch.Tensor]:
    """FlashAttention-3's function for packed or paged sequences, as vLLM ships it.

    Raises UnsupportedProblem with the reason where there is none.
    """
    try:
        vllm = importlib.import_module("vllm.vllm_flash_attn")
    except Exception as failure:  # vLLM's import runs much code, and ends in more ways than by being absent
        raise UnsupportedProblem(f"no FlashAttention-3 (looked for vLLM's): {failure}") from failure
    reason = vllm.fa_version_unsupported_reason(3)
    if reason is not None:
        raise UnsupportedProblem(f"vLLM has no FlashAttention-3 here: {reason}")
    call: Callable[..., torch.Tensor] = vllm.flash_attn_varlen_func
    return call


def _fa3(case: Case) -> Call:
    flash_attn_varlen_func = flash_attention_3()
    starts_q = torch.arange(0, (case.B + 1) * case.Nq, case.Nq, dtype=torch.int32, device="cuda")
    starts_k = torch.arange(0, (case.B + 1) * case.Nk, case.Nk, dtype=torch.int32, device="cuda")

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Its layout is [tokens, heads, D]; `measure` hands it tensors that lie so in memory.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(
            q, k, v, max_seqlen_q=case.Nq, cu_seqlens_q=starts_q, max_seqlen_k=case.Nk, cu_seqlens_k=starts_k,
            causal=case.causal, fa_version=3,
        )  # fmt: skip
        return out.unflatten(0, (case.B, case.Nq)).transpose(1, 2)

    return call


def _authors(case: Case) -> Call:
    """The package of ELSA's authors (github.com/ming053l/ELSA), whose FP32 is Triton's tf32x3."""
    try:
        from elsa_twopass_clean import twopass_attention
    except ImportError as missing:
        raise UnsupportedProblem("the authors' package is not importable (put its src on PYTHONPATH)") from missing
    if case.Nq != case.Nk or case.Hkv != case.H:
        raise UnsupportedProblem("the authors' package takes q, k and v of one shape")
    return lambda q, k, v: twopass_attention(q, k, v, is_causal=case.causal)


def layout(name: str, x: torch.Tensor) -> torch.Tensor:
    """x [B, heads, N, D] as the implementation likes it in memory: FlashAttention-3 wants tokens before heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if name == "fa3" else x
