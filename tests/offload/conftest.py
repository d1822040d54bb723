"""Engines of these tests plan with assumed rates, so that placements are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_fault import Fault
from engine_models import make_engine, save_checkpoint

from elsa_serve.offload import host_rates, measure
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.machine import Rates, assumed_rates

_measured, _measured_now = measure.rates, host_rates.rates_of_memory


@pytest.fixture(autouse=True, scope="module")
def same_rates_on_every_machine() -> Any:
    def assumed(device: torch.device, dtype: torch.dtype, **_: Any) -> Rates:
        return assumed_rates(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "rates", assumed)
        patch.setattr(host_rates, "rates_of_memory", lambda rates, *_, **__: rates)
        yield


@pytest.fixture
def rates() -> Any:
    """`measure.rates` itself, for the tests of measuring."""
    return _measured


@pytest.fixture
def rates_of_memory() -> Any:
    """`host_rates.rates_of_memory` itself."""
    return _measured_now


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make(checkpoint: Path) -> Iterator[Callable[..., OffloadEngine]]:
    """Streamed engines on that checkpoint, shut down after the test."""
    engines: list[OffloadEngine] = []

    def build(**options: Any) -> OffloadEngine:
        engines.append(make_engine(checkpoint, **{"resident_layers": 0, "chunk_tokens": 16} | options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.shutdown()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)
