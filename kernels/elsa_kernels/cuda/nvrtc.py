"""CUDA C++ to machine code at run time, through NVRTC, with a cache on disk.

NVRTC comes with every CUDA build of torch; without one, `pip install nvidia-cuda-nvrtc` (no GPU needed to compile).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

REMEDY = (
    "pip install nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12 with a CUDA 12 build of torch), "
    "or set CUDA_HOME to a CUDA toolkit"
)


class NvrtcUnavailable(RuntimeError):
    """NVRTC, the run-time compiler of CUDA C++, was not found; the message says what to install."""


class CompilationFailed(RuntimeError):
    """NVRTC rejected a source; the message holds its log."""


def _candidates() -> list[Path]:
    """Where libnvrtc may lie: NVIDIA's wheels, then a CUDA toolkit."""
    roots: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for package in spec.submodule_search_locations or [] if spec else []:
        roots += [path / "lib" for path in sorted(Path(package).glob("cu[0-9]*"), reverse=True)]
        roots.append(Path(package) / "cuda_nvrtc" / "lib")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            roots += [Path(home) / "lib64", Path(home) / "targets" / "x86_64-linux" / "lib"]
    return [path for root in roots for path in sorted(root.glob("libnvrtc.so*"), reverse=True)]


@functools.cache
def library() -> ctypes.CDLL:
    """libnvrtc, loaded once. Raises NvrtcUnavailable with the remedy."""
    for path in _candidates():
        # NVRTC opens its built-ins by name; loading them first spares the user an LD_LIBRARY_PATH.
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        return _declare(ctypes.CDLL(str(path)))
    for name in ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return _declare(ctypes.CDLL(name))
        except OSError:
            continue
    raise NvrtcUnavailable(f"libnvrtc was not found; remedy: {REMEDY}")


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.nvrtcGetErrorString.restype = ctypes.c_char_p
    return lib


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        library()
    except (NvrtcUnavailable, OSError) as error:
        return str(error)
    return None


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def architectures() -> tuple[int, ...]:
    """The compute capabilities this NVRTC compiles for, as 10·major + minor."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    values = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(values))
    return tuple(values)


def refusal(major: int, minor: int, oldest: int = 0) -> str | None:
    """Why nothing can be compiled here for devices of compute capability major.minor, or None. `oldest` (10·major +
    minor): what the code itself needs."""
    if 10 * major + minor < oldest:
        return f"needs compute capability {oldest / 10}, the device has {major}.{minor}"
    reason = unavailable()
    if reason is None and 10 * major + minor not in architectures():
        release = ".".join(str(n) for n in version())
        return f"NVRTC {release} does not compile for compute capability {major}.{minor}; use a CUDA release that does"
    return reason


def compile_cubin(source: str, arch: int, defines: Mapping[str, int]) -> bytes:
    """Machine code of `source` for compute capability `arch` (10·major + minor), without the cache."""
    lib = library()
    options = _options(arch, defines)
    program = ctypes.c_void_p()
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            log = _fetch(program, lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog).rstrip(b"\0").decode()
            raise CompilationFailed(f"NVRTC {version()} for sm_{arch}: {_describe(status)}\n{log}")
        return _fetch(program, lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def cached_cubin(source: str, arch: int, defines: Mapping[str, int]) -> bytes:
    """As `compile_cubin`, from the cache on disk where it has been compiled before with the same NVRTC."""
    options = b"\0".join([source.encode(), *_options(arch, defines), repr(version()).encode()])
    path = cache_dir() / f"{hashlib.sha256(options).hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    started = time.perf_counter()
    cubin = compile_cubin(source, arch, defines)
    logger.info("compiled a kernel for sm_%d in %.1f s; cached as %s", arch, time.perf_counter() - started, path)
    _store(path, cubin)
    return cubin


def cache_dir() -> Path:
    """Where compiled kernels are kept: under $ELSA_CACHE_DIR, $XDG_CACHE_HOME/elsa-serve or ~/.cache/elsa-serve."""
    chosen = os.environ.get("ELSA_CACHE_DIR")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elsa-serve"
    return base / "cuda"


def _store(path: Path, cubin: bytes) -> None:
    """Write atomically, since several processes may compile the same kernel; a read-only home costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("could not cache a compiled kernel in %s (%s); set ELSA_CACHE_DIR", path.parent, error)


def _options(arch: int, defines: Mapping[str, int]) -> list[bytes]:
    return [f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17"] + [
        f"-D{name}={value}".encode() for name, value in defines.items()
    ]


def _fetch(program: ctypes.c_void_p, get_size, get) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _describe(status: int) -> str:
    return library().nvrtcGetErrorString(status).decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {_describe(status)}")
