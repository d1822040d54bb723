"""Generation token by token as with eager attention: every family, every kind of cache, compiled or not."""

import pytest
import torch
from hf_models import DECODERS, LAYERS, decoder, padding, relerr, token_ids
from torch._dynamo.utils import counters
from transformers import CompileConfig

ROWS, PROMPT, NEW = 2, 13, 8


def generate(model, attention, ids, mask, **options):
    model.set_attn_implementation(attention)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_equal_eager(family, cache, device, calls):
    model, ids = decoder(family).to(device), token_ids(ROWS, PROMPT).to(device)
    mask = padding("left", ROWS, PROMPT).to(device)
    # On a GPU a static cache would compile the model; the compiled form has its own test.
    expected = generate(model, "eager", ids, mask, cache_implementation=cache, disable_compile=True)
    assert not calls

    result = generate(model, "elsa", ids, mask, cache_implementation=cache, disable_compile=True)

    assert result.shape == (ROWS, PROMPT + NEW)
    assert torch.equal(result, expected)
    assert len(calls) == NEW * LAYERS
    assert all(call["bias"] is None for call in calls)


def test_right_padded_prompts_decode_with_a_hole(calls):
    """After right padding the keys of a row are not contiguous: a dense row mask per step, and the same tokens."""
    model, ids, mask = decoder("llama"), token_ids(ROWS, PROMPT), padding("right", ROWS, PROMPT)
    expected = generate(model, "eager", ids, mask)
    assert torch.equal(generate(model, "elsa", ids, mask), expected)
    prefill, decode = calls[:LAYERS], calls[LAYERS:]
    assert all(call["bias"] is None for call in prefill)
    assert all(call["bias"].shape == (ROWS, 1, 1, PROMPT + 1) for call in decode[:LAYERS])


def test_beam_search_and_sampling_equal_eager():
    model, ids = decoder("mistral"), token_ids(ROWS, PROMPT)
    beams = [generate(model, name, ids, padding("left", ROWS, PROMPT), num_beams=3) for name in ("eager", "elsa")]
    assert torch.equal(*beams)
    samples = []
    for name in ("eager", "elsa"):
        model.set_attn_implementation(name)
        torch.manual_seed(5)
        samples.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=0.8))
    assert torch.equal(*samples)


def test_continuing_a_conversation_from_its_cache():
    model, ids = decoder("gemma2"), token_ids(1, PROMPT)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    result = model.generate(more, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(result, generate(model, "eager", more, None)[:, : more.shape[1] + 4])


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("gemma2", 2)])
def test_compiled_decode_with_a_static_cache_compiles_once(family, graphs):
    """One graph serves every decode step; a sliding cache needs a second one from the step that fills it."""
    model, ids, mask = decoder(family), token_ids(ROWS, PROMPT), padding("left", ROWS, PROMPT)
    expected = generate(model, "eager", ids, mask)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()

    result = generate(model, "elsa", ids, mask, cache_implementation="static", compile_config=config)

    assert torch.equal(result, expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default:TensorFloat32 tensor cores:UserWarning")  # torch's advice; FP32 stays FP32 here
@pytest.mark.filterwarnings("default:The CUDA Graph is empty:UserWarning")  # torch opens its pool with an empty graph
def test_compiled_decode_on_a_gpu_equals_eager():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, ids = decoder("llama").cuda(), token_ids(ROWS, PROMPT).cuda()
    mask = padding("left", ROWS, PROMPT).cuda()
    expected = generate(model, "eager", ids, mask)
    assert torch.equal(generate(model, "elsa", ids, mask, cache_implementation="static"), expected)


@pytest.mark.parametrize("inputs", ["plain", "no_cache", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_forward_is_one_graph(family, inputs):
    model, ids = decoder(family), token_ids(ROWS, PROMPT)
    mask = padding("left", ROWS, PROMPT) if inputs == "padded" else None
    options = {"attention_mask": mask, "use_cache": inputs != "no_cache"}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, **options).logits
        result = torch.compile(model, backend="eager", fullgraph=True)(ids, **options).logits
    assert relerr(result, expected, mask) < 2e-6
