"""vLLM's engine, in this process, with ELSA and with vLLM's own CPU attention: the same tokens for all kinds of models.

The test with drafts by n-grams stays last: vLLM cannot start another engine in a process where they loaded numba.
"""

import gc
import shutil

import pytest
import torch
from vllm_support import DEMO_MODEL, needs_vllm, others_may_warn

from elsa_serve.demo import make_document
from elsa_serve.vllm_plugin.verify import NotActive, assert_active

pytestmark = [needs_vllm, others_may_warn]

SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": SMALL | {"architectures": ["LlamaForCausalLM"]},
    "mistral": SMALL | {"architectures": ["MistralForCausalLM"], "sliding_window": 32},
    "gemma2": SMALL
    | {
        "architectures": ["Gemma2ForCausalLM"], "sliding_window": 48, "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"], "vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4,
        "seq_length": 1024, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bert": {
        "architectures": ["BertModel"], "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 512, "initializer_range": 0.2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a small checkpoint with random weights that are large enough for errors to show."""
    made = {}

    def make(name):
        if name not in made:
            import transformers

            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(name, **MODELS[name])
            kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
            made[name] = tmp_path_factory.mktemp(name)
            kind.from_config(config, dtype=torch.float32).save_pretrained(made[name])
            for file in DEMO_MODEL.glob("tokenizer*.json"):  # vLLM's embeddings want one
                shutil.copy(file, made[name])
        return str(made[name])

    return make


def run(directory, backend, work, **options):
    """What `work` finds with an engine that is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "seed": 0,
        "skip_tokenizer_init": True, "attention_backend": backend,
    }  # fmt: skip
    before = steps_so_far()
    llm = LLM(directory, **(defaults | options))
    try:
        found = work(llm)
        assert (steps_so_far() > before) == (backend == "ELSA")
        return found
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def steps_so_far():
    try:
        return assert_active().steps
    except NotActive:
        return 0


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [{"prompt_token_ids": torch.randint(3, 500, (n,), generator=generator).tolist()} for n in lengths]


def greedy(llm):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, detokenize=False)
    answers = [one.outputs[0] for one in llm.generate(prompts(5, 70, 200), params, use_tqdm=False)]
    scores = [max(entry.logprob for entry in step.values()) for one in answers for step in one.logprobs]
    return [list(one.token_ids) for one in answers], torch.tensor(scores)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"max_num_batched_tokens": 64}),
        ("mistral", {}),
        ("gemma2", {}),
        ("bloom", {}),
    ],
    ids=["chunked prefill", "sliding windows", "softcap", "ALiBi"],
)
def test_greedy_tokens_are_those_of_vllms_own_attention(model, name, options):
    tokens, scores = run(model(name), "ELSA", greedy, **options)
    expected_tokens, expected_scores = run(model(name), "CPU_ATTN", greedy)
    assert tokens == expected_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=2e-4)


def test_encoder_only_embeddings(model):
    def embed(llm):
        return torch.tensor([one.outputs.embedding for one in llm.embed(prompts(5, 70, 200), use_tqdm=False)])

    options = {"runner": "pooling", "skip_tokenizer_init": False}
    found = run(model("bert"), "ELSA", embed, **options)
    torch.testing.assert_close(found, run(model("bert"), "CPU_ATTN", embed, **options), rtol=0, atol=2e-6)


def test_an_fp8_cache_in_the_engine(model):
    """FP8 changes tokens: what is asked is that logits of the first token stay near those of the full cache."""
    tokens, scores = run(model("llama"), "ELSA", greedy, kv_cache_dtype="fp8")
    exact_tokens, exact_scores = run(model("llama"), "ELSA", greedy)
    assert len(tokens) == len(exact_tokens)
    assert not torch.equal(scores, exact_scores)  # the cache really is FP8
    first = slice(None, None, 8)
    torch.testing.assert_close(scores[first], exact_scores[first], rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache in fp8_e5m2"),
        ({"kv_cache_dtype": "bfloat16"}, "KV cache in bfloat16"),
    ],
)
def test_refusals_reach_the_user(model, options, words):
    with pytest.raises(Exception, match=words):
        run(model("llama"), "ELSA", greedy, **options)


def test_the_demo_model_reads_a_long_document_and_drafts_are_verified():
    """A made-up code hidden in a document, in chunks; then with drafts, several tokens verified at once: the same."""
    from vllm import SamplingParams

    document = make_document(1500, 3, depth=0.3, measure=lambda line: len(line) // 4)

    def answer(llm):
        conversation = [{"role": "user", "content": document.prompt}]
        params = SamplingParams(temperature=0, max_tokens=40)
        return llm.chat(conversation, params, use_tqdm=False)[0].outputs[0].text

    options = {"skip_tokenizer_init": False, "max_model_len": 4096, "max_num_batched_tokens": 512}
    text = run(str(DEMO_MODEL), "ELSA", answer, **options)
    assert document.answer in text
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert run(str(DEMO_MODEL), "ELSA", answer, speculative_config=drafts, **options) == text
