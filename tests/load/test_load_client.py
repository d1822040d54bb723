"""The client against an endpoint whose timings are known."""

import asyncio
import json
import time

import pytest
from elsa_load.client import Client, Endpoint
from elsa_load.measures import distribution
from elsa_load.records import Request
from elsa_load.runner import run
from elsa_load.sse import EventParser

LATE_S = 0.035  # what a busy machine of two cores may add to a time


def planned(name="one", *, first=0.05, gaps=(), max_tokens=100, cancel_after_s=None, at_s=None, **plan):
    prompt = json.dumps({"id": name, "first": first, "gaps": list(gaps), **plan})
    return Request(name, prompt, 7, max_tokens, at_s=at_s, cancel_after_s=cancel_after_s)


def observed(url, request, **options):
    async def go():
        async with Client(Endpoint(url), **options) as client:
            return await client.send(client.prepare(request), time.perf_counter())

    return asyncio.run(go())


def near(value, expected):
    return expected - 0.002 <= value <= expected + LATE_S


@pytest.mark.timed
def test_times_of_single_tokens(mock_url):
    seen = observed(mock_url, planned(first=0.2, gaps=[0.02] * 20))
    assert (seen.outcome, seen.output_tokens, seen.chunks, seen.exact_tokens) == ("ok", 21, 21, True)
    assert near(seen.ttft_s, 0.2)
    assert seen.decode_s == pytest.approx(0.4, abs=LATE_S)
    assert seen.tpot_s == pytest.approx(0.02, abs=LATE_S / 20)
    assert distribution(seen.token_gaps())["p50"] == pytest.approx(0.02, abs=0.005)
    assert seen.e2e_s >= seen.ttft_s + seen.decode_s
    assert seen.prompt_tokens == 7


@pytest.mark.timed
@pytest.mark.parametrize("counting", ["logprobs", "continuous"])
def test_latency_is_of_tokens_and_not_of_chunks(mock_url, counting):
    """Five tokens every 100 ms are 20 ms a token; a chunk of one after 100 ms is 100 ms."""
    plan = planned(first=0.05, gaps=[0.1, 0.1, 0.1], sizes=[1, 5, 5, 1], mode=counting)
    seen = observed(mock_url, plan, counting=counting)
    assert (seen.output_tokens, seen.exact_tokens) == (12, True)
    assert [round(count) for _, count in seen.token_gaps()] == [5, 5, 1]
    latencies = distribution(seen.token_gaps())
    assert latencies["count"] == 11
    assert latencies["p50"] == pytest.approx(0.02, abs=0.008)
    assert latencies["max"] == pytest.approx(0.1, abs=LATE_S)
    assert seen.tpot_s == pytest.approx(0.3 / 11, abs=0.004)


@pytest.mark.timed
def test_usage_alone_says_that_chunks_are_not_tokens(mock_url):
    seen = observed(mock_url, planned(first=0.05, gaps=[0.1, 0.1], sizes=[4, 4, 4]))
    assert (seen.output_tokens, seen.chunks, seen.exact_tokens) == (12, 3, False)
    assert seen.tpot_s == pytest.approx(0.2 / 8, abs=0.005)
    assert sum(count for _, count in seen.token_gaps()) == pytest.approx(8)


def test_a_body_of_128k_tokens_arrives_whole(mock_url):
    ids = list(range(100_000, 100_000 + 131_072))
    seen = observed(mock_url, Request("long", ids, len(ids), 1))
    assert seen.outcome == "ok"
    assert seen.prompt_tokens > 7 * len(ids)  # the endpoint answers with the bytes it received
    text = observed(mock_url, Request("text", "word " * 131_072, 131_072, 1))
    assert text.prompt_tokens > 5 * 131_072


def test_an_event_of_a_megabyte_is_one_token(mock_url):
    seen = observed(mock_url, planned(first=0.05, gaps=[0.1] * 3, mode="padded"))
    assert (seen.outcome, seen.output_tokens, seen.chunks) == ("ok", 4, 4)
    assert seen.ttft_s < 0.05 + 3 * LATE_S


@pytest.mark.timed
def test_thousands_of_chunks_a_second_keep_their_times(mock_url):
    """40 streams of 50 chunks a second are 2,000 chunks a second; mean and rate must be those that were sent."""
    requests = [planned(f"s{i}", first=0.3, gaps=[0.02] * 60, at_s=0.0) for i in range(40)]

    async def go():
        async with Client(Endpoint(mock_url)) as client:
            return await run(client, requests)

    done = asyncio.run(go())
    assert [seen.outcome for seen in done.observations] == ["ok"] * 40
    assert {seen.output_tokens for seen in done.observations} == {61}
    tpots = distribution((seen.tpot_s, 1.0) for seen in done.observations)
    assert tpots["mean"] == pytest.approx(0.02, rel=0.1)
    assert tpots["max"] == pytest.approx(0.02, rel=0.25)


@pytest.mark.timed
def test_a_cancelled_request_ends_in_time(mock_url):
    seen = observed(mock_url, planned(first=0.05, gaps=[0.05] * 100, cancel_after_s=0.3))
    assert (seen.outcome, seen.error) == ("cancelled", None)
    assert near(seen.e2e_s, 0.3)
    assert 3 <= seen.chunks <= 6


@pytest.mark.parametrize(
    ("mode", "outcome", "message"),
    [
        ("break", "error", "finish_reason"),
        ("error", "error", "engine_error"),
        ("truncate", "error", "finish_reason"),
    ],
)
def test_broken_answers_are_no_successes(mock_url, mode, outcome, message):
    seen = observed(mock_url, planned(gaps=[0.01], mode=mode))
    assert seen.outcome == outcome
    assert message in seen.error


def test_a_refusal_is_reported_or_tried_again(mock_url):
    refused = observed(mock_url, planned("refused", mode="refuse:1"))
    assert (refused.outcome, refused.status, refused.attempts) == ("rejected", 503, 1)
    patient = observed(mock_url, planned("patient", first=0.05, mode="refuse:0.2"), patience_s=20)
    assert (patient.outcome, patient.attempts) == ("ok", 3)
    assert patient.ttft_s >= 0.45  # what the refusals cost is part of the latency


def test_nobody_there_is_an_error():
    async def go():
        async with Client(Endpoint("http://127.0.0.1:9", model="m")) as client:
            return await client.send(client.prepare(planned()), time.perf_counter())

    seen = asyncio.run(go())
    assert (seen.outcome, seen.status) == ("error", None)


def test_events_split_anywhere_are_the_same(mock_url):
    seen = observed(mock_url, planned(first=0.05, gaps=[0.02] * 3, mode="split"))
    assert (seen.outcome, seen.output_tokens, seen.text) == ("ok", 4, "tttt")
    whole = b'data: {"a": 1}\r\n\r\n: comment\n\ndata: x\ndata: y\n\ndata: [DONE]\n\n'
    for size in range(1, len(whole)):
        parser = EventParser()
        events = [e for i in range(0, len(whole), size) for e in parser.feed(whole[i : i + size])]
        assert events == [b'{"a": 1}', b"x\ny", b"[DONE]"]


@pytest.mark.timed
def test_open_arrivals_do_not_wait_for_answers(mock_url):
    requests = [planned(f"o{i}", first=0.5, at_s=0.05 * i) for i in range(10)]

    async def go(concurrency):
        async with Client(Endpoint(mock_url)) as client:
            return await run(client, requests, concurrency=concurrency)

    done = asyncio.run(go(None))
    assert done.wall_s < 1.5  # ten answers of half a second each, one after the other, take five
    assert all(near(seen.sent_s, seen.due_s) for seen in done.observations)
    assert asyncio.run(go(5)).wall_s >= 1.0
