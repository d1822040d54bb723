"""Logits of every decoder family against FP64, with padding, in chunks, and through every kind of cache."""

import copy

import pytest
import torch
from hf_models import DECODERS, LAYERS, decoder, padding, relerr, token_ids
from transformers import DynamicCache, StaticCache

ROWS, LENGTH = 3, 21
BOUND = {torch.float32: 2e-6, torch.float64: 1e-9}


@torch.no_grad()
def logits(model, attention, dtype, ids, **inputs):
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    return model(ids, **inputs).logits


@pytest.mark.parametrize("family", DECODERS)
def test_the_truth_is_transformers_eager_attention(family):
    model, ids = decoder(family), token_ids(ROWS, LENGTH)
    truth = logits(model, "truth", torch.float64, ids)
    # eager rounds its weights to float32 even in a float64 model
    assert relerr(logits(model, "eager", torch.float64, ids), truth) < 1e-6
    assert relerr(logits(model, "eager", torch.float32, ids), truth) < BOUND[torch.float32]


@pytest.mark.parametrize("sides", ["none", "left", "right"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_logits(family, sides, dtype, device, calls):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels take float64 on the CPU only")
    model, ids, mask = decoder(family).to(device), token_ids(ROWS, LENGTH).to(device), padding(sides, ROWS, LENGTH)
    mask = None if mask is None else mask.to(device)
    truth = logits(model, "truth", torch.float64, ids, attention_mask=mask)

    result = logits(model, "elsa", dtype, ids, attention_mask=mask)

    assert relerr(result, truth, mask) < BOUND[dtype]
    assert len(calls) == LAYERS
    assert all(call["bias"] is None and call["causal"] for call in calls), "a matrix was built where numbers do"


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(("family", "sides"), [*((f, "left") for f in DECODERS), ("llama", "none"), ("gemma2", "none")])
def test_chunked_prefill_through_a_cache(family, static, sides, device, calls):
    model, ids, mask = decoder(family).to(device), token_ids(ROWS, LENGTH).to(device), padding(sides, ROWS, LENGTH)
    mask = None if mask is None else mask.to(device)
    truth = logits(model, "truth", torch.float64, ids, attention_mask=mask)
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)

    parts, start = [], 0
    for n in (9, 1, 7, 1, 1, 2):
        with torch.no_grad():
            past = None if mask is None else mask[:, : start + n]
            parts.append(model(ids[:, start : start + n], attention_mask=past, past_key_values=cache).logits)
        start += n

    assert start == LENGTH
    assert relerr(torch.cat(parts, 1), truth, mask) < BOUND[torch.float32]
    assert len(calls) == 6 * LAYERS
    assert all(call["bias"] is None for call in calls)


def test_half_precision_stays_in_half_precision(device):
    model, ids = decoder("llama").to(device), token_ids(1, LENGTH).to(device)
    truth = logits(model, "truth", torch.float64, ids)
    for dtype, bound in ((torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        result = logits(model, "elsa", dtype, ids)
        assert result.dtype == dtype
        assert relerr(result, truth) < bound
