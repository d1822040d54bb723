"""The README's tables, those of the whole system beside those of the kernels.

python -m load_tests.tables README.md            # rewrite the tables
python -m load_tests.tables README.md --check    # fail if one is out of date (`make check`)
"""

from __future__ import annotations

from pathlib import Path

from kernels.bench import results_file, table

RESULTS = Path(__file__).parent / "results"
PHASES = {"prefill": "prefill", "decode": "decode", "end_to_end": "end to end"}


def offload_table() -> str:
    """One line a configuration of the streamed model, in the order in which it was measured."""
    lines = []
    for row in results_file.read(RESULTS / "offload-h200.json")["rows"]:
        layers = "all resident" if row["resident_layers"] == row["layers"] else f"{row['resident_layers']} resident"
        how = "serial" if row["serial"] else "overlapped"
        lines.append(
            [
                f"{row['dtype']}, {row['layers']} layers ({layers}), {row['context']} tokens, "
                f"{row['attention']}, {how}",
                row["gpu_cap"],
                f"{row['peak_gpu_bytes'] / 2**30:.1f} GiB",
                f"{row['prefill_s']:.2f}",
                f"{row['prefill_stall_s']:.2f} / {row['prefill_hidden_s']:.2f}",
                f"{row['decode_s_per_token']:.3f}",
                "yes" if row["tokens_equal"] else "NO",
            ]
        )
    header = ["configuration", "GPU cap", "GPU used", "prefill s", "stall / hidden s", "decode s/token", "same tokens"]
    return table.markdown(header, lines)


def gain_table() -> str:
    """One line a dtype, context and phase: what ELSA gains over SDPA, paired, and what Prometheus made of it."""
    lines = []
    for row in results_file.read(RESULTS / "gain-h200.json")["rows"]:
        second = row["prometheus_gain_percent"]
        lines.append(
            [
                f"{row['dtype']}, {row['context']} tokens, {row['layers']} layers, {PHASES[row['phase']]}",
                f"{row['baseline_s']:.3f}",
                f"{row['candidate_s']:.3f}",
                f"**{row['gain_percent']:+.1f} %**",
                f"{row['ci_low']:+.1f} … {row['ci_high']:+.1f} %",
                f"{row['median_gain_percent']:+.1f} %",
                "–" if second is None else f"{second:+.1f} %",
                str(row["pairs"]),
            ]
        )
    header = ["configuration", "SDPA s", "ELSA s", "gain", "95 % interval", "median pair", "by Prometheus", "pairs"]
    return table.markdown(header, lines)


TABLES = table.TABLES | {"offload": offload_table, "gain": gain_table}

if __name__ == "__main__":
    table.main(tables=TABLES, command="python -m load_tests.tables", about=__doc__)
