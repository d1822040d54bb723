"""Layers that stay on disk: the bytes of the files, the tokens of the whole model, and what happens when disks fail."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_fault import Fault
from offload_models import logits, make_model, save, streamed

from elsa_serve.errors import CheckpointError
from elsa_serve.offload import disk, disk_layers
from elsa_serve.offload.disk import BLOCK, Bounce, DirectFile
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.streams import make_streams
from elsa_serve.offload.weights import ModelWeights, load_model

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_layers, "PIECE", 4 * 1001)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(make_model("llama"), tmp_path, shard="150KB")


def load(directory: Path, on_disk: tuple[int, ...], **options: Any) -> ModelWeights:
    defaults: dict[str, Any] = {"dtype": "auto", "device": "cpu", "attn_implementation": "sdpa", "progress": False}
    return load_model(directory, on_disk=on_disk, **defaults | options)


def close(ring: WeightStream, weights: ModelWeights) -> None:
    ring.close()
    weights.close()


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "nbytes"), [(0, 1), (0, BLOCK), (1, BLOCK), (BLOCK - 1, 2), (5000, 9001), (3 * BLOCK, 10), (14999, 1)]
)
@pytest.mark.parametrize("direct", [True, False])
def test_any_range_of_a_file(
    start: int, nbytes: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        refuse_direct_reads(monkeypatch)
    data = os.urandom(15000)
    (tmp_path / "file").write_bytes(data)
    with DirectFile(tmp_path / "file") as file:
        assert file.size == len(data)
        assert file.read(start, nbytes, Bounce()).numpy().tobytes() == data[start : start + nbytes]


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Callable[..., int] = os.open

    def without_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return opened(path, flags)

    monkeypatch.setattr(disk.os, "open", without_direct)


def test_a_file_system_without_direct_reads_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    refuse_direct_reads(monkeypatch)
    with DirectFile(tmp_path / "file") as file:
        assert not file.direct
    assert "read through the page cache" in caplog.text
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none")


def test_a_read_beyond_the_end_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 6000)
    with (
        DirectFile(tmp_path / "file") as file,
        pytest.raises(OSError, match=r"file ends at byte 6000, before byte 6001"),
    ):
        file.read(5000, 1001, Bounce())
    with DirectFile(tmp_path / "file") as file, pytest.raises(ValueError, match="not 0"):
        file.read(0, 0, Bounce())


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_from_disk_is_the_layer_in_memory(directory: Path, dtype: torch.dtype) -> None:
    weights, whole = load(directory, (1, 3), dtype=dtype), load(directory, (), dtype=dtype)
    assert weights.disk is not None
    for index in (3, 1, 3):
        read = weights.disk.order(index)
        views = disk_layers_views(weights, index, read.result())
        for name, view in whole.store.views(index).items():
            assert torch.equal(views[name], view), name
        read.release()
        read.release()
    stored = 4 * sum(view.numel() for view in whole.store.views(1).values())
    assert weights.disk.read_bytes == 3 * stored
    assert weights.store.host_nbytes == 3 * whole.store.layers[0].numel()
    assert weights.store.layers[1].is_meta
    weights.close()
    whole.close()


def disk_layers_views(weights: ModelWeights, index: int, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    from elsa_serve.offload.weights import flat_views

    return flat_views(flat, weights.store.layouts[index])


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = 1e6
    weights = load(save(model, tmp_path), (2,), dtype=torch.float16)
    assert weights.disk is not None
    read = weights.disk.order(2)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight has values beyond float16"):
        read.result()
    read.release()
    weights.close()


def test_random_weights_have_no_disk(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="lie in no file"):
        load(directory, (1,), load_format="dummy")


def test_a_tensor_of_another_shape_is_refused_before_anything_runs(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(CheckpointError, match=r"has shape \[.*96.*\], but config.json makes it \[.*80"):
        load(directory, tuple(range(5)))


# --- the ring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize(
    ("resident", "on_disk", "slots"),
    [((), (2,), 2), ((), (0, 1, 2, 3, 4), 2), ((), (0, 1, 2, 3, 4), 3), ((1,), (0, 2, 3), 2), ((0, 2), (4,), 4)],
)
def test_every_pass_gives_the_logits_of_the_whole_model(
    directory: Path, resident: tuple[int, ...], on_disk: tuple[int, ...], slots: int, serial: bool
) -> None:
    expected = logits(make_model("llama"), IDS)
    weights = load(directory, on_disk)
    streams = make_streams("cpu", serial=serial)
    ring = WeightStream(weights, resident, slots, streams)
    with streamed(weights, ring):
        for _ in range(4):
            assert torch.equal(logits(weights.model, IDS), expected)
    assert weights.disk is not None
    layer = weights.store.layers[0].numel()
    assert weights.disk.read_bytes >= 4 * len(on_disk) * layer  # read again every pass
    close(ring, weights)
    streams.close()


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_rewind_after_a_pass_cut_short(directory: Path, cut: int) -> None:
    expected = logits(make_model("llama"), IDS)
    weights = load(directory, (0, 2, 3))
    streams = make_streams("cpu")
    ring = WeightStream(weights, (1,), 2, streams)
    for index in range(cut):
        with ring.layer(index):
            pass
    ring.rewind()
    with streamed(weights, ring):
        for _ in range(2):
            assert torch.equal(logits(weights.model, IDS), expected)
    close(ring, weights)
    streams.close()


def test_resident_and_on_disk_exclude_each_other(directory: Path) -> None:
    weights = load(directory, (2,))
    with pytest.raises(ValueError, match=r"layers \[2\] are both resident and on disk"):
        WeightStream(weights, (2,), 2, make_streams("cpu", serial=True))
    weights.close()


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(5))
def test_a_pass_whose_reads_fail_ends_with_their_error_and_the_next_is_right(
    directory: Path, fault: Fault, position: int
) -> None:
    expected = logits(make_model("llama"), IDS)
    weights = load(directory, tuple(range(5)))
    streams = make_streams("cpu")
    ring = WeightStream(weights, (), 2, streams)
    for index in range(position):
        with ring.layer(index):
            pass
    fault.error = OSError(errno.EIO, "Input/output error")

    def go_on() -> None:
        for index in range(position, position + 7):  # further than what had been read ahead
            with ring.layer(index % 5):
                pass

    with pytest.raises(OSError, match="Input/output error"):
        go_on()
    ring.rewind()
    fault.error = None
    with streamed(weights, ring):
        for _ in range(2):
            assert torch.equal(logits(weights.model, IDS), expected)
    close(ring, weights)
    streams.close()


def test_a_read_that_failed_writes_no_more_when_its_buffer_is_used_again(directory: Path, fault: Fault) -> None:
    """One thread's error must not free a buffer that the others still write to."""
    weights, whole = load(directory, (1, 3)), load(directory, ())
    assert weights.disk is not None
    for _ in range(20):
        fault.error = OSError(errno.EIO, "Input/output error")
        failed = weights.disk.order(1)
        time.sleep(0.0005)
        fault.error = None
        again = weights.disk.order(3)
        views = disk_layers_views(weights, 3, again.result())
        assert all(torch.equal(views[name], view) for name, view in whole.store.views(3).items())
        again.release()
        failed.release()
    weights.close()
    whole.close()


def test_a_shard_truncated_while_serving_names_the_file(directory: Path) -> None:
    weights = load(directory, (2,))
    assert weights.disk is not None
    shard = next(iter(weights.disk._files))
    os.truncate(shard, shard.stat().st_size // 4)
    read = weights.disk.order(2)
    with pytest.raises(OSError, match=rf"{shard.name} ends at byte .* it is truncated"):
        read.result()
    read.release()
    weights.close()


def test_a_changed_byte_is_found_with_checksums_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSA_CHECKSUMS", "1")
    weights = load(directory, (1, 2))
    assert weights.disk is not None

    def read(index: int) -> None:
        order = weights.disk.order(index)  # type: ignore[union-attr]
        try:
            order.result()
        finally:
            order.release()

    for index in (1, 2, 1, 2):
        read(index)
    extent = weights.disk._extents[2][3]
    with extent.file.open("r+b") as stream:
        stream.seek(extent.start + 40)
        stream.write(b"\x55")
    read(1)
    with pytest.raises(CheckpointError, match=r"layer 2, read again from disk, has checksum"):
        read(2)
    weights.close()
