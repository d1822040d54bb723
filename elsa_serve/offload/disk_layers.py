"""The last tier of weights: decoder layers that stay in the checkpoint's files and are read again every pass.

    reads = DiskLayers({3: pieces_of_layer_3, …}, sizes, pinned=True)
    read = reads.order(3)      # returns at once; threads read, past the page cache, into a staging buffer
    flat = read.result()       # blocks until it is there: the layer's flat buffer, ready to be copied to the device
    read.release()             # when that copy is over

Orders are served one after the other, each by several threads. There are `BUFFERS` staging buffers, so as many reads
may be under way or unreleased; a further order waits for one of them. A `Feed` gives the orders for a ring.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from elsa_serve import envs
from elsa_serve.errors import CheckpointError
from elsa_serve.offload.disk import PIECE, THREADS, Bounce, DirectFile
from elsa_serve.offload.host import HostBuffer
from elsa_serve.offload.streams import Copy, of_worker
from elsa_serve.stats import DiskReads

BUFFERS = 3  # one that is read into, one that is full, one that is copied to the device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor's bytes in a file, and where they go in the layer's flat buffer (bytes; in `dtype` there)."""

    name: str
    file: Path
    start: int
    nbytes: int
    stored: torch.dtype
    offset: int
    dtype: torch.dtype

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(start in the file, bytes there, offset in the flat buffer) of reads of at most PIECE bytes."""
        for done in range(0, self.nbytes, PIECE):
            elements = done // self.stored.itemsize
            yield self.start + done, min(PIECE, self.nbytes - done), self.offset + elements * self.dtype.itemsize


class Read:
    """An order. Belongs to the thread that gave it."""

    def __init__(self, layer: int, owner: DiskLayers) -> None:
        self.layer = layer
        self._owner = owner
        self._over = threading.Event()
        self._flat: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._released = False

    def done(self) -> bool:
        return self._over.is_set()

    def result(self) -> torch.Tensor:
        """The layer's flat uint8 buffer. Raises OSError or CheckpointError for a disk or a file that failed."""
        began = time.perf_counter()
        self._over.wait()
        self._owner.waited_s += time.perf_counter() - began
        if self._error is not None:
            raise of_worker(self._error)
        if self._flat is None:
            raise RuntimeError(f"the read of layer {self.layer} was given up")
        return self._flat

    def release(self) -> None:
        """Give the staging buffer back; waits for a read that is still under way. Idempotent."""
        if self._released:
            return
        self._released = True
        self._owner.return_buffer(self)


class DiskLayers:
    """Reads decoder layers from files into staging buffers. `sizes` are the layers' flat sizes in bytes, by layer.

    With ELSA_CHECKSUMS set, every layer's bytes are compared with those of its first read.
    """

    def __init__(self, extents: Mapping[int, Sequence[Extent]], sizes: Mapping[int, int], *, pinned: bool) -> None:
        """Raises OSError for a file that cannot be opened."""
        self.layers = frozenset(extents)
        self.nbytes = sum(extent.nbytes for parts in extents.values() for extent in parts)
        self.read_bytes, self.read_s, self.waited_s = 0, 0.0, 0.0  # since the beginning; the last by the ring's thread
        self._drained = DiskReads(0, 0.0, 0.0)
        self._extents, self._sizes = dict(extents), dict(sizes)
        self._checksums: dict[int, int] | None = {} if envs.checksums() else None
        self._files: dict[Path, DirectFile] = {}
        self._orders: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, "elsa-disk")
        self._buffers: list[HostBuffer] = []
        self._worker: threading.Thread | None = None
        try:
            for path in {extent.file for parts in extents.values() for extent in parts}:
                self._files[path] = DirectFile(path)
            for _ in range(BUFFERS):
                self._buffers.append(HostBuffer(max(sizes.values()), pin=pinned))
                self._free.put(self._buffers[-1].tensor)
        except BaseException:
            self.close()
            raise
        self._worker = threading.Thread(target=self._serve, name="elsa-disk-orders", daemon=True)
        self._worker.start()

    @property
    def host_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def order(self, layer: int) -> Read:
        """Ask for a layer; returns at once."""
        read = Read(layer, self)
        self._orders.put(read)
        return read

    def drain(self) -> DiskReads:
        """What was read since the last call, what was read ahead included, and how long its results were waited for."""
        now, last = DiskReads(self.read_bytes, self.read_s, self.waited_s), self._drained
        self._drained = now
        return DiskReads(now.bytes - last.bytes, now.seconds - last.seconds, now.stall_s - last.stall_s)

    def return_buffer(self, read: Read) -> None:
        read._over.wait()
        if read._flat is not None:
            self._free.put(read._flat)
            read._flat = None

    def close(self) -> None:
        """End the threads and free the buffers. Every read must have been released. Idempotent."""
        if self._worker is not None:
            self._orders.put(None)
            self._worker.join()
            self._worker = None
        self._threads.shutdown()
        for file in self._files.values():
            file.close()
        for buffer in self._buffers:
            buffer.close()
        self._files, self._buffers = {}, []

    # --- the orders' thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (read := self._orders.get()) is not None:
            flat = self._free.get()
            try:
                self._fill(read.layer, flat)
                read._flat = flat[: self._sizes[read.layer]]
            except BaseException as error:
                self._free.put(flat)
                read._error = error
            finally:
                read._over.set()
            del read, flat

    def _fill(self, layer: int, flat: torch.Tensor) -> None:
        began = time.perf_counter()
        # Twice as many shares as threads, so that a slow one does not hold up the rest.
        work = [(extent, piece) for extent in self._extents[layer] for piece in extent.pieces()]
        shares = [work[i :: 2 * THREADS] for i in range(min(len(work), 2 * THREADS))]
        reads = [self._threads.submit(self._read_share, share, flat) for share in shares]
        wait(reads)  # all of them, before an error of one gives the buffer to another layer
        for one in reads:
            one.result()
        self.read_bytes += sum(extent.nbytes for extent in self._extents[layer])
        self.read_s += time.perf_counter() - began
        if self._checksums is not None:
            self._check(layer, flat[: self._sizes[layer]])

    def _read_share(self, share: Sequence[tuple[Extent, tuple[int, int, int]]], flat: torch.Tensor) -> None:
        if not hasattr(self._own, "bounce"):
            self._own.bounce = Bounce()
        for extent, (start, nbytes, offset) in share:
            raw = self._files[extent.file].read(start, nbytes, self._own.bounce)
            _put(raw, extent, flat[offset:])

    def _check(self, layer: int, flat: torch.Tensor) -> None:
        assert self._checksums is not None
        found = 0
        for extent in self._extents[layer]:  # not the padding between them, which nobody writes
            nbytes = extent.nbytes // extent.stored.itemsize * extent.dtype.itemsize
            found = zlib.crc32(flat[extent.offset : extent.offset + nbytes].numpy().data, found)
        first = self._checksums.setdefault(layer, found)
        if found != first:
            raise CheckpointError(
                f"layer {layer}, read again from disk, has checksum {found:08x}; its first read had {first:08x}: "
                "the file has changed or the disk fails; check it and start again"
            )


class Feed:
    """Reads ahead for a ring that takes the layers of `sequence` over and over; a position counts them from 0 on.

    Belongs to the ring's thread.
    """

    def __init__(self, disk: DiskLayers, sequence: Sequence[int]) -> None:
        self._disk, self._sequence = disk, list(sequence)
        self._reads: dict[int, Read] = {}  # by position, in order
        self._lent: deque[tuple[Copy, Read]] = deque()  # staging buffers that copies still read
        self._next = 0  # the position from which nothing is ordered yet
        self._order_ahead()

    def __contains__(self, position: int) -> bool:
        return self._layer(position) in self._disk.layers

    def _layer(self, position: int) -> int:
        return self._sequence[position % len(self._sequence)]

    def _order_ahead(self) -> None:
        while len(self._reads) + len(self._lent) < BUFFERS:
            if self._next in self:
                self._reads[self._next] = self._disk.order(self._layer(self._next))
            self._next += 1

    def ready(self, position: int) -> bool:
        """Whether `take` would not block."""
        self._reclaim()
        return position in self._reads and self._reads[position].done()

    def take(self, position: int) -> tuple[torch.Tensor, Read]:
        """The layer at a position, which must be the first on disk not taken yet.

        A read that failed, perhaps long before it was needed, is tried once more. Raises what the second one raised.
        """
        while position not in self._reads:  # every staging buffer is lent
            self._lent[0][0].synchronize()
            self._reclaim()
        try:
            flat = self._reads[position].result()
        except Exception as error:
            logger.warning("layer %d is read again: %s", self._layer(position), error)
            self._reads[position].release()
            self._reads[position] = self._disk.order(self._layer(position))
            flat = self._reads[position].result()
        return flat, self._reads.pop(position)

    def lend(self, copy: Copy, read: Read) -> None:
        """The copy of what `take` gave has been submitted."""
        self._lent.append((copy, read))

    def _reclaim(self) -> None:
        while self._lent and self._lent[0][0].query():
            self._lent.popleft()[1].release()
        self._order_ahead()

    def restart(self, position: int) -> None:
        """Discard what was read ahead and go on from a position."""
        for read in self._reads.values():
            read.release()
        self._reads.clear()
        self._next = position
        self._reclaim()

    def close(self) -> None:
        """Wait for what is under way and give every staging buffer back. Idempotent."""
        for read in self._reads.values():
            read.release()
        for copy, read in self._lent:
            copy.synchronize()
            read.release()
        self._reads.clear()
        self._lent.clear()


def _put(raw: torch.Tensor, extent: Extent, place: torch.Tensor) -> None:
    """Bytes as stored to the begin of `place`, in the dtype that the model runs in."""
    if extent.stored == extent.dtype:
        place[: raw.numel()].copy_(raw)
        return
    if raw.storage_offset() % extent.stored.itemsize:
        raw = raw.clone()
    values = raw.view(extent.stored)
    home = place[: values.numel() * extent.dtype.itemsize].view(extent.dtype)
    home.copy_(values)
    if extent.dtype == torch.float16 and not bool(home.isfinite().all()) and bool(values.isfinite().all()):
        raise CheckpointError(
            f"{extent.name} has values beyond float16's 65504 (it is stored as {extent.stored}); "
            "use --dtype bfloat16 or float32"
        )
