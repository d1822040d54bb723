"""Run test_triton.py in Triton's interpreter: on any CPU, against the same reference and at the same tolerance."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_case_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_triton.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 90, "cases were skipped or lost"
    skipped = re.search(r"(\d+) skipped", result.stdout)
    assert skipped is not None
    assert int(skipped[1]) == 2  # what only a GPU has: its memory and its graphs
