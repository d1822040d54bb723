"""The models people ask for, by the same code: tiny random ones of each family give transformers' own greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import COMMON, generate, make_engine, plan_as_for_a_cpu, prompt_of, save_tokenizer, tokens_of

from elsa_serve.errors import UsageError
from elsa_serve.offload.loading import EngineOptions, plan_only

SHORT = {"max_position_embeddings": 64}  # stretched by the scaling to what the prompts need
UNTIED = {"tie_word_embeddings": False}  # a random tied model repeats its last token, whatever it attends to
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4}),
    "llama-3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", SHORT | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}),
    "llama-yarn": (
        "llama",
        SHORT
        | {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen-2": ("qwen2", {}),
    "qwen-3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", UNTIED),
    "gemma-2": (
        "gemma2",
        {
            "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0, **UNTIED,
        },
    ),
    "gemma-3": (
        "gemma3_text",
        {"sliding_window": 24, "query_pre_attn_scalar": 16, "sliding_window_pattern": 3, **UNTIED},
    ),
}  # fmt: skip
PROMPT, COUNT = 130, 8


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model under transformers, eager; its checkpoint in `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = FAMILIES[name]
    config = AutoConfig.for_model(family, **COMMON | {"num_hidden_layers": 4} | changes)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    make_all_count(model)
    model.to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return model.float()


def make_all_count(model: Any) -> None:
    """Norms and biases begin as ones and zeros, and some models draw matrices too small to decide a token."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim == 1 else 0.15 if parameter.std() < 0.1 else 0.0
            parameter += scale * torch.randn_like(parameter)


def too_small_for_the_kv(directory: Path, options: dict[str, Any]) -> int:
    """Bytes on the device that lack one for everything planned, so that some KV must lie in host memory."""
    ample = plan_only(
        EngineOptions(model_dir=directory, max_batch=1, gpu_memory="64MiB", **options | {"device": "cpu"})
    )
    return sum(ample.gpu_bytes.values()) - 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_tokens_are_transformers(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elsa_serve.offload.loading.make_plan", plan_as_for_a_cpu)
    model = save(name, tmp_path)
    prompt = prompt_of(PROMPT, seed=5)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    options: dict[str, Any] = {"device": device, "context": 256, "resident_layers": 1, "slots": 2, "chunk_tokens": 48}
    engine = make_engine(tmp_path, max_batch=1, gpu_memory=too_small_for_the_kv(tmp_path, options), **options)
    try:
        assert engine.plan.kv_host_bytes > 0
        assert engine.plan.streamed_layers == 3
        tokens = tokens_of(generate(engine, prompt, max_tokens=COUNT))
        assert tokens == out[0, PROMPT:].tolist()
        assert len(set(tokens)) > 2 or model.config.tie_word_embeddings
    finally:
        engine.shutdown()


def test_a_multimodal_model_is_served_by_its_language_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The larger Gemma 3 are published with a vision tower, whose language model is stored under a name of its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=COMMON | {"num_hidden_layers": 4} | FAMILIES["gemma-3"][1],
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        **UNTIED,
    )
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration(config).float().eval()
    make_all_count(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    prompt = prompt_of(PROMPT, seed=5)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    engine = make_engine(tmp_path, context=256, resident_layers=1, max_batch=1)
    try:
        tokens = tokens_of(generate(engine, prompt, max_tokens=COUNT))
    finally:
        engine.shutdown()
    assert tokens == out[0, PROMPT:].tolist()
    assert len(set(tokens)) > 2
    assert "served by its language model alone" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-3", "gemma-3"])
def test_half_precision_stays_near_the_same_weights_in_fp32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every token's logit, by transformers in FP32 on the same rounded weights, is within rounding of the best."""
    model = save(name, tmp_path, dtype)
    prompt = prompt_of(PROMPT, seed=6)
    engine = make_engine(tmp_path, context=256, resident_layers=0, chunk_tokens=48, max_batch=1)
    try:
        assert engine.info.dtype == str(dtype).removeprefix("torch.")
        tokens = tokens_of(generate(engine, prompt, max_tokens=COUNT))
    finally:
        engine.shutdown()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, PROMPT - 1 :]
    spread = logits.max(-1).values - logits.min(-1).values
    lost = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    bound = 0.05 if dtype == torch.bfloat16 else 0.01  # several roundings of the dtype, as a part of the spread
    assert len(tokens) == COUNT
    assert bool((lost <= bound * spread).all()), (lost / spread).tolist()


def test_a_rope_that_changes_with_the_batch_is_refused_where_it_would_act(tmp_path: Path) -> None:
    save("llama-dynamic", tmp_path)
    with pytest.raises(UsageError, match=r"rope_type 'dynamic' .* beyond 256 tokens: .*Pass --context 256 or less"):
        make_engine(tmp_path, context=257)
    make_engine(tmp_path, context=256).shutdown()
