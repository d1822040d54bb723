"""A running server as the tests see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from elsa_server.running import DrainingServer
from fake_engine import FakeEngine

from elsa_serve.metrics import Metrics


@dataclass
class Running:
    url: str
    server: DrainingServer
    engine: FakeEngine
    metrics: Metrics
    thread: threading.Thread
    clients: list[Any] = field(default_factory=list)  # closed at the end, so that no socket is left to the collector

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "unused", "max_retries": 0, "timeout": 20} | options
        self.clients.append(openai.OpenAI(base_url=self.url + "/v1", **options))
        return self.clients[-1]

    def http(self, **options: Any) -> httpx.Client:
        self.clients.append(httpx.Client(base_url=self.url, timeout=20, **options))
        return self.clients[-1]

    def value(self, name: str, **labels: str) -> float:
        """Sum over the series of a metric that have these labels."""
        samples = (s for metric in self.metrics.registry.collect() for s in metric.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.drain()
        self.server.drain()
        self.thread.join(10)
        assert not self.thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something that another thread does has happened."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)
