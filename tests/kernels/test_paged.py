"""Paged attention on a CPU, its public function and the cache write."""

from __future__ import annotations

from typing import Any

import elsa_kernels
import pytest
import torch
from elsa_kernels import State, UnsupportedProblem, attention_paged, paged, reshape_and_cache

from tests.kernels.cases import TOLERANCE
from tests.kernels.paged_cases import BATCHES, FP8, LAYOUTS, MIXED, Batch, caches, check, make

BY_NAME = {batch.name: batch for batch in BATCHES}


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name)
def test_fp32(batch: Batch) -> None:
    check(batch, None, "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mixed", "everything", "fp8", "splits", "padded"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    if BY_NAME[name].fp8 and dtype == torch.float64:
        pytest.skip("a float64 cache has no FP8 form")
    check(BY_NAME[name], None, "cpu", dtype)


def test_the_reference_answers_by_name() -> None:
    check(BY_NAME["mixed"], "reference", "cpu", torch.float32)


def test_lengths_from_the_host_change_nothing() -> None:
    made = make(BY_NAME["mixed"], "cpu", torch.float32)
    assert torch.equal(attention_paged(**made.arguments, seqlens=MIXED), attention_paged(**made.arguments))


@pytest.mark.parametrize(
    ("lengths", "kinds"),
    [
        (None, [1, 16, 64, "prefill"]),
        (((1, 40), (0, 0), (1, 9)), [1]),
        (((20, 20), (1, 9)), [1, 64]),
        (((200, 200), (3, 9)), [16]),  # the long one takes the dense form
        (((100, 200),), ["prefill"]),
        (((200, 200),), []),
    ],
)
def test_known_lengths_launch_the_kernels_that_they_need(lengths, kinds, monkeypatch) -> None:
    from elsa_kernels.paged import launch

    launched: list[Any] = []
    monkeypatch.setattr(launch, "_shared_arguments", lambda *_: {})
    monkeypatch.setattr(launch.gather, "attend_sequence", lambda *_: None)
    monkeypatch.setattr(launch, "_launch_decode", lambda p, o, cut, *_: launched.append(cut.rows_max))
    monkeypatch.setattr(launch, "_launch_prefill", lambda *_: launched.append("prefill"))
    problem = paged.PagedProblem(
        T=300, B=1, H=4, Hkv=4, D=64, page=16, dtype=torch.float32, kv_dtype=torch.float32,
        device=torch.device("cpu"), precision="fp32", causal=True, scale=0.1, window=None, softcap=None,
        max_seqlen_q=300, max_seqlen_k=300, lengths=lengths,
    )  # fmt: skip
    launch.run(problem, None)  # type: ignore[arg-type]
    assert launched == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype) -> None:
    made = make(BY_NAME["mixed"], "cpu", dtype)
    together = attention_paged(**made.arguments)
    for s in range(len(MIXED)):
        alone = attention_paged(**alone_arguments(made, s))
        assert torch.equal(alone, together[made.rows(s)])


def alone_arguments(made: Any, s: int) -> dict[str, Any]:
    queries, keys = made.lengths[s]
    device = made.arguments["q"].device
    return made.arguments | {
        "q": made.arguments["q"][made.rows(s)], "max_seqlen_q": queries, "max_seqlen_k": keys,
        "cu_seqlens_q": torch.tensor([0, queries], dtype=torch.int32, device=device),
        "seqused_k": made.arguments["seqused_k"][s : s + 1], "block_table": made.arguments["block_table"][s : s + 1],
    }  # fmt: skip


def test_calls_over_disjoint_keys_merge_by_their_lse() -> None:
    """As decode context parallel does: each rank has some pages of every sequence, and all see all of them."""
    made = make(Batch("merge", ((3, 96), (1, 64)), H=4), "cpu", torch.float32)
    whole = attention_paged(**made.arguments, causal=False)
    parts = []
    for first in (0, 1):
        table = made.arguments["block_table"][:, first:6:2].contiguous()
        used = torch.tensor([48, 32], dtype=torch.int32)
        arguments = made.arguments | {"block_table": table, "seqused_k": used}
        parts.append(attention_paged(**arguments, causal=False, return_lse=True))
    merged = State.from_output(*parts[0]).merge(State.from_output(*parts[1])).finalize()
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)


def test_writes_into_a_given_tensor() -> None:
    made = make(BY_NAME["mixed"], "cpu", torch.float32)
    room = torch.zeros(made.arguments["q"].shape[0], 2, 4, 32)
    out = attention_paged(**made.arguments, out=room[:, 1])
    assert out.data_ptr() == room[:, 1].data_ptr()
    assert torch.equal(out, attention_paged(**made.arguments))
    assert bool((room[:, 0] == 0).all())


# --- the custom ops


def test_compiles_into_one_graph() -> None:
    made = make(BY_NAME["mixed"], "cpu", torch.float32)
    tensors = {name: x for name, x in made.arguments.items() if isinstance(x, torch.Tensor)}
    bounds = {"max_seqlen_q": made.arguments["max_seqlen_q"], "max_seqlen_k": made.arguments["max_seqlen_k"]}
    k, v = (torch.randn(3, 2, 32) for _ in range(2))
    slots = torch.tensor([1, -1, 40])

    def model(k_cache, v_cache, **rest):
        reshape_and_cache(k, v, k_cache, v_cache, slots)
        out, lse = attention_paged(k_cache=k_cache, v_cache=v_cache, return_lse=True, **rest, **bounds)
        return out + 1, lse

    expected_caches, compiled_caches = ({n: tensors.pop(n).clone() for n in ("k_cache", "v_cache")} for tensors in (
        dict(tensors), dict(tensors)
    ))  # fmt: skip
    rest = {name: x for name, x in tensors.items() if not name.endswith("cache")}
    expected = model(**expected_caches, **rest)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**compiled_caches, **rest)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(compiled_caches, expected_caches, rtol=0, atol=0, equal_nan=True)


def test_fakes_and_schemas() -> None:
    made = make(BY_NAME["decode"], "cpu", torch.float32).arguments
    tensors = [made[n] for n in ("q", "k_cache", "v_cache", "cu_seqlens_q", "seqused_k", "block_table")]
    out, lse = torch.zeros_like(made["q"]), torch.zeros(made["q"].shape[:2])
    arguments = (*tensors, out, lse, *[None] * 5, 1, 77, None, True, 0.3, None, None, "fp32", None)
    torch.library.opcheck(torch.ops.elsa.attention_paged, arguments, test_utils=("test_schema", "test_faketensor"))
    k = torch.randn(2, 2, 32)
    arguments = (k, k.clone(), made["k_cache"].nan_to_num(), made["v_cache"].nan_to_num(), torch.tensor([3, -1]))
    torch.library.opcheck(
        torch.ops.elsa.reshape_and_cache, (*arguments, None, None), test_utils=("test_schema", "test_faketensor")
    )


# --- the cache write


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.25, "per head"])
def test_cache_write(layout: str, scale: float | str | None) -> None:
    check_cache_write("cpu", layout, scale)


def check_cache_write(device: str, layout: str, scale: float | str | None) -> None:
    torch.manual_seed(0)
    fp8 = scale is not None
    batch = Batch("write", (), page=8, Hkv=3, D=20, layout=layout)
    k, v = (torch.randn(7, 3, 2, 20, device=device)[:, :, 0] * (300.0 if fp8 else 1.0) for _ in range(2))
    k[0, 0, :4] = torch.tensor([0.0, -0.0, 0.001, -0.013])
    k_cache, v_cache = caches(batch, 4, FP8 if fp8 else torch.float32, device)
    slots = torch.tensor([5, 31, -1, 0, 8, -3], device=device)  # the seventh row is padding
    before = [c.float().clone() for c in (k_cache, v_cache)]
    scales = torch.tensor([0.5, 1.0, 2.0], device=device) if scale == "per head" else scale
    if fp8:
        reshape_and_cache(k, v, k_cache, v_cache, slots, scales, scales)
    else:
        reshape_and_cache(k, v, k_cache, v_cache, slots)
    for rows, cache, old in zip((k, v), (k_cache, v_cache), before):
        if isinstance(scales, torch.Tensor):
            rows = rows / scales.view(1, 3, 1)
        elif scales is not None:
            rows = rows / scales
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                old[slot // 8, slot % 8] = rows[row].clamp(-448, 448).to(cache.dtype).float() if fp8 else rows[row]
        torch.testing.assert_close(cache.float(), old, rtol=0, atol=0, equal_nan=True)


def test_what_is_written_is_what_is_read() -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(21, 2, 16), torch.randn(21, 2, 16), torch.randn(21, 4, 16)
    k_cache, v_cache = torch.full((4, 8, 2, 16), float("nan")), torch.full((4, 8, 2, 16), float("nan"))
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    positions = torch.arange(21)
    reshape_and_cache(k, v, k_cache, v_cache, table[0, positions // 8].long() * 8 + positions % 8)
    out = attention_paged(
        q, k_cache, v_cache, torch.tensor([0, 21], dtype=torch.int32), torch.tensor([21], dtype=torch.int32), table,
        max_seqlen_q=21, max_seqlen_k=21,
    )  # fmt: skip
    dense = elsa_kernels.attention(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), causal=True)
    torch.testing.assert_close(out, dense[0].transpose(0, 1), rtol=0, atol=TOLERANCE[torch.float32])


# --- refusals


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.randn(1, 4, 2, 32)}, ValueError, r"\[tokens, heads, D\]"),
        ({"k_cache": torch.randn(9, 16, 2, 16)}, ValueError, "must have one shape"),
        ({"q": torch.randn(4, 3, 32)}, ValueError, "not a multiple of 2"),
        ({"q": torch.randn(4, 2, 32).half()}, TypeError, "caches must be of q's dtype or of torch.float8_e4m3fn"),
        ({"seqused_k": torch.tensor([40, 1, 77, 16])}, TypeError, "seqused_k is torch.int64.*int32"),
        ({"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)}, TypeError, r"cu_seqlens_q .* int32 \[5\]"),
        ({"max_seqlen_k": 30}, ValueError, "77 keys; max_seqlen_k is 30"),
        ({"max_seqlen_q": -1}, ValueError, "give at least 0"),
        ({"seqlens": [(1, 2)]}, ValueError, "1 pairs.*each of 4 sequences"),
        ({"k_scale": 0.5}, ValueError, "k_scale applies to torch.float8_e4m3fn caches"),
        ({"out": torch.zeros(4, 2, 31)}, ValueError, "out is"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"impl": "nonsense"}, UnsupportedProblem, "unknown.*'nonsense'.*gather"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \[3\]"),
    ],
)  # fmt: skip
def test_refusals_name_the_value_and_the_remedy(change, error, words) -> None:
    arguments = make(BY_NAME["decode"], "cpu", torch.float32).arguments | change
    with pytest.raises(error, match=words):
        attention_paged(**arguments)


def test_choice_is_data() -> None:
    assert [entry.name for entry in paged.implementations()][-1] == "reference"
    with pytest.raises(ValueError, match="registered twice"):
        paged.register(paged.implementations()[0])
