"""The routes: each reads a typed body, asks the engine through the lifecycle, and returns a typed answer."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from elsa_serve import __version__
from elsa_serve.protocol import Engine, GenerationRequest
from elsa_serve.stats import RequestFinished, RequestReceived, RequestRejected
from elsa_server import answers, body, preparing
from elsa_server.errors import ApiError, bounded
from elsa_server.formats import ChatFormat, Choice, CompletionFormat, Envelope, Format
from elsa_server.generation import Generation
from elsa_server.lifecycle import Lifecycle
from elsa_server.openapi import documented
from elsa_server.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from elsa_server.streaming import Delivery, EventStreamResponse, answer

router = APIRouter()


def lifecycle(request: Request) -> Lifecycle:
    return request.app.state.lifecycle


# Generation


@router.post("/v1/completions", **documented(answers.Completion, CompletionRequest, streams=answers.Completion))
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    return await counted(request, "completions", prepare_completion)


@router.post(
    "/v1/chat/completions",
    **documented(answers.ChatCompletion, ChatCompletionRequest, streams=answers.ChatCompletionChunk),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await counted(request, "chat_completions", prepare_chat)


async def counted(request: Request, endpoint: str, prepare: Any) -> Response:
    """Prepare, then generate. A request refused before the engine has seen it is counted here, others by the engine."""
    try:
        prepared, requests, form, prompt_tokens = await prepare(request)
    except ApiError as error:
        lifecycle(request).metrics.record(RequestRejected(endpoint, error.reason, error.outcome))
        raise
    return await generate(request, prepared, requests, form, prompt_tokens)


async def prepare_completion(request: Request) -> tuple[CompletionRequest, list[GenerationRequest], Format, int]:
    engine = lifecycle(request).engine()
    asked = await body.read(request, CompletionRequest)
    check_model(request, engine, asked.model)
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens

    def ids_and_limits() -> tuple[list[list[int]], list[int]]:
        prompts = preparing.prompt_ids(engine, asked)
        return prompts, [preparing.token_limit(engine, prompt, max_tokens) for prompt in prompts]

    prompts, limits = await asyncio.to_thread(ids_and_limits)
    params = [preparing.sampling(engine, asked, limit, asked.logprobs) for limit in limits]
    requests = fan_out(request, asked, prompts, params, "completions")
    return asked, requests, CompletionFormat(asked.logprobs is not None), sum(map(len, prompts))


async def prepare_chat(request: Request) -> tuple[ChatCompletionRequest, list[GenerationRequest], Format, int]:
    engine = lifecycle(request).engine()
    asked = await body.read(request, ChatCompletionRequest)
    check_model(request, engine, asked.model)
    bounds = [bound for bound in (asked.max_tokens, asked.max_completion_tokens) if bound is not None]
    prompt = await asyncio.to_thread(preparing.chat_ids, engine, asked)
    limit = preparing.token_limit(engine, prompt, min(bounds, default=None))
    params = preparing.sampling(engine, asked, limit, (asked.top_logprobs or 0) if asked.logprobs else None)
    requests = fan_out(request, asked, [prompt], [params], "chat_completions")
    return asked, requests, ChatFormat(bool(asked.logprobs)), len(prompt)


def fan_out(request: Request, asked: Any, prompts: Any, params: Any, endpoint: str) -> list[GenerationRequest]:
    settings = lifecycle(request).settings
    if len(prompts) * asked.choices > settings.max_sequences:
        limit = f"{settings.max_sequences} choices, the most this server takes in one request (--max-queue, up to 128)"
        message = f"{len(prompts)} prompts with n={asked.choices} make more than {limit}."
        raise ApiError(400, message, param="n", code="invalid_value")
    return preparing.fan_out(asked, prompts, params, endpoint, settings.request_timeout_s)


async def generate(
    request: Request,
    asked: CompletionRequest | ChatCompletionRequest,
    requests: list[GenerationRequest],
    form: Format,
    prompt_tokens: int,
) -> Response:
    cycle = lifecycle(request)
    engine = cycle.engine()
    choices = [Choice() for _ in requests]
    if requests[0].sampling.max_tokens == 0:
        requests = nothing_to_do(cycle, requests, choices)
    generation = Generation(engine, requests, cycle.metrics)
    if requests:
        generation.on_progress = cycle.progressed
        generation.on_end = lambda: cycle.generation_ended(generation)
        cycle.generation_started(generation)
        await generation.start()
    options = asked.stream_options
    delivery = Delivery(
        generation=generation,
        format=form,
        envelope=Envelope(
            id=("chatcmpl-" if isinstance(form, ChatFormat) else "cmpl-") + request.state.request_id,
            model=model_names(cycle, engine)[0],
            fingerprint=f"elsa-{__version__}-{engine.info.dtype}-{engine.info.attention}",
        ),
        prompt_tokens=prompt_tokens,
        choices=choices,
        choices_per_prompt=asked.choices,
        keep_alive_s=cycle.settings.keep_alive_interval_s,
        include_usage=bool(options and options.include_usage),
        include_progress=bool(options and options.include_progress),
        running_usage=bool(options and options.include_usage and options.continuous_usage_stats),
    )
    return EventStreamResponse(delivery) if asked.stream else await answer(delivery, request.receive)


def nothing_to_do(
    cycle: Lifecycle, requests: list[GenerationRequest], choices: list[Choice]
) -> list[GenerationRequest]:
    """max_tokens: 0, which the specification allows: every choice ends at its length before the engine is asked."""
    for one, choice in zip(requests, choices):
        choice.finish_reason = "length"
        cycle.metrics.record(RequestReceived(one.endpoint))
        tokens = len(one.prompt_token_ids)
        cycle.metrics.record(RequestFinished(one.endpoint, "length", tokens, 0, None, None, None, None, 0.0))
    return []


# Models and tokens


def model_names(cycle: Lifecycle, engine: Engine) -> tuple[str, ...]:
    return cycle.settings.served_names or (engine.info.name,)


def check_model(request: Request, engine: Engine, model: str | None) -> None:
    names = model_names(lifecycle(request), engine)
    if model is not None and model not in names:
        message = f"The model {bounded(model)!r} does not exist. Served here: {bounded(', '.join(names), 300)}."
        raise ApiError(404, message, param="model", code="model_not_found")


def loaded_engine(request: Request) -> Engine:
    """The engine for questions that need no pass over the model, answered during a drain too."""
    cycle = lifecycle(request)
    return cycle.loaded_engine() or cycle.engine()


def card(engine: Engine, name: str) -> dict[str, Any]:
    info = engine.info
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "elsa-serve",
        "max_model_len": info.max_context,
    }


@router.get("/v1/models", **documented(answers.ModelList))
async def list_models(request: Request) -> Response:
    engine = loaded_engine(request)
    names = model_names(lifecycle(request), engine)
    return JSONResponse({"object": "list", "data": [card(engine, name) for name in names]})


@router.get("/v1/models/{model:path}", **documented(answers.ModelCard, not_found=True))
async def retrieve_model(request: Request, model: str) -> Response:
    engine = loaded_engine(request)
    check_model(request, engine, model)
    return JSONResponse(card(engine, model))


@router.post("/tokenize", **documented(answers.TokenizeResponse, TokenizeRequest))
async def tokenize(request: Request) -> Response:
    engine = loaded_engine(request)
    asked = await body.read(request, TokenizeRequest)
    check_model(request, engine, asked.model)
    if asked.messages:
        ids = await asyncio.to_thread(preparing.chat_ids, engine, asked)
    else:
        ids = await asyncio.to_thread(
            engine.tokenizer.encode, asked.prompt, add_special_tokens=asked.add_special_tokens
        )
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.info.max_context})


@router.post("/detokenize", **documented(answers.DetokenizeResponse, DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    engine = loaded_engine(request)
    asked = await body.read(request, DetokenizeRequest)
    check_model(request, engine, asked.model)
    ids = preparing.check_ids(engine, asked.tokens, "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(engine.tokenizer.decode, ids)})


# Operation


@router.get("/livez", **documented(answers.Status, public=True))
async def livez() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", **documented(answers.Status, public=True, unavailable=True))
@router.get("/health", include_in_schema=False)  # its name in vLLM and other servers
async def readyz(request: Request) -> Response:
    """Whether to send requests here; 503 says why not: loading, draining, stalled, failed."""
    cycle = lifecycle(request)
    state, detail = cycle.health()
    if state != "ready":
        raise cycle.unavailable(state, detail)
    return JSONResponse({"status": state})


@router.get("/version", **documented(answers.Version))
async def version() -> Response:
    return JSONResponse({"version": __version__})


@router.get("/metrics", **documented(str))
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    lifecycle(request).record_state()
    content = await asyncio.to_thread(request.app.state.exposition)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
