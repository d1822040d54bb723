"""Registration, loading, and switching a loaded model."""

import subprocess
import sys

import pytest
import torch
from hf_models import LAYERS, clip, decoder, logits_of, relerr, token_ids
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5Model,
)

import elsa_serve.hf
from elsa_serve.errors import UsageError
from elsa_serve.hf import NAMES, register, use_attention

IDS = token_ids(1, 9)


def test_public_names():
    assert set(elsa_serve.hf.__all__) == {
        "NAMES", "DenseMaskWarning", "StructuredMask", "register", "use_attention", "use_fp32_linear",
    }  # fmt: skip


def test_registering_again_changes_nothing():
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    register()
    assert before == (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    assert set(NAMES) <= set(before[0])


def test_importing_elsa_serve_does_not_import_transformers():
    code = "import sys, elsa_serve; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_from_pretrained(tmp_path, calls):
    decoder("qwen3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="elsa")
    result = logits_of(model, IDS)
    assert len(calls) == LAYERS
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert relerr(result, logits_of(reference, IDS)) < 2e-6


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_use_attention_restores_what_was(before, calls):
    model = decoder("llama", attention=before)
    with use_attention(model) as same:
        assert same is model
        logits_of(model, IDS)
    assert len(calls) == LAYERS
    logits_of(model, IDS)
    assert len(calls) == LAYERS
    with pytest.raises(KeyError), use_attention(model):
        raise KeyError
    assert model.config._attn_implementation == before


def test_use_attention_restores_sub_models():
    model = clip()
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    with use_attention(model, "elsa"):
        assert model.text_model.config._attn_implementation == "elsa"
        assert model.vision_model.config._attn_implementation == "elsa"
    assert model.config._attn_implementation == "eager"
    assert model.text_model.config._attn_implementation == "sdpa"
    assert model.vision_model.config._attn_implementation == "eager"


def test_use_attention_with_fallback_takes_the_announced_form():
    model = decoder("llama", attention="eager")
    with use_attention(model, fallback="sdpa"):
        assert model.config._attn_implementation == "elsa_or_sdpa"
    with pytest.raises(UsageError, match="'flex'"), use_attention(model, fallback="flex"):
        pass
    with pytest.raises(UsageError, match="'eager'"), use_attention(model, "eager", fallback="sdpa"):
        pass
    with pytest.raises(UsageError, match="not take attention implementation 'elas'"), use_attention(model, "elas"):
        pass
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (
            BloomForCausalLM,
            BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4),
            r"Bloom\w+, Bloom\w+ cannot .* its own code",
        ),
        (  # copied configs
            T5Model,
            T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4),
            "T5Stack cannot .* load it with attn_implementation='elsa'",
        ),
    ],
)
def test_use_attention_refuses_models_it_cannot_switch(model_class, config, message):
    model = model_class._from_config(config, attn_implementation="eager")
    with pytest.raises(UsageError, match=message), use_attention(model):
        pass
    assert model.config._attn_implementation == "eager"


def test_a_cache_filled_by_elsa_serves_eager():
    model = decoder("llama", attention="eager")
    with use_attention(model), torch.no_grad():
        cache = model(IDS[:, :5]).past_key_values
    with torch.no_grad():
        rest = model(IDS[:, 5:], past_key_values=cache).logits
    assert relerr(rest, logits_of(model, IDS)[:, 5:]) < 2e-6
