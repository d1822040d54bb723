"""LLaMA in float64 on the weights of a running vLLM model: what its logits are held against.

These functions run inside vLLM's worker (`LLM.apply_model`), on its modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

DRAWN_STD = 0.02
HEADS_AT_ONCE = 8


@torch.inference_mode()
def draw_weights(model: torch.nn.Module) -> None:
    """Normal weights of the size that LLaMA starts training with, the same for every backend: vLLM's own dummy weights
    are so small that attention is uniform and no error shows. On tensor parallel ranks each slice of a weight is the
    slice that one GPU would hold."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)  # norms
            continue
        parameter.copy_(_slice(model, name, parameter))
    for module in model.modules():
        if hasattr(module, "elsa_planes"):  # --quantization elsa_fp32 keeps its weights in another form
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]


def _slice(model: torch.nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of the whole weight `name`."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    rows, columns = parameter.shape
    if type(owner).__name__ == "RowParallelLinear":  # o_proj, down_proj: the inner dimension is shared out
        whole = _normal((rows, columns * size), parameter, generator)
        return whole[:, rank * columns : (rank + 1) * columns]
    pieces = []
    for height, copies in _parts(owner, rows):  # q, k, v or gate, up: each is shared out for itself
        whole = _normal((height * (size // copies), columns), parameter, generator)
        at = rank // copies
        pieces.append(whole[at * height : (at + 1) * height])
    return torch.cat(pieces)


def _parts(owner: Any, rows: int) -> list[tuple[int, int]]:
    """Heights of the weights stacked in one, each with the number of ranks that hold the same slice of it."""
    if hasattr(owner, "num_kv_head_replicas"):
        head = owner.head_size
        keys = owner.num_kv_heads * head
        return [(owner.num_heads * head, 1), (keys, owner.num_kv_head_replicas), (keys, owner.num_kv_head_replicas)]
    if hasattr(owner, "output_sizes") and len(owner.output_sizes) > 1:
        return [(rows // len(owner.output_sizes), 1)] * len(owner.output_sizes)
    return [(rows, 1)]


def _normal(shape: tuple[int, int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Drawn in float32, whatever the weight's dtype: the same numbers, rounded."""
    drawn = torch.empty(shape, dtype=torch.float32, device=like.device).normal_(0, DRAWN_STD, generator=generator)
    return drawn.to(like.dtype)


@torch.inference_mode()
def logits(model: Any, tokens: list[int], last: int, linear: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits [last, vocabulary] float64, on the CPU, after each of the last positions of one sequence.

    linear: what linear layers compute in; all else is float64, on the engine's own weights.
    """
    body = model.model
    weight = body.embed_tokens.weight

    def product(x: torch.Tensor, module: Any) -> torch.Tensor:
        matrix = _drawn_again(model, module) if hasattr(module, "elsa_planes") else module.weight
        return (x.to(linear) @ matrix.to(linear).T).double()

    x = weight[torch.tensor(tokens, device=weight.device)].double()  # [N, hidden]
    for layer in body.layers:
        x = x + _attention(layer.self_attn, _norm(layer.input_layernorm, x), product)
        h = product(_norm(layer.post_attention_layernorm, x), layer.mlp.gate_up_proj)
        gate, up = h.chunk(2, dim=-1)
        x = x + product(torch.nn.functional.silu(gate) * up, layer.mlp.down_proj)
    return product(_norm(body.norm, x[-last:]), model.lm_head).cpu()


def _drawn_again(model: torch.nn.Module, module: torch.nn.Module) -> torch.Tensor:
    """The weight that `draw_weights` gave a module whose memory now holds it in another form."""
    name = next(name for name, one in model.named_modules() if one is module)
    return _slice(model, f"{name}.weight", module.get_parameter("weight"))


def relative_errors(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """‖found − expected‖ / ‖expected‖ of each row."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).tolist()


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return scaled * norm.weight.double()


def _attention(layer: Any, x: torch.Tensor, product: Callable[[torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
    N, D = x.shape[0], layer.head_dim
    q, k, v = product(x, layer.qkv_proj).split([layer.q_size, layer.kv_size, layer.kv_size], dim=-1)
    # The engine's own table of cosines and sines: its rounding is no matter of attention.
    cos, sin = layer.rotary_emb.cos_sin_cache[:N].double().chunk(2, dim=-1)
    q, k = (_rotate(t.view(N, -1, D), cos, sin) for t in (q, k))
    v = v.view(N, -1, D)
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    masked = torch.ones(N, N, dtype=torch.bool, device=x.device).triu(1)
    for start in range(0, q.shape[1], HEADS_AT_ONCE):
        heads = torch.arange(start, min(start + HEADS_AT_ONCE, q.shape[1]), device=x.device)
        scores = torch.einsum("nhd,mhd->hnm", q[:, heads], k[:, heads // group]) * layer.scaling
        out[:, heads] = torch.einsum(
            "hnm,mhd->nhd", scores.masked_fill(masked, -torch.inf).softmax(-1), v[:, heads // group]
        )
    return product(out.flatten(1), layer.o_proj)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
