"""A part of test_paged_triton.py in Triton's interpreter, which takes seconds a case: on any CPU, at one tolerance.

`TRITON_INTERPRET=1 pytest tests/kernels/test_paged_triton.py` runs all of it, in some minutes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.interpreter import interpreted

pytest.importorskip("triton")
HERE = Path(__file__).parent
FP32 = [
    "decode_gqa_of_three",
    "mixed",
    "everything",
    "splits_mha",
    "no_keys",
    "bad_values_gqa",
    "page_odd",
    "fp8_scales",
]
HALF = ["decode", "padded", "window_both_sides", "fp8", "sinks_without_keys", "splits_window"]


def chosen() -> list[str]:
    """Node ids."""
    file = str(HERE / "test_paged_triton.py")
    return [
        *(f"{file}::test_fp32[{name}]" for name in FP32),
        *(f"{file}::test_half[{name}-torch.float16]" for name in HALF),
        f"{file}::test_a_sequence_alone_has_the_bits_it_has_in_any_batch[mixed-torch.float32]",
        f"{file}::test_bits_do_not_depend_on_the_number_of_programs[7]",
        *(f"{file}::test_bits_do_not_depend_on_what_a_unit_of_work_is[{name}]" for name in ("splits", "splits_window")),
        *(
            f"{file}::test_{name}"
            for name in (
                "counters_are_left_as_they_were",
                "bounds_beyond_the_lengths_change_nothing",
                "padding_that_points_beyond_the_tokens",
                "lengths_from_the_host_give_the_same_answers",
                "cache_write",
                "every_fp8_code_and_every_tie",
            )
        ),
    ]


@pytest.mark.slow
def test_a_part_in_the_interpreter() -> None:
    passed = re.search(r"(\d+) passed", interpreted(*chosen()))
    assert passed is not None
    assert int(passed[1]) == len(chosen()) - 1 + 12, "cases were skipped or lost"  # the cache write is twelve
