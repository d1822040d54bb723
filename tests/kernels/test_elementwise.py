"""RMS norm, rotary embedding and gated activation against the same in plain torch, rounding for rounding."""

import pytest
import torch
import torch.nn.functional as F
import triton
from elsa_kernels import elementwise

from tests.kernels.interpreter import interpreted

# The interpreter truncates where a GPU rounds to bfloat16.
INTERPRETED = [torch.float32, torch.float16]
ON_GPU = [*INTERPRETED, torch.bfloat16]


def test_in_the_interpreter():
    if triton.knobs.runtime.interpret:
        pytest.skip("is the interpreter's process itself")
    printed = interpreted("-m", "not gpu", __file__)
    assert int(printed.split(" passed")[0].split()[-1]) >= 3 * len(INTERPRETED)


def close(ours, theirs):
    """Within one rounding of the dtype: sums and exp may differ in FP32's last bits, which can tip a rounding."""
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)


def draw(*shape, dtype, device):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def check_norm(dtype, device, width):
    x = draw(2, 5, width, dtype=dtype, device=device)
    weight = draw(width, dtype=dtype, device=device)
    for unit_offset in (False, True):
        theirs = elementwise._rms_norm_torch(x, weight, 1e-5, unit_offset)
        close(elementwise.rms_norm(x, weight, 1e-5, unit_offset=unit_offset), theirs)
    heads = draw(2, 3, 5, width, dtype=dtype, device=device).transpose(1, 2)  # no rows of one stride
    close(elementwise.rms_norm(heads, weight, 1e-5), elementwise._rms_norm_torch(heads, weight, 1e-5, False))
    truth = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()) * weight.double()
    error = (elementwise.rms_norm(x, weight, 1e-5).double() - truth).abs()
    kind = torch.finfo(dtype)
    assert (error <= 2 * kind.eps * truth.abs() + kind.smallest_normal * kind.eps).all()  # or one subnormal step


def check_rotary(dtype, device, H, Hkv, D):
    whole = draw(7, (H + 2 * Hkv) * D, dtype=dtype, device=device)
    q, k, _ = (y.unflatten(-1, (-1, D)) for y in whole.split([H * D, Hkv * D, Hkv * D], -1))
    cos, sin = draw(2, 7, D, dtype=dtype, device=device)
    for ours, x in zip(elementwise.rotary(q, k, cos, sin), (q, k)):
        assert ours.is_contiguous()
        close(ours, x * cos[:, None] + elementwise._rotate_half(x) * sin[:, None])


def check_copy(dtype, device, H, D):
    rows = draw(70, H, D, dtype=dtype, device=device)
    block = torch.full((H, 100, D), 7.0, dtype=dtype, device=device)
    elementwise.copy_heads(block[:, 20:90], rows.transpose(0, 1))
    assert torch.equal(block[:, 20:90], rows.transpose(0, 1))
    assert (block[:, :20] == 7).all()
    assert (block[:, 90:] == 7).all()
    back = torch.empty_like(rows)
    elementwise.copy_heads(back.transpose(0, 1), block[:, 20:90])
    assert torch.equal(back, rows)


def check_gated(dtype, device, width):
    both = 4 * draw(3, 5, 2 * width, dtype=dtype, device=device)
    both[0, 0, :2] = torch.tensor([60.0, -60.0])
    gate, up = both.split(width, -1)
    close(elementwise.gated(gate, up, "silu"), F.silu(gate) * up)
    tanh = F.gelu(gate, approximate="tanh") * up
    # For x far below zero 1 + tanh loses all its digits, in either implementation.
    torch.testing.assert_close(
        elementwise.gated(gate, up, "gelu_tanh"), tanh, rtol=2 * torch.finfo(dtype).eps, atol=2e-5
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
class TestInterpreted:
    def test_norm(self, interpreter, dtype):
        check_norm(dtype, "cpu", 96)

    def test_rotary(self, interpreter, dtype):
        check_rotary(dtype, "cpu", 5, 2, 48)

    def test_gated(self, interpreter, dtype):
        check_gated(dtype, "cpu", 40)

    def test_copy(self, interpreter, dtype):
        check_copy(dtype, "cpu", 3, 48)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ON_GPU, ids=str)
class TestOnTheGpu:
    def test_norm(self, dtype):
        check_norm(dtype, "cuda", 5120)
        check_norm(dtype, "cuda", 128)

    def test_rotary(self, dtype):
        check_rotary(dtype, "cuda", 40, 8, 128)
        check_rotary(dtype, "cuda", 3, 1, 96)

    def test_gated(self, dtype):
        check_gated(dtype, "cuda", 13824)

    def test_copy(self, dtype):
        check_copy(dtype, "cuda", 40, 128)


def test_without_triton_plain_torch_answers():
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter takes it")
    check_norm(torch.float32, "cpu", 96)
    check_rotary(torch.float32, "cpu", 5, 2, 48)
    check_gated(torch.float32, "cpu", 40)
    check_copy(torch.float32, "cpu", 3, 48)


def test_bad_input_is_named():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="'relu'"):
        elementwise.gated(x, x, "relu")
    with pytest.raises(ValueError, match="multiplied"):
        elementwise.gated(x, x[:1], "silu")
    q = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="differ"):
        elementwise.copy_heads(q, q.half())
    with pytest.raises(ValueError, match="cos and sin"):
        elementwise.rotary(q, q, x[:1], x[:1])
    with pytest.raises(ValueError, match="side by side"):
        elementwise.rotary(q.transpose(0, 1), q.transpose(0, 1), x[:1].expand(3, 8), x[:1].expand(3, 8))
