"""The Hopper form: what it takes, its binaries (compiled ahead of time, without a GPU), and its results on a GPU."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import warnings

import elsa_kernels
import pytest
import torch
from elsa_kernels import gluon, registry
from elsa_kernels.reference import attention_reference
from elsa_kernels.registry import Problem

from tests.kernels import aot

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a compute capability 9.0 device")


def problem(**changes) -> Problem:
    base = Problem(
        B=1, H=4, Hkv=2, Nq=300, Nk=300, D=128, dtype=torch.float32, device=torch.device("cuda", 0), precision="fp32",
        causal=True, scale=0.1, q_start=0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


# --- what it takes


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"D": 64}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"window": 17}, {"has_sinks": True},
        {"has_kv_range": True}, {"return_state": True}, {"causal": False}, {"Nq": 64}, {"q_start": -20}, {"D": 96},
        {"D": 33}, {"D": 40, "dtype": torch.float16}, {"softcap": 30.0}, {"has_alibi": True},
    ],
)  # fmt: skip
def test_takes(changes):
    assert gluon.refuse(problem(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"precision": "ieee"}, "tensor cores"),
        ({"precision": "tf32"}, "tf32"),
        ({"D": 256}, "head dimension 256"),
        ({"D": 36, "dtype": torch.bfloat16}, "multiple of 8"),
        ({"scale": -1.0}, "negative"),
        ({"Nq": 63}, "63 query rows"),
        ({"Nk": 2**30}, "positions"),
        ({"has_bias": True}, "bias"),
    ],
)
def test_refuses_with_the_reason(changes, reason):
    assert reason in gluon.refuse(problem(**changes))


def test_refuses_other_devices():
    assert "not on cpu" in gluon.supports(problem(device=torch.device("cpu")))


def test_refuses_other_generations(monkeypatch):
    monkeypatch.setattr(gluon, "_capability", lambda index: (8, 0))
    assert "not 8.0" in gluon.supports(problem())


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a Hopper device with the Triton that this form is written against."""
    monkeypatch.setattr(gluon, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(gluon, "_missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "changes", [{"D": 64, "Nq": 197, "Nk": 197, "causal": False}, {"Nq": 1}, {"precision": "ieee"}]
)
def test_steps_aside_without_a_word(on_hopper, changes):
    assert not gluon.preferred(problem(**changes))
    assert gluon.preferred(problem())


def test_refuses_another_gluon(monkeypatch):
    monkeypatch.setattr(gluon, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.9.1")
    gluon._missing.cache_clear()
    try:
        assert "this is Triton 3.9.1" in gluon.supports(problem())
    finally:
        gluon._missing.cache_clear()


def test_is_preferred_on_hopper(on_hopper):
    assert elsa_kernels.select(problem()).name == "gluon"


@pytest.mark.parametrize(
    ("changes", "announced"),
    [
        ({"has_bias": True}, "bias"),
        ({"D": 256}, "head dimension 256"),
        ({"Nq": 1}, None),  # decode is not this form's
        ({"precision": "ieee"}, None),
    ],
)
def test_a_fallback_is_announced_where_this_form_was_expected(monkeypatch, on_hopper, changes, announced):
    monkeypatch.setattr(registry, "_announced", set())
    others = [e for e in registry.implementations() if e.name != "gluon"]
    last = dataclasses.replace(others[0], name="last", priority=0, supports=lambda problem: None, preferred=None)
    monkeypatch.setattr(registry, "_implementations", {"gluon": gluon.implementation, "last": last})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert registry.select(problem(**changes)).name == "last"
        registry.select(problem(**changes))
    texts = [str(warning.message) for warning in seen]
    assert len(texts) == (announced is not None)  # once, or never
    assert all("gluon refused" in text and announced in text for text in texts)


# --- which tiles a program works on (the kernels' own functions, run as plain Python)


@pytest.fixture
def schedule(monkeypatch):
    from elsa_kernels.gluon import common

    class Scalars:
        minimum, maximum = staticmethod(min), staticmethod(max)

    monkeypatch.setattr(common, "gl", Scalars)
    for name in ("key_begin", "key_end", "tile_range", "tile_of_program"):
        monkeypatch.setattr(common, name, getattr(common, name).fn)
    return common


@pytest.mark.parametrize(("heads", "tiles", "section"), [(1, 1, 1), (40, 8, 17), (5, 3, 4), (7, 32, 4), (4, 5, 9)])
def test_programs_cover_every_tile_once_heaviest_first(schedule, heads, tiles, section):
    order = [schedule.tile_of_program(pid, heads, tiles, section) for pid in range(heads * tiles)]
    assert sorted(order) == [(h, t) for h in range(heads) for t in range(tiles)]
    for first in range(0, heads, section):
        within = [tile for head, tile in order if first <= head < first + section]
        assert within == sorted(within, reverse=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("q_start", [-7, 0, 13, 50])
def test_tile_range_holds_all_visible_keys_and_no_masked_one_inside(schedule, causal, window, q_start):
    BN, Nq, Nk = 8, 37, 50
    for kv0, kv1 in ((0, Nk), (5, 31), (20, 20)):
        for row0 in range(0, Nq, 16):
            row1 = min(row0 + 16, Nq)
            args = (row0, row1, kv0, kv1, q_start, window or 10**6, BN, causal, window is not None)
            first, end, full_first, full_end = schedule.tile_range(*args)
            assert first <= full_first <= full_end <= end
            for row in range(row0, row1):
                p = q_start + row
                seen = {
                    j for j in range(kv0, kv1)
                    if (not causal or j <= p) and (window is None or abs(p - j) < window)
                }  # fmt: skip
                assert seen <= set(range(first * BN, end * BN))
                assert set(range(full_first * BN, full_end * BN)) <= seen


# --- binaries


def compile_for_hopper(kernel, descriptors: dict[str, str], element: str, constants: dict[str, object]):
    """One variant for sm_90a, with the types that the launcher passes."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, constexprs, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name in descriptors:
            signature[name] = descriptors[name]
        elif name in ("kv_range", "todo", "exponents", "starts_q", "starts_k"):
            signature[name] = "*i32"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        elif "stride" in name:
            signature[name] = "i32"
        elif name in ("q", "sinks", "slopes", "m_out", "s_out", "out"):
            signature[name] = f"*{element}" if name == "out" else "*fp32"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or "stride" in name:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def descriptor(element: str, rows: int, D: int) -> str:
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    return f"tensordesc<{element}[1, 1, {rows}, {D}],{layout}>"


FEATURES = ("WINDOW", "KV_RANGE", "VARLEN", "SINKS", "STATE")
LOGITS = ("SOFTCAP", "ALIBI")


def split_variant(D: int, causal: bool, features: bool, groups: int = 2):
    from elsa_kernels.gluon.launch import SPLIT_TILES, THREE_GROUPS
    from elsa_kernels.gluon.split_kernel import split_attention

    tile = SPLIT_TILES[D] if groups == 2 else THREE_GROUPS
    planes = {"planes": descriptor("fp16", tile.BN, D)}
    constants = dict.fromkeys(FEATURES + LOGITS, features) | {
        "D": D, "BN": tile.BN, "STAGES": tile.stages, "GROUPS": tile.groups, "REGS": tile.registers, "CAUSAL": causal,
        "WIDTH": D - 8 * features,
    }  # fmt: skip
    return compile_for_hopper(split_attention, planes, "fp32", constants)


def half_variant(element: str, D: int, causal: bool, features: bool, logits: bool = False):
    from elsa_kernels.gluon.half_kernel import half_attention
    from elsa_kernels.gluon.launch import HALF_TILES, ROWS

    tile = HALF_TILES[D]
    kv = descriptor(element, tile.BN, D)
    descriptors = {"q_desc": descriptor(element, ROWS, D), "k_desc": kv, "v_desc": kv}
    constants = dict.fromkeys(FEATURES, features) | dict.fromkeys(LOGITS, logits) | {
        "D": D, "BN": tile.BN, "STAGES": tile.stages, "GROUPS": tile.groups, "REGS": tile.registers,
        "TURNS": tile.turns, "CAUSAL": causal, "WIDTH": D - 8 * features,
    }  # fmt: skip
    return compile_for_hopper(half_attention, descriptors, "fp32" if features else element, constants)


SHARED_LIMIT = 227 * 1024


@pytest.mark.parametrize(
    ("D", "causal", "features", "groups"),
    [(128, True, False, 2), (64, False, False, 2), (64, False, True, 2), (64, True, False, 3)],
)
def test_split_kernel_keeps_its_loop_in_registers(D, causal, features, groups):
    compiled = split_variant(D, causal, features, groups)
    sass = aot.machine_code(compiled)
    loops = aot.product_loops(sass)
    assert len(loops) >= 2 * groups  # unmasked and masked tiles, of each of the consumers
    for loop in loops[:2]:
        # With every feature at once a scalar may have to wait in memory; an accumulator would show in the dozens.
        assert aot.count(loop, "LDL") + aot.count(loop, "STL") <= 4 * features
        # Of S's three products two read Q from registers; P's three always do. 4 instructions: 64 channels or keys.
        from_registers = len(re.findall(r"HGMMA\S* R\d+, R\d+, gdesc", loop))
        assert from_registers == (4 * 2 * 2 + 4 * 3 if D == 128 else 8 * 3)
    assert aot.count(sass, "HMMA") == 0
    assert aot.count(sass, "UTMALDG") >= 4  # both planes of K and of V arrive by TMA
    assert compiled.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("element", "D", "causal", "features"), [("fp16", 128, True, True), ("bf16", 64, False, False)]
)
def test_half_kernel_hides_its_softmax(element, D, causal, features):
    compiled = half_variant(element, D, causal, features)
    sass = aot.machine_code(compiled)
    assert aot.count(sass, "HMMA") == 0
    # A handful of scalars may be parked while the loops run; a spill inside them would show in the hundreds.
    assert aot.count(sass, "LDL") + aot.count(sass, "STL") <= 32
    assert compiled.metadata.shared <= SHARED_LIMIT
    # Between the wait for S (one product may still run) and the wait for P·V (none may) lie the exponentials.
    overlapped = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", sass, re.DOTALL)
    assert overlapped
    for region in overlapped:
        assert aot.count(region, r"MUFU\.EX2") >= 64 * 128 // 128


# --- the split of K and V, in the interpreter

SPLIT_IN_THE_INTERPRETER = """
import torch
from elsa_kernels.gluon.planes import split_tiles
g = torch.Generator().manual_seed(0)
k = torch.randn(2, 3, 100, 64, generator=g) * torch.tensor([1e-39, 1.0, 1e30]).view(1, 3, 1, 1)
v = torch.randn(2, 100, 3, 64, generator=g).transpose(1, 2)
v[0, 0, :64] = 0
v[1, 1, 3, 3] = float("inf")
garbage = [torch.cat([x, torch.full_like(x[:, :, :60], 1e9)], 2) for x in (k, v)]
ends = torch.tensor([[0, 100], [0, 100]], dtype=torch.int32)
padded = split_tiles(*garbage, 64, 64, ends)
out = split_tiles(k, v, 64, 64)
wide = split_tiles(k[..., :40], v[..., :40], 64, 64)
assert not wide.planes[..., 40:].any() and wide.planes[..., :40].any()
starts = torch.tensor([0, 30, 97], dtype=torch.int32)
packed = split_tiles(k[1:, :, :97], v[1:, :, :97], 64, 64, starts=starts, longest=70)
for first, begin, end in ((0, 0, 30), (1, 30, 97)):
    alone = split_tiles(k[1:, :, begin:end], v[1:, :, begin:end], 64, 64)
    tiles, rows = alone.exponents.shape[1], end - begin
    got = packed.planes[:, :, first * 64 : (first + tiles) * 64]
    assert torch.equal(got[:, :, :rows].view(torch.int16), alone.planes.view(torch.int16))
    assert not got[:, :, rows:].any()
    assert torch.equal(packed.exponents[:, first : first + tiles], alone.exponents)
assert torch.equal(padded.planes[:, :, :100].view(torch.int16), out.planes.view(torch.int16))
assert torch.equal(padded.exponents[:, :2], out.exponents) and not padded.planes[:, :, 100:].any()
planes = out.planes.double().view(4, 2, 3, 100, 64)
scale = torch.exp2(-out.exponents.double()).view(2, 3, 2, 2).repeat_interleave(64, 2)[:, :, :100]
for i, x in enumerate((k, v)):
    back = (planes[2 * i] + planes[2 * i + 1]) * scale[..., i : i + 1]
    finite = x.isfinite()
    assert (back.isfinite() == finite).all()
    off = (back - x.double())[finite].abs()
    assert (off <= x.double().abs()[finite] * 2.0**-22 + 2.0**-149).all(), off.max()
"""


def test_planes_keep_22_bits():
    # A process of its own: Triton decides for or against its interpreter when a kernel is defined.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SPLIT_IN_THE_INTERPRETER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- launches, recorded instead of made


class Recorder:
    """Stands in for a kernel: binds each launch to the kernel's own parameters."""

    def __init__(self, kernel):
        self.signature = kernel.signature
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, num_warps, num_stages=None, **kwargs):
            bound = self.signature.bind(*args, **kwargs)
            assert set(bound.arguments) == set(self.signature.parameters)
            self.launches.append((grid, bound.arguments))

        return launch


@pytest.fixture
def launches(monkeypatch):
    from elsa_kernels.gluon import launch

    names = ("split_attention", "half_attention", "careful_kernel")
    recorders = {name: Recorder(getattr(launch, name)) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)

    def planes(k, v, rows, width, kv_range, starts, longest):
        heads = k.shape[0] * k.shape[1]
        half = torch.zeros((4, heads, k.shape[2], width), dtype=torch.float16)
        return launch.TilePlanes(half, torch.zeros((heads, -(-k.shape[2] // rows), 2), dtype=torch.int32), rows)

    monkeypatch.setattr(launch, "split_tiles", planes)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    return recorders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_launches_pass_all_that_the_kernels_take(launches, dtype, state):
    from elsa_kernels.gluon import launch

    p = problem(B=2, H=4, Hkv=2, Nq=300, Nk=333, D=64, dtype=dtype, device=torch.device("cpu"), return_state=state,
                q_start=33, has_sinks=True)  # fmt: skip
    q, k, v = (torch.zeros(2, n, heads, 64, dtype=dtype).transpose(1, 2) for n, heads in ((300, 4), (333, 2), (333, 2)))
    result = launch.run(p, elsa_kernels.Operands(q, k, v, sinks=torch.zeros(4)))
    out = result.W if state else result
    assert out.shape == (2, 4, 300, 64)
    assert out.dtype == (torch.float32 if state else dtype)
    used, idle = ("split", "half") if dtype == torch.float32 else ("half", "split")
    [(grid, main)] = launches[f"{used}_attention"].launches
    assert not launches[f"{idle}_attention"].launches
    [(careful_grid, careful)] = launches["careful_kernel"].launches
    assert grid == (2 * 4 * 3,)
    # One mark per tile of a key head: its query heads are packed into blocks of twice as many rows.
    assert careful_grid == (2 * 2 * 3,)
    assert main["todo"] is careful["TODO"]
    assert main["todo"].shape == (2, 2, 3, careful["MARKS"])
    assert careful["MARKS"] == 2 * 2 <= careful["BMARKS"]
    assert careful["BM"] == 128 * 2
    assert (main["m_out"] is out) is not state


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"H": 40, "Nq": 16384}, 3),
        ({"H": 16, "Nq": 16384}, 3),
        ({"H": 16, "Nq": 8192}, 2),  # 5.2 waves of three groups, 7.8 of two
        ({"H": 16, "Nq": 8192, "causal": True}, 3),
        ({"B": 64, "H": 12, "Nq": 197}, 2),  # the second tile of a head would have 5 rows of 192
        ({"H": 1, "Nq": 100}, 2),
        ({"H": 40, "Nq": 16384, "D": 128}, 2),
    ],
)
def test_tile_of_64_channels_by_what_the_last_wave_leaves(changes, groups):
    from elsa_kernels.gluon import launch

    settings = {"B": 1, "Hkv": changes["H"], "Nk": changes["Nq"], "D": 64, "causal": False} | changes
    assert launch.split_tile(problem(**settings), 132).groups == groups


def test_three_groups_have_marks_of_their_own(launches):
    from elsa_kernels.gluon import launch

    p = problem(B=1, H=44, Hkv=22, Nq=1700, Nk=1700, D=64, causal=True, device=torch.device("cpu"))
    operands = elsa_kernels.Operands(*(torch.zeros(1, heads, 1700, 64) for heads in (44, 22, 22)))
    launch.run(p, operands)
    [(grid, main)] = launches["split_attention"].launches
    [(careful_grid, careful)] = launches["careful_kernel"].launches
    assert (main["GROUPS"], grid, careful_grid) == (3, (44 * 9,), (22 * 9,))
    assert main["todo"].shape == (1, 22, 9, 6)
    assert (careful["MARKS"], careful["BMARKS"], careful["BM"]) == (6, 8, 192 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_packed_sequences_are_one_launch(launches, dtype, state):
    from elsa_kernels.gluon import launch

    p = problem(B=3, H=4, Hkv=2, Nq=300, Nk=333, D=64, dtype=dtype, device=torch.device("cpu"), return_state=state,
                packed=True)  # fmt: skip
    q, k, v = (
        torch.zeros(n, heads, 64, dtype=dtype).transpose(0, 1)[None] for n, heads in ((500, 4), (600, 2), (600, 2))
    )
    starts = torch.tensor([0, 300, 301, 500], dtype=torch.int32)
    result = launch.run(p, elsa_kernels.Operands(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts + 1))
    [(_, main)] = launches["split_attention" if dtype == torch.float32 else "half_attention"].launches
    [(careful_grid, careful)] = launches["careful_kernel"].launches
    assert (main["VARLEN"], main["total"], main["heads"], main["tiles"]) == (True, 500, 12, 3)
    assert main["starts_q"] is starts is careful["CUQ"]
    assert careful_grid == (3 * 2 * 3,)
    assert careful["total"] == 500
    if state:
        assert (result.m.shape, result.W.shape) == ((4, 500), (4, 500, 64))
        assert (main["out_stride_h"], main["out_stride_n"]) == (500 * 64, 64)
    else:
        assert result.shape == (500, 4, 64)
        assert (main["out_stride_h"], main["out_stride_n"]) == (64, 4 * 64)


def test_descriptors_copy_what_tma_cannot_read():
    from elsa_kernels.gluon.launch import _descriptor

    x = torch.zeros(2, 100, 3, 64, dtype=torch.float16).transpose(1, 2)
    described = _descriptor(x, 64, 64)
    assert described.base is x
    assert described.strides == [100 * 3 * 64, 64, 3 * 64, 1]
    odd = torch.zeros(2, 3, 100, 65, dtype=torch.float16)[..., :64]
    assert _descriptor(odd, 64, 64).strides == [3 * 100 * 64, 100 * 64, 64, 1]
    unaligned = torch.zeros(1 + 3 * 100 * 64, dtype=torch.float16)[1:].view(1, 3, 100, 64)
    assert _descriptor(unaligned, 64, 64).base.data_ptr() % 16 == 0
    expanded = torch.zeros(1, 1, 100, 64, dtype=torch.float16).expand(1, 3, 100, 64)
    assert _descriptor(expanded, 64, 64).strides[1] == 100 * 64


# --- results


def inputs(B, H, Hkv, Nq, Nk, D, dtype, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    q = torch.randn(B, H, Nq, D, device="cuda", dtype=dtype, generator=g)
    k, v = (torch.randn(B, Hkv, Nk, D, device="cuda", dtype=dtype, generator=g) for _ in range(2))
    return q, k, v


def truth(q, k, v, **options):
    return attention_reference(q.double(), k.double(), v.double(), **options)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


LIMIT = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("H", "Hkv", "Nq", "Nk", "causal"),
    [
        (4, 4, 300, 300, True),
        (4, 2, 77, 333, True),
        (4, 1, 130, 1, False),
        (2, 2, 200, 70, True),
        (2, 1, 129, 1025, False),
    ],
)  # fmt: skip
def test_agrees_with_the_reference(dtype, D, H, Hkv, Nq, Nk, causal):
    q, k, v = inputs(2, H, Hkv, Nq, Nk, D, dtype)
    out = elsa_kernels.attention(q, k, v, causal=causal, impl="gluon")
    assert relative_error(out, truth(q, k, v, causal=causal)) < LIMIT[dtype]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("features", ["window", "sinks", "kv_range", "q_start", "softcap", "alibi", "all"])
@pytest.mark.parametrize("causal", [True, False])
def test_state_under_every_feature(dtype, features, causal):
    q, k, v = inputs(2, 4, 2, 200, 333, 128, dtype)
    options = {
        "window": {"window": 70},
        "sinks": {"sinks": torch.tensor([0.5, -math.inf, 30.0, -3.0], device="cuda")},
        "kv_range": {"kv_range": torch.tensor([[5, 300], [200, 200]], dtype=torch.int32, device="cuda")},
        "q_start": {"q_start": -40},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.tensor([0.125, 0.0625, 0.03125, 0.015625], device="cuda")},
    }
    chosen = {k: v for part in options.values() for k, v in part.items()} if features == "all" else options[features]
    state = elsa_kernels.attention(q, k, v, causal=causal, return_state=True, impl="gluon", **chosen)
    want = truth(q, k, v, causal=causal, return_state=True, **chosen)
    torch.testing.assert_close(state.logsumexp().double(), want.logsumexp(), rtol=1e-6, atol=4e-6)
    assert relative_error(state.finalize(), want.finalize()) < LIMIT[dtype]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 33), (torch.float32, 96), (torch.float16, 40), (torch.bfloat16, 120)]
)
def test_head_dimensions_between(dtype, D):
    q, k, v = inputs(1, 4, 2, 130, 4500, D, dtype)
    out = elsa_kernels.attention(q, k, v, causal=True, impl="gluon")
    assert relative_error(out, truth(q, k, v, causal=True)) < LIMIT[dtype]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("family", ["tiny", "huge", "outlier", "zero", "subnormal", "sharp", "growing"])
def test_fp32_accuracy_whatever_the_range(family):
    q, k, v = inputs(1, 2, 2, 256, 1024, 128, torch.float32)
    if family == "tiny":
        q, k, v = q * 1e-4, k * 1e-4, v * 1e-4
    elif family == "huge":
        q, k, v = q * 1e-4, k * 1e4, v * 1e4
    elif family == "outlier":
        k[..., 3] *= 1e3
        q[..., 3] *= 1e-3
        v[..., 5] *= 1e3
    elif family == "zero":
        k[..., 7] = 0
        v[..., :] = 0
        v[..., 0] = 1
    elif family == "subnormal":
        v = v * 1e-39
    elif family == "sharp":
        q = q * 4
    elif family == "growing":  # the scale of V's tiles rises and falls by more than P can take up
        steps = torch.tensor([1.0, 1e6, 1e-6, 1e12, 1.0, 1e-12, 3.0, 1e9], device="cuda")
        v = v * steps.repeat_interleave(128)[None, None, :, None]
        q[..., 0], k[:, :, 384:512, 0] = 4.0, -30.0  # the largest values weigh least
    out, want = elsa_kernels.attention(q, k, v, impl="gluon"), truth(q, k, v)
    # Where results are subnormal, FP32 itself has no more than its smallest number to offer.
    quantum = 0.5 * 2.0**-149 * want.numel() ** 0.5
    assert (out.double() - want).norm().item() < 1.5e-6 * want.norm().item() + quantum


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("features", [{}, {"window": 9000}, {"sinks": True, "return_state": True}])
def test_spans_of_keys_are_merged(D, features):
    q, k, v = inputs(1, 2, 1, 333, 12500, D, torch.float32)
    k[:, :, 8192:8300] *= 3  # the running maximum changes after sums have been put aside
    v[:, :, 10000:] *= 1e-5
    options = dict(features)
    if options.pop("sinks", False):
        options["sinks"] = torch.tensor([0.5, -3.0], device="cuda")
    out = elsa_kernels.attention(q, k, v, causal=True, impl="gluon", **options)
    want = truth(q, k, v, causal=True, **options)
    if "return_state" in options:
        out, want = out.finalize(), want.finalize()
    assert relative_error(out, want) < LIMIT[torch.float32]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_as_in_the_reference(dtype, which, value):
    tensors = dict(zip("qkv", inputs(1, 2, 1, 150, 150, 64, dtype)))
    tensors[which][0, 0, 100, 3] = value
    out = elsa_kernels.attention(**tensors, causal=True, impl="gluon")
    want = truth(**tensors, causal=True)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    finite = want.isfinite()
    assert relative_error(out[finite], want[finite]) < LIMIT[dtype]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_inputs_and_equal_bits_in_any_batch(dtype):
    packed = inputs(3, 4, 2, 300, 300, 128, dtype)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed)
    out = elsa_kernels.attention(q, k, v, causal=True, impl="gluon")
    assert torch.equal(out, elsa_kernels.attention(q, k, v, causal=True, impl="gluon"))
    alone = elsa_kernels.attention(q[1:2], k[1:2], v[1:2], causal=True, impl="gluon")
    assert torch.equal(out[1:2], alone)
    assert torch.equal(out, elsa_kernels.attention(*packed, causal=True, impl="gluon"))


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_bits_from_run_to_run_and_whatever_the_padding(dtype):
    """Many heads, so that the programs meet the SMs in another order each time; keys past the end change nothing."""
    q, k, v = inputs(2, 40, 40, 700, 5000, 128, dtype)
    first = elsa_kernels.attention(q, k, v, causal=True, impl="gluon")
    for _ in range(3):
        assert torch.equal(first, elsa_kernels.attention(q, k, v, causal=True, impl="gluon"))
    one_head = elsa_kernels.attention(*(x[:, 7:8] for x in (q, k, v)), causal=True, impl="gluon")
    assert torch.equal(first[:, 7:8], one_head)
    longer = [torch.cat([x, torch.full_like(x[:, :, :300], 1e9 if dtype == torch.float32 else 6e4)], 2) for x in (k, v)]
    ends = torch.tensor([[0, 5000], [0, 5000]], dtype=torch.int32, device="cuda")
    padded = elsa_kernels.attention(q, *longer, causal=True, q_start=4300, kv_range=ends, impl="gluon")
    assert torch.equal(first, padded)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_bits_in_whatever_order_programs_run(dtype):
    """What the number of SMs changes is which programs run together, and so does `section`."""
    from elsa_kernels import checks
    from elsa_kernels.gluon import launch
    from elsa_kernels.gluon.planes import split_tiles

    operands = elsa_kernels.Operands(*inputs(1, 8, 8, 700, 900, 128, dtype))
    p = checks.build_problem(
        operands, causal=True, scale=None, q_start=None, window=None, softcap=None, precision=None, return_state=False
    )
    if dtype == torch.float32:
        planes = split_tiles(operands.k, operands.v, launch.SPLIT_TILES[128].BN, 128)
        runs = [launch.split_forward(p, operands, planes, section=s) for s in (1, 3, 8)]
    else:
        runs = [launch.half_forward(p, operands, section=s) for s in (1, 3, 8)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": 70, "return_state": True}], ids=str
)
def test_three_warp_groups_give_the_bits_of_two(options):
    """But for tiles with rows that are not finite: the careful pass does a whole one anew, by its marks."""
    from elsa_kernels import checks
    from elsa_kernels.gluon import launch
    from elsa_kernels.gluon.planes import split_tiles

    q, k, v = inputs(1, 8, 4, 700, 900, 64, torch.float32)
    q[0, 3, 400, 5] = math.inf
    v[0, 1, 350, 7] = math.nan
    operands = elsa_kernels.Operands(q, k, v)
    settings = {"causal": False, "window": None, "return_state": False} | options
    p = checks.build_problem(operands, scale=None, q_start=None, softcap=None, precision=None, **settings)
    planes = split_tiles(k, v, 128, 64)
    two, three = (launch.split_forward(p, operands, planes, t) for t in (launch.SPLIT_TILES[64], launch.THREE_GROUPS))
    parts = zip((two.m, two.S, two.W), (three.m, three.S, three.W)) if p.return_state else [(two, three)]
    for a, b in parts:
        assert torch.equal(a.isfinite(), b.isfinite())
        for head in (0, 1, 4, 5, 6, 7):  # 2 and 3 share the key head with the NaN
            assert torch.equal(a[:, head], b[:, head])
    whole = two.W if p.return_state else two
    broken = (~whole.isfinite()).any(-1)
    assert 0 < broken.sum() < broken.numel()
    assert broken[0, 3, 400]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_than_two_to_the_31_elements(dtype):
    """Of keys and values (whose FP16 pairs are four times as many), then of queries and output."""
    if torch.cuda.get_device_properties(0).total_memory < 80e9:
        pytest.skip("needs 80 GB of GPU memory")
    heads, N, D = 65, 2**18, 128
    long = torch.zeros(1, heads, N, D, device="cuda", dtype=dtype)
    assert long.numel() > 2**31
    long[:, -1].normal_()
    short = torch.randn(1, heads, 128, D, device="cuda").to(dtype)
    for q, kv in ((short, long), (long, short)):
        out = elsa_kernels.attention(q, kv, kv, impl="gluon")[:, -1:, -128:]
        want = attention_reference(*(x[:, -1:].double() for x in (q[:, :, -128:], kv, kv)))
        assert relative_error(out, want) < LIMIT[dtype]


@needs_hopper
@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "D", "options"),
    [
        ([70, 0, 1, 400], [70, 0, 1, 475], 128, {"causal": True}),
        ([330, 266, 3], [335, 266, 0], 64, {"causal": True, "window": 120, "softcap": 3.0}),
        ([300, 64, 129], [500, 1, 64], 128, {}),
        ([3000] * 20, [3000] * 20, 64, {"causal": True}),
    ],
)
def test_packed_sequences(dtype, lengths_q, lengths_k, D, options):
    """One launch for all; each sequence as in the reference, whatever its neighbours hold."""
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (lengths_q, lengths_k))
    q = torch.randn(sum(lengths_q), 4, D, device="cuda").to(dtype)
    k, v = torch.randn(2, sum(lengths_k), 2, D, device="cuda").to(dtype)
    options = options | {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda")}
    call = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "impl": "gluon"} | options
    out = elsa_kernels.attention_varlen(q, k, v, cu_q, cu_k, **call)
    state = elsa_kernels.attention_varlen(q, k, v, cu_q, cu_k, **call, return_state=True).finalize()
    for a, b, c, d in list(zip(cu_q, cu_q[1:], cu_k, cu_k[1:]))[:4]:
        want = attention_reference(*(x.transpose(0, 1)[None].double() for x in (q[a:b], k[c:d], v[c:d])), **options)
        for got in (out[a:b].transpose(0, 1), state[:, a:b]):
            if b > a and d > c:
                assert relative_error(got[None], want) < LIMIT[dtype]
            else:
                assert not got.any()
    k[: int(cu_k[-2])], v[: int(cu_k[-2])] = math.nan, math.inf  # the last sequence must not notice
    again = elsa_kernels.attention_varlen(q, k, v, cu_q, cu_k, **call)
    assert torch.equal(again[int(cu_q[-2]) :], out[int(cu_q[-2]) :])
