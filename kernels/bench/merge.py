"""One results file from two: a newer run, and what it did not measure from an older one.

python -m kernels.bench.merge NEWER OLDER --output kernels/bench/results/attention-h200.json

A row that comes from the older file carries that file's commit and date; the others are those of the file itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kernels.bench import results_file

MEASURED = (
    "ms", "tflops", "tbps", "read_tbps", "relerr", "draws", "over_torch", "graph", "percent_of_ceiling",
    "commit", "date",
)  # fmt: skip


def merged(newer: dict[str, Any], older: dict[str, Any]) -> list[results_file.Row]:
    """All rows of `newer`, then those of `older` that answer a question which `newer` does not."""
    asked = {_question(row) for row in newer["rows"]}
    origin = {"commit": older["commit"], "date": older["date"]}
    return newer["rows"] + [origin | row for row in older["rows"] if _question(row) not in asked]


def _question(row: results_file.Row) -> str:
    return json.dumps({key: value for key, value in row.items() if key not in MEASURED}, sort_keys=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("newer", type=Path)
    parser.add_argument("older", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    newer, older = results_file.read(options.newer), results_file.read(options.older)
    if newer["machine"]["gpu"] != older["machine"]["gpu"]:
        parser.error(f"one file is of {newer['machine']['gpu']}, the other of {older['machine']['gpu']}")
    results_file.write_document(options.output, newer | {"rows": merged(newer, older)})


if __name__ == "__main__":
    main()
