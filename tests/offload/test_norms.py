"""Fused RMS norms: only where the module computes exactly that, and undone at the end."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from elsa_serve.offload.norms import _fused, fuse_norms, is_rms_norm, restore_norms


class Shifted(LlamaRMSNorm):
    """The same names, another formula."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1e-3


@pytest.mark.parametrize(
    ("norm", "same"),
    [
        (LlamaRMSNorm(64), True),
        (Qwen3RMSNorm(16, eps=1e-5), True),
        (Gemma2RMSNorm(64), False),
        (Shifted(64), False),
        (nn.LayerNorm(64), False),
        (nn.Linear(8, 8), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_computes_the_same_is_recognised(norm, same):
    assert is_rms_norm(norm) is same


def test_meta_weights_are_recognised_and_stay():
    with torch.device("meta"):
        norm = LlamaRMSNorm(64)
    assert is_rms_norm(norm)
    assert norm.weight.is_meta


@torch.no_grad()
def test_fused_and_restored_on_a_device_that_has_kernels():
    model = nn.Sequential(LlamaRMSNorm(64), Gemma2RMSNorm(64))
    plain = model[0].forward
    assert fuse_norms(model, torch.device("cpu")) == 0
    assert fuse_norms(model, torch.device("cuda")) == 1
    assert model[0].forward.func is _fused
    x = torch.randn(5, 64)
    torch.testing.assert_close(model[0](x), plain(x), rtol=1e-5, atol=1e-6)
    restore_norms(model)
    assert "forward" not in vars(model[0])
