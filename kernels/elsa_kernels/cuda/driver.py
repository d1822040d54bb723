"""The few calls of the CUDA driver that torch does not offer: launching a compiled kernel, or a C function of the host,
and copying rows, on torch's context and streams."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED = 48 * 1024  # beyond it a kernel has to opt in
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address says which memory it is
_EARLY_LAUNCHES_IN_GRAPHS = 12030  # the version from which on a CUDA graph can hold them


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(name))
        raise DriverError(f"{what}: {(name.value or b'?').decode()} ({status})")


@functools.cache
def version() -> int:
    """Of CUDA, as the driver knows it: 1000·major + 10·minor."""
    number = ctypes.c_int()
    _check(_library().cuDriverGetVersion(ctypes.byref(number)), "asking for the driver's version")
    return number.value


def takes_early_launches(major: int) -> bool:
    """Whether kernels can be launched early (`launch`), in CUDA graphs too, on compute capability `major`.x."""
    return major >= 9 and version() >= _EARLY_LAUNCHES_IN_GRAPHS


class Module:
    """Machine code loaded into the current device's context, which torch has made by the time tensors exist."""

    def __init__(self, cubin: bytes) -> None:
        self._handle = ctypes.c_void_p()
        _check(_library().cuModuleLoadData(ctypes.byref(self._handle), cubin), "loading a kernel")

    def function(self, name: str, shared_bytes: int) -> ctypes.c_void_p:
        """The kernel `name`, allowed to use `shared_bytes` of dynamic shared memory."""
        function = ctypes.c_void_p()
        _check(_library().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode()), f"finding {name}")
        if shared_bytes > _DEFAULT_SHARED:
            status = _library().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
            _check(status, f"giving {name} {shared_bytes} bytes of shared memory")
        return function


class _Attribute(ctypes.Structure):
    """`CUlaunchAttribute`: of its value, a union of 64 bytes, the int that ours is."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


def launch(
    function: ctypes.c_void_p,
    blocks: int,
    threads: int,
    shared_bytes: int,
    params: ctypes.Structure,
    early: bool = False,
) -> None:
    """Launch a kernel that takes one structure by value, on torch's current stream.

    early: its blocks may start while the kernel before it ends (compute capability 9.0); the kernel itself has to wait
    (`griddepcontrol.wait`) before it reads what others write, or writes.
    """
    attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    config = _Config(
        (blocks, 1, 1), (threads, 1, 1), shared_bytes, torch.cuda.current_stream().cuda_stream,
        ctypes.pointer(attribute), int(early),
    )  # fmt: skip
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    status = _library().cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
    _check(status, "launching a kernel")


def launch_host_function(stream: int, function: int, argument: int) -> None:
    """Have a stream call the C function void (*)(void *) at address `function` when its work so far is done.

    The function must not call CUDA, and it and what `argument` points at must exist until it has run.
    """
    pointers = (ctypes.c_void_p(stream), ctypes.c_void_p(function), ctypes.c_void_p(argument))
    _check(_library().cuLaunchHostFunc(*pointers), "launching a host function")


class _Side(ctypes.Structure):
    """Of a copy, where it comes from or where it goes: a half of `CUDA_MEMCPY2D`."""

    _fields_ = [
        ("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("memory", ctypes.c_int), ("host", ctypes.c_void_p),
        ("device", ctypes.c_void_p), ("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t),
    ]  # fmt: skip


class _Copy2D(ctypes.Structure):
    """`CUDA_MEMCPY2D`."""

    _fields_ = [("source", _Side), ("target", _Side), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


def copy_rows(stream: int, addresses: Iterable[int], pitches: Iterable[int], width: int, rows: int) -> None:
    """Have a stream copy `rows` runs of `width` bytes, of device memory or page-locked host memory.

    addresses: of the first run, where it goes and where it comes from; pitches: bytes from one run to the next, there
    and here.
    """
    target, source = (_Side(memory=_UNIFIED, device=at, pitch=pitch) for at, pitch in zip(addresses, pitches))
    copy = ctypes.byref(_Copy2D(source, target, width, rows))
    _check(_library().cuMemcpy2DAsync_v2(copy, ctypes.c_void_p(stream)), f"copying {rows} × {width} bytes")
