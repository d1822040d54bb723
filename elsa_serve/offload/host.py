"""Host memory of exactly the size asked for, page-locked where a GPU will copy from it.

torch's pinned allocator rounds every request up to a power of two, up to twice the memory of a model. Here anonymous
pages are mapped and then registered with CUDA, so a buffer costs its own size and no more.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from elsa_kernels.cpu import native
from elsa_kernels.cpu.native import library

from elsa_serve.errors import BudgetError
from elsa_serve.offload.units import aligned, format_size

FIRST_STAGING = 1 << 20  # bytes


class HostBuffer:
    """`nbytes` of zeroed host memory as a flat uint8 tensor. Keep the buffer as long as its tensor is in use."""

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        self.nbytes = nbytes
        # Private, so that it counts as the process's own memory and not as a tmpfs file's.
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # fewer pages to lock; no copy-on-write under a DMA
            if hasattr(mmap, advice):
                _advise(memory, getattr(mmap, advice))
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]  # keeps the mapping alive
        self._pinned = False
        if pin and nbytes:
            self.tensor.zero_()  # by all cores: page-locking would fault the pages in with one
            _register(self.tensor)
            self._pinned = True

    @property
    def pinned(self) -> bool:
        return self._pinned

    def mapped(self) -> torch.Tensor:
        """The buffer as kernels on the device read and write it, through PCIe: the same memory, as a tensor of the
        device that was current when it was page-locked. The tensor itself where it is not page-locked."""
        if not self._pinned:
            return self.tensor
        return torch.as_tensor(_DeviceView(self.tensor), device=torch.device("cuda", torch.cuda.current_device()))

    def close(self) -> None:
        """Unlock, and give the memory back once no view of the tensor is left. Idempotent."""
        if self._pinned:
            self._pinned = False
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr()))
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        if getattr(self, "_pinned", False):
            self.close()


class FileBuffer:
    """`nbytes` of a file that has no name, in `directory`, mapped into memory as a flat uint8 tensor.

    Its space is taken at once, so that a full disk is found here and not by a write. The kernel keeps its pages in
    memory as far as there is room. The file is gone when the buffer and every view of its tensor are.
    Raises BudgetError where the directory has no room, or cannot be written.
    """

    def __init__(self, nbytes: int, directory: Path) -> None:
        self._fd = -1
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
                memory = mmap.mmap(file.fileno(), max(nbytes, 1))
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise BudgetError(
                f"{format_size(nbytes)} for KV cannot be had in {directory} ({error.strerror}): "
                "name another folder with --kv-disk-dir, or a smaller --kv-disk"
            ) from error
        self.nbytes = nbytes
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]

    def write(self, place: torch.Tensor, values: torch.Tensor) -> None:
        """Write values [rows, n], bytes of host memory, to where `place` is, a view [rows, n] of the tensor, which
        shows them then: without the fault a page that touching new ones costs. Rows are contiguous. From any thread.
        Raises OSError.
        """
        at, stride = place.data_ptr() - self.tensor.data_ptr(), place.stride(0)
        # Each return from a system call would wait for the GIL while another thread runs Python: in one test a rate of
        # 1.9 GB/s became 0.3.
        if native.unavailable() is None:
            library.write_rows(self._fd, values, at, stride)
            return
        for row, one in enumerate(values):
            bytes_: Any = one.numpy()
            left, start = memoryview(bytes_), at + row * stride
            while left:
                written = os.pwrite(self._fd, left, start)
                left, start = left[written:], start + written

    def close(self) -> None:
        """Give the disk's space back once no view of the tensor is left. Idempotent."""
        self._close_file()
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def _close_file(self) -> None:
        file, self._fd = self._fd, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self._close_file()


class Staging:
    """Host memory, page-locked or not, handed out piece by piece and all at once taken back."""

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._buffers: list[HostBuffer] = []  # the last one is handed out, the others hold older pieces
        self._mapped = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._grow(FIRST_STAGING)

    def _grow(self, nbytes: int) -> None:
        self._buffers.append(HostBuffer(nbytes, pin=self._pin))
        self._mapped, self._used = self._buffers[-1].mapped(), 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same new tensor twice: as the host and as the device address it."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if self._used + nbytes > self._buffers[-1].nbytes:
            self._grow(max(nbytes, 2 * self._buffers[-1].nbytes))
        piece = slice(self._used, self._used + nbytes)
        self._used += aligned(nbytes)
        host, mapped = self._buffers[-1].tensor[piece], self._mapped[piece]
        return host.view(dtype).view(*shape), mapped.view(dtype).view(*shape)

    def reset(self) -> None:
        """Take back everything handed out. What the device still does with it must come before what follows."""
        self._used = 0

    def trim(self) -> None:
        """Free what was outgrown. Nothing may be under way."""
        for buffer in self._buffers[:-1]:
            buffer.close()
        del self._buffers[:-1]

    def close(self) -> None:
        self._mapped = torch.empty(0, dtype=torch.uint8)
        for buffer in self._buffers:
            buffer.close()


class _DeviceView:
    """Page-locked memory offered as CUDA memory, which it is under unified addressing: both sides use one address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _advise(memory: mmap.mmap, advice: int) -> None:
    try:
        memory.madvise(advice)
    except OSError:
        return  # a kernel without this advice: slower to lock, nothing else


def _register(tensor: torch.Tensor) -> None:
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(status) != 0:
        raise BudgetError(
            f"CUDA refused to page-lock {format_size(tensor.numel())} of host memory (error {int(status)}); "
            "lower --host-memory, or raise the container's memory limit"
        )
