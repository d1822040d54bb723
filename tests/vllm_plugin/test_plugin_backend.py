"""The backend's classes in vLLM, without an engine: registration, refusals, one layer over pages against float64."""

import importlib.util
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from elsa_kernels import attention, attention_paged
from vllm_support import DEMO_MODEL, ThreadGroup, needs_vllm

from elsa_serve.vllm_plugin import BACKEND, NAME, PLATFORM, compat, cpu_platform, register
from elsa_serve.vllm_plugin.context_parallel import Share, local_lengths
from elsa_serve.vllm_plugin.step import describe

pytestmark = needs_vllm

CONFIGURATION = {
    "head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
    "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
    "device_capability": None, "attn_type": "decoder",
}  # fmt: skip


@pytest.fixture(scope="module")
def backend():
    from elsa_serve.vllm_plugin.backend import ElsaBackend

    return ElsaBackend


def test_registration_is_idempotent_and_the_name_is_known():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    first = AttentionBackendEnum[NAME]
    register()
    assert AttentionBackendEnum[NAME] is first
    assert first.get_path() == BACKEND == compat.registered_backend()


def test_a_spawned_worker_can_unpickle_the_name_before_it_loads_plugins():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    data = pickle.dumps({"backend": AttentionBackendEnum[NAME]})
    script = f"import pickle; print(pickle.loads(bytes.fromhex({data.hex()!r}))['backend'].name)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-1] == NAME


def test_an_unsupported_vllm_is_refused_when_the_backend_is_chosen(monkeypatch, caplog):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    register()  # who has the package installed, but does not choose it, is not disturbed
    spec = importlib.util.find_spec(BACKEND.rpartition(".")[0])
    with pytest.raises(ImportError, match=r"supports vLLM 0\.32 and 0\.33, and this is vLLM 0\.99"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "kv_cache_dtype": "fp8"}, None),
        ({"has_sliding_window": True, "use_batch_invariant": True, "use_dcp": True, "has_sink": True}, None),
        ({"attn_type": "encoder_only"}, None),
        ({"head_size": 72}, "head size 72: ELSA takes 32, 64"),
        ({"dtype": torch.float64}, "dtype torch.float64: ELSA takes float32"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache in fp8_e5m2"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype auto or fp8"),
        ({"kv_cache_dtype": "bfloat16"}, "KV cache in bfloat16 under a model in torch.float32"),
        ({"block_size": 8}, "block size 8: ELSA takes multiples of 16"),
        ({"use_mla": True}, "ELSA has no MLA form"),
        ({"use_sparse": True}, "ELSA is exact and dense"),
        ({"use_mm_prefix": True}, "prefix-LM attention"),
        ({"use_per_head_quant_scales": True}, "KV cache scales per head"),
        ({"use_rswa": True}, "reference sliding-window"),
        ({"use_pcp": True}, "--prefill-context-parallel-size 1"),
        ({"attn_type": "encoder_decoder"}, "cross-attention"),
        ({"device_capability": SimpleNamespace(major=7, minor=0)}, "need 7.5 or newer"),
    ],
)
def test_every_refusal_names_the_value_and_a_remedy(backend, change, words):
    reasons = backend.validate_configuration(**(CONFIGURATION | change))
    if words is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert words in reasons[0]


def test_the_cpu_platform_honours_elsa_and_leaves_the_rest_alone():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    register()
    found = type(current_platform)
    assert f"{found.__module__}.{found.__qualname__}" == PLATFORM
    config = AttentionSelectorConfig(64, torch.float32, "auto", 16)
    assert current_platform.get_attn_backend_cls(AttentionBackendEnum[NAME], config) == BACKEND
    for other in (None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN):
        assert current_platform.get_attn_backend_cls(other, config).endswith("CPUAttentionBackend")
    with pytest.raises(ValueError, match=r"ELSA is not valid .*KV cache in fp8_e5m2"):
        current_platform.get_attn_backend_cls(AttentionBackendEnum[NAME], config._replace(kv_cache_dtype="fp8_e5m2"))


def test_the_cpu_platform_steps_back(monkeypatch):
    from vllm import platforms

    assert cpu_platform() == PLATFORM
    other = SimpleNamespace(value="other:plugin", load=lambda: lambda: "other.Platform")
    with monkeypatch.context() as patch:
        patch.setattr(compat.importlib.metadata, "entry_points", lambda group: [other])
        assert cpu_platform() is None  # vLLM refuses two
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert cpu_platform() is None
    monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: None)  # a build for CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a CUDA build must not be probed"))
    assert cpu_platform() is None


def test_a_command_line_that_asks_for_elsa_does_not_run_something_else(monkeypatch):
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(vllm.platforms, "current_platform", CpuPlatform())
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m"])
    compat.check_cpu_platform()
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "m", "--attention-backend", "elsa"])
    with pytest.raises(RuntimeError, match="CpuPlatform, which ignores it"):
        compat.check_cpu_platform()


# One layer over pages. Lengths are (keys before the batch, queries), as in vLLM's own tests of its backends.
BATCHES = {
    "decode": ((31, 1), (39, 1), (127, 1), (0, 1)),
    "prefill": ((0, 24), (0, 5)),
    "chunked": ((40, 8), (100, 17)),
    "mixed": ((31, 1), (50, 8), (0, 70), (99, 1)),
    "verification": ((60, 4), (17, 4)),
    "padded": ((31, 1), (9, 1), (-1, 0)),
}
ORDERS = {"block, head, token": (0, 1, 2, 3), "block, token, head": (0, 2, 1, 3), "head, block, token": (1, 0, 2, 3)}


class Layer:
    """Keys and values of some requests, in vLLM's cache and beside it."""

    def __init__(
        self, batch, H=4, Hkv=2, D=32, page=16, order=(0, 1, 2, 3), dtype=torch.float32, kv_dtype=None, ranks=1
    ):
        torch.manual_seed(1)
        self.batch, self.page, self.ranks = batch, page, ranks
        lengths = [max(before + new, 0) for before, new in batch]
        self.k, self.v = ([torch.randn(n, Hkv, D, dtype=dtype) for n in lengths] for _ in range(2))
        self.q = torch.randn(sum(new for _, new in batch), H, D, dtype=dtype)
        pages = [-(-n // page) for n in lengths]
        total = sum(pages) + 3
        self.table = torch.zeros(len(batch), max(*pages, 1) + 1, dtype=torch.int32)
        order_of_pages = torch.randperm(total).int()
        used = 0
        for row, count in enumerate(pages):
            self.table[row, :count] = order_of_pages[used : used + count]
            used += count
        shape = (total, Hkv, page, 2 * D)
        memory = torch.full([shape[i] for i in order], torch.nan, dtype=dtype if kv_dtype is None else torch.float32)
        back = [order.index(i) for i in range(4)]
        self.cache = (memory if kv_dtype is None else memory.to(kv_dtype).view(torch.uint8)).permute(back)
        self.starts = torch.tensor([0, *[new for _, new in batch]]).cumsum(0).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.scales = SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(0.25))

    def slots(self, row, positions, rank=0):
        """Where a rank keeps tokens of a row; −1 for those of other ranks."""
        local = positions // self.ranks
        slot = self.table[row].long()[local // self.page] * self.page + local % self.page
        return torch.where(positions % self.ranks == rank, slot, -1)

    def write(self, impl, cache, rank=0):
        """All keys and values of all rows, as earlier steps and this one's own call would have written them."""
        for row, (k, v) in enumerate(zip(self.k, self.v)):
            if len(k):
                impl.do_kv_cache_update(self.scales, k, v, cache, self.slots(row, torch.arange(len(k)), rank))

    def new(self, tensors):
        return torch.cat([x[len(x) - new :] for x, (_, new) in zip(tensors, self.batch)])

    def metadata(self, causal=True, share=None):
        from elsa_serve.vllm_plugin.backend import ElsaMetadata

        step = describe(self.starts, self.lengths, None, decode_tokens_per_row=4)
        longest = max(new for _, new in self.batch)
        tokens = self.q.shape[0]
        return ElsaMetadata(
            num_tokens=tokens, real_tokens=tokens, max_query_len=longest, max_seq_len=int(self.lengths.max()),
            query_start_loc=self.starts, seq_lens=self.lengths, block_table=self.table, causal=causal, step=step,
            seqlens=tuple(zip(step.query_lens, step.kv_lens)), fresh=False, share=share, counters=None,
        )  # fmt: skip

    def expected(self, **options):
        outs = []
        for q, k, v in zip(self.q.split([new for _, new in self.batch]), self.k, self.v):
            if len(q):
                heads = [x.double().transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
                outs.append(attention(*heads, impl="reference", **({"causal": True} | options))[0].transpose(0, 1))
        return torch.cat(outs)


def make_impl(H=4, D=32, Hkv=2, **options):
    from elsa_serve.vllm_plugin.impl import ElsaImpl

    return ElsaImpl(H, D, D**-0.5, Hkv, **options)


def run(layer, impl, metadata=None):
    layer.write(impl, layer.cache)
    out = torch.full_like(layer.q, torch.nan)
    new = (layer.new(layer.k), layer.new(layer.v))
    return impl.forward(layer.scales, layer.q, *new, layer.cache, metadata or layer.metadata(), out)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_layer_over_pages_in_any_order_of_memory(batch, order):
    layer = Layer(BATCHES[batch], order=ORDERS[order])
    torch.testing.assert_close(run(layer, make_impl()).double(), layer.expected(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize(("H", "Hkv", "D"), [(4, 4, 64), (8, 1, 32), (6, 2, 80)])
def test_page_sizes_and_heads(page, H, Hkv, D):
    layer = Layer(BATCHES["mixed"], H=H, Hkv=Hkv, D=D, page=page)
    torch.testing.assert_close(run(layer, make_impl(H, D, Hkv)).double(), layer.expected(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"sliding_window": 13}, {"window": 13}),
        ({"logits_soft_cap": 2.0}, {"softcap": 2.0}),
        ({"logits_soft_cap": 0.0}, {}),
        ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
        ({"sinks": torch.tensor([1.0, -2.0, 0.5, 3.0])}, {"sinks": torch.tensor([1.0, -2.0, 0.5, 3.0])}),
    ],
)
def test_what_models_ask_of_a_layer(options, reference):
    layer = Layer(BATCHES["mixed"])
    torch.testing.assert_close(
        run(layer, make_impl(**options)).double(), layer.expected(**reference), rtol=0, atol=2e-6
    )


def test_whole_prompts_give_the_bits_that_their_pages_give():
    layer = Layer(((0, 130), (0, 200)), H=4, Hkv=2)
    gathered = run(layer, make_impl(), layer.metadata())
    metadata = layer.metadata()
    metadata.fresh = True
    direct = run(layer, make_impl(), metadata)
    assert torch.equal(direct, gathered)
    torch.testing.assert_close(direct.double(), layer.expected(), rtol=0, atol=2e-6)


def test_without_causality():
    layer = Layer(BATCHES["chunked"])
    found = run(layer, make_impl(), layer.metadata(causal=False))
    torch.testing.assert_close(found.double(), layer.expected(causal=False), rtol=0, atol=2e-6)


def test_encoders_attend_within_their_sequences_without_a_cache():
    layer = Layer(BATCHES["prefill"])
    impl = make_impl(attn_type="encoder_only")
    impl.do_kv_cache_update(layer.scales, layer.new(layer.k), layer.new(layer.v), layer.cache, torch.zeros(1).long())
    assert layer.cache.isnan().all()
    found = run(layer, impl, layer.metadata(causal=False))
    torch.testing.assert_close(found.double(), layer.expected(causal=False), rtol=0, atol=2e-6)


def test_an_fp8_cache_is_written_and_read_with_its_scales():
    layer = Layer(BATCHES["mixed"], kv_dtype=torch.float8_e4m3fn)
    found = run(layer, make_impl(kv_cache_dtype="fp8"))
    for tensors, scale in ((layer.k, 0.5), (layer.v, 0.25)):
        for x in tensors:
            x.copy_((x / scale).to(torch.float8_e4m3fn).float() * scale)
    torch.testing.assert_close(found.double(), layer.expected(), rtol=0, atol=2e-6)


def test_the_profiling_run_and_fused_quantisation():
    layer, impl = Layer(BATCHES["decode"]), make_impl()
    out = torch.full_like(layer.q, torch.nan)
    assert not impl.forward(layer.scales, layer.q, layer.q, layer.q, layer.cache, None, out).any()
    with pytest.raises(NotImplementedError, match="fuse_attn_quant"):
        impl.forward(layer.scales, layer.q, layer.q, layer.q, layer.cache, None, out, output_scale=torch.ones(1))


@pytest.mark.parametrize("known", [False, True], ids=["bounds", "lengths"])
@pytest.mark.parametrize("batch", ["decode", "prefill", "chunked", "mixed"])
def test_two_ranks_that_share_the_keys_give_each_its_heads(batch, known):
    """Decode context parallelism: even tokens on one rank, odd ones on the other, two heads on each."""
    ranks = 2
    layer = Layer(BATCHES[batch], H=4, Hkv=1, ranks=ranks)
    group = ThreadGroup(ranks)
    impls = [make_impl(H=2, Hkv=1) for _ in range(ranks)]

    def rank_part(rank):
        impl = impls[rank]
        impl.dcp_world_size, impl._needs_offsets = ranks, True
        cache = layer.cache.clone()
        layer.write(impl, cache, rank)
        before = torch.tensor([max(n, 0) for n, _ in layer.batch], dtype=torch.int32)
        own = local_lengths(before, ranks, rank, 1)
        queries = (layer.starts[1:] - layer.starts[:-1]).tolist()
        share = Share(
            group, local_lengths(layer.lengths, ranks, rank, 1), own, int(layer.lengths.max()),
            tuple(zip(queries, own.tolist())) if known and max(queries) > 1 else None,
        )  # fmt: skip
        q = layer.q.chunk(ranks, dim=1)[rank].contiguous()
        out = torch.full_like(q, torch.nan)
        impl.forward(layer.scales, q, layer.new(layer.k), layer.new(layer.v), cache, layer.metadata(share=share), out)
        return out

    parts = group.run(rank_part)
    torch.testing.assert_close(torch.cat(parts, 1).double(), layer.expected(), rtol=0, atol=4e-6)


def test_what_context_parallelism_does_not_take():
    from elsa_serve.vllm_plugin.impl import ElsaImpl

    class Parallel(ElsaImpl):
        def __new__(cls, *args, **kwargs):
            impl = super().__new__(cls, *args, **kwargs)
            impl.dcp_world_size = 2
            return impl

    for options in ({"sliding_window": 8}, {"alibi_slopes": [0.5, 0.5]}, {"sinks": torch.zeros(2)}):
        with pytest.raises(NotImplementedError, match="--decode-context-parallel-size 1"):
            Parallel(2, 32, 1.0, 1, **options)
    with pytest.raises(NotImplementedError, match=r"2 key heads on a rank.*--tensor-parallel-size"):
        Parallel(2, 32, 1.0, 2)


def builder_for(impl, **changes):
    from elsa_serve.vllm_plugin.backend import ElsaMetadataBuilder

    layers = {"l": SimpleNamespace(impl=impl)}
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, cp_kv_cache_interleave_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(static_forward_context=layers, max_cudagraph_capture_size=0),
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32),
    )  # fmt: skip
    vars(config).update(changes)
    spec = SimpleNamespace(dtype=torch.float32, block_size=16)
    return ElsaMetadataBuilder(spec, ["l"], config, torch.device("cpu"))


def common(batch, **changes):
    layer = Layer(batch)
    values = {
        "query_start_loc": layer.starts, "query_start_loc_cpu": layer.starts, "seq_lens": layer.lengths,
        "seq_lens_cpu_upper_bound": layer.lengths, "is_prefilling": None, "num_actual_tokens": len(layer.q),
        "max_query_len": max(n for _, n in batch), "max_seq_len": int(layer.lengths.max()),
        "block_table_tensor": layer.table, "causal": True, "num_reqs": len(batch),
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def test_lengths_go_to_the_kernels_where_they_help_and_are_exact():
    builder = builder_for(make_impl())
    assert builder.build(0, common(((9, 1), (5, 1)))).seqlens is None  # a decode: nothing to gain
    mixed = builder.build(0, common(((9, 1), (0, 200))))
    assert (mixed.seqlens, mixed.fresh) == (((1, 10), (200, 200)), False)
    assert builder.build(0, common(((0, 150), (0, 200)))).fresh
    assert not builder.build(0, common(((0, 150), (64, 200)))).fresh  # a cached prefix
    assert not builder.build(0, common(((0, 20), (0, 200)))).fresh  # alone, the short one would run over its pages
    drafting = builder_for(make_impl(), speculative_config=SimpleNamespace(num_speculative_tokens=3))
    assert drafting.build(0, common(((9, 4), (0, 200)))).seqlens is None  # bounds, while drafts are in flight
    assert drafting.build(0, common(((0, 200),))).seqlens == ((200, 200),)


def test_ranks_know_how_many_keys_they_hold_before_a_long_prompt():
    group = ThreadGroup(2)

    def rank_part(rank):
        impl = make_impl(Hkv=1)
        impl.context_group = lambda: group
        builder = builder_for(impl)
        share = builder.build(0, common(((65, 200), (0, 130)))).share
        known = share.seqlens, share.context_lens.tolist(), share.seq_lens.tolist()
        return *known, builder.build(0, common(((9, 1), (5, 1)))).share.seqlens

    for rank, found in enumerate(group.run(rank_part)):
        assert found == (((200, 33 - rank), (130, 0)), [33 - rank, 0], [133 - rank, 65], None)


def test_batch_invariance_withholds_lengths_that_depend_on_the_batch(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    builder = builder_for(make_impl())
    before = builder._recorder.value("elsa_vllm_fallbacks", cause="batch_invariant")
    metadata = builder.build(0, common(((9, 1), (0, 200))))
    assert metadata.seqlens is None
    assert builder._recorder.value("elsa_vllm_fallbacks", cause="batch_invariant") - before == builder._counts()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"sliding_window": 8}, {"logits_soft_cap": 4.0}])
def test_every_kind_of_call_is_made_before_requests_come(options, threads, monkeypatch):
    from elsa_serve.vllm_plugin import impl as module
    from elsa_serve.vllm_plugin.backend import warm_up

    seen, written, main = [], [], threading.get_ident()

    def paged(q, *args, **kwargs):
        ((queries, keys), *_) = kwargs["seqlens"]
        seen.append((threading.get_ident() == main, len(args[3]), queries, keys > queries))
        return attention_paged(q, *args, **kwargs)

    monkeypatch.setattr(module, "attention_paged", paged)
    monkeypatch.setattr(module, "reshape_and_cache", lambda k, *others: written.append(len(k)))
    impl = make_impl(**options)
    counted = impl_calls()
    calls = warm_up(impl, 16, torch.float32, torch.device("cpu"), threads)
    here = {call for call in seen if call[0]}
    assert {(queries, after) for _, _, queries, after in here} >= {(1, False), (1, True), (100, True), (130, True)}
    # A whole prompt does without pages, unless the cache is FP8.
    assert ((True, 2, 130, False) in here) == ("kv_cache_dtype" in options)
    assert {call[1:] for call in seen if not call[0]} == ({call[1:] for call in here} if threads > 1 else set())
    assert (len(written), calls) == (1 if threads == 1 else 2, 10)
    assert impl_calls() == counted
    assert warm_up(make_impl(attn_type="encoder_only"), 16, torch.float32, torch.device("cpu"), threads) == 0


def test_ranks_warm_up_alone(monkeypatch):
    """Both parts of what decode context parallelism computes, over all ranks' heads, without any rank's answer."""
    from elsa_serve.vllm_plugin import impl as module
    from elsa_serve.vllm_plugin.backend import warm_up

    seen = []

    def noting(name):
        known = getattr(module, name)

        def call(q, *args, **kwargs):
            seen.append((name, q.shape[1], kwargs["max_seqlen_q"] > 1024))
            return known(q, *args, **kwargs)

        return call

    for name in ("attention_paged", "attention_varlen", "attention"):
        monkeypatch.setattr(module, name, noting(name))
    impl = make_impl(Hkv=1)
    impl.dcp_world_size = 2
    warm_up(impl, 16, torch.float32, torch.device("cpu"), 1)
    assert set(seen) == {(name, heads, long) for name, heads in (("attention_paged", 8), ("attention_varlen", 4))
                         for long in (False, True)}  # fmt: skip


def impl_calls():
    from elsa_serve.vllm_plugin.metrics import recorder

    return sum(recorder().value("elsa_vllm_attention_calls", phase=p) for p in ("prefill", "decode", "mixed"))


def test_the_builder_refuses_what_it_cannot_plan():
    builder = builder_for(make_impl())
    with pytest.raises(NotImplementedError, match="--attention-backend flash_attn"):
        builder.build(0, common(((9, 1),), causal=torch.ones(1, dtype=torch.int32)))
    with pytest.raises(RuntimeError, match="layer l runs object although"):
        builder_for(object())


def test_graphs_are_declared_for_uniform_decode():
    from vllm.v1.attention.backend import AttentionCGSupport

    builder = builder_for(make_impl())
    assert builder.get_cudagraph_support(builder.vllm_config, None) is AttentionCGSupport.UNIFORM_BATCH
    builder.vllm_config.parallel_config.decode_context_parallel_size = 2
    support = builder.get_cudagraph_support(builder.vllm_config, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    counted = builder._recorder.value("elsa_vllm_steps", phase="decode")
    assert builder.build_for_cudagraph_capture(common(((9, 1),))).num_tokens == 1
    assert builder._recorder.value("elsa_vllm_steps", phase="decode") == counted  # a capture is no step


@pytest.mark.parametrize("name", ["32k", "32k-offload", "128k", "128k-offload"])
def test_configurations_are_flags_that_vllm_takes(name):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    file = DEMO_MODEL.parent / f"vllm-llama-13b-{name}.yaml"
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--config", str(file), "--model", str(DEMO_MODEL)]))
    assert args.attention_backend is not None
    assert str(args.attention_backend).rpartition(".")[2].upper() == NAME
    factor = args.hf_overrides["rope_parameters"]["factor"]
    assert args.max_model_len == 4096 * factor
    assert (args.offload_group_size > 0) == name.endswith("offload")
