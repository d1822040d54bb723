"""The weights' way to the device: resident layers once, the others through a ring of slots, ahead of the compute."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from elsa_serve.offload.streams import Streams
from elsa_serve.offload.weights import ModelWeights


class WeightStream:
    def __init__(self, weights: ModelWeights, resident: Collection[int], slots: int, streams: Streams) -> None:
        raise NotImplementedError

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Bind layer `index` to its weights on the device and yield the module. Call in order, 0 … last, then 0 again."""
        raise NotImplementedError

    def rewind(self) -> None:
        """The next layer will be 0: call when a pass was cut short."""

    @property
    def device_nbytes(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """Wait for copies under way and free the slots. Idempotent."""
