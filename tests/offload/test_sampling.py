"""Drawing tokens: distributions, seeds, filters, log-probabilities, bad logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from elsa_serve.errors import UsageError
from elsa_serve.offload.sampling import BadLogits, Sampler, filtered_probabilities
from elsa_serve.protocol import SamplingParams


def sampler(default_seed: int = 0, eos: frozenset[int] = frozenset(), prompt: tuple[int, ...] = (), **params: Any):
    return Sampler(SamplingParams(**params), eos, default_seed, prompt)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    assert sampler(temperature=0.0).draw(torch.tensor([1.0, 3.0, 3.0, 2.0])).token_id == 1


def test_frequencies_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws, against its 0.999 quantile for 3 degrees of freedom."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = sampler(seed=1)
    logits = probabilities.log()
    counts = torch.bincount(torch.tensor([draws.draw(logits).token_id for _ in range(20_000)]), minlength=4)
    chi = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert chi < 16.27


def test_temperature_sharpens() -> None:
    params = SamplingParams(temperature=0.5)
    torch.testing.assert_close(
        filtered_probabilities(logits_of(0.8, 0.2), params), torch.tensor([16 / 17, 1 / 17], dtype=torch.float64)
    )


def test_top_k_and_top_p_keep_the_best() -> None:
    logits = logits_of(0.1, 0.4, 0.3, 0.2)
    assert filtered_probabilities(logits, SamplingParams(top_k=2)).nonzero().flatten().tolist() == [1, 2]
    # 0.4 + 0.3 does not reach 0.75: the token that crosses it stays
    assert filtered_probabilities(logits, SamplingParams(top_p=0.75)).nonzero().flatten().tolist() == [1, 2, 3]
    assert filtered_probabilities(logits, SamplingParams(top_p=0.65)).nonzero().flatten().tolist() == [1, 2]
    assert filtered_probabilities(logits, SamplingParams(top_p=1e-9)).nonzero().flatten().tolist() == [1]
    # top-p is of what top-k leaves: 0.4 / 0.7 already passes a half
    assert filtered_probabilities(logits, SamplingParams(top_k=2, top_p=0.55)).nonzero().flatten().tolist() == [1]


def test_filtered_tokens_are_never_drawn() -> None:
    draws = sampler(seed=3, top_k=3, temperature=5.0)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    best = set(logits.topk(3).indices.tolist())
    assert {draws.draw(logits).token_id for _ in range(300)} == best


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits = torch.zeros(1000)

    def sequence(**params: Any) -> list[int]:
        draws = sampler(**params)
        return [draws.draw(logits).token_id for _ in range(20)]

    assert sequence(seed=7) == sequence(seed=7, default_seed=99)
    assert sequence(seed=7) != sequence(seed=8)
    assert sequence(default_seed=5) == sequence(default_seed=5)
    assert sequence(default_seed=5) != sequence(default_seed=6)
    assert sequence(seed=-1) == sequence(seed=-1)


def test_each_token_takes_one_number_whatever_the_filters() -> None:
    """So that a change of one token's filters does not shift the luck of all later ones."""
    flat, peaked = torch.zeros(1000), torch.full((1000,), -100.0).index_fill(0, torch.tensor([4]), 0.0)
    one, two = sampler(seed=2), sampler(seed=2)
    one.draw(flat)
    two.draw(peaked)
    assert one.draw(flat).token_id == two.draw(flat).token_id


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = logits_of(0.1, 0.2, 0.7)
    draw = sampler(temperature=0.2, top_k=1, logprobs=2).draw(logits)
    expected = torch.log(torch.tensor([0.7, 0.2], dtype=torch.float64))
    assert draw.token_id == 2
    assert [token for token, _ in draw.top] == [2, 1]
    torch.testing.assert_close(torch.tensor([p for _, p in draw.top], dtype=torch.float64), expected, rtol=0, atol=1e-6)
    assert draw.logprob == pytest.approx(expected[0].item(), abs=1e-6)


def test_logprobs_zero_gives_the_chosen_alone_and_none_gives_nothing() -> None:
    logits = logits_of(0.5, 0.5)
    chosen = sampler(logprobs=0).draw(logits)
    assert chosen.top == ()
    assert chosen.logprob == pytest.approx(-0.6931472, abs=1e-6)
    assert sampler().draw(logits).logprob is None


def test_min_tokens_hold_back_the_end() -> None:
    draws = sampler(temperature=0.0, min_tokens=2, eos=frozenset({0}))
    logits = logits_of(0.9, 0.06, 0.04)
    assert [draws.draw(logits).token_id for _ in range(4)] == [1, 1, 0, 0]


def test_stop_tokens_are_held_back_like_the_end() -> None:
    draws = sampler(temperature=0.0, min_tokens=1, eos=frozenset({0}), stop_token_ids=(1,))
    logits = logits_of(0.5, 0.3, 0.2)
    assert [draws.draw(logits).token_id for _ in range(2)] == [2, 0]


def test_biases_are_added_and_log_probabilities_stay_the_models() -> None:
    logits = logits_of(0.7, 0.2, 0.1)
    draw = sampler(temperature=0.0, logit_bias=((2, 3.0), (0, -100.0)), logprobs=1).draw(logits)
    assert draw.token_id == 2
    assert draw.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in draw.top] == [0]
    torch.testing.assert_close(logits, logits_of(0.7, 0.2, 0.1))  # the row is not the sampler's to change


def test_presence_counts_once_and_frequency_every_time() -> None:
    """Greedy over logits 2.0, 1.5, 0.0: the tokens change hands where the penalties say so."""
    logits = torch.tensor([2.0, 1.5, 0.0])

    def drawn(count: int, **params: Any) -> list[int]:
        draws = sampler(temperature=0.0, **params)
        return [draws.draw(logits).token_id for _ in range(count)]

    assert drawn(5, presence_penalty=1.0) == [0, 1, 0, 0, 0]  # 2, 1 against 1.5, then 1 against 0.5
    assert drawn(5, frequency_penalty=0.4) == [0, 0, 1, 0, 1]  # 1.6 > 1.5 > 1.2, 1.2 > 1.1, 0.8 < 1.1
    assert drawn(3, presence_penalty=-1.0) == [0, 0, 0]
    # what the prompt holds is not counted
    assert sampler(temperature=0.0, presence_penalty=1.0, prompt=(0,)).draw(logits).token_id == 0


def test_repetition_penalty_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    prompt, draws = (3, 5, 5, 8), sampler(temperature=0.0, repetition_penalty=1.7, prompt=(3, 5, 5, 8))
    reference, tokens = RepetitionPenaltyLogitsProcessor(1.7), list(prompt)
    for _ in range(12):
        logits = torch.randn(10, generator=generator)
        expected = reference(torch.tensor([tokens]), logits.clone()[None])[0]
        tokens.append(draws.draw(logits).token_id)
        assert tokens[-1] == int(expected.argmax())
    assert len(set(tokens[4:])) > 4


def test_min_p_is_that_of_transformers() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    kept = filtered_probabilities(logits, SamplingParams(min_p=0.2)).nonzero().flatten()
    expected = MinPLogitsWarper(0.2)(torch.zeros(1, 1), logits[None])[0].isfinite().nonzero().flatten()
    assert kept.tolist() == expected.tolist()
    assert 1 < len(kept) < 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 1.5),
        ("stop", ("a", "")),
        ("min_tokens", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_that_cannot_be_sampled_with_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value}).check()
    SamplingParams().check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(BadLogits, match="not finite"):
            sampler(temperature=temperature).draw(torch.tensor([0.0, bad, 1.0]))


def test_a_row_of_minus_infinities_is_refused_but_some_are_fine() -> None:
    with pytest.raises(BadLogits):
        sampler().draw(torch.full((4,), -torch.inf))
    assert sampler(seed=0).draw(torch.tensor([-torch.inf, 0.0, -torch.inf])).token_id == 1
