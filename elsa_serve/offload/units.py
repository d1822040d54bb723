"""Sizes as people write them, and as memory is given out."""

from __future__ import annotations

import re

from elsa_serve.errors import UsageError

# Bytes: what CUDA's own allocator gives, and what every vector load, TMA descriptor and copy engine likes.
ALIGNMENT = 256
_FACTORS = {
    "": 1, "b": 1,
    "k": 1000, "kb": 1000, "kib": 1024,
    "m": 1000**2, "mb": 1000**2, "mib": 1024**2,
    "g": 1000**3, "gb": 1000**3, "gib": 1024**3,
    "t": 1000**4, "tb": 1000**4, "tib": 1024**4,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of "24GiB" (1024³), "8GB" (1000³), "512MiB", "1.5g" or a plain number. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"not a size: {text!r}; write a number with a unit, such as 24GiB, 8GB or 512MiB")
    return int(float(match[1]) * factor)


def format_size(nbytes: float) -> str:
    """A size for people, in binary units and three figures: "24.0 GiB", "512 MiB", "17 B"."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.{1 if abs(value) < 100 else 0}f} {unit}"


def aligned(nbytes: int) -> int:
    """Rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
