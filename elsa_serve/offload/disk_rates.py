"""Rates of a disk: reads past the page cache, and copies from the device into a file."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.disk import PIECE, THREADS, Bounce, DirectFile
from elsa_serve.offload.file_lane import FileLane
from elsa_serve.offload.host import FileBuffer
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.streams import make_streams

# Most bytes read to measure a disk, and seconds: one that others use, too, gives a third more or less from one second
# to the next.
MEASURED, MEASURED_S = 8 << 30, 3.0
WRITTEN, RUN = 1 << 30, 1 << 20  # most bytes written to measure a disk, and of a head's tokens that go in one run
HEADS = 16  # whose runs are handed over together

logger = logging.getLogger(__name__)


def read_rate(files: Sequence[DirectFile], nbytes: int = MEASURED, seconds: float = MEASURED_S) -> float:
    """Bytes per second of THREADS threads reading the files one after the other: so many bytes of them, or what they
    read in so many seconds. Raises OSError."""
    every = ((file, start) for file in files for start in range(0, file.size, PIECE))
    pieces = list(itertools.islice(every, max(1, nbytes // PIECE)))
    bounces = [Bounce() for _ in range(THREADS)]

    def share(index: int) -> int:
        read = 0
        for file, start in pieces[index::THREADS]:
            if read and time.perf_counter() > began + seconds:
                break
            read += file.read(start, min(PIECE, file.size - start), bounces[index]).numel()
        return read

    with ThreadPoolExecutor(THREADS) as threads:
        began = time.perf_counter()
        read = sum(threads.map(share, range(THREADS)))
        return read / (time.perf_counter() - began)


def checkpoint_rate(directory: Path) -> float | None:
    """Bytes per second at which a checkpoint's files are read, the largest first; None, announced, where that cannot be
    measured."""
    try:
        with contextlib.ExitStack() as opened:
            paths = sorted(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size, reverse=True)
            if not paths:
                raise FileNotFoundError("there is no *.safetensors in it")
            return read_rate([opened.enter_context(DirectFile(path)) for path in paths])
    except OSError as error:
        logger.warning("the disk of %s cannot be measured (%s)", directory, error)
        return None


def folder_rate(nbytes: int, folder: Path) -> float:
    """Reads of a file written for it; the assumed rate where no such file can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="elsa-disk-") as file:
            block = b"\x01" * (1 << 20)
            for _ in range(max(1, nbytes >> 20)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            with DirectFile(Path(file.name)) as opened:
                return read_rate([opened])
    except OSError as error:
        logger.warning("the disk of %s cannot be measured (%s): its rate is assumed", folder, error)
        return Rates().disk


def write_rate(folder: Path, device: torch.device, nbytes: int, run: int = RUN) -> float:
    """Copies from the device into a new file of `nbytes`, or as large as is measured, in runs of so many bytes, as KV
    on disk is written; the assumed rate where no such file can be."""
    nbytes = min(nbytes, WRITTEN)
    streams = make_streams(device)
    try:
        file = FileBuffer(nbytes, folder)
        lane = FileLane(file, streams)
        run = min(run, nbytes)
        places = file.tensor[: nbytes // run * run].view(1, -1, run, 1)
        source = torch.ones(1, min(HEADS, places.shape[1]), run, 1, dtype=torch.uint8, device=streams.device)
        began = time.perf_counter()
        for place in places.split(HEADS, 1):
            lane.submit(place, source[:, : place.shape[1]], [streams.record()])
        errors, seconds = lane.end(), time.perf_counter() - began
        lane.close()
        if errors:
            raise errors[0]
        return places.numel() / seconds
    except (OSError, BudgetError) as error:
        logger.warning("writes to the disk of %s cannot be measured (%s): their rate is assumed", folder, error)
        return Rates().disk_write
    finally:
        streams.close()
