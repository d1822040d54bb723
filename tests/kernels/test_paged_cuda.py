"""The CUDA C++ form of paged decode: on a host whose threads are fibers, as machine code, and on a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from elsa_kernels import attention_paged
from elsa_kernels.cuda import nvrtc
from elsa_kernels.paged import cuda_decode, decode_counters, gather, launch, registry, tuning
from elsa_kernels.paged.cuda_decode import Form
from elsa_kernels.paged.problem import FP8, PagedOperands, PagedProblem

from tests.kernels import aot, on_host
from tests.kernels.on_host import needs_gpp
from tests.kernels.paged_aot import problem as a_problem
from tests.kernels.paged_cases import BATCHES, Batch, check, make
from tests.kernels.test_paged import alone_arguments

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"{nvrtc.unavailable()}")
FORMS = {
    "16": Form(8, 2048, 1, longest=4096), "8": Form(11, 2112, 1, step=2, longest=4224),
    "32x4": Form(8, 2048, 1, rows=4), "32x8": Form(4, 1024, 2, conductor=False),
}  # fmt: skip
SMALL = {
    torch.float32: Form(warps=2, chunk=32, blocks_per_sm=1, rows=4, longest=64),
    torch.float16: Form(2, 128, 1, step=2, longest=256),
}
WIDE = [dataclasses.replace(batch, D=128, page=max(16, batch.page // 16 * 16)) for batch in BATCHES if batch.D == 32]
BY_NAME = {batch.name: batch for batch in WIDE}
ON_HOST = ["decode_gqa", "verification", "no_keys", "padded", "sinks", "bad_values_gqa", "bad_keys", "hidden_value"]
FP8_ON_HOST = [
    BY_NAME["fp8"], BY_NAME["fp8_scales"],
    *(dataclasses.replace(BY_NAME[name], fp8=True) for name in ("decode_gqa", "hidden_value")),
]  # fmt: skip
LONG = Batch("long", ((1, 2100), (2, 300), (1, 30), (2, 1024), (1, 4500)), H=4, D=128)  # one node of 32 chunks, several


def around_the_sizes(form: Form, group: int = 2, *, fp8: bool = False) -> Batch:
    """Lengths on both sides of those at which the size of a sequence's chunks changes; two queries where they fit."""
    lengths = tuple(
        (min(1 + keys % 2, form.rows // group), keys)
        for keys in (n * form.chunk + more for n in (1, 4, 8, 64) for more in (-1, 0, 1))
        if keys <= 64 * form.chunk
    )
    return Batch("around_the_sizes", lengths, H=group, Hkv=1, D=128, fp8=fp8, scales=(0.37, 2.9) if fp8 else None)


class Host:
    """Runs the kernel where there is no GPU."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.blocks, self.order, self.whole_nodes, self.seed = 5, torch.arange(5, dtype=torch.int32), False, 0
        self.conductor = True

    def library(self, problem: PagedProblem, form: Form) -> ctypes.CDLL:
        source = cuda_decode.source(problem.dtype).replace(
            "extern __shared__ uint4 dynamic[];", "static uint4 dynamic[1 << 14];"
        )
        return on_host.library(self.room, source, "paged_decode", form.defines(problem))

    def run(self, problem: PagedProblem, operands: PagedOperands) -> None:
        form = SMALL[torch.float32 if problem.dtype == torch.float32 else torch.float16]
        form = dataclasses.replace(form, conductor=self.conductor)
        bound = -1 if self.whole_nodes else 1 << 40
        with mock.patch.object(cuda_decode, "MAX_CHUNK_BYTES", bound):
            slots = cuda_decode.Slots.of(problem, form, self.blocks)
        assert slots.whole_nodes == self.whole_nodes
        shape = (slots.chunks + slots.nodes + 1, form.rows)  # the last one is nobody's
        states = tuple(torch.full(s, float("nan")) for s in (shape, shape, (*shape, problem.D)))
        counters = torch.zeros(slots.counters(problem) + 1, dtype=torch.int32)
        params = cuda_decode.parameters(problem, operands, slots, states, counters)
        order = ctypes.c_void_p(self.order.data_ptr())
        self.library(problem, form).launch(ctypes.byref(params), self.blocks, order, self.seed)
        assert not counters.any()
        assert all(bool(x[-1].isnan().all()) for x in states)
        start = 0
        for s, (queries, keys) in enumerate(gather.host_lengths(problem, operands)):  # those that are not the kernel's
            rows = slice(start, min(start + queries, problem.T))
            if queries * problem.group > form.rows and rows.stop > rows.start:
                gather.attend_sequence(problem, operands, s, rows, keys, keys - queries, "reference")
            start += queries


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """As the paged implementation "cuda_on_host"."""
    made = Host(tmp_path_factory.mktemp("cuda"))
    entry = registry.PagedImplementation("cuda_on_host", -2, lambda problem: None, made.run)
    with mock.patch.dict(registry._implementations, {"cuda_on_host": entry}):
        yield made


@needs_gpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ON_HOST)
def test_on_the_host(name: str, dtype: torch.dtype, host: Host) -> None:
    check(BY_NAME[name], "cuda_on_host", "cpu", dtype)


@needs_gpp
def test_bfloat16_on_the_host(host: Host) -> None:
    check(BY_NAME["verification"], "cuda_on_host", "cpu", torch.bfloat16)


@needs_gpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", FP8_ON_HOST, ids=lambda batch: batch.name)
def test_fp8_on_the_host(batch: Batch, dtype: torch.dtype, host: Host) -> None:
    check(batch, "cuda_on_host", "cpu", dtype)


@needs_gpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["long", "around_the_sizes", "around_the_sizes_fp8"])
def test_bits_on_the_host_depend_on_the_sequence_alone(name: str, dtype: torch.dtype, host: Host) -> None:
    """Not on the order in which blocks and warps run, on blocks' number, on whether they take whole nodes or have a
    conductor, or on the batch."""
    if dtype == torch.float32 and name.endswith("fp8"):
        pytest.skip("FP8 caches are for 16-bit queries")
    batch = LONG if name == "long" else around_the_sizes(SMALL[dtype], fp8=name.endswith("fp8"))
    check(batch, "cuda_on_host", "cpu", dtype)
    made = make(batch, "cpu", dtype)
    expected, lse = attention_paged(**made.arguments, return_lse=True, impl="cuda_on_host")
    for blocks, whole_nodes, conductor in (
        (5, False, True), (13, False, True), (2, True, True), (7, True, True), (5, False, False), (7, True, False),
    ):  # fmt: skip
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks)).int()
        changes = {"order": order, "whole_nodes": whole_nodes, "conductor": conductor}
        with mock.patch.multiple(host, blocks=blocks, seed=blocks, **changes):
            out, its_lse = attention_paged(**made.arguments, return_lse=True, impl="cuda_on_host")
        assert torch.equal(out, expected)
        assert torch.equal(its_lse, lse)
    for s in range(len(batch.lengths)):
        alone = attention_paged(**alone_arguments(made, s), impl="cuda_on_host")
        assert torch.equal(alone, expected[made.rows(s)])


@needs_nvrtc
@pytest.mark.parametrize(
    ("dtype", "group", "kv_dtype"),
    [
        (torch.float16, 1, None), (torch.float16, 4, None), (torch.bfloat16, 8, None), (torch.float32, 1, None),
        (torch.float32, 4, None), (torch.float32, 8, None), (torch.float16, 8, FP8), (torch.bfloat16, 4, FP8),
    ],
)  # fmt: skip
def test_a_tile_is_in_registers_while_the_next_is_on_its_way(
    dtype: torch.dtype, group: int, kv_dtype: torch.dtype | None
) -> None:
    described = a_problem(dtype, group, 128, kv_dtype)
    form = FORMS[cuda_decode.kind_of(described)]
    cubin = nvrtc.compile_cubin(cuda_decode.source(dtype), 90, form.defines(described))
    used = aot.cubin_resources(cubin)
    # a multiprocessor's warps and registers lie in four parts
    assert used["registers"] * 32 * -(-form.threads() * form.blocks_per_sm // 128) <= 16384
    assert used["stack"] <= 32  # what is spilled is not the tile
    assert form.shared_bytes() + 4 * cuda_decode.MAX_SEQUENCES <= 99 << 10  # what a block has on all GPUs


def test_the_table_has_forms_of_known_kinds() -> None:
    for kind, form in cuda_decode.forms().items():
        assert form == FORMS[kind]  # those that are tested


@pytest.mark.parametrize("form", [*SMALL.values(), *FORMS.values()], ids=str)
def test_the_longest_sequence_has_not_always_the_most_chunks(form: Form) -> None:
    cuts = [n * form.chunk for n in (1, 4, 8, 64)]
    lengths = [0, *(n for cut in cuts for n in (cut - 1, cut, cut + 1)), 200 * form.chunk]
    for most in lengths:
        assert form.most_chunks(most) == max(1, *(form.chunks_of(n) for n in lengths if n <= most))
    for n in lengths:
        assert form.chunks_of(n) <= -(-n // tuning.SMALLEST_CHUNK) or form in SMALL.values()
    assert form.most_chunks(64 * form.chunk) == 64 > form.chunks_of(64 * form.chunk) or form.longest <= form.chunk


@needs_nvrtc
def test_parameters_have_the_size_of_the_kernels() -> None:
    described = a_problem(torch.float16, 4, 128)
    text, defines = cuda_decode.source(torch.float16), FORMS["16"].defines(described)
    size = ctypes.sizeof(cuda_decode.Params)
    nvrtc.compile_cubin(text + f"static_assert(sizeof(Params) == {size});", 90, defines)
    with pytest.raises(nvrtc.CompilationFailed, match="static assertion"):
        nvrtc.compile_cubin(text + f"static_assert(sizeof(Params) == {size + 8});", 90, defines)


def test_memory_for_states_is_bounded() -> None:
    """It grows with the batch only by a state of a node, of 32 chunks."""
    described = dataclasses.replace(a_problem(torch.float16, 4, 128), B=256, max_seqlen_k=131072)
    form = FORMS["16"]
    slots = cuda_decode.Slots.of(described, form, 264)
    assert slots.whole_nodes
    assert (slots.chunks + slots.nodes) * form.state_bytes() < 80 << 20
    few = cuda_decode.Slots.of(dataclasses.replace(described, B=8), form, 264)
    assert not few.whole_nodes
    assert (few.chunks, few.nodes) == (8 * 8 * 64, (8 * 64 // 32 + 8) * 8)


def test_what_a_decode_batch_takes() -> None:
    """As the vLLM plugin asks: splits of a sequence, and bytes, bounded in both forms."""
    described = dataclasses.replace(a_problem(torch.float16, 4, 128), B=256, max_seqlen_k=131072, max_seqlen_q=1)
    with (
        mock.patch.object(cuda_decode, "_refuse_device", return_value=None),
        mock.patch.object(cuda_decode, "multiprocessors", return_value=132),
        mock.patch("torch.cuda.current_device", return_value=0),
    ):
        splits, size = launch.decode_memory(described, "sm_90")
        assert [splits(n) for n in (100, 2048, 2049, 8192, 16384, 131071, 131072)] == [1, 1, 5, 8, 8, 64, 32]
        assert size < 80 << 20
        with mock.patch.object(cuda_decode, "forms", return_value={}):
            splits, size = launch.decode_memory(described, "sm_90")
    assert [splits(n) for n in (1, 512, 513, 131072)] == [1, 1, 2, 256]
    assert 80 << 20 < size < 640 << 20


@pytest.fixture
def all_forms() -> Iterator[None]:
    """Every kind in the CUDA form, whatever the table says of this GPU."""
    with mock.patch.object(cuda_decode, "forms", return_value=FORMS):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("all_forms")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [*WIDE, LONG], ids=lambda batch: batch.name)
def test_on_a_gpu(batch: Batch, dtype: torch.dtype) -> None:
    check(batch, "triton", "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMS)
def test_lengths_around_the_sizes_of_chunks_on_a_gpu(kind: str) -> None:
    dtype = torch.float32 if kind.startswith("32") else torch.float16
    batch = around_the_sizes(FORMS[kind], {"32x4": 2, "32x8": 8}.get(kind, 4), fp8=kind == "8")
    with mock.patch.object(cuda_decode, "forms", return_value=FORMS):
        check(batch, "triton", "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_forms")
@pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [((1, 140_000), (2, 33_000), (1, 5), (1, 2049), (1, 131_071), (1, 16_383)), ((1, 9000),) * 40],
    ids=["few", "many"],
)
def test_bits_on_a_gpu_depend_on_the_sequence_alone(lengths: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    batch = Batch("long", lengths, H=8, D=128, fp8=dtype == FP8)
    made = make(batch, "cuda", torch.float16 if dtype == FP8 else dtype)
    counters = decode_counters(len(lengths), 2, 140_000, "cuda")
    expected, lse = attention_paged(**made.arguments, counters=counters, return_lse=True, impl="triton")
    assert int(counters.abs().sum()) == 0
    with mock.patch.object(cuda_decode, "MAX_CHUNK_BYTES", -1):
        out, its_lse = attention_paged(**made.arguments, counters=counters, return_lse=True, impl="triton")
    assert torch.equal(out, expected)
    assert torch.equal(its_lse, lse)
    for s in range(min(len(lengths), 6)):
        assert torch.equal(attention_paged(**alone_arguments(made, s), impl="triton"), expected[made.rows(s)])
