"""Puts the server together: `create_app(engine, settings, metrics)`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from elsa_serve import __version__
from elsa_serve.metrics import Metrics
from elsa_serve.protocol import Engine
from elsa_serve.stats import MetricsSink
from elsa_server import openapi
from elsa_server.errors import from_status
from elsa_server.lifecycle import Lifecycle
from elsa_server.middleware import Admission, Authentication, BodyLimit, CatchAll, RequestId
from elsa_server.routes import router
from elsa_server.settings import Settings


def create_app(
    engine: Engine | Future[Engine],
    settings: Settings,
    metrics: Metrics,
    sink: MetricsSink | None = None,
) -> FastAPI:
    """The ASGI application. With a future it serves at once and answers 503 until the engine is there.

    `metrics` is what /metrics shows; `sink` takes the server's records, where that is more than `metrics` (a tee).
    """
    lifecycle = Lifecycle(engine, settings, sink or metrics)
    app = FastAPI(
        title="ELSA-Serve",
        version=__version__,
        middleware=middleware(lifecycle, settings),
        docs_url=None,  # they load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: http_error},
    )
    app.state.lifecycle = lifecycle
    app.state.exposition = metrics.exposition
    app.include_router(router)
    app.openapi = document(app, settings)  # type: ignore[method-assign]
    return app


def middleware(lifecycle: Lifecycle, settings: Settings) -> list[Middleware]:
    """Outermost first."""
    stack = [Middleware(RequestId)]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # of origins that are named; the official client sends a dozen of its own
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        )
    stack.append(Middleware(CatchAll))
    if settings.api_keys:
        stack.append(Middleware(Authentication, settings.api_keys, settings.open_metrics, lifecycle.metrics))
    stack.append(Middleware(BodyLimit, settings.max_body_bytes, lifecycle.metrics))
    stack.append(Middleware(Admission, lifecycle))
    return stack


async def http_error(request: Request, error: Exception) -> Response:
    """What the router itself answers: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        detail = f"Unknown route: {request.method} {request.url.path[:100]}"
    elif error.status_code == 405:
        detail = f"{request.method} is not allowed on {request.url.path[:100]}"
    else:
        detail = str(error.detail)
    return from_status(error.status_code, detail, error.headers).response()


def document(app: FastAPI, settings: Settings) -> Callable[[], dict[str, Any]]:
    def openapi_document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi.build(app, settings.served_names, __version__)
        return app.openapi_schema

    return openapi_document
