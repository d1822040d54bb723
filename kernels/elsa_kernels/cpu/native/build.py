"""The C++ sources beside this file to a shared library, with the system's compiler, once per machine and version."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from elsa_kernels.cuda.nvrtc import cache_dir as kernel_cache

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# Each instruction set is a translation unit of its own, chosen at run time: the library holds code for all of them.
UNITS: dict[str, tuple[str, ...]] = {"pool.cpp": (), "rows.cpp": (), "kernel_portable.cpp": ()}
if platform.machine() in ("x86_64", "AMD64"):
    UNITS |= {"kernel_avx2.cpp": AVX2, "kernel_avx512.cpp": AVX512}
TIMEOUT_S = 300


class BuildFailed(RuntimeError):
    """The library cannot be built here; the message says why, in one line, and what to do."""


def compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the system's. Raises BuildFailed."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"$CXX names {named[0]!r}, which was not found" if named else "no C++ compiler was found"
    raise BuildFailed(f"{missing}; install g++ 9 or later (Debian, Ubuntu: apt install g++) or set CXX")


def cached_library() -> Path:
    """The shared library, built now if it is not in the cache. Raises BuildFailed."""
    command = compiler()
    name = f"attention-{_fingerprint(command)}.so"
    path = cache_dir() / name
    if path.exists():
        return path
    logger.warning("building the native CPU attention with %s, once; cached in %s", command[0], path.parent)
    started = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.mkdtemp(dir=path.parent)
    except OSError as error:
        place = tempfile.mkdtemp()
        path = Path(place) / name
        logger.warning("%s cannot be written (%s): the next process builds again; set ELSA_CACHE_DIR", path, error)
    try:
        built = _build(command, Path(place))
        os.replace(built, path)  # atomic: several processes may build at once
    finally:
        if path.parent != Path(place):
            shutil.rmtree(place, ignore_errors=True)
    logger.info("built the native CPU attention in %.1f s", time.perf_counter() - started)
    return path


def cache_dir() -> Path:
    """Where the library is kept: beside the CUDA kernels, under $ELSA_CACHE_DIR or ~/.cache/elsa-serve."""
    return kernel_cache().parent / "cpu"


def _build(command: list[str], place: Path) -> Path:
    def compile_unit(unit: str) -> str:
        target = str(place / f"{unit}.o")
        _run([*command, *FLAGS, *UNITS[unit], "-c", str(SOURCES / unit), "-o", target])
        return target

    with ThreadPoolExecutor(max_workers=len(UNITS)) as threads:
        objects = list(threads.map(compile_unit, UNITS))
    library = place / "attention.so"
    _run([*command, "-shared", "-pthread", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()[-1:]
        raise BuildFailed(
            f"{shlex.join(command[:1])} failed with status {error.returncode} ({' '.join(errors[:1])}); "
            f"install g++ 9 or later, or set CXX; the command was: {shlex.join(command)}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} did not run: {error}") from error
    return done.stdout


@functools.cache
def _sources() -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]))


def _fingerprint(command: list[str]) -> str:
    parts = [_sources(), repr((FLAGS, UNITS, platform.machine())).encode(), _run([*command, "--version"]).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
