"""Reads of files that bypass the page cache: what is read once a pass would only push better things out of it."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from types import TracebackType

import torch

BLOCK = 4096  # bytes; what O_DIRECT wants offsets, lengths and addresses to be multiples of, on every disk in use
THREADS = 4  # reads in flight: what a solid-state disk needs for its full rate
PIECE = 8 << 20  # bytes a read: large enough for a disk's full rate, small enough to overlap with the copying out

logger = logging.getLogger(__name__)


class Bounce:
    """Page-aligned memory that one thread's reads arrive in."""

    def __init__(self, nbytes: int = PIECE + 2 * BLOCK) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self.view = memoryview(self._memory)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)


class DirectFile:
    """A file opened for reads past the page cache, where its file system allows that, else through it (announced).

    Reads may come from several threads, each with a `Bounce` of its own.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError:
            self._fd = os.open(path, os.O_RDONLY)  # raises where the file itself is the reason
            self.direct = False
        if not self.direct:
            logger.warning("%s is read through the page cache: its file system has no direct reads", path)
        self.size = os.fstat(self._fd).st_size

    def read(self, start: int, nbytes: int, bounce: Bounce) -> torch.Tensor:
        """Bytes [start, start + nbytes) as a uint8 view of `bounce`, valid until its next use. At most PIECE bytes.

        Raises OSError, also for a file that ends before them.
        """
        if not 0 < nbytes <= PIECE:
            raise ValueError(f"a read takes 1 … {PIECE} bytes, not {nbytes}")
        first = start // BLOCK * BLOCK
        end = start + nbytes
        wanted = -(-end // BLOCK) * BLOCK - first
        got = 0
        while first + got < end:
            count = os.preadv(self._fd, [bounce.view[got:wanted]], first + got)
            got += count
            if first + got < end and (count == 0 or got % BLOCK):  # a direct read stops inside a block at the end only
                raise OSError(f"{self.path} ends at byte {first + got}, before byte {end}: it is truncated")
        return bounce.tensor[start - first : end - first]

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
