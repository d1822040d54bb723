"""Fixtures of the kernels' tests."""

import pytest
import triton


@pytest.fixture
def interpreter() -> None:
    """Skips where Triton would compile: `interpreter.interpreted` runs a file's tests in a process that interprets."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")
