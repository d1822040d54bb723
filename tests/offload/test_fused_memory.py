"""What a fused layer allocates stays within what the plan sets aside for a chunk's activations."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from elsa_serve.offload import attention as attentions
from elsa_serve.offload import fused
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.plan import chunk_bytes
from elsa_serve.offload.weights import build_meta_model, find_decoder_layers

CHUNK = 64
WIDTHS = [
    {"hidden_size": 160, "intermediate_size": 432, "num_attention_heads": 5, "num_key_value_heads": 5},  # as 13B's
    {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 1},  # grouped
]


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of all tensors made inside, as an allocator would count them."""

    def __init__(self):
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return result


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as an allocator sees them on a GPU: each makes its results and nothing else."""
    monkeypatch.setattr(fused, "rms_norm", lambda x, *_, **__: torch.empty_like(x))
    monkeypatch.setattr(fused, "rotary", lambda q, k, *_: tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k)))
    monkeypatch.setattr(fused, "gated", lambda gate, up, _: torch.empty(gate.shape, dtype=gate.dtype))
    monkeypatch.setattr(fused, "copy_heads", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=["mha", "gqa"])
def test_peak_is_planned(kernels, widths, dtype):
    attentions.register()
    config = AutoConfig.for_model("llama", head_dim=32, vocab_size=64, num_hidden_layers=1, **widths)
    layer = find_decoder_layers(build_meta_model(config, dtype, attentions.NAME))[0].to_empty(device="cpu")
    form = fused.LayerForm(
        fused.NormForm(1e-6, False), None, 32, "silu", attentions.AttentionOptions(1.0), layer.self_attn.layer_idx
    )
    hidden = torch.zeros(1, CHUNK, config.hidden_size, dtype=dtype)
    tables = tuple(torch.zeros(2, 1, CHUNK, 32, dtype=dtype))

    def attend(layer, q, k, v, options):
        return torch.empty(q.shape, dtype=dtype).transpose(1, 2)

    live = LiveBytes()
    with torch.inference_mode(), attentions.attending(attend), live:
        fused.FusedForward(layer, form)(hidden, position_embeddings=tables)
    assert 0 < live.peak <= chunk_bytes(Geometry.from_config(config, dtype), CHUNK, CHUNK)
    assert live.peak > 2 * CHUNK * config.intermediate_size * dtype.itemsize  # gate and up at least were seen
