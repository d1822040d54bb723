"""Scenarios: data in, requests out, the same ones every time and of exact length."""

import json
import random
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from elsa_load import scenario as scenarios
from elsa_load.prompts import PromptMaker
from elsa_load.scenario import Arrivals, Part, Scenario

from elsa_serve.errors import UsageError

DEMO = Path(__file__).parents[2] / "configs" / "demo_model"


@pytest.fixture(scope="module")
def encode():
    return scenarios.tokenizer_of(DEMO)


@pytest.fixture(scope="module")
def make(encode):
    return PromptMaker(encode)


@pytest.mark.parametrize("name", scenarios.names())
def test_every_scenario_that_comes_along_is_valid(name):
    scenario = scenarios.load(name)
    assert scenario.name == name
    assert scenario.about
    assert scenario.scaled(0.01).longest < scenario.longest


@pytest.mark.parametrize("tokens", [300, 1000, 2048, 5001])
@pytest.mark.parametrize("form", ["tokens", "text", "chat"])
def test_prompts_have_exactly_the_length_asked_for(make, encode, tokens, form):
    for seed in (1, 2, 3):
        (asked,) = make.prompts(tokens, seed, form=form)
        content = asked.prompt[0]["content"] if form == "chat" else asked.prompt
        ids = content if form == "tokens" else encode(content)
        assert len(ids) == asked.tokens == tokens


def test_the_document_holds_the_answer_to_every_turn(make):
    turns = make.prompts(3000, 5, form="chat", turns=3)
    document = turns[0].prompt[0]["content"]
    for turn, asked in enumerate(turns):
        assert len(asked.prompt) == 2 * turn + 1
        assert asked.prompt[0]["content"] == document  # the prefix that a cache can share
        word = asked.prompt[-1]["content"].rpartition("code of ")[2].rstrip("?")
        assert f"The code of {word} is {asked.expected}." in document


def test_the_same_seed_gives_the_same_requests_and_a_file_replays_them(make, tmp_path):
    scenario = scenarios.changed(scenarios.load("cancel-storm"), requests=12).scaled(0.1)
    requests = scenarios.plan(scenario, make)
    assert requests == scenarios.plan(scenario, make)
    assert requests != scenarios.plan(scenarios.changed(scenario, seed=2), make)
    assert sum(r.cancel_after_s is not None for r in requests) >= 6
    scenarios.save(requests, tmp_path / "requests.jsonl")
    assert scenarios.replay(tmp_path / "requests.jsonl") == requests


def test_shared_documents_are_shared_and_sessions_take_turns(make):
    part = Part(prompt_tokens=600, turns=2)
    requests = scenarios.plan(Scenario("s", requests=8, form="text", documents=2, mix=(part,)), make)
    first = [r.prompt for r in requests if r.turn == 0]
    assert first[0] == first[2]
    assert first[0] != first[1]
    assert [r.session for r in requests] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert requests[1].prompt.startswith(requests[0].prompt)


def test_arrivals_have_the_rates_and_the_spread_they_name():
    rng = random.Random(3)

    def gaps(arrivals, count=4000):
        times = arrivals.times(count, rng)
        return [b - a for a, b in pairwise(times)]

    poisson = gaps(Arrivals("poisson", rate=4))
    assert statistics.mean(poisson) == pytest.approx(0.25, rel=0.08)
    assert statistics.stdev(poisson) == pytest.approx(0.25, rel=0.1)
    bursts = gaps(Arrivals("gamma", rate=4, burstiness=0.25))
    assert statistics.mean(bursts) == pytest.approx(0.25, rel=0.12)
    assert statistics.stdev(bursts) == pytest.approx(0.5, rel=0.15)  # 1 / (rate · √shape)
    assert set(gaps(Arrivals("constant", rate=4))) == {0.25}
    ramp = gaps(Arrivals("ramp", rate=1, rate_end=9))
    tenth = len(ramp) // 10
    assert 1 / statistics.mean(ramp[:tenth]) < 5
    assert 1 / statistics.mean(ramp[-tenth:]) == pytest.approx(9, rel=0.15)
    assert Arrivals("closed").times(2, rng) == [None, None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "typo": 1}, "typo"),
        ({}, "name"),
        ({"name": "x", "arrivals": {"kind": "sometimes"}}, "poisson"),
        ({"name": "x", "mix": [{"prompt_tokens": 0}]}, "more than 0"),
        ({"name": "x", "arrivals": {"rate": -1}}, "more than 0"),
    ],
)
def test_a_wrong_scenario_is_refused_by_name(data, message):
    with pytest.raises(UsageError, match=message):
        scenarios.parse(data)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="long-context-mix"):
        scenarios.load("no-such")
    (tmp_path / "plan.jsonl").write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(UsageError, match="no saved plan"):
        scenarios.replay(tmp_path / "plan.jsonl")


def test_a_prompt_too_short_for_its_facts_is_refused(make):
    with pytest.raises(UsageError, match="too short"):
        make.prompts(80, 1, turns=6)
