"""Plots of the results files, as SVG beside them (needs matplotlib, which the `bench` extra brings).

python -m kernels.bench.plot
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from kernels.bench import results_file
from kernels.bench.table import LONG, RESULTS, Row, problem


def accuracy(rows: list[Row], path: Path) -> None:
    """Relative error over the number of keys, one panel a family of inputs, TF32 left out: it is three decades up."""
    rows = [row for row in rows if row["op"] == "accuracy" and row["precision"] != "tf32"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    figure, panels = plt.subplots(1, len(families), figsize=(3 * len(families), 3), sharey=True, squeeze=False)
    for panel, family in zip(panels[0], families):
        for impl in impls:
            points = sorted((r["Nk"], r["relerr"]) for r in rows if r["family"] == family and r["impl"] == impl)
            panel.loglog(*zip(*points), marker=".", label=impl)
        panel.set(title=family, xlabel="keys")
    panels[0][0].set_ylabel("relative error against float64")
    panels[0][-1].legend(fontsize="x-small")
    _save(figure, path)


def speed(rows: list[Row], path: Path, dtype: str) -> None:
    """TFLOP/s of every implementation, one group of bars a problem; figures that the host slowed are left out."""
    rows = [row for row in rows if row["op"] == "prefill" and row["dtype"] == dtype and row["B"] == 1]
    rows = [row for row in rows if row["Nq"] >= LONG]
    problems = list(dict.fromkeys(problem(row) for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    width = 0.8 / len(impls)
    figure, panel = plt.subplots(figsize=(1.5 * len(problems) + 2, 3.5))
    for i, impl in enumerate(impls):
        found = [(problems.index(problem(row)), row["tflops"]) for row in rows if row["impl"] == impl]
        panel.bar([x + i * width for x, _ in found], [y for _, y in found], width, label=impl)
    labels = [p.removeprefix(dtype).strip().replace(" N ", "\nN ") for p in problems]
    panel.set_xticks([x + 0.4 - width / 2 for x in range(len(problems))], labels, fontsize="x-small")
    panel.set_ylabel("TFLOP/s")
    panel.legend(fontsize="x-small")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})  # the same results give the same file
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h200", help="the <machine> of the results files to plot")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the plots")
    options = parser.parse_args(arguments)
    plt.rcParams |= {"svg.hashsalt": "elsa", "svg.fonttype": "none"}  # stable ids, and text that stays text
    measured = results_file.read(RESULTS / f"attention-{options.machine}.json")["rows"]
    for dtype in ("float32", "float16"):
        speed(measured, options.output / f"attention-{dtype}-{options.machine}.svg", dtype)
    rows = results_file.read(RESULTS / f"accuracy-{options.machine}.json")["rows"]
    accuracy(rows, options.output / f"accuracy-{options.machine}.svg")


if __name__ == "__main__":
    main()
