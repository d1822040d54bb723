"""Kernels in CUDA C++ on a host whose threads are fibers: cuda_on_host.cpp around a kernel's source."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
FUSED = ("-mfma", "-ffp-contract=off")  # fused where the source says so, and nowhere else
_MACHINE = re.compile(r"// machine: begin.*?// machine: end", re.DOTALL)  # what cuda_on_host.cpp defines itself


def library(room: Path, source: str, entry: str, defines: Mapping[str, object], *flags: str) -> ctypes.CDLL:
    """The kernel `entry` of a source whose dynamic shared memory has been given a size; compiled once in `room`."""
    text = _MACHINE.sub("", source)
    command = ["g++", "-std=gnu++20", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC", *flags]
    command += [f"-D{name}={value}" for name, value in {**defines, "ELSA_ENTRY": entry}.items()]
    path = room / hashlib.sha256(repr((text, command)).encode()).hexdigest()[:16]
    if not path.with_suffix(".so").exists():
        path.with_suffix(".cu").write_text(text)
        command += [f'-DKERNEL="{path}.cu"', "-o", f"{path}.so", str(Path(__file__).with_name("cuda_on_host.cpp"))]
        subprocess.run(command, check=True)
    return ctypes.CDLL(f"{path}.so")
