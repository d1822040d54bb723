"""The HTTP server's run: its listening line, its drain on a signal, its end."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future
from types import FrameType
from typing import Any

import uvicorn

from elsa_serve.metrics import Metrics
from elsa_serve.protocol import Engine
from elsa_serve.stats import MetricsSink
from elsa_server.app import create_app
from elsa_server.lifecycle import Lifecycle
from elsa_server.settings import Settings

POLL_S = 0.05  # between two looks at how far a drain has come
LAST_WORDS_S = 5.0  # for interrupted answers to reach their clients
KEEP_ALIVE_S = 75  # of idle connections: longer than the usual balancer's, so that it is never the server that closes


class DrainingServer(uvicorn.Server):
    """Keeps listening through a drain, so that /readyz and new requests get an answer instead of a closed door.

    uvicorn closes its sockets at the signal, and raises the signal again at the end; a drained server exits with 0.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.lifecycle.engine_future.add_done_callback(self._loaded)
        await super().startup(sockets)
        for listener in sockets or ():
            print(f"Listening on {url_of(listener)}", flush=True)

    def _loaded(self, future: Future[Engine]) -> None:
        """A model that cannot be loaded ends the server; called on the loader's thread."""
        if future.exception() is not None:
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain()

    def drain(self) -> None:
        """Begin to stop; a second call stops at once. From any thread, and from a signal handler."""
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self.lifecycle.begin_drain()
        if not self._tasks:
            self._tasks.add(asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        while not self.lifecycle.drained():
            await asyncio.sleep(POLL_S)
        self.lifecycle.interrupt_all()
        loop = asyncio.get_running_loop()
        until = loop.time() + LAST_WORDS_S
        while self.lifecycle.open_requests and loop.time() < until:
            await asyncio.sleep(POLL_S)
        self.should_exit = True


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(
    engine: Engine | Future[Engine], settings: Settings, metrics: Metrics, sink: MetricsSink | None = None
) -> DrainingServer:
    app = create_app(engine, settings, metrics, sink)
    options: dict[str, Any] = {
        "access_log": False,  # the middleware logs, with the request id
        "log_config": None,
        "log_level": "warning",
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": int(LAST_WORDS_S),
    }
    return DrainingServer(uvicorn.Config(app, **options), app.state.lifecycle)


def serve(
    listener: socket.socket, engine: Future[Engine], settings: Settings, metrics: Metrics, sink: MetricsSink
) -> None:
    """Serve on a bound socket until a signal, and the drain after it, end it; or until the engine cannot be loaded."""
    make_server(engine, settings, metrics, sink).run(sockets=[listener])
