"""Engines of these tests plan with assumed rates, so that placements are the same on every machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elsa_serve.offload import measure
from elsa_serve.offload.machine import Rates, assumed_rates

_measured = measure.rates


@pytest.fixture(autouse=True, scope="module")
def same_rates_on_every_machine() -> Any:
    def assumed(device: torch.device, dtype: torch.dtype, **_: Any) -> Rates:
        return assumed_rates(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "rates", assumed)
        yield


@pytest.fixture
def rates() -> Any:
    """`measure.rates` itself, for the tests of measuring."""
    return _measured
