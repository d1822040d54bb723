"""The native CPU kernel against the float64 reference on every instruction set that this machine has, and its promises:
bits that depend on a row alone, jobs that run without the GIL, one plain word where it cannot be built.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import elsa_kernels
import pytest
import torch
from elsa_kernels import State, UnsupportedProblem, attention, checks, registry
from elsa_kernels.cpu import native, tiled
from elsa_kernels.cpu.native import build, library
from elsa_kernels.reference import attention_reference

from tests.kernels.cases import CASES, Case, check, judge, judge_logsumexp

HAVE_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
pytestmark = pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REFUSED = ("bias", "bias_broadcast", "everything", "head_dim_5")


@pytest.fixture(params=list(library.LEVELS))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set in turn, as the one that `impl="cpu_native"` uses."""
    if request.param not in library.levels():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(library, "_default", library.Pool(threads=2, level=request.param))
    return request.param


def describe(q, k, v, **options) -> tuple[registry.Problem, registry.Operands]:
    names = ("alibi_slopes", "sinks", "kv_range")
    operands = registry.Operands(q, k, v, **{name: options.pop(name) for name in names if name in options})
    rest = dict.fromkeys(("scale", "q_start", "window", "softcap", "precision")) | {"causal": True} | options
    return checks.build_problem(operands, return_state=True, **rest), operands


def qkv(dtype=torch.float32, B=1, H=4, Hkv=2, Nq=1, Nk=1300, D=64):
    torch.manual_seed(0)
    return [torch.randn(B, h, n, D).to(dtype) for h, n in ((H, Nq), (Hkv, Nk), (Hkv, Nk))]


def same_bits(a: State, b: State) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("m", "S", "W"))


# --- against the reference


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in REFUSED], ids=lambda case: case.name)
def test_cases(case: Case, level: str) -> None:
    for dtype in [torch.float32] if case.fp32_only else DTYPES:
        check(case, "cpu_native", "cpu", dtype)


def _huge_logits(q, k, v):
    q.mul_(30), k.mul_(30)


def _rising(q, k, v):
    """Every key beats all before it, so each chunk rescales the last."""
    k[..., 0], q[..., 0] = torch.linspace(0, 40, k.shape[2]), 1.0


def _infinite_value_of_no_weight(q, k, v):
    q[..., 0], k[..., 0] = 1.0, 1.0
    k[:, :, 700, 0], v[:, :, 700, 2] = -3000.0, float("inf")


def _minus_infinite_key(q, k, v):
    q.abs_()
    k[:, :, 900] = float("-inf")
    v[:, :, 900] = float("nan")


LONG = [
    Case("long", B=2, H=4, Nq=1, Nk=5001, D=64, options={"causal": True}),
    Case("positive", B=1, Nq=2, Nk=9000, prepare=lambda q, k, v: [x.abs_() for x in (q, k, v)]),
    Case("huge_logits", B=1, Nq=2, Nk=2000, prepare=_huge_logits),
    Case("rising", B=1, Nq=3, Nk=3333, prepare=_rising, options={"causal": True}),
    Case("verify", B=1, H=8, Nq=17, Nk=1111, D=72, options={"causal": True}),
    Case("many_rows", B=1, H=8, Hkv=1, Nq=9, Nk=700, D=40, options={"causal": True}),
    Case("widest_head", B=1, Nq=3, Nk=1025, D=256, options={"causal": True}),
    Case("narrowest_head", B=1, Nq=3, Nk=1023, D=8, options={"causal": True}),
    Case("window_in_the_middle", B=1, Nq=2, Nk=4000, options={"window": 600, "q_start": 1700}),
    Case("ranges", Nq=2, Nk=3000, tensors=lambda case: {"kv_range": torch.tensor([[515, 2561], [0, 7]]).int()}),
    Case("infinite_value_of_no_weight", B=1, Nq=2, Nk=1500, prepare=_infinite_value_of_no_weight),
    Case("minus_infinite_key", B=1, Nq=2, Nk=1500, prepare=_minus_infinite_key),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_long_cases(case: Case, level: str) -> None:
    for dtype in DTYPES:
        (q, k, v), options = case.make("cpu", dtype)
        truth = attention_reference(q, k, v, return_state=True, **options)
        state = attention(q, k, v, impl="cpu_native", return_state=True, **options)
        # The state is FP32 whatever the operands, so FP32's tolerance holds for all of them.
        judge(state.finalize(), truth.finalize(), torch.float32)
        judge_logsumexp(state.logsumexp(), truth.logsumexp(), torch.float32)


@pytest.mark.parametrize("positive", [False, True])
def test_error_is_no_larger_than_the_tiled_forms(positive: bool, level: str) -> None:
    q, k, v = qkv(H=8, Hkv=8, Nk=16384)
    if positive:
        q, k, v = (x.abs() for x in (q, k, v))
    truth = attention_reference(q, k, v)
    problem, operands = describe(q, k, v)
    errors = [
        (state.finalize().double() - truth).norm() / truth.norm()
        for state in (attention(q, k, v, impl="cpu_native", return_state=True), tiled.attend(problem, operands))
    ]
    assert errors[0] <= max(1.1 * errors[1], 2e-7), errors


def test_strided_operands_are_read_where_they_lie(level: str) -> None:
    """Tokens of all heads side by side, as a model's projections leave them, and a slice of a longer cache."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(torch.bfloat16, B=2, Nq=3))
    cut = slice(100, 1200)
    out = attention(q, k[:, :, cut], v[:, :, cut], causal=True, impl="cpu_native")
    dense = attention(*(x.contiguous() for x in (q, k[:, :, cut], v[:, :, cut])), causal=True, impl="cpu_native")
    assert torch.equal(out, dense)


# --- bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_batch_or_neighbouring_rows(dtype: torch.dtype, level: str) -> None:
    q, k, v = qkv(dtype, B=3, H=6, Hkv=2, Nq=13, Nk=2100, D=72)
    options = {"sinks": torch.randn(6), "window": 1400, "softcap": 20.0}
    states = [library.Pool(n, level).attend(*describe(q, k, v, **options)) for n in (1, 2, 3, 7)]
    assert all(same_bits(states[0], other) for other in states[1:])
    pool = library.Pool(2, level)
    for b in range(3):
        one = slice(b, b + 1)
        alone = pool.attend(*describe(q[one], k[one], v[one], **options))
        assert same_bits(alone, State(*(getattr(states[0], name)[one] for name in ("m", "S", "W"))))
    for i in (0, 5, 12):  # decoding row by row gives the bits of verifying 13 rows at once
        visible = 2100 - 13 + i + 1
        row = pool.attend(*describe(q[:, :, i : i + 1], k[:, :, :visible], v[:, :, :visible], **options))
        assert same_bits(row, State(*(getattr(states[0], name)[:, :, i : i + 1] for name in ("m", "S", "W"))))


def test_the_tree_over_chunks_is_the_tree_of_tree_merge(level: str) -> None:
    q, k, v = qkv(Nk=7 * 512 - 100)
    pool = library._default
    assert pool is not None
    parts = [pool.attend(*describe(q, k[:, :, j : j + 512], v[:, :, j : j + 512])) for j in range(0, k.shape[2], 512)]
    whole, merged = pool.attend(*describe(q, k, v)), elsa_kernels.tree_merge(parts)
    assert torch.equal(whole.m, merged.m)
    torch.testing.assert_close(whole.S, merged.S, rtol=2e-7, atol=0)
    torch.testing.assert_close(whole.W, merged.W, rtol=0, atol=1e-5)


# --- threads and jobs


def test_callers_share_a_pool() -> None:
    pool = library.Pool(2)
    problems = [describe(*qkv(dtype, Nq=n)) for n in (1, 3) for dtype in DTYPES]
    expected = [pool.attend(*problem) for problem in problems]
    failures: list[int] = []

    def caller(seed: int) -> None:
        for turn in range(30):
            which = (seed + turn) % len(problems)
            if not same_bits(pool.attend(*problems[which]), expected[which]):
                failures.append(which)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_tickets_may_be_waited_for_in_any_order_and_a_job_runs_again() -> None:
    pool = library.Pool(2)
    problems = [describe(*qkv(Nk=n)) for n in (600, 9000, 1, 1200)]
    tickets = [pool.submit(*problem) for problem in problems]
    for i in (3, 0, 2, 1):
        operands = problems[i][1]
        truth = attention_reference(operands.q, operands.k, operands.v, causal=True)
        judge(tickets[i].wait().finalize(), truth, torch.float32)
        assert tickets[i].done()
    job = tickets[1]
    before = job.wait().W.clone()
    job.problem.Nk, job.problem.q_start = 600, 599  # an engine's next call, over other keys
    shorter = job.submit().wait().W.clone()
    assert not torch.equal(before, shorter)
    q, k, v = (problems[1][1].q, problems[1][1].k[:, :, :600], problems[1][1].v[:, :, :600])
    assert torch.equal(shorter, pool.attend(*describe(q, k, v)).W)


def test_a_job_starts_and_ends_through_plain_c_functions() -> None:
    """As a stream's host functions would have it."""
    pool = library.Pool(2)
    problem, operands = describe(*qkv())
    job = pool.prepare(problem, operands)
    job.state.W.fill_(float("nan"))
    start, join, argument = job.host_functions()
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    for _ in range(3):
        signature(start)(argument)
        signature(join)(argument)
        assert job.launch.status == 0
        assert job.done()
    assert same_bits(job.state, pool.attend(problem, operands))
    job.state.W.fill_(float("nan"))
    began = time.perf_counter()
    assert 0 < job.run() < time.perf_counter() - began
    assert same_bits(job.state, pool.attend(problem, operands))


def test_a_job_under_way_is_not_started_twice_and_survives_its_owner() -> None:
    pool = library.Pool(1)
    q, k, v = qkv(torch.bfloat16, H=32, Hkv=8, Nq=4, Nk=8192, D=128)
    job = pool.submit(*describe(q, k, v))
    for again in (job.submit, job.run):
        with pytest.raises(RuntimeError, match="under way"):
            again()
    job.wait()
    for _ in range(3):
        pool.submit(*describe(q, k, v))  # dropped at once: its tensors must outlive the work
    assert pool.attend(*describe(q, k, v)).W.isfinite().all()


def test_a_job_may_end_after_its_pool() -> None:
    """As the collector of cycles has it, which the interpreter's end is: it hung there, with the pool's lock gone."""
    script = (
        "from tests.kernels.test_cpu_native import describe, library, qkv\n"
        "pool = library.Pool(2); job = pool.submit(*describe(*qkv(Nk=50000))); pool.__del__()\n"
        "assert job.state.W.isfinite().all(); del job; print('over')"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=100, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_the_gil_is_free_while_native_threads_work() -> None:
    pool = library.Pool(1)
    q, k, v = qkv(torch.bfloat16, H=64, Hkv=8, Nq=4, Nk=8192, D=128)
    steps = 0
    waiter = threading.Thread(target=pool.submit(*describe(q, k, v)).wait)
    waiter.start()
    while waiter.is_alive():
        steps += 1
    assert steps > 10


def test_pools_say_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        library.Pool(0)
    with pytest.raises(ValueError, match="level 'neon' does not run here; choose one of portable"):
        library.Pool(1, "neon")
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        library.Pool(1).read_seconds(torch.empty(0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    script = (
        "import os, torch\n"
        "from elsa_kernels import attention\n"
        "q = torch.randn(1, 2, 1, 16); k = torch.randn(1, 2, 900, 16)\n"
        "call = lambda: attention(q, k, k, impl='cpu_native')\n"
        "before = call()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(call(), before) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert torch.equal(call(), before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- choice


def test_it_is_chosen_for_few_queries_over_a_long_kv_alone() -> None:
    def chosen(**shape) -> str:
        return registry.select(describe(*qkv(**shape))[0]).name

    assert chosen() == "cpu_native"
    assert chosen(H=32, Hkv=8, Nq=8) == "cpu_native"
    assert chosen(H=32, Hkv=8, Nq=9) == "cpu"
    assert chosen(Nk=511) == "cpu"
    assert chosen(dtype=torch.float64) == "cpu"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"D": 12}, "multiples of 8 up to 256, not 12"),
        ({"D": 264}, "not 264"),
        ({"has_bias": True}, "no additive bias"),
        ({"precision": "tf32"}, "tensor-core"),
        ({"device": torch.device("meta")}, "not on meta"),
    ],
)
def test_refusals_by_name_say_why(change, words) -> None:
    problem = dataclasses.replace(describe(*qkv())[0], **change)
    with pytest.raises(UnsupportedProblem, match=words):
        registry.select(problem, "cpu_native")


# --- the build


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a fresh process with an empty cache."""
    monkeypatch.setenv("ELSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(registry, "_announced", set())
    library.library.cache_clear()
    native.unavailable.cache_clear()
    yield tmp_path
    library.library.cache_clear()
    native.unavailable.cache_clear()


def test_without_a_compiler_the_tiled_form_runs_and_says_so(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(unbuilt))
    q, k, v = qkv()
    with pytest.warns(
        elsa_kernels.FallbackWarning, match=r"no C\+\+ compiler was found; install g\+\+.*cpu runs instead"
    ):
        out = attention(q, k, v, causal=True)
    judge(out, attention_reference(q, k, v, causal=True), torch.float32)
    with pytest.raises(UnsupportedProblem, match=r"cpu_native.*no C\+\+ compiler was found"):
        attention(q, k, v, impl="cpu_native")


def test_a_compiler_that_is_not_there_or_fails_is_named(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(build.BuildFailed, match=r"\$CXX names 'no-such-compiler'"):
        build.compiler()
    fails = unbuilt / "fails"
    fails.write_text('#!/bin/sh\ntest "$1" = --version && exit 0\necho "x.cpp:1: error: too old" >&2\nexit 3\n')
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(build.BuildFailed, match=r"status 3 \(x.cpp:1: error: too old\)") as caught:
        build.cached_library()
    assert "\n" not in str(caught.value)
    assert list((unbuilt / "cpu").iterdir()) == []


def test_it_is_built_once_and_kept(unbuilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build.cached_library()
    assert first.parent == unbuilt / "cpu"
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert "building the native CPU attention" in caplog.text
    caplog.clear()
    assert build.cached_library() == first
    assert caplog.text == ""
    assert library.library().elsa_level_works(0)
