"""Puts rows of results files from other machines into one here, in place of those of the same configuration.

    python -m load_tests.merge_rows run/offload-h200.json --output load_tests/results/offload-h200.json
    python -m load_tests.merge_rows run/disk-h200.json --fresh --output load_tests/results/disk-h200.json

For files of `load_tests.offload_bench`, `offload_peers`, `disk_bench` and `reuse_bench`. The head of the output stays
as it is; each row names its own commit and date, and what else of its file's head says something different.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kernels.bench import results_file
from load_tests.offload_bench import CONFIGURATION, of_its_own


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="of rows of one configuration the first file's wins")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KEY=VALUE", help="rows alone that have this value; all such"
    )
    parser.add_argument("--fresh", action="store_true", help="without the rows that --output has, and with a new head")
    parser.add_argument("--output", type=Path, required=True, help="the results file")
    args = parser.parse_args(argv)
    documents = [results_file.read(file) for file in args.files]
    if args.fresh:
        head, rows = documents[0], []
    else:
        head = results_file.read(args.output)
        rows = head["rows"]
    wanted = [item.partition("=")[::2] for item in args.only]
    taken: dict[str, results_file.Row] = {}
    for document in documents:
        for row in document["rows"]:
            if all(str(row.get(key)) == value for key, value in wanted):
                taken.setdefault(configuration(row), of_its_own(row, document, head))
    if not taken:
        parser.error(f"no row with {' and '.join(args.only)}" if wanted else "the files have no rows")
    kept = [taken.pop(configuration(row), row) for row in rows]
    results_file.write_document(args.output, head | {"rows": [*kept, *taken.values()]})
    print(f"{args.output}: {len(kept) + len(taken)} rows")
    return 0


def configuration(row: results_file.Row) -> str:
    return repr([row.get(key) for key in CONFIGURATION])


if __name__ == "__main__":
    raise SystemExit(main())
