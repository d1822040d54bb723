"""What every results file of a load test begins with: machine, versions, commit, command, date."""

from __future__ import annotations

import subprocess
from typing import Any

from elsa_serve import results_file

PACKAGES = (*results_file.PACKAGES, "httpx", "prometheus-client")


def envelope() -> dict[str, Any]:
    """Of the machine the load comes from, which for the servers we start is the machine they run on."""
    return {
        "machine": results_file.machine(),
        "versions": results_file.versions(PACKAGES) | prometheus_version(),
        "commit": results_file.find_commit(),
        "command": results_file.command_line(),
        "date": results_file.now(),
    }


def prometheus_version() -> dict[str, str]:
    try:
        done = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    words = (done.stdout or done.stderr).split()  # prometheus, version 2.42.0+ds (branch: …
    return {"prometheus": words[2]} if len(words) > 2 else {}
