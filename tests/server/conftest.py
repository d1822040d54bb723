"""A real server on a free port for every test that asks for one: `start(...)` starts it, the fixture stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from elsa_server.cli import bind
from elsa_server.running import make_server, url_of
from elsa_server.settings import Settings
from fake_engine import FakeEngine
from server_harness import Running, eventually

from elsa_serve.metrics import Metrics


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Running]]:
    """start(engine or future of one, **settings) -> Running."""
    servers: list[Running] = []

    def launch(engine: FakeEngine | Future[Any] | None = None, **settings: Any) -> Running:
        metrics = Metrics()
        fake = engine if isinstance(engine, FakeEngine) else FakeEngine()
        fake.sink = metrics
        listener = bind("127.0.0.1", 0)
        server = make_server(engine if isinstance(engine, Future) else fake, Settings(**settings), metrics)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append(Running(url_of(listener), server, fake, metrics, thread))
        eventually(lambda: server.started)
        return servers[-1]

    yield launch
    for running in servers:
        running.stop()


@pytest.fixture(scope="module")
def running(start: Callable[..., Running]) -> Running:
    """A server with default settings, shared by the tests of a module."""
    return start()
