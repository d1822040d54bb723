"""The README's tables, those of the whole system beside those of the kernels.

python -m load_tests.tables README.md            # rewrite the tables
python -m load_tests.tables README.md --check    # fail if one is out of date (`make check`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elsa_serve.offload.units import parse_size
from kernels.bench import results_file, table

RESULTS = Path(__file__).parent / "results"
PHASES = {"prefill": "prefill", "decode": "decode", "end_to_end": "end to end"}


def offload_table() -> str:
    """One line a configuration of the streamed model, then of its peers, by dtype, context and cap."""
    rows = results_file.read(RESULTS / "offload-h200.json")["rows"]
    lines = []
    for row in sorted(rows, key=lambda r: (bool(_who(r)), r["dtype"], r["context"], parse_size(r["gpu_cap"]))):
        refused = row.get("error")
        copied = None if refused or "prefill_stall_s" not in row else (row["prefill_stall_s"], row["prefill_hidden_s"])
        lines.append(
            [
                f"{_who(row)}{row['dtype']}, {row['layers']} layers, {row['context']} tokens{_how(row)}",
                row["gpu_cap"],
                "–" if refused else f"{row['peak_gpu_bytes'] / 2**30:.1f} GiB",
                _failure(refused) if refused else f"{row['prefill_s']:.2f}",
                "–" if copied is None else f"{copied[0]:.2f} / {copied[1]:.2f}",
                _seconds(row.get("decode_s_per_token")),
                _seconds(row.get("floor_s") or None),  # 0 where nothing lies in host memory
                {True: "yes", False: "NO", None: "–"}[row.get("tokens_equal")],
            ]
        )
    header = [
        "configuration", "GPU cap", "GPU used", "prefill s", "stall / hidden s", "decode s/token", "its floor",
        "same tokens",
    ]  # fmt: skip
    return table.markdown(header, lines)


def _failure(error: str) -> str:
    """A peer that was ended, or died, has refused nothing."""
    return error if error.startswith(("no result within", "ended with status")) else "refused"


def _who(row: dict[str, Any]) -> str:
    return {"vllm": "vLLM, ", "hf-accelerate": "accelerate, "}.get(row["system"], "")


def _how(row: dict[str, Any]) -> str:
    """What tells one row of the offload table from another, beside its dtype, size and cap."""
    parts = [str(row.get("case") or "")]
    if row["system"] == "elsa-offload" and not row.get("error"):
        resident = "all" if row["resident_layers"] == row["layers"] else str(row["resident_layers"])
        parts = [f"{resident} resident", *parts, "SDPA" if row["attention"] == "sdpa" else ""]
        asked = row.get("asked") or {}
        chunk, issued = asked.get("chunk_tokens"), asked.get("graphs") == 0
        parts += ["serial" if row["serial"] else "", f"chunks of {chunk}" if chunk else ""]
        parts += ["no CUDA graphs" if issued else ""]
    return "".join(f", {part}" for part in parts if part)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def gain_table() -> str:
    """One line a dtype, context and phase: what ELSA gains over SDPA (in vLLM over one of its own attentions), paired,
    and what Prometheus made of it."""
    lines = []
    for row in results_file.read(RESULTS / "gain-h200.json")["rows"]:
        second = row["prometheus_gain_percent"]
        lines.append(
            [
                f"{_against(row)}{row['dtype']}{_linear(row)}, {row['context']} tokens{_whole(row)}, "
                f"{row['layers']} layers, {PHASES[row['phase']]}",
                f"{row['baseline_s']:.3f}",
                f"{row['candidate_s']:.3f}",
                f"**{row['gain_percent']:+.1f} %**",
                "–" if row["ci_low"] is None else f"{row['ci_low']:+.1f} … {row['ci_high']:+.1f} %",
                f"{row['median_gain_percent']:+.1f} %",
                "–" if second is None else f"{second:+.1f} %",
                str(row["pairs"]),
            ]
        )
    header = ["configuration", "baseline s", "ELSA s", "gain", "95 % interval", "median pair", "by Prometheus", "pairs"]
    return table.markdown(header, lines)


def _against(row: dict[str, Any]) -> str:
    """Of a row whose baseline is not SDPA."""
    return f"vLLM, {row['baseline'].removeprefix('attention-backend=')}, " if row["engine"] == "vllm" else ""


def _linear(row: dict[str, Any]) -> str:
    """Of a row whose linear layers are ours, on both sides."""
    return " with elsa's linear layers" if row["linear"] == "elsa" else ""


def _whole(row: dict[str, Any]) -> str:
    """Of a row whose prompts pass a layer at once, and not in the chunks that most rows have."""
    return " in one piece" if row.get("chunk_tokens", 0) >= row["context"] else ""


def _vllm_rows(column: str) -> list[dict[str, Any]]:
    """Rows of the engine that hold a measurement of this name."""
    rows = results_file.read(RESULTS / "vllm-h200.json")["rows"]
    return [row for row in rows if row.get(column) is not None]


def _attention_of(row: dict[str, Any]) -> str:
    return str(row["attention"]) + ("" if row["variant"] == "plain" else f" with {row['variant']}")


def _pieces(row: dict[str, Any]) -> str:
    return "" if row["chunk_tokens"] == row["context"] else f" in chunks of {row['chunk_tokens']}"


def vllm_table() -> str:
    """One line a dtype, attention and variant: a prompt's seconds in vLLM, and a token's milliseconds."""
    lines = [
        [
            f"{row['dtype']}, {row['layers']} layers, {row['context']} tokens{_pieces(row)}",
            _attention_of(row),
            f"{row['prefill_s']:.2f}",
            f"{1e3 * row['decode_s_per_token']:.1f}",
        ]
        for row in sorted(_vllm_rows("prefill_s"), key=lambda row: (row["dtype"], -row["layers"], not row["ours"]))
    ]
    return table.markdown(["configuration", "attention", "prefill s", "decode ms/token"], lines)


def vllm_accuracy_table() -> str:
    """One line a configuration: how far logits are from float64's, and what float32 linear layers alone make of it."""
    lines = []
    for row in sorted(_vllm_rows("relerr_prefill"), key=lambda row: (row["dtype"], -row["layers"], not row["ours"])):
        cache = "" if row["kv_cache_dtype"] == "auto" else f", {row['kv_cache_dtype']} KV"
        cache += "" if row["key_heads"] == 40 else f", {row['key_heads']} key heads"
        alone = row.get("relerr_float32_linear_alone")
        lines.append(
            [
                f"{row['dtype']}{cache}, {row['layers']} layers, {row['context']} tokens{_pieces(row)}",
                _attention_of(row),
                f"{row['relerr_prefill']:.1e}",
                f"{row['relerr_decode']:.1e}",
                "–" if alone is None else f"{alone:.1e}",
            ]
        )
    header = ["configuration", "attention", "prefill", "decode", "float32 linear layers alone"]
    return table.markdown(header, lines)


TABLES = table.TABLES | {
    "offload": offload_table,
    "gain": gain_table,
    "vllm": vllm_table,
    "vllm-accuracy": vllm_accuracy_table,
}

if __name__ == "__main__":
    table.main(tables=TABLES, command="python -m load_tests.tables", about=__doc__)
