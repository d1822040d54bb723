"""What a query may see, as numbers instead of a [B, 1, Nq, Nk] matrix.

transformers builds one mask a forward (per layer type) through `AttentionMaskInterface` and hands it to every attention
layer. `elsa_mask` returns a `StructuredMask` wherever causality, a sliding window and contiguous padding say it all,
and a dense additive mask for everything else; what it does not recognise is never guessed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

MaskFunction = Callable[..., Any]


class DenseMaskWarning(UserWarning):
    """A prefill runs with a dense [B, 1, Nq, Nk] mask: right, but its memory grows with the square of the length."""


class StructuredMask(torch.Tensor):
    """An additive mask [B, 1, Nq, Nk] without the matrix: 0 where a query sees a key, the dtype's minimum elsewhere.

    Query i sits at key position `q_start + i`. With `causal` it sees keys up to its own position, with `window` keys
    less than `window` positions away, and in batch row b only keys of the half-open `kv_range[b]`.

    It is a tensor because transformers passes ready masks on only if they are four-dimensional tensors, and because
    model code may slice its mask or add to it: any operation computes on `dense()`, which is what transformers' eager
    mask is, so a model that does not know about this class gets the right numbers too. Moving it to another device or
    floating dtype keeps the structure.
    """

    causal: bool
    window: int | None
    q_start: int
    _kv_range: torch.Tensor  # int32 [B, 2], or [0, 2] where every key exists: a wrapper needs one tensor inside

    # Outputs of operations are plain tensors, and torch.compile traces the class without entering this hook.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        causal: bool,
        window: int | None,
        q_start: int,
        kv_range: torch.Tensor,
    ) -> StructuredMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=kv_range.device)
        mask.causal, mask.window, mask.q_start, mask._kv_range = causal, window, q_start, kv_range
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"StructuredMask(shape={tuple(self.shape)}, dtype={self.dtype}, causal={self.causal}, "
            f"window={self.window}, q_start={self.q_start}, kv_range={self.kv_range})"
        )

    @property
    def kv_range(self) -> torch.Tensor | None:
        """int32 [B, 2], or None where every key of every row exists."""
        return self._kv_range if self._kv_range.shape[0] else None

    def dense(self) -> torch.Tensor:
        """The same mask as a plain tensor [B, 1, Nq, Nk]."""
        return additive(self.seen(), self.dtype)

    def seen(self) -> torch.Tensor:
        """The same mask as a plain boolean tensor [B, 1, Nq, Nk], True where a query sees a key."""
        B, _, Nq, Nk = self.shape
        device = self._kv_range.device
        keys = torch.arange(Nk, device=device)
        distance = torch.arange(Nq, device=device).unsqueeze(-1) + self.q_start - keys  # [Nq, Nk]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & (distance.abs() < self.window)
        seen = seen.expand(B, 1, Nq, Nk)
        if self.kv_range is not None:
            first, end = self.kv_range.view(B, 1, 1, 2).unbind(-1)
            seen = seen & ((keys >= first.unsqueeze(-1)) & (keys < end.unsqueeze(-1)))
        return seen

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return ["_kv_range"], (self.dtype, self.causal, self.window, self.q_start)

    @staticmethod
    def __tensor_unflatten__(inner: dict, context: tuple, outer_size: Sequence[int], outer_stride: Any) -> Any:
        dtype, causal, window, q_start = context
        return StructuredMask(outer_size, dtype, causal, window, q_start, inner["_kv_range"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if func in _KEEP_STRUCTURE and (dtype is None or dtype.is_floating_point):
            mask: StructuredMask = args[0]
            where = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
            moved = func(mask._kv_range, **where)
            return cls(mask.shape, dtype or mask.dtype, mask.causal, mask.window, mask.q_start, moved)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)


_KEEP_STRUCTURE = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.clone.default)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A mask function put into words. `behind` and `ahead`: how far a query sees in each direction; None: no limit."""

    behind: int | None
    ahead: int | None

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(_tighter(self.behind, other.behind), _tighter(self.ahead, other.ahead))

    def as_causal_and_window(self) -> tuple[bool, int | None] | None:
        """(causal, window: |distance| < window) as the kernels have it, or None where those two cannot say it."""
        if self.ahead == 0:
            return True, None if self.behind is None else self.behind + 1
        if self.ahead == self.behind:
            return False, None if self.behind is None else self.behind + 1
        return None


def _tighter(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)


# transformers composes mask functions as closures. Closures of one `def` share their code object, which identifies them
# without relying on names; the free variables are looked up by name, and a missing one means "not recognised".
_AND_CODE = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_SLIDING_CODE = masking_utils.sliding_window_overlay(1).__code__
_SLIDING_BOTH_CODE = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def recognise(function: MaskFunction) -> Pattern | None:
    """The pattern that a transformers mask function draws, or None where it is not one of the known ones."""
    if function is masking_utils.causal_mask_function:
        return Pattern(behind=None, ahead=0)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern(behind=None, ahead=None)
    if torch.compiler.is_compiling():  # which cannot read closures
        return None
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return None
    free = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells)))
    if code is _AND_CODE and "mask_functions" in free:
        return _recognise_all(free["mask_functions"])
    if code is _SLIDING_CODE and isinstance(free.get("sliding_window"), int):
        return Pattern(behind=free["sliding_window"] - 1, ahead=None)
    if code is _SLIDING_BOTH_CODE and isinstance(free.get("sliding_window"), int):
        return Pattern(behind=free["sliding_window"], ahead=free["sliding_window"])
    return None


def _recognise_all(functions: Sequence[MaskFunction]) -> Pattern | None:
    pattern = Pattern(behind=None, ahead=None)
    for function in functions:
        part = recognise(function)
        if part is None:
            return None
        pattern = pattern & part
    return pattern


def elsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask that `elsa` attention gets; the signature is that of transformers' mask functions.

    attention_mask: the 2D padding mask [B, positions] (bool, True where a token is real), which may be shorter than the
    cache buffer. q_offset is a 0-dimensional tensor with a static cache. Returns a `StructuredMask` or a dense additive
    mask [B, 1, Nq, Nk], of `dtype`; never None.
    """
    padding = _local_padding(attention_mask, kv_length, kv_offset)
    place = Place((batch_size, 1, q_length, kv_length), dtype, torch.device(device))
    structured = _structured(place, q_offset - kv_offset, recognise(mask_function), padding)
    if structured is not None:
        return structured
    if q_length > 1 and not _tracing():
        warnings.warn(
            "elsa: a dense [B, 1, Nq, Nk] attention mask is built, because this one is more than causal, sliding "
            "window and padding on either side (packed sequences, a custom mask function, or padding inside a row)",
            DenseMaskWarning,
            stacklevel=2,
        )
    seen = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    return additive(seen, dtype)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as a bias of `dtype`: 0 where True, the dtype's minimum where False.

    The minimum, not −∞, is transformers' convention: a model's own softmax has no NaN in rows that see nothing.
    """
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def _tracing() -> bool:
    """Whether values of tensors may not be looked at."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _local_padding(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """The part [B, Nk] of the padding mask that belongs to the keys; positions beyond its end are padding."""
    if attention_mask is None:
        return None
    missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
    return torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length]


@dataclass(frozen=True, slots=True)
class Place:
    """Shape [B, 1, Nq, Nk], dtype and device of the mask to make."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def mask(self, causal: bool, window: int | None, q_start: int, kv_range: torch.Tensor | None) -> StructuredMask:
        if kv_range is None:
            kv_range = torch.empty((0, 2), dtype=torch.int32, device=self.device)
        return StructuredMask(self.shape, self.dtype, causal, window, q_start, kv_range)


def _structured(
    place: Place, q_start: int | torch.Tensor, pattern: Pattern | None, padding: torch.Tensor | None
) -> StructuredMask | None:
    """The mask without a matrix, or None where it takes one or where telling takes a value that cannot be read yet."""
    if pattern is None or (padding is not None and _tracing()):
        return None
    _, _, Nq, Nk = place.shape
    if Nq == 1:
        return _single_query(place, q_start, pattern, padding)
    if isinstance(q_start, torch.Tensor):
        if _tracing():
            return None
        q_start = int(q_start)
    words = pattern.as_causal_and_window()
    if words is None:
        return None
    causal, window = words
    kv_range = None
    if padding is not None:
        # Padding after the last position that any query sees changes nothing (the unused end of a static cache).
        reach = min(q_start + Nq, Nk) if causal else Nk
        contiguous, needed, kv_range = _padding_range(padding, reach)
        if not contiguous:
            return None
        kv_range = kv_range if needed else None
    return place.mask(causal, window, q_start, kv_range)


def _single_query(
    place: Place, position: int | torch.Tensor, pattern: Pattern, padding: torch.Tensor | None
) -> StructuredMask | None:
    """One query sees a range of keys, whatever the pattern: nothing here changes from step to step but a tensor.

    That keeps a compiled decode step with a static cache free of recompilation.
    """
    B, _, _, Nk = place.shape
    first = 0 if pattern.behind is None else position - pattern.behind
    end = Nk if pattern.ahead is None else position + pattern.ahead + 1
    kv_range = None
    if padding is not None:
        contiguous, needed, kv_range = _padding_range(padding, Nk)
        if not contiguous:
            return None
        kv_range = kv_range if needed else None
    if isinstance(position, torch.Tensor) or first > 0 or end < Nk:
        own = torch.stack([_scalar(first, place.device), _scalar(end, place.device)]).clamp(0, Nk).to(torch.int32)
        if kv_range is None:
            kv_range = own.expand(B, 2).contiguous()
        else:
            kv_range = torch.stack([kv_range[:, 0].maximum(own[0]), kv_range[:, 1].minimum(own[1])], dim=-1)
    return place.mask(False, None, 0, kv_range)


def _scalar(x: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    # `full` fills on the device; copying a Python number there would wait for it.
    return x.to(device) if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.int64, device=device)


def _padding_range(padding: torch.Tensor, reach: int) -> tuple[bool, bool, torch.Tensor]:
    """(contiguous, needed, kv_range [B, 2] int32) of the real tokens in padding [B, Nk], as far as `reach` keys go.

    One look at the device: both answers come in one copy.
    """
    seen = padding[:, :reach].to(torch.int32)  # [B, reach]
    count = seen.sum(-1)
    first = seen.argmax(-1)  # the first maximum
    end = torch.where(count > 0, reach - seen.flip(-1).argmax(-1), 0)
    contiguous, full = torch.stack([(end - first == count).all(), (count == reach).all()]).tolist()
    return contiguous, not full, torch.stack([first, end], dim=-1).to(torch.int32)
