"""--quantization elsa_fp32, without an engine: registered, in place, FP32 answers, refusals with the remedy."""

import pytest
import torch
import torch.nn.functional as F
from vllm_support import needs_vllm, others_may_warn

pytestmark = [needs_vllm, others_may_warn]


@pytest.fixture
def fp32_linear():
    from elsa_serve.vllm_plugin import fp32_linear

    return fp32_linear


@pytest.fixture
def layer() -> torch.nn.Module:
    module = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    module.weight = torch.nn.Parameter(torch.randn(24, 40, generator=generator), requires_grad=False)
    return module


def test_vllm_knows_the_method_by_name(fp32_linear):
    from vllm.model_executor.layers.quantization import get_quantization_config

    from elsa_serve.vllm_plugin import register

    register()
    config = get_quantization_config(fp32_linear.NAME)
    assert config is fp32_linear.ElsaFp32Config
    assert config().get_supported_act_dtypes() == [torch.float32]
    assert config().get_quant_method(torch.nn.Module(), "embedding") is None


def test_a_weight_is_split_in_place_and_answers_in_fp32(fp32_linear, layer):
    weight, pointer = layer.weight.clone(), layer.weight.data_ptr()
    method = object.__new__(fp32_linear.SplitLinearMethod)
    method.process_weights_after_loading(layer)
    assert layer.elsa_planes.data_ptr() == layer.weight.data_ptr() == pointer
    assert not torch.equal(layer.weight, weight)
    assert layer.state_dict().keys() == {"weight"}
    x, bias = torch.randn(5, 40), torch.randn(24)
    truth = F.linear(x.double(), weight.double(), bias.double())
    error = (method.apply(layer, x, bias).double() - truth).norm() / truth.norm()
    assert error < 3e-7


def test_weights_that_are_loaded_again_take_the_place_of_the_old(fp32_linear, layer):
    """A captured graph goes on reading where the first ones lay."""
    method = object.__new__(fp32_linear.SplitLinearMethod)
    method.process_weights_after_loading(layer)
    planes, exponent = layer.elsa_planes.data_ptr(), layer.elsa_exponent.data_ptr()
    weight = torch.randn(24, 40) * 1e3
    layer.weight.copy_(weight)
    method.process_weights_after_loading(layer)
    assert (layer.elsa_planes.data_ptr(), layer.elsa_exponent.data_ptr()) == (planes, exponent)
    x = torch.randn(5, 40)
    torch.testing.assert_close(method.apply(layer, x).double(), x.double() @ weight.double().T, rtol=0, atol=4e-2)


def test_a_weight_with_nan_is_refused_with_the_remedy(fp32_linear, layer):
    layer.weight.data[3, 7] = torch.nan
    layer.prefix = "model.layers.0.mlp.down_proj"
    method = object.__new__(fp32_linear.SplitLinearMethod)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: .*row 3.*without --quantization"):
        method.process_weights_after_loading(layer)


def test_quantised_checkpoints_are_refused(fp32_linear):
    with pytest.raises(ValueError, match="quantization_config"):
        fp32_linear.ElsaFp32Config.from_config({"quant_method": "awq"})
