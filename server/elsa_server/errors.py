"""One error shape for every status, and the one mapping from exceptions to it.

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

Messages are bounded and carry no path, address or traceback: what a client sent is echoed in at most `ECHO` characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from elsa_serve.errors import ContextTooLong, EngineDraining, EngineFailed, Overloaded, QueueFull, UsageError
from elsa_serve.stats import Outcome

ECHO = 100  # characters of the client's own input in a message
MESSAGE = 1000  # characters of a message
RETRY_AFTER_MAX_S = 120  # the official client ignores a longer Retry-After

RejectReason = Literal["queue_full", "draining", "too_long", "body_size", "auth", "invalid"]


class ApiError(Exception):
    """An answer other than 2xx. `reason` is the label under which a refused generation request is counted."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: RejectReason = "invalid",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, bounded(message, MESSAGE), code, param
        self.headers = dict(headers or {})
        self.reason: RejectReason = reason

    @property
    def outcome(self) -> Outcome:
        if self.status in (429, 503):
            return "rejected"
        return "client_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bounded(text: str, limit: int = ECHO) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def echo(value: Any) -> str:
    """A client's value for a message: cut before it is formatted, so that a huge one costs nothing."""
    if isinstance(value, str | bytes | list | tuple) and len(value) > ECHO:
        value = value[:ECHO]
    elif isinstance(value, dict) and len(value) > ECHO:
        return f"an object with {len(value)} keys"
    elif isinstance(value, int) and value.bit_length() > 256:  # str() of huge integers is slow, then forbidden
        return "an integer of more than 256 bits"
    return bounded(repr(value))


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(RETRY_AFTER_MAX_S, max(1, math.ceil(seconds))))}


def from_exception(error: BaseException) -> ApiError:
    """What a client is told of an exception. Anything unforeseen is a 500 that says nothing of the inside."""
    match error:
        case ApiError():
            return error
        case ContextTooLong():
            return context_too_long(str(error))
        case QueueFull():
            return overloaded(error, "overloaded", "queue_full")
        case EngineDraining():
            return overloaded(error, "draining", "draining")
        case Overloaded():
            return overloaded(error, "overloaded", "queue_full")
        case UsageError():
            return ApiError(400, str(error))
        case EngineFailed():
            return ApiError(500, "The engine has failed and cannot answer; see the server's log.", code="engine_failed")
        case _:
            return ApiError(500, "Internal error; the server's log has it under this answer's X-Request-Id.")


def overloaded(error: Overloaded, code: str, reason: RejectReason) -> ApiError:
    return ApiError(503, str(error), code=code, headers=retry_after(error.retry_after_s), reason=reason)


def context_too_long(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code="context_length_exceeded", param=param, reason="too_long")


def from_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Errors of the framework's router: unknown route, wrong method."""
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
    return ApiError(status, detail, code=code.get(status), headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """The first problem in full, the others as a number; 400 as the OpenAI API answers it, not 422."""
    problems = error.errors(include_url=False)
    paths = [_path(problem) for problem in problems]
    param = bounded(paths[0]) or None
    # Where a value may be of several kinds, each complains: the one whose kind it is knows best, else all are named.
    same = [problem for problem, path in zip(problems, paths) if path == paths[0]]
    fitting = [problem for problem in same if not problem["type"].endswith("_type")]
    first = (fitting or same)[0]
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param}.", param=param, code="missing_required_parameter")
    if first["type"] == "unsupported_parameter":
        return ApiError(400, f"{param}: {first['msg']}", param=param, code="unsupported_parameter")
    together = first.get("ctx", {}).get("param")  # a rule across parameters, broken by this one
    if together is not None:
        return ApiError(400, f"{first['msg']}.", param=together, code="invalid_value")
    text = first["msg"] if fitting else " or ".join(dict.fromkeys(problem["msg"] for problem in same))
    others = len(set(paths)) - 1
    more = f" ({others} more problem{'s' * (others > 1)})" if others else ""
    text = f"Invalid value for {param or 'the body'}: {bounded(text, 300)}, got {echo(first['input'])}.{more}"
    return ApiError(400, text, param=param, code="invalid_value")


def _path(problem: ErrorDetails) -> str:
    """Where in the body: members of a union appear in `loc` by their schema name, which is nothing the client sent."""
    return ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier())
