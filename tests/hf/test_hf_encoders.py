"""Encoders: bidirectional attention with and without padding, for text and images."""

import copy

import pytest
import torch
from hf_models import LAYERS, clip, encoder, padding, relerr, token_ids
from transformers import T5Config, T5Model

from elsa_serve.hf.masks import DenseMaskWarning

BOUND = 2e-6


@torch.no_grad()
def hidden(model, attention, dtype, **inputs):
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model(**inputs)


@pytest.mark.parametrize("sides", ["none", "left", "right"])
def test_bert(sides, device, calls):
    model, ids, mask = encoder("bert").to(device), token_ids(3, 17).to(device), padding(sides, 3, 17)
    mask = None if mask is None else mask.to(device)
    truth, result = (
        hidden(model, name, dtype, input_ids=ids, attention_mask=mask).last_hidden_state
        for name, dtype in (("truth", torch.float64), ("elsa", torch.float32))
    )
    assert relerr(result, truth, mask) < BOUND
    assert len(calls) == LAYERS
    assert all(call["bias"] is None and not call["causal"] for call in calls)


def test_bert_with_a_hole_in_its_mask(calls):
    model, ids, mask = encoder("bert"), token_ids(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, 5:8] = 0
    truth = hidden(model, "truth", torch.float64, input_ids=ids, attention_mask=mask).last_hidden_state
    with pytest.warns(DenseMaskWarning):
        result = hidden(model, "elsa", torch.float32, input_ids=ids, attention_mask=mask).last_hidden_state
    assert relerr(result, truth, mask) < BOUND
    assert all(call["bias"].shape == (2, 1, 17, 17) for call in calls)


def test_vit(device, calls):
    model, pixels = encoder("vit").to(device), torch.randn(2, 3, 20, 20).to(device)
    truth = hidden(model, "truth", torch.float64, pixel_values=pixels).last_hidden_state
    result = hidden(model, "elsa", torch.float32, pixel_values=pixels).last_hidden_state
    assert relerr(result, truth) < BOUND
    assert len(calls) == LAYERS
    assert not any(call["causal"] for call in calls)


def test_clip_has_a_causal_and_a_full_tower(calls):
    model = clip()
    inputs = {
        "input_ids": token_ids(2, 11),
        "attention_mask": padding("right", 2, 11),
        "pixel_values": torch.randn(2, 3, 20, 20),
    }
    truth = hidden(model, "truth", torch.float64, **inputs).logits_per_image
    result = hidden(model, "elsa", torch.float32, **inputs).logits_per_image
    assert relerr(result, truth) < BOUND
    assert [call["causal"] for call in calls].count(True) == LAYERS
    assert [call["causal"] for call in calls].count(False) == LAYERS


def test_t5_adds_its_position_bias_and_attends_across(calls):
    config = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_heads": 4}
    inputs = {"input_ids": token_ids(2, 11), "attention_mask": padding("right", 2, 11)}
    results = {}
    for attention in ("elsa", "eager"):
        torch.manual_seed(0)
        model = T5Model._from_config(T5Config(**config), attn_implementation=attention).eval()
        with torch.no_grad():
            results[attention] = model(**inputs, decoder_input_ids=token_ids(2, 7, seed=1)).last_hidden_state
    assert relerr(results["elsa"], results["eager"]) < BOUND
    assert len(calls) == 3 * LAYERS  # encoder, decoder, and the decoder across to the encoder
