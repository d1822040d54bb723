"""Deliver a generation: as server-sent events, or as one JSON answer. Both watch for a client that goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from elsa_serve.protocol import TokenEvent
from elsa_server.errors import ApiError
from elsa_server.formats import Choice, Envelope, Format, progress, usage
from elsa_server.generation import Generation

logger = logging.getLogger("elsa_server")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_CLOSED = 499  # for the log only: nobody is left to read it


@dataclass(slots=True)
class Delivery:
    """One answer on its way: where it comes from, how it is written, and what was asked for."""

    generation: Generation
    format: Format
    envelope: Envelope
    prompt_tokens: int
    choices: list[Choice]
    keep_alive_s: float
    include_usage: bool = False
    include_progress: bool = False
    running_usage: bool = False
    completion_tokens: int = field(default=0)
    choices_per_prompt: int = 1

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, whatever the number of its choices; so do its tokens that the first of them found."""
        found = [choice.cached_tokens for choice in self.choices]
        each = self.choices_per_prompt
        cached = sum(min(found[first : first + each]) for first in range(0, len(found), each))
        return usage(self.prompt_tokens, self.completion_tokens, cached)

    def take(self, index: int, event: TokenEvent) -> list[TokenEvent]:
        """Count an event. Returns it as the list of tokens to report log-probabilities of: one or none.

        Raises ApiError for an end that is no answer: cancelled, out of time, failed.
        """
        if event.finish_reason not in (None, "stop", "length"):
            raise ending(event)
        self.completion_tokens += event.token_id is not None
        self.choices[index].finish_reason = event.finish_reason
        self.choices[index].cached_tokens = event.cached_tokens
        return [event] if event.logprob is not None else []


def ending(event: TokenEvent) -> ApiError:
    if event.finish_reason == "timeout":
        message = "The request took longer than this server allows (--request-timeout)."
        # A retry would cost as much and end the same way.
        return ApiError(504, message, code="request_timeout", headers={"x-should-retry": "false"})
    if event.finish_reason == "cancelled":
        return ApiError(503, "The request was cancelled by the server.", code="cancelled", headers={"Retry-After": "1"})
    logger.error("request %s failed: %s", event.request_id, event.error)
    return ApiError(500, "The engine failed while it answered; see the server's log.", code="engine_error")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(delivery: Delivery, receive: Receive) -> Response:
    """Collect the whole answer. Raises ApiError when there is none."""
    collecting = asyncio.ensure_future(collect(delivery))
    watching = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            delivery.generation.disconnected()
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(collecting.result())
    finally:
        collecting.cancel()
        watching.cancel()
        delivery.generation.abort()  # nothing to do unless we are leaving early


async def collect(delivery: Delivery) -> dict[str, Any]:
    async for item in delivery.generation.events():
        index, event = item or (0, None)
        if isinstance(event, TokenEvent):
            choice = delivery.choices[index]
            choice.tokens += delivery.take(index, event)
            choice.text += event.text
    form = delivery.format
    whole = [form.whole(index, choice) for index, choice in enumerate(delivery.choices)]
    return delivery.envelope.wrap(form.kind, whole) | {"usage": delivery.usage()}


class EventStreamResponse(Response):
    """Server-sent events. Headers go out at once, before the prompt is read: proxies and clients see life."""

    media_type = "text/event-stream"

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                self.delivery.generation.disconnected()
        except OSError:  # the connection broke under a write
            self.delivery.generation.disconnected()
        finally:
            writing.cancel()
            watching.cancel()
            self.delivery.generation.abort()

    async def _write(self, send: Send) -> None:
        async for part in chunks(self.delivery):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def data(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def chunks(delivery: Delivery) -> AsyncIterator[bytes]:
    """The events of a stream: opening, deltas and finish of each choice, then usage, then [DONE]."""
    form, envelope = delivery.format, delivery.envelope

    def chunk(*choices: dict[str, Any], **extra: Any) -> bytes:
        usage = {"usage": delivery.usage() if delivery.running_usage else None} if delivery.include_usage else {}
        return data(envelope.wrap(form.chunk_kind, list(choices)) | usage | extra)

    opened: set[int] = set()
    try:
        async for item in delivery.generation.events(delivery.keep_alive_s or None):
            if item is None:
                yield KEEP_ALIVE
                continue
            index, event = item
            if not isinstance(event, TokenEvent):
                if delivery.include_progress:
                    yield chunk(prefill_progress=progress(index, event))
                continue
            tokens = delivery.take(index, event)
            if index not in opened:
                opened.add(index)
                opening = form.opening(index)
                if opening is not None:
                    yield chunk(opening)
            if event.text or (tokens and form.logprobs):
                choice = delivery.choices[index]
                yield chunk(form.delta(index, event.text, tokens, choice.offset))
                choice.offset += sum(len(t.logprob.text) for t in tokens if t.logprob)
            if event.finish_reason is not None:
                yield chunk(form.finish(index, event.finish_reason))
        for index, choice in enumerate(delivery.choices):
            if choice.finish_reason is not None and index not in opened:  # max_tokens: 0, no event ever came
                yield chunk(form.finish(index, choice.finish_reason))
        if delivery.include_usage:
            yield chunk(usage=delivery.usage())
    except ApiError as error:
        yield data(error.body())
    yield DONE
