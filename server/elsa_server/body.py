"""Read, bound, parse and validate a JSON body without holding up the event loop."""

from __future__ import annotations

import asyncio
import json
import json.scanner
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from elsa_server.errors import ApiError, bounded, echo, from_validation

SMALL_BODY = 64 << 10  # bytes parsed where they are: a millisecond, less than a thread's hand-over under load
MAX_CONTAINERS = 20_000  # arrays and objects of a body larger than that; no request needs more

ModelT = TypeVar("ModelT", bound=BaseModel)


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def number(text: str) -> float | int:
    """JSON has one kind of number: 3.0 is an integer there, and some clients write it so."""
    value = float(text)
    return int(value) if value.is_integer() else value


class YieldingDecoder(json.JSONDecoder):
    """The standard decoder with its scanner in Python, which lets other threads run between values.

    The scanner in C holds the interpreter lock for a whole document: 0.09 s for a million token ids, over 0.5 s for as
    many empty lists. Long strings are still found in C, so a body that is mostly text is as quick as before.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=refuse_constant, parse_float=number)
        self.parse_object = self._bounded(json.decoder.JSONObject)  # type: ignore[attr-defined]
        self.parse_array = self._bounded(json.decoder.JSONArray)  # type: ignore[attr-defined]
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]
        self._containers = 0

    def _bounded(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse hordes of lists and objects: the collector walks and frees them in one go, and nothing else runs."""

        def parse_container(*args: Any) -> Any:
            self._containers += 1
            if self._containers > MAX_CONTAINERS:
                raise ValueError(f"more than {MAX_CONTAINERS} arrays and objects")
            return parse(*args)

        return parse_container


def parse(body: bytes, model: type[ModelT]) -> ModelT:
    """Raises ApiError 400 naming the first problem."""
    decoder = (
        YieldingDecoder()
        if len(body) > SMALL_BODY
        else json.JSONDecoder(parse_constant=refuse_constant, parse_float=number)
    )
    try:
        value = decoder.decode(body.decode())
    except RecursionError:
        raise ApiError(400, "The body is not valid JSON: it is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        detail = bounded(str(error), 200)
        raise ApiError(400, f"The body is not acceptable JSON: {detail}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body must be a JSON object, got {echo(value)}.", code="invalid_value")
    # Before pydantic, which would make an error of every one of a million unknown keys.
    for key in value:
        if key not in model.model_fields:
            param = bounded(key)
            message = f"Unrecognized request argument supplied: {param!r}"
            raise ApiError(400, message, param=param, code="unknown_parameter")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


async def read(request: Request, model: type[ModelT]) -> ModelT:
    """The validated body. Raises ApiError 400, 413 (from the body limit) or 415."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"Content-Type must be application/json, got {echo(content_type)}."
        raise ApiError(415, message, code="unsupported_media_type")
    body = await request.body()
    if len(body) <= SMALL_BODY:
        return parse(body, model)
    return await asyncio.to_thread(parse, body, model)
