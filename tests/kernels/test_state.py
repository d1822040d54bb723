"""The monoid's laws, on random states that include empty rows, sinks and large logits."""

from __future__ import annotations

import pytest
import torch
from elsa_kernels import State, merge, tree_merge
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = float("inf"), float("nan")
ROWS, D = (1, 2, 3), 4


@st.composite
def states(draw: st.DrawFn) -> State:
    """The state of up to four keys, some of whose logits are −∞."""
    seed = draw(st.integers(0, 2**31 - 1))
    n_keys = draw(st.integers(0, 4))
    size = draw(st.sampled_from([0.1, 1.0, 50.0]))
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(*ROWS, n_keys, generator=generator, dtype=torch.float64)
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -INF
    values = torch.randn(*ROWS[:2], n_keys, D, generator=generator, dtype=torch.float64)
    return State.from_logits(logits, values)


def assert_close(a: State, b: State) -> None:
    torch.testing.assert_close(a.finalize(), b.finalize(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.logsumexp(), b.logsumexp(), rtol=1e-12, atol=1e-12)


def assert_same(a: State, b: State) -> None:
    for x, y in ((a.m, b.m), (a.S, b.S), (a.W, b.W)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


EMPTY = State.identity(ROWS, D, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(states(), states(), states())
def test_merge_is_associative_up_to_rounding(a: State, b: State, c: State) -> None:
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))


@settings(max_examples=60, deadline=None)
@given(states(), states())
def test_merge_is_commutative_bit_for_bit(a: State, b: State) -> None:
    assert_same(merge(a, b), merge(b, a))


@settings(max_examples=40, deadline=None)
@given(states())
def test_identity_changes_no_bit(a: State) -> None:
    assert_same(merge(EMPTY, a), a)
    assert_same(merge(a, EMPTY), a)


@settings(max_examples=40, deadline=None)
@given(states())
def test_output_and_logsumexp_carry_the_whole_state(a: State) -> None:
    assert_close(State.from_output(a.finalize(), a.logsumexp()), a)


@settings(max_examples=30, deadline=None)
@given(st.lists(states(), min_size=1, max_size=7))
def test_tree_merge_agrees_with_a_chain(parts: list[State]) -> None:
    chain = parts[0]
    for part in parts[1:]:
        chain = merge(chain, part)
    assert_close(tree_merge(parts), chain)


def test_tree_merge_pairs_neighbours() -> None:
    parts = [State.from_logits(torch.randn(*ROWS, 2), torch.randn(*ROWS[:2], 2, D)) for _ in range(5)]
    by_hand = merge(merge(merge(parts[0], parts[1]), merge(parts[2], parts[3])), parts[4])
    assert_same(tree_merge(parts), by_hand)


def test_tree_merge_of_nothing_says_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"State\.identity"):
        tree_merge([])


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    logits, values = torch.randn(2, 3, 5, 64, dtype=torch.float64), torch.randn(2, 3, 64, 8, dtype=torch.float64)
    parts = [State.from_logits(logits[..., i : i + 10], values[..., i : i + 10, :]) for i in range(0, 64, 10)]
    torch.testing.assert_close(tree_merge(parts).finalize(), torch.softmax(logits, -1) @ values, rtol=1e-13, atol=1e-13)


def test_fully_masked_rows_are_the_identity_and_give_zero() -> None:
    state = State.from_logits(torch.full((1, 1, 2, 3), -INF), torch.full((1, 1, 3, D), NAN))
    assert_same(state, State.identity((1, 1, 2), D))
    assert_same(merge(state, state), state)
    assert torch.equal(state.finalize(torch.float16), torch.zeros(1, 1, 2, D, dtype=torch.float16))
    assert bool((state.logsumexp() == -INF).all())


def test_empty_rows_of_an_output_become_the_identity() -> None:
    state = State.from_output(torch.full((1, 1, 2, D), NAN), torch.full((1, 1, 2), -INF))
    assert_same(state, State.identity((1, 1, 2), D))


def test_nan_logits_propagate() -> None:
    logits = torch.zeros(1, 1, 2, 3)
    logits[0, 0, 1, 2] = NAN
    broken = State.from_logits(logits, torch.ones(1, 1, 3, D))
    whole = State.from_logits(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, D))
    for state in (broken, merge(broken, whole), merge(whole, broken), merge(State.identity((1, 1, 2), D), broken)):
        assert bool(state.finalize()[0, 0, 1].isnan().all())
        assert bool(state.finalize()[0, 0, 0].isfinite().all())


def test_sinks_are_the_element_sink_1_0() -> None:
    logits, values = torch.randn(1, 2, 3, 5, dtype=torch.float64), torch.randn(1, 2, 5, D, dtype=torch.float64)
    sinks = torch.tensor([0.5, -INF], dtype=torch.float64)
    state = State.from_logits(logits, values).merge(State.from_sinks(sinks, ROWS, D, dtype=torch.float64))
    with_column = torch.cat([logits, sinks.view(1, 2, 1, 1).expand(1, 2, 3, 1)], -1)
    expected = torch.softmax(with_column, -1)[..., :-1] @ values
    torch.testing.assert_close(state.finalize(), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state.logsumexp(), torch.logsumexp(with_column, -1), rtol=1e-13, atol=1e-13)


def test_masked_values_do_not_leak() -> None:
    logits = torch.tensor([[[[0.0, -INF], [0.0, 0.0]]]])
    for bad in (NAN, INF):
        out = State.from_logits(logits, torch.tensor([[[[1.0], [bad]]]])).finalize()
        assert out[0, 0, 0, 0] == 1.0
        assert not bool(out[0, 0, 1, 0].isfinite())


def test_moving_a_state_keeps_its_parts_together() -> None:
    state = State.identity(ROWS, D).to(torch.float64)
    assert state.m.dtype == state.S.dtype == state.W.dtype == torch.float64
