"""Tables of a document, rendered from results files between `<!-- table:NAME -->` and `<!-- /table -->`.

python -m kernels.bench.table README.md            # rewrite the tables
python -m kernels.bench.table README.md --check    # fail if one is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from kernels.bench import results_file

RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
Row = results_file.Row


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(header))) + "|"
    return (
        "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"
    )


def problem(row: Row) -> str:
    """A row's problem in words, the same for all implementations of one case."""
    length = f"{row['Nq']}" if row["Nq"] == row["Nk"] else f"{row['Nq']} of {row['Nk']}"
    heads = f"{row['H']}" if row["H"] == row["Hkv"] else f"{row['H']}/{row['Hkv']}"
    return f"{row['dtype']} B{row['B']} H{heads} D{row['D']} N {length} {'causal' if row['causal'] else 'full'}"


def speed_table(rows: list[Row], dtypes: tuple[str, ...]) -> str:
    """One line a case: TFLOP/s (relerr) of each implementation, and the best of ours over the best peer.

    A star marks a figure timed call by call from Python where others of its line are replays of a CUDA graph.
    """
    rows = [row for row in rows if row["op"] == "prefill" and row["dtype"] in dtypes]
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    cases = dict.fromkeys(problem(row) for row in rows)
    lines = []
    for case in cases:
        found = {row["impl"]: row for row in rows if problem(row) == case}
        graphs = any(row.get("graph") for row in found.values())
        cells = [_speed(found[i], graphs) if i in found else "–" for i in impls]
        ours = max((r["tflops"] for r in found.values() if r["ours"]), default=None)
        peers = max((r["tflops"] for r in found.values() if not r["ours"]), default=None)
        lines.append([case, *cells, f"{ours / peers:.2f}×" if ours and peers else "–"])
    return markdown(["problem", *impls, "best of ours / best peer"], lines)


def _speed(row: Row, graphs: bool) -> str:
    star = "*" if graphs and not row.get("graph") else ""
    return f"{row['tflops']:.0f}{star} ({row['relerr']:.0e})"


def accuracy_table(rows: list[Row]) -> str:
    """One line a family of inputs: each implementation's error at the shortest and at the longest length."""
    rows = [row for row in rows if row["op"] == "accuracy"]
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells = []
        for impl in impls:
            found = sorted((r["Nk"], r["relerr"]) for r in rows if r["family"] == family and r["impl"] == impl)
            cells.append(f"{found[0][1]:.0e} … {found[-1][1]:.0e}" if found else "–")
        lines.append([family, *cells])
    return markdown(["inputs", *impls], lines)


def linear_table(rows: list[Row]) -> str:
    """FP32 linear layers on N(0, 1) data, one line a shape: TFLOP/s of many rows, TB/s of few, and the relerr."""
    rows = [row for row in rows if row["family"] == "normal" and row.get("tflops")]
    many = _linear_lines([row for row in rows if row["M"] > SKINNY], lambda row: f"{row['tflops']:.0f}")
    few = _linear_lines([row for row in rows if row["M"] in FEW], lambda row: f"{row['tbps']:.2f}")
    return (
        f"TFLOP/s (relative error against float64), rows × outputs × inputs:\n\n{many}\n"
        "Few rows: TB/s of the weight read, and the best of ours over what a sum over 2 GiB reads at that moment:\n\n"
        f"{few}"
    )


def _linear_lines(rows: list[Row], speed: Callable[[Row], str]) -> str:
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    shared = any("read_tbps" in row for row in rows)
    lines = []
    for shape in dict.fromkeys((row["M"], row["N"], row["K"]) for row in rows):
        found = {row["impl"]: row for row in rows if (row["M"], row["N"], row["K"]) == shape}
        cells = [f"{speed(found[i])} ({found[i]['relerr']:.0e})" if i in found else "–" for i in impls]
        if shared:
            best = max(row["tbps"] / row["read_tbps"] for row in found.values() if row["ours"])
            cells.append(f"{best:.0%}")
        lines.append([" × ".join(map(str, shape)), *cells])
    return markdown(["shape", *impls, *(["of the bandwidth"] if shared else [])], lines)


def linear_proof_table(rows: list[Row]) -> str:
    """One line a number of rows and a form of ours: its error over torch FP32's, the largest of all families."""
    rows = [row for row in rows if "draws" in row]
    torchs = {_cell(row): row["relerr"] for row in rows if row["impl"] == "torch.fp32"}
    inner = sorted({row["K"] for row in rows})
    lines = []
    for m, impl in dict.fromkeys((row["M"], row["impl"]) for row in rows if row["ours"]):
        found = [row for row in rows if (row["M"], row["impl"]) == (m, impl)]
        cells = []
        for k in inner:
            worst = max((r for r in found if r["K"] == k), key=lambda r: r["relerr"] / torchs[_cell(r)])
            ratio = worst["relerr"] / torchs[_cell(worst)]
            cells.append(f"{ratio:.2f} ({worst['family']}, {worst['over_torch']:.0%})")
        lines.append([f"{m}", impl, f"{found[0]['draws']}", *cells])
    return markdown(["rows", "form", "draws", *(f"K = {k}" for k in inner)], lines)


def _cell(row: Row) -> tuple[int, int, str]:
    return row["M"], row["K"], row["family"]


def decode_table(rows: list[Row]) -> str:
    """One line a case of paged decode: TB/s of keys and values read (relerr) by each implementation."""
    rows = [row for row in rows if row["op"] == "decode"]
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    lines = []
    for case in dict.fromkeys(decode_problem(row) for row in rows):
        found = {row["impl"]: row for row in rows if decode_problem(row) == case}
        cells = [f"{found[i]['tbps']:.2f} ({found[i]['relerr']:.0e})" if i in found else "–" for i in impls]
        lines.append([case, *cells])
    return f"TB/s of keys and values read (relative error against float64):\n\n{markdown(['problem', *impls], lines)}"


def decode_problem(row: Row) -> str:
    """A decode row's problem in words."""
    heads = f"{row['H']}" if row["H"] == row["Hkv"] else f"{row['H']}/{row['Hkv']}"
    cache = "" if row["kv"] == row["dtype"] else f" over {row['kv']}"
    queries = "" if row["Nq"] == 1 else f" {row['Nq']} queries"
    return f"{row['dtype']}{cache} B{row['B']} H{heads} D{row['D']}{queries} N {row['Nk']} page {row['page']}"


def headline_tables(rows: list[Row]) -> str:
    """The long problems of one sequence: FP32, then half."""
    rows = [row for row in rows if row.get("B") == 1 and row["Nq"] >= LONG]
    half = speed_table(rows, ("float16", "bfloat16"))
    return f"TFLOP/s (relative error against float64):\n\n{speed_table(rows, ('float32',))}\n{half}"


def _rows(name: str) -> list[Row]:
    return results_file.read(RESULTS / name)["rows"]


SKINNY = 32  # rows of x up to which a linear layer's time is that of reading its weight
FEW = (1, 8, 16, 32)  # of them, those that the table shows: where tiles of the CUDA form end
LONG = 4096  # query rows of what the headline tables show
TABLES: dict[str, Callable[[], str]] = {
    "attention": lambda: headline_tables(_rows("attention-h200.json")),
    "attention-fp32": lambda: speed_table(_rows("attention-h200.json"), ("float32",)),
    "attention-half": lambda: speed_table(_rows("attention-h200.json"), ("float16", "bfloat16")),
    "decode": lambda: decode_table(_rows("decode-h200.json")),
    "linear": lambda: linear_table(_rows("linear-h200.json")),
    "linear-proof": lambda: linear_proof_table(_rows("linear-h200.json")),
    "accuracy": lambda: accuracy_table(_rows("accuracy-h200.json")),
}


def render(text: str, tables: dict[str, Callable[[], str]] | None = None) -> str:
    """The document with every marked table of ours replaced. Names of other tools' tables are left alone."""
    known = TABLES if tables is None else tables

    def replace(found: re.Match[str]) -> str:
        make = known.get(found["name"])
        return found[0] if make is None else found[1] + make() + found[4]

    return MARKED.sub(replace, text)


def main(
    arguments: list[str] | None = None,
    tables: dict[str, Callable[[], str]] | None = None,
    command: str = "python -m kernels.bench.table",
    about: str | None = __doc__,
) -> None:
    """Render the documents named on the command line. Another `command` may add the tables of other results."""
    parser = argparse.ArgumentParser(
        prog=command, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for path in options.documents:
        text = path.read_text()
        new = render(text, tables)
        if new != text:
            stale.append(path)
            if not options.check:
                path.write_text(new)
    if options.check and stale:
        sys.exit(f"tables out of date in {', '.join(map(str, stale))}: run {command} on them")


if __name__ == "__main__":
    main()
