"""Run test_triton.py in Triton's interpreter: on any CPU, against the same reference and at the same tolerance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.interpreter import interpreted

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_case_in_the_interpreter() -> None:
    printed = interpreted(str(HERE / "test_triton.py"))
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None
    assert int(passed[1]) >= 90, "cases were skipped or lost"
    skipped = re.search(r"(\d+) skipped", printed)
    assert skipped is not None
    assert int(skipped[1]) == 4  # what only a GPU has: memory, graphs, tiles by its registers, sums that truncate
