"""Disks that fail when a test says so."""

from __future__ import annotations

import pytest
import torch

from elsa_serve.offload.disk import Bounce, DirectFile


class Fault:
    """Replaces `DirectFile.read`: passes through until told to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self._read = DirectFile.read
        monkeypatch.setattr(DirectFile, "read", lambda *args: self(*args))

    def __call__(self, file: DirectFile, start: int, nbytes: int, bounce: Bounce) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self._read(file, start, nbytes, bounce)
