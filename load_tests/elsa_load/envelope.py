"""The part that every results file shares: machine, versions, commit, command, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "vllm", "httpx", "prometheus-client")


def envelope() -> dict[str, Any]:
    """Of the machine the load comes from, which for the servers we start is the machine they run on."""
    return {
        "machine": {
            "gpu": ((names := gpu_names()) and names[0]) or None,
            "gpu_count": len(names),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        },
        "versions": {"python": platform.python_version()} | package_versions() | prometheus_version(),
        "commit": commit(),
        "command": " ".join(["elsa-serve", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """ELSA_COMMIT where there is no repository, else HEAD, with "-dirty" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = first_line([*git, "rev-parse", "HEAD"])
    changed = lines_of([*git, "status", "--porcelain", "--untracked-files=no"]) if head else []
    return os.environ.get("ELSA_COMMIT") or (head and head + ("-dirty" if changed else ""))


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def prometheus_version() -> dict[str, str]:
    line = first_line(["prometheus", "--version"])
    return {"prometheus": line.split()[2]} if line and len(line.split()) > 2 else {}


def gpu_names() -> list[str]:
    return lines_of(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def first_line(command: list[str]) -> str | None:
    return next(iter(lines_of(command)), None)


def lines_of(command: list[str]) -> list[str]:
    """What a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
