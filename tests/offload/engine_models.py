"""Tiny random models of four families, saved as checkpoints with a byte tokenizer, and short ways to run an engine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.plan import CUDA_CONTEXT, Plan, make_plan
from elsa_serve.protocol import GenerationRequest, SamplingParams, TokenEvent, stream

VOCAB = 384  # 256 bytes and room for special tokens
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # wide enough that attention decides the next token
    "eos_token_id": 300,
    "bos_token_id": 301,
    "pad_token_id": 302,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0,
        "tie_word_embeddings": False,
    },
}
# The oracle of tests with requests in company: each alone on the device, by torch's attention, in half the time.
PLAIN: dict[str, Any] = {
    "resident_layers": COMMON["num_hidden_layers"],
    "chunk_tokens": 512,
    "prefix_caching": False,
    "num_speculative_tokens": 0,
    "attention": "sdpa",
    "fused": True,
}
_ids = itertools.count()


def make_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **COMMON | FAMILIES[family] | changes)


def save_tokenizer(directory: Path) -> None:
    """A token a byte, and special tokens from 300 on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_symbols = _bytes_to_symbols()
    vocab = {byte_symbols[i]: i for i in range(256)}
    vocab |= {f"<unused{i}>": i for i in range(256, VOCAB)}
    assert set(alphabet) == set(byte_symbols)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unused300>")
    fast.save_pretrained(directory)


def _bytes_to_symbols() -> list[str]:
    """Byte-level BPE's printable symbol for each byte, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(i) if i in printable else chr(next(others)) for i in range(256)]


@functools.cache
def _reference(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(hash_of(family))
    model = AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def hash_of(text: str) -> int:
    return sum(text.encode())


def reference(family: str) -> Any:
    """The same model under transformers, eager, FP32."""
    return _reference(family)


def save_checkpoint(family: str, directory: Path) -> Path:
    reference(family).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def make_engine(directory: Path, **options: Any) -> OffloadEngine:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "gpu_memory": "64MiB",
        "host_memory": "64MiB",
        "context": 512,
        "max_batch": 4,
        "progress": False,
    }
    return OffloadEngine(directory, **defaults | options)


def plan_as_for_a_cpu(geometry: Geometry, *, gpu_budget: int, **options: Any) -> Plan:
    """In place of `make_plan`: kilobytes place a tiny model on a GPU too, although its allocator deals in megabytes."""
    device_type = options.pop("device_type")
    plan = make_plan(geometry, gpu_budget=gpu_budget, device_type="cpu", **options)
    context = CUDA_CONTEXT if device_type == "cuda" else 0
    return replace(
        plan, gpu_budget=gpu_budget + context + (512 << 20), gpu_bytes=plan.gpu_bytes | {"CUDA context": context}
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def request_of(prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    params = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True} | sampling
    deadline_s = params.pop("deadline_s", None)
    return GenerationRequest(f"r{next(_ids)}", prompt, SamplingParams(**params), deadline_s=deadline_s)


def generate(engine: OffloadEngine, prompt: Sequence[int], **sampling: Any) -> list[TokenEvent]:
    return list(stream(engine, request_of(prompt, **sampling)))


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def text_of(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)
