"""The FFMA kernel: what its machine code holds (no GPU needed, only NVRTC) and, on a GPU, its answers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import elsa_kernels
import pytest
import torch
from elsa_kernels import Operands, Problem, registry
from elsa_kernels.cuda import ieee, nvrtc, supports, tiles
from elsa_kernels.reference import attention_reference

from tests.kernels import on_host
from tests.kernels.cases import CASES, INF, NAN, TOLERANCE, Case, check, judge

IMPL = {"impl": "cuda_ieee", "precision": "ieee"}
TENSOR_CORE = re.compile(r"^(H|HG|Q|QG|I|IG|D|B|BG|OM|UTC\w*)MMA$")
KIB = 1024
SHARED_LIMITS = {60: 48 * KIB, 61: 48 * KIB, 62: 48 * KIB, 70: 96 * KIB, 75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB,
                 90: 227 * KIB}  # fmt: skip

needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"{nvrtc.unavailable()}")


def _tool(name: str) -> str:
    """cuobjdump or nvdisasm, from the PATH or as Triton packs them."""
    triton = pytest.importorskip("triton")
    packed = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = shutil.which(name) or (str(packed) if packed.exists() else None)
    if found is None:
        pytest.skip(f"{name} is neither on the PATH nor in Triton's package")
    return found


@functools.cache
def _cubin(tile: tiles.Tile, arch: int, logits: bool = False, vector: int = 4) -> bytes:
    return nvrtc.compile_cubin(ieee.source(), arch, tile.defines(vector=vector, logits=logits))


def _usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of the plain kernel."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [_tool("cuobjdump"), "--dump-resource-usage", path], check=True, capture_output=True, text=True
    )
    match = re.search(r"Function attention_ieee:\s*(REG:.*)", text.stdout)
    assert match is not None, text.stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", match[1])}


def _instructions(cubin: bytes, folder: Path) -> dict[str, list[str]]:
    """For each kernel, its instructions without their predicates, and its labels, in order."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([_tool("nvdisasm"), "-c", path], check=True, capture_output=True, text=True).stdout
    _, *sections = re.split(r"^\.text\.(\w+):$", text, flags=re.M)
    line = re.compile(r"^(\.L_x_\d+:)|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", re.M)
    return {
        name: [label or instruction for label, instruction in line.findall(body)]
        for name, body in zip(sections[::2], sections[1::2])
    }


def _innermost_loops(instructions: list[str]) -> list[list[str]]:
    """Bodies of backward branches without a label inside them."""
    places = {line[:-1]: i for i, line in enumerate(instructions) if line.startswith(".L")}
    loops = []
    for i, line in enumerate(instructions):
        target = re.match(r"BRA.*\((\.L_x_\d+)\)", line)
        start = places.get(target[1], i) if target else i
        body = instructions[start + 1 : i]
        if start < i and not any(x.startswith(".L") for x in body):
            loops.append(body)
    return loops


@needs_nvrtc
@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_are_ffma_and_nothing_touches_a_tensor_core(head_dim: int, tmp_path: Path) -> None:
    instructions = _instructions(_cubin(tiles.candidates(head_dim)[0], 90), tmp_path)
    assert set(instructions) == set(ieee.names(tiles.candidates(head_dim)[0]))
    for name, body in instructions.items():
        opcodes = [x.split()[0].split(".")[0] for x in body if not x.startswith(".L")]
        assert len(opcodes) > (1000 if name.startswith("attention") else 100)
        assert not [x for x in opcodes if TENSOR_CORE.match(x)]
    hot = [
        body
        for body in _innermost_loops(instructions["attention_ieee"])
        if sum(x.startswith("FFMA") for x in body) >= 256
    ]
    assert len(hot) >= 2  # Q·Kᵀ and P·V
    for body in hot:
        share = sum(x.startswith("FFMA") for x in body) / len(body)
        assert share > 0.84, f"only {share:.0%} of a hot loop is FFMA"
        loads = [x for x in body if x.startswith("LDS")]
        assert all(x.startswith("LDS.128") for x in loads)


def test_the_pattern_knows_tensor_core_instructions() -> None:
    for name in ("HMMA", "HGMMA", "QGMMA", "QMMA", "IMMA", "IGMMA", "DMMA", "BMMA", "UTCHMMA", "UTCQMMA"):
        assert TENSOR_CORE.match(name)
    for name in ("FFMA", "HFMA2", "IMAD", "FMUL"):
        assert not TENSOR_CORE.match(name)


@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "head_dim"), [(60, 128), (62, 64), (75, 128), (75, 256), (86, 128), (90, 128), (90, 256)]
)
def test_every_generation_compiles_without_spills(arch: int, head_dim: int, tmp_path: Path) -> None:
    if arch not in nvrtc.architectures():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for sm_{arch}")
    tile = tiles.choose(head_dim, SHARED_LIMITS[arch])
    assert tile is not None
    usage = _usage(_cubin(tile, arch), tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] * tile.threads * tile.blocks_per_sm <= 65536


@needs_nvrtc
def test_logits_and_unaligned_values_compile_without_spills(tmp_path: Path) -> None:
    usage = _usage(_cubin(tiles.candidates(128)[0], 90, logits=True, vector=1), tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0


def test_parameters_have_the_order_and_types_of_the_kernel() -> None:
    struct = re.search(r"struct Params \{(.*?)\};", ieee.source(), re.S)
    assert struct is not None
    declared = []
    for statement in re.sub(r"//.*", "", struct[1]).split(";"):
        if statement.strip():
            match = re.fullmatch(r"\s*(?:const )?(float|int|i64|unsigned char)\b(.*)", statement, re.S)
            assert match is not None, statement
            kind, names = match.groups()
            kinds = {"float": ctypes.c_float, "int": ctypes.c_int, "i64": ctypes.c_longlong}
            for name in names.split(","):
                pointer = "*" in statement  # a statement declares pointers or numbers, never both
                declared.append((name.strip(" *"), ctypes.c_void_p if pointer else kinds[kind]))
    assert declared == ieee.Params._fields_


@needs_nvrtc
def test_parameters_have_the_size_of_the_kernels() -> None:
    small = tiles.candidates(32)[-1].defines(vector=4, logits=False)
    arch = max(a for a in nvrtc.architectures() if a <= 90)
    size = ctypes.sizeof(ieee.Params)
    nvrtc.compile_cubin(ieee.source() + f"static_assert(sizeof(Params) == {size});", arch, small)
    with pytest.raises(nvrtc.CompilationFailed, match="static assertion"):
        nvrtc.compile_cubin(ieee.source() + f"static_assert(sizeof(Params) == {size + 8});", arch, small)


@pytest.mark.parametrize("limit", sorted(set(SHARED_LIMITS.values())))
def test_a_tile_fits_every_head_dimension(limit: int) -> None:
    for head_dim in range(1, tiles.MAX_HEAD_DIM + 1):
        tile = tiles.choose(head_dim, limit)
        assert tile is not None
        assert tile.shared_bytes <= limit
        padded = -(-head_dim // 32) * 32
        assert padded % tile.k_chunk == 0
        assert tile.keys % tile.v_chunk == 0
        assert tile.keys * tile.super_tiles <= 1024


def test_no_tile_where_nothing_fits() -> None:
    assert tiles.choose(128, 16 * KIB) is None


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    compiled = []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch, defines: compiled.append(arch) or b"code")
    for arch in (80, 90, 90):
        assert nvrtc.cached_cubin("source", arch, {"A": 1}) == b"code"
    nvrtc.cached_cubin("source", 90, {"A": 2})
    nvrtc.cached_cubin("other", 90, {"A": 1})
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 5))
    nvrtc.cached_cubin("source", 90, {"A": 1})
    assert compiled == [80, 90, 90, 90, 90]
    assert len(list((tmp_path / "cuda").glob("*.cubin"))) == 5


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch, defines: b"code")
    assert nvrtc.cached_cubin("source", 90, {}) == b"code"
    assert "ELSA_CACHE_DIR" in caplog.text


def test_without_nvrtc_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("cannot open shared object file")

    nvrtc.library.cache_clear()
    monkeypatch.setattr(nvrtc, "_candidates", list)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", missing)
    try:
        assert "pip install nvidia-cuda-nvrtc" in (nvrtc.unavailable() or "")
        with pytest.raises(nvrtc.NvrtcUnavailable):
            nvrtc.library()
    finally:
        nvrtc.library.cache_clear()


PROBLEM = Problem(
    B=1, H=2, Hkv=2, Nq=8, Nk=8, D=64, dtype=torch.float32, device=torch.device("cuda", 0), precision="ieee",
    causal=True, scale=0.125, q_start=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "CUDA devices"),
        ({"dtype": torch.float16}, "float32 tensors, not float16"),
        ({"D": 257}, "larger than 256"),
        ({"Nk": 1 << 30}, "longer than"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_refusals_without_a_device(change: dict, reason: str) -> None:
    assert reason in (supports(dataclasses.replace(PROBLEM, **change)) or "")


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [((9, 0), "fp32", "'ieee'"), ((9, 0), "tf32", "'ieee'"), ((5, 2), "ieee", "compute capability 5.2")],
)
def test_refusals_of_a_device(
    capability: tuple[int, int], precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 90))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    assert reason in (supports(dataclasses.replace(PROBLEM, precision=precision)) or "")


def test_old_devices_take_fp32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "architectures", lambda: (70, 75))
    monkeypatch.setattr(ieee, "shared_limit", lambda index: SHARED_LIMITS[70])
    assert supports(dataclasses.replace(PROBLEM, precision="fp32")) is None


class Host:
    """Stands in for a device."""

    def __init__(self, room: Path) -> None:
        self.room = room

    def kernels(self, device: int, tile: tiles.Tile, vector: int, logits: bool) -> dict[str, ctypes.CDLL]:
        source = ieee.source().replace("extern __shared__ __align__(16) float", "alignas(16) static float")
        source = source.replace("float shared[];", f"float shared[{tile.shared_bytes // 4}];")
        defines = tile.defines(vector=vector, logits=logits) | {"ELSA_FP32": 1}
        return {name: on_host.library(self.room, source, name, defines, *on_host.FUSED) for name in ieee.names(tile)}

    def launch(
        self,
        function: ctypes.CDLL,
        blocks: int,
        threads: int,
        shared: int,
        params: ctypes.Structure,
        early: bool = False,
    ) -> None:
        order = torch.arange(blocks, dtype=torch.int32)
        function.launch(ctypes.byref(params), blocks, ctypes.c_void_p(order.data_ptr()), 0)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernel as the implementation "ieee_on_host", with the tiles of sm_90."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    made = Host(tmp_path_factory.mktemp("cuda"))
    entry = registry.Implementation("ieee_on_host", -2, lambda problem: None, ieee.run)
    with (
        mock.patch.dict(registry._implementations, {"ieee_on_host": entry}),
        mock.patch.multiple(ieee, kernels=made.kernels, shared_limit=lambda index: SHARED_LIMITS[90]),
        mock.patch.object(ieee.driver, "launch", made.launch),
        mock.patch.multiple(
            torch.cuda, device=lambda device: contextlib.nullcontext(), current_device=lambda: 0,
            get_device_properties=lambda index: SimpleNamespace(multi_processor_count=2, major=8),
        ),
    ):  # fmt: skip
        yield


@dataclasses.dataclass(frozen=True)
class Form:
    """Where a test runs the kernel: takes and returns tensors of the CPU."""

    device: str
    impl: str

    def attention(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        on_device = [x.to(self.device) for x in tensors]
        options = {name: x.to(self.device) if torch.is_tensor(x) else x for name, x in options.items()}
        return elsa_kernels.attention(*on_device, impl=self.impl, precision="ieee", **options).cpu()

    def chains(self, head_dim: int) -> bool:
        tile = tiles.choose(head_dim, ieee.shared_limit(0))
        return tile is not None and tile.chains


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == "gpu":
        return Form("cuda", "cuda_ieee")
    request.getfixturevalue("host")
    return Form("cpu", "ieee_on_host")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def _relerr(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out - truth).norm() / truth.norm())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_on_the_host(case: Case, host: None) -> None:
    check(case, "ieee_on_host", "cpu", torch.float32, precision="ieee")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    check(case, IMPL["impl"], "cuda", torch.float32, precision=IMPL["precision"])


@pytest.mark.gpu
def test_ieee_chooses_this_kernel() -> None:
    assert elsa_kernels.select(dataclasses.replace(PROBLEM, device=torch.device("cuda"))).name == "cuda_ieee"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 100, 128, 192])
def test_many_tiles(head_dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = _random(2, 4, 300, head_dim), _random(2, 2, 1777, head_dim), _random(2, 2, 1777, head_dim)
    judge(
        elsa_kernels.attention(q, k, v, causal=True, **IMPL), attention_reference(q, k, v, causal=True), torch.float32
    )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_every_tile(head_dim: int, choice: int) -> None:
    torch.manual_seed(0)
    q, k, v = _random(1, 2, 200, head_dim), _random(1, 2, 777, head_dim), _random(1, 2, 777, head_dim)
    shape = {"B": 1, "H": 2, "Hkv": 2, "Nq": 200, "Nk": 777, "D": head_dim, "q_start": 577, "scale": head_dim**-0.5}
    problem = dataclasses.replace(PROBLEM, device=q.device, **shape)
    out = ieee.run_tile(problem, Operands(q, k, v), tiles.candidates(head_dim)[choice])
    judge(out, attention_reference(q, k, v, causal=True), torch.float32)


@pytest.mark.parametrize(("keys", "chain"), [(1024, 32), (1152, 64)])
def test_logits_are_summed_in_chains(form: Form, keys: int, chain: int) -> None:
    """A chain loses every product of 1 behind one of 2²⁴: of the first key's, those of the first chain."""
    if not form.chains(128):
        pytest.skip("no tile with chains fits this device")
    q, k, v = torch.ones(1, 1, 2, 128), torch.zeros(1, 1, keys, 128), torch.zeros(1, 1, keys, 128)
    q[..., 0] = 2.0**24
    k[..., 0], k[:, :, 0], v[:, :, 0] = 1.0, 1.0, 1.0
    out = form.attention(q, k, v, scale=1 / 16)
    weight = math.exp((128 - chain) / 16)
    torch.testing.assert_close(out, torch.full_like(out, weight / (weight + keys - 1)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("keys", "chain"), [(1024, 32), (1152, 64)])
def test_outputs_are_summed_in_chains(form: Form, keys: int, chain: int) -> None:
    """As above, with values of 1 behind one of 2²⁴."""
    if not form.chains(128):
        pytest.skip("no tile with chains fits this device")
    q, k, v = torch.zeros(1, 1, 2, 128), torch.zeros(1, 1, keys, 128), torch.ones(1, 1, keys, 128)
    v[:, :, 0] = 2.0**24
    out = form.attention(q, k, v)
    torch.testing.assert_close(out * keys - 2.0**24, torch.full_like(out, keys - chain), rtol=0.0, atol=4.0)


def test_sequences_of_both_kinds_in_one_batch(form: Form) -> None:
    """Short and long, with large channels and without: the bits that each has alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 128), torch.randn(3, 1, 1100, 128), torch.randn(3, 1, 1100, 128)
    k[2, :, :, 7] *= 100.0
    exist = torch.tensor([[0, 1100], [0, 600], [0, 1100]], dtype=torch.int32)
    together = form.attention(q, k, v, kv_range=exist)
    for b, (_, end) in enumerate(exist.tolist()):
        alone = form.attention(q[b : b + 1], k[b : b + 1, :, :end], v[b : b + 1, :, :end])
        assert torch.equal(together[b : b + 1], alone)
        judge(alone, attention_reference(q[b : b + 1], k[b : b + 1, :, :end], v[b : b + 1, :, :end]), torch.float32)


@pytest.mark.parametrize("head_dim", [40, 100, 128, 192])
def test_large_channels_are_summed_last(form: Form, head_dim: int) -> None:
    """Products of 1 are lost behind one of 2²⁴ or 2²⁵, which come first in both."""
    q, k, v = torch.ones(1, 2, 3, head_dim), torch.ones(1, 1, 2, head_dim), torch.zeros(1, 1, 2, head_dim)
    k[:, :, 1] = 0.0
    k[..., 1], k[..., 0] = 2.0**24, 2.0**25
    v[:, :, 0] = 1.0
    out = form.attention(q, k, v, scale=2 / head_dim)
    expected = torch.tensor(2 * (head_dim - 2) / head_dim).sigmoid()
    torch.testing.assert_close(out, expected.expand_as(out), rtol=0.0, atol=1.5 / head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("positive", [False, True])
def test_the_error_does_not_grow_with_the_length(positive: bool) -> None:
    torch.manual_seed(0)
    errors = []
    for Nk in (1024, 65536):
        q, k, v = _random(1, 1, 64, 128), _random(1, 1, Nk, 128), _random(1, 1, Nk, 128)
        if positive:
            q, k, v = q.abs(), k.abs(), v.abs()
        errors.append(_relerr(elsa_kernels.attention(q, k, v, **IMPL), attention_reference(q, k, v)))
    assert errors[1] < 2 * errors[0] < 2 * TOLERANCE[torch.float32], errors


@pytest.mark.parametrize("outliers", [False, True])
def test_rows_keep_their_bits(form: Form, outliers: bool) -> None:
    """Whatever the batch, the queries, the alignment of the values, later keys, or ∞ and NaN in other rows."""
    torch.manual_seed(0)
    queries, keys = (300, 1500) if form.device == "cuda" else (150, 400)
    seen = keys - queries
    q, k, v = torch.randn(1, 4, queries, 128), torch.randn(1, 2, keys, 128), torch.randn(1, 2, keys, 128)
    if outliers:
        k[:, 0, :, [3, 64, 70]] *= 100.0
        k[:, 1, :, 17] *= 1000.0
        k[:, :, seen + 60 :, 5] *= 1e4  # behind the keys that tell
    alone = form.attention(q, k, v, causal=True)
    batch = [torch.cat([x.flip(1, 2, 3), x]) for x in (q, k, v)]
    together = form.attention(batch[0][:, :, 77:], *batch[1:], causal=True)
    assert torch.equal(together[1:], alone[:, :, 77:])
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:129] for x in (q, k, v)]
    assert torch.equal(form.attention(*odd, causal=True), alone)
    fewer = form.attention(q[:, :, :50], k[:, :, : seen + 50], v[:, :, : seen + 50], causal=True)
    assert torch.equal(fewer, alone[:, :, :50])
    short = [x[:, :, :20] for x in (k, v)]
    padded = [torch.cat([x, 1e6 * x.flip(1, 2, 3)], 2) for x in short]
    exist = torch.tensor([[0, 20]], dtype=torch.int32)
    assert torch.equal(form.attention(q, *padded, kv_range=exist), form.attention(q, *short))
    v[:, :, seen + 100] = torch.tensor([INF, NAN, -INF, 0.0]).repeat(32)
    spoilt = form.attention(q, k, v, causal=True)
    assert torch.equal(spoilt[:, :, :100], alone[:, :, :100])
    assert not bool(spoilt[:, :, 100:, :3].isfinite().any())


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    k = torch.zeros(1, 65, 2**18, 128, device="cuda")
    assert k.numel() > 2**31
    k[:, -1].normal_()
    q = _random(1, 65, 4, 128)
    out = elsa_kernels.attention(q, k, k, **IMPL)[:, -1:]
    assert _relerr(out, attention_reference(q[:, -1:], k[:, -1:], k[:, -1:])) <= TOLERANCE[torch.float32]


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_same_bits() -> None:
    q, k, v = (_random(1, 4, 200, 64) for _ in range(3))
    expected = elsa_kernels.attention(q, k, v, causal=True, **IMPL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = elsa_kernels.attention(q, k, v, causal=True, **IMPL)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
