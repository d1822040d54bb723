"""Compile the paged kernels for GPUs that are not here, as the launcher would."""

from __future__ import annotations

import torch
import triton
from elsa_kernels.paged import launch, tuning
from elsa_kernels.paged.decode_kernel import decode_kernel
from elsa_kernels.paged.prefill_kernel import prefill_kernel
from elsa_kernels.paged.problem import FP8, PagedProblem

from tests.kernels.aot import compile_kernel

STRIDES = ("sqt", "sqh", "skb", "skp", "skh", "svb", "svp", "svh", "sot", "soh")
INTEGERS = ("stb", "B", "T", "Hkv", "window", "top0")
NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
PLAIN = {"WINDOW": False, "SOFTCAP": False, "ALIBI": False, "HAS_SINKS": False, "HAS_LSE": False, "SCALED": False}
EVERYTHING = dict.fromkeys(PLAIN, True)


def problem(dtype: torch.dtype, group: int, D: int, kv_dtype: torch.dtype | None = None) -> PagedProblem:
    return PagedProblem(
        T=4, B=4, H=8 * group, Hkv=8, D=D, page=16, dtype=dtype, kv_dtype=kv_dtype or dtype,
        device=torch.device("cuda"), precision="fp32", causal=True, scale=0.1, window=None, softcap=None,
        max_seqlen_q=1, max_seqlen_k=4096,
    )  # fmt: skip


def variant(target: str, form: str, of: PagedProblem, features: dict[str, bool], **override: int):
    """form: "lanes", "dot16", "dot64" or "prefill". Returns the compiled kernel."""
    mode = tuning.choose_mode(of.dtype, of.precision, target)
    fp8 = "none" if of.kv_dtype != FP8 else "native" if tuning.converts_fp8(target) else "bits"
    constants = features | {
        "GROUP": of.group, "D": of.D, "BD": max(16, triton.next_power_of_2(of.D)), "BB": 4, "PAGE": of.page,
        "MODE": mode, "FP8": fp8, "ALIKE": True, "HEAD_SCALES": features["SCALED"], "CAUSAL": True,
    }  # fmt: skip
    if form == "prefill":
        kernel, tile = prefill_kernel, tuning.prefill_tile(mode, of.D, target)
        constants |= {"BM": tile.BM, "BN": tile.BN, "MIN_ROWS": 64}
    else:
        cuts = {f"{c.form}{c.rows_max if c.form == 'dot' else ''}": c for c in launch.decode_launches(of, mode, target)}
        cut = cuts[form]
        kernel, tile = decode_kernel, cut.tile
        rows = cut.rows_max
        constants |= {
            "ROWS": rows, "BN": tile.BN, "CHUNK": tile.CHUNK, "FAN": tile.FAN, "RB": min(tile.merge_rows, rows),
            "FORM": cut.form, "MIN_ROWS": cut.above, "MAX_ROWS": cut.rows_max, "NODES": False,
        }  # fmt: skip
    constants["STAGES"] = override.pop("num_stages", tile.num_stages)
    num_warps = override.pop("num_warps", tile.num_warps)
    maxnreg = override.pop("maxnreg", getattr(tile, "registers", 0) or None)
    constants |= override
    element = NAMES[of.dtype]
    cache = element if fp8 == "none" else "*fp8e4nv" if fp8 == "native" else "*u8"
    pointers = {
        "Q": element, "K": cache, "V": cache, "OUT": element, "CU": "*i32", "USED": "*i32", "TABLE": "*i32",
        "PM": "*fp32", "PL": "*fp32", "PW": "*fp32", "COUNT": "*i32",
    }  # fmt: skip
    for flag, names in (
        ("HAS_LSE", ("LSE",)), ("ALIBI", ("SLOPES",)), ("HAS_SINKS", ("SINKS",)), ("SCALED", ("K_SCALE", "V_SCALE")),
    ):  # fmt: skip
        if features[flag]:
            pointers |= dict.fromkeys(names, "*fp32")
    options = {"num_warps": num_warps, "maxnreg": maxnreg}
    return compile_kernel(kernel, pointers, constants, target, options, STRIDES, INTEGERS)
