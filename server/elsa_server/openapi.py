"""The OpenAPI document: typed requests, typed answers, every error, the security scheme."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from elsa_server import answers
from elsa_server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

PREFIX = "#/components/schemas/"
BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
CHUNKS = (answers.Completion, answers.ChatCompletionChunk)
DESCRIPTIONS = {
    400: "The request is malformed, asks for something unsupported, or is too long for the context.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    500: "The engine failed.",
    503: "Loading, draining, overloaded or stalled; see Retry-After.",
    504: "The request took longer than the server allows.",
}


def documented(
    response: type,
    request: type[BaseModel] | None = None,
    *,
    streams: type[BaseModel] | None = None,
    public: bool = False,
    not_found: bool = False,
    unavailable: bool = False,
) -> dict[str, Any]:
    """Route options that describe what a handler reads and returns by itself."""
    statuses = [] if public else [401]
    if request is not None:
        statuses += [400, 404, 413, 415, 500, 503]
    if streams is not None:
        statuses += [504]
    if not_found:
        statuses += [404, 503]
    if unavailable or response is answers.ModelList:
        statuses += [503]
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": answers.ErrorResponse, "description": DESCRIPTIONS[status]}
        for status in sorted(set(statuses))
    }
    extra: dict[str, Any] = {"security": [] if public else [{"ApiKey": []}]}
    if response is str:
        responses[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics."}
    else:
        responses[200] = {"model": response, "description": "Success."}
    if streams is not None:
        text = f"A {streams.__name__}, an ErrorResponse, or [DONE] at the end."
        event = {
            "type": "object",
            "required": ["data"],
            "properties": {"data": {"type": "string", "description": text}},
        }
        event_stream = {"schema": event}
        responses[200]["content"] = {"text/event-stream": event_stream}
    if request is not None:
        content = {"application/json": {"schema": {"$ref": PREFIX + request.__name__}}}
        extra["requestBody"] = {"required": True, "content": content}
    # The handlers return responses of their own, which are not validated a second time.
    return {"response_model": None, "responses": responses, "openapi_extra": extra}


def build(app: FastAPI, served_names: tuple[str, ...], version: str) -> dict[str, Any]:
    document = get_openapi(title="ELSA-Serve", version=version, routes=app.routes)
    _, definitions = models_json_schema([(m, "validation") for m in BODIES + CHUNKS], ref_template=PREFIX + "{model}")
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for name in ("CompletionRequest", "ChatCompletionRequest") if served_names else ():
        schemas[name]["properties"]["model"]["enum"] = list(served_names)
    components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # validation errors are 400 here
            if "text/plain" in operation["responses"]["200"].get("content", {}):
                operation["responses"]["200"]["content"].pop("application/json", None)
    return document
