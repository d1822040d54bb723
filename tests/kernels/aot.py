"""Compile the Triton kernels for GPUs that are not here, and read what the binary uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import elsa_kernels.triton.forward as forward
import elsa_kernels.triton.merge_kernel as merge_kernel
import elsa_kernels.triton.split as split
import triton
from elsa_kernels.triton import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = ["B", "Hkv", "Nq", "Nk", "total", "q_start", "window", "n_blocks", "first_chunk", "H", "rows", "chunks"]
STRIDES = [f"s{t}{d}" for t in "qkv" for d in "bhn"] + ["sbb", "sbh", "sbn", "sbj"]
PLAIN = {
    "GROUP": 1, "CHUNK": 0, "STATE": False, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "ALIBI": False,
    "HAS_BIAS": False, "HAS_SINKS": False, "HAS_RANGES": False, "VARLEN": False,
}  # fmt: skip
EVERYTHING = PLAIN | {
    "GROUP": 4, "STATE": True, "WINDOW": True, "SOFTCAP": True, "ALIBI": True, "HAS_BIAS": True, "HAS_SINKS": True,
    "HAS_RANGES": True,
}  # fmt: skip


def compile_kernel(
    kernel, pointers: dict[str, str], constants: dict, target: str, options: dict, strides=STRIDES, integers=INTEGERS
):
    """One variant, as the launcher would compile it for 16-byte aligned pointers and strides."""
    signature, constexprs, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name in pointers:
            signature[name] = pointers[name]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in strides:
            signature[name] = "i32"
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in integers:
            signature[name] = "i32"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:  # an absent tensor
            signature[name], constexprs[(i,)] = "constexpr", None
    source = ASTSource(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def forward_variant(target: str, mode: str, D: int, features: dict, dtype: str = "fp16", rows: int = 4096):
    """`forward_kernel` in a mode, with the tile that the launcher takes on that device."""
    BD = max(16, triton.next_power_of_2(D))
    tile = tiles.rows_of_tile(tiles.choose(mode, BD, target), rows)
    element = "*fp16" if mode == "split" else f"*{dtype}"
    pointers = {
        "Q": "*fp32" if mode == "split" else element, "K0": element, "V0": element, "TODO": "*i32",
        "OUT": "*fp32" if features["STATE"] or mode == "split" else element,
    }  # fmt: skip
    if mode == "split":
        pointers |= {"K1": element, "V1": element, "KS": "*fp32", "KO": "*i32", "VS": "*fp32"}
    pointers |= _feature_pointers(features)
    constants = features | {"D": D, "BD": BD, "BM": tile.BM, "BN": tile.BN, "MODE": mode}
    return compile_kernel(forward.forward_kernel, pointers, constants, target, tile.options())


def careful_variant(target: str, D: int, features: dict, dtype: str, tile: tiles.Tile):
    BD = max(16, triton.next_power_of_2(D))
    pointers = {"Q": f"*{dtype}", "K0": f"*{dtype}", "V0": f"*{dtype}", "TODO": "*i32", "OUT": "*fp32"}
    pointers |= _feature_pointers(features)
    constants = features | {"D": D, "BD": BD, "BM": 128, "PART": tile.BM, "BN": tile.BN, "MARKS": 4, "BMARKS": 4}
    return compile_kernel(forward.careful_kernel, pointers, constants, target, tile.options())


def join_variant(target: str, D: int, count: int, state: bool):
    """The kernel that merges so many states, to a state or to an output in float16."""
    pointers = {f"{name}{i}": "*fp32" for i in range(count) for name in "MSW"} | {"OUT": "*fp32" if state else "*fp16"}
    pointers |= {"M_OUT": "*fp32", "S_OUT": "*fp32"} if state else {}
    constants = {"COUNT": count, "D": D, "BD": triton.next_power_of_2(D), "STATE": state}
    integers = ["Nq", *(f"sh{i}" for i in range(4))]
    return compile_kernel(merge_kernel.join_states_kernel, pointers, constants, target, {"num_warps": 1}, [], integers)


def planes_variants(target: str, D: int, ranges: bool = False, packed: bool = False) -> list:
    """The two kernels that split K and V, for a tile of 64 rows."""
    BD = triton.next_power_of_2(D)
    pointers = dict.fromkeys(("K", "V", "K_SCALE", "V_SCALE"), "*fp32")
    pointers |= dict.fromkeys(("KMAX", "VMAX", "ORDER"), "*i32")
    pointers |= dict.fromkeys(("K_HI", "K_LO", "V_HI", "V_LO"), "*fp16")
    pointers |= ({"RANGES": "*i32"} if ranges else {}) | ({"CUK": "*i32"} if packed else {})
    constants = {"D": D, "BD": BD, "ROWS": 64, "TILES": 8, "SAMPLE": 32, "HAS_RANGES": ranges, "VARLEN": packed}
    return [
        compile_kernel(kernel, pointers, constants, target, {"num_warps": 4}, integers=[*INTEGERS, "N"])
        for kernel in (split._amax_kernel, split._split_kernel)
    ]


def _feature_pointers(features: dict) -> dict[str, str]:
    pointers = {}
    if features["STATE"]:
        pointers |= {"M": "*fp32", "S": "*fp32"}
    for flag, name, kind in (
        ("HAS_BIAS", "BIAS", "*fp32"), ("ALIBI", "SLOPES", "*fp32"), ("HAS_SINKS", "SINKS", "*fp32"),
        ("HAS_RANGES", "RANGES", "*i32"), ("VARLEN", "CUQ", "*i32"), ("VARLEN", "CUK", "*i32"),
    ):  # fmt: skip
        if features[flag]:
            pointers[name] = kind
    return pointers


def resources(compiled) -> dict[str, int]:
    """Registers, stack bytes and shared memory of what Triton compiled, from its own resource section."""
    return cubin_resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes and static shared memory of a CUDA binary with one kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text.stdout)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text.stdout!r}")
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": int(found[3])}


def machine_code(compiled) -> str:
    """SASS of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def count(sass: str, opcode: str) -> int:
    return len(re.findall(rf"\s{opcode}\b", sass))


def product_loops(sass: str) -> list[str]:
    """The innermost loops that hold tensor-core products, shortest first: the unmasked ones lead."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in code:
        jump = re.search(r"\bBRA (?:U?P?T?\d*, )?0x([0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) >= at:
            continue
        body = [(x, line) for x, line in code if int(jump[1], 16) <= x <= at]
        joined = "\n".join(line for _, line in body)
        if "HGMMA" in joined and "EXIT" not in joined:
            loops.append((int(jump[1], 16), at, joined))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a is not b for b in loops)]
    return sorted((text for _, _, text in inner), key=len)
