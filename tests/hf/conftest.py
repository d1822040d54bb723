import elsa_kernels
import pytest
import torch

import elsa_serve.hf  # noqa: F401  registers the implementations


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call that reaches the kernels."""
    seen = []
    kernels = elsa_kernels.attention

    def spy(q, k, v, **options):
        seen.append(options)
        return kernels(q, k, v, **options)

    monkeypatch.setattr(elsa_kernels, "attention", spy)
    return seen
