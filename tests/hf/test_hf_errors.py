"""What elsa refuses, in words with a remedy, and what elsa_or_sdpa does instead."""

import copy
import warnings

import elsa_kernels
import pytest
import torch
from elsa_kernels import FallbackWarning, UnsupportedProblem
from hf_models import decoder, logits_of, padding, token_ids
from transformers.masking_utils import create_causal_mask

from elsa_serve.errors import UsageError
from elsa_serve.hf import attention as hf_attention
from elsa_serve.hf.attention import elsa_attention, elsa_or_sdpa_attention
from elsa_serve.hf.masks import elsa_mask

IDS = token_ids(2, 9)


class Layer(torch.nn.Module):
    """As much of an attention layer as the attention function looks at."""

    is_causal = True
    layer_idx = 3


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch):
    monkeypatch.setattr(hf_attention, "_announced", set())


def qkv(Nq=4, Nk=4):
    torch.manual_seed(0)
    return torch.randn(2, 4, Nq, 16), torch.randn(2, 2, Nk, 16), torch.randn(2, 2, Nk, 16)


def test_training_is_refused_at_the_forward():
    model = decoder("llama").train()
    with pytest.raises(UsageError, match=r"no backward pass.*model\.eval\(\).*elsa_or_sdpa"):
        model(IDS)
    with torch.no_grad():
        model(IDS)


def test_backward_is_refused_where_the_forward_was_inference():
    loss = decoder("llama")(IDS).logits.sum()
    with pytest.raises(UsageError, match=r"no backward pass.*no_grad"):
        loss.backward()


def test_dropout_is_refused():
    with pytest.raises(UsageError, match=r"no dropout \(got 0\.1\).*model\.eval"):
        elsa_attention(Layer(), *qkv(), None, dropout=0.1)


@pytest.mark.parametrize("attention", ["elsa", "elsa_or_sdpa"])
def test_attention_weights_are_refused(attention):
    model = decoder("llama", attention=attention)
    with pytest.raises(UsageError, match=r"output_attentions=True.*eager"):
        logits_of(model, IDS, output_attentions=True)
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True


def test_a_mask_of_another_length_is_refused():
    mask = elsa_mask(batch_size=2, q_length=4, kv_length=6, q_offset=2)
    with pytest.raises(UsageError, match=r"\[2, 4, 6\] but \[2, 4, 5\] in layer 3"):
        elsa_attention(Layer(), *qkv(4, 5), mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, 1, 4, 4, dtype=torch.long), torch.ones(2, 1, 4, 3)])
def test_masks_of_other_kinds_are_refused(mask):
    with pytest.raises(UsageError, match=r"boolean or additive mask \[B, 1, 4, 4\].*2D padding mask to the model"):
        elsa_attention(Layer(), *qkv(), mask)


def test_packed_sequences_without_a_mask_are_refused():
    """They would see each other: FlashAttention's own arguments carry what the mask lacks."""
    with pytest.raises(UsageError, match=r"cu_seq_lens_q.*position_ids"):
        elsa_attention(Layer(), *qkv(), None, cu_seq_lens_q=torch.tensor([0, 2, 4]))


def test_a_bidirectional_window_without_a_mask_is_refused():
    with pytest.raises(UsageError, match="bidirectional sliding windows"):
        elsa_attention(Layer(), *qkv(), None, is_causal=False, sliding_window=3)


def test_shapes_no_kernel_takes_are_an_error_with_the_reason(monkeypatch):
    def refuse(*args, **kwargs):
        raise UnsupportedProblem("head dimension 512 is not built")

    monkeypatch.setattr(elsa_kernels, "attention", refuse)
    with pytest.raises(UnsupportedProblem, match="head dimension 512"):
        logits_of(decoder("llama"), IDS)
    model = decoder("llama", attention="elsa_or_sdpa")
    with pytest.warns(FallbackWarning, match=r"sdpa runs instead of elsa: head dimension 512") as seen:
        result = logits_of(model, IDS, attention_mask=padding("left", *IDS.shape))
    assert len(seen) == 1, "said once, not once a layer"
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(result[0], logits_of(model, IDS, attention_mask=padding("left", *IDS.shape))[0])


def test_elsa_or_sdpa_runs_elsa_where_it_can(calls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(decoder("gemma2", attention="elsa_or_sdpa"), IDS)
    assert calls


def test_elsa_or_sdpa_trains_with_the_gradients_of_sdpa(calls):
    gradients = []
    for attention in ("sdpa", "elsa_or_sdpa"):
        model = copy.deepcopy(decoder("mistral", attention=attention)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            model(IDS, attention_mask=padding("right", *IDS.shape)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert not calls
    assert gradients[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_does_not_stand_in_where_it_would_be_wrong():
    """SDPA drops softcap and sinks in silence."""
    with pytest.raises(UsageError, match=r'SDPA cannot stand in.*attn_implementation="eager"'):
        decoder("gemma2", attention="elsa_or_sdpa").train()(IDS)
    with pytest.raises(UsageError, match="SDPA cannot stand in"):
        elsa_or_sdpa_attention(Layer(), *qkv(), None, dropout=0.1, s_aux=torch.zeros(4))
    with pytest.raises(ValueError, match="does not support"):  # transformers' own check, which goes by the name
        decoder("gpt_oss", attention="elsa_or_sdpa")


def test_without_a_mask_the_last_query_is_at_the_last_key(calls):
    q, k, v = qkv(2, 6)
    out, weights = elsa_attention(Layer(), q, k, v, None)
    assert weights is None
    expected = elsa_kernels.reference.attention_reference(q, k, v, causal=True, q_start=4).float().transpose(1, 2)
    torch.testing.assert_close(out, expected)
    full, _ = elsa_attention(Layer(), q, k, v, None, is_causal=False)
    expected = elsa_kernels.reference.attention_reference(q, k, v).float().transpose(1, 2)
    torch.testing.assert_close(full, expected)


def test_position_bias_joins_numbers_and_matrices():
    q, k, v = qkv()
    bias = torch.randn(1, 4, 4, 4)
    mask = elsa_mask(batch_size=2, q_length=4, kv_length=4)
    expected = elsa_kernels.reference.attention_reference(q, k, v, causal=True, bias=bias).float().transpose(1, 2)
    for form in (mask, mask.dense()):
        torch.testing.assert_close(elsa_attention(Layer(), q, k, v, form, position_bias=bias)[0], expected)


def test_a_custom_mask_function_reaches_the_model():
    """transformers' own way to change a mask: here, tokens 0 … 3 see each other."""
    model = decoder("llama")
    embeddings = model.get_input_embeddings()(IDS)
    results = []
    for attention in ("elsa", "eager"):
        model.set_attn_implementation(attention)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = create_causal_mask(
                model.config, embeddings, None, None, or_mask_function=lambda b, h, q, k: (q < 4) & (k < 4)
            )
        results.append(logits_of(model, IDS, attention_mask=mask))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
