"""Attention problems that every implementation must solve, and the one way their results are judged.

A case makes its inputs from a generator, so an implementation, a device and a dtype are all a test has to name. The
tolerance depends on the dtype alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import elsa_kernels
import torch
from elsa_kernels import State
from elsa_kernels.reference import attention_reference

# ‖out − ref‖ / ‖ref‖ against float64 over the rows that are finite in the reference.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    """Shapes, options, and `prepare(q, k, v)`, which may change the normal inputs in place or replace them."""

    name: str
    B: int = 2
    H: int = 2
    Hkv: int = 2
    Nq: int = 37
    Nk: int = 83
    D: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Case], dict[str, torch.Tensor]] = lambda case: {}
    prepare: Callable[..., Any] = lambda q, k, v: None
    fp32_only: bool = False  # the inputs do not fit 16 bits

    def make(self, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        heads = (self.H, self.Hkv, self.Hkv)
        qkv = [torch.randn(self.B, h, n, self.D) for h, n in zip(heads, (self.Nq, self.Nk, self.Nk))]
        self.prepare(*qkv)
        options = self.options | {name: t.to(device) for name, t in self.tensors(self).items()}
        return [t.to(device, dtype) for t in qkv], options


def _scaled(q_by: float, k_by: float, v_by: float) -> Callable[..., None]:
    def prepare(q, k, v):
        q.mul_(q_by), k.mul_(k_by), v.mul_(v_by)

    return prepare


def _positive(q, k, v):
    for x in (q, k, v):
        x.abs_()


def _outlier_channels(q, k, v):
    k[..., 3] *= 1000
    q[..., 3] /= 500
    v[..., 5] *= 3000
    k[..., 7] *= 1e-6


def _zeros(q, k, v):
    q[:, :, 1], k[:, 0], v[..., 2] = 0, 0, 0


def _nan_key(q, k, v):
    k[0, 0, 60, 3] = NAN


def _infinite_key(q, k, v):
    k[0, 0, 60, 3] = INF


def _nan_query(q, k, v):
    q[0, 0, 5, 0] = NAN


def _bad_values(q, k, v):
    v[0, 0, 70, 1], v[0, 1, 65, 2], v[1, 1, 75, 3], v[1, 0, 50, 0] = NAN, INF, -INF, NAN


def _bad_values_outside(q, k, v):
    for x in (k, v):
        x[0, :, :5], x[0, :, 40:], x[1] = NAN, INF, NAN


def _opposite_infinities(q, k, v):
    v[0, 0, 10, 1], v[0, 0, 20, 1] = INF, -INF


def _ranges(case: Case) -> dict[str, torch.Tensor]:
    return {"kv_range": torch.tensor([[5, 40], [0, 0]], dtype=torch.int32)}


def _bias(B: int, H: int, Nq: int) -> Callable[[Case], dict[str, torch.Tensor]]:
    def make(case: Case) -> dict[str, torch.Tensor]:
        bias = torch.randn(B, H, Nq, case.Nk)
        bias[..., ::3] = -INF
        bias[0, 0, 0] = -INF  # a row that sees nothing
        return {"bias": bias}

    return make


def _slopes(case: Case) -> dict[str, torch.Tensor]:
    return {"alibi_slopes": torch.tensor([2.0 ** -(i + 1) for i in range(case.H)])}


def _sinks(case: Case) -> dict[str, torch.Tensor]:
    return {"sinks": torch.tensor([2.0, -INF, -3.0, 5.0][: case.H])}


CASES = [
    Case("full"),
    Case("causal", options={"causal": True}),
    Case("causal_square", Nq=83, options={"causal": True}),
    Case("more_queries_than_keys", Nq=83, Nk=37, options={"causal": True}),
    Case("one_query", Nq=1, options={"causal": True}),
    Case("one_key", Nq=5, Nk=1),
    Case("q_start", options={"causal": True, "q_start": 10}),
    Case("queries_before_keys", options={"causal": True, "q_start": -7}),
    Case("queries_after_keys", options={"causal": True, "q_start": 500}),
    Case("gqa", H=4, options={"causal": True}),
    Case("gqa_of_three", H=3, Hkv=1, options={"causal": True}),
    Case("window_causal", Nq=83, options={"causal": True, "window": 9}),
    Case("window_both_sides", Nq=83, options={"window": 20}),
    Case("window_one", options={"causal": True, "window": 1}),
    Case("softcap", options={"softcap": 0.7, "causal": True}),
    Case("softcap_saturated", options={"softcap": 12.0, "scale": 10.0}),
    Case("alibi", H=4, tensors=_slopes, options={"causal": True}),
    Case("bias", tensors=_bias(2, 2, 37)),
    Case("bias_broadcast", tensors=_bias(1, 1, 1), options={"causal": True}),
    Case("sinks", H=4, tensors=_sinks, options={"causal": True}),
    Case("sinks_on_empty_rows", H=4, tensors=_sinks, options={"causal": True, "q_start": -20}),
    Case("kv_range", tensors=_ranges),
    Case("kv_range_causal_window", tensors=_ranges, options={"causal": True, "window": 30}),
    Case("everything", H=4, tensors=lambda c: _slopes(c) | _sinks(c) | _ranges(c) | _bias(1, 4, 37)(c),
         options={"causal": True, "window": 40, "softcap": 5.0, "scale": 0.3}),
    Case("scale_negative", options={"scale": -0.5}),
    Case("scale_zero", options={"scale": 0.0}),
    Case("head_dim_80", D=80, options={"causal": True}),
    Case("head_dim_256", B=1, H=1, Hkv=1, Nq=20, Nk=40, D=256),
    Case("head_dim_5", D=5),
    Case("no_keys", Nk=0),
    Case("no_keys_sinks", H=4, Nk=0, tensors=_sinks),
    Case("no_queries", Nq=0),
    Case("decode_chunks", B=1, Nq=2, Nk=1300, H=4, options={"causal": True}),
    Case("decode_chunks_window_sinks", B=1, Nq=1, Nk=1600, H=4, tensors=_sinks,
         options={"causal": True, "window": 700}),
    Case("all_positive", prepare=_positive, Nk=300),
    Case("outlier_channels", prepare=_outlier_channels, fp32_only=True),
    Case("zeros", prepare=_zeros),
    Case("tiny", prepare=_scaled(1e-30, 1e-30, 1e-30), fp32_only=True),
    Case("huge_keys_tiny_queries", prepare=_scaled(1e-30, 1e30, 1e30), fp32_only=True),
    Case("tiny_keys_huge_queries", prepare=_scaled(1e30, 1e-30, 1.0), fp32_only=True),
    Case("subnormal_keys", prepare=_scaled(1e38, 1e-39, 1e-30), fp32_only=True),
    Case("nan_key", prepare=_nan_key, options={"causal": True}),
    Case("infinite_key", prepare=_infinite_key, options={"causal": True}),
    Case("nan_query", prepare=_nan_query),
    Case("non_finite_values", prepare=_bad_values, options={"causal": True}),
    Case("opposite_infinities", prepare=_opposite_infinities),
    Case("garbage_outside_kv_range", prepare=_bad_values_outside, tensors=_ranges),
    Case("garbage_outside_kv_range_many_rows", Nq=83, prepare=_bad_values_outside, tensors=_ranges),
]  # fmt: skip


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or a large integer), so that nothing passes by reading what it did not write."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else 77)

    with mock.patch("torch.empty", poisoned):
        yield


def check(case: Case, impl: str | None, device: str, dtype: torch.dtype, **precision: Any) -> None:
    """Output and state of one case against the float64 reference."""
    (q, k, v), options = case.make(device, dtype)
    truth = attention_reference(q, k, v, return_state=True, **options)
    with poisoned_memory():
        out = elsa_kernels.attention(q, k, v, impl=impl, **options, **precision)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert out.is_contiguous()
    judge(out, truth.finalize(), dtype)
    with poisoned_memory():
        state = elsa_kernels.attention(q, k, v, impl=impl, return_state=True, **options, **precision)
    assert isinstance(state, State)
    assert state.m.dtype == state.S.dtype == state.W.dtype == (dtype if dtype == torch.float64 else torch.float32)
    judge(state.finalize(), truth.finalize(), dtype)
    judge_logsumexp(state.logsumexp(), truth.logsumexp(), dtype)


def judge(out: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    out = out.double()
    finite = truth.isfinite()
    assert torch.equal(out.nan_to_num(0, 1, -1)[~finite], truth.nan_to_num(0, 1, -1)[~finite]), (
        "∞ or NaN in other places"
    )
    assert torch.equal(out.isnan(), truth.isnan()), "NaN in other places"
    assert bool((out[(truth == 0).all(-1)] == 0).all()), "rows that see nothing, or only zeros, must be 0"
    if bool(finite.any()):
        error = (out - truth)[finite].norm() / truth[finite].norm().clamp_min(1e-300)
        assert error <= TOLERANCE[dtype], f"relerr {error:.2e}"


def judge_logsumexp(lse: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    finite = truth.isfinite()
    assert torch.equal(lse[~finite & ~truth.isnan()].double(), truth[~finite & ~truth.isnan()])
    # A row with a NaN logit is NaN; one with a logit of +∞ may say ∞ or NaN.
    assert not bool(lse[truth.isnan()].isfinite().any())
    size = truth[finite].abs().clamp_min(1.0)
    error = (lse.double() - truth)[finite].abs() / size
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert bool((error <= limit).all()), f"logsumexp off by {error.max():.2e}"
