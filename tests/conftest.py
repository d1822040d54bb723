"""GPU tests carry markers and skip themselves, saying why, where there is no such GPU."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs_gpu, needs_hopper = (item.get_closest_marker(name) is not None for name in ("gpu", "hopper"))
    if not (needs_gpu or needs_hopper):
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if needs_hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
