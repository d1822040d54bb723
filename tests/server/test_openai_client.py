"""The official client against a real server: what it sends must be understood, what it gets must parse."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from elsa_server import answers
from fake_engine import FakeEngine
from server_harness import Running, eventually

from elsa_serve.protocol import SamplingParams

CHAT = [{"role": "user", "content": "one two three"}]


def test_models(running: Running) -> None:
    client = running.openai()
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").model_extra == {"max_model_len": 1000}
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("org/other")
    assert error.value.code == "model_not_found"


def test_model_ids_with_slashes_and_several_names(start) -> None:
    client = start(served_names=("org/model-7b", "alias")).openai()
    assert client.models.retrieve("org/model-7b").id == "org/model-7b"
    answer = client.completions.create(model="alias", prompt="one")
    assert answer.model == "org/model-7b"


def test_completion(running: Running) -> None:
    answer = running.openai().completions.create(model="fake", prompt="one two three", max_tokens=2)
    assert answer.choices[0].text == " one two"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_of_no_tokens(running: Running, stream: bool) -> None:
    """max_tokens: 0 is within the specification; the engine is not asked."""
    asked = len(running.engine.requests)
    answer = running.openai().completions.create(model="fake", prompt="one two", max_tokens=0, stream=stream)
    last = list(answer)[-1] if stream else answer
    assert (last.choices[0].text, last.choices[0].finish_reason) == ("", "length")
    assert len(running.engine.requests) == asked


def test_prompts_of_all_forms(running: Running) -> None:
    client, tokenizer = running.openai(), running.engine.tokenizer
    ids = tokenizer.encode("one two")
    for prompt, texts in (
        ("one two", [" one two"]),
        (["one", "two"], [" one", " two"]),
        (ids, [" one two"]),
        ([ids, ids[:1]], [" one two", " one"]),
    ):
        answer = client.completions.create(model="fake", prompt=prompt)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_choices_have_seeds_of_their_own(running: Running) -> None:
    answer = running.openai().completions.create(model="fake", prompt=["one", "two"], n=2.0, seed=7)  # 2.0 is JSON's 2
    assert [choice.text for choice in answer.choices] == [" one", " one", " two", " two"]
    assert answer.usage.prompt_tokens == 2  # a prompt counts once, whatever n is
    assert [request.sampling.seed for request in running.engine.requests[-4:]] == [7, 8, 7, 8]


def test_usage_tells_what_was_found_computed(running: Running) -> None:
    client = running.openai()
    answer = client.completions.create(model="fake", prompt=["one cached two", "one", "a b c cached"], n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2 + 0 + 3
    chat = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one two"}])
    assert chat.usage.prompt_tokens_details.cached_tokens == 0
    options = {"include_usage": True}
    chunks = client.completions.create(model="fake", prompt="so cached", stream=True, stream_options=options)
    assert [chunk.usage.prompt_tokens_details.cached_tokens for chunk in chunks if chunk.usage] == [1]


def test_the_schema_knows_rules_across_parameters(running: Running) -> None:
    schemas = running.http().get("/openapi.json").json()["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert chat["then"] == {"required": ["stream"], "properties": {"stream": {"const": True}}}
    (rule,) = chat["allOf"]
    assert rule["if"]["required"] == ["top_logprobs"]
    assert rule["then"]["properties"] == {"logprobs": {"const": True}}
    assert "128 at most" in schemas["CompletionRequest"]["properties"]["n"]["description"]


def test_sampling_reaches_the_engine(running: Running) -> None:
    running.openai().chat.completions.create(
        model="fake",
        messages=CHAT,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=5,
        stop=["a", "b"],
        seed=-3,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"7": -100, "3": 1.5},
        tools=[],
        extra_body={
            "top_k": 4,
            "min_tokens": 2,
            "ignore_eos": True,
            "min_p": 0.1,
            "repetition_penalty": 1.25,
            "stop_token_ids": [5, 6],
        },
    )
    sampling = running.engine.requests[-1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.25, 1.25)
    assert (sampling.logit_bias, sampling.min_p, sampling.stop_token_ids) == (((7, -100), (3, 1.5)), 0.1, (5, 6))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 4, 5)
    assert (sampling.stop, sampling.seed, sampling.min_tokens, sampling.ignore_eos) == (("a", "b"), 2**63 - 3, 2, True)
    assert sampling.logprobs is None


def test_what_clients_of_vllm_send_is_taken_where_it_asks_for_nothing(running: Running) -> None:
    neutral = {
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False,
        "priority": 0, "prompt_logprobs": None, "stop_token_ids": [], "logit_bias": {},
    }  # fmt: skip
    client = running.openai()
    client.completions.create(model="fake", prompt="one", max_tokens=16, extra_body=neutral)
    assert running.engine.requests[-1].sampling == SamplingParams()
    for name, other in (("skip_special_tokens", False), ("use_beam_search", True), ("prompt_logprobs", 1)):
        with pytest.raises(openai.BadRequestError, match=f"{name}: not supported"):
            client.completions.create(model="fake", prompt="one", extra_body={name: other})


def test_the_chat_template_takes_variables_and_open_ends(running: Running) -> None:
    client, ids = running.openai(), running.engine.tokenizer.encode

    def prompt(**extra: Any) -> Any:
        client.chat.completions.create(model="fake", messages=CHAT, extra_body=extra)
        return running.engine.requests[-1].prompt_token_ids

    assert prompt() == ids("one two three")
    assert prompt(chat_template_kwargs={"thinking": False}) == ids("one two three thinking=False")
    assert prompt(add_generation_prompt=False) == ids("one two three closed")
    assert prompt(continue_final_message=True) == ids("one two three goes-on closed")
    asked = {"messages": CHAT, "continue_final_message": True, "chat_template_kwargs": {"a": 1}}
    tokens = running.http().post("/tokenize", json=asked).json()["tokens"]
    assert tokens == ids("one two three a=1 goes-on closed")


def test_usage_so_far_in_every_chunk(running: Running) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = running.openai().completions.create(model="fake", prompt="one two", stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 2, 2]


def test_more_choices_than_the_queue_holds_are_no_matter_of_time(start) -> None:
    running = start(max_sequences=3)
    for prompts, n in ((["a", "b"], 2), ("a", 4)):
        with pytest.raises(openai.BadRequestError, match="more than 3 choices") as error:
            running.openai().completions.create(model="fake", prompt=prompts, n=n)
        assert error.value.param == "n"
    assert len(running.openai().completions.create(model="fake", prompt="a", n=3).choices) == 3


def test_a_nucleus_of_no_mass_is_greedy(running: Running) -> None:
    running.openai().completions.create(model="fake", prompt="one", top_p=0, temperature=1)
    sampling = running.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p) == (0, 1)


def test_chat_fills_the_context_by_default(running: Running) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    answer = running.openai().chat.completions.create(model="fake", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == " one two"
    assert answer.choices[0].finish_reason == "stop"
    assert running.engine.requests[-1].sampling.max_tokens == 1000 - 2


def test_chat_stream_in_order(running: Running) -> None:
    options = {"include_usage": True}
    stream = running.openai().chat.completions.create(
        model="fake", messages=CHAT, stream=True, stream_options=options, n=2, max_tokens=2
    )
    chunks = list(stream)
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert [choice.delta.content for choice in mine[1:-1]] == [" one", " two"]
        assert [choice.finish_reason for choice in mine] == [None, None, None, "length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 3 + 2 * 2


def test_chat_logprobs(running: Running) -> None:
    answer = running.openai().chat.completions.create(model="fake", messages=CHAT, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert [token.token for token in tokens] == [" one", " two", " three"]
    assert bytes(tokens[0].bytes) == b" one"
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [(" alt0", -1.0), (" alt1", -2.0)]


def test_completion_logprobs_streamed_and_whole(running: Running) -> None:
    client = running.openai()
    whole = client.completions.create(model="fake", prompt="one two three", logprobs=1).choices[0].logprobs
    assert whole.tokens == [" one", " two", " three"]
    assert whole.text_offset == [0, 4, 8]
    assert whole.top_logprobs[0] == {" alt0": -1.0, " one": -0.5}
    chunks = client.completions.create(model="fake", prompt="one two three", logprobs=1, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset
    assert [token for part in parts for token in part.tokens] == whole.tokens


def test_every_answer_has_its_declared_form(running: Running) -> None:
    """The typed answers of the OpenAPI document, held against what is sent."""
    with running.http() as http:
        chat = {"model": "fake", "messages": CHAT, "logprobs": True, "top_logprobs": 1}
        answers.ChatCompletion.model_validate(http.post("/v1/chat/completions", json=chat).json())
        text = {"model": "fake", "prompt": "one two", "logprobs": 2}
        answers.Completion.model_validate(http.post("/v1/completions", json=text).json())
        options = {"stream": True, "stream_options": {"include_usage": True, "include_progress": True}}
        for path, body, form in (
            ("/v1/chat/completions", chat, answers.ChatCompletionChunk),
            ("/v1/completions", text, answers.Completion),
        ):
            lines = http.post(path, json=body | options).text.split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""]
            chunks = [form.model_validate_json(line.removeprefix("data: ")) for line in lines[:-2]]
            assert chunks[0].prefill_progress is not None
            assert all('"usage":null' in line for line in lines[:-3])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"10000000": 1}}, "logit_bias"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"prompt": [10**7]}, "prompt"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
    ],
)
def test_bad_completion_parameters_are_named(running: Running, change: dict, param: str | None) -> None:
    asked = {"model": "fake", "prompt": "one"} | change
    with pytest.raises(openai.BadRequestError) as error:
        running.openai().completions.create(**asked)
    named = error.value.param
    # A union names the member that refused, so its parameter is the beginning of the path.
    assert (named or "").split(".")[0] == (param or "")
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "no user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs"),
        ({"extra_body": {"add_generation_prompt": True, "continue_final_message": True}}, "continue_final_message"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_bad_chat_parameters_are_named(running: Running, change: dict, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        running.openai().chat.completions.create(**({"model": "fake", "messages": CHAT} | change))
    assert (error.value.param or "").split(".")[0] == (param or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": ["a", "b", "c", "d", "e"]}, "Invalid value for stop: List should have at most 4 items after"),
        ({"stop": 5}, "Invalid value for stop: Input should be a valid string or Input should be a valid list, got 5."),
        ({"n": 0, "top_p": 2, "seed": 1}, "got 0. (1 more problem)"),
        ({"stream_options": {}}, "stream_options is only allowed with stream: true."),
    ],
)
def test_what_is_wrong_is_said_of_the_kind_that_was_sent(running: Running, change: dict, message: str) -> None:
    answer = running.http().post("/v1/completions", json={"model": "fake", "prompt": "one"} | change)
    assert message in answer.json()["error"]["message"]


def test_images_are_refused_and_never_fetched(running: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": running.url + "/livez"}}
    with pytest.raises(openai.BadRequestError, match="opens no URL"):
        running.openai().chat.completions.create(model="fake", messages=[{"role": "user", "content": [part]}])


def test_unknown_and_missing_model(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        running.openai().completions.create(model="gpt", prompt="one")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    answer = running.http().post("/v1/completions", json={"prompt": "one"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_over_long_prompts(running: Running) -> None:
    client = running.openai()
    for ask in (
        lambda: client.completions.create(model="fake", prompt="w " * 990, max_tokens=11),
        lambda: client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "w " * 1000}]),
    ):
        with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 1000 tokens") as error:
            ask()
        assert error.value.code == "context_length_exceeded"


def test_hopelessly_long_text_is_refused_after_its_beginning(running: Running) -> None:
    before = running.engine.tokenizer.encoded_chars
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 1000 tokens"):
        running.openai().completions.create(model="fake", prompt="w " * 500_000)
    assert running.engine.tokenizer.encoded_chars - before < 10_000


def test_long_words_that_fit_are_not_refused(running: Running) -> None:
    answer = running.openai().completions.create(model="fake", prompt="w" * 100_000)
    assert answer.usage.prompt_tokens == 1


def test_retry_after_overload(start) -> None:
    """The client retries a 503 by itself, after the time that the server names."""
    running = start(FakeEngine(max_running=1))
    client = running.openai(max_retries=2)
    stream = client.completions.create(model="fake", prompt="hang", stream=True)
    eventually(lambda: len(running.engine.live) == 1)
    refused = running.http().post("/v1/completions", json={"model": "fake", "prompt": "one"})
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    with pytest.raises(openai.InternalServerError, match="the queue is full"):
        running.openai().completions.create(model="fake", prompt="one")
    stream.close()
    assert client.completions.create(model="fake", prompt="one").choices[0].text == " one"


def test_an_engine_error_in_a_stream_raises(running: Running) -> None:
    texts = []
    stream = running.openai().completions.create(model="fake", prompt="fail two three four", stream=True)
    with pytest.raises(openai.APIError, match="engine failed") as error:  # noqa: PT012
        for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert texts == [" fail", " two"]
    assert "/secret" not in str(error.value.body)


def test_an_engine_error_without_a_stream(running: Running) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        running.openai().completions.create(model="fake", prompt="fail two three four")
    assert (error.value.status_code, error.value.code) == (500, "engine_error")
    assert "/secret" not in str(error.value.body)


def test_time_limit(start) -> None:
    running = start(request_timeout_s=0.05)
    with pytest.raises(openai.InternalServerError) as error:
        running.openai(max_retries=2).completions.create(model="fake", prompt="hang")
    assert (error.value.status_code, error.value.code) == (504, "request_timeout")
    assert len(running.engine.requests) == 1  # the client was told not to try again


def test_authentication(start) -> None:
    running = start(api_keys=("first", "second"))
    assert running.openai(api_key="second").completions.create(model="fake", prompt="one").choices[0].text == " one"
    with pytest.raises(openai.AuthenticationError) as error:
        running.openai(api_key="seconds").completions.create(model="fake", prompt="one")
    assert error.value.code == "invalid_api_key"
    assert running.value("elsa_admission_rejections_total", reason="auth") == 1
