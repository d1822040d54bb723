"""Masks as numbers against the matrices that transformers builds for the same arguments."""

import warnings

import pytest
import torch
from hf_models import LAYERS, WINDOW, decoder, logits_of, relerr, sharpened, token_ids
from transformers import AutoModelForCausalLM, BloomConfig
from transformers import masking_utils as mu

from elsa_serve.hf.masks import DenseMaskWarning, StructuredMask, elsa_mask, recognise

B = 3
# q_length, kv_length, q_offset, kv_offset
PLACES = {
    "prefill": (7, 7, 0, 0),
    "chunk": (4, 11, 7, 0),
    "decode": (1, 11, 10, 0),
    "static_prefill": (5, 12, 0, 0),
    "static_chunk": (3, 12, 5, 0),
    "static_decode": (1, 12, 8, 0),
    "sliding_chunk": (4, 9, 20, 15),
    "sliding_decode": (1, 6, 20, 15),
}
PATTERNS = {
    "causal": mu.causal_mask_function,
    "full": mu.bidirectional_mask_function,
    "sliding": mu.sliding_window_causal_mask_function(3),
    "sliding_full": mu.sliding_window_bidirectional_mask_function(2),
}
UNKNOWN = {
    "chunked": mu.chunked_causal_mask_function(4, torch.tensor([0, 1, 2])),
    "packed": mu.and_masks(
        mu.causal_mask_function, mu.packed_sequence_mask_function(torch.arange(32).expand(B, 32) // 5)
    ),
    "image_block": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(torch.arange(32).expand(B, 32) // 6)),
    "future_window": mu.sliding_window_overlay(3),
    "custom": lambda b, h, q, k: (k <= q) & (k % 2 == 0),
}


def padding_mask(kind, q_length, kv_length, q_offset, kv_offset):
    if kind == "none":
        return None
    length = q_offset + q_length if kind == "short" else kv_offset + kv_length
    mask = torch.ones(B, length, dtype=torch.bool)
    for row in range(1, B):
        if kind in ("left", "short"):
            mask[row, : kv_offset + row] = False
        elif kind == "right":
            mask[row, length - row :] = False
        elif kind == "hole":
            mask[row, kv_offset + 1 + row] = False
        elif kind == "empty":
            mask[row] = False
    return mask


def both(place, pattern, kind, *, tensor_offset=False):
    """(our mask, transformers' matrix) for the same arguments."""
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    arguments = {
        "batch_size": B,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if tensor_offset else q_offset,
        "kv_offset": kv_offset,
        "mask_function": pattern,
        "attention_mask": padding_mask(kind, *PLACES[place]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseMaskWarning)
        ours = elsa_mask(**arguments, dtype=torch.float32, allow_is_causal_skip=True)
    return ours, mu.sdpa_mask(**arguments, allow_is_causal_skip=False)


@pytest.mark.parametrize("tensor_offset", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("kind", ["none", "left", "right", "short", "empty"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("place", PLACES)
def test_numbers_say_the_same_as_the_matrix(place, pattern, kind, tensor_offset):
    ours, matrix = both(place, PATTERNS[pattern], kind, tensor_offset=tensor_offset)
    assert isinstance(ours, StructuredMask)
    assert ours.shape == matrix.shape
    assert torch.equal(ours.seen(), matrix)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("place", ["prefill", "chunk", "decode", "static_chunk"])
def test_a_hole_in_the_padding_makes_a_matrix(place, pattern):
    ours, matrix = both(place, PATTERNS[pattern], "hole")
    assert not isinstance(ours, StructuredMask)
    assert torch.equal(ours == 0, matrix)
    assert torch.equal(ours == torch.finfo(torch.float32).min, ~matrix)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("pattern", UNKNOWN)
@pytest.mark.parametrize("place", PLACES)
def test_unknown_patterns_make_a_matrix(place, pattern, kind):
    ours, matrix = both(place, UNKNOWN[pattern], kind)
    assert recognise(UNKNOWN[pattern]) is None or pattern == "future_window"
    assert torch.equal(ours == 0, matrix)
    assert isinstance(ours, StructuredMask) == (pattern == "future_window" and PLACES[place][0] == 1)


def test_padding_that_no_query_sees_costs_nothing():
    ours, _ = both("static_prefill", PATTERNS["causal"], "short")
    assert ours.kv_range is not None  # rows 1 and 2 are padded on the left
    q_length, kv_length, _, _ = PLACES["static_prefill"]
    unpadded = torch.ones(B, q_length, dtype=torch.bool)
    mask = elsa_mask(batch_size=B, q_length=q_length, kv_length=kv_length, attention_mask=unpadded)
    assert (mask.causal, mask.q_start, mask.kv_range) == (True, 0, None)


def test_a_million_tokens_take_no_matrix():
    n = 1 << 20
    mask = elsa_mask(batch_size=2, q_length=n, kv_length=n, mask_function=mu.sliding_window_causal_mask_function(4096))
    assert mask.shape == (2, 1, n, n)
    assert (mask.causal, mask.window, mask.q_start, mask.kv_range) == (True, 4096, 0, None)
    assert "window=4096" in repr(mask)


def test_a_matrix_for_a_prefill_is_announced_and_for_a_step_is_not():
    with pytest.warns(DenseMaskWarning, match="dense"):
        elsa_mask(batch_size=1, q_length=4, kv_length=4, mask_function=UNKNOWN["custom"])
    elsa_mask(batch_size=1, q_length=1, kv_length=4, q_offset=3, mask_function=UNKNOWN["custom"])


def test_operations_on_the_mask_compute_on_the_matrix():
    mask, seen = both("chunk", PATTERNS["sliding"], "left")
    matrix = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    scores = torch.randn(B, 2, 4, 11)
    assert torch.equal(scores + mask, scores + matrix)
    assert torch.equal(mask[:, :, 1:, :3], matrix[:, :, 1:, :3])
    assert torch.equal(mask == 0, seen)
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([matrix, matrix], -1))
    assert type(mask + 1) is torch.Tensor
    with pytest.raises(RuntimeError, match="bool"):  # taken for a boolean mask: loud, not wrong
        scores.masked_fill(mask, 0.0)


def test_moving_the_mask_keeps_it_structured():
    mask, matrix = both("chunk", PATTERNS["sliding"], "left")
    for same in (mask.clone(), mask.detach(), mask.to(torch.device("cpu"), copy=True), mask.half()):
        assert isinstance(same, StructuredMask)
        assert torch.equal(same.seen(), matrix)
    assert mask.half().dtype == mask.half().dense().dtype == torch.float16
    assert isinstance(mask.to("meta"), StructuredMask)
    assert mask.to("meta").kv_range.device.type == "meta"


def test_packed_sequences_do_not_see_each_other(calls):
    """position_ids that start again are how transformers packs sequences into one row."""
    model, first, second = decoder("mistral"), token_ids(1, 9), token_ids(1, 8, seed=1)
    positions = torch.cat([torch.arange(9), torch.arange(8)]).unsqueeze(0)
    with pytest.warns(DenseMaskWarning):
        packed = logits_of(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    assert all(call["bias"] is not None for call in calls)
    alone = torch.cat([logits_of(model, first), logits_of(model, second)], 1)
    assert relerr(packed, alone) < 2e-6


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_ready_made_mask_is_used_as_it_is(form, calls):
    """A prefix that sees itself in both directions, then causal."""
    model, ids = decoder("llama"), token_ids(2, 11)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[:4, :4] = True
    matrix = seen.expand(2, 1, 11, 11)
    additive = torch.zeros(2, 1, 11, 11).masked_fill(~matrix, torch.finfo(torch.float32).min)
    result = logits_of(model, ids, attention_mask=matrix if form == "bool" else additive)
    assert len(calls) == LAYERS
    model.set_attn_implementation("eager")
    assert relerr(result, logits_of(model, ids, attention_mask=additive)) < 2e-6
    assert relerr(result, logits_of(model, ids)) > 1e-2  # so the mask matters


def test_the_window_matters():
    model, ids = decoder("mistral"), token_ids(1, 2 * WINDOW)
    windowed = logits_of(model, ids)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert relerr(logits_of(model, ids), windowed) > 1e-2


def test_a_model_with_its_own_attention_gets_the_right_mask(calls):
    """Bloom takes the implementation's mask, slices it and adds it to its scores: right, though elsa does not run."""
    config = BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    ids, mask = token_ids(2, 9), torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    results = []
    for attention in ("elsa", "eager"):
        torch.manual_seed(0)
        model = sharpened(AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())
        results.append(logits_of(model, ids, attention_mask=mask))
    assert not calls
    assert torch.equal(*results)
