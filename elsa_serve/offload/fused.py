"""Decoder layers in fewer passes over memory: transformers' modules with one kernel where they make five or eight.

A layer of LLaMA's shape (LLaMA, Mistral, Qwen 2 and 3, …) gets one forward: queries, keys and values as one product,
and gate and up as one, where their weights lie side by side; norms, rotary and the gated activation in one kernel each;
what is added to the hidden states, in place and by the product itself. Other layers (Gemma's) keep their own forward
and get the norms and the gated activation.

Nothing is taken from a class's name. A tiny twin of every layer, of the same class and code but a width of 8, first
runs on the CPU both ways, and only what gives the same numbers is replaced.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from elsa_kernels.elementwise import ACTIVATIONS, copy_heads, gated, rms_norm, rotary
from torch import nn

from elsa_serve.offload.attention import AttentionOptions, attending, current_attention, refuse_mask

WIDTH, TOKENS = 8, 3  # of the twins
NORM_ROWS = 64  # enough that two forms, which round differently, cannot agree by chance
LAYER_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_CHILDREN = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NormForm:
    """How an RMS norm computes: LLaMA's rounding, or Gemma's 1 + weight."""

    eps: float
    unit_offset: bool

    def __call__(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight: Any = norm.weight
        return rms_norm(x, weight, self.eps, unit_offset=self.unit_offset)


@dataclass(frozen=True, slots=True)
class LayerForm:
    """What a layer of LLaMA's shape computes, beyond its weights."""

    norm: NormForm
    head_norm: NormForm | None  # of queries and keys
    head_dim: int
    activation: str
    options: AttentionOptions
    index: int  # the layer's


class FusedForward:
    """The forward of a layer of LLaMA's shape. Works in place: what it returns is the hidden states it was given."""

    def __init__(self, layer: nn.Module, form: LayerForm) -> None:
        self._layer: Any = layer
        self._form = form

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        wanted: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """`wanted`: so many of the last tokens are computed whole (None: all), of the others keys and values alone."""
        refuse_mask(self._layer.self_attn, attention_mask)
        layer, form = self._layer, self._form
        tokens = hidden_states.shape[1]
        wanted = tokens if wanted is None else wanted
        normed = form.norm(layer.input_layernorm, hidden_states)
        attended = self._attention(layer.self_attn, normed, position_embeddings, wanted)
        if not wanted:
            return hidden_states
        hidden = hidden_states[:, tokens - wanted :]
        add_product(hidden, attended, layer.self_attn.o_proj)
        normed = form.norm(layer.post_attention_layernorm, hidden)
        mlp = layer.mlp
        gate, up = products(normed, mlp.gate_proj, mlp.up_proj)
        add_product(hidden, gated(gate, up, form.activation), mlp.down_proj)
        return hidden_states

    def _attention(
        self, attention: Any, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], wanted: int
    ) -> torch.Tensor:
        """What the last `wanted` tokens attended, [1, wanted, H·D]."""
        form = self._form
        cos, sin = (table[0] for table in position_embeddings)
        rest = x.shape[1] - wanted
        if rest:
            columns = [*products(x[:, rest:], attention.q_proj), *products(x, attention.k_proj, attention.v_proj)]
        else:
            columns = [*products(x, attention.q_proj, attention.k_proj, attention.v_proj)]
        q, k, v = (y[0].unflatten(-1, (-1, form.head_dim)) for y in columns)  # [tokens, heads, D]
        if form.head_norm is not None:
            q = form.head_norm(attention.q_norm, q.contiguous())
            k = form.head_norm(attention.k_norm, k.contiguous())
        if rest:
            q, _ = rotary(q, q[:, :0], cos[rest:], sin[rest:])
            k, _ = rotary(k, k[:, :0], cos, sin)
        else:
            q, k = rotary(q, k, cos, sin)
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))  # [1, heads, tokens, D]
        return _token_by_token(current_attention()(form.index, q, k, v, form.options))


def _token_by_token(out: torch.Tensor) -> torch.Tensor:
    """out [1, T, H, D] as [1, T, H·D]."""
    if out.is_contiguous():
        return out.flatten(2)
    rows = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    copy_heads(rows[0].transpose(0, 1), out[0].transpose(0, 1))
    return rows.flatten(2)


def products(x: torch.Tensor, *linears: Any) -> Sequence[torch.Tensor]:
    """x through each of the layers; as one product where their weights lie one behind the other, without biases."""
    weights = [linear.weight for linear in linears]
    plain = all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    if not plain or x.device.type == "cpu" or not _adjacent(weights):
        return [linear(x) for linear in linears]
    sizes = [weight.shape[0] for weight in weights]
    whole = weights[0].as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())
    return F.linear(x, whole).split(sizes, -1)


def add_product(total: torch.Tensor, x: torch.Tensor, linear: Any) -> None:
    """total [1, T, N] += x [1, T, K] through the layer, in place: where it is a plain one, as the product's own sum."""
    if type(linear) is nn.Linear and linear.bias is None and x.device.type != "cpu":
        torch.addmm(total[0], x[0], linear.weight.t(), out=total[0])
    else:
        total.add_(linear(x))


def _adjacent(weights: Sequence[Any]) -> bool:
    return all(
        b.data_ptr() == a.data_ptr() + a.nbytes and a.shape[1] == b.shape[1] and a.dtype == b.dtype
        for a, b in pairwise(weights)
    )


# --- replacing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fused:
    """What was replaced; `restore` gives the modules their own forwards back."""

    layers: int
    norms: int
    activations: int
    _modules: tuple[nn.Module, ...] = ()

    def restore(self) -> None:
        for module in self._modules:
            vars(module).pop("forward", None)

    def __str__(self) -> str:
        if self.layers:
            return f"{self.layers} layers with norms, rotary embedding and gated activation in one kernel each"
        if self.norms or self.activations:
            return f"{self.norms} norms and {self.activations} gated activations in one kernel each"
        return "none: the layers' arithmetic is not one that is known here"


def fuse(layers: Iterable[nn.Module]) -> Fused:
    """Give decoder layers the fused forward where a twin computes the same, else their norms and gated activations."""
    whole = norms = activations = 0
    replaced: list[nn.Module] = []
    for layer in layers:
        form = layer_form(layer)
        if form is not None:
            layer.forward = FusedForward(layer, form)  # type: ignore[method-assign]
            replaced.append(layer)
            whole += 1
            continue
        for module in layer.modules():
            forward = _part(module)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]
                replaced.append(module)
                norms += isinstance(forward, _Norm)
                activations += isinstance(forward, _Gated)
    return Fused(whole, norms, activations, tuple(replaced))


class _Norm:
    def __init__(self, norm: nn.Module, form: NormForm) -> None:
        self._norm, self._form = norm, form

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._form(self._norm, x)


class _Gated:
    def __init__(self, mlp: nn.Module, activation: str) -> None:
        self._mlp: Any = mlp
        self._activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = products(x, self._mlp.gate_proj, self._mlp.up_proj)
        return self._mlp.down_proj(gated(gate, up, self._activation))


def _part(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    norm = norm_form(module)
    if norm is not None:
        return _Norm(module, norm)
    activation = gated_form(module)
    return None if activation is None else _Gated(module, activation)


# --- recognising --------------------------------------------------------------------------------------------------


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of an RMS norm, told by trying it in FP16, where the two forms' roundings differ; None for others."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(module._parameters) != {"weight"} or module._modules or not isinstance(eps, float):
        return None
    twin = _small_norm(module).half()
    x = _random(NORM_ROWS, WIDTH).half()
    theirs = _run(twin, x)
    for unit_offset in (False, True):
        form = NormForm(eps, unit_offset)
        if theirs is not None and torch.equal(form(twin, x), theirs):
            return form
    return None


def gated_form(module: nn.Module) -> str | None:
    """The activation of down(activation(gate(x)) · up(x)), or None for a module that computes something else."""
    if not {"gate_proj", "up_proj", "down_proj"} <= set(module._modules) <= {*_MLP_CHILDREN}:
        return None
    twin: Any = _small_mlp(module)
    x = _random(TOKENS, WIDTH)
    theirs = _run(twin, x)
    for activation in ACTIVATIONS:
        ours = twin.down_proj(gated(twin.gate_proj(x), twin.up_proj(x), activation))
        if theirs is not None and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            return activation
    return None


_MLP_CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")


def layer_form(layer: nn.Module) -> LayerForm | None:
    """What a layer computes, if it has LLaMA's shape and a twin of it gives what `FusedForward` gives; else None."""
    modules: dict[str, Any] = dict(layer._modules)
    if set(modules) != LAYER_CHILDREN or layer._parameters:
        return None
    attention = modules["self_attn"]
    head_dim, index = getattr(attention, "head_dim", None), getattr(attention, "layer_idx", None)
    extra = set(attention._modules) - ATTENTION_CHILDREN
    if not isinstance(head_dim, int) or not isinstance(index, int) or extra not in (set(), HEAD_NORMS):
        return None
    norm = norm_form(modules["input_layernorm"])
    head_norm = norm_form(attention.q_norm) if extra else None
    activation = gated_form(modules["mlp"])
    if norm is None or activation is None or bool(extra) != (head_norm is not None):
        return None
    twin = _small_layer(layer, head_dim)
    recorded = _Recorder(index)
    x, positions = _random(1, TOKENS, WIDTH), tuple(_random(2, 1, TOKENS, head_dim))
    theirs = _run_layer(twin, x, positions, recorded)
    if theirs is None or recorded.options is None or recorded.options.sinks is not None:
        return None
    form = LayerForm(norm, head_norm, head_dim, activation, recorded.options, index)
    again = _Recorder(index)
    with attending(again), torch.no_grad():
        ours = FusedForward(twin, form)(x.clone(), position_embeddings=positions)  # type: ignore[arg-type]
    same = len(recorded.seen) == len(again.seen) == 1 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    pairs = zip(recorded.seen[0], again.seen[0]) if same else ()
    return form if same and all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs) else None


class _Recorder:
    """Stands in for a pass's attention: keeps what it is given; each query gets itself plus its token's first value."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.options: AttentionOptions | None = None

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        if layer != self._index:
            raise ValueError(f"layer {self._index} attends as layer {layer}")
        self.seen.append((q, k, v))
        self.options = options
        return (q + v[:, :1, v.shape[2] - q.shape[2] :]).transpose(1, 2)


def _run(module: nn.Module, *arguments: torch.Tensor) -> torch.Tensor | None:
    """The module's own forward; None where it does not take this input."""
    return _attempt(module, lambda: type(module).forward(module, *arguments))


def _run_layer(twin: nn.Module, x: torch.Tensor, positions: Any, recorder: _Recorder) -> torch.Tensor | None:
    def run() -> Any:
        with attending(recorder):
            return type(twin).forward(twin, x.clone(), attention_mask=None, position_embeddings=positions)

    return _attempt(twin, run)


def _attempt(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            result = run()
    except Exception as error:  # code of any architecture, on input it may not expect: then it is not one known here
        logger.debug("a twin of %s does not run: %s", type(module).__name__, error)
        return None
    result = result[0] if isinstance(result, tuple) else result
    return result if isinstance(result, torch.Tensor) else None


# --- twins --------------------------------------------------------------------------------------------------------


def _twin(module: nn.Module, **children: nn.Module) -> nn.Module:
    """The module with the same code and attributes and other children; the original is untouched."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    twin._modules = {**module._modules, **children}
    return twin


def _small_norm(norm: nn.Module, width: int = WIDTH) -> nn.Module:
    twin = _twin(norm)
    twin._parameters = {"weight": nn.Parameter(_random(width), requires_grad=False)}
    return twin


def _small_linear(of: nn.Module, inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=getattr(of, "bias", None) is not None)
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(_random(*parameter.shape), requires_grad=False))
    return linear


def _small_mlp(mlp: nn.Module) -> nn.Module:
    modules: Any = mlp._modules
    gate, up = (_small_linear(modules[name], WIDTH, 2 * WIDTH) for name in ("gate_proj", "up_proj"))
    return _twin(mlp, gate_proj=gate, up_proj=up, down_proj=_small_linear(modules["down_proj"], 2 * WIDTH, WIDTH))


def _small_layer(layer: nn.Module, head_dim: int) -> nn.Module:
    modules: Any = layer._modules
    attention = modules["self_attn"]
    children: dict[str, Any] = {
        "q_proj": _small_linear(attention.q_proj, WIDTH, 2 * head_dim),
        "k_proj": _small_linear(attention.k_proj, WIDTH, head_dim),
        "v_proj": _small_linear(attention.v_proj, WIDTH, head_dim),
        "o_proj": _small_linear(attention.o_proj, 2 * head_dim, WIDTH),
    } | {name: _small_norm(attention._modules[name], head_dim) for name in HEAD_NORMS & set(attention._modules)}
    norms = ("input_layernorm", "post_attention_layernorm")
    return _twin(
        layer,
        self_attn=_twin(attention, **children),
        mlp=_small_mlp(modules["mlp"]),
        **{name: _small_norm(modules[name]) for name in norms},
    )


def _random(*shape: int) -> torch.Tensor:
    """The same numbers every time, on the CPU, whatever the default device or dtype."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
