"""The public functions: refusals and their words, custom ops under torch.compile, choice of implementation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings

import elsa_kernels
import pytest
import torch
from elsa_kernels import State, UnsupportedProblem, attention, attention_varlen, registry
from elsa_kernels.reference import attention_reference


def qkv(B=1, H=4, Hkv=2, Nq=6, Nk=9, D=8, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple(torch.randn(B, h, n, D, dtype=dtype) for h, n in ((H, Nq), (Hkv, Nk), (Hkv, Nk)))


def test_all_is_what_we_promise() -> None:
    assert set(elsa_kernels.__all__) == {
        "FallbackWarning", "Implementation", "Operands", "Problem", "State", "UnsupportedProblem", "attention",
        "attention_paged", "attention_varlen", "cpu", "cuda", "explain", "gluon", "implementations", "merge",
        "merged_output", "merging", "paged",
        "reference", "register", "reshape_and_cache", "select", "tree_merge", "triton",
    }  # fmt: skip
    assert all(hasattr(elsa_kernels, name) for name in elsa_kernels.__all__)


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.randn(4, 6, 8)}, ValueError, r"3 dimensions.*\[B, heads, N, D\]"),
        ({"k": torch.randn(1, 2, 9, 8).double()}, TypeError, "float64.*float32.*one dtype"),
        ({"k": torch.randn(1, 2, 9, 4)}, ValueError, "must be equal"),
        ({"k": torch.randn(2, 2, 9, 8), "v": torch.randn(2, 2, 9, 8)}, ValueError, "batch and head dimension"),
        ({"k": torch.randn(1, 3, 9, 8), "v": torch.randn(1, 3, 9, 8)}, ValueError, "4 query heads.*3 key/value heads"),
        ({"q": torch.randn(1, 4, 8, 6).transpose(2, 3)}, ValueError, r"stride 6.*q\.contiguous\(\)"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"precision": "bf16"}, ValueError, "'bf16' is unknown.*ieee, fp32, tf32"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, r"alibi_slopes has shape \[2\].*\[4\]"),
        ({"sinks": torch.ones(4, dtype=torch.int32)}, TypeError, "sinks is torch.int32"),
        ({"bias": torch.zeros(1, 4, 6, 8)}, ValueError, r"bias has shape \[1, 4, 6, 8\]"),
        ({"bias": torch.zeros(1, 4, 6, 9, dtype=torch.bool)}, TypeError, "boolean mask into 0 and −inf"),
        ({"kv_range": torch.zeros(1, 2)}, TypeError, r"kv_range.int\(\)"),
        ({"kv_range": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"kv_range has shape \[2, 2\]"),
        ({"impl": "nonsense"}, UnsupportedProblem, "unknown.*'nonsense'.*cpu"),
        ({"impl": "triton"}, UnsupportedProblem, "'triton' does not take this problem.*CUDA"),
        ({"precision": "tf32", "impl": "cpu"}, UnsupportedProblem, "tensor-core format"),
    ],
)  # fmt: skip
def test_refusals_name_the_value_and_the_remedy(change, error, words) -> None:
    arguments = dict(zip("qkv", qkv())) | change
    with pytest.raises(error, match=words):
        attention(**arguments)


def test_integer_tensors_are_refused() -> None:
    q = torch.ones(1, 1, 2, 8, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"torch\.int32; attention takes float32, float16"):
        attention(q, q, q)


def test_half_tensors_have_no_tf32_and_double_has_no_choice() -> None:
    with pytest.raises(ValueError, match="'tf32' applies to float32"):
        attention(*qkv(dtype=torch.float16), precision="tf32")
    with pytest.raises(ValueError, match="does not apply to float64"):
        attention(*qkv(dtype=torch.float64), precision="fp32")


# --- custom ops


def compiled_model(q, k, v, sinks):
    out = attention(2 * q, k, v, causal=True, window=5, sinks=sinks)
    state = attention(q, k, v, softcap=3.0, return_state=True)
    return out + 1, state.merge(state).finalize(), state.logsumexp()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    inputs = (*qkv(), torch.randn(4))
    expected = compiled_model(*inputs)
    actual = torch.compile(compiled_model, fullgraph=True, backend=backend)(*inputs)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_varlen_compiles_into_one_graph() -> None:
    q, k = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
    offsets = [torch.tensor(o, dtype=torch.int32) for o in ([0, 3, 7], [0, 3, 9])]

    def model(q, k):
        state = attention_varlen(q, k, k, *offsets, max_seqlen_q=4, max_seqlen_k=6, causal=True, return_state=True)
        return state.finalize(), attention_varlen(q, k, k, *offsets, max_seqlen_q=4, max_seqlen_k=6, causal=True)

    for a, b in zip(torch.compile(model, fullgraph=True, backend="aot_eager")(q, k), model(q, k)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["attention", "attention_state"])
@pytest.mark.parametrize("strided", [False, True])
def test_fakes_describe_the_real_results(op: str, strided: bool) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for x in qkv())
    arguments = (q, k, v, None, None, torch.randn(4), None, True, 0.3, 3, None, None, "fp32", None)
    torch.library.opcheck(getattr(torch.ops.elsa, op), arguments, test_utils=("test_schema", "test_faketensor"))


# --- choice of implementation


def test_on_a_cpu_the_cpu_form_runs_and_the_reference_never_unasked() -> None:
    assert registry.select(problem_of(*qkv())).name == "cpu"
    order = [entry.name for entry in elsa_kernels.implementations()]
    assert order.index("triton") < order.index("cpu") < order.index("reference")


def problem_of(q, k, v):
    from elsa_kernels import checks

    options = {"causal": False, "scale": None, "q_start": None, "window": None, "softcap": None, "precision": None}
    return checks.build_problem(registry.Operands(q, k, v), return_state=False, **options)


def test_explain_gives_a_reason_for_every_entry() -> None:
    reasons = elsa_kernels.explain(problem_of(*qkv()))
    assert reasons["cpu"] is None
    assert reasons["reference"] is None
    assert reasons["triton"] is not None
    assert "cpu" in reasons["triton"]


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> registry.Implementation:
    """An implementation at home on CPUs that refuses everything."""
    monkeypatch.setattr(registry, "_implementations", dict(registry._implementations))
    monkeypatch.setattr(registry, "_announced", set())
    entry = registry.Implementation("picky", 99, lambda problem: "it never does", lambda p, o: o.q, home=("cpu",))
    return registry.register(entry)


def test_a_fallback_is_announced_once(picky: registry.Implementation) -> None:
    with pytest.warns(elsa_kernels.FallbackWarning, match=r"picky refused \(it never does\); cpu runs instead"):
        attention(*qkv())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*qkv())


def test_an_explicit_choice_never_falls_back(picky: registry.Implementation) -> None:
    with pytest.raises(UnsupportedProblem, match="'picky' does not take this problem: it never does"):
        attention(*qkv(), impl="picky")


def test_an_implementation_that_returns_the_wrong_thing_is_caught(picky: registry.Implementation) -> None:
    registry._implementations["picky"] = dataclasses.replace(picky, supports=lambda problem: None)
    with pytest.raises(TypeError, match="'picky' returned Tensor, not a State"):
        attention(*qkv(), return_state=True)


def test_the_reference_answers_by_name_in_the_callers_dtype() -> None:
    q, k, v = qkv(dtype=torch.float16)
    out = attention(q, k, v, causal=True, impl="reference")
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, attention_reference(q, k, v, causal=True).half())


# --- varlen


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_varlen_is_each_sequence_alone(impl: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(12, 4, 8), torch.randn(17, 2, 8), torch.randn(17, 2, 8)
    q_offsets, k_offsets = [0, 5, 5, 6, 12], [0, 5, 7, 17, 17]
    options = {"causal": True, "sinks": torch.randn(4), "alibi_slopes": torch.rand(4), "window": 4, "impl": impl}
    offsets = [torch.tensor(o, dtype=torch.int32) for o in (q_offsets, k_offsets)]
    out = attention_varlen(q, k, v, *offsets, max_seqlen_q=6, max_seqlen_k=10, **options)
    state = attention_varlen(q, k, v, *offsets, max_seqlen_q=6, max_seqlen_k=10, return_state=True, **options)
    assert isinstance(state, State)
    for s in range(4):
        rows, keys = slice(*q_offsets[s : s + 2]), slice(*k_offsets[s : s + 2])
        alone = attention(*(x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys])), **options)
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(state.finalize()[:, rows], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 7], dtype=torch.int32)}, ValueError, "must rise from 0"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 4, 6], dtype=torch.int32)}, ValueError, "packed tokens, 7"),
        ({"cu_seqlens_q": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "2 entries.*4"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 3, 7])}, TypeError, "must be int32"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2.*4"),
        ({"q": torch.randn(1, 7, 4, 8)}, ValueError, r"\[tokens, heads, D\]"),
    ],
)
def test_varlen_refusals(change, error, words) -> None:
    offsets = torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    arguments = {
        "q": torch.randn(7, 4, 8), "k": torch.randn(7, 2, 8), "v": torch.randn(7, 2, 8), "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets, "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        attention_varlen(**(arguments | change))


# --- imports

SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # importing any of these raises ModuleNotFoundError
import torch
import elsa_kernels
q = torch.randn(1, 2, 5, 8)
assert elsa_kernels.attention(q, q, q, causal=True).shape == q.shape
print([name for name in {watched!r} if sys.modules.get(name) is not None])
"""


@pytest.mark.parametrize("triton_too", [False, True])
def test_imports_with_torch_and_triton_alone(triton_too: bool) -> None:
    others = ["transformers", "elsa_serve", "elsa_server", "fastapi", "vllm", "safetensors", "prometheus_client"]
    script = SCRIPT.format(blocked=others + ["triton"] * triton_too, watched=others)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
