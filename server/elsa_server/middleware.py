"""Pure ASGI middleware: request ids and the log, the last net for exceptions, authentication, body size, admission.

Outermost first: RequestId, (CORS), CatchAll, Authentication, BodyLimit, Admission, then the routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elsa_serve.errors import ElsaError
from elsa_serve.stats import MetricsSink, RequestRejected
from elsa_server.errors import ApiError, from_exception
from elsa_server.lifecycle import Lifecycle

logger = logging.getLogger("elsa_server")

GENERATION_PATHS = {"/v1/completions": "completions", "/v1/chat/completions": "chat_completions"}
PROBE_PATHS = ("/livez", "/readyz", "/health")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DISCARD_BYTES = 64 << 20  # of a refused body are still read, so that the client gets to see the answer
DISCARD_S = 5.0


def generation_endpoint(scope: Scope) -> str | None:
    """The metrics' label of a request that asks for tokens, None for any other."""
    return GENERATION_PATHS.get(scope["path"]) if scope["method"] == "POST" else None


class RequestId:
    """Gives every request an id, the client's own where it is of a safe form, and logs how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in (*PROBE_PATHS, "/metrics") else logging.INFO
            seconds = time.monotonic() - start
            logger.log(level, "%s %r %d %.3fs id=%s", scope["method"], scope["path"][:200], status, seconds, request_id)


class CatchAll:
    """Turns any exception into the one error shape; what was not foreseen is logged with its traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body_read = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        started = False

        async def watch_receive() -> Message:
            nonlocal body_read
            message = await receive()
            body_read = body_read or not message.get("more_body", False)
            return message

        async def watch_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, watch_receive, watch_send)
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, ApiError | ElsaError):
                logger.exception("request %s failed", scope["state"]["request_id"])
            if started:
                raise
            # A client that waits for "100 Continue" has not sent its body, and need not.
            if not body_read and "expect" not in headers:
                await discard(receive)
            await from_exception(error).response()(scope, receive, send)


async def discard(receive: Receive) -> None:
    """Read on for a while: closing a connection with unread bytes resets it, and the answer would be lost."""
    remaining = DISCARD_BYTES
    try:
        async with asyncio.timeout(DISCARD_S):
            while remaining > 0:
                message = await receive()
                remaining -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class Authentication:
    """Bearer keys on every route but the probes (and /metrics where it is opened). All keys are compared, always."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_metrics: bool, metrics: MetricsSink) -> None:
        self.app, self.metrics = app, metrics
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.open_paths = (*PROBE_PATHS, "/metrics") if open_metrics else PROBE_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths and not self.allowed(scope):
            endpoint = generation_endpoint(scope)
            if endpoint is not None:
                self.metrics.record(RequestRejected(endpoint, "auth", "client_error"))
            message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}, reason="auth")
        await self.app(scope, receive, send)

    def allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Digests have one length whatever the key's, and no comparison stops at the first match.
        offered = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(offered, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """413 for a body over the limit, by its declared length or, without one, as it arrives."""

    def __init__(self, app: ASGIApp, limit: int, metrics: MetricsSink) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            endpoint = generation_endpoint(scope)
            if endpoint is not None:
                self.metrics.record(RequestRejected(endpoint, "body_size", "client_error"))
            raise self.too_large()
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self.too_large()
            return message

        await self.app(scope, limited_receive, send)

    def too_large(self) -> ApiError:
        message = f"The body is larger than this server accepts ({self.limit} bytes; --max-body raises it)."
        return ApiError(413, message, code="request_too_large", reason="body_size")


class Admission:
    """Counts open generation requests to their last byte, and refuses new ones while the server cannot take them."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self.lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = generation_endpoint(scope) if scope["type"] == "http" else None
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        try:
            self.lifecycle.engine()
        except ApiError as error:
            self.lifecycle.metrics.record(RequestRejected(endpoint, error.reason, error.outcome))
            raise
        self.lifecycle.open_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.open_requests -= 1
