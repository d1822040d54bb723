"""Sizes, the container's limits, measured rates and exact host buffers."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest
import torch

from elsa_serve.errors import UsageError
from elsa_serve.offload import machine
from elsa_serve.offload.host import FIRST_STAGING, HostBuffer, Staging
from elsa_serve.offload.units import format_size, parse_size

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB), ("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), (" 1.5 gib ", 3 * GIB // 2),
        ("1000", 1000), ("2k", 2000), ("1TiB", 2**40), (4096, 4096),
    ],
)  # fmt: skip
def test_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "24 GiBB", "-1GiB", "1,5GiB", "lots"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a size.*24GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(17, "17 B"), (24 * GIB, "24.0 GiB"), (512 * 2**20, "512 MiB"), (3 * GIB // 2, "1.5 GiB")]
)
def test_format_size(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def fake_proc(root: Path, cgroup: str, available_gib: int = 50) -> Path:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal: {64 * 2**20} kB\nMemAvailable: {available_gib * 2**20} kB\nHugePages: 0\n"
    )
    (proc / "self/cgroup").write_text(cgroup)
    return proc


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_cgroup_v2_limit_of_a_parent_counts(tmp_path: Path) -> None:
    proc, root = fake_proc(tmp_path, "0::/pod/box\n"), tmp_path / "cgroup"
    write(root / "pod/box", memory__max="max", memory__current=str(1 * GIB))
    stat = f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}"
    write(root / "pod", memory__max=str(16 * GIB), memory__current=str(7 * GIB), memory__stat=stat)
    memory = machine.host_memory(proc, root)
    assert memory.cgroup_limit == memory.limit == 16 * GIB
    assert memory.available == 12 * GIB  # 16 less 7 used, of which 3 are file cache


def test_cgroup_v1(tmp_path: Path) -> None:
    proc, root = fake_proc(tmp_path, "5:cpu:/x\n3:memory:/box\n"), tmp_path / "cgroup"
    write(root / "memory/box", memory__limit_in_bytes=str(8 * GIB), memory__usage_in_bytes=str(2 * GIB))
    write(root / "memory", memory__limit_in_bytes=str(9223372036854771712), memory__usage_in_bytes=str(40 * GIB))
    memory = machine.host_memory(proc, root)
    assert memory.limit == 8 * GIB
    assert memory.available == 6 * GIB


def test_no_cgroup_limit(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/\n")
    memory = machine.host_memory(proc, tmp_path / "cgroup")
    assert memory.cgroup_limit is None
    assert (memory.limit, memory.available) == (64 * GIB, 50 * GIB)


@pytest.mark.parametrize(("limits", "cores"), [(("max 100000", "100000 100000"), 1), (("50000 100000", "max 1"), 1)])
def test_a_share_of_processor_time_counts_in_whole_cores(limits: tuple[str, str], cores: int, tmp_path: Path) -> None:
    proc, root = fake_proc(tmp_path, "0::/pod/box\n"), tmp_path / "cgroup"
    write(root / "pod/box", cpu__max=limits[0])
    write(root / "pod", cpu__max=limits[1])
    assert machine.usable_cores(proc, root) == cores


def test_without_a_limit_all_cores_count(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/\n")
    write(tmp_path / "cgroup", cpu__max="max 100000")
    assert machine.usable_cores(proc, tmp_path / "cgroup") == len(os.sched_getaffinity(0))


def test_this_machine() -> None:
    memory = machine.host_memory()
    assert 0 < memory.available <= memory.limit <= memory.total
    cpu = torch.device("cpu")
    gpu = machine.default_gpu_budget(cpu)
    assert 0 < gpu + machine.default_host_budget(cpu, gpu) <= memory.total


def test_a_host_buffer_costs_what_was_asked() -> None:
    size = (32 << 20) + 4096  # a power-of-two allocator would take 64 MiB
    before = resident()
    buffer = HostBuffer(size, pin=False)
    assert buffer.tensor.numel() == size
    assert buffer.tensor.data_ptr() % 4096 == 0
    assert not buffer.tensor.any()
    buffer.tensor.fill_(1)
    assert abs(resident() - before - size) < (8 << 20)
    buffer.close()
    buffer.close()
    gc.collect()
    assert resident() - before < (8 << 20)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pinned_host_buffer_is_page_locked_until_closed() -> None:
    buffer = HostBuffer(5_000_000, pin=True)
    tensor = buffer.tensor
    assert tensor.is_pinned()
    buffer.close()
    assert not tensor.is_pinned()


def test_staging_grows_and_gives_back_what_it_outgrew() -> None:
    staging = Staging(pin=False)
    first, mapped = staging.take((2, 3), torch.int32)
    first.fill_(7)
    assert mapped.tolist() == [[7] * 3] * 2
    second, _ = staging.take((1,), torch.int64)
    assert second.data_ptr() % 64 == 0
    assert second.data_ptr() >= first.data_ptr() + 24
    large, _ = staging.take((FIRST_STAGING,), torch.int32)
    large.fill_(1)
    assert first.tolist() == [[7] * 3] * 2  # an older piece stays as it is
    staging.reset()
    staging.trim()
    again, _ = staging.take((FIRST_STAGING,), torch.int32)
    assert again.data_ptr() == large.data_ptr()
    staging.close()
