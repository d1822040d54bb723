"""Drawing tokens from rows of logits, on the CPU in FP32 and FP64: the same seed gives the same text in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elsa_serve.protocol import SamplingParams


class BadLogits(ValueError):
    """A row of logits that no token can be drawn from."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A token, its log-probability under the model's own distribution, and the best alternatives, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One request's sampling state. The generator belongs to the request alone and gives one number a token."""

    def __init__(self, params: SamplingParams, eos_ids: frozenset[int], default_seed: int) -> None:
        self._params = params
        self._eos = sorted(eos_ids)
        self._drawn = 0
        self._generator = torch.Generator()
        self._generator.manual_seed((params.seed if params.seed is not None else default_seed) % 2**63)

    def draw(self, logits: torch.Tensor) -> Draw:
        """Draw from a row [V] of float32 logits on the CPU. Raises BadLogits where it holds NaN or +∞, or only −∞."""
        top = logits.max()
        if not torch.isfinite(top) or torch.isnan(logits).any():
            raise BadLogits("the model's logits are not finite: its weights or activations have overflowed")
        token = self._choose(logits)
        self._drawn += 1
        if self._params.logprobs is None:
            return Draw(token)
        return self._with_logprobs(token, logits)

    def _choose(self, logits: torch.Tensor) -> int:
        params = self._params
        if self._drawn < params.min_tokens and self._eos:
            logits = logits.clone()
            logits[self._eos] = -torch.inf
        if params.temperature == 0:
            return int(logits.argmax())
        # Before the filters, so that each token takes one number whatever they leave.
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        probabilities = filtered_probabilities(logits, params)
        total = probabilities.cumsum(0)
        index = int(torch.searchsorted(total, uniform * total[-1], right=True))
        # A number that rounds up to the total would fall off the end, or onto a token of probability zero.
        return min(index, int(probabilities.nonzero()[-1]))

    def _with_logprobs(self, token: int, logits: torch.Tensor) -> Draw:
        logprobs = logits.double().log_softmax(0)
        count = min(self._params.logprobs or 0, logits.numel())
        values, indices = logprobs.topk(count)
        top = tuple(zip(indices.tolist(), values.tolist()))
        return Draw(token, float(logprobs[token]), top)


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [V] in FP64 after temperature, top-k, top-p (the token that crosses p stays); not renormalised."""
    scaled = logits.double() / params.temperature
    if params.top_k and params.top_k < scaled.numel():
        kept = scaled.topk(params.top_k).indices
        scaled = torch.full_like(scaled, -torch.inf).scatter(0, kept, scaled[kept])
    probabilities = scaled.softmax(0)
    if params.top_p < 1:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.index_fill(0, indices[before >= params.top_p], 0.0)
    return probabilities
