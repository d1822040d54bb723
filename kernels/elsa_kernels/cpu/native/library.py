"""The native library from Python: its threads, and jobs that are submitted and waited for without the GIL.

    pool = default_pool()
    ticket = pool.submit(problem, operands)  # returns at once; native threads work
    state = ticket.wait()                    # a State, float32

A `Job` is reusable, and `Job.host_functions` gives what cudaLaunchHostFunc takes, so that a GPU's stream may start it
and wait for it without Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading

import torch

from elsa_kernels.cpu.native import build
from elsa_kernels.registry import Operands, Problem
from elsa_kernels.state import State

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}  # instruction sets, the preferred last


class NativeProblem(ctypes.Structure):
    """`elsa::Problem` of attention.h, field by field. Pointers are addresses, strides are in elements."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "m", "S", "W", "sinks", "slopes", "kv_range")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "q_start", "window")),
        ("causal", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Launch(ctypes.Structure):
    """One job of `Launches`. status: that of `STATUS`, valid after the join; seconds: from submission to end."""

    _fields_ = (
        ("job", ctypes.c_void_p),
        ("problem", ctypes.POINTER(NativeProblem)),
        ("status", ctypes.c_int32),
        ("seconds", ctypes.c_double),
    )


class Launches(ctypes.Structure):
    """The argument of `elsa_launch` and `elsa_join`: jobs that are started and waited for together."""

    _fields_ = (("items", ctypes.POINTER(Launch)), ("count", ctypes.c_int64))


STATUS = {
    1: (RuntimeError, "this job is under way; wait for it, or prepare another"),
    2: (MemoryError, "no memory for the states of the chunks of a native CPU attention call"),
    3: (RuntimeError, "a native CPU attention job failed in one of its threads"),
}


def check_status(status: int) -> None:
    """Raise for a job's status; 0 is none."""
    if status:
        kind, message = STATUS.get(status, (RuntimeError, f"unknown status {status} of a native CPU attention job"))
        raise kind(message)


def host_functions() -> tuple[int, int]:
    """Addresses of two C functions void (*)(void *) that start and await jobs, the argument being a `Launches`."""
    start, join = (ctypes.cast(f, ctypes.c_void_p).value for f in (library().elsa_launch, library().elsa_join))
    if start is None or join is None:
        raise RuntimeError("the native library lacks elsa_launch or elsa_join")
    return start, join


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built if need be and loaded once. Raises build.BuildFailed."""
    path = build.cached_library()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildFailed(f"{path} cannot be loaded ({error}); delete it, or set ELSA_CACHE_DIR") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    signatures = {
        "elsa_problem_size": (ctypes.c_int64, []),
        "elsa_level_works": (integer, [integer]),
        "elsa_pool_new": (pointer, [integer, integer]),
        "elsa_pool_free": (None, [pointer]),
        "elsa_job_new": (pointer, [pointer]),
        "elsa_job_free": (None, [pointer]),
        "elsa_job_submit": (integer, [pointer, ctypes.POINTER(NativeProblem)]),
        "elsa_job_wait": (integer, [pointer]),
        "elsa_launch": (None, [pointer]),
        "elsa_join": (None, [pointer]),
        "elsa_job_done": (integer, [pointer]),
        "elsa_read": (ctypes.c_double, [pointer, pointer, ctypes.c_int64]),
        "elsa_write_rows": (integer, [integer, pointer, *[ctypes.c_int64] * 5]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if lib.elsa_problem_size() != ctypes.sizeof(NativeProblem):
        raise build.BuildFailed(f"{path} does not fit this version of elsa_kernels; delete it")
    return lib


def write_rows(file: int, values: torch.Tensor, at: int, stride: int) -> None:
    """Write values [rows, bytes] uint8 on the CPU, each row contiguous, to an open file: row i at byte `at` +
    i · `stride`. Blocks without the GIL from the first row to the last. Raises OSError."""
    rows, nbytes = values.shape
    status = library().elsa_write_rows(file, values.data_ptr(), values.stride(0), at, stride, nbytes, rows)
    if status:
        raise OSError(status, os.strerror(status))


def levels() -> tuple[str, ...]:
    """The instruction sets that this machine runs, the preferred last."""
    return tuple(name for name, level in LEVELS.items() if library().elsa_level_works(level))


class Job:
    """One attention call, prepared: where its operands lie and where its state goes. Reusable, once at a time.

    `problem` is the native description, which an engine may edit between calls (Nk, q_start, pointers), `state` the
    result after `wait`. Holds its tensors.
    """

    def __init__(self, pool: Pool, problem: Problem, operands: Operands, state: State | None = None) -> None:
        """`state`: where to write the result, contiguous float32 tensors; new ones by default."""
        self.pool = pool
        shape = (problem.B, problem.H, problem.Nq)
        if state is None:
            state = State(torch.empty(shape), torch.empty(shape), torch.empty((*shape, problem.D)))
        self.state = state
        self.problem, self._kept = _describe(problem, operands, self.state)
        self.handle = pool._take()
        self.launch = Launch(self.handle, ctypes.pointer(self.problem), 0, 0.0)
        self._launches = Launches(ctypes.pointer(self.launch), 1)

    def submit(self) -> Job:
        """Start it on the native threads and return at once. Raises MemoryError, or RuntimeError if it is under way."""
        check_status(library().elsa_job_submit(self.handle, ctypes.byref(self.problem)))
        return self

    def host_functions(self) -> tuple[int, int, int]:
        """Addresses of two C functions void (*)(void *), which start this job and wait for it, and of their argument.

        The job must be kept until they have run. After the second, `launch.status` is 0 unless it failed.
        """
        return *host_functions(), ctypes.addressof(self._launches)

    def run(self) -> float:
        """Start it and block, without the GIL, until the state is written, by the two functions that a GPU's stream
        calls. Returns the seconds between. Raises like `submit`."""
        launches = ctypes.byref(self._launches)
        library().elsa_launch(launches)
        library().elsa_join(launches)
        check_status(self.launch.status)
        return self.launch.seconds

    def done(self) -> bool:
        return bool(library().elsa_job_done(self.handle))

    def wait(self) -> State:
        """Block, without the GIL, until the state is written, and return it."""
        check_status(library().elsa_job_wait(self.handle))
        return self.state

    def __del__(self) -> None:
        if not (handle := getattr(self, "handle", None)):
            return
        if self.pool._handle:
            # The threads write into this job's tensors: they must be through before those are freed.
            library().elsa_job_wait(handle)
            self.pool._idle.append(handle)
        else:  # the collector of cycles came to the pool first, whose end waited for its work
            library().elsa_job_free(handle)


class Pool:
    """Native threads that work on jobs in the order of their submission; any number of callers may share them.

    threads: torch's number of CPU threads by default. level: an instruction set of `levels()`, by default the widest.
    A result's bits depend on the level, never on the number of threads. Lives as long as a job of it does.
    """

    def __init__(self, threads: int | None = None, level: str | None = None) -> None:
        self.threads = torch.get_num_threads() if threads is None else threads
        self.level = levels()[-1] if level is None else level
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; give at least 1")
        if self.level not in levels():
            raise ValueError(f"level {self.level!r} does not run here; choose one of {', '.join(levels())}")
        self._idle: list[int] = []  # native jobs kept for their workspace
        self._handle = library().elsa_pool_new(self.threads, LEVELS[self.level])
        if not self._handle:
            raise MemoryError(f"{self.threads} threads with their buffers could not be started")

    def prepare(self, problem: Problem, operands: Operands) -> Job:
        return Job(self, problem, operands)

    def submit(self, problem: Problem, operands: Operands) -> Job:
        return Job(self, problem, operands).submit()

    def attend(self, problem: Problem, operands: Operands) -> State:
        return self.submit(problem, operands).wait()

    def read_seconds(self, data: torch.Tensor) -> float:
        """Seconds in which the threads read a contiguous CPU tensor once: the measure of the host's bandwidth."""
        if data.device.type != "cpu" or not data.is_contiguous() or data.numel() == 0:
            raise ValueError("data must be a contiguous CPU tensor with at least one element")
        return library().elsa_read(self._handle, data.data_ptr(), data.nbytes)

    def _take(self) -> int:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        handle = library().elsa_job_new(self._handle)
        if not handle:
            raise MemoryError("no memory for a native CPU attention job")
        return handle

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            library().elsa_pool_free(handle)
            for job in self._idle:
                library().elsa_job_free(job)


def _describe(problem: Problem, operands: Operands, state: State) -> tuple[NativeProblem, list[torch.Tensor]]:
    """The native form, and the tensors it points at."""
    native = NativeProblem(dtype=DTYPES[problem.dtype], window=problem.window or 0, softcap=problem.softcap or 0.0)
    for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "q_start", "causal", "scale"):
        setattr(native, name, getattr(problem, name))
    kept = [operands.q, operands.k, operands.v, state.m, state.S, state.W]
    for name, tensor in zip(("q", "k", "v", "m", "S", "W"), kept):
        setattr(native, name, tensor.data_ptr())
    for name in ("q", "k", "v"):
        setattr(native, f"{name}_strides", getattr(operands, name).stride()[:3])
    vectors = {
        "sinks": (operands.sinks, torch.float32),
        "slopes": (operands.alibi_slopes, torch.float32),
        "kv_range": (operands.kv_range, torch.int32),
    }
    for name, (given, dtype) in vectors.items():
        if given is not None:
            vector = given.to(dtype).contiguous()
            setattr(native, name, vector.data_ptr())
            kept.append(vector)
    return native, kept


_lock = threading.Lock()
_default: Pool | None = None


def default_pool() -> Pool:
    """The pool that `impl="cpu_native"` runs on: as many threads as torch has when it is first used."""
    global _default
    with _lock:
        if _default is None:
            _default = Pool()
        return _default


def _forget_threads() -> None:
    """In a forked child, which has none of its parent's threads. The parent's pool is leaked, not joined."""
    global _default, _lock
    _lock = threading.Lock()
    if _default is not None:
        _default._handle = None
        _default = None


os.register_at_fork(after_in_child=_forget_threads)
