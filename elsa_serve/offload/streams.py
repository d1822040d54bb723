"""Copies that run beside the compute, on CUDA and on a machine without a GPU, behind one seam.

A `Lane` copies in order, asynchronously: a side stream on CUDA, one worker thread on the CPU. Compute waits for a copy
without blocking the host on CUDA, and blocks on the CPU. Every copy and every wait is timed, so that a step can say
how much of its copying was hidden behind compute.

The serial twin (`make_streams(device, serial=True)`) copies in the compute stream itself: no overlap, the same results.

A `Streams` object belongs to one thread, the engine's. Each copy holds its tensors until it is known to be complete,
so that no allocator reuses their memory while a lane still reads or writes it.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from elsa_kernels.cuda import driver

from elsa_serve.stats import Direction, Transfer, TransferObject

# (destination, source): equal shapes and dtypes. Each contiguous, or of so many heads, [2, Hkv, …], that are contiguous
# and follow each other at one distance.
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Event(ABC):
    """A point in the order of work that others can wait for."""

    @abstractmethod
    def query(self) -> bool:
        """Whether the point has been reached. Never blocks."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until the point is reached. Raises what the copy raised, if it failed."""


class Copy(Event):
    """A submitted copy; as an event, its completion."""

    object: TransferObject
    direction: Direction
    nbytes: int

    @abstractmethod
    def seconds(self) -> float:
        """How long the copying itself took, without queueing. Only after completion."""


@dataclass(frozen=True, slots=True)
class HostFunctions:
    """Addresses of two C functions void (*)(void *) and of their argument: `start` returns at once, `join` waits for
    what it began. Neither calls CUDA. `keep` is what must exist until `join` has returned."""

    start: int
    join: int
    argument: int
    keep: object


class HostCall(Event):
    """Reached when the call's `join` has returned."""

    def last_stall(self) -> float:
        """Of a repeated call: seconds for which compute waited for it the last time."""
        return 0.0


class Lane(ABC):
    """An ordered queue of copies."""

    @abstractmethod
    def submit(
        self, pairs: Pairs, *, object: TransferObject, direction: Direction, after: Sequence[Event] = ()
    ) -> Copy:
        """Copy each (destination, source) pair in order, once every event of `after` has been reached.

        Memory that compute has just allocated or is still using must be protected by an event in `after`
        (`Streams.record()`): a lane knows nothing of the compute stream by itself.
        """


class Streams(ABC):
    """The compute stream's side of the seam. `make_streams` chooses the implementation."""

    def __init__(self, device: torch.device, serial: bool) -> None:
        self.device = device
        self.serial = serial
        self._lanes: dict[str, Lane] = {}

    def lane(self, name: str) -> Lane:
        """The lane of this name, made on first use. Copies of different lanes run beside each other."""
        if name not in self._lanes:
            self._lanes[name] = self._make_lane(name)
        return self._lanes[name]

    @abstractmethod
    def _make_lane(self, name: str) -> Lane: ...

    @abstractmethod
    def record(self) -> Event:
        """An event at the compute stream's present end."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Compute goes on after `event` only. For a Copy, the time compute was held by it is logged as its stall."""

    @abstractmethod
    def call_host(self, functions: HostFunctions, after: Event, repeated: bool = False) -> HostCall:
        """Run two functions on the host once `after` has been reached; the event is reached when `join` returns.

        Calls run one after the other, beside compute and lanes (the serial twin: in the compute stream). Compute that
        waits for the event has its wait logged. `repeated`: a CUDA graph may hold the call, and run it many times, from
        compute's own stream, so compute's present end is `after`; the caller keeps what the functions use, and asks the
        event for each wait.
        """

    @abstractmethod
    def drain_host_stall(self) -> float:
        """Seconds for which compute was held by `call_host`s since the last call."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until the compute stream is idle (lanes may go on)."""

    @abstractmethod
    def drain_transfers(self) -> tuple[Transfer, ...]:
        """Copies completed since the last call, added up by (object, direction); call after the step is synchronised.

        `stall_s` is the time compute was held, `hidden_s` the rest of the copy time. A copy still under way (the
        prefetch of the next pass) is counted by a later call.
        """

    def close(self) -> None:
        """Finish the lanes' work and free what they hold. Idempotent."""
        self._lanes.clear()


def make_streams(device: torch.device | str, serial: bool = False) -> Streams:
    """Streams of a device: "cuda", "cuda:N" or "cpu"."""
    device = torch.device(device)
    if device.type == "cuda":
        return _CudaStreams(device, serial)
    return _CpuStreams(device, serial)


def _nbytes(pairs: Pairs) -> int:
    return sum(dst.numel() * dst.element_size() for dst, _ in pairs)


class _Tally:
    """Sums of finished copies and stalls by (object, direction)."""

    def __init__(self) -> None:
        self._sums: dict[tuple[TransferObject, Direction], list[float]] = {}

    def _of(self, copy: Copy) -> list[float]:
        return self._sums.setdefault((copy.object, copy.direction), [0, 0, 0.0, 0.0])

    def copied(self, copy: Copy) -> None:
        sums = self._of(copy)
        sums[0] += 1
        sums[1] += copy.nbytes
        sums[2] += copy.seconds()

    def stalled(self, copy: Copy, seconds: float) -> None:
        self._of(copy)[3] += seconds

    def take(self) -> tuple[Transfer, ...]:
        sums, self._sums = self._sums, {}
        return tuple(
            Transfer(kind, direction, int(nbytes), seconds, stall, max(0.0, seconds - stall), int(count))
            for (kind, direction), (count, nbytes, seconds, stall) in sums.items()
        )


# --- CUDA ---------------------------------------------------------------------------------------------------------


class _EventPool:
    """CUDA timing events, used again and again: a server runs for months, a step makes hundreds.

    A thread that waits for one sleeps: spinning, it would take a core from the host's attention.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def take(self) -> torch.cuda.Event:
        return self._free.pop() if self._free else torch.cuda.Event(enable_timing=True, blocking=True)

    def give(self, event: torch.cuda.Event) -> None:
        # Recording it again is safe even while a stream still waits: a wait refers to the record it was issued after.
        self._free.append(event)


class _CudaEvent(Event):
    def __init__(self, pool: _EventPool, stream: torch.cuda.Stream) -> None:
        self._pool = pool
        self.event = pool.take()
        self.event.record(stream)

    def query(self) -> bool:
        return self.event.query()

    def synchronize(self) -> None:
        self.event.synchronize()

    def __del__(self) -> None:
        self._pool.give(self.event)


class _CudaCopy(Copy):
    def __init__(self, pairs: Pairs, object: TransferObject, direction: Direction, start: _CudaEvent) -> None:
        self.object, self.direction, self.nbytes = object, direction, _nbytes(pairs)
        self._pairs: Pairs | None = pairs
        self._start = start
        self.end: _CudaEvent | None = None
        self._seconds: float | None = None

    def query(self) -> bool:
        """Also lets go of tensors and events once complete."""
        if self.end is None:
            return True
        if not self.end.query():
            return False
        self._finish()
        return True

    def synchronize(self) -> None:
        """From any thread."""
        end = self.end
        if end is not None:
            end.synchronize()

    def _finish(self) -> None:
        assert self.end is not None
        self._seconds = self._start.event.elapsed_time(self.end.event) / 1e3
        self._pairs = self.end = None

    def seconds(self) -> float:
        self.synchronize()
        self.query()
        return self._seconds or 0.0


class _CudaHostCall(_CudaEvent, HostCall):
    """Behind a `join`. Holds what the functions use until it is reached."""

    def __init__(self, pool: _EventPool, stream: torch.cuda.Stream, functions: HostFunctions) -> None:
        super().__init__(pool, stream)
        self.functions = functions


class _CudaRepeatedCall(HostCall):
    """The same in a pass that a graph may hold: compute's own stream starts the call, and joins it where compute waits,
    so that what is issued between them runs beside the host. Of two branches a graph may run one after the other. The
    events around the wait are external ones, which a graph records each time that it runs."""

    def __init__(self, stream: torch.cuda.Stream, functions: HostFunctions) -> None:
        self._functions = functions
        driver.launch_host_function(stream.cuda_stream, functions.start, functions.argument)
        self._around = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)]

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._around[1].synchronize()

    def hold(self, stream: torch.cuda.Stream) -> None:
        self._around[0].record(stream)
        driver.launch_host_function(stream.cuda_stream, self._functions.join, self._functions.argument)
        self._around[1].record(stream)

    def last_stall(self) -> float:
        return self._around[0].elapsed_time(self._around[1]) / 1e3


class _CudaLane(Lane):
    def __init__(self, owner: _CudaStreams, stream: torch.cuda.Stream | None) -> None:
        self._owner = owner
        self._stream = stream  # None: the compute stream, whichever is current (the serial twin)

    def submit(
        self, pairs: Pairs, *, object: TransferObject, direction: Direction, after: Sequence[Event] = ()
    ) -> Copy:
        pool = self._owner.pool
        stream = self._stream or torch.cuda.current_stream(self._owner.device)
        for event in after:
            _wait_on(stream, event)
        with torch.cuda.stream(stream), torch.inference_mode():
            copy = _CudaCopy(pairs, object, direction, _CudaEvent(pool, stream))
            for dst, src in pairs:
                _copy(dst, src, stream)
            copy.end = _CudaEvent(pool, stream)
        self._owner.submitted(copy)
        return copy


def _copy(dst: torch.Tensor, src: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """One call, also of many heads, which torch would first copy to a contiguous tensor of its own."""
    if dst.is_contiguous() and src.is_contiguous():
        dst.copy_(src, non_blocking=True)
        return
    dst, src = (x.view(x.shape[0] * x.shape[1], -1) for x in (dst, src))
    pitches = (x.stride(0) * x.itemsize for x in (dst, src))
    driver.copy_rows(stream.cuda_stream, (dst.data_ptr(), src.data_ptr()), pitches, dst[0].nbytes, len(dst))


def _wait_on(stream: torch.cuda.Stream, event: Event) -> None:
    inner = event.end if isinstance(event, _CudaCopy) else event
    if inner is not None:
        assert isinstance(inner, _CudaEvent)
        stream.wait_event(inner.event)


class _CudaStreams(Streams):
    def __init__(self, device: torch.device, serial: bool) -> None:
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(device, serial)
        self.pool = _EventPool()
        self._copies: deque[_CudaCopy] = deque()
        self._stalls: deque[tuple[_CudaCopy, _CudaEvent, _CudaEvent]] = deque()
        self._tally = _Tally()
        self._host_stream = None if serial else torch.cuda.Stream(device)
        self._host_calls: deque[_CudaHostCall] = deque()
        self._host_stalls: list[tuple[_CudaEvent, _CudaEvent]] = []

    def _make_lane(self, name: str) -> Lane:
        return _CudaLane(self, None if self.serial else torch.cuda.Stream(self.device))

    def call_host(self, functions: HostFunctions, after: Event, repeated: bool = False) -> HostCall:
        if repeated:
            return _CudaRepeatedCall(torch.cuda.current_stream(self.device), functions)
        stream = self._host_stream or torch.cuda.current_stream(self.device)
        _wait_on(stream, after)
        for function in (functions.start, functions.join):
            driver.launch_host_function(stream.cuda_stream, function, functions.argument)
        call = _CudaHostCall(self.pool, stream, functions)
        while self._host_calls and self._host_calls[0].query():
            self._host_calls.popleft()
        self._host_calls.append(call)
        return call

    def drain_host_stall(self) -> float:
        stalls, self._host_stalls = self._host_stalls, []
        for _, after in stalls:
            after.synchronize()
        return sum(before.event.elapsed_time(after.event) for before, after in stalls) / 1e3

    def submitted(self, copy: _CudaCopy) -> None:
        self._copies.append(copy)
        self._reap()

    def _reap(self) -> None:
        """Count finished work and let go of it; the lanes finish out of order among each other, so look at all."""
        open_copies = [copy for copy in self._copies if not self._counted(copy)]
        self._copies = deque(open_copies)
        while self._stalls and self._stalls[0][2].query():
            copy, before, after = self._stalls.popleft()
            self._tally.stalled(copy, before.event.elapsed_time(after.event) / 1e3)

    def _counted(self, copy: _CudaCopy) -> bool:
        if not copy.query():
            return False
        self._tally.copied(copy)
        if self.serial:  # the compute stream did the copying, so all of it held compute
            self._tally.stalled(copy, copy.seconds())
        return True

    def record(self) -> Event:
        return _CudaEvent(self.pool, torch.cuda.current_stream(self.device))

    def wait(self, event: Event) -> None:
        stream = torch.cuda.current_stream(self.device)
        if isinstance(event, _CudaRepeatedCall):
            event.hold(stream)
            return
        if not isinstance(event, _CudaCopy | _CudaHostCall) or self.serial:
            _wait_on(stream, event)
            return
        if event.query():
            return
        before = _CudaEvent(self.pool, stream)
        _wait_on(stream, event)
        after = _CudaEvent(self.pool, stream)
        if isinstance(event, _CudaCopy):
            self._stalls.append((event, before, after))
        else:
            self._host_stalls.append((before, after))

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def drain_transfers(self) -> tuple[Transfer, ...]:
        self._reap()
        return self._tally.take()

    def close(self) -> None:
        for event in (*self._copies, *self._host_calls):
            event.synchronize()
        self._copies.clear()
        self._stalls.clear()
        self._host_calls.clear()
        self._host_stalls.clear()
        super().close()


# --- CPU ----------------------------------------------------------------------------------------------------------


class _CpuEvent(Event):
    """Compute on the CPU is done when the call returns: every recorded point has been reached."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class _CpuCopy(Copy):
    def __init__(self, pairs: Pairs, object: TransferObject, direction: Direction, after: Sequence[Event]) -> None:
        self.object, self.direction, self.nbytes = object, direction, _nbytes(pairs)
        self._pairs, self._after = pairs, after
        self._done = threading.Event()
        self._seconds = 0.0
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            for event in self._after:
                event.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                for dst, src in self._pairs:
                    dst.copy_(src)
            self._seconds = time.perf_counter() - start
        except BaseException as error:
            self._error = error
        finally:
            self._pairs, self._after = (), ()
            self._done.set()

    def query(self) -> bool:
        return self._done.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def synchronize(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise of_worker(self._error)

    def seconds(self) -> float:
        self.synchronize()
        return self._seconds


def of_worker(error: BaseException) -> Exception:
    """What a worker thread ended with, for the thread that waits: what would end that one, too, is an error there."""
    if isinstance(error, Exception):
        return error
    found = RuntimeError(f"a worker thread was ended in the middle of its work: {error!r}")
    found.__cause__ = error
    return found


class _CpuHostCall(HostCall):
    def __init__(self, functions: HostFunctions) -> None:
        self._functions: HostFunctions | None = functions
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(functions.start)(functions.argument)

    def query(self) -> bool:
        return self._functions is None

    def synchronize(self) -> None:
        functions, self._functions = self._functions, None
        if functions is not None:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(functions.join)(functions.argument)

    def __del__(self) -> None:
        # The functions may be at work on what goes with this object.
        self.synchronize()


class _CpuLane(Lane):
    def __init__(self, name: str, owner: _CpuStreams) -> None:
        self._owner = owner
        self._queue: queue.SimpleQueue[_CpuCopy | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        if not owner.serial:
            self._worker = threading.Thread(target=self._work, name=f"elsa-lane-{name}", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while (copy := self._queue.get()) is not None:
            copy.run()
            del copy  # hold nothing while waiting for the next

    def submit(
        self, pairs: Pairs, *, object: TransferObject, direction: Direction, after: Sequence[Event] = ()
    ) -> Copy:
        copy = _CpuCopy(pairs, object, direction, after)
        if self._worker is None:
            copy.run()
            copy.synchronize()
        else:
            self._queue.put(copy)
        self._owner.submitted(copy)
        return copy

    def close(self) -> None:
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._worker = None


class _CpuStreams(Streams):
    def __init__(self, device: torch.device, serial: bool) -> None:
        super().__init__(device, serial)
        self._copies: list[_CpuCopy] = []
        self._tally = _Tally()
        self._host_stall = 0.0

    def _make_lane(self, name: str) -> Lane:
        return _CpuLane(name, self)

    def call_host(self, functions: HostFunctions, after: Event, repeated: bool = False) -> HostCall:
        after.synchronize()
        call = _CpuHostCall(functions)
        if self.serial:
            self.wait(call)
        return call

    def drain_host_stall(self) -> float:
        seconds, self._host_stall = self._host_stall, 0.0
        return seconds

    def submitted(self, copy: _CpuCopy) -> None:
        self._copies.append(copy)
        if self.serial:
            self._tally.stalled(copy, copy.seconds())

    def record(self) -> Event:
        return _CpuEvent()

    def wait(self, event: Event) -> None:
        start = time.perf_counter()
        event.synchronize()
        if isinstance(event, _CpuHostCall):
            self._host_stall += time.perf_counter() - start
        elif isinstance(event, _CpuCopy) and not self.serial:
            self._tally.stalled(event, time.perf_counter() - start)

    def synchronize(self) -> None:
        return None

    def drain_transfers(self) -> tuple[Transfer, ...]:
        open_copies = []
        for copy in self._copies:
            if not copy.query():
                open_copies.append(copy)
            elif not copy.failed:  # a failed one has raised, or will, where it is waited for
                self._tally.copied(copy)
        self._copies = open_copies
        return self._tally.take()

    def close(self) -> None:
        for lane in self._lanes.values():
            assert isinstance(lane, _CpuLane)
            lane.close()
        super().close()
