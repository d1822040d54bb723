"""The linear kernels compile for Hopper on a machine without one, without spilling, and on the units they claim."""

import pytest
import triton
from elsa_kernels.linear import GluonTile, SkinnyTile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels import aot

HALF = dict.fromkeys(("x_hi", "x_lo", "w_hi", "w_lo"), "*fp16")
INTEGERS = ("M", "N", "K", "SPAN", "stride", "spans")


def compile_ahead(kernel, source, constants, types, **options):
    """One variant for sm_90a, with pointers and row lengths as aligned as the launcher's."""
    signature, constexprs, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32" if name in INTEGERS else "*fp32")
        if signature[name].startswith("*") or name in ("N", "K", "SPAN", "stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        source(kernel, signature, constexprs, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles")
@pytest.mark.parametrize("bias", [False, True])
def test_hopper_form(bias):
    from elsa_kernels.gluon.linear_kernel import linear_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    tile = GluonTile()
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
    types = {
        name: f"tensordesc<fp16[{64 if name[0] == 'x' else tile.BN}, {tile.BK}],{layout}>" for name in HALF
    } | dict.fromkeys(("x_exponent", "w_exponent"), "*i32")
    constants = {
        "BN": tile.BN, "BK": tile.BK, "STAGES": tile.stages, "GROUP": 8, "BIAS": bias, "REGISTERS": tile.registers,
    }  # fmt: skip
    compiled = compile_ahead(linear_kernel, GluonASTSource, constants, types, num_warps=4)
    used = aot.resources(compiled)
    assert used["stack"] == 0
    assert used["shared"] <= 227 * 1024
    assert compiled.asm["ptx"].count("wgmma.mma_async") >= 2 * 3 * tile.BK // 16  # three products, two consumers


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="compiles")
@pytest.mark.parametrize("rows", [16, 32])
def test_form_for_few_rows_streams_the_weights(rows):
    from elsa_kernels.triton.linear_kernel import skinny_kernel

    tile = SkinnyTile()
    constants = {"BM": rows, "BN": tile.BN, "BK": tile.BK}
    compiled = compile_ahead(skinny_kernel, ASTSource, constants, HALF, num_warps=tile.warps, num_stages=tile.stages)
    used = aot.resources(compiled)
    assert used["stack"] == 0
    assert 2 * used["shared"] <= 227 * 1024  # at least two programs share a multiprocessor
    assert "cp.async.cg" in compiled.asm["ptx"]
