"""FP32-accurate linear layers against FP64: the Triton form in the interpreter, and all forms on a GPU."""

import itertools

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton
from elsa_kernels import FallbackWarning
from elsa_kernels import linear as elsa

from tests.kernels.interpreter import interpreted

SHAPES = [(1, 33, 64), (17, 40, 200), (40, 70, 136)]
BOUND = 3e-7  # relative error against FP64; torch's own FP32 reaches 1e-7 … 4e-7 on these


def test_in_the_interpreter():
    if triton.knobs.runtime.interpret:
        pytest.skip("is the interpreter's process itself")
    printed = interpreted("-m", "not gpu", __file__)
    assert int(printed.split(" passed")[0].split()[-1]) > len(FAMILIES) * len(SHAPES)  # they ran, and were not skipped


def operands(M, N, K, family, device="cpu"):
    generator = torch.Generator().manual_seed(M + 7 * N + 31 * K)
    x, w = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
    if family == "positive":
        x, w = x.abs(), w.abs()
    elif family == "tiny":
        x, w = x * 1e-35, w * 1e20
    elif family == "huge":
        x, w = x * 3e37, w * 1e-20
    elif family == "outliers":
        x[:, 3] *= 1e4
        w[:, 3] *= 1e-4
    elif family == "wild rows":
        x *= torch.logspace(-30, 10, M)[:, None]
        w *= torch.logspace(-10, 15, N)[:, None]
    elif family == "zeros":
        x[0], w[1], x[:, ::2] = 0, 0, 0
    return x.to(device), w.to(device)


def row_errors(out, x, w):
    """‖out − ref‖ / ‖ref‖ of each row scaled to unit weights, so that wild scales cannot hide one another."""
    unit = w.double().norm(dim=1).clamp(min=1e-300)
    reference = x.double() @ w.double().t() / unit
    error = (out.double() / unit - reference).norm(dim=1)
    return (error / reference.norm(dim=1).clamp(min=1e-300)).max().item()


FAMILIES = ["normal", "positive", "tiny", "huge", "outliers", "wild rows", "zeros"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(interpreter, shape, family):
    x, w = operands(*shape, family)
    out = elsa.linear(x, w, impl="triton")
    assert row_errors(out, x, w) < BOUND


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("rows", [6, 40])
def test_non_finite_values_are_those_of_fp32(interpreter, rows):
    x, w = operands(rows, 40, 64, "normal")
    x[2, 5], x[3, 7], x[4, 1], x[5, 2], x[5, 3] = float("inf"), float("nan"), float("-inf"), float("inf"), float("-inf")
    w[4, 5] = 0
    out, expected = elsa.linear(x, w, impl="triton"), x @ w.t()
    assert torch.equal(out.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert infinite.any()
    assert torch.equal(out[infinite], expected[infinite])
    clean = expected.isfinite().all(dim=1)
    assert row_errors(out[clean], x[clean], w) < BOUND


def test_results_below_fp32_are_zero(interpreter):
    x, w = operands(6, 40, 72, "normal")
    for rows in (x, x.repeat(10, 1)):
        assert torch.equal(elsa.linear(rows * 1e-30, w * 1e-30, impl="triton"), torch.zeros(len(rows), 40))


def test_bias_and_leading_dimensions(interpreter):
    x, w = operands(6, 40, 72, "normal")
    bias = torch.randn(40)
    out = elsa.linear(x.view(2, 3, 72), elsa.split_weight(w), bias, impl="triton")
    assert out.shape == (2, 3, 40)
    torch.testing.assert_close(out.view(6, 40), (x.double() @ w.double().t() + bias).float(), rtol=1e-6, atol=1e-5)


def test_matmul(interpreter):
    a, b = operands(5, 40, 72, "normal")
    assert row_errors(elsa.matmul(a, b.t(), impl="triton"), a, b) < BOUND


def test_a_row_does_not_depend_on_its_batch(interpreter, monkeypatch):
    # The interpreter's products are the CPU's BLAS, whose order within a row's sum may depend on how many rows there
    # are (seen on an AMD EPYC). In FP64 no order shows; what is left is our own, that of the tiles of K.
    matmul = numpy.matmul
    monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: matmul(a, b, dtype=numpy.float64).astype(dtype))
    x, w = operands(130, 40, 128, "normal")
    split = elsa.split_weight(w)
    whole = elsa.linear(x, split, impl="triton")
    assert torch.equal(whole[64:101], elsa.linear(x[64:101], split, impl="triton"))


def test_split_represents_the_matrix(interpreter):
    x, _ = operands(9, 1, 333, "wild rows")
    split = elsa.split_rows(x)
    error = (split.to_float32() - x).abs().max(dim=1).values / x.abs().max(dim=1).values
    assert error.max() < 2.0**-22
    assert split.nbytes == x.numel() * 4 + 9 * 8


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("at_once", [16384, 0])
def test_splitting_in_torch_gives_the_same_bits(interpreter, at_once, monkeypatch):
    monkeypatch.setattr(elsa, "ROW_IN_REGISTERS", at_once)
    x, _ = operands(9, 1, 333, "wild rows")
    x[0], x[1, 7], x[2, 9], x[3] = 0, float("inf"), float("nan"), x[3] * 1e-10
    ours, torchs = elsa.split_rows(x), elsa._split_rows_torch(x)
    for name in ("hi", "lo", "exponent", "nonfinite"):
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name), rtol=0, atol=0, equal_nan=True)


def test_empty(interpreter):
    assert elsa.linear(torch.empty(0, 64), torch.randn(8, 64), impl="triton").shape == (0, 8)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_weight_with_inf_is_refused_by_row(interpreter):
    w = torch.randn(8, 64)
    w[5, 3] = float("inf")
    with pytest.raises(ValueError, match="row 5"):
        elsa.split_weight(w)


def test_torch_runs_where_no_kernel_does():
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter takes it")
    x, w = operands(4, 8, 16, "normal")
    assert torch.equal(elsa.linear(x, w), F.linear(x, w))
    assert row_errors(elsa.linear(x, elsa.split_weight(w)), x, w) < BOUND


def test_compilers_see_one_op():
    x, w = operands(4, 8, 16, "normal")
    split, bias = elsa.split_weight(w), torch.randn(8)
    arguments = (x.view(2, 2, 16), split.hi, split.lo, split.exponent, bias, "torch")
    torch.library.opcheck(elsa._linear_op, arguments)
    if not triton.knobs.runtime.interpret:
        compiled = torch.compile(lambda x: elsa.linear(x, split, bias), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), elsa.linear(x, split, bias))


@pytest.mark.parametrize(
    ("x", "impl", "named"),
    [
        (torch.randn(4, 16).half(), None, "float16"),
        (torch.randn(4, 17), None, "17"),
        (torch.randn(4, 16), "cutlass", "cutlass"),
        (torch.randn(4, 16), "gluon", "on the CPU"),
    ],
)
def test_bad_input_is_named(x, impl, named):
    with pytest.raises(ValueError, match=named):
        elsa.linear(x, torch.randn(8, 16), impl=impl)


GPU_SHAPES = [*SHAPES, (4, 1000, 5120), (16, 72, 13824), (31, 520, 5120), (1000, 776, 4096), (4096, 1000, 13824)]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cuda", "triton", "gluon"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_error_on_the_gpu(shape, family, impl):
    x, w = operands(*shape, family, device="cuda")
    reason = elsa._refusal(impl, x, shape[2])
    if reason:
        pytest.skip(reason)
    assert row_errors(elsa.linear(x, w, impl=impl), x, w) < max(BOUND, row_errors(F.linear(x, w), x, w))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("impl", "rows"), [("cuda", 12), ("cuda", 30), ("triton", 20), ("triton", 300), ("gluon", 300)]
)
def test_results_below_fp32_are_zero_on_the_gpu(impl, rows):
    x, w = operands(rows, 256, 512, "normal", device="cuda")
    reason = elsa._refusal(impl, x, 512)
    if reason:
        pytest.skip(reason)
    assert not elsa.linear(x * 1e-30, w * 1e-30, impl=impl).any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 20, 300])
def test_non_finite_on_the_gpu(rows):
    x, w = operands(rows, 250, 512, "normal", device="cuda")
    x[2, 5], x[3, 7] = float("inf"), float("nan")
    out, expected = elsa.linear(x, w), x @ w.t()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[expected.isinf()], expected[expected.isinf()])


def test_a_refusal_of_the_form_meant_for_a_problem_is_said_once(monkeypatch):
    monkeypatch.setattr(elsa, "_meant_for", lambda name, x, K: name == "cuda")
    monkeypatch.setattr(elsa, "_announced", set())
    x = torch.randn(4, 16)
    with pytest.warns(FallbackWarning, match="cuda refused"):
        elsa._preferred(x, 16)
    elsa._preferred(x, 16)  # warnings are errors here


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1000, 6000])
def test_few_rows_are_one_form_whatever_their_number(N):
    x, w = operands(32, N, 5120, "normal", device="cuda")
    if elsa._refusal("cuda", x, 5120):
        pytest.skip(elsa._refusal("cuda", x, 5120))
    split, bias = elsa.split_weight(w), torch.randn(N, device="cuda")
    whole = elsa.linear(x, split, bias, impl="cuda")
    for rows in (slice(0, 1), slice(3, 8), slice(5, 14), slice(2, 18), slice(1, 30)):
        assert torch.equal(elsa.linear(x[rows], split, bias), whole[rows])
    strided = torch.randn(16, 5122, device="cuda")[:, 1:5121]
    assert torch.equal(elsa.linear(strided, split, bias), elsa.linear(strided.contiguous(), split, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_a_chain_of_few_rows_waits_for_its_inputs(rows):
    x = torch.randn(rows, 5120, device="cuda")
    if elsa._refusal("cuda", x, 5120):
        pytest.skip(elsa._refusal("cuda", x, 5120))
    # Long layers between short ones: a kernel that started early would read what is not written yet.
    sizes = [5120, 20480, 64, 20480, 5120, 5120]
    layers = [elsa.split_weight(torch.randn(n, k, device="cuda") / k**0.5) for k, n in itertools.pairwise(sizes)]

    def chain(pause):
        out = x
        for layer in layers:
            out = elsa.linear(out, layer, impl="cuda")
            if pause:
                torch.cuda.synchronize()
        return out

    expected = chain(pause=True)
    assert torch.equal(chain(pause=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(pause=False)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
