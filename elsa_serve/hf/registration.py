"""Names in transformers' tables, and switching a loaded model between attention implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from elsa_serve.errors import UsageError
from elsa_serve.hf.attention import elsa_attention, elsa_or_sdpa_attention
from elsa_serve.hf.masks import elsa_mask

NAMES: dict[str, Callable] = {"elsa": elsa_attention, "elsa_or_sdpa": elsa_or_sdpa_attention}

Model = TypeVar("Model", bound=PreTrainedModel)


def register() -> None:
    """Make `elsa` and `elsa_or_sdpa` valid values of `attn_implementation`. Safe to call again."""
    for name, function in NAMES.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, elsa_mask)


@contextmanager
def use_attention(model: Model, name: str = "elsa", *, fallback: str | None = None) -> Iterator[Model]:
    """Run a loaded model with another attention implementation inside the block, and restore its own afterwards.

        with use_attention(model, "elsa"):
            model.generate(**inputs)

    name: any implementation that transformers knows. fallback: None, so that what elsa cannot do is an error, or
    "sdpa", so that SDPA runs there instead (with name "elsa", the same as name "elsa_or_sdpa"). Sub-models (text and
    vision towers) are switched and restored too. The model must not run in another thread meanwhile, and a cache filled
    inside the block can be used outside it. Raises UsageError for a model any part of which cannot be switched (it does
    not ask transformers' interface for its attention), and for an unknown name or fallback.
    """
    if fallback is not None:
        if fallback != "sdpa" or name != "elsa":
            raise UsageError(f'use_attention has the fallback "sdpa" for "elsa" alone, not {fallback!r} for {name!r}')
        name = "elsa_or_sdpa"
    before = _implementations(model)
    try:
        _switch(model, name)
        yield model
    finally:
        model.set_attn_implementation(before)


def _switch(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UsageError(f"{type(model).__name__} does not take attention implementation {name!r}: {error}") from error
    # transformers only logs a refusal, and misses sub-models that hold a copy of the configuration (T5).
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    unchanged = [part for part in parts if part.config._attn_implementation != name]
    names = ", ".join(sorted({type(part).__name__ for part in unchanged}))
    if not all(part._can_set_attn_implementation() for part in unchanged):
        raise UsageError(
            f"{names} cannot be switched to attention {name!r}: its attention is its own code, which runs whatever "
            "attn_implementation says, at loading too"
        )
    if unchanged:
        raise UsageError(
            f"{names} cannot be switched to attention {name!r} once loaded; load it with attn_implementation={name!r}"
        )


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention implementation of the model ("") and of each sub-configuration by name."""
    config = model.config
    names = {"": config._attn_implementation}
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if sub is not None:
            names[key] = sub._attn_implementation
    return names
