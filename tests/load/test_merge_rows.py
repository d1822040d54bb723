"""Rows of another machine's results, put into a file here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernels.bench import results_file
from load_tests import merge_rows


def document(gpu: str, commit: str, *rows: dict[str, Any]) -> dict[str, Any]:
    head = results_file.document([]) | {"machine": {"gpu": gpu}, "versions": {"torch": "2"}, "commit": commit}
    return head | {"date": f"of {commit}", "command": f"run of {commit}", "rows": list(rows)}


def row(cap: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"system": "elsa-offload", "dtype": "float16", "context": 32768, "gpu_cap": cap, "decode_s": seconds} | more


@pytest.fixture
def output(tmp_path: Path) -> Path:
    file = tmp_path / "results.json"
    results_file.write_document(file, document("A", "old", row("8GiB", 1.0), row("24GiB", 2.0, commit="older")))
    return file


def merge(tmp_path: Path, output: Path, *documents: dict[str, Any], flags: tuple[str, ...] = ()) -> dict[str, Any]:
    files = [str(tmp_path / f"{i}.json") for i in range(len(documents))]
    for file, found in zip(files, documents):
        results_file.write_document(Path(file), found)
    assert merge_rows.main([*files, *flags, "--output", str(output)]) == 0
    return results_file.read(output)


def test_rows_of_the_same_configuration_are_replaced_in_their_place_and_say_where_they_are_from(
    tmp_path: Path, output: Path
) -> None:
    first = document("B", "new", row("40GiB", 3.0), row("8GiB", 0.5))
    second = document("A", "less new", row("8GiB", 0.7), row("16GiB", 4.0))
    merged = merge(tmp_path, output, first, second)
    assert [(one["gpu_cap"], one["decode_s"]) for one in merged["rows"]] == [
        ("8GiB", 0.5), ("24GiB", 2.0), ("40GiB", 3.0), ("16GiB", 4.0),
    ]  # fmt: skip
    assert (merged["commit"], merged["machine"]) == ("old", {"gpu": "A"})
    assert merged["rows"][0]["commit"] == merged["rows"][2]["commit"] == "new"
    assert merged["rows"][0]["machine"] == {"gpu": "B"}
    assert merged["rows"][0]["command"] == "run of new"
    assert merged["rows"][1] == row("24GiB", 2.0, commit="older")
    assert merged["rows"][3]["commit"] == "less new"
    assert "machine" not in merged["rows"][3]


def test_some_rows_alone_or_a_file_anew(tmp_path: Path, output: Path) -> None:
    new = document("B", "new", row("40GiB", 3.0), row("8GiB", 0.5))
    merged = merge(tmp_path, output, new, flags=("--only", "gpu_cap=40GiB", "--only", "context=32768"))
    assert [one["decode_s"] for one in merged["rows"]] == [1.0, 2.0, 3.0]
    with pytest.raises(SystemExit):
        merge_rows.main([str(tmp_path / "0.json"), "--only", "gpu_cap=80GiB", "--output", str(output)])
    assert results_file.read(output) == merged
    assert merge(tmp_path, output, new, flags=("--fresh",)) == new
