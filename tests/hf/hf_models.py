"""Tiny random models of each family, and an FP64 attention that is neither ours nor rounded."""

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    ViTConfig,
)
from transformers.masking_utils import sdpa_mask

WINDOW = 6  # shorter than every sequence tested
LAYERS = 2
VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 32}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

DECODERS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gemma2": lambda: Gemma2Config(
        **GROUPED, sliding_window=WINDOW, attn_logit_softcapping=3.0, query_pre_attn_scalar=32, attention_dropout=0.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1, rope_parameters=ROPE
    ),
    # latent attention: queries and keys of 24, values of 16
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=LAYERS,
        rope_parameters=ROPE,
    ),
}

ENCODERS = {
    "bert": lambda: BertConfig(**{k: v for k, v in COMMON.items() if k != "eos_token_id"}),
    "vit": lambda: ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=20,
        patch_size=4,
    ),
}


def decoder(family, *, attention="elsa", seed=0):
    """A random causal LM in float32, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        DECODERS[family](), attn_implementation=attention, experts_implementation="eager"
    )
    return sharpened(model.eval())


def encoder(family, *, attention="elsa", seed=0):
    torch.manual_seed(seed)
    return sharpened(AutoModel.from_config(ENCODERS[family](), attn_implementation=attention).eval())


def clip():
    text = {**COMMON, "eos_token_id": 2}
    vision = {
        "image_size": 20,
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
    }
    config = CLIPConfig(text_config=text, vision_config={**vision, "num_attention_heads": 4}, projection_dim=32)
    torch.manual_seed(0)
    return sharpened(AutoModel.from_config(config, attn_implementation="elsa").eval())


@torch.no_grad()
def sharpened(model):
    """Initial weights are so small that attention is nearly uniform, and then a wrong mask hardly shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8)
        elif name.endswith("sinks"):
            parameter.normal_()
    return model


def token_ids(rows, length, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(kind, rows, length):
    """A 2D mask in which row b lacks 3·b tokens on one side; kind "none" gives None."""
    if kind == "none":
        return None
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        lacking = slice(None, 3 * row) if kind == "left" else slice(length - 3 * row, None)
        mask[row, lacking] = 0
    return mask


def relerr(result, truth, where=None):
    """‖result − truth‖ / ‖truth‖ over the positions [B, N] that count."""
    result, truth = result.double().cpu(), truth.double().cpu()
    if where is not None:
        result, truth = result[where.bool().cpu()], truth[where.bool().cpu()]
    return ((result - truth).norm() / truth.norm()).item()


def truth_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """softmax(q·k)·v in the dtype of its inputs: transformers' eager attention rounds the weights to float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)  # rows that see nothing
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2).contiguous(), None


def truth_mask(**kwargs):
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("truth", truth_attention)
AttentionMaskInterface.register("truth", truth_mask)


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(ids, **inputs).logits
