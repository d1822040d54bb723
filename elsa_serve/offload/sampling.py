"""Drawing tokens from rows of logits, on the CPU in FP32 and FP64: the same seed gives the same text in any batch."""

from __future__ import annotations

from collections.abc import Sequence
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

    def __init__(
        self, params: SamplingParams, eos_ids: frozenset[int], default_seed: int, prompt: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._ending = sorted(eos_ids.union(params.stop_token_ids))
        self._drawn = 0
        self._penalties = Penalties(params, prompt) if penalised(params) else None
        self._bias = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.long)
        self._biases = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32)
        self._generator = torch.Generator()
        self._generator.manual_seed((params.seed if params.seed is not None else default_seed) % 2**63)

    def draw(self, logits: torch.Tensor) -> Draw:
        """Draw from a row [V] of float32 logits on the CPU. Raises BadLogits where it holds NaN or +∞, or only −∞."""
        top = logits.max()
        if not torch.isfinite(top) or torch.isnan(logits).any():
            raise BadLogits("the model's logits are not finite: its weights or activations have overflowed")
        token = self._choose(self._changed(logits))
        self._drawn += 1
        if self._penalties is not None:
            self._penalties.generated(token)
        if self._params.logprobs is None:
            return Draw(token)
        return self._with_logprobs(token, logits)

    def _changed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits with what the request adds to them and takes off; as they are, where it changes nothing."""
        early = self._drawn < self._params.min_tokens and bool(self._ending)
        if not (early or len(self._bias) or self._penalties is not None):
            return logits
        logits = logits.index_add(0, self._bias, self._biases)
        if self._penalties is not None:
            self._penalties.apply(logits)
        if early:
            logits[self._ending] = -torch.inf
        return logits

    def _choose(self, logits: torch.Tensor) -> int:
        params = self._params
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


def penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


class Penalties:
    """What a request's tokens so far take off the logits of the next, as in vLLM and the OpenAI specification."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._repetition = params.repetition_penalty
        self._counts: dict[int, int] = {}  # of generated tokens
        self._seen = dict.fromkeys(prompt) if self._repetition != 1 else {}  # in prompt or output

    def generated(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._repetition != 1:
            self._seen[token] = None

    def apply(self, logits: torch.Tensor) -> None:
        """Changes the row [V] in place."""
        if self._seen:
            seen = torch.tensor(list(self._seen))
            row = logits[seen]
            logits[seen] = torch.where(row > 0, row / self._repetition, row * self._repetition)
        if self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[torch.tensor(list(self._counts))] -= self._presence + self._frequency * counts


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [V] in FP64 after temperature, top-k, top-p (the token that crosses p stays) and min-p (of the best
    token's probability); not renormalised."""
    scaled = logits.double() / params.temperature
    if params.top_k and params.top_k < scaled.numel():
        kept = scaled.topk(params.top_k).indices
        scaled = torch.full_like(scaled, -torch.inf).scatter(0, kept, scaled[kept])
    probabilities = scaled.softmax(0)
    if params.top_p < 1:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.index_fill(0, indices[before >= params.top_p], 0.0)
    if params.min_p > 0:
        probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0.0)
    return probabilities
