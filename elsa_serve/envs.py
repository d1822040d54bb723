"""Every environment variable that ELSA-Serve reads: name, default, why. Read when used, never at import.

| name | default | why |
|---|---|---|
| ELSA_CACHE_DIR | $XDG_CACHE_HOME/elsa-serve or ~/.cache/elsa-serve | compiled kernels and measured bandwidths |
| ELSA_API_KEY | unset | comma-separated keys that the server accepts; unset: no authentication |
| ELSA_CHECKSUMS | unset | 1: compare KV and what comes from disk with what was there first; slow, to find bad memory |
| ELSA_COMMIT | unset | the commit a benchmark names where the tree is no git checkout |
| ELSA_VLLM_METRICS_DIR | made at start | where the processes of one vLLM server keep the counters of the plugin |
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    explicit = os.environ.get("ELSA_CACHE_DIR")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elsa-serve"


def api_keys() -> tuple[str, ...]:
    return tuple(key.strip() for key in os.environ.get("ELSA_API_KEY", "").split(",") if key.strip())


def vllm_metrics_dir() -> Path | None:
    explicit = os.environ.get("ELSA_VLLM_METRICS_DIR")
    return Path(explicit) if explicit else None


def set_vllm_metrics_dir(directory: Path) -> None:
    """Tell the processes that this one starts where their counters belong."""
    os.environ["ELSA_VLLM_METRICS_DIR"] = str(directory)


def checksums() -> bool:
    return os.environ.get("ELSA_CHECKSUMS", "") not in ("", "0")
