"""The planner's predictions beside what was measured, for every row of the results that has both.

    python -m load_tests.predicted                    # all of load_tests/results
    python -m load_tests.predicted results/some.json --limit 15

A row is one configuration of one run. `predicted` is from rates measured before the run's first pass, and `off` its
distance from the measurement, in per cent of the measurement; `live` is what the server's metrics say, where each pass
is predicted by what the passes before it took of the host. Exits with 1 where a prediction is further off than --limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kernels.bench import results_file

RESULTS = Path(__file__).parent / "results"
PHASES = {
    "prefill": ("predicted_prefill_s", "prefill_s"),
    "decode": ("predicted_decode_s_per_token", "decode_s_per_token"),
    "pass": ("predicted_s_per_pass", "s_per_pass"),  # of several tokens, or of several requests
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results files (default: all of load_tests/results)")
    parser.add_argument("--limit", type=float, default=15.0, help="per cent that a prediction may be off (default: 15)")
    parser.add_argument("--commit", default="", help="only rows of commits that begin so")
    args = parser.parse_args(argv)
    files = args.files or sorted(RESULTS.glob("*.json"))
    found = [line for file in files for line in comparisons(file, args.commit)]
    print(f"{'configuration':<66} {'phase':>8} {'predicted s':>11} {'measured s':>10} {'off':>7} {'live':>7}")
    for name, phase, predicted, measured, live in found:
        there = f"{off(live, measured):>+6.1f}%" if live else f"{'–':>7}"
        print(f"{name:<66} {phase:>8} {predicted:>11.4f} {measured:>10.4f} {off(predicted, measured):>+6.1f}% {there}")
    far = [line for line in found if abs(off(*line[2:4])) > args.limit]
    print(f"{len(found)} predictions, {len(far)} further off than {args.limit:g} %")
    return 1 if far else 0


def comparisons(file: Path, commit: str = "") -> Iterator[tuple[str, str, float, float, float | None]]:
    """(configuration, phase, predicted seconds, measured ones, live prediction) of a file's rows that have the two."""
    doc = results_file.read(file)
    for row in doc["rows"]:
        if not str(row.get("commit", doc["commit"])).startswith(commit):
            continue
        for phase, (guess, fact) in PHASES.items():
            if row.get(guess) and row.get(fact):
                yield configuration(row), phase, row[guess], row[fact], row.get(f"live_{guess}")


def configuration(row: dict[str, Any]) -> str:
    asked = ",".join(f"{key}={value}" for key, value in (row.get("asked") or {}).items() if value is not None)
    parts = (
        row["dtype"],
        f"{row['layers']} layers",
        f"{row['context']} tokens",
        row["gpu_cap"],
        row["attention"],
        "elsa linear" if row.get("linear") == "elsa" else None,
        row.get("case"),
        asked,
    )
    return " ".join(part for part in parts if part)


def off(predicted: float, measured: float) -> float:
    return 100 * (predicted / measured - 1)


if __name__ == "__main__":
    raise SystemExit(main())
