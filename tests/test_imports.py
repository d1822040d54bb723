"""Arrows point downward only: load_tests → server → elsa_serve → elsa_kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOAD = {"elsa_load", "load_tests"}
ABOVE = {
    "kernels/elsa_kernels": LOAD
    | {"elsa_serve", "elsa_server", "transformers", "fastapi", "vllm", "prometheus_client"},
    "elsa_serve": LOAD | {"elsa_server", "fastapi", "starlette", "uvicorn", "vllm"},
    "server/elsa_server": LOAD | {"vllm", "torch"},
}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ABOVE)
def test_package_imports_nothing_from_above(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} holds no sources"
    for file in files:
        allowed = {"vllm"} if "vllm_plugin" in file.parts else set()
        wrong = imported(file) & ABOVE[package] - allowed
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"
