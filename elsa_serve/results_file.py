"""Results files: one JSON object a run, with the machine, the versions and the commit that its rows come from.

Imports nothing heavy, so that every tool that writes measurements can share it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PACKAGES = ("torch", "triton", "transformers", "vllm")
ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """{gpu, gpu_count, cpu, cores, ram_bytes, driver} of this machine; gpu and driver None without one."""
    gpus = _nvidia_smi("name")
    drivers = _nvidia_smi("driver_version")
    return {
        "gpu": gpus[0] if gpus else None,
        "gpu_count": len(gpus),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "driver": drivers[0] if drivers else None,
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of those packages that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured: ELSA_COMMIT where there is no repository, else HEAD, with "-dirty" if files differ."""
    found = find_commit()
    if found is None:
        raise RuntimeError(f"{ROOT} is no git repository; set ELSA_COMMIT to the commit that is measured")
    return found


def find_commit() -> str | None:
    """The commit measured, as `commit` says it, or None: an installed package is no checkout."""
    if named := os.environ.get("ELSA_COMMIT"):
        return named
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:  # site-packages may lie in a repository of somebody else
        return None
    return f"{_git('rev-parse', 'HEAD')}{'-dirty' if _git('status', '--porcelain', '--untracked-files=no') else ''}"


def command_line() -> str:
    """What was typed, the folders of the interpreter and of an installed script left out."""
    words = [Path(sys.executable).name, *sys.orig_argv[1:]]
    if len(words) > 1 and Path(words[1]).is_absolute() and not words[1].endswith(".py"):
        words[:2] = [Path(words[1]).name]
    return " ".join(words)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def document(rows: list[Row], command: str | None = None) -> dict[str, Any]:
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": command or command_line(),
        "date": now(),
        "rows": rows,
    }


def write(path: Path | str, rows: list[Row], command: str | None = None) -> None:
    """Write `<what>-<machine>.json`."""
    write_document(path, document(rows, command))


def write_document(path: Path | str, doc: dict[str, Any]) -> None:
    """Write an object of the form, such as one put together from others of the same machine."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in doc.items() if key != "rows"}
    # One row a line: a measurement that changes is one line in a diff.
    lines = ",\n".join("  " + json.dumps(row) for row in doc["rows"])
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n"
    path.write_text(text)


def read(path: Path | str) -> dict[str, Any]:
    """The object of a results file. Raises ValueError where a key of the form is missing."""
    doc = json.loads(Path(path).read_text())
    missing = {"machine", "versions", "commit", "command", "date", "rows"} - doc.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it is no results file")
    return doc


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def others(path: str | Path, impls: list[str]) -> list[Row]:
    """The rows that a file has of other implementations than these: what a run of these alone may keep."""
    return [row for row in read(path)["rows"] if row.get("impl") not in impls]
