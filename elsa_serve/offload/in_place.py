"""Attention over KV in host memory, where it lies: the host's cores read it and only queries and states cross PCIe.

The native CPU attention (elsa_kernels.cpu.native) is started and awaited by functions that a stream of the device
calls, so no Python waits: queries are written to page-locked memory by a kernel, the host computes (m, S, W), and a
kernel reads that state from there. Small copies would queue behind the weights in the copy engine; kernels do not.

Where the library cannot be built, which is announced, torch's CPU operations compute the states while Python waits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from elsa_kernels import State, attention
from elsa_kernels.checks import build_problem
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library
from elsa_kernels.cpu.native.library import Pool
from elsa_kernels.registry import Operands

from elsa_serve.offload.attention import AttentionOptions
from elsa_serve.offload.host import Staging
from elsa_serve.offload.machine import usable_cores
from elsa_serve.offload.streams import Event, HostCall, HostFunctions, Streams
from elsa_serve.offload.working import write_mapped
from elsa_serve.stats import HostAttention

logger = logging.getLogger(__name__)
Made = TypeVar("Made")

SPARE_CORES = 1  # beside a GPU: what its driver's threads and Python need of the host


@dataclass(frozen=True, slots=True)
class HostShare:
    """Rows of one request in one layer over the keys it holds on the host. `state` is of the device, written by the
    host; `kept` are the tensors that the host reads and writes."""

    state: State
    host_state: State
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_start: int
    options: AttentionOptions
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Grows:
    """Of a share whose last key is a piece's newest token: which piece, and the position of the share's first key."""

    piece: int
    first: int


@dataclass(frozen=True, slots=True)
class _Share:
    share: HostShare
    mapped: torch.Tensor  # the queries as the device addresses them
    grows: Grows | None


@dataclass(frozen=True, slots=True)
class _Call:
    """Jobs that start together. `items` is what the native library reads and writes."""

    jobs: list[library.Job]
    items: Any
    functions: HostFunctions


class _InOrder(Generic[Made]):
    """What a first issue makes, and later ones find again in the same order."""

    def __init__(self) -> None:
        self.made: list[Made] = []
        self.next = 0

    def take(self, make: Callable[[], Made]) -> Made:
        if self.next == len(self.made):
            self.made.append(make())
        self.next += 1
        return self.made[self.next - 1]


class RepeatedCalls:
    """The host's shares in a pass that a CUDA graph repeats: later issues of the pass find the memory and the jobs of
    the first, call by call in the same order. From one repetition to the next, shares with the newest tokens grow."""

    def __init__(self, in_place: InPlace) -> None:
        self._in_place = in_place
        self.staging = in_place.new_staging()
        self.shares: _InOrder[_Share] = _InOrder()
        self.calls: _InOrder[_Call] = _InOrder()
        self.events: list[HostCall] = []

    def begin(self) -> None:
        """Before each issue."""
        self.shares.next = self.calls.next = 0
        self.events.clear()

    def place(self, positions: Sequence[int]) -> None:
        """The pieces' new tokens are at these positions. Nothing may be under way."""
        for job, share in self._jobs():
            if share.grows is not None:
                job.problem.q_start = positions[share.grows.piece] - share.grows.first
                job.problem.Nk = job.problem.q_start + 1

    def end(self) -> None:
        """Account for a repetition that is over. Raises what a job that failed raises."""
        nbytes = sum(share.share.k[:, :, :1].nbytes * 2 * job.problem.Nk for job, share in self._jobs())
        stall = sum(event.last_stall() for event in self.events)
        self._in_place.repeated([call.items for call in self.calls.made], nbytes, stall)

    def _jobs(self) -> Iterator[tuple[library.Job, _Share]]:
        return zip((job for call in self.calls.made for job in call.jobs), self.shares.made)


class InPlace:
    """Computes host shares. One at a time, on the engine's thread; `threads` of the host work on them.

    A layer calls `stage` for each request, `launch` for all of them, and makes compute wait for the returned event
    before it reads their states. `end` raises what went wrong on the host, at the end of a pass.
    """

    def __init__(self, streams: Streams, threads: int | None = None) -> None:
        self._streams = streams
        self._staging = self.new_staging()
        self._repeating: RepeatedCalls | None = None
        self._calls: deque[tuple[Event, _Call]] = deque()
        self._bytes = self._count = 0
        self._seconds = self._stall = 0.0
        self.refusal = native.unavailable()
        self.threads = threads or worker_threads(streams.device)
        self._pool: Pool | None = None
        if self.refusal is None:
            self._pool = library.Pool(self.threads)
        else:
            logger.warning(
                "KV in host memory is attended by torch's CPU operations, several times slower, and without overlap: "
                "no native CPU attention (%s)",
                self.refusal,
            )

    def new_staging(self) -> Staging:
        return Staging(pin=self._streams.device.type == "cuda")

    @contextmanager
    def repeating(self, calls: RepeatedCalls) -> Iterator[None]:
        """What is staged and launched inside belongs to a pass that is repeated. Raises NotImplementedError without the
        native library, where Python attends."""
        if self._pool is None:
            raise NotImplementedError("torch's CPU operations attend only as Python calls them")
        calls.begin()
        self._repeating = calls
        try:
            yield
        finally:
            self._repeating = None

    def stage(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        q_start: int,
        options: AttentionOptions,
        sinks: torch.Tensor | None,
        grows: Grows | None = None,
    ) -> HostShare:
        """q [1, H, n, D] on the device, query i at position `q_start` + i of keys [2, Hkv, N, D] on the host. `grows`:
        how N and `q_start` do where the pass is repeated."""
        staging = self._repeating.staging if self._repeating else self._staging

        def make() -> _Share:
            here, mapped = staging.take(q.shape, q.dtype)
            rows = q.shape[:3]
            pairs = [staging.take(shape, torch.float32) for shape in (rows, rows, q.shape)]
            host_state, state = (State(*side) for side in zip(*pairs))
            on_host = sinks.float().cpu() if sinks is not None else None
            share = HostShare(state, host_state, here, keys[None, 0], keys[None, 1], q_start, options, on_host)
            return _Share(share, mapped, grows)

        found = self._repeating.shares.take(make) if self._repeating else make()
        write_mapped(found.mapped, q)
        return found.share

    def launch(self, shares: Sequence[HostShare], after: Event) -> Event:
        """Compute the shares once `after`, behind their staging, has been reached. Compute must wait for the event."""
        if self._repeating and self._pool is not None:
            call = self._repeating.calls.take(functools.partial(_prepare, self._pool, shares))
            event = self._streams.call_host(call.functions, after, repeated=True)
            self._repeating.events.append(event)
            return event
        self._staging.reset()  # the next layer's rows come behind this layer's merge
        self._bytes += sum(share.k.nbytes + share.v.nbytes for share in shares)
        self._count += len(shares)
        if self._pool is None:
            after.synchronize()
            for share in shares:
                _attend_in_torch(share)
            return after
        self._reap()
        call = _prepare(self._pool, shares)
        event = self._streams.call_host(call.functions, after)
        self._calls.append((event, call))
        return event

    def repeated(self, items: Sequence[Any], nbytes: int, stall: float) -> None:
        """Account for calls that a graph made."""
        self._bytes += nbytes
        self._stall += stall
        self._count += sum(len(call) for call in items)
        self._over(items)

    def _reap(self, wait: bool = False) -> None:
        """Account for calls that are over and let go of them."""
        over = []
        while self._calls and (wait or self._calls[0][0].query()):
            event, call = self._calls.popleft()
            event.synchronize()
            over.append(call.items)
        self._over(over)

    def _over(self, calls: Sequence[Any]) -> None:
        # Each from the one start of all to its own end.
        self._seconds += sum(max(item.seconds for item in items) for items in calls)
        library.check_status(next((item.status for items in calls for item in items if item.status), 0))

    def end(self) -> None:
        """Block until nothing is under way. Raises MemoryError or RuntimeError for a job that failed in this pass."""
        if self._pool is not None:
            self._reap(wait=True)
        self._staging.trim()

    def abandon(self) -> None:
        """The same, for a pass that is lost anyway."""
        for event, _ in self._calls:
            event.synchronize()
        self._calls.clear()

    def drain(self) -> HostAttention | None:
        """What the host did since the last call; None for nothing."""
        count, nbytes, seconds = self._count, self._bytes, self._seconds
        stall = self._streams.drain_host_stall() + self._stall
        self._count = self._bytes = 0
        self._seconds = self._stall = 0.0
        return HostAttention(nbytes, seconds, stall, count) if count else None

    def close(self) -> None:
        self.abandon()
        self._pool = None
        self._staging.close()


def worker_threads(device: torch.device) -> int:
    """Threads for the host's attention: with a GPU, all cores that this process may use but one."""
    if device.type != "cuda":
        return torch.get_num_threads()
    return max(1, usable_cores() - SPARE_CORES)


def _prepare(pool: Pool, shares: Sequence[HostShare]) -> _Call:
    jobs = []
    for share in shares:
        operands = Operands(share.q, share.k, share.v, sinks=share.sinks)
        o = share.options
        problem = build_problem(
            operands, causal=True, scale=o.scale, q_start=share.q_start, window=o.window, softcap=o.softcap,
            precision=None, return_state=True,
        )  # fmt: skip
        jobs.append(library.Job(pool, problem, operands, share.host_state))
    items = (library.Launch * len(jobs))(*(job.launch for job in jobs))
    launches = library.Launches(items, len(jobs))
    start, join = library.host_functions()
    return _Call(jobs, items, HostFunctions(start, join, ctypes.addressof(launches), (jobs, items, launches)))


def _attend_in_torch(share: HostShare) -> None:
    options = share.options
    result = attention(
        share.q, share.k, share.v, causal=True, scale=options.scale, q_start=share.q_start, window=options.window,
        softcap=options.softcap, sinks=share.sinks, return_state=True, impl="cpu",
    )  # fmt: skip
    for name in ("m", "S", "W"):
        getattr(share.host_state, name).copy_(getattr(result, name))
