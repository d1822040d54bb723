"""FP32-accurate linear layers inside modules: the planes in the weight's own bytes, and the switch for whole models."""

import pytest
import torch
from torch import nn

from elsa_serve.fp32_linear import SplitLinear, replace_linears, use_fp32_linear, write_planes


def relative(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Sequential(nn.Linear(96, 40, bias=False)))


@torch.no_grad()
def test_split_linear_keeps_the_weights_bytes_and_answers():
    layers = model()
    reference = layers.double()(x := torch.randn(5, 48).double())
    layers.float()
    replaced = replace_linears(layers)
    assert sorted(replaced) == ["0", "2.0"]
    for linear in replaced.values():
        address = linear.weight.data_ptr()
        linear.exponent = write_planes(linear.weight.data, torch.device("cpu"))
        assert linear.weight.data_ptr() == address
    assert relative(layers(x.float()), reference) < 4e-7


def test_unsplit_weight_is_refused():
    with pytest.raises(RuntimeError, match="not been split"):
        SplitLinear(nn.Linear(8, 8))(torch.randn(1, 8))


@torch.no_grad()
def test_use_fp32_linear_is_reversible():
    layers = model()
    before, x = list(layers.modules()), torch.randn(5, 48)
    expected = layers(x)
    with use_fp32_linear(layers):
        assert not any(type(m) is nn.Linear for m in layers[:1])
        torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-6)
    assert list(layers.modules()) == before
    with use_fp32_linear(layers, enabled=False):
        assert list(layers.modules()) == before


def test_use_fp32_linear_restores_after_a_refusal_that_names_the_layer():
    layers = model()
    with torch.no_grad():
        layers[2][0].weight[3, 4] = float("nan")
    before = list(layers.modules())
    with pytest.raises(ValueError, match=r"2\.0: the weight holds Inf or NaN"), use_fp32_linear(layers):
        pytest.fail("entered")
    assert list(layers.modules()) == before


def test_a_model_that_it_would_leave_as_it_is_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no float32 nn\.Linear, its parameters are float16"):
        use_fp32_linear(model().half()).__enter__()
    with use_fp32_linear(model().half(), enabled=False):
        pass


def test_gradients_are_refused():
    with use_fp32_linear(model()) as layers, pytest.raises(RuntimeError, match="forward-only"):
        layers(torch.randn(2, 48))
