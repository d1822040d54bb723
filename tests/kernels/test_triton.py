"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1.

`test_triton_interpreter.py` runs this file in a process of its own, since the switch is read when Triton is imported.
"""

from __future__ import annotations

import functools
import os

import elsa_kernels
import pytest
import torch
from elsa_kernels.reference import attention_reference
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.bench import cases as bench
from kernels.bench import inputs
from tests.kernels.cases import CASES, NAN, TOLERANCE, Case, check, judge, poisoned_memory

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
pytestmark = (
    # NumPy's own warnings about the arithmetic it was asked to interpret
    [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
    if INTERPRETED
    else [pytest.mark.gpu]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32(case: Case) -> None:
    check(case, "triton", DEVICE, torch.float32)


INLINE = [
    "causal", "gqa_of_three", "window_both_sides", "sinks", "kv_range_causal_window", "everything", "head_dim_5",
    "outlier_channels", "zeros", "tiny", "huge_keys_tiny_queries", "subnormal_keys", "nan_key", "non_finite_values",
]  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name in INLINE], ids=lambda case: case.name)
def test_fp32_split_by_the_program_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from elsa_kernels.triton import launch

    monkeypatch.setattr(launch, "INLINE_KEYS", dict.fromkeys(("default", "sm_80", "sm_90"), 10**6))
    check(case, "triton", DEVICE, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.fp32_only], ids=lambda case: case.name)
def test_half(case: Case, dtype: torch.dtype) -> None:
    check(case, "triton", DEVICE, dtype)


@pytest.mark.parametrize("N", [70, 4500])
def test_planes_hold_their_tensors(N: int) -> None:
    from elsa_kernels.triton.split import split_kv

    torch.manual_seed(0)
    channels = torch.tensor([1.0, 1e30, 1e-30, 0.0, 2.0**-140, 1e-3], device=DEVICE)
    k, v = torch.randn(1, 2, N, 6, device=DEVICE) * channels, torch.randn(1, 2, N, 6, device=DEVICE)
    k[0, 0, 3, 1] = NAN
    planes = split_kv(k, v)
    in_order = k.gather(3, planes.order.long().unsqueeze(2).expand_as(k))
    for x, hi, lo, scale in (
        (in_order, planes.k_hi, planes.k_lo, planes.k_scale), (v, planes.v_hi, planes.v_lo, planes.v_scale),
    ):  # fmt: skip
        assert bool((scale.log2() == scale.log2().round()).all())
        held = (hi.double() + lo.double()) / scale.double().unsqueeze(2)
        assert torch.equal(held.isnan(), x.isnan())
        x = x.double().nan_to_num(0)
        floor = x.abs().amax(2, keepdim=True) * 2.0**-39
        assert bool(((held.nan_to_num(0) - x).abs() <= torch.maximum(x.abs() * 2.0**-23, floor)).all())


def test_large_channels_of_keys_come_last_in_their_planes() -> None:
    """With their neighbours in fours, by what the first keys say that exist, of each sequence."""
    from elsa_kernels.triton.split import split_kv

    torch.manual_seed(0)
    k = torch.rand(2, 1, 100, 40, device=DEVICE) + 0.5
    k[0, :, :, 3], k[0, :, :, 20] = 1e4, -100.0
    k[0, :, 40:, 5] *= 1e6  # behind the keys that tell
    k[1, :, :50, 6], k[1, :, 50:, 7], k[1, :, 51, 8] = 1e6, 100.0, torch.inf
    exist = torch.tensor([[0, 100], [50, 100]], dtype=torch.int32, device=DEVICE)
    first = [*range(4, 20), *range(24, 40), *range(4), *range(20, 24)]
    second = [*range(4), *range(8, 40), *range(4, 8)]
    assert split_kv(k, k, exist).order.tolist() == [[first], [second]]
    packed = torch.cat([k[:1], k[1:, :, 50:]], 2)
    starts = torch.tensor([0, 100, 150], dtype=torch.int32, device=DEVICE)
    assert split_kv(packed, packed, None, starts, 100).order.tolist() == [[first], [second]]
    few = split_kv(k[:1, :, :1], k[:1, :, :1])
    assert few.order.tolist() == [[first]]
    assert torch.equal(few.k_hi[0, 0, 0] / few.k_scale[0, 0], k[0, 0, 0, first].half())
    odd = split_kv(k[..., :38], k[..., :38])  # no fours
    assert odd.order.tolist() == [[[*range(38)]]] * 2


@pytest.mark.skipif(INTERPRETED, reason="accumulators that truncate are a GPU's")
def test_outlier_channels_err_no_more_than_in_sdpa() -> None:
    """The cell of the accuracy report that channels as they lie miss by a tenth."""
    case = bench.Case("float32", False, 1, 2, 256, 128, Nk=32768)
    tensors = inputs.draw(case, "outlier")
    ours = elsa_kernels.attention(*tensors, impl="triton")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        theirs = scaled_dot_product_attention(*tensors)
    error, bound = (inputs.relative_error(case, tensors, out, rows=32) for out in (ours, theirs))
    assert error <= 0.9 * bound


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_other_precisions(precision: str) -> None:
    if INTERPRETED or precision == "ieee":  # the interpreter multiplies in FP32 whatever it is told
        check(next(case for case in CASES if case.name == "gqa"), "triton", DEVICE, torch.float32, precision=precision)
        return
    q, k, v = (torch.randn(1, 2, 300, 64, device=DEVICE) for _ in range(3))
    out = elsa_kernels.attention(q, k, v, precision="tf32", impl="triton")
    truth = attention_reference(q, k, v)
    error = float((out - truth).norm() / truth.norm())
    assert 1e-5 < error < 3e-3, f"relerr {error:.1e} is not that of TF32"


def test_spans_of_keys_are_merged() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 70, 16, device=DEVICE), *torch.randn(2, 1, 1, 4200, 16, device=DEVICE)
    k[:, :, 4096:] *= 3  # the running maximum changes after sums have been put aside
    for options in ({}, {"window": 1000, "sinks": torch.tensor([2.0], device=DEVICE)}):
        out = elsa_kernels.attention(q, k, v, causal=True, impl="triton", **options)
        judge(out, attention_reference(q, k, v, causal=True, **options), torch.float32)


def test_strided_inputs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 2, 48, device=DEVICE)[:, :, 1].transpose(1, 2) for n in (40, 70, 70))
    assert not k.is_contiguous()
    out = elsa_kernels.attention(q, k, v, causal=True, impl="triton")
    compact = elsa_kernels.attention(*(x.contiguous() for x in (q, k, v)), causal=True, impl="triton")
    assert torch.equal(out, compact)
    judge(out, attention_reference(q, k, v, causal=True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("Nq", [1, 90])
def test_a_sequence_does_not_depend_on_its_batch(dtype: torch.dtype, Nq: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 32, device=DEVICE).to(dtype) for n in (Nq, 700, 700))
    q[0], k[0], v[0] = 50 * q[0], NAN, 1000 * v[0]
    together = elsa_kernels.attention(q, k, v, causal=True, impl="triton")
    alone = elsa_kernels.attention(q[1:2], k[1:2], v[1:2], causal=True, impl="triton")
    assert torch.equal(together[1:2], alone)
    again = elsa_kernels.attention(q, k, v, causal=True, impl="triton")
    torch.testing.assert_close(together, again, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_short_sequence_does_not_depend_on_how_many_there_are() -> None:
    """The tile that splits within its launch follows the number of programs; the bits do not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 12, 197, 64, device=DEVICE) for _ in range(3))
    together = elsa_kernels.attention(q, k, v, impl="triton")
    for batch in (2, 8):
        fewer = elsa_kernels.attention(*(x[:batch] for x in (q, k, v)), impl="triton")
        assert torch.equal(together[:batch], fewer)
    judge(together[:1], attention_reference(q[:1], k[:1], v[:1]), torch.float32)


PACKED = {
    # lengths of queries and of keys, options
    "prefill": ([20, 0, 1, 68], [20, 0, 1, 75], {"causal": True}),
    "features": ([30, 66, 3], [35, 66, 0], {"causal": True, "window": 20, "softcap": 3.0}),
    "decode": ([1, 2], [520, 5], {"causal": True}),
    "decode_full": ([1, 1], [30, 40], {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for all; each sequence as in the reference, whatever lies in its neighbours."""
    lengths_q, lengths_k, options = PACKED[name]
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (lengths_q, lengths_k))
    q = torch.randn(sum(lengths_q), 4, 32, device=DEVICE).to(dtype)
    k, v = torch.randn(2, sum(lengths_k), 2, 32, device=DEVICE).to(dtype)
    spoilt = slice(int(cu_k[1]), int(cu_k[-1])) if name == "decode_full" else slice(0, 0)
    k[spoilt], v[spoilt] = NAN, NAN  # the last sequence: the first must not notice
    options = options | {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)}
    call = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "impl": "triton"} | options
    from elsa_kernels import varlen

    monkeypatch.setattr(varlen.Sequences, "each", lambda _: pytest.fail("the sequences were taken one by one"))
    with poisoned_memory():
        out = elsa_kernels.attention_varlen(q, k, v, cu_q, cu_k, **call)
        state = elsa_kernels.attention_varlen(q, k, v, cu_q, cu_k, **call, return_state=True)
    assert out.dtype == dtype
    assert out.is_contiguous()
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        one = [x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d])]
        if b > a:
            truth = attention_reference(*one, **options)
            judge(out[a:b].transpose(0, 1).unsqueeze(0), truth, dtype)
            judge(state.finalize()[:, a:b].unsqueeze(0), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("B", "Nq"), [(1, 5), (2, 5), (1, 1)])
def test_states_become_one_output(dtype: torch.dtype, count: int, B: int, Nq: int) -> None:
    """The kernel against the monoid's own operations, with rows that are empty in some states or in all, or not finite,
    and with states that are parts of larger ones."""
    torch.manual_seed(0)
    H, D = 3, 48
    states = [
        elsa_kernels.State(torch.randn(B, H, Nq), torch.rand(B, H, Nq) + 0.5, torch.randn(B, H, Nq, D))
        for _ in range(count)
    ]
    for i, state in enumerate(states):
        empty = [0, i % Nq]
        state.m[0, 0, empty], state.S[0, 0, empty], state.W[0, 0, empty] = -torch.inf, 0.0, 0.0
    states[0].m[0, 1, 0] = 80.0
    states[-1].m[-1, 2, -1] = NAN
    states[0].W[0, 1, Nq // 2, 3] = torch.inf
    here = [state.to(DEVICE) for state in states]
    for i in range(1, count, 2):  # the middle of a state of more queries
        wider = [torch.cat([x, x, x], 2).split(Nq, 2)[1] for x in (here[i].m, here[i].S, here[i].W)]
        here[i] = elsa_kernels.State(*wider)
    out = elsa_kernels.merged_output(here, dtype)
    truth = functools.reduce(elsa_kernels.State.merge, states).finalize(dtype)
    assert out.is_contiguous()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.cpu(), truth, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="needs 26 GB of GPU memory")
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    heads, N, D = 65, 2**18, 128
    k = torch.zeros(1, heads, N, D, device=DEVICE, dtype=torch.float16)
    assert k.numel() > 2**31
    q = torch.randn(1, heads, 4, D, device=DEVICE, dtype=torch.float16)
    k[:, -1].normal_()
    out = elsa_kernels.attention(q, k, k, impl="triton")[:, -1:]
    truth = attention_reference(q[:, -1:], k[:, -1:], k[:, -1:])
    assert float((out - truth).norm() / truth.norm()) <= TOLERANCE[torch.float16]


@pytest.mark.skipif(INTERPRETED, reason="graphs are a GPU's")
def test_a_cuda_graph_replays_the_same_bits() -> None:
    q, k, v = (torch.randn(1, 4, 200, 64, device=DEVICE) for _ in range(3))
    expected = elsa_kernels.attention(q, k, v, causal=True, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = elsa_kernels.attention(q, k, v, causal=True, impl="triton")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
