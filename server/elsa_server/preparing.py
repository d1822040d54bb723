"""From a validated request to what the engine is asked for: prompts as token ids, sampling, one request a sequence."""

from __future__ import annotations

import inspect
import uuid
from dataclasses import replace

from elsa_serve.errors import ContextTooLong
from elsa_serve.protocol import Engine, GenerationRequest, SamplingParams
from elsa_server.errors import ApiError, bounded, context_too_long, from_exception
from elsa_server.schemas import INT64, ChatCompletionRequest, CompletionRequest, GenerationOptions, TokenizeRequest

CHARS_PER_TOKEN = 8  # a text longer than this many characters for each token of context is first tried in part
SLACK = 64  # tokens by which a cut can change the count of what is before it, amply


def encode(engine: Engine, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. One that is hopelessly long is refused after a look at its beginning."""
    limit = engine.info.max_context
    cut = CHARS_PER_TOKEN * (limit + SLACK)
    if len(text) > cut:
        at_least = len(engine.tokenizer.encode(text[:cut], add_special_tokens=add_special_tokens)) - SLACK
        if at_least > limit:
            raise context_too_long(
                f"This model's maximum context length is {limit} tokens. However, the first {cut} of the {len(text)} "
                f"characters you sent are more than {at_least} tokens. Please reduce the length of the prompt."
            )
    return engine.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def chat_ids(engine: Engine, request: ChatCompletionRequest | TokenizeRequest) -> list[int]:
    conversation = [message.plain() for message in request.messages]
    render, variables = engine.tokenizer.apply_chat_template, request.chat_template_kwargs or {}
    # Those of the function are the server's: with `chat_template` a client would run a program of its own.
    for name in inspect.signature(render).parameters:
        if name in variables:
            message = f"chat_template_kwargs holds {name!r}, which is no variable of the model's template."
            raise ApiError(400, message, param="chat_template_kwargs", code="invalid_value")
    try:
        text = render(conversation, tokenize=False, **request.template_arguments(), **variables)
    except Exception as error:  # templates are programs of the model's makers, and raise what they like
        hint = "the model's chat template refused the messages; models without one take /v1/completions only"
        raise ApiError(400, f"{hint}: {bounded(str(error), 200)}", param="messages", code="invalid_value") from None
    return encode(engine, text, add_special_tokens=False)  # the template has put them in


def prompt_ids(engine: Engine, request: CompletionRequest) -> list[list[int]]:
    """The prompts of a completion request, which may be one or many, as text or as ids."""
    prompt, special = request.prompt, request.add_special_tokens is not False
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    return [encode(engine, one, special) if isinstance(one, str) else check_ids(engine, one) for one in prompt]


def check_ids(engine: Engine, ids: list[int], param: str = "prompt") -> list[int]:
    if max(ids) >= engine.info.vocab_size:
        message = f"Token id {max(ids)} is outside the vocabulary of {engine.info.vocab_size}."
        raise ApiError(400, message, param=param, code="invalid_value")
    return ids


def biases(engine: Engine, request: GenerationOptions) -> tuple[tuple[int, float], ...]:
    found = tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items())
    if found:
        check_ids(engine, [token for token, _ in found], "logit_bias")
    return found


def sampling(engine: Engine, request: GenerationOptions, max_tokens: int, logprobs: int | None) -> SamplingParams:
    top_p = 1.0 if request.top_p is None else request.top_p
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        # A nucleus of no mass keeps the best token alone.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        stop=request.stop_texts,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        logit_bias=biases(engine, request),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
    )


def token_limit(engine: Engine, prompt: list[int], asked: int | None) -> int:
    """Tokens the answer may have: as asked, else all that the context leaves. Raises ApiError."""
    limit = engine.info.max_context
    if not prompt:
        raise ApiError(400, "The prompt has no tokens.", param="prompt", code="invalid_value")
    tokens = limit - len(prompt) if asked is None else asked
    if len(prompt) + tokens > limit or (asked is None and tokens < 1):
        raise from_exception(ContextTooLong(limit, len(prompt), max(tokens, 1)))
    return tokens


def fan_out(
    request: CompletionRequest | ChatCompletionRequest,
    prompts: list[list[int]],
    params: list[SamplingParams],
    endpoint: str,
    deadline_s: float | None,
) -> list[GenerationRequest]:
    """One engine request a choice, prompt by prompt. A seed gives each of the n choices one of its own."""
    stem = uuid.uuid4().hex
    requests: list[GenerationRequest] = []
    for prompt, base in zip(prompts, params):
        for choice in range(request.choices):
            seed = None if request.seed is None else (request.seed + choice) % INT64
            requests.append(
                GenerationRequest(
                    request_id=f"{stem}-{len(requests)}",
                    prompt_token_ids=prompt,
                    sampling=replace(base, seed=seed),
                    endpoint=endpoint,
                    deadline_s=deadline_s,
                )
            )
    return requests
