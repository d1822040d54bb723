"""KV on its way from the device into the disk tier's file: through page-locked memory, from which threads write it.

No copy engine writes a file's pages, and a copy to where they are mapped holds compute and Python while the kernel
finds a page for every 4 KiB of them. Here compute goes on, and a write that fails is an error and not a signal.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from elsa_serve.offload.host import FileBuffer, HostBuffer
from elsa_serve.offload.streams import Copy, Event, Streams, of_worker

THREADS = 4  # that write at once: as many as the page cache of an H200's host took more from (5.5 GB/s, 4 of one)
SLOT, SLOTS = 8 << 20, 8  # bytes of page-locked memory that are written at once, and how many of them
# Python's switch interval while there is a lane: by default (5 ms) a thread that returns from a write may wait longer
# for the one that issues a pass than the write took. Beside one that only computes, which loses nothing by it: on an
# H200's host 1.0 GB/s of 4.0 with 0.5 ms; in a test on two cores 0.4 with 5 ms, 2.1 with 0.5, 2.9 with this, of 4.1.
SWITCH_S = 5e-5


def staging_bytes(file_bytes: int) -> int:
    """Page-locked memory of a file's lane."""
    return SLOTS * _slot_bytes(file_bytes)


def _slot_bytes(file_bytes: int) -> int:
    return min(SLOT, -(-file_bytes // SLOTS))


class FileLane:
    """Copies into one file, in no order. Belongs to the engine's thread."""

    def __init__(self, file: FileBuffer, streams: Streams) -> None:
        self._file, self._lane = file, streams.lane("kv-file")
        self._slot_bytes = _slot_bytes(file.nbytes)
        self._buffers = [HostBuffer(self._slot_bytes, pin=streams.device.type == "cuda") for _ in range(SLOTS)]
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in self._buffers:
            self._free.put(buffer.tensor)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="elsa-kv-file")
        self._writes: list[Future[None]] = []
        self._closed = False
        _turns.quicken()

    def submit(self, place: torch.Tensor, values: torch.Tensor, after: Sequence[Event]) -> list[Copy]:
        """Copy values on the device to a place in the file, both [2, Hkv, n, D] and contiguous per head, once every
        event of `after` has been reached. Returns copies after which the values may change; the file has them after
        `end`. Blocks while all page-locked memory waits to be written."""
        copies = []
        for there, here in self._pieces(place, values):
            slot = self._free.get()
            try:
                staged = slot[: here.numel()].view(here.shape)
                copies.append(self._lane.submit([(staged, here)], object="kv", direction="d2h", after=after))
            except BaseException:
                self._free.put(slot)
                raise
            self._writes.append(self._threads.submit(self._write, slot, copies[-1], there, staged))
        return copies

    def _pieces(self, place: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Both as bytes [1, heads, …], as many together as a slot holds: several heads, or a part of one."""
        place, values = (x.view(x.shape[0] * x.shape[1], -1).view(torch.uint8) for x in (place, values))
        heads = max(1, self._slot_bytes // values.shape[1])
        for low in range(0, len(values), heads):
            some = place[None, low : low + heads], values[None, low : low + heads]
            yield from zip(*(x.split(self._slot_bytes, 2) for x in some))

    def _write(self, slot: torch.Tensor, copy: Copy, place: torch.Tensor, staged: torch.Tensor) -> None:
        try:
            copy.synchronize()
            self._file.write(place[0], staged[0])
        finally:
            self._free.put(slot)

    def end(self) -> list[Exception]:
        """Block until the file has everything that could be written; what went wrong."""
        writes, self._writes = self._writes, []
        return [of_worker(error) for write in writes if (error := write.exception()) is not None]

    def close(self) -> None:
        """Close the file, too. Idempotent."""
        self._end_turns()
        self._threads.shutdown()
        for buffer in self._buffers:
            buffer.close()
        self._file.close()

    def _end_turns(self) -> None:
        if not self._closed:
            self._closed = True
            _turns.restore()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._end_turns()


class _Turns:
    """Python's switch interval, which is the process's: short from the first lane's begin to the last one's end."""

    def __init__(self) -> None:
        # Reentrant: a lane may be collected, and end, while its thread is in here.
        self._lock, self._lanes, self._before = threading.RLock(), 0, 0.0

    def quicken(self) -> None:
        with self._lock:
            if not self._lanes:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, SWITCH_S))
            self._lanes += 1

    def restore(self) -> None:
        with self._lock:
            self._lanes -= 1
            if not self._lanes:
                sys.setswitchinterval(self._before)


_turns = _Turns()
