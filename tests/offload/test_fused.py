"""Fused layers: recognised by what they compute, the same tokens, and the modules' own code where anything differs."""

import logging

import pytest
import torch
from engine_models import (
    FAMILIES,
    generate,
    make_config,
    make_engine,
    plan_as_for_a_cpu,
    prompt_of,
    save_checkpoint,
    tokens_of,
)
from torch import nn

from elsa_serve.offload import attention as attentions
from elsa_serve.offload import fused, step
from elsa_serve.offload.weights import build_meta_model, find_decoder_layers


def decoder_layers(family, **changes):
    attentions.register()
    model = build_meta_model(make_config(family, **changes), torch.float32, attentions.NAME)
    return find_decoder_layers(model)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_layers_of_llamas_shape_are_fused_whole(family):
    layers = decoder_layers(family)
    done = fused.fuse(layers)
    assert (done.layers, done.norms, done.activations) == (5, 0, 0)
    assert all(isinstance(layer.forward, fused.FusedForward) for layer in layers)
    done.restore()
    assert not any("forward" in vars(module) for layer in layers for module in layer.modules())


def test_other_layers_keep_their_forward_and_get_the_parts():
    layers = decoder_layers("gemma2")
    done = fused.fuse(layers)
    assert (done.layers, done.norms, done.activations) == (0, 5 * 4, 5)
    assert not any("forward" in vars(layer) for layer in layers)
    done.restore()
    assert not any("forward" in vars(module) for layer in layers for module in layer.modules())


def test_forms_are_those_of_the_modules():
    llama, gemma = decoder_layers("llama")[0], decoder_layers("gemma2")[0]
    assert fused.norm_form(llama.input_layernorm) == fused.NormForm(1e-6, unit_offset=False)
    assert fused.norm_form(gemma.input_layernorm) == fused.NormForm(1e-6, unit_offset=True)
    assert fused.gated_form(llama.mlp) == "silu"
    assert fused.gated_form(gemma.mlp) == "gelu_tanh"
    window = fused.layer_form(decoder_layers("mistral")[0]).options.window
    assert window == FAMILIES["mistral"]["sliding_window"]
    assert fused.layer_form(decoder_layers("qwen3")[0]).head_norm is not None


class RoundsOnce(nn.Module):
    """A norm that differs from LLaMA's in one rounding."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x):
        full = x.float()
        return (self.weight * full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_what_computes_otherwise_is_left_alone(monkeypatch):
    assert fused.norm_form(RoundsOnce()) is None
    assert fused.norm_form(nn.LayerNorm(64)) is None
    layer = decoder_layers("llama", hidden_act="relu")[0]
    assert fused.gated_form(layer.mlp) is None
    assert fused.layer_form(layer) is None
    layer = decoder_layers("llama")[0]
    own = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x, **kwargs: 0.5 * own(self, x, **kwargs))
    assert fused.layer_form(layer) is None


def test_a_rotation_of_another_kind_is_seen(monkeypatch):
    layer = decoder_layers("llama")[0]
    module = __import__(type(layer).__module__, fromlist=["_"])
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]))
    assert fused.layer_form(layer) is None


def tokens(directory, **options):
    engine = make_engine(directory, **options)
    try:
        return tokens_of(generate(engine, prompt_of(70), max_tokens=12)), engine._loaded.fused
    finally:
        engine.shutdown()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers_modules(family, device, tmp_path, caplog):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    directory = save_checkpoint(family, tmp_path / family)
    where = {"device": device}
    if device == "cuda":
        where |= {"gpu_memory": "2GiB", "host_memory": "4GiB"}
    plain, none = tokens(directory, fused=False, **where)
    assert none is None
    with caplog.at_level(logging.INFO, logger="elsa_serve.offload.loading"):
        ours, done = tokens(directory, fused=True, resident_layers=2, **where)
    assert ours == plain
    assert done.layers == (0 if family == "gemma2" else 5)
    assert str(done) in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_of_tokens_that_nobody_wants_keys_and_values_are_computed_alone(family, wanted):
    layer = decoder_layers(family)[2].to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.3)
    forward = fused.FusedForward(layer, fused.layer_form(layer))
    x, tables = torch.randn(1, 9, 64), tuple(torch.randn(2, 1, 9, 16))

    def run(**options):
        recorded = fused._Recorder(2)
        with attentions.attending(recorded), torch.no_grad():
            return forward(x.clone(), position_embeddings=tables, **options), *recorded.seen[0]

    whole, q, k, v = run()
    some, few, keys, values = run(wanted=wanted)
    torch.testing.assert_close(some[:, 9 - wanted :], whole[:, 9 - wanted :])
    torch.testing.assert_close(some[:, : 9 - wanted], x[:, : 9 - wanted])
    torch.testing.assert_close(few, q[:, :, 9 - wanted :])
    torch.testing.assert_close((keys, values), (k, v))


class Shapes:
    """Wraps a pass's attention: notes (layer, queries, keys) of every call."""

    def __init__(self, monkeypatch):
        self.seen = []
        inner = step._ChunkAttention.__call__

        def call(attention, layer, q, k, v, options):
            self.seen.append((layer, q.shape[2], k.shape[2]))
            return inner(attention, layer, q, k, v, options)

        monkeypatch.setattr(step._ChunkAttention, "__call__", call)


# With few KiB, the KV of all tokens but some lies on the host.
@pytest.mark.parametrize("device_kib", [None, 920, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_last_layer_attends_for_the_wanted_rows_alone(family, device_kib, device, tmp_path, monkeypatch):
    monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)
    directory = save_checkpoint(family, tmp_path / family)
    options = {"chunk_tokens": 40, "prefill_round_tokens": 90, "num_speculative_tokens": 0, "device": device}
    if device_kib:
        options |= {"gpu_memory": f"{device_kib}KiB", "resident_layers": 0, "context": 200}
    plain = make_engine(directory, fused=False, **options)
    try:
        theirs = tokens_of(generate(plain, prompt_of(170), max_tokens=6))
    finally:
        plain.shutdown()
    ours = make_engine(directory, fused=True, **options)
    assert (ours.plan.kv_host_bytes > 0) == bool(device_kib)
    shapes = Shapes(monkeypatch)
    try:
        assert tokens_of(generate(ours, prompt_of(170), max_tokens=6)) == theirs
    finally:
        ours.shutdown()
    last = [(queries, keys) for layer, queries, keys in shapes.seen if layer == 4]
    # Two rounds of 85 tokens in chunks of 40, 40 and 5; one row of the second is wanted. Then a token a pass.
    assert last == [(0, 40), (0, 40), (0, 5), (0, 40), (0, 40), (1, 5)] + 5 * [(1, 1)]
    assert all(queries == keys for layer, queries, keys in shapes.seen if layer != 4)


def test_neighbouring_weights_are_one_product():
    flat = torch.randn(6, 16)
    first, second, third = (nn.Linear(16, n, bias=False) for n in (2, 3, 1))
    for linear, (low, high) in ((first, (0, 2)), (second, (2, 5)), (third, (5, 6))):
        linear.weight = nn.Parameter(flat[low:high], requires_grad=False)
    assert fused._adjacent([first.weight, second.weight, third.weight])
    assert not fused._adjacent([first.weight, third.weight])
    x = torch.randn(1, 4, 16)
    for ours, linear in zip(fused.products(x, first, second, third), (first, second, third)):
        torch.testing.assert_close(ours, linear(x))
