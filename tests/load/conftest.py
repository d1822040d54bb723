"""Endpoints of the load tests: each a process of its own on a free port of 127.0.0.1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsa_load.processes import Program

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def mock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("mock") / "mock.log"
    command = [sys.executable, str(HERE / "mock_endpoint.py"), "{port}"]
    with Program(command, log, ready_paths=("/v1/models",), startup_s=30, stop_s=5) as program:
        yield program.url
